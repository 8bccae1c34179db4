"""The interface of an attack, its outcome, and phrases that all attacks use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.attacks.context import AttackContext
from engine.attacks.levels import CLEAR_LEVELS
from engine.attacks.measures import Measure, Result

NOTHING_ENCRYPTED = "nothing is encrypted at this level, so there is no ciphertext to break"
TRIAL_IMAGES = 128  # held-out public images on which an attacker chooses a method
_SHOWN = 2


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of an attack, and example images.

    Attributes:
        result: The numbers.
        columns: Example images by name, values in [0, 1], each (K, 3, H, W). The names are the same
            at every level.
    """

    result: Result
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class Attack(Protocol):
    """An attack. To add one, write a class and add it to ``suite.ATTACKS``.

    Attributes:
        name: Name on the command line and in files.
        question: The question that the attack answers, in plain words.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see the class
    @property
    def question(self) -> str: ...  # noqa: D102

    def reason_against(self, level: str) -> str:
        """Return why the attack does not apply to a level; empty if it does."""
        ...

    def run(self, context: AttackContext, level: str) -> Outcome:
        """Attack the private images of a level to which it applies."""
        ...


class CipherAttack:
    """Base class of attacks that apply to encrypted levels only."""

    def reason_against(self, level: str) -> str:
        """See :class:`Attack`."""
        return NOTHING_ENCRYPTED if level in CLEAR_LEVELS else ""


def example_images(pids: Tensor) -> Tensor:
    """Return the indices (K,) of one image each of the first few identities."""
    indices = [int((pids == pid).nonzero()[0]) for pid in torch.unique(pids)[:_SHOWN]]
    return torch.tensor(indices)


def percent(measure: Measure) -> str:
    """Return a rate and its floor: ``12.3 % (by chance 4.5 %)``."""
    return f"{100 * measure.value.value:.1f} % (by chance {100 * measure.floor.value:.1f} %)"


def decibels(measure: Measure) -> str:
    """Return a PSNR and its floor."""
    return f"{measure.value.value:.1f} dB (without the stored image: {measure.floor.value:.1f} dB)"


def reveals_own_identity(measures: tuple[Measure, ...]) -> bool:
    """Return whether images are closer to their own target than those of other identities."""
    return any(m.name.endswith("_own_gain") and m.beyond_floor for m in measures)


def image_sentence(measures: tuple[Measure, ...], start: str) -> str:
    """Return a sentence on the quality of images, and whether they reveal the identity."""
    own = (
        "they reveal the identity"
        if reveals_own_identity(measures)
        else "they do not reveal the identity"
    )
    return f"{start}, the attacker obtains images at {decibels(measures[0])}; {own}."
