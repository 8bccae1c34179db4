"""What all attacks of one run share: persons, stored images, the model, and attackers' networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.attacks.levels import ImageSet, Protector, Stored, own_key_per_person, seal
from engine.attacks.measures import Result
from engine.attacks.training import HeldOut, Workbench, train_reid
from engine.scoring.features import Features
from modeling.objectives import Objectives
from modeling.reid_network import ReIDNetwork
from modeling.weights import load_matching
from utils.logger import get_logger
from utils.tensor_files import TensorFileError, read_tensors, save_tensors

_LOGGER = get_logger()


@dataclass(frozen=True)
class Settings:
    """What the numbers of a run depend on besides checkpoint and data.

    Attributes:
        seed: What everything of the attackers is drawn from.
        budget: Public images that an attacker may train on.
        epochs: Passes over them; smaller budgets get as many updates.
        people: Most private persons.
        levels: Levels to attack.
        keys: Keys that a brute force may try on each image.
        start: What an attacker's re-ID network starts from: ``imagenet`` or ``none``.
    """

    seed: int
    budget: int
    epochs: int
    people: int
    levels: tuple[str, ...]
    keys: int
    start: str = "none"


@dataclass(frozen=True)
class Makers:
    """Build an attacker's networks, of the architecture of the attacked model.

    Attributes:
        recovery: A recovery network.
        reid: A re-ID network for so many persons.
        objectives: Identity losses for so many persons and that feature size.
    """

    recovery: Callable[[], nn.Module]
    reid: Callable[[int], ReIDNetwork]
    objectives: Callable[[int, int], Objectives]


@dataclass(eq=False)
class AttackContext:
    """The scene of all attacks of one run.

    Attributes:
        settings: Seed and budgets.
        public: Images that an attacker trains on.
        validation: Images of held-out public persons, by which he chooses.
        private: Images that attacks are scored on.
        protector: Makes the stored images.
        reid: The authorised re-ID network.
        recovery: The owner's recovery network; None if the checkpoint has none.
        makers: Build an attacker's networks.
        bench: Where and how attackers train.
        cross_camera: TEST.CROSS_CAMERA.
        folder: Where attackers' networks are kept for a resume; None keeps none.
    """

    settings: Settings
    public: ImageSet
    validation: ImageSet
    private: ImageSet
    protector: Protector
    reid: ReIDNetwork
    recovery: nn.Module | None
    makers: Makers
    bench: Workbench
    cross_camera: bool = True
    folder: Path | None = None
    _stored: dict[str, Stored] = field(default_factory=dict)
    _plain: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _public_reid: ReIDNetwork | None = None

    @property
    def seed(self) -> int:
        """What everything of the attackers is drawn from."""
        return self.settings.seed

    def stored(self, level: str) -> Stored:
        """Return the private images as their owner stores them; the same in all attacks."""
        if level not in self._stored:
            plain = self.plain("private", level)
            self._stored[level] = seal(level, plain, self.private.subjects)
        return self._stored[level]

    def plain(self, role: str, level: str) -> Tensor:
        """Return the images of a role (public, validation, private) before encryption."""
        kind = level if level in ("raw", "desensitized") else "anonymized"
        if (role, kind) not in self._plain:
            images: ImageSet = getattr(self, role)
            self._plain[role, kind] = self.protector.plain(images, kind)
        return self._plain[role, kind]

    def imitated(self, role: str, level: str) -> Stored:
        """Return public or validation images stored under keys of the attacker's own."""
        images: ImageSet = getattr(self, role)
        return own_key_per_person(level, self.plain(role, level), images.pids)

    def unit(self, images: Tensor) -> Tensor:
        """Return normalised images as values in [0, 1]; what lies outside is cut off."""
        return self.protector.pixels.denormalize(images).clamp_(0, 1)

    def mean_public(self, level: str) -> Tensor:
        """Return the mean public picture of a level before encryption, in [0, 1], (1, 3, H, W)."""
        return self.unit(self.plain("public", level)).mean(0, keepdim=True)

    def sides(self, queries: Tensor, gallery: Tensor) -> tuple[Features, Features]:
        """Pair embeddings of all private images as query and gallery.

        Args:
            queries: Embeddings (N, D) of what is looked with; those of query images are taken.
            gallery: Embeddings (N, D) of what is looked through; the others are taken.
        """
        people, mask = self.private, self.private.is_query
        return (
            Features(queries[mask], people.pids[mask], people.camids[mask]),
            Features(gallery[~mask], people.pids[~mask], people.camids[~mask]),
        )

    def result(self, attack: str, level: str, sentence: str, **values: Any) -> Result:
        """Return a result with what all results of this run have in common."""
        common: dict[str, Any] = {
            "seed": self.seed,
            "budget": self.settings.budget,
            "budget_unit": "public images",
            "num_persons": self.private.num_persons,
            "num_images": len(self.private),
        }
        return Result(attack, level, sentence, **(common | values))

    def public_reid(self) -> ReIDNetwork:
        """Return a re-ID network that only ever saw raw images of public persons.

        Trained where it is first asked for, and kept in ``folder`` for a resume.
        """
        if self._public_reid is None:
            network = self.makers.reid(self.public.num_persons)
            path = None if self.folder is None else self.folder / "public_reid.pth"
            if path is not None and path.is_file():
                load_matching(network, read_weights(path), str(path))
                _LOGGER.info("The network that saw only raw images is taken from %s", path)
            else:
                network = self._fit(network, "raw", "Re-ID on raw images")
                if path is not None:
                    save_tensors(network.state_dict(), path)
            self._public_reid = network.to(self.bench.device).eval()
        return self._public_reid

    def tuned_reid(self, level: str) -> ReIDNetwork:
        """Return that network after training on public images as the level stores them."""
        network = copy.deepcopy(self.public_reid())
        return self._fit(network, level, f"Re-ID on {level} images")

    def _fit(self, network: ReIDNetwork, level: str, title: str) -> ReIDNetwork:
        people = self.public
        labels = torch.unique(people.pids)
        network = network.to(self.bench.device)
        objectives = self.makers.objectives(len(labels), network.feature_size)
        held_out = self.validation
        trained = train_reid(
            network,
            self.imitated("public", level).observed,
            people.pids,
            HeldOut(self.imitated("validation", level).observed, held_out.pids, held_out.camids),
            objectives,
            self.bench,
            title,
            cross_camera=self.cross_camera,
        )
        _LOGGER.info("%s: best after %d updates, held-out mAP %.1f %%", title, trained.best_step,
                     100 * trained.validation)  # fmt: skip
        return network


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of an attacker's network that an earlier run kept.

    Raises:
        TensorFileError: The file is damaged.
    """
    try:
        return read_tensors(path)
    except TensorFileError as error:
        raise TensorFileError(f"{error}; delete it to train the network again") from error
