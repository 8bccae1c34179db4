"""Faults while a file is written: the old file must stay complete, without temporary files."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.fixtures.paths import ROOT
from utils.errors import UserError
from utils.files import WriteError, atomic_write, ensure_folder, remove_leftovers, write_text

OLD = b"old " * 100


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "kept.pth"
    path.write_bytes(OLD)
    return path


def test_the_new_file_replaces_the_old_one_and_leaves_no_other(kept: Path) -> None:
    with atomic_write(kept) as temporary:
        temporary.write_bytes(b"new")
        assert kept.read_bytes() == OLD
        assert temporary.parent == kept.parent
        assert temporary.suffix == kept.suffix
    assert kept.read_bytes() == b"new"
    assert list(kept.parent.iterdir()) == [kept]


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "für alle\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a character: \ud800")
    assert path.read_bytes() == "für alle\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a/b/c.txt") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "a/b/c.txt").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError("odd")])
def test_any_error_keeps_the_old_file_and_removes_the_temporary(
    kept: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught, atomic_write(kept) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert caught.value is error
    assert kept.read_bytes() == OLD
    assert list(kept.parent.iterdir()) == [kept]


def test_a_writer_that_wrote_nothing_is_an_error_and_keeps_the_old_file(kept: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(kept):
        pass
    assert kept.read_bytes() == OLD


def test_permissions_are_kept_and_new_files_get_the_default(kept: Path) -> None:
    kept.chmod(0o640)
    with atomic_write(kept) as temporary:
        temporary.write_bytes(b"new")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640
    usual = kept.with_name("usual")
    usual.touch()
    with atomic_write(kept.with_name("fresh")) as temporary:
        temporary.write_bytes(b"new")
    assert kept.with_name("fresh").stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize("writer", ["bytes", "torch"])
def test_full_disk_is_named_and_leaves_the_old_file(small_disk: Path, writer: str) -> None:
    path = small_disk / "kept.pth"
    path.write_bytes(b"x" * 48 * 1024)
    with pytest.raises(WriteError, match=r"No space left.*free some space") as caught:  # noqa: SIM117
        with atomic_write(path) as temporary:
            if writer == "bytes":
                temporary.write_bytes(b"y" * 48 * 1024)
            else:
                torch.save({"weight": torch.zeros(48, 256)}, temporary)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"x" * 48 * 1024
    assert list(small_disk.iterdir()) == [path]


def test_limit_on_file_sizes_is_named_and_leaves_the_old_file(kept: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        with pytest.raises(WriteError, match="raise the limit"), atomic_write(kept) as temporary:
            temporary.write_bytes(b"y" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert kept.read_bytes() == OLD
    assert list(kept.parent.iterdir()) == [kept]


def test_failing_sync_is_an_error(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(WriteError, match="check the device"), atomic_write(kept) as temporary:
        temporary.write_bytes(b"new")
    assert kept.read_bytes() == OLD


def test_a_file_where_a_folder_is_needed_is_named(kept: Path) -> None:
    with pytest.raises(WriteError, match=r"kept\.pth"):
        ensure_folder(kept / "sub")
    with pytest.raises(WriteError, match="choose another"):
        ensure_folder(kept)


def test_a_folder_without_the_right_to_write_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        folder = Path("/proc/self/fdinfo")  # root cannot write there either
    else:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
    with pytest.raises(WriteError, match="cannot write"):  # noqa: SIM117
        with atomic_write(folder / "sub/file") as temporary:
            temporary.write_text("x")


KILLED = """
import sys, time
from utils.files import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    with open(temporary, "wb") as file:
        file.write(b"half")
        file.flush()
        print("writing", flush=True)
        time.sleep(60)
"""


def test_a_kill_keeps_the_old_file_and_the_temporary_one_is_removed_later(kept: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(kept)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert remove_leftovers(kept.parent) == 0  # its process still runs
        process.kill()
    assert kept.read_bytes() == OLD
    assert len(list(kept.parent.iterdir())) == 2
    assert remove_leftovers(kept.parent) == 1
    assert list(kept.parent.iterdir()) == [kept]


READER = """
import sys
from pathlib import Path
from utils.files import atomic_write
for turn in range(60):
    with atomic_write(sys.argv[1]) as temporary:
        temporary.write_bytes(bytes([turn % 250]) * 65536)
"""


def test_a_reader_never_sees_a_mixture(kept: Path) -> None:
    kept.write_bytes(bytes(65536))
    command = [sys.executable, "-c", READER, str(kept)]
    reads = 0
    with subprocess.Popen(command, cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            content = kept.read_bytes()
            assert len(content) == 65536
            assert len(set(content)) == 1
            reads += 1
    assert process.returncode == 0
    assert reads


def test_leftovers_of_an_earlier_process_with_the_same_number_are_removed(tmp_path: Path) -> None:
    """In containers every run is process 1."""
    left = tmp_path / f".kept.{os.getpid()}-0badcafe0badcafe.tmp.pth"
    left.write_bytes(b"half")
    with atomic_write(tmp_path / "kept.pth") as temporary:
        temporary.write_bytes(b"new")
        assert remove_leftovers(tmp_path) == 1
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.pth"]


def test_leftovers_of_one_file_can_be_removed(tmp_path: Path) -> None:
    one, other = (tmp_path / f".{name}.99999999-0badcafe.tmp" for name in ("a.key", "b.a.key"))
    one.touch()
    other.touch()
    assert remove_leftovers(tmp_path, "a.key") == 1
    assert list(tmp_path.iterdir()) == [other]
