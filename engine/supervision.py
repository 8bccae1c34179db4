"""Supervision upgradation: when the anonymizer's own output becomes the anonymization target.

The decision (:func:`decide`) is a pure function of the previous state and one validation, tested as
a table. :class:`Supervision` keeps the frozen copy of the anonymizer.

Source: M. Ye et al., "SecureReID: Privacy-Preserving Anonymization for Person Re-Identification",
IEEE TIFS 2024.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.logger import get_logger

_LOGGER = get_logger()


@dataclass(frozen=True)
class Validation:
    """The re-ID and privacy scores of one validation that upgradation depends on."""

    rank1: float  # rank-1 with raw queries and a protected gallery, in [0, 1]
    psnr_anonymized_db: float  # PSNR against raw, dB
    psnr_desensitized_db: float  # PSNR against raw, dB
    ssim_anonymized: float  # SSIM against raw
    ssim_desensitized: float  # SSIM against raw
    rank1_raw: float = math.nan  # rank-1 with raw queries and a raw gallery


@dataclass(frozen=True)
class UpgradePolicy:
    """The conditions under which a validation qualifies for upgradation."""

    rank1: float = math.inf  # rank-1 to reach, in [0, 1]; infinity turns upgradation off
    rank1_slack: float = 0.05  # how far below ``rank1`` a validation still qualifies
    # how much closer to raw the anonymized images may be than the desensitized ones
    psnr_margin_db: float = 1.0
    ssim_margin: float = 0.05
    rank1_share: float = 0.0  # rank-1 to reach as a share of ``Validation.rank1_raw``; 0: ``rank1``

    @classmethod
    def of(
        cls, val_r1: float | str, slack: float, psnr_margin_db: float, ssim_margin: float
    ) -> UpgradePolicy:
        """Return the policy of a value of MODEL.VAL_R1: a rank-1, or a share such as ``0.9x``."""
        if isinstance(val_r1, str) and val_r1.endswith("x"):
            share = float(val_r1[:-1])
            return cls(math.inf, slack, psnr_margin_db, ssim_margin, rank1_share=share)
        return cls(float(val_r1), slack, psnr_margin_db, ssim_margin)

    @property
    def enabled(self) -> bool:
        """Whether any validation can qualify."""
        return self.rank1_share > 0 or self.rank1 != math.inf

    def threshold(self, validation: Validation) -> float:
        """Return the rank-1 that a validation must exceed."""
        if self.rank1_share:
            return self.rank1_share * validation.rank1_raw
        return self.rank1 - self.rank1_slack

    def good_enough(self, validation: Validation) -> bool:
        """Return whether rank-1 is high enough."""
        return validation.rank1 > self.threshold(validation)

    def private_enough(self, validation: Validation) -> bool:
        """Return whether PSNR and SSIM of anonymized images are within the privacy margins."""
        return (
            validation.psnr_anonymized_db < validation.psnr_desensitized_db + self.psnr_margin_db
            and validation.ssim_anonymized < validation.ssim_desensitized + self.ssim_margin
        )

    def qualifies(self, validation: Validation) -> bool:
        """Return whether both conditions hold."""
        return self.good_enough(validation) and self.private_enough(validation)


@dataclass(frozen=True)
class UpgradeState:
    """The state of supervision upgradation."""

    count: int = 0  # number of upgrades so far
    best_rank1: float = -1.0  # highest rank-1 of a qualifying validation; -1 before the first
    epoch: int = 0  # epoch of the last upgrade; 0 before the first
    # whether the frozen copy's output is the target; else the desensitized image is
    in_force: bool = False


def decide(
    state: UpgradeState, policy: UpgradePolicy, validation: Validation, epoch: int
) -> tuple[UpgradeState, bool]:
    """Return the state after a validation, and whether to freeze a new copy of the anonymizer.

    A qualifying validation with the best rank-1 so far freezes a new copy. Any other qualifying
    validation puts the existing copy in force. If a validation does not qualify, the target is the
    desensitized image again.
    """
    if not policy.qualifies(validation):
        return replace(state, in_force=False), False
    if validation.rank1 > state.best_rank1:
        return UpgradeState(state.count + 1, validation.rank1, epoch, in_force=True), True
    return replace(state, in_force=True), False


@dataclass(eq=False)
class Supervision:
    """Returns the anonymization target of each batch, and upgrades it after validations."""

    policy: UpgradePolicy  # conditions under which a validation qualifies
    # Decay per step of the moving average of the anonymizer that the teacher becomes after an
    # upgrade; 0 keeps the copy frozen.
    ema: float = 0.0
    state: UpgradeState = UpgradeState()
    teacher: nn.Module | None = None  # copy of the anonymizer, after the first upgrade

    @torch.no_grad()
    def target(self, raw: Tensor, desensitized: Tensor) -> Tensor:
        """Return the target (B, 3, H, W): desensitized, or the teacher's output once upgraded.

        The teacher stays in evaluation mode, as in the validation, so that its images do not depend
        on the rest of the batch.
        """
        if not self.state.in_force or self.teacher is None:
            return desensitized
        return self.teacher(raw).float()

    @torch.no_grad()
    def follow(self, anonymizer: nn.Module) -> None:
        """Move the teacher towards the anonymizer after a training step.

        The teacher moves only while its output is the target. It would otherwise follow an
        anonymizer that does not qualify. Running statistics of batch norms move the same way. All
        processes of a run compute the same teacher, since their anonymizers are equal.
        """
        if not self.ema or not self.state.in_force or self.teacher is None:
            return
        move = get_ema_multi_avg_fn(self.ema)
        move(_float_tensors(self.teacher), _float_tensors(anonymizer), 0)

    def update(self, validation: Validation, epoch: int, anonymizer: nn.Module) -> UpgradeState:
        """Update the state after the validation of ``epoch``; freeze a copy if it is the best."""
        before = self.state
        self.state, freeze = decide(before, self.policy, validation, epoch)
        if freeze:
            self.teacher = frozen_copy(anonymizer)
        self._log(before, validation, epoch, freeze)
        return self.state

    def _log(self, before: UpgradeState, validation: Validation, epoch: int, freeze: bool) -> None:
        average = f", followed by its moving average (decay {self.ema})" if self.ema else ""
        policy, share = self.policy, ""
        if policy.rank1_share:
            needed = 100 * policy.threshold(validation)
            share = f" (above {policy.rank1_share} x raw->raw = {needed:.1f}%)"
        if freeze:
            _LOGGER.info(
                "Supervision upgraded at epoch %d (upgrade %d): raw->protected rank-1 %.1f%%%s, "
                "the target is now the anonymizer of this epoch%s",
                epoch, self.state.count, 100 * validation.rank1, share, average,
            )  # fmt: skip
        elif before.in_force and not self.state.in_force:
            _LOGGER.info(
                "Supervision falls back to desensitized images at epoch %d: %s",
                epoch, self.why_not(validation),
            )  # fmt: skip
        elif self.state.in_force and not before.in_force:
            _LOGGER.info(
                "Supervision is in force again at epoch %d: the target is the anonymizer of epoch "
                "%d%s", epoch, self.state.epoch, average,
            )  # fmt: skip
        elif policy.enabled and not self.state.in_force:
            _LOGGER.info("No supervision upgrade at epoch %d: %s", epoch, self.why_not(validation))

    def why_not(self, validation: Validation) -> str:
        """Return in words which conditions of the policy a validation does not meet."""
        policy, reasons = self.policy, []
        if not policy.good_enough(validation):
            rule = "VAL_R1 - VAL_R1_SLACK"
            if policy.rank1_share:
                rule = f"{policy.rank1_share} x raw->raw rank-1 {validation.rank1_raw:.3f}"
            reasons.append(
                f"rank-1 {validation.rank1:.3f} is not above "
                f"{rule} = {policy.threshold(validation):.3f}"
            )
        if not policy.private_enough(validation):
            reasons.append(
                f"anonymized images are too close to raw (PSNR "
                f"{validation.psnr_anonymized_db:.2f} dB, "
                f"SSIM {validation.ssim_anonymized:.3f}; desensitized "
                f"{validation.psnr_desensitized_db:.2f} dB, {validation.ssim_desensitized:.3f})"
            )
        return "; ".join(reasons)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs: plain numbers and the teacher's tensors."""
        teacher = None if self.teacher is None else self.teacher.state_dict()
        return {"state": asdict(self.state), "teacher": teacher}

    def load_state_dict(self, saved: dict[str, Any], anonymizer: nn.Module | None) -> None:
        """Restore ``state_dict()``; a teacher gets the shape of ``anonymizer``.

        If upgradation is off now, the teacher is not in force.
        """
        names = {field.name for field in fields(UpgradeState)}
        state = UpgradeState(**{k: v for k, v in saved["state"].items() if k in names})
        self.state = replace(state, in_force=state.in_force and self.policy.enabled)
        self.teacher = None
        if saved["teacher"] is not None and anonymizer is not None:
            self.teacher = frozen_copy(anonymizer)
            self.teacher.load_state_dict(saved["teacher"])


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a copy without gradients, in evaluation mode."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def _float_tensors(module: nn.Module) -> list[Tensor]:
    """Return parameters and floating-point buffers, in the same order for equal modules."""
    return [
        *module.parameters(),
        *(buffer for buffer in module.buffers() if buffer.is_floating_point()),
    ]
