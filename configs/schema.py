"""Keys of the configuration: default, allowed values and meaning; how text becomes a value.

Values come from YAML files and from the command line. Both give text; published commands also add
quotes and brackets, as in ``"('on')"``. Each type of value converts all these forms without loss,
or raises; its description states what it accepts.
"""

from __future__ import annotations

import ast
import importlib
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from utils.files import expanded

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200  # characters of a value in a message
_SWITCH = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def literal(given: object) -> object:
    """Return the value of a text that is a Python literal; anything else unchanged."""
    if not isinstance(given, str):
        return given
    try:
        return ast.literal_eval(given.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return given


def only(given: object) -> object:
    """Return the element of a tuple or list of one, such as 'on' for ``('on',)``."""
    while isinstance(given, (list, tuple)) and len(given) == 1:
        given = given[0]
    return given


def text_of(given: object) -> str:
    """Return the text of a bare, quoted or bracketed string, or of a number.

    Quotes and brackets are removed only from valid Python literals of strings. A path such as
    ``./set (old)/x``, ``010`` or ``(1)`` stays unchanged.

    Raises:
        ValueError: The value is a list of several strings, a mapping, or None.
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
    """Return the truth value of on/off, yes/no, true/false or 1/0, in upper or lower case.

    Raises:
        ValueError: The value is something else.
    """
    read = only(literal(given))
    if isinstance(read, (bool, int)) and read in (0, 1):
        return bool(read)
    if isinstance(read, str) and read.strip().lower() in _SWITCH:
        return _SWITCH[read.strip().lower()]
    raise ValueError("neither on nor off")


class Allowed(Protocol):
    """A type of value: converts given values and describes which are allowed."""

    def convert(self, given: object) -> Any:
        """Return the value.

        Raises:
            ValueError: It cannot be read as this type of value, or is out of range.
        """

    @property
    def expected(self) -> str:
        """What is allowed, as it follows the word "expected"."""


@dataclass(frozen=True)
class OneOf:
    """One of several names."""

    choices: tuple[str, ...]

    def convert(self, given: object) -> str:
        """Return the name; upper and lower case differ."""
        value = text_of(given)
        if value not in self.choices:
            raise ValueError("not a choice")
        return value

    @property
    def expected(self) -> str:
        """The names."""
        return f"one of {', '.join(self.choices)}"


@dataclass(frozen=True)
class Registered:
    """A name in a registry, such as the dict of backbones; a new entry there is allowed here.

    The registry is imported when a value is checked, since this package imports only utils.
    """

    path: str  # ``package.module:NAME``
    # Names that start with it are also allowed; the code that uses the value checks the rest of the
    # name. '' for none.
    prefix: str = ""

    @property
    def registry(self) -> Mapping[str, Any]:
        """The registry."""
        module, _, name = self.path.partition(":")
        registry: Mapping[str, Any] = getattr(importlib.import_module(module), name)
        return registry

    def convert(self, given: object) -> str:
        """Return the name; upper and lower case differ."""
        value = text_of(given)
        if self.prefix and value.startswith(self.prefix) and value != self.prefix:
            return value
        return self._names().convert(given)

    @property
    def expected(self) -> str:
        """The names."""
        names = self._names().expected
        return f"{names}, or {self.prefix}<name>" if self.prefix else names

    def _names(self) -> OneOf:
        return OneOf(tuple(sorted(self.registry)))


@dataclass(frozen=True)
class OnOff:
    """The strings 'on' and 'off' that published command lines use."""

    expected: ClassVar[str] = "on or off"

    def convert(self, given: object) -> str:
        """Return 'on' or 'off'."""
        return "on" if switch_of(given) else "off"


@dataclass(frozen=True)
class Flag:
    """A truth value."""

    expected: ClassVar[str] = "True or False"

    def convert(self, given: object) -> bool:
        """Return True or False."""
        return switch_of(given)


@dataclass(frozen=True)
class Text:
    """A string that matches a pattern."""

    expected: str  # the pattern in words
    pattern: str

    def convert(self, given: object) -> str:
        """Return the string."""
        value = text_of(given)
        if not re.fullmatch(self.pattern, value):
            raise ValueError("does not match")
        return value


@dataclass(frozen=True)
class PathText:
    """A path; a leading ``~`` that the shell did not replace becomes the home folder."""

    optional: bool = False

    def convert(self, given: object) -> str:
        """Return the path as text."""
        value = text_of(given)
        if "\0" in value or not (value.strip() or self.optional):
            raise ValueError("not a path")
        # Only for "~": Path() would drop the leading "./" of published output folders.
        return str(expanded(value)) if value.startswith("~") else value

    @property
    def expected(self) -> str:
        """The words "a path", and whether it may be empty."""
        return "a path, or '' for none" if self.optional else "a path"


@dataclass(frozen=True)
class Number:
    """A number in a range; integers become floats and whole floats integers where necessary."""

    whole: bool = False
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # the lower bound itself is excluded
    # further allowed values by their names, such as -1 for "auto"
    extra: Mapping[str, float] = field(default_factory=dict)

    def convert(self, given: object) -> int | float:
        """Return the number as int or float."""
        read = only(literal(given))
        if isinstance(read, bool):
            raise ValueError("a truth value")
        if isinstance(read, str):
            # float() reads "inf" and "5e-4"; YAML writes ".inf".
            word = read.strip()
            read = self.extra[word] if word in self.extra else float(word.replace(".inf", "inf"))
        if not isinstance(read, (int, float)) or math.isnan(read):
            raise ValueError("not a number")
        if self.whole and not (math.isfinite(read) and read == int(read)):
            raise ValueError("not a whole number")
        value = int(read) if self.whole else float(read)
        inside = self.low < value <= self.high if self.above else self.low <= value <= self.high
        if value not in self.extra.values() and (not inside or math.isinf(value)):
            raise ValueError("out of range")
        return value

    @property
    def expected(self) -> str:
        """The range in words."""
        what = "a whole number" if self.whole else "a number"
        if math.isfinite(self.low) and math.isfinite(self.high):
            low, high = _digits(self.low), _digits(self.high)
            what += f" above {low} and at most {high}" if self.above else f" from {low} to {high}"
        elif math.isfinite(self.low):
            what += f" {'above' if self.above else 'of at least'} {_digits(self.low)}"
        return what + "".join(f", or {name}" for name in self.extra)


@dataclass(frozen=True)
class NumberOrShare:
    """A number, or a share in (0, 1] of another number as text, such as ``0.9x``."""

    number: Number  # the allowed numbers
    whole: str  # what a share is a share of, for messages

    def convert(self, given: object) -> float | str:
        """Return the number, or the share as text."""
        read = only(literal(given))
        if isinstance(read, str) and read.strip().endswith("x"):
            return f"{Number(low=0, high=1, above=True).convert(read.strip()[:-1])}x"
        return self.number.convert(given)

    @property
    def expected(self) -> str:
        """The range, and the form of a share."""
        return f"{self.number.expected}, or a share of {self.whole} such as 0.9x"


def _digits(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


@dataclass(frozen=True)
class Sequence:
    """Several values of the same type; a tuple in the configuration."""

    item: Allowed
    length: int | None = None
    longest: int = 1000

    def convert(self, given: object) -> tuple[Any, ...]:
        """Return the values; a single value is a sequence of one."""
        read = literal(given)
        if isinstance(read, str):
            # Also "40 80"; "40, x" is rejected by the check of each value.
            read = read.replace(",", " ").split()
        parts: Iterable[object] = read if isinstance(read, (list, tuple)) else (read,)
        values = tuple(self.item.convert(part) for part in parts)
        if len(values) > self.longest or self.length not in (None, len(values)):
            raise ValueError("wrong length")
        return values

    @property
    def expected(self) -> str:
        """The number of values and what each may be."""
        many = "a list" if self.length is None else f"a list of {self.length}"
        return f"{many}, each {self.item.expected}"


@dataclass(frozen=True)
class Key:
    """One key of the configuration."""

    name: str  # dotted name, such as ``SOLVER.BASE_LR``
    default: Any  # value without any file or override
    allowed: Allowed  # allowed values
    meaning: str  # what it does, with the unit

    def convert(self, given: object) -> Any:
        """Return the value of a text from a file or the command line.

        Raises:
            ValueError: One sentence with the key, the given value and the allowed values.
        """
        try:
            return self.allowed.convert(given)
        except (ValueError, OverflowError, TypeError) as error:
            raise ValueError(
                f"{self.name} is {_SHOWN.repr(given)}; expected {self.allowed.expected}"
            ) from error
