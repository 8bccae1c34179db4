"""Scenes for tests of protect: a checkpoint, a folder of images and a keyring."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from yacs.config import CfgNode

from engine.vault.audit import log_path
from engine.vault.keyring import Keyring
from tests.fixtures import tiny
from tests.fixtures.protection import Scene, draw, make_scene
from tools.protect import main

_TEMPLATES: list[Scene] = []
_KEPT: list[Scene] = []


@pytest.fixture
def sealed(
    make_cfg: Callable[..., CfgNode],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    """Return a copy of a scene whose images are sealed; the original is made once."""
    tiny.install(monkeypatch)
    if not _TEMPLATES:
        template = make_scene(make_cfg, tmp_path_factory.mktemp("template"))
        assert main(template.protect()) == 0
        _TEMPLATES.append(template)
    original, scene = _TEMPLATES[0], Scene(tmp_path / "scene")
    shutil.copytree(original.root, scene.root, ignore=shutil.ignore_patterns("run"))
    scene.checkpoint.symlink_to(original.checkpoint)  # which no test changes
    return scene


@pytest.fixture
def scene(sealed: Scene) -> Scene:
    """Return a scene in which no image is sealed and the keyring is empty."""
    shutil.rmtree(sealed.sealed)
    for path in (sealed.keyring_path, log_path(sealed.keyring_path)):
        path.unlink()
    Keyring.create(sealed.keyring_path, sealed.master).close()
    return sealed


@pytest.fixture
def kept(sealed: Scene, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Return a scene with sealed images and originals; one source is a JPEG file with EXIF data."""
    if not _KEPT:
        template = Scene(tmp_path_factory.mktemp("kept") / "scene")
        shutil.copytree(sealed.root, template.root, symlinks=True)
        exif = Image.Exif()
        exif[0x010F] = "a camera"
        draw(template.photos / "0003/0003_c3.png", 40)
        with Image.open(template.photos / "0003/0003_c3.png") as image:
            image.save(template.photos / "0003/0003_c3.jpg", exif=exif)
        (template.photos / "0003/0003_c3.png").unlink()
        assert main(template.protect("--keep-original")) == 0
        _KEPT.append(template)
    shutil.rmtree(sealed.root)
    shutil.copytree(_KEPT[0].root, sealed.root, symlinks=True)
    return sealed
