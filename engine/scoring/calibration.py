"""A threshold for "same person?", chosen on validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.scoring.bins import threshold_of
from engine.scoring.verification import VerificationScores
from utils.errors import UserError


@dataclass(frozen=True)
class Calibration:
    """A threshold for "same person?", chosen on validation and to be used elsewhere unchanged.

    Attributes:
        threshold: Lowest cosine that is taken for one person.
        asked_fpr: False positive rate that was asked for.
        fpr: False positive rate on validation, at most that.
        tpr: True positive rate on validation.
        num_genuine: Pairs of one person it was measured on.
        num_impostor: Pairs of two people.
    """

    threshold: float
    asked_fpr: float
    fpr: float
    tpr: float
    num_genuine: int
    num_impostor: int

    def same_person(self, similarity: float) -> bool:
        """Decide for one cosine."""
        return similarity >= self.threshold


def calibrate(validation: VerificationScores, *, false_positive_rate: float = 1e-3) -> Calibration:
    """Choose the threshold that accepts as many true pairs as a false positive rate allows.

    Args:
        validation: Scores of the validation split: a threshold chosen on test data says nothing.
        false_positive_rate: Share of pairs of two people that may be taken for one.

    Raises:
        UserError: The features are degenerate, or there are too few pairs to see such a rate.
    """
    if validation.degenerate:
        raise UserError(
            "no threshold can be chosen from features that are NaN, zero or the same for "
            "everybody; check the checkpoint"
        )
    if not 0 < false_positive_rate < 1 or false_positive_rate * validation.num_impostor < 1:
        raise UserError(
            f"the false positive rate is {false_positive_rate:g} with {validation.num_impostor:,} "
            f"pairs of two people; expected one between {1 / max(1, validation.num_impostor):.1g} "
            "and 1, or a larger validation split"
        )
    first_bin = validation.bin_at(false_positive_rate)
    true, false = validation.rates_at(first_bin)
    return Calibration(
        float(threshold_of(first_bin)),
        false_positive_rate,
        false,
        true,
        validation.num_genuine,
        validation.num_impostor,
    )


def cosine(first: Tensor, second: Tensor) -> float:
    """Return the cosine of two embeddings (D,), as ``Calibration.same_person`` takes it."""
    pair = torch.stack([first.detach().float().cpu(), second.detach().float().cpu()])
    return float(torch.nn.functional.cosine_similarity(pair[:1], pair[1:]))
