"""Results of attacks: measures with intervals and floors, and the verdict that follows from them.

Intervals are 95 % bootstrap intervals over identities. A floor is measured by a permutation test:
the same attack is scored on answers that were assigned to other identities. If stored images
contain no information about the identity, both assignments have the same score, whatever the
network or the image prior. A bias of an attack therefore neither looks like a leak nor hides one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from engine.scoring.image_quality import QualityAccumulator
from engine.scoring.intervals import Interval, bootstrap_ratios
from utils.errors import optional_package
from utils.seeding import numpy_generator

# File in the folder of a run of attacks; a training has none.
SETTINGS_NAME = "settings.json"

# Smaller differences are rounding: if a network returns one image for every input, value and floor
# are the same number, computed in two ways.
_RESOLUTION = 1e-6

HOLDS, FAILS, NOT_APPLICABLE = "holds", "fails", "not applicable"


@dataclass(frozen=True)
class Measure:
    """One score of an attack, and its floor: the score without information."""

    name: str  # such as ``rank1``
    unit: str  # ``rate``, ``dB``, ``ssim``, ``lpips``, ``r`` or ``s``
    value: Interval  # score of the attack with its 95 % interval over identities
    floor: Interval  # score without information, with its interval
    decides: bool = False  # whether the verdict depends on this measure
    # the side of the floor on which the protection has failed: ``above`` (the attacker gains) or
    # ``below`` (the owner loses)
    bad_side: str = "above"
    # Whether the floor is known and not measured. Then one image beyond it is enough.
    floor_is_exact: bool = False

    @property
    def beyond_floor(self) -> bool:
        """Whether the whole interval of the value is on the bad side of the floor's interval.

        If the floor is exact, the value itself decides: some bootstrap samples miss the few
        identities whose images were opened, so the interval would reach the floor.
        """
        if self.floor_is_exact:
            value, floor = self.value.value, self.floor.value
            return value < floor if self.bad_side == "below" else value > floor
        if self.bad_side == "below":
            return self.value.high < self.floor.low - _RESOLUTION
        return self.value.low > self.floor.high + _RESOLUTION


@dataclass(frozen=True)
class CurvePoint:
    """The measures at one point of a curve, e.g. for one data budget."""

    x: float
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Result:
    """One attack on one level."""

    attack: str
    level: str
    sentence: str  # the result in plain words
    measures: tuple[Measure, ...] = ()  # the scores; empty if the attack does not apply
    # whether the attack applies to the level; if not, the sentence contains the reason
    applies: bool = True
    seed: int = 0  # seed of all random choices of the attacker
    budget: int = 0  # resources of the attacker, in ``budget_unit``
    budget_unit: str = ""  # such as ``public images`` or ``keys tried``
    num_persons: int = 0  # private identities that were scored
    num_images: int = 0  # private images that were scored
    curve_of: str = ""  # the variable of ``curve``; empty without a curve
    curve: tuple[CurvePoint, ...] = ()  # measures for several values of it
    # further values by name, of plain types
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``fails`` if at least one deciding measure is beyond its floor."""
        if not self.applies:
            return NOT_APPLICABLE
        return FAILS if any(m.decides and m.beyond_floor for m in self.measures) else HOLDS

    def measure(self, name: str) -> Measure:
        """Return a measure by name."""
        return next(measure for measure in self.measures if measure.name == name)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, including the verdict."""
        content = asdict(self) | {"measures": _plain(self.measures), "verdict": self.verdict}
        content["curve"] = [{"x": at.x, "measures": _plain(at.measures)} for at in self.curve]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """Return the result that :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: The content has another form.
        """
        values = {name: value for name, value in content.items() if name != "verdict"}
        values["measures"] = _measures(content["measures"])
        values["curve"] = tuple(
            CurvePoint(point["x"], _measures(point["measures"])) for point in content["curve"]
        )
        return cls(**values)


def exactly(value: float) -> Interval:
    """Return the interval of a number that is known without error."""
    return Interval(value, value, value)


def _plain(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Return plain values; JSON has no infinity and NaN, so they become None."""
    contents = []
    for measure in measures:
        content = asdict(measure) | {"beyond_floor": measure.beyond_floor}
        for name in ("value", "floor"):
            numbers = content[name].items()
            content[name] = {key: v if math.isfinite(v) else None for key, v in numbers}
        contents.append(content)
    return contents


def _measures(contents: Sequence[Mapping[str, Any]]) -> tuple[Measure, ...]:
    measures = []
    for content in contents:
        values = {name: value for name, value in content.items() if name != "beyond_floor"}
        for name in ("value", "floor"):
            numbers = {k: math.nan if v is None else float(v) for k, v in values[name].items()}
            values[name] = Interval(**numbers)
        measures.append(Measure(**values))
    return tuple(measures)


# An image that equals its target would make the mean infinite; float32 ends near 158 dB.
PSNR_CAP_DB = 200.0
_IMAGE_PERMUTATIONS = 12

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def interval_of(values: ArrayLike, pids: Tensor, seed: int) -> Interval:
    """Return the mean of one value per image, with its interval over identities."""
    column = np.asarray(values, np.float64).reshape(-1, 1)
    (interval,) = bootstrap_ratios(column, np.ones(len(column)), pids.cpu().numpy(), seed=seed)
    return interval


def permutation_interval(means: ArrayLike) -> Interval:
    """Return the mean over permutations, and the interval that contains 95 % of them."""
    values = np.asarray(means, np.float64)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def permute_identities(
    pids: Tensor, count: int, rng: np.random.Generator, camids: Tensor | None = None
) -> Indices:
    """Return, for each permutation and image, the index of an image of another identity.

    With ``camids``, the other image is of the same camera, if one of another identity exists. The
    indices are (count, N) for identities and cameras (N,).
    """
    identities = pids.cpu().numpy()
    cameras = np.zeros_like(identities) if camids is None else camids.cpu().numpy()
    indices = np.empty((count, len(identities)), np.int64)
    for pid, camera in np.unique(np.stack([identities, cameras], 1), axis=0):
        own = np.flatnonzero((identities == pid) & (cameras == camera))
        others = np.flatnonzero((identities != pid) & (cameras == camera))
        if not len(others):
            others = np.flatnonzero(identities != pid)
        indices[:, own] = rng.choice(others, (count, len(own)))
    return indices


def quality(truth: Tensor, images: Tensor) -> tuple[Floats, Floats]:
    """Return PSNR (dB) and SSIM of each image; values are first clipped to [0, 1].

    NaN counts as grey, as an attacker would replace it. Otherwise one NaN would make all means NaN,
    which are never beyond a floor.

    Args:
        truth: Target images (N, 3, H, W).
        images: Images of the attacker, of the same shape or (1, 3, H, W).
    """
    if not len(truth):
        return np.zeros(0), np.zeros(0)
    accumulator = QualityAccumulator()
    accumulator.update(truth.clamp(0, 1), _visible(images).expand_as(truth))
    psnr_db, ssim = accumulator.per_image()
    return np.minimum(psnr_db.numpy(), PSNR_CAP_DB), ssim.numpy()


def _visible(images: Tensor) -> Tensor:
    """Return images with values in [0, 1]; NaN becomes grey."""
    return images.nan_to_num(0.5, posinf=1.0, neginf=0.0).clamp(0, 1)


def image_measures(
    attacked: Tensor,
    truth: Tensor,
    guess: Tensor,
    pids: Tensor,
    camids: Tensor,
    seed: int,
    *,
    with_others: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Measure, ...]:
    """Score the images (N, 3, H, W), values in [0, 1], that an attacker made from N stored images.

    Args:
        attacked: Images of the attacker.
        truth: Target images.
        guess: The best guess without the stored image, such as the mean public image;
            (1, 3, H, W) or (N, 3, H, W).
        pids: Identities (N,).
        camids: Cameras (N,); images are compared with those of other identities at the same camera,
            because a camera alone is no identity.
        seed: Seed of bootstrap and permutations.
        with_others: Function that repeats the attack with the stored images at other indices (N,),
            and everything else that the attacker knows unchanged. None if the attacker's images
            depend on the stored image only; then they are permuted.

    Returns:
        ``psnr`` and ``ssim`` with the guess as floor, and two measures that decide:
        ``psnr_own_gain`` and ``ssim_own_gain``, the score for the image's own target minus the mean
        score of images that were made from other identities.
    """
    psnr, ssim = quality(truth, attacked)
    guessed = quality(truth, guess)
    rng = numpy_generator(seed, "deals of pictures")  # the name is part of the seed
    permutations = permute_identities(pids, _IMAGE_PERMUTATIONS, rng, camids)
    repeat = with_others or (lambda indices: attacked[indices])
    others = np.array([quality(truth, repeat(torch.from_numpy(p))) for p in permutations])
    measures = []
    for kind, (name, unit, own) in enumerate((("psnr", "dB", psnr), ("ssim", "ssim", ssim))):
        value, floor = (interval_of(v, pids, seed) for v in (own, guessed[kind]))
        measures.append(Measure(name, unit, value, floor))
        means = others[:, kind]  # (permutations, N)
        gain = interval_of(own - means.mean(0), pids, seed)
        # Each permutation minus the mean of the others, as the own score is minus the mean of all.
        rest = (means.sum(0) - means) / (_IMAGE_PERMUTATIONS - 1)
        chance = permutation_interval((means - rest).mean(1))
        measures.append(Measure(f"{name}_own_gain", unit, gain, chance, decides=True))
    return tuple(measures)


def share_measure(
    name: str, values: ArrayLike, pids: Tensor, seed: int, floor: float = 0.0
) -> Measure:
    """Return a share of images, or a rate per image, with a floor that is known exactly."""
    value = interval_of(values, pids, seed)
    return Measure(name, "rate", value, exactly(floor), decides=True, floor_is_exact=True)


BACKBONE_FILE = "alexnet-owt-7be5be79.pth"
_INSTALL = "python3 -m pip install torchmetrics"
_LEAST_SIDE = 31  # px; AlexNet's second pooling has no output for smaller images


def reason_against_lpips(height: int, width: int) -> str:
    """Return why LPIPS cannot be computed for images of this size; empty if it can."""
    weights = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE_FILE
    if find_spec("torchmetrics") is None:
        return f"torchmetrics is not installed ({_INSTALL})"
    if not weights.is_file():
        return f"AlexNet's ImageNet weights are not in {weights}, and nothing is downloaded"
    if min(height, width) < _LEAST_SIDE:
        return f"images of {height} x {width} px are too small; LPIPS needs {_LEAST_SIDE} px"
    return ""


def lpips_measure(
    attacked: Tensor, truth: Tensor, guess: Tensor, pids: Tensor, seed: int, device: torch.device
) -> Measure:
    """Return the mean LPIPS of the attacker's images to their targets; smaller is more similar.

    Source: R. Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric", CVPR 2018. torchmetrics contains the weights that LPIPS was trained to, but not those
    of its AlexNet backbone, which torchvision would download. Nothing is downloaded here. The
    arguments are those of ``image_measures``; the floor is the LPIPS of the guess.
    """
    value, floor = (
        interval_of(lpips_distances(truth, images.expand_as(truth), device).numpy(), pids, seed)
        for images in (attacked, guess)
    )
    return Measure("lpips", "lpips", value, floor, bad_side="below")


@torch.no_grad()
def lpips_distances(truth: Tensor, images: Tensor, device: torch.device) -> Tensor:
    """Return the LPIPS (N,) of images (N, 3, H, W) with values in [0, 1]; NaN counts as grey."""
    metric = _lpips_network().to(device)
    metric.reset()
    for one, other in zip(truth.clamp(0, 1).split(64), _visible(images).split(64), strict=True):
        metric.update(one.to(device), other.to(device))
    scores: Tensor = metric.compute()
    return scores.reshape(-1).cpu()


@lru_cache(maxsize=1)
def _lpips_network() -> Any:
    module = optional_package("torchmetrics.image.lpip", "LPIPS", _INSTALL)
    return module.LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
