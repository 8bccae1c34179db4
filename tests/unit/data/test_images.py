"""Reading image files: modes, orientation, and files that are damaged or not images."""

from __future__ import annotations

import logging
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import images
from data.images import BadImage, is_image_name, is_litter, read_rgb
from tests.fixtures.trees import pixels, save


@pytest.mark.parametrize("name", ["a.png", "a.PNG"])
def test_pixels_survive(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, "x")
    image = read_rgb(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels("x"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 4), 200 << 8, np.uint16)).save(path)
    else:
        Image.fromarray(pixels("x")).convert(mode).save(path)
    image = read_rgb(path)
    assert image.mode == "RGB"
    if mode == "I;16":  # scaled, not clipped to white
        assert np.all(np.asarray(image) == 200)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),  # a unit range
        (np.array([[0.0, 100.4, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),  # 8 bits in 32
        (np.array([[0, 25_600, 65_535]], np.int32), [0, 100, 255]),  # 16 bits in 32
    ],
)
def test_float_and_integer_images_keep_their_brightness(
    tmp_path: Path, values: np.ndarray, expected: list[int]
) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(read_rgb(tmp_path / "a.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("value", [np.nan, -1.0, 300.0, np.inf])
def test_float_images_of_unknown_range_are_an_error(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.array([[0.0, value]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadImage, match=r"its values are from .*; expected 0\.\.255, or 0\.\.1"):
        read_rgb(tmp_path / "a.tif")


def with_exif(path: Path, exif: bytes) -> Path:
    Image.fromarray(pixels("x")).save(path, exif=exif)
    return path


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def test_orientation_is_applied(tmp_path: Path) -> None:
    assert read_rgb(with_exif(tmp_path / "a.jpg", orientation(6))).size == (16, 8)


TIFF = b"Exif\0\0II*\0\x08\0\0\0"
# One entry: orientation 6 as a short, then no further directory.
DIRECTORY = struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
# Orientation 6, and a width that is text: Pillow cannot write it back after rotating the image.
TEXT_WIDTH = struct.pack("<HHHI4sHHIHHI", 2, 0x0100, 2, 2, b"w", 0x0112, 3, 1, 6, 0, 0)
BROKEN_EXIF = {
    "no TIFF header.png": b"Exif\0\0" + b"garbage!" * 4,
    "wrong byte order.png": b"Exif\0\0XX*\0\x08\0\0\0",
    "header cut short.png": b"Exif\0\0II*",
    "text as a number.jpg": TIFF + TEXT_WIDTH,
    "text as a number.png": TIFF + TEXT_WIDTH,
}


@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_broken_exif_is_ignored_with_a_warning(
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "_exif_warnings", 0)
    path = with_exif(tmp_path / name, BROKEN_EXIF[name])
    with caplog.at_level(logging.WARNING, "reid_baseline"):
        assert read_rgb(path).size == (8, 16)
    (text,) = caplog.messages
    assert f"{path}: the EXIF data is broken" in text
    assert "is read without its orientation" in text


def test_warnings_about_broken_exif_are_limited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_exif_warnings", 0)
    path = with_exif(tmp_path / "a.jpg", TIFF + TEXT_WIDTH)
    with caplog.at_level(logging.WARNING, "reid_baseline"):
        for _ in range(8):
            read_rgb(path)
    assert len(caplog.messages) == 5
    assert caplog.messages[-1].endswith("more such images are not reported")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (b"", (8, 16)),
        (b"Exif\0\0", (8, 16)),
        (b"Exif\0\0" + b"garbage!" * 4, (8, 16)),
        (TIFF + DIRECTORY, (16, 8)),
        (TIFF + DIRECTORY[:10], (8, 16)),  # truncated
        (TIFF + struct.pack("<HHHI4sI", 1, 0x0112, 2, 2, b"6", 0), (8, 16)),  # ASCII
        (orientation(9), (8, 16)),  # not a known orientation
    ],
)
def test_unusual_exif_of_a_jpeg_is_read(tmp_path: Path, exif: bytes, size: tuple[int, int]) -> None:
    assert read_rgb(with_exif(tmp_path / "a.jpg", exif)).size == size


def test_duplicated_exif_of_a_jpeg_is_read(tmp_path: Path) -> None:
    content = with_exif(tmp_path / "a.jpg", orientation(6)).read_bytes()
    length = 2 + int.from_bytes(content[22:24], "big")  # the second segment, after JFIF
    segment = content[20 : 20 + length]
    assert segment.startswith(b"\xff\xe1")
    (tmp_path / "b.jpg").write_bytes(content[:20] + segment + content[20:])
    assert read_rgb(tmp_path / "b.jpg").size in {(16, 8), (8, 16)}


@pytest.mark.parametrize("name", ["._a.jpg", ".a.jpg", "Thumbs.db", ".DS_Store", "__MACOSX"])
def test_litter_is_not_an_image(name: str) -> None:
    assert is_litter(name)
    assert not is_image_name(name)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.b.png", "a.bmp", "a.webp", "a.TIFF"])
def test_names_of_images(name: str) -> None:
    assert is_image_name(name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>login</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git-LFS"),
        (b"hello", "not an image"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_not_an_image_is_named(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
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


def test_the_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "is empty")))  # noqa: S301
    assert (error.path, error.reason) == ("a.jpg", "is empty")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels("x")).save(path, "EPS")
    with pytest.raises(BadImage, match="PostScript"):
        read_rgb(path)


def test_errors_of_other_decoders_become_bad_image(tmp_path: Path) -> None:
    """A DDS texture of an unknown pixel format raises NotImplementedError."""
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels("x")).save(path, "DDS")
    content = bytearray(path.read_bytes())
    content[80:84] = b"\x00\x08\x00\x00"  # flags of the pixel format
    path.write_bytes(content)
    with pytest.raises(BadImage, match="cannot be decoded"):
        read_rgb(path)
