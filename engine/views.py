"""The images that a batch turns into: anonymized, encrypted, read back with each key, recovered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from data.records import Batch, Sample
from modeling.encryption.cipher import Cipher, read_sealed
from modeling.privacy_networks import PrivacyNetworks, ReIDOnly
from modeling.reid_network import ReIDNetwork


@dataclass(frozen=True)
class Views:
    """The images that one batch of B raw images turns into, all normalised (B, 3, H, W).

    Attributes:
        kinds: Images whose quality is measured against raw, by name.
        protected: What the re-ID network is given as the protected image, by key state.
        num_refused: How many images each key state's holder could not open.
    """

    kinds: dict[str, Tensor]
    protected: dict[str, Tensor]
    num_refused: dict[str, int] = field(default_factory=dict)


class ViewMaker(Protocol):
    """Turns a batch into its views; the joint model and the baseline differ only here."""

    @property
    def reid(self) -> ReIDNetwork:
        """The re-ID network that is scored."""
        ...

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:
        """Return the views of a batch whose images belong to these subject labels."""
        ...


class BaselineViews:
    """Mode C: the protected image is the desensitized one, and nothing is encrypted."""

    def __init__(self, nets: ReIDOnly) -> None:
        self.reid = nets.reid

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:  # noqa: ARG002
        """Return the desensitized images as the only view."""
        return Views({"desensitized": batch.desensitized}, {"none": batch.desensitized})


class JointViews:
    """Mode GCR: anonymized, encrypted, decrypted and recovered images.

    Args:
        nets: The joint model, in evaluation mode.
        cipher: Encrypts anonymized images; None leaves out everything that needs it.
        recover_with_key: TEST.RECOVERY_WITH_KEY: whether recovery is given the decrypted or the
            encrypted image.
    """

    def __init__(
        self, nets: PrivacyNetworks, cipher: Cipher | None = None, *, recover_with_key: bool = True
    ) -> None:
        self.reid = nets.reid
        self._nets = nets
        self._cipher = cipher
        self._recover_with_key = recover_with_key

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:
        """Anonymize a batch, encrypt it, and read it back with each key."""
        anonymized = self._nets.anonymizer(batch.raw).float()
        kinds = {"desensitized": batch.desensitized, "anonymized": anonymized}
        protected, refused = {"none": anonymized}, {}
        to_recover = anonymized
        if self._cipher is not None:
            sealed = self._cipher.seal(anonymized, subjects)
            for state in ("right", "wrong", "ciphertext"):
                reading = read_sealed(self._cipher, sealed, state)
                protected[state], refused[state] = reading.images, reading.num_refused
            if refused["wrong"] == len(sealed):  # all are shown as an observer sees them: one pass
                protected["wrong"] = protected["ciphertext"]
            kinds |= {"encrypted": protected["ciphertext"], "decrypted": protected["right"]}
            to_recover = protected["right" if self._recover_with_key else "ciphertext"]
        kinds["recovered"] = self._nets.recovery(to_recover).float()
        return Views(kinds, protected, refused)


def images_by_kind(
    views: ViewMaker, batches: Iterable[Batch], samples: Sequence[Sample]
) -> dict[str, Tensor]:
    """Return the images of some batches in every kind, raw first, each (images, 3, H, W).

    Args:
        views: Makes the kinds besides raw.
        batches: Batches of a loader over ``samples``; it may have left some of them out.
        samples: Give the subject labels.
    """
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        subjects = [samples[index].subject for index in batch.index.tolist()]
        for kind, images in {"raw": batch.raw, **views(batch, subjects).kinds}.items():
            found.setdefault(kind, []).append(images)
    return {kind: torch.cat(parts) for kind, parts in found.items()}
