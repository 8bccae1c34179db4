"""Protect runs killed, interrupted, or out of disk: no bad file stays, resume completes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from yacs.config import CfgNode

from engine.vault.keyring import Keyring
from modeling.encryption import png_format
from modeling.encryption.sealed_image import open_image
from tests.fixtures.paths import ROOT
from tests.fixtures.protection import Scene, draw, make_scene
from tools import sealed_pictures
from tools.protect import main

PICTURES = 60


@pytest.fixture
def scene(make_cfg: Callable[..., CfgNode], tmp_path: Path) -> Scene:
    scene = make_scene(make_cfg, tmp_path)
    shutil.rmtree(scene.photos)
    for index in range(PICTURES):
        draw(scene.photos / f"{index % 7:04d}/{index:04d}_c1.png", index)
    return scene


def _start(scene: Scene, *more: str) -> subprocess.Popen[bytes]:
    """Start a run that reads and seals in two worker processes, a picture at a time."""
    command = [sys.executable, str(ROOT / "tools/protect.py"), *scene.protect()]
    pace = ["--workers", "2", "--batch", "1", *more]
    return subprocess.Popen(
        [*command, *pace],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SCENE": str(scene.root)},
    )


def _wait_for(scene: Scene, count: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until so many files are there, or the process has ended."""
    while process.poll() is None and len(scene.files) < count:
        time.sleep(0.002)


def _check_finished_files(scene: Scene) -> int:
    """Open every file under a final name; return how many there are."""
    with scene.keyring() as keyring:
        for path in scene.files:
            sealed = png_format.decode(path.read_bytes())
            open_image(keyring.opening_key(sealed.chunk), sealed)
    return len(scene.files)


def _check_resume(scene: Scene) -> None:
    """Run to the end and check the whole folder."""
    assert main(scene.protect()) == 0
    assert _check_finished_files(scene) == PICTURES
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0
    assert [p.name for p in scene.sealed.iterdir() if ".tmp" in p.name] == []


def _kill_often(scene: Scene, kills: int) -> None:
    chance = random.Random(7)
    for _ in range(kills):
        for path in chance.sample(scene.files, len(scene.files) // 2):
            path.unlink()
        process = _start(scene)
        _wait_for(scene, chance.randint(1, PICTURES - 1), process)
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.wait()
        _check_workers_end(scene)
        _check_finished_files(scene)
    _check_resume(scene)


def test_kill_9_at_random_moments(scene: Scene) -> None:
    _kill_often(scene, 2)


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["missing", "overwritten"])
def test_kill_9_while_a_finished_folder_is_made_anew(scene: Scene, more: tuple[str, ...]) -> None:
    """What the killed run has made by then is not what the manifest lists, and yet its own."""
    assert main(scene.protect()) == 0
    before = {path.name: path.read_bytes() for path in scene.files}
    if not more:
        for path in scene.files[::2]:
            path.unlink()
    process = _start(scene, *more)
    while process.poll() is None and all(
        path.read_bytes() == before[path.name] for path in scene.files
    ):
        time.sleep(0.002)
    process.kill()
    process.wait()
    _check_workers_end(scene)
    _check_resume(scene)


@pytest.mark.slow
def test_kill_9_at_forty_random_moments(scene: Scene) -> None:
    _kill_often(scene, 40)


def _processes_of(scene: Scene) -> list[int]:
    """Return the processes that were started for the scene and still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                zombie = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            except OSError:
                continue
            if f"SCENE={scene.root}".encode() in environment and not zombie:
                found.append(int(entry.name))
    return found


def _check_workers_end(scene: Scene) -> None:
    """Check that nothing of a killed run goes on."""
    deadline = time.monotonic() + 30
    while _processes_of(scene) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _processes_of(scene) == []


def _check_interrupted(scene: Scene, code: int) -> None:
    """Check what an interrupted run left."""
    assert code == 130
    assert 5 <= _check_finished_files(scene) < PICTURES
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0  # the manifest knows what is there
    _check_resume(scene)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_finishes_what_it_began(
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
    assert "the same command goes on" in capsys.readouterr().out
    _check_interrupted(scene, code)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_processes_finish_what_they_began(scene: Scene, number: signal.Signals) -> None:
    process = _start(scene)
    _wait_for(scene, 5, process)
    process.send_signal(number)
    _check_interrupted(scene, process.wait(timeout=60))
    _check_workers_end(scene)


def test_kill_ends_opening_with_130_and_leaves_nothing(
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


def test_a_worker_that_dies_stops_the_run_and_resume_completes(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill_one() -> None:
        while len(scene.files) < 3:
            time.sleep(0.001)
        multiprocessing.active_children()[0].kill()

    helper = threading.Thread(target=kill_one)
    helper.start()
    assert main(scene.protect("--batch", "1", "--workers", "2")) == 3
    helper.join()
    assert "a worker process died" in capsys.readouterr().err
    assert multiprocessing.active_children() == []
    _check_resume(scene)


def test_full_disk_stops_and_resume_completes(
    scene: Scene, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = small_disk / "sealed"
    command = [x if x != str(scene.sealed) else str(target) for x in scene.protect("--batch", "4")]
    assert main(command) == 3
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert "StorageError" in err
    assert "No space left" in err
    full = Scene(scene.root)
    shutil.copytree(target, full.sealed)
    written = _check_finished_files(full)
    assert 0 < written < PICTURES
    assert [p.name for p in target.iterdir() if ".tmp" in p.name] == []
    assert main(command) == 3  # still full: nothing is lost by trying
    _check_resume(full)


def test_read_only_device_stops(
    scene: Scene, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    command = [x if x != str(scene.sealed) else str(small_disk / "s") for x in scene.protect()]
    assert main(command) == 3
    assert "error: StorageError: " in capsys.readouterr().err


def test_failing_device_stops_and_leaves_nothing(
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


def test_locked_keyring_stops(
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
    ("command", "told"),
    [
        ("verify sealed", "interrupted\n"),
        ("search a.png sealed --checkpoint run", "interrupted\n"),
        ("open sealed out", "interrupted; the same command goes on\n"),
        ("recover sealed out --checkpoint run", "interrupted; the same command goes on\n"),
    ],
)
def test_only_what_goes_on_says_so(
    command: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for step in ("open_keyring", "load_model", "check_places"):  # whichever comes first
        monkeypatch.setattr(sealed_pictures, step, interrupt)
    assert main([*command.split(), "--keyring", "keys.db", "--master", "master.key"]) == 130
    assert capsys.readouterr().err == told
