"""How one sealed image lies in a file, whatever its scheme."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from modeling.encryption.cipher import Sealed
from modeling.encryption.picture import MAGIC, SealedPicture
from modeling.encryption.png_format import decode, encode

_REACH = 2.0  # of the additive scheme: image and pad are each in [-1, 1]


def holds_bytes(sealed: Sealed) -> bool:
    """Whether a scheme stores bytes; otherwise it stores numbers, which files have to round."""
    return sealed.payload.dtype == torch.uint8


def is_ised(sealed: Sealed) -> bool:
    """Whether images are sealed as docs/ISED.md says, so that its files hold them."""
    return holds_bytes(sealed) and all(header.startswith(MAGIC) for header in sealed.headers)


def file_size(one: Sealed) -> int:
    """Return the bytes of a file of one image; the values of a scheme without files of its own."""
    return len(encode(_picture(one))) if is_ised(one) else one.payload.numel()


def through_file(one: Sealed) -> Sealed:
    """Write one sealed image as a file would hold it, and read it back.

    Bytes of a scheme without files of its own come back as they are. Numbers are saved in the best
    way that 8 bits allow: their whole range on 256 steps.

    Raises:
        FormatError: What is sealed as docs/ISED.md says makes no file.
    """
    if is_ised(one):
        picture = decode(encode(_picture(one)))
        found = np.frombuffer(picture.pixels, np.uint8).reshape(tuple(one.payload.shape))
        return replace(one, payload=torch.from_numpy(found.copy()), headers=(picture.chunk,))
    if holds_bytes(one):
        return one
    reach = max(_REACH, float(one.payload.abs().max()))
    scale = 255 / (2 * reach)
    steps = ((one.payload + reach) * scale).round().clamp(0, 255).to(torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(steps[0].permute(1, 2, 0).numpy()).save(stream, format="PNG")
    read = torch.from_numpy(np.array(Image.open(stream)))
    return replace(one, payload=read.permute(2, 0, 1)[None].float() / scale - reach)


def _picture(one: Sealed) -> SealedPicture:
    height, width = one.payload.shape[1:3]
    return SealedPicture(width, height, one.headers[0], one.payload[0].numpy().tobytes())
