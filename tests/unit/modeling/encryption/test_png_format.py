"""The file format: known answers both ways, one canonical form, named errors for other bytes."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling.encryption import png_format, primitives
from modeling.encryption import sealed_image as sealed_image_module
from modeling.encryption.ised_errors import (
    FormatError,
    IsedError,
    NotProtected,
    Tampered,
    TooLarge,
    UnsafePath,
    UnsupportedVersion,
)
from modeling.encryption.primitives import SubjectKey
from modeling.encryption.sealed_image import Metadata, SealedImage, open_image, seal_image
from tests.fixtures.paths import GOLDEN
from tests.fixtures.sealing import repaired

VECTORS = ("ised_v1_vector", "ised_v1_vector_large")


def _vector(name: str) -> dict[str, Any]:
    vector: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return vector


def _pixels(vector: dict[str, Any]) -> np.ndarray:
    size = (vector["height"], vector["width"], 3)
    if "pixels" in vector:
        return np.frombuffer(bytes.fromhex(vector["pixels"]), np.uint8).reshape(size)
    count = int(np.prod(size))
    stream = b"".join(hashlib.sha256(i.to_bytes(4, "big")).digest() for i in range(count // 32))
    assert hashlib.sha256(stream).hexdigest() == vector["pixels_sha256"]
    return np.frombuffer(stream, np.uint8).reshape(size)


def _metadata(vector: dict[str, Any]) -> Metadata:
    meta = vector["meta"]
    digest = bytes.fromhex(meta["source_sha256"])
    return Metadata(meta["path"], digest, meta["orig_h"], meta["orig_w"])


def _key(vector: dict[str, Any]) -> SubjectKey:
    names = ("key_id", "identity_key", "locator_key")
    return SubjectKey(*(bytes.fromhex(vector[name]) for name in names))


@pytest.fixture
def vector_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the pixel kind of a known answer; the small one has a kind that files do not use."""
    monkeypatch.setattr(sealed_image_module, "KIND", _vector(name)["kind"])


@pytest.mark.parametrize("name", VECTORS)
def test_known_answer_is_written_byte_for_byte(name: str, vector_kind: None) -> None:
    vector, key = _vector(name), _key(_vector(name))
    message_key = primitives._message_key(key.key, "file", bytes.fromhex(vector["salt"]))
    file_key = sealed_image_module._file_key(message_key, key)
    sealed = sealed_image_module.seal_with(file_key, _pixels(vector), _metadata(vector))
    assert sealed.chunk.hex() == vector["isEd"]
    digest = hashlib.sha256(sealed.pixels).hexdigest()
    assert digest == vector["ciphertext_pixels_sha256"]
    assert png_format.encode(sealed) == (GOLDEN / vector["file"]).read_bytes()


@pytest.mark.parametrize("name", VECTORS)
def test_known_answer_is_read_back(name: str, vector_kind: None) -> None:
    vector, key = _vector(name), _key(_vector(name))
    sealed = png_format.decode(png_format.read_content(GOLDEN / vector["file"]))
    assert sealed_image_module.key_id_of(sealed.chunk, key.locator_key) == key.key_id
    opened = open_image(key.key, sealed)
    assert np.array_equal(opened.pixels, _pixels(vector))
    assert sealed.chunk[5] == vector["kind"]
    assert opened.metadata == _metadata(vector)


def _sealed(width: int = 5, height: int = 4) -> tuple[SubjectKey, SealedImage]:
    key = SubjectKey(bytes(16), bytes(range(32)), bytes(32))
    pixels = np.arange(3 * width * height).astype(np.uint8).reshape(height, width, 3)
    return key, seal_image(key, pixels, Metadata("a/b.png", bytes(32), 9, 8))


def _ihdr(width: int, height: int) -> bytes:
    return b"".join(png_format._chunk(b"IHDR", sealed_image_module.image_header(width, height)))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (8, 4), (128, 256), (7281, 3), (3, 6554)])
def test_image_programs_read_the_ciphertext(width: int, height: int) -> None:
    _, sealed = _sealed(width, height)
    data = png_format.encode(sealed)
    assert len(data) == png_format.file_bytes(width, height)
    with Image.open(io.BytesIO(data)) as shown:
        assert shown.mode == "RGB"
        assert shown.size == (width, height)
        assert shown.tobytes() == sealed.pixels
    assert png_format.decode(data) == sealed


def test_file_costs_701_bytes_at_full_size() -> None:
    assert png_format.file_bytes(128, 256) - 3 * 128 * 256 == 701


def test_no_file_is_longer_than_the_stated_maximum() -> None:
    sizes = [(2**24 // side, side) for side in (1024, 2048, 4096, 16384)]
    assert max(png_format.file_bytes(*size) for size in sizes) == png_format.file_bytes_at_most()


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=700))
def test_any_bytes_give_a_named_error(data: bytes) -> None:
    for prefix in (b"", png_format.SIGNATURE, png_format.encode(_sealed()[1])[:33]):
        with pytest.raises(FormatError):
            png_format.decode(prefix + data)


@settings(max_examples=200, deadline=None)
@given(
    cut=st.integers(0, 800),
    drop=st.integers(0, 40),
    insert=st.binary(max_size=40),
    fix=st.booleans(),
)
def test_a_spliced_file_is_refused_or_is_the_same_file(
    cut: int, drop: int, insert: bytes, fix: bool
) -> None:
    key, sealed = _sealed()
    good = png_format.encode(sealed)
    data = good[:cut] + insert + good[cut + drop :]
    if fix and len(data) == len(good):
        data = repaired(data, 5, 4)
    try:
        read = png_format.decode(data)
        assert png_format.encode(read) == data  # one canonical form
        open_image(key.key, read)
    except IsedError:
        assert data != good
    else:
        assert data == good


def test_extra_missing_and_trailing_bytes_name_their_offset() -> None:
    good = png_format.encode(_sealed()[1])
    for length in range(len(good)):
        with pytest.raises(FormatError, match=r"^truncated: .*at byte"):
            png_format.decode(good[:length])
    with pytest.raises(FormatError, match=f"after the end .at byte {len(good)}"):
        png_format.decode(good + b"\0")
    text = b"".join(png_format._chunk(b"tEXt", b"a\0b"))
    for place in (33, 405, len(good) - 12):
        with pytest.raises(FormatError) as caught:
            png_format.decode(good[:place] + text + good[place:])
        assert caught.value.offset >= 33
        assert not isinstance(caught.value, NotProtected)  # an isEd chunk follows
    chunk = good[33:405]
    with pytest.raises(FormatError, match="expected the chunk IDAT.*at byte 409"):
        png_format.decode(good[:405] + chunk + good[405:])


def test_messages_about_other_images_mention_image_editors() -> None:
    good = png_format.encode(_sealed()[1])
    with Image.open(io.BytesIO(good)) as shown:
        plain, jpeg = io.BytesIO(), io.BytesIO()
        shown.save(plain, "PNG")
        shown.save(jpeg, "JPEG")
        grey = io.BytesIO()
        shown.convert("L").save(grey, "PNG")
    for other in (plain, jpeg, grey):
        with pytest.raises(NotProtected, match="re-saved by an image editor"):
            png_format.decode(other.getvalue())
    resaved = plain.getvalue()
    kept = resaved[:33] + good[33:405] + resaved[33:]
    with pytest.raises(FormatError, match="re-saved by an image editor") as caught:
        png_format.decode(kept)
    assert not isinstance(caught.value, NotProtected)


@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        (0, 0, FormatError),
        (4, 2, UnsupportedVersion),
        (5, 0, FormatError),
        (5, 2, FormatError),
        (6, 1, FormatError),
    ],
)
def test_constant_header_fields(place: int, value: int, error: type[FormatError]) -> None:
    data = bytearray(png_format.encode(_sealed()[1]))
    data[41 + place] = value
    with pytest.raises(error) as caught:
        png_format.decode(repaired(bytes(data), 5, 4))
    assert type(caught.value) is error
    assert caught.value.offset == 41 + place


def test_a_header_chunk_outside_a_file_has_no_offset() -> None:
    key, sealed = _sealed()
    with pytest.raises(FormatError, match="does not begin with ISED$") as caught:
        open_image(key.key, replace(sealed, chunk=b"X" + sealed.chunk[1:]))
    assert caught.value.offset == -1


@pytest.mark.parametrize(("width", "height"), [(4096, 4096), (16384, 1024), (1, 16384), (1, 1)])
def test_the_largest_sizes_are_allowed(width: int, height: int) -> None:
    sealed_image_module.check_size(width, height)


@pytest.mark.parametrize(("width", "height"), [(16385, 1), (16384, 1025), (2**31, 2**31)])
def test_too_large_sizes_are_refused_before_reading(width: int, height: int) -> None:
    good = png_format.encode(_sealed()[1])
    header = _ihdr(width, height)
    with pytest.raises(TooLarge, match="scale it down"):
        png_format.decode(good[:8] + header + good[33:])


def test_metadata_that_this_program_does_not_write_is_refused() -> None:
    stored = Metadata("a/b.png", bytes(32), 9, 8).to_bytes()
    with pytest.raises(Tampered, match="padding is not zero"):
        Metadata.from_bytes(stored[:-1] + b"\1")
    with pytest.raises(Tampered, match="metadata version 2"):
        Metadata.from_bytes(b"\2" + stored[1:])
    with pytest.raises(UnsafePath, match="not UTF-8"):
        Metadata.from_bytes(stored.replace(b"b.png", b"\xff.png"))
    with pytest.raises(UnsafePath, match="not valid UTF-8"):
        Metadata("a/\udcff.png").to_bytes()


def test_an_image_without_pixels_is_a_format_error() -> None:
    good = png_format.encode(_sealed()[1])
    header = _ihdr(0, 4)
    with pytest.raises(FormatError, match="at least 1"):
        png_format.decode(good[:8] + header + good[33:])


def test_a_huge_file_is_not_read(tmp_path: Any) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.write(png_format.encode(_sealed()[1]))
        file.truncate(2**33)  # sparse
    with pytest.raises(FormatError, match="more than any sealed image"):
        png_format.read_content(path)
