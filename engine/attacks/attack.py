"""What an attack is, and the words that all of them use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from engine.attacks.context import AttackContext
from engine.attacks.levels import CLEAR_LEVELS
from engine.attacks.measures import Measure, Result

NOTHING_ENCRYPTED = "nothing is encrypted at this level, so there is no ciphertext to break"
TRIAL_IMAGES = 128  # held-out public images that a way to attack is chosen by
_SHOWN = 2


@dataclass(frozen=True, eq=False)
class Outcome:
    """A result, and pictures for human eyes.

    Attributes:
        result: The numbers.
        columns: Pictures of a few persons by name, values in [0, 1], each (K, 3, H, W); an attack
            gives the same names at every level.
    """

    result: Result
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class Attack(Protocol):
    """One attack; it is added with a class and a line in ``registry.ATTACKS``.

    Attributes:
        name: Its name on the command line and in files.
        question: What it asks, in words.
    """

    name: ClassVar[str]
    question: ClassVar[str]

    def reason_against(self, level: str) -> str:
        """Return why the attack does not apply to a level; empty if it does."""
        ...

    def run(self, context: AttackContext, level: str) -> Outcome:
        """Attack the private images of a level to which it applies."""
        ...


class CipherAttack:
    """Base of what only applies where something is encrypted."""

    def reason_against(self, level: str) -> str:
        """See :class:`Attack`."""
        return NOTHING_ENCRYPTED if level in CLEAR_LEVELS else ""


def shown(pids: Tensor) -> Tensor:
    """Return the places of the first image of the first few persons."""
    places = [int((pids == pid).nonzero()[0]) for pid in torch.unique(pids)[:_SHOWN]]
    return torch.tensor(places)


def percent(measure: Measure) -> str:
    """Return a rate beside its floor: ``12.3 % (chance: 4.5 %)``."""
    return f"{100 * measure.value.value:.1f} % (by chance {100 * measure.floor.value:.1f} %)"


def decibels(measure: Measure) -> str:
    """Return a PSNR beside its floor."""
    return f"{measure.value.value:.1f} dB (without the stored image: {measure.floor.value:.1f} dB)"


def shows_own(measures: tuple[Measure, ...]) -> bool:
    """Whether pictures are closer to their own target than other persons' are."""
    return any(m.name.endswith("_own_gain") and m.beyond_floor for m in measures)


def pictures_sentence(measures: tuple[Measure, ...], start: str) -> str:
    """Return how good pictures are, and whether they show the very person."""
    own = (
        "they show the very person"
        if shows_own(measures)
        else "they show no more of the person than of anybody else"
    )
    return f"{start}, pictures come out at {decibels(measures[0])}; {own}."
