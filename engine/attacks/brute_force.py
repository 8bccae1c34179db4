"""Key brute force: try guessable keys on stored images."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from engine.attacks.attack import AttackContext, CipherAttack, Outcome, example_images
from engine.attacks.key_reuse import PAD_REACH
from engine.attacks.levels import Stored
from engine.attacks.measures import share_measure
from modeling.encryption.ised_errors import IsedError
from modeling.encryption.primitives import KEY_BYTES, existing_message_key
from modeling.encryption.sealed_image import CONTEXT, SealedImage, open_image, public_fields
from utils.logger import Progress

_IMAGES = 40
_PREFIX = 64  # values that reject a wrong pad: a quarter of them are then outside [-1, 1]
_PADS_AT_ONCE = 1 << 16  # 16 MiB of such values
_SLACK = 1e-3
_SECONDS_A_YEAR = 365.25 * 86_400
NO_GUESSES = "no guesses of keys are defined for this scheme (brute_force.GUESSES)"


@dataclass(frozen=True, eq=False)
class Search:
    """The result of a search for keys."""

    opened: dict[int, Tensor]  # images that a guessed key opened, normalised, by index
    tried: int  # keys tried for each image
    seconds: float  # duration of the search


@dataclass(frozen=True)
class Guess:
    """How the keys of a scheme are guessed."""

    # tries a number of keys on the images at some indices
    search: Callable[[Stored, Tensor, int], Search]
    num_keys: float  # number of possible keys
    # Whether owners use all of these keys. Otherwise owners use only the keys that are tried, and
    # the time of the search is reported.
    any_of_them: bool


class KeyBruteForce(CipherAttack):
    """Tries guessable keys on one image of each identity.

    Additive: identity numbers from 0 upwards; the right pad keeps the image in its range. Aead:
    numbers, and digests of numbers and labels, as keys; the public commitment identifies the right
    one.
    """

    name = "brute-force"
    question = "How long until a guessed key opens an image?"

    def reason_against(self, level: str) -> str:
        """See ``Attack``."""
        unsearched = "" if level in GUESSES else NO_GUESSES
        return super().reason_against(level) or unsearched

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        guess = GUESSES[level]
        indices = example_images(context.private.pids, _IMAGES)
        stored, pids = context.stored(level), context.private.pids[indices]
        search = guess.search(stored, indices, context.settings.keys)
        right = [
            index in search.opened
            and bool((search.opened[index] - stored.plain[index]).abs().max() < 1e-4)
            for index in indices.tolist()
        ]
        by_chance = search.tried / guess.num_keys
        measure = share_measure("opened", right, pids, context.seed, floor=by_chance)
        rate = search.tried * len(indices) / max(search.seconds, 1e-9)
        space = guess.num_keys if guess.any_of_them else float(search.tried)
        years = space / 2 / rate / _SECONDS_A_YEAR
        details = {
            "keys_per_s": rate,
            "seconds_per_image": search.seconds / len(indices),
            "expected_years": years,
        }
        show = example_images(context.private.pids)
        best = [search.opened.get(index, stored.observed[index]) for index in show.tolist()]
        columns = {
            "before encryption": context.unit(stored.plain[show]),
            "ciphertext": context.unit(stored.observed[show]),
            "after the search": context.unit(torch.stack(best)),
        }
        return context.outcome(
            self, level, _sentence(sum(right), len(right), search, years, guess), columns=columns,
            measures=(measure,), budget=search.tried, budget_unit="keys tried for each image",
            num_persons=len(pids), num_images=len(pids), details=details,
        )  # fmt: skip


def search_additive(stored: Stored, indices: Tensor, keys: int) -> Search:
    """Try identity numbers 0, 1, 2, ... as seeds of the pad.

    The right pad leaves the image within [-1, 1]. A wrong one leaves a quarter of the values
    outside, so it can be rejected after a few values.
    """
    start = time.perf_counter()
    generator = torch.Generator()
    opened: dict[int, Tensor] = {}
    with Progress(keys, "Brute force on additive", unit="key") as bar:
        for first in range(0, keys, _PADS_AT_ONCE):
            seeds = range(first, min(keys, first + _PADS_AT_ONCE))
            draws = [torch.rand(_PREFIX, generator=generator.manual_seed(seed)) for seed in seeds]
            pads = 2 * torch.stack(draws) - 1
            for index in (index for index in indices.tolist() if index not in opened):
                image = stored.observed[index]
                left = (image.flatten()[:_PREFIX] - pads).abs().amax(1) <= PAD_REACH + _SLACK
                for seed in (left.nonzero().squeeze(1) + first).tolist():
                    pad = torch.rand(image.shape, generator=generator.manual_seed(seed))
                    plain = image - (2 * pad - 1)
                    if plain.abs().max() <= PAD_REACH + _SLACK:
                        opened[index] = plain
                        break
            bar.update(len(seeds))
    return Search(opened, keys, time.perf_counter() - start)


def search_aead(stored: Stored, indices: Tensor, keys: int) -> Search:
    """Try keys that a careless owner might choose; the commitment identifies the right one."""
    (_, sealed), start = stored.encrypted, time.perf_counter()
    guesses = list(guessable_keys(keys))
    opened = {}
    height, width = stored.plain.shape[-2:]
    with Progress(len(indices) * keys, "Brute force on aead", unit="key") as bar:
        for index in indices.tolist():
            header = sealed.headers[index]
            key = _matching_key(header, guesses)
            bar.update(keys)
            if key is not None:
                pixels = sealed.payload[index].numpy().tobytes()
                image = SealedImage(width, height, header, pixels)
                plain = torch.from_numpy(open_image(key, image).pixels.copy())
                opened[index] = plain.permute(2, 0, 1).float().mul(2).sub(255).div(255)
    return Search(opened, keys, time.perf_counter() - start)


# By name of the cipher. A pad has one of 2^64 seeds (torch.Generator), but the published scheme
# uses identity numbers, which are small.
GUESSES = {
    "additive": Guess(search_additive, 2.0**64, any_of_them=False),
    "aead": Guess(search_aead, 2.0**256, any_of_them=True),
}


def guessable_keys(count: int) -> Iterator[bytes]:
    """Return 32-byte keys that are easy to guess: numbers, their digests, and digests of labels."""
    forms = (
        key
        for number in itertools.count()
        for key in (
            number.to_bytes(KEY_BYTES, "big"),
            str(number).encode().rjust(KEY_BYTES, b"0"),
            sha256(str(number).encode()).digest(),
            sha256(f"{number:04d}".encode()).digest(),
        )
    )
    return itertools.islice(forms, count)


def _matching_key(header: bytes, guesses: Sequence[bytes]) -> bytes | None:
    salt, _, commit = public_fields(header)
    for guess in guesses:
        try:
            existing_message_key(guess, CONTEXT, salt, commit)
        except IsedError:
            continue
        return guess
    return None


def _sentence(opened: int, images: int, search: Search, years: float, guess: Guess) -> str:
    text = f"Guessed keys opened {opened} of {images} images"
    if opened:
        return f"{text}, in {1000 * search.seconds / images:.1f} ms each."
    text += f" after {search.tried} guesses for each"
    if guess.any_of_them:
        text += f"; at this speed the right key is expected after {years:.0e} years"
    return f"{text}."
