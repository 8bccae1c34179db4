"""What a text was meant to say: quotes, brackets, lists and switches in whatever form they come."""

from __future__ import annotations

import ast

_SWITCH = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def literal(given: object) -> object:
    """Return the Python literal a text spells, and everything else as it is."""
    if not isinstance(given, str):
        return given
    try:
        return ast.literal_eval(given.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return given


def only(given: object) -> object:
    """Unwrap the one element of a one-tuple or one-list: ``('on',)`` means ``'on'``."""
    while isinstance(given, (list, tuple)) and len(given) == 1:
        given = given[0]
    return given


def text_of(given: object) -> str:
    """Return the string that was meant by a bare, quoted or bracketed string, or by a number.

    Only quotes that Python would read are taken off, so that a path such as ``./set (old)/x`` or
    ``(1)`` stays what it is.

    Raises:
        ValueError: The value is a list of several strings, a mapping, or nothing.
    """
    read = only(literal(given))
    if isinstance(read, str):
        return read
    if isinstance(given, str):
        if isinstance(read, (list, tuple)) and any(isinstance(part, str) for part in read):
            raise ValueError("several strings where one is expected")
        return given
    if isinstance(read, (int, float)) and not isinstance(read, bool):
        return str(read)
    raise ValueError("not a string")


def switch_of(given: object) -> bool:
    """Return the truth of on/off, yes/no, true/false and 1/0 in any spelling.

    Raises:
        ValueError: It is none of them.
    """
    read = only(literal(given))
    if isinstance(read, (bool, int)) and read in (0, 1):
        return bool(read)
    if isinstance(read, str) and read.strip().lower() in _SWITCH:
        return _SWITCH[read.strip().lower()]
    raise ValueError("neither on nor off")
