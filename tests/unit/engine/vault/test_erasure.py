"""After `destroy` and `rekey`, old copies and leftovers reveal no key and no label."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.vault import keyring_admin
from engine.vault.keyring import Keyring
from engine.vault.keyring_rows import KeyRow
from engine.vault.master import Argon2Cost, KeyFile, unwrap
from modeling.encryption.ised_errors import KeyringCorrupt
from tests.fixtures.paths import ROOT
from tools import keyring as tool

ERASED, OTHER = "set/anna", "set/Hie\u0302\u0301n"


def _label(keyring: Keyring, row: KeyRow) -> str:
    """Open a label of an old copy with the present keys of a keyring."""
    assert row.label_ct is not None
    aad = keyring.head.keyring_id + row.key_id
    return unwrap(keyring._services["label"], "label", aad, row.label_ct).decode()


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_the_new_master_opens_no_label_of_an_old_copy(tmp_path: Path) -> None:
    path, old, new = tmp_path / "k.db", KeyFile(tmp_path / "old.key"), KeyFile(tmp_path / "new.key")
    with Keyring.create(path, old) as keyring:
        keyring.ensure([ERASED, OTHER])
        shutil.copy(path, tmp_path / "copy.db")
        name = keyring.file_name("set", "anna/1.png")
        keyring_admin.destroy(keyring, ERASED)
        keyring_admin.rekey(keyring, new)
    with Keyring.open(tmp_path / "copy.db", old) as copy, Keyring.open(path, new) as keyring:
        assert {_label(copy, row) for row in copy.rows} == {ERASED, "set/Hi\u1ebfn"}
        for row in copy.rows:
            with pytest.raises(KeyringCorrupt):
                _label(keyring, row)
        labels = [info.subject for info in keyring_admin.list_keys(keyring)]
        assert labels == ["set/Hi\u1ebfn", None]
        assert keyring.file_name("set", "anna/1.png") == name  # names of sealed files stay


@pytest.mark.parametrize("calls", [1, 2])  # of the master key file, of the keyring
def test_no_leftover_survives_a_destroyed_master(
    tmp_path: Path, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between linking a secret and removing its temporary name leaves both names."""
    monkeypatch.setattr(Argon2Cost.__init__, "__defaults__", (8 * 1024, 1, 1))
    folders = tmp_path / "keyring", tmp_path / "secret"
    for folder in folders:
        folder.mkdir()
    path, master = folders[0] / "k.db", folders[1] / "m.key"
    base = ["--keyring", str(path), "--master", str(master)]
    child = (
        "import os, sys; from utils import files; from tools import keyring\n"
        "left = [int(sys.argv.pop(1))]\n"
        "def kill(folder):\n"
        "    left[0] -= 1\n"
        "    left[0] or os.kill(os.getpid(), 9)\n"
        "files.sync_folder = kill; keyring.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", child, str(calls), *base, "init"]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert [len(_names(folder)) for folder in folders] == [[0, 2], [2, 1]][calls - 1]
    assert tool.main([*base, "init"]) == (0 if calls == 1 else 4)
    phrase = tmp_path / "phrase"
    phrase.touch(0o600)
    phrase.write_text("correct horse\n")
    assert tool.main([*base, "rekey", "--new-passphrase-file", str(phrase)]) == 0
    master.unlink()
    assert [_names(folder) for folder in folders] == [["k.db", "k.db.audit"], []]
