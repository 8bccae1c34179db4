"""A power cut right after a command reports success loses nothing that it reported.

The files are on an ext4 image behind a loop device. The image is copied the moment a command
returns: the copy contains only what was synced. Mounting the copy recovers the journal, as after a
power cut. This needs root and loop devices.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from yacs.config import CfgNode

from engine.vault import audit, keyring_admin
from engine.vault.audit_reader import AuditLog
from engine.vault.erasure import verify_certificate
from engine.vault.keyring import Keyring
from engine.vault.keyring_admin import export_subject, import_subject
from engine.vault.master import KeyFile, Passphrase
from modeling.encryption.ised_errors import DestroyedKey, KeyringError, RevokedKey
from tests.fixtures import tiny
from tests.fixtures.keyrings import CHEAP, after, to_format
from tests.fixtures.protection import Scene, make_scene
from tools import keyring as keyring_tool
from tools import protect as protect_tool
from utils.files import staged_folder, write_text
from utils.logger import close_logger

pytestmark = pytest.mark.slow

SUBJECTS = ("set/1", "set/2", "set/3")
PHRASE = Passphrase("for the court", CHEAP)


@contextmanager
def _loop_mount(image: Path, folder: Path) -> Iterator[Path]:
    """Mount an image; skip the test where that is impossible."""
    folder.mkdir(exist_ok=True)
    # A long commit interval: nothing but a sync reaches the device.
    command = ["mount", "-o", "loop,commit=300", str(image), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("mount is not installed")
    if done.returncode:
        pytest.skip(f"cannot mount a loop device: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Disk:
    """A mounted ext4 image of 24 MiB, of which copies are mounted as after a power cut."""

    def __init__(self, image: Path, root: Path) -> None:
        self._image, self.root, self._cuts = image, root, 0

    @contextmanager
    def after_power_cut(self) -> Iterator[Path]:
        """Yield the folder of a copy of what is on the device now."""
        self._cuts += 1
        name = f"{self._image.stem}-cut{self._cuts}"
        copy = self._image.with_name(f"{name}.img")
        shutil.copyfile(self._image, copy)
        with _loop_mount(copy, self._image.with_name(name)) as folder:
            yield folder
        copy.unlink()


def _make_disk(folder: Path, name: str) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("mounting a loop device needs root")
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    image = folder / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
    with _loop_mount(image, folder / name) as root:
        yield Disk(image, root)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from _make_disk(tmp_path, "disk")


@pytest.fixture
def second_disk(tmp_path: Path) -> Iterator[Disk]:
    yield from _make_disk(tmp_path, "second")


@pytest.fixture
def base(disk: Disk) -> list[str]:
    """Return the options of a keyring with three subjects, which is on the device."""
    keys = ["--keyring", str(disk.root / "k.db"), "--master", str(disk.root / "m.key")]
    with Keyring.create(disk.root / "k.db", KeyFile(disk.root / "m.key")) as keyring:
        keyring.ensure(SUBJECTS)
        export_subject(keyring, SUBJECTS[2], disk.root / "three.keys", PHRASE)
    os.sync()
    return keys


def _keyring(root: Path, master: str = "m.key") -> Keyring:
    return Keyring.open(root / "k.db", KeyFile(root / master))


def test_a_copy_lacks_what_was_not_synced(disk: Disk) -> None:
    """Otherwise the other tests would show nothing."""
    (disk.root / "unsynced").write_text("x")
    with disk.after_power_cut() as root:
        assert not (root / "unsynced").exists()


def test_init(disk: Disk) -> None:
    keys = ["--keyring", str(disk.root / "k.db"), "--master", str(disk.root / "m.key")]
    assert keyring_tool.main([*keys, "init"]) == 0
    with disk.after_power_cut() as root, _keyring(root) as keyring:
        assert keyring.rows == []


def test_states_of_keys(disk: Disk, base: list[str]) -> None:
    assert keyring_tool.main([*base, "destroy", SUBJECTS[0], "--yes"]) == 0
    with disk.after_power_cut() as root, _keyring(root) as keyring:
        with pytest.raises(DestroyedKey):
            keyring.sealing_key(SUBJECTS[0])
        keyring.sealing_key(SUBJECTS[1])
    assert keyring_tool.main([*base, "revoke", SUBJECTS[1]]) == 0
    with disk.after_power_cut() as root, _keyring(root) as keyring, pytest.raises(RevokedKey):
        keyring.sealing_key(SUBJECTS[1])
    assert keyring_tool.main([*base, "revoke", SUBJECTS[1], "--undo"]) == 0
    with disk.after_power_cut() as root, _keyring(root) as keyring:
        keyring.sealing_key(SUBJECTS[1])
    assert keyring_tool.main([*base, "rotate", SUBJECTS[1]]) == 0
    with disk.after_power_cut() as root, _keyring(root) as keyring:
        assert len(keyring.rows_of(SUBJECTS[1])) == 2


def test_conversion_expiry_and_certificate(
    disk: Disk, base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with _keyring(disk.root) as keyring:
        to_format(2, keyring)
    os.sync()
    certificate = disk.root / "erasure.json"
    destroy = ["destroy", SUBJECTS[0], "--yes", "--certificate", str(certificate)]
    assert keyring_tool.main([*base, *destroy]) == 0
    with disk.after_power_cut() as root, _keyring(root) as keyring:
        assert keyring.head.format == 3
        assert len(verify_certificate(keyring, root / "erasure.json")["keys"]) == 1
    day = int(time.time() // 86_400) + 40
    monkeypatch.setattr("engine.vault.erasure.today", lambda: day)
    assert keyring_tool.main([*base, "expire", "--older-than", "30d", "--yes"]) == 0
    with disk.after_power_cut() as root, _keyring(root) as keyring:
        assert {row.state for row in keyring.rows} == {"destroyed"}


def test_the_audit_log(disk: Disk, base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a line is written, and after it is counted, for both entries of a command."""
    with ExitStack() as stack:
        roots: list[Path] = []

        def cut() -> None:
            roots.append(stack.enter_context(disk.after_power_cut()))

        with monkeypatch.context() as patch:
            for name in ("_write", "_append"):
                patch.setattr(audit, name, after(getattr(audit, name), cut))
            assert keyring_tool.main([*base, "rotate", SUBJECTS[0]]) == 0
        states = []
        for root in roots:
            with _keyring(root) as keyring:
                counted, _ = keyring.audit_state()
                log = AuditLog(keyring)
                states.append((len(list(log)), counted, len(keyring.rows_of(SUBJECTS[0]))))
                assert log.problems == []
        assert states == [(1, 0, 1), (1, 1, 1), (2, 1, 2), (2, 2, 2)]
        for root, (lines, counted, _) in zip(roots, states, strict=True):
            keys = ["--keyring", str(root / "k.db"), "--master", str(root / "m.key")]
            assert keyring_tool.main([*keys, "list"]) == 0
            with _keyring(root) as keyring:
                log = AuditLog(keyring)
                assert len(list(log)) == log.count == lines + 2
                assert log.problems == []
                assert len(log.notes) == lines - counted


def test_rekey_to_a_key_file(disk: Disk, base: list[str]) -> None:
    """The user deletes the old master when the command reports success."""
    assert keyring_tool.main([*base, "rekey", "--new-master", str(disk.root / "new.key")]) == 0
    with disk.after_power_cut() as root:
        with _keyring(root, "new.key") as keyring:
            assert len(keyring.rows) == len(SUBJECTS)
        with pytest.raises(KeyringError):
            _keyring(root)
        assert not list(root.glob(".*rekey"))


def test_rekey_with_the_key_file_on_another_disk(
    disk: Disk, second_disk: Disk, base: list[str]
) -> None:
    new = second_disk.root / "new.key"
    assert keyring_tool.main([*base, "rekey", "--new-master", str(new)]) == 0
    with disk.after_power_cut() as root, second_disk.after_power_cut() as other:
        Keyring.open(root / "k.db", KeyFile(other / "new.key")).close()


def test_rekey_to_a_passphrase(disk: Disk, base: list[str]) -> None:
    phrase = disk.root / "phrase"
    phrase.touch(0o600)
    phrase.write_text("correct horse\n")
    assert keyring_tool.main([*base, "rekey", "--new-passphrase-file", str(phrase)]) == 0
    with disk.after_power_cut() as root:
        Keyring.open(root / "k.db", Passphrase("correct horse")).close()


def test_backup_export_and_import(disk: Disk, base: list[str]) -> None:
    assert keyring_tool.main([*base, "backup", str(disk.root / "copy.db")]) == 0
    with disk.after_power_cut() as root:
        Keyring.open(root / "copy.db", KeyFile(root / "m.key")).close()
    with _keyring(disk.root) as keyring:
        export_subject(keyring, SUBJECTS[1], disk.root / "two.keys", PHRASE)
        with disk.after_power_cut() as root, _keyring(root) as copy:
            assert import_subject(copy, root / "two.keys", PHRASE) == (SUBJECTS[1], 0)
    with Keyring.create(disk.root / "other.db", KeyFile(disk.root / "other.key")) as other:
        assert import_subject(other, disk.root / "three.keys", PHRASE) == (SUBJECTS[2], 1)
        with (
            disk.after_power_cut() as root,
            Keyring.open(root / "other.db", KeyFile(root / "other.key")) as copy,
        ):
            assert [info.subject for info in keyring_admin.list_keys(copy)] == [SUBJECTS[2]]


@pytest.mark.parametrize("apart", [False, True])
def test_protect(
    disk: Disk,
    second_disk: Disk,
    make_cfg: Callable[..., CfgNode],
    tmp_path: Path,
    apart: bool,
) -> None:
    """Keys are on their disk before the files under them, also if that is another one."""
    scene = make_scene(make_cfg, tmp_path)
    keys = Scene(disk.root)
    Keyring.create(keys.keyring_path, keys.master).close()
    os.sync()
    files = (second_disk if apart else disk).root / "sealed"
    command = ["protect", str(scene.photos), str(files), *keys.keys, *scene.model]
    assert protect_tool.main([*command, "--keep-original", "--workers", "0"]) == 0
    with disk.after_power_cut() as root, second_disk.after_power_cut() as other:
        sealed = (other if apart else root) / "sealed"
        assert len(list(sealed.glob("*.png"))) == len(list(sealed.glob("*.original"))) == 7
        assert protect_tool.main(["verify", str(sealed), *Scene(root).keys]) == 0
    revealed = (second_disk if apart else disk).root / "revealed"
    assert protect_tool.main(["reveal", str(files), str(revealed), *keys.keys]) == 0
    with disk.after_power_cut() as root, second_disk.after_power_cut() as other:
        for source in scene.photos.rglob("*.png"):
            copy = (other if apart else root) / "revealed" / source.relative_to(scene.photos)
            assert copy.read_bytes() == source.read_bytes()


def test_files_and_folders_that_are_written_atomically(disk: Disk) -> None:
    """Checkpoints, reports and data sets."""
    write_text(disk.root / "run/deep/results.json", "first")
    write_text(disk.root / "run/deep/results.json", "second")
    with disk.after_power_cut() as root:
        assert (root / "run/deep/results.json").read_text() == "second"
        assert len(list((root / "run/deep").iterdir())) == 1
    with staged_folder(disk.root / "sets/market") as staging:
        (staging / "train").mkdir()
        (staging / "train/0001.jpg").write_bytes(b"image" * 1000)
    with disk.after_power_cut() as root:
        assert (root / "sets/market/train/0001.jpg").read_bytes() == b"image" * 1000


def test_a_training(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, metrics, configuration and results are on the device, and a resume works."""
    sync = os.fsync
    tiny.install(monkeypatch)
    monkeypatch.setattr(os, "fsync", sync)
    plan = ("MODEL.MODE", "C", "EVAL.DETAILS", "on", "EVAL.IMAGES", "off")
    run = tiny.run(disk.root, *plan, "SOLVER.MAX_EPOCHS", "2")
    with disk.after_power_cut() as root:
        copy = root / "run"
        names = ("config.yml", "results.json", "details.json", "per_query.csv", "calibration.json")
        for name in (*names, "metrics.jsonl", *(path.name for path in run.glob("*.pth"))):
            assert (copy / name).read_bytes() == (run / name).read_bytes(), name
        assert tiny.native(copy)["epoch"] == 2
        tiny.run(root, *plan, "SOLVER.MAX_EPOCHS", "3", "SOLVER.RESUME", "True")
        assert tiny.native(copy)["epoch"] == 3
        close_logger()  # log.txt is on the disk that is unmounted
