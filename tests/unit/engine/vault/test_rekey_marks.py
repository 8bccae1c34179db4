"""An existing file for the new master is used only if its mark proves that it is a leftover."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from engine.vault import keyring_admin
from engine.vault import master as new_master
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile, Passphrase, claim_of, mark_of
from engine.vault.secret_files import write_new_private
from modeling.encryption.ised_errors import UsageError, WrongMaster
from tests.fixtures.keyrings import Scene, killed
from tools import keyring as tool
from utils import files


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_key_file_that_is_not_a_leftover_is_refused_and_kept(
    scene: Scene, tmp_path: Path
) -> None:
    scene.new.create_if_missing()
    content = scene.new.path.read_bytes()
    assert tool.main(scene.command) == 2
    write_new_private(mark_of(scene.new.path), claim_of(content, bytes(16), 0))  # another keyring's
    assert tool.main(scene.command) == 2
    assert scene.new.path.read_bytes() == content
    scene.check_under(scene.old, scene.new)


def test_a_stale_mark_does_not_allow_the_key_of_another_keyring(scene: Scene) -> None:
    """Two keyrings under one key would be lost and destroyed together."""
    assert killed(scene, new_master, "write_new_private", 1) == -signal.SIGKILL  # type: ignore[arg-type]
    assert mark_of(scene.new.path).exists()
    assert not scene.new.path.exists()
    other = scene.path.with_name("other.db")
    assert tool.main(["--keyring", str(other), "--master", str(scene.new.path), "init"]) == 0
    assert tool.main(scene.command) == 2
    scene.check_under(scene.old, scene.new)
    Keyring.open(other, scene.new).close()


@pytest.mark.parametrize("error", [OSError(5, "I/O"), KeyboardInterrupt()])
@pytest.mark.parametrize("calls", [1, 2])
def test_an_error_after_a_name_was_linked_leaves_neither(
    scene: Scene, error: BaseException, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, synced = scene.files(), files.sync_folder
    left = [calls]

    def failing(folder: Path) -> None:
        synced(folder)
        left[0] -= 1
        if left[0] == 0:
            raise error

    monkeypatch.setattr(files, "sync_folder", failing)
    assert tool.main(scene.command) == (130 if isinstance(error, KeyboardInterrupt) else 3)
    assert left[0] == 0
    assert scene.files() == before
    scene.check_under(scene.old, scene.new)


def test_the_slower_of_two_writers_keeps_the_other_file_and_leaves_no_mark(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, before = new_master.write_new_private, scene.files()

    def beaten(path: Path, content: bytes) -> None:
        if path == scene.new.path:
            written(path, b"k" * 32)
        written(path, content)

    monkeypatch.setattr(new_master, "write_new_private", beaten)
    assert tool.main(scene.command) == 2
    assert scene.files() == {*before, "new.key"}
    assert scene.new.path.read_bytes() == b"k" * 32
    scene.check_under(scene.old, scene.new)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_mark_that_is_not_a_private_file_is_ignored(scene: Scene, kind: str) -> None:
    scene.new.create_if_missing()
    mark = mark_of(scene.new.path)
    if kind == "pipe":
        os.mkfifo(mark, 0o600)  # a blocking read would never return
    else:
        with Keyring.open(scene.path, scene.old) as keyring:
            claim = claim_of(scene.new.path.read_bytes(), keyring.head.keyring_id, 0)
        write_new_private(mark.with_name("claim"), claim)
        mark.symlink_to("claim")
    assert tool.main(scene.command) == 2
    scene.check_under(scene.old, scene.new)


def test_a_mark_of_an_earlier_epoch_does_not_allow_a_former_master(scene: Scene) -> None:
    """A former master opens what `destroy` left in old copies, so it must not come back."""
    with Keyring.open(scene.path, scene.old) as keyring:
        head = keyring.head
        keyring_admin.rekey(keyring, scene.new)
    claim = claim_of(scene.old.path.read_bytes(), head.keyring_id, head.epoch)
    write_new_private(mark_of(scene.old.path), claim)
    with (
        Keyring.open(scene.path, scene.new) as keyring,
        pytest.raises(UsageError, match="exists already"),
    ):
        keyring_admin.rekey(keyring, scene.old)


@pytest.mark.parametrize("marked", [None, "another keyring", "another epoch"])
def test_the_master_of_another_keyring_is_not_taken_for_a_new_one(
    scene: Scene, marked: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who confuses two keyrings must not be advised to destroy a key that is in use."""
    other = scene.path.with_name("b.db")
    with Keyring.create(other, scene.new) as keyring:
        head = keyring.head
    mark = mark_of(scene.new.path)
    if marked is not None:
        keyring_id = bytes(16) if marked == "another keyring" else head.keyring_id
        epoch = head.epoch if marked == "another epoch" else head.epoch - 1
        write_new_private(mark, claim_of(scene.new.path.read_bytes(), keyring_id, epoch))
    command = [part.replace("keys.db", "b.db") for part in scene.command]
    assert tool.main(command) == 4
    output = capsys.readouterr()
    assert "WrongMaster: " in output.err
    assert "destroy" not in output.out + output.err
    assert mark.exists() == (marked is not None)


def test_a_wrong_old_master_is_named(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    KeyFile(scene.path.with_name("wrong.key")).create_if_missing()
    command = [part.replace("old.key", "wrong.key") for part in scene.command]
    assert tool.main(command) == 4
    assert "WrongMaster: " in capsys.readouterr().err
    with pytest.raises(WrongMaster), Keyring.open(scene.path, Passphrase("a passphrase")):
        pass
    assert not scene.new.path.exists()
