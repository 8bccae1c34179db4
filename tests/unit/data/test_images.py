from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import BadImage, read_rgb
from tests.fixtures.trees import pixels, save


@pytest.mark.parametrize("name", ["a.png", "a.PNG"])
def test_pixels_survive(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, "x")
    picture = read_rgb(path)
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), pixels("x"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 4), 200 << 8, np.uint16)).save(path)
    else:
        Image.fromarray(pixels("x")).convert(mode).save(path)
    picture = read_rgb(path)
    assert picture.mode == "RGB"
    if mode == "I;16":  # scaled, not clipped to white
        assert np.all(np.asarray(picture) == 200)


def test_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.fromarray(pixels("x"))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg").size == (16, 8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>login</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git-LFS"),
        (b"hello", "not a picture"),
        (None, "no such file"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "0001_c1_1.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImage, match=reason) as caught:
        read_rgb(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_every_truncation_is_an_error(tmp_path: Path, suffix: str) -> None:
    whole = save(tmp_path / f"a{suffix}", "x").read_bytes()
    path = tmp_path / f"cut{suffix}"
    # The last 20 bytes of a PNG are checksums and the end mark: no pixel is lost with them.
    for length in range(1, len(whole) - 20, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(BadImage):
            read_rgb(path)


def test_error_survives_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "is empty")))  # noqa: S301
    assert (error.path, error.reason) == ("a.jpg", "is empty")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels("x")).save(path, "EPS")
    with pytest.raises(BadImage, match="PostScript"):
        read_rgb(path)


def test_what_other_decoders_raise_is_a_bad_image(tmp_path: Path) -> None:
    """A DDS texture of no known pixel format, under another name: NotImplementedError."""
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels("x")).save(path, "DDS")
    content = bytearray(path.read_bytes())
    content[80:84] = b"\x00\x08\x00\x00"  # flags of the pixel format
    path.write_bytes(content)
    with pytest.raises(BadImage, match="cannot be decoded"):
        read_rgb(path)
