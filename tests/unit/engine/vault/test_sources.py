"""Listing and decoding the sources of a protect run."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import pytest
from PIL import Image

from engine.vault.sources import SourceFolder, decode_source, list_sources
from modeling.encryption.ised_errors import BadInput


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def _all(folder: SourceFolder) -> list[str]:
    return sorted([*folder.images, *folder.failed, *folder.left_out])


def test_every_entry_is_in_exactly_one_list(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    _touch(root, "a/1.png", "a/._1.png", "a/notes.txt", "__MACOSX/a/1.png", ".git/1.png", "top.JPG")
    _touch(elsewhere, "2.png", "sub/3.png", "sub/phone.heic")
    (root / "linked").symlink_to(elsewhere)
    (root / "a/loop").symlink_to(root)
    (root / "twin").symlink_to(root / "a")
    (root / "gone").symlink_to(tmp_path / "nothing")
    (root / "circle.png").symlink_to("circle.png")
    (root / "file.png").symlink_to(elsewhere / "2.png")
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "pipe.png")
    folder = list_sources(root)
    assert folder.images == [
        "a/1.png", "file.png", "linked/2.png", "linked/sub/3.png", "pipe.png", "top.JPG",
    ]  # fmt: skip
    assert sorted(folder.failed) == ["a/loop", "circle.png", "gone", "twin"]
    assert folder.left_out == [
        ".git/1.png", "__MACOSX/a/1.png", "a/._1.png", "a/notes.txt", "linked/sub/phone.heic",
        "pipe",
    ]  # fmt: skip
    assert len(_all(folder)) == len(set(_all(folder)))


def test_links_in_both_directions_end(tmp_path: Path) -> None:
    """Links from each of 20 folders to the next two would be about 10,000 paths."""
    for index in range(20):
        _touch(tmp_path, f"{index:02d}/1.png")
    for index in range(18):
        for step in (1, 2):
            target = tmp_path / f"{index + step:02d}"
            (tmp_path / f"{index:02d}/to{step}").symlink_to(target)
    folder = list_sources(tmp_path)
    assert len(folder.images) == 20
    assert len(folder.failed) == 36


def test_a_link_to_the_output_is_not_followed(tmp_path: Path) -> None:
    _touch(tmp_path, "in/1.png", "out/2.png")
    (tmp_path / "in/result").symlink_to(tmp_path / "out")
    folder = list_sources(tmp_path / "in", tmp_path / "out")
    assert folder.images == ["1.png"]
    assert "output folder" in str(folder.failed["result"])


def test_an_unreadable_folder_fails_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _touch(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("engine.vault.sources.os.scandir", refuse)
    folder = list_sources(tmp_path)
    assert (folder.images, list(folder.failed)) == (["b/2.png"], ["a"])


def test_a_folder_without_images_is_rejected(tmp_path: Path) -> None:
    _touch(tmp_path, "notes.txt")
    with pytest.raises(BadInput, match="contains no images"):
        list_sources(tmp_path)


def test_any_error_of_a_decoder_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> None:
        raise AttributeError("'IFDRational' object has no attribute 'encode'")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    stream = io.BytesIO()
    Image.new("RGB", (4, 8)).save(stream, "PNG")
    with pytest.raises(BadInput, match="damaged"):
        decode_source(stream.getvalue(), (8, 4))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_broken_exif_is_ignored(kind: str) -> None:
    """Orientation 6 and a width that is text, which Pillow cannot write back after rotating."""
    entries = struct.pack("<HHHI4sHHIHHI", 2, 0x0100, 2, 2, b"w", 0x0112, 3, 1, 6, 0, 0)
    stream = io.BytesIO()
    Image.new("RGB", (4, 8)).save(stream, kind, exif=b"Exif\0\0II*\0\x08\0\0\0" + entries)
    source = decode_source(stream.getvalue(), (8, 4))
    assert (source.height, source.width, source.had_exif) == (8, 4, True)
