"""Text whose letters can be encoded in several ways.

Unicode has two forms of an accented letter: one character (NFC), or a letter and an accent (NFD).
Keyboards, editors and file systems differ in which form they produce. A comparison of labels or
paths from different sources therefore compares their NFC forms.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path


def composed(text: str) -> str:
    r"""Return text in NFC.

    Example:
        >>> composed("Zoe\u0308") == "Zo\u00eb"
        True
    """
    return unicodedata.normalize("NFC", text)


def unicode_forms(text: str) -> list[str]:
    r"""Return text as given, in NFC and in NFD, without repetitions.

    Example:
        >>> len(unicode_forms("Zo\u00eb")), len(unicode_forms("Zoe"))
        (2, 1)
    """
    return list(dict.fromkeys((text, composed(text), unicodedata.normalize("NFD", text))))


def existing_path(path: Path) -> Path:
    """Return a path in the Unicode forms in which it exists; unchanged if it does not exist.

    Each folder and the file may have another form.
    """
    if path.exists():
        return path
    current = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        forms = (current / form for form in unicode_forms(part))
        current = next((form for form in forms if form.exists()), current / part)
    return current if current.exists() else path
