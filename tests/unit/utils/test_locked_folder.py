"""One writer to a folder: a second one is refused, and a killed one locks nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from utils import files
from utils.files import LOCK_NAME, FolderInUseError, WriteError, locked_folder


def _hold(folder: Path, ready: Connection) -> None:
    with locked_folder(folder):
        child = os.fork()  # as a DataLoader worker, which outlives a killed parent for seconds
        if child == 0:
            time.sleep(60)
            os._exit(0)
        ready.send(child)
        time.sleep(60)


def _holder(folder: Path) -> tuple[multiprocessing.Process, int]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(folder, theirs))
    process.start()
    return process, ours.recv()


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process, child = _holder(folder)
    try:
        with (
            pytest.raises(FolderInUseError) as error,
            locked_folder(folder),
        ):
            pytest.fail("entered")
        text = f"in use by process {process.pid} on host {socket.gethostname()}; wait until"
        assert text in str(error.value)
        process.kill()  # its child keeps running
        process.join()
        assert (folder / LOCK_NAME).exists()
        with locked_folder(folder):
            pass
        assert list(folder.iterdir()) == []
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_second_writer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with locked_folder(tmp_path):
        with pytest.raises(FolderInUseError), locked_folder(tmp_path):
            pytest.fail("entered")
        with locked_folder(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []  # nothing was written to the other one
    with locked_folder(tmp_path):
        pass


def test_an_error_ends_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked_folder(tmp_path):
        raise KeyError
    with locked_folder(tmp_path) as folder:
        assert folder == tmp_path


def test_a_file_system_without_locks_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with locked_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"), locked_folder(tmp_path / "file"):
        pytest.fail("entered")
    (tmp_path / "run" / LOCK_NAME).mkdir(parents=True)
    with pytest.raises(WriteError, match=r"\.lock"), locked_folder(tmp_path / "run"):
        pytest.fail("entered")


def _symbolic_link(lock: Path, secret: Path) -> None:
    lock.symlink_to(secret)


def _hard_link(lock: Path, secret: Path) -> None:
    lock.hardlink_to(secret)


def _pipe(lock: Path, _: Path) -> None:
    os.mkfifo(lock)


@pytest.mark.parametrize("put", [_symbolic_link, _hard_link, _pipe])
def test_a_link_in_the_place_of_the_lock_file_destroys_nothing(
    tmp_path: Path, put: Callable[[Path, Path], None]
) -> None:
    """Locking writes into the file: through a link it would overwrite a master key."""
    secret, folder = tmp_path / "master.key", tmp_path / "run"
    secret.write_bytes(bytes(range(32)))
    folder.mkdir()
    put(folder / LOCK_NAME, secret)
    with (
        pytest.raises(WriteError, match=r"run/\.lock is a link .*; remove it"),
        locked_folder(folder),
    ):
        pytest.fail("entered")
    assert secret.read_bytes() == bytes(range(32))
    (folder / LOCK_NAME).unlink()
    with locked_folder(folder):
        pass
