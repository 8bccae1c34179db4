"""Sealed folders changed by somebody else between two runs, keyrings that change under a run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from yacs.config import CfgNode

from engine.vault import keyring_admin
from engine.vault import opening as opened_folder
from engine.vault.master import KeyFile
from engine.vault.sealed_folder import MANIFEST_NAME, Manifest
from engine.vault.sources import decode_source
from modeling.encryption.ised_errors import BadInput
from tests.fixtures.protection import PEOPLE, Scene, draw, make_scene
from tools.protect import main

COUNT = sum(PEOPLE.values())


@pytest.fixture
def scene(make_cfg: Callable[..., CfgNode], tmp_path: Path) -> Scene:
    return make_scene(make_cfg, tmp_path)


def _verify(scene: Scene) -> int:
    return main(["verify", str(scene.sealed), *scene.keys])


def _open(scene: Scene, *more: str) -> int:
    return main(["open", str(scene.sealed), str(scene.out), *scene.keys, *more])


def test_a_file_put_back_is_not_taken_into_the_manifest(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    old = scene.files[0].read_bytes()
    assert main(scene.protect("--overwrite")) == 0
    scene.files[0].write_bytes(old)
    assert _verify(scene) == 5
    capsys.readouterr()
    assert main(scene.protect()) == 1
    assert "is not the manifest's file of that name" in capsys.readouterr().err
    assert _verify(scene) == 5  # still
    assert main(scene.protect("--overwrite")) == 0
    assert _verify(scene) == 0


def test_what_another_subjects_erasure_would_leave_is_not_called_done(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corrected table: pictures of 0001 are of person B, whose keys are to be destroyed."""
    assert main(scene.protect()) == 0
    with scene.keyring() as keyring:
        keyring_admin.rotate(keyring, "photos/0002")
    assert main(scene.protect()) == 0  # a former key of the same subject is its own
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


def test_two_pictures_of_one_name_do_not_replace_each_other(
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
def test_a_manifest_that_is_no_file_is_named_and_not_waited_for(
    scene: Scene, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    place = scene.sealed / MANIFEST_NAME
    place.unlink()
    {
        "pipe": lambda: os.mkfifo(place),
        "folder": place.mkdir,
        "device": lambda: place.symlink_to("/dev/zero"),
    }[kind]()
    for run in (lambda: _verify(scene), lambda: main(scene.protect())):
        capsys.readouterr()
        assert run() == 1
        assert "BadInput" in capsys.readouterr().err


def test_a_manifest_that_cannot_be_written_is_no_success(
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


def test_opening_stops_when_the_keyring_cannot_be_used_any_more(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 4, not one for every file that is left."""
    assert main(scene.protect()) == 0
    written, write = [], opened_folder._write

    def rekeying(*arguments: object, **options: object) -> None:
        write(*arguments, **options)  # type: ignore[arg-type]
        written.append(arguments)
        if len(written) == 2:
            with scene.keyring() as keyring:
                keyring_admin.rekey(keyring, KeyFile(scene.root / "new.key"))

    monkeypatch.setattr(opened_folder, "_write", rekeying)
    capsys.readouterr()
    assert _open(scene) == 4
    assert capsys.readouterr().err.count("error:") == 1
    assert len(written) == 2


def test_no_interpreter_is_started_for_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript under a picture's name: the image library would hand it to Ghostscript."""
    from PIL import EpsImagePlugin

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("PostScript was run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", refuse)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 16\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadInput, match="not a picture"):
        decode_source(content, (16, 8))
