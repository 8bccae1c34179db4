"""Supervision upgradation: when the anonymizer's own output becomes the anonymization target.

The decision is a pure function of the previous state and one validation, so that it can be tested
as a table; :class:`Supervision` only keeps the frozen copy it decides about.

Source: M. Ye et al., "SecureReID: Privacy-Preserving Anonymization for Person Re-Identification",
IEEE TIFS 2024.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.logger import get_logger

_LOGGER = get_logger()


@dataclass(frozen=True)
class Validation:
    """What one validation says about re-ID and privacy.

    Attributes:
        rank1: Rank-1 with raw queries and a protected gallery, in [0, 1].
        psnr_anonymized_db, psnr_desensitized_db: PSNR against raw, dB.
        ssim_anonymized, ssim_desensitized: SSIM against raw.
    """

    rank1: float
    psnr_anonymized_db: float
    psnr_desensitized_db: float
    ssim_anonymized: float
    ssim_desensitized: float


@dataclass(frozen=True)
class UpgradePolicy:
    """When a validation qualifies.

    Attributes:
        rank1: MODEL.VAL_R1, the rank-1 to reach; infinity never upgrades.
        rank1_slack: How far below it still counts.
        psnr_margin_db, ssim_margin: How much closer to raw than the desensitized images the
            anonymized ones may be.
    """

    rank1: float = float("inf")
    rank1_slack: float = 0.05
    psnr_margin_db: float = 1.0
    ssim_margin: float = 0.05

    @property
    def enabled(self) -> bool:
        """Whether anything can ever qualify."""
        return self.rank1 != float("inf")

    def good_enough(self, seen: Validation) -> bool:
        """Tell whether re-ID is good enough."""
        return seen.rank1 > self.rank1 - self.rank1_slack

    def private_enough(self, seen: Validation) -> bool:
        """Tell whether the anonymized images are hardly closer to raw than desensitized ones."""
        return (
            seen.psnr_anonymized_db < seen.psnr_desensitized_db + self.psnr_margin_db
            and seen.ssim_anonymized < seen.ssim_desensitized + self.ssim_margin
        )

    def qualifies(self, seen: Validation) -> bool:
        """Tell whether re-ID is good enough *and* privacy holds."""
        return self.good_enough(seen) and self.private_enough(seen)


@dataclass(frozen=True)
class UpgradeState:
    """Where upgradation stands.

    Attributes:
        count: How often the target was upgraded so far.
        best_rank1: Highest rank-1 of a qualifying validation; -1 before the first.
        epoch: Epoch of the last upgrade; 0 before the first.
        in_force: Whether the frozen copy, rather than the desensitized image, is the target.
    """

    count: int = 0
    best_rank1: float = -1.0
    epoch: int = 0
    in_force: bool = False


def decide(
    state: UpgradeState, policy: UpgradePolicy, seen: Validation, epoch: int
) -> tuple[UpgradeState, bool]:
    """Return the state after a validation, and whether the anonymizer is to be frozen anew.

    A qualifying validation with the best rank-1 so far freezes a new copy. Any qualifying one
    keeps the copy there is in force; any other puts the target back to desensitized images.
    """
    if not policy.qualifies(seen):
        return replace(state, in_force=False), False
    if seen.rank1 > state.best_rank1:
        return UpgradeState(state.count + 1, seen.rank1, epoch, in_force=True), True
    return replace(state, in_force=True), False


class Supervision:
    """Gives the anonymization target of each batch, and upgrades it.

    Args:
        policy: When a validation qualifies.
    """

    def __init__(self, policy: UpgradePolicy) -> None:
        self.policy = policy
        self.state = UpgradeState()
        self.teacher: nn.Module | None = None

    @torch.no_grad()
    def target(self, raw: Tensor, desensitized: Tensor) -> Tensor:
        """Return the target (B, 3, H, W): desensitized, or the teacher's output once upgraded.

        The teacher stays in evaluation mode: its images are the ones that were validated, whoever
        else is in the batch.
        """
        if not self.state.in_force or self.teacher is None:
            return desensitized
        return self.teacher(raw).float()

    def update(self, seen: Validation, epoch: int, anonymizer: nn.Module) -> UpgradeState:
        """Decide after a validation of ``epoch``; freeze a copy of the anonymizer if it is best."""
        before = self.state
        self.state, freeze = decide(before, self.policy, seen, epoch)
        if freeze:
            self.teacher = frozen_copy(anonymizer)
        self._log(before, seen, epoch, freeze)
        return self.state

    def _log(self, before: UpgradeState, seen: Validation, epoch: int, freeze: bool) -> None:
        if freeze:
            _LOGGER.info(
                "Supervision upgraded at epoch %d (upgrade %d): raw->protected rank-1 %.1f%%, the "
                "target is now the anonymizer of this epoch",
                epoch, self.state.count, 100 * seen.rank1,
            )  # fmt: skip
        elif before.in_force and not self.state.in_force:
            _LOGGER.info(
                "Supervision falls back to desensitized images at epoch %d: %s",
                epoch, self.why_not(seen),
            )  # fmt: skip
        elif self.state.in_force and not before.in_force:
            _LOGGER.info(
                "Supervision is in force again at epoch %d: the target is the anonymizer of epoch "
                "%d", epoch, self.state.epoch,
            )  # fmt: skip
        elif self.policy.enabled and not self.state.in_force:
            _LOGGER.info("No supervision upgrade at epoch %d: %s", epoch, self.why_not(seen))

    def why_not(self, seen: Validation) -> str:
        """Say in words which condition of the policy a validation misses."""
        policy, reasons = self.policy, []
        if not policy.good_enough(seen):
            reasons.append(
                f"rank-1 {seen.rank1:.3f} is not above "
                f"VAL_R1 - VAL_R1_SLACK = {policy.rank1 - policy.rank1_slack:.3f}"
            )
        if not policy.private_enough(seen):
            reasons.append(
                f"anonymized images are too close to raw (PSNR {seen.psnr_anonymized_db:.2f} dB, "
                f"SSIM {seen.ssim_anonymized:.3f}; desensitized "
                f"{seen.psnr_desensitized_db:.2f} dB, {seen.ssim_desensitized:.3f})"
            )
        return "; ".join(reasons)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resume needs: plain numbers and the teacher's tensors."""
        teacher = None if self.teacher is None else self.teacher.state_dict()
        return {"state": asdict(self.state), "teacher": teacher}

    def load_state_dict(self, saved: dict[str, Any], anonymizer: nn.Module | None) -> None:
        """Restore; ``anonymizer`` gives the shape of the teacher, none where there is none."""
        names = {field.name for field in fields(UpgradeState)}
        self.state = UpgradeState(**{k: v for k, v in saved["state"].items() if k in names})
        self.teacher = None
        if saved["teacher"] is not None and anonymizer is not None:
            self.teacher = frozen_copy(anonymizer)
            self.teacher.load_state_dict(saved["teacher"])


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a copy that no longer learns and uses its running statistics."""
    return copy.deepcopy(module).eval().requires_grad_(False)
