"""Key brute force: try the keys that can be guessed until an image looks opened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar

import torch
from torch import Tensor

from engine.attacks.attack import CipherAttack, Outcome, shown
from engine.attacks.averaging import PAD_REACH
from engine.attacks.context import AttackContext
from engine.attacks.levels import Stored
from engine.attacks.measures import share_measure
from modeling.encryption.ised_errors import IsedError
from modeling.encryption.primitives import KEY_BYTES, existing_message_key
from modeling.encryption.sealed_image import CONTEXT, SealedImage, open_image, public_fields
from utils.progress import Progress

_IMAGES = 40  # as many as the published measurement broke
_PREFIX = 64  # values that tell a wrong pad: it leaves [-1, 1] with a quarter of them
_PADS_AT_ONCE = 1 << 16  # 16 MiB of such values
_SLACK = 1e-3
_SECONDS_A_YEAR = 365.25 * 86_400
UNSEARCHED = "nobody has said which keys of this scheme could be guessed (brute_force.GUESSES)"


@dataclass(frozen=True, eq=False)
class Search:
    """What a search for keys found.

    Attributes:
        opened: Images that a guessed key opened, normalised, by place.
        tried: Keys tried on each image.
        seconds: How long that took in all.
    """

    opened: dict[int, Tensor]
    tried: int
    seconds: float


@dataclass(frozen=True)
class Guess:
    """How the keys of a scheme are guessed.

    Attributes:
        search: Tries so many keys on the images at some places.
        num_keys: Keys that there are.
        any_of_them: Whether an owner may have any of these; otherwise those that are tried are all
            that anybody would have, and how long they take is what is told.
    """

    search: Callable[[Stored, Tensor, int], Search]
    num_keys: float
    any_of_them: bool


class KeyBruteForce(CipherAttack):
    """Additive: identity numbers from 0 on, a pad is right if the image stays in its range.

    Aead: numbers, digests of numbers and of labels as keys, told by the public commitment.
    """

    name: ClassVar[str] = "brute-force"
    question: ClassVar[str] = "How long until a guessed key opens an image?"

    def reason_against(self, level: str) -> str:
        """See ``Attack``."""
        unsearched = "" if level in GUESSES else UNSEARCHED
        return super().reason_against(level) or unsearched

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        guess = GUESSES[level]
        places = _one_image_each(context.private.pids)
        stored, pids = context.stored(level), context.private.pids[places]
        search = guess.search(stored, places, context.settings.keys)
        right = [
            place in search.opened
            and bool((search.opened[place] - stored.plain[place]).abs().max() < 1e-4)
            for place in places.tolist()
        ]
        by_chance = search.tried / guess.num_keys
        measure = share_measure("opened", right, pids, context.seed, floor=by_chance)
        rate = search.tried * len(places) / max(search.seconds, 1e-9)
        space = guess.num_keys if guess.any_of_them else float(search.tried)
        years = space / 2 / rate / _SECONDS_A_YEAR
        details = {
            "keys_per_s": rate,
            "seconds_per_image": search.seconds / len(places),
            "expected_years": years,
        }
        result = context.result(
            self.name, level, _sentence(sum(right), len(right), search, years, guess),
            measures=(measure,), budget=search.tried, budget_unit="keys tried on each image",
            num_persons=len(pids), num_images=len(pids), details=details,
        )  # fmt: skip
        return Outcome(result, self._columns(context, stored, search))

    def _columns(self, context: AttackContext, stored: Stored, search: Search) -> dict[str, Tensor]:
        show = shown(context.private.pids)
        best = [search.opened.get(int(place), stored.observed[int(place)]) for place in show]
        return {
            "before encryption": context.unit(stored.plain[show]),
            "ciphertext": context.unit(stored.observed[show]),
            "after the search": context.unit(torch.stack(best)),
        }


def search_additive(stored: Stored, places: Tensor, keys: int) -> Search:
    """Try identity numbers 0, 1, 2, ... as seeds of the pad.

    A right pad leaves the image within [-1, 1]; a wrong one does not for a quarter of all values,
    so few values of a pad are drawn before it is dropped.

    Args:
        stored: Images at the additive level.
        places: Which to break.
        keys: Numbers to try.
    """
    start = time.perf_counter()
    generator = torch.Generator()
    opened: dict[int, Tensor] = {}
    with Progress(keys, "Brute force on additive", unit="key") as bar:
        for first in range(0, keys, _PADS_AT_ONCE):
            seeds = range(first, min(keys, first + _PADS_AT_ONCE))
            draws = [torch.rand(_PREFIX, generator=generator.manual_seed(seed)) for seed in seeds]
            pads = 2 * torch.stack(draws) - 1
            for place in (place for place in places.tolist() if place not in opened):
                image = stored.observed[place]
                left = (image.flatten()[:_PREFIX] - pads).abs().amax(1) <= PAD_REACH + _SLACK
                for seed in (left.nonzero().squeeze(1) + first).tolist():
                    pad = torch.rand(image.shape, generator=generator.manual_seed(seed))
                    plain = image - (2 * pad - 1)
                    if plain.abs().max() <= PAD_REACH + _SLACK:
                        opened[place] = plain
                        break
            bar.update(len(seeds))
    return Search(opened, keys, time.perf_counter() - start)


def search_aead(stored: Stored, places: Tensor, keys: int) -> Search:
    """Try keys that a careless owner might have chosen; the commitment tells a right one.

    Args:
        stored: Images at the aead level.
        places: Which to break.
        keys: Keys to try on each.
    """
    assert stored.sealed is not None
    start = time.perf_counter()
    guesses = list(guessable_keys(keys))
    opened = {}
    height, width = stored.plain.shape[-2:]
    with Progress(len(places) * keys, "Brute force on aead", unit="key") as bar:
        for place in places.tolist():
            header = stored.sealed.headers[place]
            key = _find(header, guesses)
            bar.update(keys)
            if key is not None:
                pixels = stored.sealed.payload[place].numpy().tobytes()
                picture = SealedImage(width, height, header, pixels)
                found = torch.from_numpy(open_image(key, picture).pixels.copy())
                opened[place] = found.permute(2, 0, 1).float().mul(2).sub(255).div(255)
    return Search(opened, keys, time.perf_counter() - start)


# By name of the scheme. A pad is drawn from one of 2^64 seeds (torch.Generator), but seeds are
# identity numbers, which are small.
GUESSES = {
    "additive": Guess(search_additive, 2.0**64, any_of_them=False),
    "aead": Guess(search_aead, 2.0**256, any_of_them=True),
}


def guessable_keys(count: int) -> Iterator[bytes]:
    """Yield keys of 32 bytes that need no secret: numbers, their digests, digests of labels."""
    for place in range(count):
        number, kind = divmod(place, 4)
        if kind == 0:
            yield number.to_bytes(KEY_BYTES, "big")
        elif kind == 1:
            yield str(number).encode().rjust(KEY_BYTES, b"0")
        elif kind == 2:
            yield sha256(str(number).encode()).digest()
        else:
            yield sha256(f"{number:04d}".encode()).digest()


def _find(header: bytes, guesses: Sequence[bytes]) -> bytes | None:
    salt, _, commit = public_fields(header)
    for guess in guesses:
        try:
            existing_message_key(guess, CONTEXT, salt, commit)
        except IsedError:
            continue
        return guess
    return None


def _one_image_each(pids: Tensor) -> Tensor:
    places = [int((pids == pid).nonzero()[0]) for pid in torch.unique(pids)[:_IMAGES]]
    return torch.tensor(places)


def _sentence(found: int, images: int, search: Search, years: float, guess: Guess) -> str:
    text = f"Guessing keys opened {found} of {images} images"
    if found:
        return f"{text}, in {1000 * search.seconds / images:.1f} ms each."
    if guess.any_of_them:
        return (
            f"{text} after {search.tried} guesses on each; at this speed the right key is expected "
            f"after {years:.0e} years."
        )
    return f"{text} after {search.tried} guesses on each."
