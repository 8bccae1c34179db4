"""Protect runs that are killed, interrupted or out of disk: no bad file remains, resuming works."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from engine.vault.keyring import Keyring
from engine.vault.reading import check_original
from modeling.encryption import png_format
from modeling.encryption.sealed_image import open_image
from tests.fixtures.paths import ROOT
from tests.fixtures.protection import Scene, draw
from tools import protect
from tools.protect import main

IMAGES = 30
# tools/protect.py with the tiny backbone
PROGRAM = """
import sys, pytest
from tests.fixtures import tiny
from tools import protect
if __name__ == "__main__":
    tiny.install(pytest.MonkeyPatch())
    sys.exit(protect.main())
"""


@pytest.fixture
def scene(scene: Scene) -> Scene:
    """Return a scene with more images and no key yet."""
    shutil.rmtree(scene.photos)
    for index in range(IMAGES):
        draw(scene.photos / f"{index % 7:04d}/{index:04d}_c1.png", index)
    return scene


def _run(command: list[str]) -> None:
    """Run a command in a forked process, with its own fork server for the workers."""
    os.setsid()
    forkserver._forkserver.__init__()  # type: ignore[misc] # forget the one of the test process
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(command))


def _fork(command: list[str]) -> ForkProcess:
    """Start a command without the import of torch, which takes seconds."""
    process = get_context("fork").Process(target=_run, args=(command,))
    process.start()
    return process


def _start(scene: Scene, *more: str) -> ForkProcess:
    """Start a run that reads and seals in two worker processes, one image at a time.

    Some slow tests start the program itself.
    """
    return _fork(scene.protect("--workers", "2", "--batch", "1", *more))


def _originals(scene: Scene) -> list[Path]:
    return sorted(path for path in scene.sealed.glob("*.original") if path.name[0] != ".")


def _wait_for(scene: Scene, count: int, process: ForkProcess) -> None:
    """Wait until the scene has ``count`` sealed files, or the process has ended."""
    while process.is_alive() and len(scene.files) < count:
        time.sleep(0.002)


def _kill(scene: Scene, process: ForkProcess) -> None:
    """Kill a run and check that its workers end and its finished files open."""
    process.kill()
    process.join()
    _check_workers_end(process.pid or 0)
    _check_finished_files(scene)


def _check_finished_files(scene: Scene) -> int:
    """Open every file with a final name; return their number."""
    with scene.keyring() as keyring:
        for path in scene.files:
            sealed = png_format.decode(path.read_bytes())
            open_image(keyring.opening_key(sealed.chunk), sealed)
        for path in _originals(scene):
            original, _ = check_original(path, keyring)
            source = scene.photos / original.metadata.path
            assert original.content == source.read_bytes()
    return len(scene.files)


def _check_resume(scene: Scene, *more: str) -> None:
    """Run protect to its end and check the whole folder."""
    assert main(scene.protect(*more)) == 0
    assert len(_originals(scene)) == IMAGES * ("--keep-original" in more)
    assert _check_finished_files(scene) == IMAGES
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0
    assert [p.name for p in scene.sealed.iterdir() if ".tmp" in p.name] == []


def _kill_often(scene: Scene, kills: int, *more: str) -> None:
    """Kill runs at random moments, each after half of the files were deleted; then resume."""
    chance = random.Random(7)
    for _ in range(kills):
        files = scene.files + _originals(scene)
        for path in chance.sample(files, len(files) // 2):
            path.unlink()
        process = _start(scene, *more)
        _wait_for(scene, chance.randint(1, IMAGES - 1), process)
        time.sleep(chance.random() * 0.02)
        _kill(scene, process)
    _check_resume(scene, *more)


def _kill_reveal_often(scene: Scene, kills: int) -> None:
    """Kill `reveal` at random moments: a final name always has the complete photograph."""
    assert main(scene.protect("--keep-original")) == 0
    command = ["reveal", str(scene.sealed), str(scene.out), *scene.keys]
    contents = scene.out / "contents.json"
    sources = {
        path.relative_to(scene.photos): path.read_bytes() for path in scene.photos.rglob("*.png")
    }

    def revealed() -> list[Path]:
        return [path for path in scene.out.rglob("*.png") if path.name[0] != "."]

    chance = random.Random(7)
    for _ in range(kills):
        for path in chance.sample(revealed(), len(revealed()) // 2):
            path.unlink()
        process = _fork(command)
        enough = chance.randint(0, IMAGES - 1)
        while process.is_alive() and len(revealed()) < enough:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.01)
        process.kill()
        process.join()
        for path in revealed():
            assert path.read_bytes() == sources[path.relative_to(scene.out)]
        if contents.exists():
            assert len(json.loads(contents.read_text("utf-8"))["files"]) in (0, IMAGES)
    assert main(command) == 0
    assert len(revealed()) == IMAGES
    assert json.loads(contents.read_text("utf-8"))["finished"]
    assert [path for path in scene.out.rglob("*") if ".tmp" in path.name] == []


ORIGINALS = pytest.mark.parametrize("more", [(), ("--keep-original",)], ids=["images", "originals"])


@ORIGINALS
def test_kill_9_at_random_moments(scene: Scene, more: tuple[str, ...]) -> None:
    _kill_often(scene, 2, *more)


def test_kill_9_of_reveal_at_random_moments(scene: Scene) -> None:
    _kill_reveal_often(scene, 3)


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["missing", "overwritten"])
def test_kill_9_while_files_of_a_finished_folder_are_rewritten(
    scene: Scene, more: tuple[str, ...]
) -> None:
    """The manifest does not list the files of the killed run; the next run accepts them."""
    assert main(scene.protect()) == 0
    before = {path.name: path.read_bytes() for path in scene.files}
    if not more:
        for path in scene.files[::2]:
            path.unlink()
    process = _start(scene, *more)
    while process.is_alive() and all(
        path.read_bytes() == before[path.name] for path in scene.files
    ):
        time.sleep(0.002)
    _kill(scene, process)
    _check_resume(scene)


def _start_program(scene: Scene) -> subprocess.Popen[bytes]:
    """Start tools/protect.py with two worker processes, one image at a time."""
    command = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = scene.protect("--workers", "2", "--batch", "1")
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )


@pytest.mark.slow
@ORIGINALS
def test_kill_9_at_forty_random_moments(scene: Scene, more: tuple[str, ...]) -> None:
    _kill_often(scene, 40, *more)


@pytest.mark.slow
def test_kill_9_of_reveal_at_forty_random_moments(scene: Scene) -> None:
    _kill_reveal_often(scene, 40)


@pytest.mark.slow
def test_kill_9_of_the_program(scene: Scene) -> None:
    process = _start_program(scene)
    while process.poll() is None and len(scene.files) < IMAGES // 2:
        time.sleep(0.002)
    process.kill()
    process.wait()
    _check_workers_end(process.pid or 0)
    _check_resume(scene)


def _check_workers_end(session: int) -> None:
    """Check that no process of a killed run remains; all are in the session of the run."""
    deadline = time.monotonic() + 600
    while _processes_in(session) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _processes_in(session) == []


def _processes_in(session: int) -> list[int]:
    """Return the running processes in a session."""
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                processes.append(int(entry.name))
    return processes


def _check_interrupted(scene: Scene, code: int) -> None:
    """Check the files and the manifest that an interrupted run left."""
    assert code == 130
    assert 5 <= _check_finished_files(scene) < IMAGES
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0  # lists finished files
    _check_resume(scene)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_finishes_the_batches_under_way(
    scene: Scene, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        while len(scene.files) < 5:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    helper = threading.Thread(target=interrupt)
    helper.start()
    code = main(scene.protect("--batch", "1"))
    helper.join()
    assert signal.getsignal(number) is before
    out = capsys.readouterr().out
    assert "the same command continues" in out
    counts = re.findall(r"(\d+) (?:sealed|already present|failed|left out|not reached)", out)
    assert sum(map(int, counts)) == IMAGES
    assert "not reached" in out
    _check_interrupted(scene, code)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_interrupted_program_finishes_the_batches_under_way(
    scene: Scene, number: signal.Signals
) -> None:
    process = _start_program(scene)
    while process.poll() is None and len(scene.files) < 5:
        time.sleep(0.002)
    process.send_signal(number)
    _check_interrupted(scene, process.wait(timeout=600))
    _check_workers_end(process.pid or 0)


def test_sigterm_ends_opening_with_130_and_leaves_no_temporary_file(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(scene.protect()) == 0
    before, synced = signal.getsignal(signal.SIGTERM), []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("engine.vault.sealed_folder.os.fsync", fsync)
    assert main(["open", str(scene.sealed), str(scene.out), *scene.keys]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in scene.out.rglob("*") if ".tmp" in p.name] == []


def test_a_killed_worker_stops_the_run_and_resuming_completes_it(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill_worker() -> None:
        while len(scene.files) < 3:
            time.sleep(0.001)
        multiprocessing.active_children()[0].kill()

    helper = threading.Thread(target=kill_worker)
    helper.start()
    assert main(scene.protect("--batch", "1", "--workers", "2")) == 3
    helper.join()
    assert "a worker process died" in capsys.readouterr().err
    assert multiprocessing.active_children() == []
    _check_resume(scene)


@ORIGINALS
def test_a_full_disk_stops_the_run_and_resuming_completes_it(
    scene: Scene, small_disk: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    target = small_disk / "sealed"
    full_command = scene.protect("--batch", "4", *more)
    command = [x if x != str(scene.sealed) else str(target) for x in full_command]
    assert main(command) == 3
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert "StorageError" in err
    assert "No space left" in err
    full = Scene(scene.root)
    shutil.copytree(target, full.sealed)
    assert 0 < _check_finished_files(full) < IMAGES
    assert [p.name for p in target.iterdir() if ".tmp" in p.name] == []
    assert main(command) == 3  # still full: another attempt loses nothing
    _check_resume(full, *more)


def test_a_full_disk_stops_reveal_without_a_partial_photograph(
    scene: Scene, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect("--keep-original")) == 0
    out = small_disk / "out"
    assert main(["reveal", str(scene.sealed), str(out), *scene.keys]) == 3
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert "StorageError" in err
    written = list(out.rglob("*.png"))
    assert 0 < len(written) < IMAGES
    for path in written:
        assert path.read_bytes() == (scene.photos / path.relative_to(out)).read_bytes()
    assert not json.loads((out / "contents.json").read_text("utf-8"))["finished"]
    assert [path for path in out.rglob("*") if ".tmp" in path.name] == []


def test_a_read_only_device_stops_the_run(
    scene: Scene, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    command = [x if x != str(scene.sealed) else str(small_disk / "s") for x in scene.protect()]
    assert main(command) == 3
    assert "error: StorageError: " in capsys.readouterr().err


def test_a_failing_device_stops_the_run_and_leaves_no_file(
    scene: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("engine.vault.sealed_folder.os.fsync", refuse)
        patch.setattr("engine.vault.keyring.Keyring.ensure", lambda self, subjects: None)
        scene_keys = scene.keyring()
        patch.setattr("tools.protect.open_keyring", lambda arguments: scene_keys)
        assert main(scene.protect()) == 3
    assert "error: StorageError: " in capsys.readouterr().err
    assert [p.name for p in scene.sealed.iterdir()] == []
    _check_resume(scene)


def test_a_locked_keyring_stops_the_run(
    scene: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keyring.open.__func__, "__defaults__", (50,))  # type: ignore[attr-defined]
    with scene.keyring() as other, other.store.transaction(write=True):
        assert main(scene.protect()) == 4
    assert "KeyringLocked" in capsys.readouterr().err
    assert scene.files == []
    _check_resume(scene)


def test_a_key_is_on_disk_before_the_first_file_under_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.vault import sealing_work

    publish = sealing_work.publish

    def checked(path: Path, content: bytes, *, overwrite: bool) -> None:
        with scene.keyring() as fresh:
            fresh.opening_key(png_format.decode(content).chunk)
        publish(path, content, overwrite=overwrite)

    monkeypatch.setattr(sealing_work, "publish", checked)
    assert main(scene.protect()) == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("verify sealed", "interrupted\n"),
        ("search a.png sealed --checkpoint run", "interrupted\n"),
        ("open sealed out", "interrupted; the same command continues\n"),
        ("recover sealed out --checkpoint run", "interrupted; the same command continues\n"),
        ("reveal sealed out", "interrupted; the same command continues\n"),
    ],
)
def test_only_resumable_commands_report_that_they_can_continue(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for step in ("open_keyring", "_load_model", "_check_paths"):  # whichever comes first
        monkeypatch.setattr(protect, step, interrupt)
    assert main([*command.split(), "--keyring", "keys.db", "--master", "master.key"]) == 130
    assert capsys.readouterr().err == message
