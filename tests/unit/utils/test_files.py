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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.paths import ROOT
from utils import files
from utils.errors import UserError
from utils.files import (
    WriteError,
    atomic_write,
    ensure_folder,
    recover,
    remove_leftovers,
    write_text,
)

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
from typing import Any
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


@pytest.mark.parametrize(
    "process", [os.getpid, os.getppid, lambda: 99_999_999], ids=["own", "parent", "unused"]
)
def test_process_numbers_do_not_matter(tmp_path: Path, process: Callable[[], int]) -> None:
    """Earlier versions put them into names. A number is reused, and every container has a 1."""
    left = tmp_path / f".kept.{process()}-0badcafe0badcafe.tmp.pth"
    left.write_bytes(b"half")
    with atomic_write(tmp_path / "kept.pth") as temporary:
        temporary.write_bytes(b"new")
        assert remove_leftovers(tmp_path) == 1
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.pth"]


def test_a_temporary_file_of_a_zombie_is_a_leftover(kept: Path) -> None:
    """A killed process whose parent has not waited for it still has its number."""
    command = [sys.executable, "-c", KILLED, str(kept)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.stdout.read()  # until its files are closed
        os.kill(process.pid, 0)  # the number is in use
        assert remove_leftovers(kept.parent) == 1
    assert list(kept.parent.iterdir()) == [kept]


def test_a_temporary_file_removed_before_it_is_locked_is_made_again(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = files._lock, []

    def late(descriptor: int, path: Path) -> bool:
        if not removed:
            removed.append(remove_leftovers(kept.parent))
        return lock(descriptor, path)

    monkeypatch.setattr(files, "_lock", late)
    with atomic_write(kept) as temporary:
        temporary.write_bytes(b"new")
    assert removed == [1]
    assert kept.read_bytes() == b"new"
    assert list(kept.parent.iterdir()) == [kept]


def test_names_of_other_files_and_other_kinds_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".notes.2024.tmp.txt").write_text("mine")
    (tmp_path / ".x.0badcafe0badcafe.tmp").mkdir()
    os.mkfifo(tmp_path / ".y.0badcafe0badcafe.tmp")
    (tmp_path / ".z.0badcafe0badcafe.tmp").symlink_to("target")
    (tmp_path / "target").write_text("mine")
    assert remove_leftovers(tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 5


def test_the_journal_of_a_leftover_database_is_removed_with_it(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "k.db", keep_name=True) as temporary:
        temporary.write_bytes(b"new")
        journal = Path(f"{temporary}-journal")
        journal.touch()
        assert remove_leftovers(tmp_path) == 0
        left = tmp_path / ".k.db.99-0badcafe.tmp"
        left.touch()
        Path(f"{left}-journal").touch()
        assert remove_leftovers(tmp_path) == 2
    assert remove_leftovers(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["k.db"]


def test_one_of_several_writers_that_do_not_overwrite_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with atomic_write(path, overwrite=False, mode=0o600) as temporary:
        temporary.write_bytes(b"first")
        with pytest.raises(FileExistsError):  # noqa: SIM117
            with atomic_write(path, overwrite=False) as other:
                other.write_bytes(b"second")
                path.write_bytes(b"taken")
        path.unlink()
    assert path.read_bytes() == b"first"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


HOLDER = """
import sys, time
from pathlib import Path
from typing import Any
from utils.files import staged_folder
with staged_folder(Path(sys.argv[1])) as staging:
    (staging / "half").touch()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_staged_folder_that_is_removed_before_it_is_held_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes begin at the same time, for example to draw the same synthetic set."""
    held = files._held

    def after_another_process(folder: Path) -> Any:
        monkeypatch.setattr(files, "_held", held)
        files.recover(tmp_path / "set")
        assert not folder.exists()
        return held(folder)

    monkeypatch.setattr(files, "_held", after_another_process)
    with files.staged_folder(tmp_path / "set") as staging:
        (staging / "image").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "image"]


def test_a_staged_folder_is_kept_while_its_process_runs(tmp_path: Path) -> None:
    target = tmp_path / "set"
    old = tmp_path / ".set.partial-host-1"  # as earlier versions named it
    old.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(target)], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert not old.exists()
        recover(target)
        (staging,) = tmp_path.iterdir()
        assert (staging / "half").exists()
        process.kill()
    recover(target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_replaced_folder_is_restored_if_there_is_no_new_one(tmp_path: Path, exists: bool) -> None:
    target, replaced = tmp_path / "set", tmp_path / ".set.replaced-0badcafe0badcafe"
    replaced.mkdir()
    (replaced / "old").touch()
    if exists:
        target.mkdir()
    recover(target)
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "old").exists() != exists


def test_leftovers_of_one_file_can_be_removed(tmp_path: Path) -> None:
    one, other = (tmp_path / f".{name}.99999999-0badcafe.tmp" for name in ("a.key", "b.a.key"))
    one.touch()
    other.touch()
    assert remove_leftovers(tmp_path, "a.key") == 1
    assert list(tmp_path.iterdir()) == [other]
