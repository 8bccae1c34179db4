from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest

from utils.files import WriteError
from utils.logger import ONLY_IN_FILE, Progress, close_logger, get_logger, setup_logger

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} reid_baseline INFO: "


def test_lines_have_the_form_scripts_rely_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logger(tmp_path).info("mAP: %.1f%%", 87.8)
    text = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(LINE + r"mAP: 87\.8%\n", text)
    assert capsys.readouterr().out == text


def test_the_log_is_appended_and_no_line_is_logged_twice(tmp_path: Path) -> None:
    for turn in range(3):
        setup_logger(tmp_path).info("turn %d", turn)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[-6:] for line in lines] == ["turn 0", "turn 1", "turn 2"]


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    setup_logger(tmp_path)
    setup_logger()
    get_logger().info("hello")
    close_logger()
    assert (tmp_path / "log.txt").read_text() == ""


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(WriteError, match=r"log\.txt.*choose another output folder"):
        setup_logger(tmp_path)


def test_progress_is_silent_off_a_terminal_unless_work_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    setup_logger(tmp_path)
    with Progress(10, "short") as bar:
        for _ in range(10):
            bar.update()
    assert capsys.readouterr() == ("", "")
    with Progress(10, "long", quiet_s=0) as bar:
        bar.update(4, loss=1.25)
        assert bar.rate > 0
    assert re.search(r"long: +40%.* 4/10 \[.*img/s, loss=1\.25\]", capsys.readouterr().out)


def test_progress_of_a_command_without_a_log_is_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    close_logger()
    monkeypatch.setattr(get_logger(), "propagate", False)  # pytest has handlers of its own
    with Progress(10, "long", quiet_s=0) as bar:
        bar.update(4)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"long: +40%.* 4/10 \[", err)


def test_neither_a_terminal_nor_a_file_receives_colours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So NO_COLOR needs no code."""
    main, terminal = pty.openpty()
    size = struct.pack("HHHH", 24, 80, 0, 0)  # rows, columns
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    with os.fdopen(terminal, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", stream)
        logger = setup_logger(tmp_path)
        for _ in Progress.over(range(3), "long"):
            logger.warning("\x1b[31mred\x1b[0m")
        close_logger()
    text = ""
    with contextlib.suppress(OSError):  # the end, on Linux
        while part := os.read(main, 10_000):
            text += part.decode()
    os.close(main)
    assert "long:   0%" in text and text.count("WARNING: red") == 3
    assert not re.search(r"\x1b\[[0-9;]*m", text)
    assert "\x1b" not in (tmp_path / "log.txt").read_text("utf-8")


def test_a_full_disk_stops_the_run_with_one_sentence(
    small_disk: Path, capsys: pytest.CaptureFixture
) -> None:
    logger = setup_logger(small_disk)
    with pytest.raises(WriteError, match=r"log\.txt: No space left on device; free some space"):
        for _ in range(1000):
            logger.info("x" * 1000)
    close_logger()
    assert capsys.readouterr().err == ""


def test_a_line_only_for_the_file_stays_off_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    logger = setup_logger(tmp_path)
    logger.error("shown in red elsewhere", extra=ONLY_IN_FILE)
    close_logger()
    assert capsys.readouterr() == ("", "")
    assert "shown in red elsewhere" in (tmp_path / "log.txt").read_text("utf-8")
