"""Single-image denoisers: one ciphertext, no key, no network."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from engine.attacks.base import CipherAttack, Outcome, decibels, shown, shows_own
from engine.attacks.context import AttackContext
from engine.attacks.filters import filter_bank, within_pad
from engine.attacks.statistics import image_measures, quality

_TRIAL_IMAGES = 64


class Denoisers(CipherAttack):
    """The best of a bank of filters; which it is, is found on public persons under own keys."""

    name: ClassVar[str] = "denoise"
    question: ClassVar[str] = "Does filtering the noise of one ciphertext show the image?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        trial = context.imitated("validation", level)
        truth = context.unit(trial.plain[:_TRIAL_IMAGES])
        bank = {
            name: float(quality(truth, context.unit(denoise(seen, name)))[0].mean())
            for seen in (trial.observed[:_TRIAL_IMAGES],)
            for name in filter_bank()
        }
        best = max(bank, key=lambda name: bank[name])
        stored, pids = context.stored(level), context.private.pids
        opened, truth = context.unit(denoise(stored.observed, best)), context.unit(stored.plain)
        guess = context.mean_public("anonymized")
        measures = image_measures(opened, truth, guess, pids, context.seed)
        own = "shows the very image" if shows_own(measures) else "shows nothing of the image"
        result = context.result(
            self.name, level,
            f"The best of {len(bank)} noise filters ({best}) {own}: {decibels(measures[0])}.",
            measures=measures, budget=len(bank), budget_unit="filters tried on public images",
            details={"best": best, "trial_psnr_db": bank},
        )  # fmt: skip
        show = shown(pids)
        columns = {
            "before encryption": truth[show],
            "ciphertext": context.unit(stored.observed[show]),
            "filtered": opened[show],
            "blind guess": guess.expand_as(truth[show]),
        }
        return Outcome(result, columns)


def denoise(observed: Tensor, name: str) -> Tensor:
    """Filter images (N, 3, H, W) and keep the result within what a pad in [-1, 1] allows."""
    filtered = torch.cat([filter_bank()[name](part) for part in observed.split(64)])
    return within_pad(filtered, observed)
