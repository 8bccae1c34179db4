"""The interface of attacks, the context that all attacks of a run share, and common phrases."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.attacks.levels import CLEAR_LEVELS, ImageSet, Stored, attacker_subjects, seal
from engine.attacks.measures import Measure, Result
from engine.attacks.training import HeldOut, TrainingSetup, train_reid
from engine.scoring.features import Features
from modeling.objectives import Objectives
from modeling.reid_network import ReIDNetwork
from modeling.weights import load_matching
from utils.logger import get_logger
from utils.seeding import derive_seed, seed_everything
from utils.tensor_files import TensorFileError, read_tensors, save_tensors

NOTHING_ENCRYPTED = "nothing is encrypted at this level, so there is no ciphertext to break"
UNTRAINED: dict[str, Any] = {"budget": 0, "budget_unit": "no training"}  # of a result
TRIAL_IMAGES = 128  # held-out public images on which an attacker chooses a method


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of an attack, and example images."""

    result: Result  # the numbers
    # Example images by name, values in [0, 1], each (K, 3, H, W). The names are the same at every
    # level.
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class Attack:
    """Base class of attacks. To add one, write a class and add it to ``suite.ATTACKS``."""

    name: str  # on the command line and in files
    question: str  # the question that the attack answers, in plain words

    def reason_against(self, level: str) -> str:  # noqa: ARG002
        """Return why the attack does not apply to a level; empty if it does, as by default."""
        return ""

    def run(self, context: AttackContext, level: str) -> Outcome:
        """Attack the private images of a level to which it applies."""
        raise NotImplementedError


class CipherAttack(Attack):
    """Base class of attacks that apply to encrypted levels only."""

    def reason_against(self, level: str) -> str:
        """See :class:`Attack`."""
        return NOTHING_ENCRYPTED if level in CLEAR_LEVELS else ""


def images_by_identity(pids: Tensor) -> list[Tensor]:
    """Return the indices of the images of each identity, in ascending order of both."""
    return [(pids == pid).nonzero().squeeze(1) for pid in torch.unique(pids)]


def example_images(pids: Tensor, count: int = 2) -> Tensor:
    """Return the indices (count,) of one image each of the first identities."""
    return torch.stack([own[0] for own in images_by_identity(pids)[:count]])


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
    reveal = "reveal" if reveals_own_identity(measures) else "do not reveal"
    return (
        f"{start}, the attacker obtains images at {decibels(measures[0])}; they {reveal} the "
        "identity."
    )


_LOGGER = get_logger()


@dataclass(frozen=True)
class Settings:
    """The settings of a run, in addition to checkpoint and data."""

    seed: int  # seed of all random choices of the attackers
    budget: int  # public images that an attacker may train on
    epochs: int  # passes over them; smaller budgets get as many updates
    people: int  # maximum number of private identities
    levels: tuple[str, ...]  # levels to attack
    keys: int  # keys that the brute force tries for each image
    start: str = "none"  # start weights of an attacker's re-ID network: ``imagenet`` or ``none``


@dataclass(frozen=True)
class NetworkFactories:
    """Functions that build an attacker's networks, with the architecture of the attacked model."""

    recovery: Callable[[], nn.Module]  # returns a recovery network
    reid: Callable[[int], ReIDNetwork]  # returns a re-ID network for a number of identities
    # returns identity losses for a number of identities and a feature size
    objectives: Callable[[int, int], Objectives]


@dataclass(eq=False)
class AttackContext:
    """Everything that the attacks of one run share."""

    settings: Settings  # seed and budgets
    public: ImageSet  # images that attackers train on
    validation: ImageSet  # images of held-out public identities, on which attackers choose methods
    private: ImageSet  # images that attacks are scored on
    anonymizer: nn.Module  # the public anonymizer
    reid: ReIDNetwork  # the owner's re-ID network
    recovery: nn.Module  # the owner's recovery network
    factories: NetworkFactories  # functions that build attackers' networks
    bench: TrainingSetup  # device and length of attackers' trainings
    cross_camera: bool = True  # TEST.CROSS_CAMERA
    # folder in which attackers' networks are saved for a resume; None to save none
    folder: Path | None = None
    _stored: dict[str, Stored] = field(default_factory=dict)
    _plain: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _public_reid: ReIDNetwork | None = None

    @property
    def seed(self) -> int:
        """Seed of all random choices of the attackers."""
        return self.settings.seed

    def stored(self, level: str) -> Stored:
        """Return the private images as the owner stores them; the same for all attacks."""
        if level not in self._stored:
            plain = self.plain("private", level)
            self._stored[level] = seal(level, plain, self.private.subjects)
        return self._stored[level]

    def plain(self, role: str, level: str) -> Tensor:
        """Return the images of a role (public, validation, private) before encryption.

        They are normalised, float32, on the CPU.
        """
        kind = level if level in ("raw", "desensitized") else "anonymized"
        if (role, kind) not in self._plain:
            images: ImageSet = getattr(self, role)
            given = images.desensitized if kind == "desensitized" else images.raw
            plain = self.bench.pixels.normalize(given)
            if kind == "anonymized":
                plain = self.bench.run(self.anonymizer, plain, title="Anonymize")
            self._plain[role, kind] = plain
        return self._plain[role, kind]

    def imitated(self, role: str, level: str) -> Stored:
        """Return public or validation images, stored under one key of the attacker per identity."""
        images: ImageSet = getattr(self, role)
        return seal(level, self.plain(role, level), attacker_subjects(images.pids.tolist()))

    def unit(self, images: Tensor) -> Tensor:
        """Return normalised images as values in [0, 1], clipped."""
        return self.bench.pixels.denormalize(images).clamp_(0, 1)

    def mean_public(self, level: str) -> Tensor:
        """Return the mean public image of a level before encryption, in [0, 1], (1, 3, H, W)."""
        return self.unit(self.plain("public", level)).mean(0, keepdim=True)

    def sides(self, queries: Tensor, gallery: Tensor) -> tuple[Features, Features]:
        """Return the features of query and gallery.

        Both arguments are embeddings of all private images (N, D).
        """
        private, mask = self.private, self.private.is_query
        return (
            Features(queries[mask], private.pids[mask], private.camids[mask]),
            Features(gallery[~mask], private.pids[~mask], private.camids[~mask]),
        )

    def outcome(
        self,
        attack: Attack,
        level: str,
        sentence: str,
        *,
        columns: Mapping[str, Tensor] | None = None,
        **values: Any,
    ) -> Outcome:
        """Return an outcome; fields of its result have by default the values of this run."""
        common: dict[str, Any] = {
            "seed": self.seed,
            "budget": self.settings.budget,
            "budget_unit": "public images",
            "num_persons": self.private.num_persons,
            "num_images": len(self.private),
        }
        return Outcome(Result(attack.name, level, sentence, **(common | values)), columns or {})

    def public_reid(self) -> ReIDNetwork:
        """Return a re-ID network that was trained on raw images of public identities only.

        It is trained on first use, and saved in ``folder`` for a resume.
        """
        if self._public_reid is None:
            seed_everything(derive_seed(self.seed, "start of re-ID"))
            network = self.factories.reid(self.public.num_persons)
            path = None if self.folder is None else self.folder / "public_reid.pth"
            if path is not None and path.is_file():
                try:
                    load_matching(network, read_tensors(path), str(path))
                except TensorFileError as error:
                    raise TensorFileError(
                        f"{error}; delete it to train the network again"
                    ) from error
                _LOGGER.info("The network trained on raw images only is loaded from %s", path)
            else:
                network = self._fit(network, "raw", "Re-ID on raw images")
                if path is not None:
                    save_tensors(network.state_dict(), path)
            self._public_reid = network.to(self.bench.device).eval()
        return self._public_reid

    def tuned_reid(self, level: str) -> ReIDNetwork:
        """Return that network after training on public images as stored at a level."""
        network = copy.deepcopy(self.public_reid())
        return self._fit(network, level, f"Re-ID on {level} images")

    def _fit(self, network: ReIDNetwork, level: str, title: str) -> ReIDNetwork:
        network, held_out = network.to(self.bench.device), self.validation
        objectives = self.factories.objectives(self.public.num_persons, network.feature_size)
        trained = train_reid(
            network,
            self.imitated("public", level).observed,
            self.public.pids,
            HeldOut(self.imitated("validation", level).observed, held_out.pids, held_out.camids),
            objectives,
            self.bench,
            title,
            cross_camera=self.cross_camera,
        )
        _LOGGER.info("%s: best after %d updates, held-out mAP %.1f %%", title, trained.best_step,
                     100 * trained.validation)  # fmt: skip
        return network
