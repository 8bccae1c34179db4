"""Every attack by name, in the order in which they are run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from engine.attacks.averaging import Averaging
from engine.attacks.base import Attack
from engine.attacks.brute_force import KeyBruteForce
from engine.attacks.denoisers import Denoisers
from engine.attacks.linkage import MetadataLinkage, NoisePrintLinkage
from engine.attacks.model_attack import ModelAttack
from engine.attacks.pairs import Difference, KnownPlaintext
from engine.attacks.reid_attacks import AuthorisedReID, PublicReID, TunedReID
from engine.attacks.tampering import Malleability, StorageRoundTrip, WrongKey
from utils.errors import UserError

_ALL: tuple[Attack, ...] = (
    NoisePrintLinkage(),
    KeyBruteForce(),
    KnownPlaintext(),
    Averaging(),
    Difference(),
    Denoisers(),
    WrongKey(),
    Malleability(),
    StorageRoundTrip(),
    MetadataLinkage(),
    AuthorisedReID(),
    PublicReID(),
    TunedReID(),
    ModelAttack(),
)
ATTACKS: dict[str, Attack] = {attack.name: attack for attack in _ALL}


def chosen_attacks(names: Sequence[str]) -> list[Attack]:
    """Return attacks by name, in the order of the registry; all if none is named.

    Raises:
        UserError: One is unknown; the text has the nearest that is known.
    """
    return [ATTACKS[name] for name in _known(names, list(ATTACKS), "attack")]


def chosen_levels(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return levels by name, in their order; all if none is named.

    Raises:
        UserError: One is unknown.
    """
    return tuple(_known(names, known, "level"))


def _known(names: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, 1, 0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{name!r} is no {what}; expected one of {', '.join(known)}{hint}")
    return [name for name in known if name in names or not names]
