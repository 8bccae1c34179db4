"""A full disk, a kill and a second process during `expire` and `destroy --certificate`."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.vault import erasure
from engine.vault.erasure import verify_certificate
from engine.vault.keyring import Keyring
from modeling.encryption.ised_errors import (
    StorageError,
)
from tests.fixtures.archives import PERSON, SmallArchive
from tools import keyring as tool


def test_a_full_disk_during_expire_changes_nothing(
    archive: SmallArchive, set_day: Callable[[int], None]
) -> None:
    set_day(40)
    expire = [*archive.keys, "expire", "--older-than", "30d", "--yes"]

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))  # too small for the journal
        os._exit(tool.main(expire))

    assert _exit_code(child) == 3
    assert set(archive.states().values()) == {"active"}
    assert tool.main(expire) == 0


def test_a_full_disk_after_the_destruction_is_reported_and_the_command_completes_it(
    archive: SmallArchive, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise StorageError(f"cannot write {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(erasure, "write_new_private", full)
        assert tool.main(archive.destroy()) == 3
    error = capsys.readouterr().err
    assert "the keys were destroyed, but there is no certificate" in error
    assert "run the same command again" in error
    assert list(archive.root.glob("*.json")) == []
    assert tool.main(archive.destroy()) == 0


def test_two_processes_destroy_and_seal_at_once(archive: SmallArchive) -> None:
    context = multiprocessing.get_context("fork")

    def seal() -> None:
        with archive.keyring() as keyring:
            keyring.ensure(f"new/{number}" for number in range(10))
            for number in range(10, 15):
                keyring.sealing_key(f"new/{number}")

    commands = (seal, lambda: tool.main(archive.destroy()), lambda: tool.main(archive.destroy()))
    processes = [context.Process(target=command) for command in commands]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with archive.keyring() as keyring:
        statement = verify_certificate(keyring, archive.root / "erasure.json")
        assert len(statement["keys"]) == 2
        assert len([row for row in keyring.rows if row.state == "active"]) == 17


def _exit_code(child: Callable[[], object]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def _kill_at_random_moments(
    template: SmallArchive,
    root: Path,
    command: Callable[[SmallArchive], list[str]],
    check: Callable[[SmallArchive], None],
    kills: int,
) -> None:
    """Kill a command `kills` times, check the archive each time, and let the command complete."""
    chance, context = random.Random(7), multiprocessing.get_context("fork")
    longest, killed = 0.2, 0
    while killed < kills:
        archive = template.copy(root / "killed")
        process = context.Process(target=tool.main, args=(command(archive),))
        process.start()
        start = time.monotonic()
        process.join(chance.random() * longest)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            killed += 1
        else:
            longest = max(0.01, 0.8 * (time.monotonic() - start))  # more kills hit the command
        check(archive)
        assert tool.main(command(archive)) == 0
        check(archive)
        shutil.rmtree(archive.root)


def _check_certificate(archive: SmallArchive) -> None:
    """A certificate never states more than what happened, and there is no half a file."""
    path = archive.root / "erasure.json"
    assert [name.name for name in archive.root.glob("*.json")] == [path.name] * path.exists()
    with archive.keyring() as keyring:
        states = {row.state for label in PERSON for row in keyring.rows_of(label)}
        assert len(states) == 1  # all or none
        if path.exists():
            statement = verify_certificate(keyring, path)
            assert [len(folder["files"]) for folder in statement["folders"]] == [3, 2]
            assert states == {"destroyed"}
        assert keyring.active_row("market/2") is not None


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_of_destroy_with_certificate(
    template: SmallArchive, tmp_path: Path, kills: int, capfd: pytest.CaptureFixture[str]
) -> None:
    _kill_at_random_moments(template, tmp_path, SmallArchive.destroy, _check_certificate, kills)


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_of_expire(
    template: SmallArchive,
    tmp_path: Path,
    kills: int,
    set_day: Callable[[int], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    set_day(40)

    def command(archive: SmallArchive) -> list[str]:
        return [*archive.keys, "expire", "--older-than", "30d", "--yes"]

    def check(archive: SmallArchive) -> None:
        assert len(set(archive.states().values())) == 1  # all or none

    _kill_at_random_moments(template, tmp_path, command, check, kills)


@pytest.mark.parametrize("name", ["destroy", "_certificate", "write_new_private"])
def test_kill_9_between_the_steps_of_a_destruction(
    archive: SmallArchive, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = getattr(erasure, name)

    def kill(*args: object, **options: object) -> None:
        step(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(erasure, name, kill)
        assert _exit_code(lambda: tool.main(archive.destroy())) == -signal.SIGKILL
    _check_certificate(archive)
    assert (archive.root / "erasure.json").exists() == (name == "write_new_private")
    assert tool.main(archive.destroy()) == 0
    _check_certificate(archive)
    with Keyring.open(archive.path, archive.master) as keyring:
        assert not [row for label in PERSON for row in keyring.rows_of(label) if row.wrapped]
