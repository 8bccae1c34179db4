"""Sealed folders that are changed between two runs, and keyrings that change during a run."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from engine.vault import keyring_admin, opening
from engine.vault.master import KeyFile
from engine.vault.sealed_folder import MANIFEST_NAME, Manifest
from engine.vault.sources import decode_source
from modeling.encryption.ised_errors import BadInput
from tests.fixtures.keyrings import to_format_1
from tests.fixtures.protection import PEOPLE, Scene, draw
from tools.protect import main

COUNT = sum(PEOPLE.values())


def _verify(scene: Scene) -> int:
    return main(["verify", str(scene.sealed), *scene.keys])


def _open(scene: Scene, *more: str) -> int:
    return main(["open", str(scene.sealed), str(scene.out), *scene.keys, *more])


def test_an_old_file_that_was_put_back_is_not_added_to_the_manifest(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    old = scene.files[0].read_bytes()
    assert main(scene.protect("--overwrite")) == 0
    scene.files[0].write_bytes(old)
    assert _verify(scene) == 5
    capsys.readouterr()
    assert main(scene.protect()) == 1
    assert "is not the file that the manifest lists" in capsys.readouterr().err
    assert _verify(scene) == 5  # the manifest is unchanged
    assert main(scene.protect("--overwrite")) == 0
    assert _verify(scene) == 0


def test_a_file_sealed_for_another_subject_is_not_accepted(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corrected table: the images of 0001 show person B, whose keys are then destroyed."""
    assert main(scene.protect()) == 0
    with scene.keyring() as keyring:
        keyring_admin.rotate(keyring, "photos/0002")
    assert main(scene.protect()) == 0  # a retired key of the same subject is accepted
    names = (path.relative_to(scene.photos).as_posix() for path in scene.photos.rglob("*.png"))
    table = scene.root / "people.csv"
    lines = [f"{name},{'B' if name.startswith('0001/') else name[:4]}" for name in names]
    table.write_text("\n".join(["path,subject", *lines]))
    csv = ["--subject-from", "csv", "--subject-csv", str(table)]
    capsys.readouterr()
    assert main(scene.protect(*csv)) == 1
    err = capsys.readouterr().err
    assert err.count("was sealed for another subject") == err.count("error:") == PEOPLE["0001"]
    assert main(scene.protect(*csv, "--overwrite")) == 0
    with scene.keyring() as keyring:
        keyring_admin.destroy(keyring, "photos/B")
    assert _open(scene) == 1
    assert len(list(scene.out.rglob("*.png"))) == COUNT - PEOPLE["0001"]


def test_two_images_with_the_same_output_name_do_not_replace_each_other(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(scene.photos)
    draw(scene.photos / "1/a.jpg", 1)
    draw(scene.photos / "1/a.jpg.png", 2)
    assert main(scene.protect()) == 0
    assert _open(scene, "--overwrite") == 1
    assert "OutputExists" in capsys.readouterr().err
    assert len(list(scene.out.rglob("*.png"))) == 1


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_manifest_that_is_not_a_file_is_reported_without_waiting(
    scene: Scene, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    path = scene.sealed / MANIFEST_NAME
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    for run in (lambda: _verify(scene), lambda: main(scene.protect())):
        capsys.readouterr()
        assert run() == 1
        assert "BadInput" in capsys.readouterr().err


def test_a_manifest_that_cannot_be_written_is_an_error(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Manifest, folder: Path, key: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", full)
        assert main(scene.protect()) == 3
    assert "No space left" in capsys.readouterr().err
    assert len(scene.files) == COUNT
    assert main(scene.protect()) == 0
    assert _verify(scene) == 0


def test_opening_stops_when_the_master_of_the_keyring_was_changed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error line and exit code 4, not one for each remaining file."""
    assert main(scene.protect()) == 0
    written, write = [], opening._write

    def rekeying(*arguments: object, **options: object) -> None:
        write(*arguments, **options)  # type: ignore[arg-type]
        written.append(arguments)
        if len(written) == 2:
            with scene.keyring() as keyring:
                keyring_admin.rekey(keyring, KeyFile(scene.root / "new.key"))

    monkeypatch.setattr(opening, "_write", rekeying)
    capsys.readouterr()
    assert _open(scene) == 4
    assert capsys.readouterr().err.count("error:") == 1
    assert len(written) == 2


def test_postscript_is_not_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would pass a PostScript file with an image suffix to Ghostscript."""
    from PIL import EpsImagePlugin

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", refuse)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 16\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadInput, match="not an image"):
        decode_source(content, (16, 8))


def test_a_folder_sealed_under_an_old_data_set_name_still_opens(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before names with a slash were rejected, dataset photos/0001 and folder 1 shared a key."""
    draw(scene.root / "one/1/a.png", 1)
    old = ["protect", str(scene.root / "one"), *scene.protect("--dataset", "photos/0001")[2:]]
    with monkeypatch.context() as patch:
        patch.setattr("engine.vault.subjects.check_dataset", lambda name: None)
        patch.setattr("engine.vault.protect.check_dataset", lambda name: None, raising=False)
        assert main(old) == 0
    assert _verify(scene) == 0
    assert _open(scene) == 0
    capsys.readouterr()
    assert main(old) == 2
    assert "data set name 'photos/0001'" in capsys.readouterr().err
    with scene.keyring() as keyring:
        assert keyring_admin.destroy(keyring, "photos/0001/1") == 1
    assert _open(scene, "--overwrite") == 1


def test_files_sealed_under_an_old_label_count_as_present(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before labels were normalised, a folder name with a trailing blank was its own subject."""
    (scene.photos / "0001").rename(scene.photos / "0001 ")
    with monkeypatch.context() as patch:
        patch.setattr("engine.vault.subjects.normalized", lambda text: text)
        patch.setattr("engine.vault.keyring.normalized", lambda text: text)
        assert main(scene.protect()) == 0
    with scene.keyring() as keyring:
        to_format_1(keyring)
    capsys.readouterr()
    assert main(scene.protect()) == 0
    assert f"0 sealed, {COUNT} already present" in capsys.readouterr().out
    with scene.keyring() as keyring:
        assert keyring_admin.destroy(keyring, "photos/0001") == 1
    assert _open(scene) == 1
    assert len(list(scene.out.rglob("*.png"))) == COUNT - PEOPLE["0001"]
