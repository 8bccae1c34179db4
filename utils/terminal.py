"""Text of somebody else's making on a terminal."""

from __future__ import annotations


def shown(text: str) -> str:
    r"""Return text without what would steer a terminal: control and direction characters.

    Example:
        >>> shown("name\x1b[2J")
        'name\\x1b[2J'
    """
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
