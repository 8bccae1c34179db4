"""Subject labels: the same subject however its letters are put together.

Unicode writes "é" as one character or as "e" with an accent; file systems and keyboards differ in
which they give. Labels are composed (NFC) before a key is made for them. Keyrings may hold labels
from before that, so a subject is looked for under its other spellings as well.
"""

from __future__ import annotations

import unicodedata

from modeling.encryption.errors import BadInput

_MAX_BYTES = 1024


def composed(text: str) -> str:
    r"""Return text in NFC.

    Example:
        >>> composed("Zoe\u0308") == "Zo\u00eb"
        True
    """
    return unicodedata.normalize("NFC", text)


def any_label(label: str) -> str:
    """Return a label composed, however long: composing lengthens some (U+0958).

    Raises:
        BadInput: It is empty, or no text.
    """
    label = composed(label)
    try:
        encoded = label.encode()
    except UnicodeEncodeError:
        raise BadInput(f"subject label {label!a} is not valid UTF-8") from None
    if not encoded or b"\0" in encoded:
        raise _no_label(encoded)
    return label


def checked_label(label: str) -> str:
    """Return a label as new keys bear it.

    Raises:
        BadInput: It is empty, too long, or no text.
    """
    label = any_label(label)
    encoded = label.encode()
    if len(encoded) > _MAX_BYTES:
        raise _no_label(encoded)
    return label


def spellings(label: str) -> list[str]:
    """Return a label as new keys bear it, and then as others may: decomposed, and as given.

    Raises:
        BadInput: It is empty, or no text.
    """
    return list(dict.fromkeys((any_label(label), unicodedata.normalize("NFD", label), label)))


def _no_label(encoded: bytes) -> BadInput:
    return BadInput(f"subject label of {len(encoded)} bytes; expected 1 to {_MAX_BYTES}, no NUL")
