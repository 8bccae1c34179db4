"""Listing and decoding the sources of a protect run."""

from __future__ import annotations

import io
import os
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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


def _encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (6, 3, 3)).astype(np.uint8)
    image = Image.fromarray(noise).resize((16, 32), Image.Resampling.BICUBIC)
    image.convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def test_every_changed_bit_of_a_png_is_detected() -> None:
    """36 of 400 changed bits were not detected: in ignored chunks and after the last row."""
    text = PngInfo()
    text.add_text("Comment", "0123456789")
    good = _encoded("PNG", pnginfo=text)
    decode_source(good, (32, 16))
    decode_source(good + b"data after the end", (32, 16))
    for bit in range(0, 8 * len(good), 7):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadInput):
            decode_source(bytes(bad), (32, 16))


def test_a_cut_png_is_detected() -> None:
    good = _encoded("PNG")
    for end in range(8, len(good)):
        with pytest.raises(BadInput, match="damaged|not an image"):
            decode_source(good[:end], (32, 16))


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax_compression_is_rejected(compression: str) -> None:
    """398 of 400 changed bits were not detected before."""
    with pytest.raises(BadInput, match="fax compression"):
        decode_source(_encoded("TIFF", "1", compression=compression), (32, 16))
    decode_source(_encoded("TIFF", compression="tiff_adobe_deflate"), (32, 16))


def test_a_gif_is_rejected() -> None:
    with pytest.raises(BadInput, match="not an image in BMP, JPEG"):
        decode_source(_encoded("GIF"), (32, 16))


@pytest.mark.parametrize("kind", [b"P6", b"P5", b"P3", b"P4"])
def test_a_long_comment_in_a_ppm_header_is_rejected_at_once(kind: bytes) -> None:
    """A comment of 105 MB took 53 s."""
    with pytest.raises(BadInput, match="header of a PPM or PGM file"):
        decode_source(kind + b"\n#" + b"x" * (1 << 17) + b"\n4 4\n255\n" + bytes(48), (32, 16))
    short = b"P6\n# comment\n4 # width\n4\n255\n" + bytes(48)
    assert decode_source(short, (32, 16)).height == 4


def test_a_png_with_too_many_chunks_is_rejected() -> None:
    chunk = b"\0\0\0\0tEXt" + zlib.crc32(b"tEXt").to_bytes(4, "big")
    good = _encoded("PNG")
    with pytest.raises(BadInput, match="more than 65536 chunks"):
        decode_source(good[:33] + chunk * (1 << 16) + good[33:], (32, 16))


def test_only_the_second_directory_of_a_tiff_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(image: object) -> int:
        raise AssertionError("all directories were read")

    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.n_frames", property(count))
    with pytest.raises(BadInput, match="several images"):
        frames = [Image.new("RGB", (4, 4))] * 3
        decode_source(_encoded("TIFF", save_all=True, append_images=frames), (32, 16))
    decode_source(_encoded("TIFF"), (32, 16))


def test_a_decoder_that_takes_too_long_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(image: object) -> None:
        while True:
            pass

    before = signal.getsignal(signal.SIGVTALRM)
    monkeypatch.setattr("PIL.BmpImagePlugin.BmpImageFile.load", never)
    monkeypatch.setattr("engine.vault.sources._TIME_LIMIT_S", 0.05)
    with pytest.raises(BadInput, match="more than 0.05 s of CPU time"):
        decode_source(_encoded("BMP"), (32, 16))
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
