"""What a text was meant to say: quotes, brackets, lists and switches in whatever form they come.

What a key of the configuration is: default, allowed values, meaning; how text becomes a value.

Values reach the configuration from YAML files and from the command line, where everything is text
and where published commands quote and bracket as ``"('on')"``. Each kind of value therefore
converts whatever form it meets, without loss, or says in words what it would have accepted.
"""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


class Kind(Protocol):
    """A kind of value: converts what was given and describes what it allows."""

    def convert(self, given: object) -> Any:
        """Return the value for what was given.

        Raises:
            ValueError: It cannot be read as this kind of value, or lies out of range.
        """

    def describe(self) -> str:
        """Return what is allowed, to follow the words "expected"."""


@dataclass(frozen=True)
class OneOf:
    """One of several names."""

    choices: tuple[str, ...]

    def convert(self, given: object) -> str:
        """Return the name, whose case must be right."""
        # YAML reads a bare on/off as a truth value; here they may be names beside others.
        if isinstance(given, bool) and {"on", "off"} <= set(self.choices):
            return "on" if given else "off"
        value = text_of(given)
        if value not in self.choices:
            raise ValueError("not a choice")
        return value

    def describe(self) -> str:
        """Return the names."""
        return f"one of {', '.join(self.choices)}"


@dataclass(frozen=True)
class Registered:
    """A name of an extension point: whatever its dict holds, so that adding one is one line there.

    The registry is imported when a value is checked, not before: this folder depends on no other.

    Attributes:
        place: ``package.module:DICT``.
        prefix: Names that start with it are allowed, too, if it is not empty; what uses the value
            checks the rest of the name.
    """

    place: str
    prefix: str = ""

    @property
    def registry(self) -> Mapping[str, Any]:
        """The dict."""
        module, _, name = self.place.partition(":")
        registry: Mapping[str, Any] = getattr(importlib.import_module(module), name)
        return registry

    def convert(self, given: object) -> str:
        """Return the name, whose case must be right."""
        value = text_of(given)
        if self.prefix and value.startswith(self.prefix) and value != self.prefix:
            return value
        return self._names().convert(given)

    def describe(self) -> str:
        """Return the names."""
        names = self._names().describe()
        return f"{names}, or {self.prefix}<name>" if self.prefix else names

    def _names(self) -> OneOf:
        return OneOf(tuple(sorted(self.registry)))


@dataclass(frozen=True)
class OnOff:
    """The strings 'on' and 'off' that published command lines use."""

    def convert(self, given: object) -> str:
        """Return 'on' or 'off'."""
        return "on" if switch_of(given) else "off"

    def describe(self) -> str:
        """Return the two strings."""
        return "on or off"


@dataclass(frozen=True)
class Flag:
    """A truth value."""

    def convert(self, given: object) -> bool:
        """Return True or False."""
        return switch_of(given)

    def describe(self) -> str:
        """Return the two values."""
        return "True or False"


@dataclass(frozen=True)
class Text:
    """A string, checked against a pattern where one is given."""

    meaning: str = "a string"
    pattern: str = r"(?s).*"

    def convert(self, given: object) -> str:
        """Return the string."""
        value = text_of(given)
        if not re.fullmatch(self.pattern, value):
            raise ValueError("does not match")
        return value

    def describe(self) -> str:
        """Return what the string stands for."""
        return self.meaning


@dataclass(frozen=True)
class PathText:
    """A path; a leading ``~``, which quotes keep from the shell, becomes the home folder."""

    optional: bool = False

    def convert(self, given: object) -> str:
        """Return the path as text."""
        value = text_of(given)
        if "\0" in value or not (value.strip() or self.optional):
            raise ValueError("not a path")
        # Path() would drop the leading "./" of published output folders; only "~" needs it.
        return str(Path(value).expanduser()) if value.startswith("~") else value

    def describe(self) -> str:
        """Return "a path", and whether it may be empty."""
        return "a path, or '' for none" if self.optional else "a path"


@dataclass(frozen=True)
class Number:
    """A number between bounds; integers are widened to floats, whole floats taken as integers."""

    whole: bool = False
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # the lower bound itself is excluded
    extra: tuple[float, ...] = ()  # values allowed besides, such as -1 for "automatic"
    names: tuple[tuple[str, float], ...] = ()  # words for some of them

    def convert(self, given: object) -> int | float:
        """Return the number as int or float."""
        read = only(literal(given))
        if isinstance(read, bool):
            raise ValueError("a truth value")
        if isinstance(read, str):
            # float() knows "inf", and "5e-4", which YAML leaves a string.
            word = dict(self.names).get(read.strip())
            read = float(read) if word is None else word
        if not isinstance(read, (int, float)) or math.isnan(read):
            raise ValueError("not a number")
        if self.whole and not (math.isfinite(read) and read == int(read)):
            raise ValueError("not a whole number")
        value = int(read) if self.whole else float(read)
        inside = self.low < value <= self.high if self.above else self.low <= value <= self.high
        if not inside and value not in self.extra:
            raise ValueError("out of range")
        if math.isinf(value) and value not in self.extra:
            raise ValueError("not finite")
        return value

    def describe(self) -> str:
        """Return the range in words."""
        what = "a whole number" if self.whole else "a number"
        if math.isfinite(self.low) and math.isfinite(self.high):
            between = f"above {self.low:g} and at most" if self.above else f"from {self.low:g} to"
            what += f" {between} {self.high:g}"
        elif math.isfinite(self.low):
            what += f" above {self.low:g}" if self.above else f" of at least {self.low:g}"
        for value in self.extra:
            word = next((name for name, number in self.names if number == value), f"{value:g}")
            what += f", or {word}"
        return what


@dataclass(frozen=True)
class Sequence:
    """Several numbers of one kind; a tuple in the configuration."""

    item: Number
    length: int | None = None

    def convert(self, given: object) -> tuple[int | float, ...]:
        """Return the numbers; a single number is a sequence of one."""
        read = literal(given)
        if isinstance(read, str):
            # "40 80" and "40, x" reach the numbers' own check.
            read = read.replace(",", " ").split()
        parts: Iterable[object] = read if isinstance(read, (list, tuple)) else (read,)
        values = tuple(self.item.convert(part) for part in parts)
        if self.length is not None and len(values) != self.length:
            raise ValueError("wrong length")
        return values

    def describe(self) -> str:
        """Return how many numbers and of which range."""
        many = "a list" if self.length is None else f"a list of {self.length}"
        return f"{many}, each {self.item.describe()}"


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
        name: Dotted name, such as ``SOLVER.BASE_LR``.
        default: Value without any file or override.
        kind: What values are allowed.
        meaning: What it does, with the unit.
    """

    name: str
    default: Any
    kind: Kind
    meaning: str

    def convert(self, given: object) -> Any:
        """Return the value for what a file or the command line gave.

        Raises:
            ValueError: One sentence with key, given value and allowed values.
        """
        try:
            return self.kind.convert(given)
        except (ValueError, OverflowError, TypeError) as error:
            raise ValueError(
                f"{self.name} is {given!r}; expected {self.kind.describe()}"
            ) from error
