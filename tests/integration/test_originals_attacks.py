"""Changed, exchanged and hostile originals are refused, and nothing is written outside."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from engine.vault.keyring_rows import ORIGINAL
from engine.vault.sealed_folder import MANIFEST_NAME
from modeling.encryption.sealed_image import Metadata, new_file_key
from modeling.encryption.sealed_original import seal_original
from tests.fixtures.protection import Scene, draw
from tools.protect import main


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path, Path], object], str, int]] = {
    "changed": (lambda one, two: _flip(one), "Tampered", 1),
    "truncated": (lambda one, two: os.truncate(one, 200), "FormatError", 1),
    "huge": (lambda one, two: os.truncate(one, 1 << 40), "FormatError", 1),
    "empty": (lambda one, two: os.truncate(one, 0), "FormatError", 1),
    "moved over another": (lambda one, two: one.rename(two), "Tampered", 2),
    "link": (lambda one, two: (one.unlink(), one.symlink_to(two)), "Tampered", 1),
    "deleted": (lambda one, two: one.unlink(), "Tampered", 1),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_changed_original_is_refused(
    kept: Scene, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (kept.pair(f"0001/0001_c{index}.png")[1] for index in (1, 2))
    act, error, count = CHANGES[change]
    act(one, two)
    assert main(kept.verify()) in (1, 5)
    err = capsys.readouterr().err
    assert err.count(f"{error}: ") == err.count("error:") == count
    main(kept.reveal())
    assert {
        name: content
        for name, content in kept.revealed_files().items()
        if not name.startswith("0001/")
    } == {name: content for name, content in kept.source_files().items() if name[:5] != "0001/"}
    for name, content in kept.revealed_files().items():
        with Image.open(kept.out / name) as image:  # an original, or the sealed image
            assert content == kept.source_files()[name] or image.size == (32, 64)


def test_an_old_original_next_to_a_new_image_is_refused(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    _, original = kept.pair("0001/0001_c1.png")
    old = original.read_bytes()
    draw(kept.photos / "0001/0001_c1.png", 99)
    assert main(kept.protect("--keep-original", "--overwrite")) == 0
    original.write_bytes(old)
    assert main(kept.verify()) == 5
    assert main(kept.reveal()) == 5
    assert capsys.readouterr().err.count("the original of another version of the image") == 2
    assert main(["verify", str(kept.sealed), *kept.keys, "--accept"]) == 5
    assert main(kept.verify()) == 5  # it was not accepted


def _deleted(path: Path) -> None:
    path.unlink()


def _put_back(path: Path) -> None:
    path.write_bytes(path.with_suffix(path.suffix + ".old").read_bytes())


def _hidden(path: Path) -> None:
    """Give a file the public header of another subject, so that it looks like that one's file."""
    other = next(p for p in path.parent.glob(f"*{path.suffix}.other"))
    content, start = bytearray(path.read_bytes()), 41 if path.suffix == ".png" else 0
    content[start : start + 88] = other.read_bytes()[start : start + 88]
    if path.suffix == ".png":
        content[401:405] = zlib.crc32(content[37:401]).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.parametrize("index", [0, 1], ids=["image", "original"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_deleted, "is in the manifest and missing here"),
        (_put_back, "is not the file that the manifest lists"),
        (_hidden, "is not the file that the manifest lists"),
    ],
)
def test_an_answer_that_lacks_a_file_is_not_complete(
    kept: Scene,
    index: int,
    change: Callable[[Path], None],
    error: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, other = (kept.pair(f"{name}_c1.png") for name in ("0001/0001", "0002/0002"))
    shutil.copy(other[index], f"{other[index]}.other")
    shutil.copy(own[index], f"{own[index]}.old")
    if change is _put_back:
        assert main(kept.protect("--keep-original", "--overwrite")) == 0
    if index == 0:  # the answer is the image
        own[1].unlink()
        assert main(kept.accept()) == 5
    assert main(kept.reveal("--subject", "photos/0001")) == 0
    shutil.rmtree(kept.out)
    capsys.readouterr()
    change(own[index])
    assert main(kept.reveal("--subject", "photos/0001")) == 5
    assert f"{own[index]}: Tampered: {error}" in capsys.readouterr().err
    assert [error in entry.get("error", "") for entry in kept.contents()["files"]].count(True) == 1
    assert main(kept.reveal("--overwrite", "--subject", "photos/0002")) == 2
    shutil.rmtree(kept.out)
    assert main(kept.reveal()) == 5


def test_a_folder_without_a_manifest_is_revealed_with_a_note(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    (kept.sealed / MANIFEST_NAME).write_bytes(bytes(200))
    assert main(kept.reveal()) == 5
    assert f"{MANIFEST_NAME}: WrongKey" in capsys.readouterr().err
    (kept.sealed / MANIFEST_NAME).unlink()
    assert main(kept.reveal()) == 0
    assert "missing and replaced files cannot be detected" in capsys.readouterr().err
    assert kept.revealed_files() == kept.source_files()


def test_hostile_paths_and_links_write_nothing_outside(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program with the key may seal such metadata."""
    scene.sealed.mkdir()
    paths = [
        "contents.json",
        "a/.profile",
        "contents.json/a.png",
        "link/a.png",
        "ok/a.png",
        "b.png",
    ]
    with scene.keyring() as keyring:
        key = keyring.sealing_key("photos/0001", ORIGINAL)
        for index, path in enumerate(paths):
            metadata = Metadata(path, hashlib.sha256(b"x").digest())
            stored = seal_original(new_file_key(key), b"x", metadata, f"{index}")
            (scene.sealed / f"{index}.original").write_bytes(stored)
    outside = scene.root / "outside"
    outside.mkdir()
    scene.out.mkdir()
    (scene.out / "link").symlink_to(outside)
    (outside / "b.png").write_bytes(b"kept")
    (scene.out / "b.png").symlink_to(outside / "b.png")
    assert main(scene.reveal()) == 1
    err = capsys.readouterr().err
    assert err.count("UnsafePath") == 3
    assert err.count("OutputBlocked") == 1
    assert err.count("OutputExists") == 1
    assert [path.name for path in outside.iterdir()] == ["b.png"]
    assert (outside / "b.png").read_bytes() == b"kept"
    assert set(scene.revealed_files()) - {"b.png"} == {"ok/a.png"}
    assert main(scene.reveal("--overwrite")) == 1  # replaces the link, not its target
    assert (scene.out / "b.png").read_bytes() == b"x"
    assert (outside / "b.png").read_bytes() == b"kept"


def test_an_original_does_not_replace_the_image_of_another_source(kept: Scene) -> None:
    """The image of x.jpg and the original of x.jpg.png have the same output name."""
    shutil.rmtree(kept.photos)
    shutil.rmtree(kept.sealed)
    draw(kept.photos / "1/a.jpg.png", 2)
    assert main(kept.protect("--keep-original")) == 0
    draw(kept.photos / "1/a.jpg", 1)
    assert main(kept.protect()) == 0
    assert main(kept.reveal("--overwrite")) == 1
    assert kept.revealed_files() == {"1/a.jpg.png": (kept.photos / "1/a.jpg.png").read_bytes()}
