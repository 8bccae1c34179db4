"""Change every byte and every header bit of a file, with and without repaired checksums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from modeling.encryption import png_format
from modeling.encryption.aead import MemoryKeys
from modeling.encryption.ised_errors import (
    AuthenticationError,
    FormatError,
    IsedError,
    MissingKey,
    Tampered,
    WrongKey,
)
from modeling.encryption.sealed_image import Metadata, open_image, seal_image
from tests.fixtures.sealing import repaired

HEADER_BYTES = 421  # signature, IHDR, isEd, and the beginning of IDAT
FULL_SIZE_CASES = 400_992  # named in docs/ISED.md
BITS = tuple(1 << bit for bit in range(8))

# Byte ranges of a file whose change, with every checksum repaired, gives one class of error.
AREAS = {
    "salt": (41 + 8, 41 + 40, MissingKey),
    "locator": (41 + 40, 41 + 56, MissingKey),
    "commit": (41 + 56, 41 + 88, WrongKey),
    "metadata": (41 + 88, 41 + 344, Tampered),
    "tag": (41 + 344, 41 + 360, Tampered),
}


class _File:
    """A sealed file, and the errors that changed copies of it raise."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.keys = MemoryKeys()
        pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)
        metadata = Metadata("0002/0002_c1.jpg", bytes(range(32)), 283, 96)
        sealed = seal_image(self.keys.sealing_key("a/b/2"), pixels, metadata)
        self.content = png_format.encode(sealed)

    def refusal(self, content: bytes) -> type[IsedError] | None:
        """Return the class of the error; None if the file is accepted."""
        try:
            sealed = png_format.decode(content)
            open_image(self.keys.opening_key(sealed.chunk), sealed)
        except IsedError as error:
            return type(error)
        return None

    def cases(self, places: range, masks: tuple[int, ...]) -> Iterator[tuple[int, bytes, bool]]:
        """Yield (place, changed content, whether its checksums were repaired)."""
        for place in places:
            for mask in masks:
                changed = bytearray(self.content)
                changed[place] ^= mask
                yield place, bytes(changed), False
                fixed = repaired(bytes(changed), *self.size)
                if fixed != self.content:  # repairing undoes the change of a checksum
                    yield place, fixed, True


def _check(file: _File, cases: Iterator[tuple[int, bytes, bool]]) -> Counter[str]:
    """Assert that no copy is accepted and that each error has the right class."""
    counts: Counter[str] = Counter()
    for place, content, fixed in cases:
        refusal = file.refusal(content)
        assert refusal is not None, f"byte {place} changed, repaired {fixed}: accepted"
        if not fixed:
            assert issubclass(refusal, FormatError), f"byte {place}: {refusal}"
        else:
            for start, stop, error in AREAS.values():
                assert not start <= place < stop or refusal is error, f"byte {place}: {refusal}"
        counts["cases"] += 1
        counts["authentication"] += issubclass(refusal, AuthenticationError)
    return counts


def test_every_bit_of_a_small_file() -> None:
    file = _File(8, 4)
    assert file.refusal(file.content) is None
    counts = _check(file, file.cases(range(len(file.content)), BITS))
    assert counts["cases"] > 8 * len(file.content)
    assert counts["authentication"] > 8 * (256 + 16 + 96)


@pytest.mark.slow
def test_every_byte_and_header_bit_of_a_full_size_file() -> None:
    file = _File(128, 256)
    header = _check(file, file.cases(range(HEADER_BYTES), BITS))
    rest = _check(file, file.cases(range(HEADER_BYTES, len(file.content)), (0x01, 0x80)))
    assert header["cases"] + rest["cases"] == FULL_SIZE_CASES


def test_parts_of_two_files_never_combine() -> None:
    file = _File(8, 4)
    key = file.keys.sealing_key("a/b/2")
    other = png_format.encode(seal_image(key, np.zeros((4, 8, 3), np.uint8), Metadata("x.png")))
    for start, stop in ((41, 49), (49, 129), (129, 385), (385, 401), (413, len(other) - 16)):
        mixed = file.content[:start] + other[start:stop] + file.content[stop:]
        mixed = repaired(mixed, 8, 4)
        assert mixed == file.content or file.refusal(mixed) is not None
