"""Attacks with networks or a regression: recovery of images, and re-ID of stored images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.attacks.attack import (
    Attack,
    AttackContext,
    Outcome,
    decibels,
    example_images,
    percent,
    reveals_own_identity,
)
from engine.attacks.levels import fresh_key_observer
from engine.attacks.linkage import link_measures, search_measures, search_sentence
from engine.attacks.measures import (
    CurvePoint,
    Measure,
    image_measures,
    lpips_measure,
    quality,
    reason_against_lpips,
)
from engine.attacks.training import Trained, TrainingSetup, train_recovery
from modeling.reid_network import ReIDNetwork
from utils.device import full_precision
from utils.logger import get_logger

_LOGGER = get_logger()
BUDGET_PARTS = (16, 4, 1)
_LEAST_IMAGES = 8


class ModelAttack(Attack):
    """Trains recovery networks on public pairs (stored, raw), for several data budgets.

    At encrypted levels, every image and epoch has a new key of the attacker, so that the network
    learns the scheme and not a key. Scores are on private identities.
    """

    name = "model"
    question = "Can a network trained on public images reconstruct raw images?"
    title = "Model attack"  # part of the seed
    subject = "an attacker's network"
    parts: tuple[int, ...] = BUDGET_PARTS

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored, truth = context.stored(level), context.unit(context.plain("private", "raw"))
        guess = context.mean_public("raw")
        show = example_images(context.private.pids)
        no_lpips = reason_against_lpips(*truth.shape[-2:])
        columns = {"raw": truth[show], "stored": context.unit(stored.observed[show])}
        points, trained = [], {}
        for part, budget in zip(
            self.parts, budgets(context.settings.budget, self.parts), strict=True
        ):
            trained[budget] = self._train(context, level, budget)
            recovered = context.bench.pictures(trained[budget].network, stored.observed)
            compared, people = (recovered, truth, guess), context.private
            measures = image_measures(*compared, people.pids, people.camids, context.seed)
            if not no_lpips:
                lpips = lpips_measure(*compared, people.pids, context.seed, context.bench.device)
                measures += (lpips,)
            points.append(CurvePoint(budget, (*measures, *_reid(context, recovered))))
            columns["all images" if part == 1 else f"1/{part} of them"] = recovered[show]
        columns["guess without the image"] = guess.expand_as(truth[show])
        last = points[-1].measures
        return context.outcome(
            self,
            level,
            _sentence(self.subject, last, context.settings.budget),
            columns=columns,
            measures=last,
            curve_of="public images the attacker trains on" if len(points) > 1 else "",
            curve=tuple(points) if len(points) > 1 else (),
            details={
                "updates": self.updates(context),
                "best_update": {str(k): v.best_step for k, v in trained.items()},
                "validation_psnr_db": {str(k): v.validation for k, v in trained.items()},
                **({"no_lpips": no_lpips} if no_lpips else {}),
            },
        )

    def make_network(self, context: AttackContext) -> Callable[[], nn.Module]:
        """Return the function that builds the attacker's network."""
        return context.factories.recovery

    def updates(self, context: AttackContext) -> int:
        """Return the number of updates of each network."""
        return context.bench.steps

    def _train(self, context: AttackContext, level: str, budget: int) -> Trained:
        title = f"{self.title} on {level}, {budget} images"
        return train_recovery(self.make_network(context), *_pairs(context, level, budget), title)


class RestorerAttack(ModelAttack):
    """Trains an image restorer instead of the U-Net, with all public images."""

    name = "model-restorer"
    question = "Can an image restorer reconstruct raw images?"
    title = "Restorer"
    parts = (1,)

    def make_network(self, context: AttackContext) -> Callable[[], nn.Module]:  # noqa: ARG002
        """See :class:`ModelAttack`."""
        return Restorer


class LinearAttack(ModelAttack):
    """Fits a linear regression from stored to raw images instead of a network."""

    name = "model-linear"
    question = "Can a linear regression reconstruct raw images?"
    subject = "a linear regression"
    parts = (1,)

    def updates(self, context: AttackContext) -> int:  # noqa: ARG002
        """Return 0: the regression has a closed form."""
        return 0

    def _train(self, context: AttackContext, level: str, budget: int) -> Trained:
        linear, penalty, psnr_db = fit_linear(*_pairs(context, level, budget))
        _LOGGER.info("Linear regression on %s: penalty %g, held-out PSNR %.2f dB", level, penalty,
                     psnr_db)  # fmt: skip
        return Trained(linear, best_step=0, validation=psnr_db)


def _pairs(
    context: AttackContext, level: str, budget: int
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor], tuple[Tensor, Tensor], TrainingSetup]:
    """Return what a network or regression learns from; see ``train_recovery``."""
    return (
        context.plain("public", level)[:budget],
        context.plain("public", "raw")[:budget],
        fresh_key_observer(level),
        (context.imitated("validation", level).observed, context.plain("validation", "raw")),
        context.bench,
    )


def budgets(total: int, parts: tuple[int, ...] = BUDGET_PARTS) -> list[int]:
    """Return the data budgets of the curve, ascending; the last one is ``total``."""
    least = min(total, _LEAST_IMAGES)
    return [max(least, total // part) for part in parts]


def _reid(context: AttackContext, recovered: Tensor) -> tuple[Measure, ...]:
    """Score recovered images (N, 3, H, W) as queries in a gallery of raw images."""
    network = context.public_reid()
    normalised = context.bench.pixels.normalize(recovered)
    queries = context.bench.embeddings(network, normalised)
    raw = context.bench.embeddings(network, context.plain("private", "raw"))
    query, gallery = context.sides(queries, raw)
    return link_measures(
        query, gallery, context.seed, cross_camera=context.cross_camera, prefix="recovered_"
    )


def _sentence(subject: str, measures: tuple[Measure, ...], budget: int) -> str:
    by_name = {measure.name: measure for measure in measures}
    own = "they do not reveal the identity"
    if reveals_own_identity(measures):
        gain = by_name["psnr_own_gain"].value.value
        own = f"they reveal the identity, by {gain:.2f} dB more than images of others"
    lpips = by_name.get("lpips")
    distance = f", LPIPS {lpips.value.value:.3f}" if lpips else ""
    return (
        f"Trained on {budget} public images, {subject} reconstructs private images at "
        f"{decibels(by_name['psnr'])}{distance}; {own}. A search with them ranks the right "
        f"identity first in {percent(by_name['recovered_rank1'])} of cases."
    )


class ReIDAttack(Attack):
    """Searches with embeddings of stored images.

    There are two searches: in stored images (tracking an identity), and in raw images (naming an
    identity). The measures of the second begin with ``to_raw_``.

    Args:
        name: See ``Attack``.
        question: See ``Attack``.
        subject: The network, as the sentence of a result calls it.
        network: Returns the network for a level.
        reason_on_raw: Why the attack does not apply to raw images; empty if it does.
    """

    def __init__(
        self,
        name: str,
        question: str,
        subject: str,
        network: Callable[[AttackContext, str], ReIDNetwork],
        reason_on_raw: str = "",
    ) -> None:
        self.name, self.question = name, question
        self._subject, self._network, self._reason_on_raw = subject, network, reason_on_raw

    def reason_against(self, level: str) -> str:
        """See ``Attack``."""
        return self._reason_on_raw if level == "raw" else ""

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        network, bench, raw = self._network(context, level), context.bench, None
        stored = bench.embeddings(network, context.stored(level).observed)
        if level != "raw":
            raw = bench.embeddings(network, context.plain("private", "raw"))
        measures = search_measures(context, stored, raw)
        by_name = {measure.name: measure for measure in measures}
        sentence = search_sentence(self._subject, by_name, level)
        if raw is not None:
            sentence += (
                f"; among raw images in {percent(by_name['to_raw_rank1'])} "
                f"(mAP {percent(by_name['to_raw_mAP'])})"
            )
        return context.outcome(self, level, f"{sentence}.", measures=measures)


REID_ATTACKS = (
    # On anonymized images this is the purpose of the method, so success there is not a defect.
    ReIDAttack(
        "reid-authorised",
        "Does the owner's network find identities without a key?",
        "The owner's network, without a key,",
        lambda context, _: context.reid,
    ),
    ReIDAttack(
        "reid-public",
        "Does a re-ID network trained on raw images find identities?",
        "A network trained on raw images of public identities",
        lambda context, _: context.public_reid(),
    ),
    # The network of reid-public after training on public images as stored at the level. If they are
    # encrypted, each public identity has one key of the attacker, as with the owner: a network may
    # learn to recognise a pad.
    ReIDAttack(
        "reid-tuned",
        "Does a network trained on images of this level find identities?",
        "A network trained on public images stored at the same level",
        AttackContext.tuned_reid,
        reason_on_raw="on raw images this is reid-public",
    ),
)

_WIDTH = 24  # channels of the restorer at the full size
_ENCODER = (1, 1, 2, 2)  # blocks at each scale; each scale halves the size and doubles the width
_MIDDLE = 2
_DECODER = (1, 1, 1, 1)


class Restorer(nn.Module):
    """An image restorer, which maps normalised images (B, 3, H, W) to images of the same size.

    A small NAFNet: residual blocks without activation functions at several scales, and a skip from
    the input to the output. Source: Chen et al., "Simple Baselines for Image Restoration", ECCV
    2022. Here the norm is a group norm with one group, which needs no reshaping.
    """

    def __init__(self) -> None:
        super().__init__()
        width = _WIDTH
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        for blocks in _ENCODER:
            self.encoder.append(_restorer_blocks(width, blocks))
            self.down.append(nn.Conv2d(width, 2 * width, 2, stride=2))
            width *= 2
        self.middle = _restorer_blocks(width, _MIDDLE)
        self.decoder, self.up = nn.ModuleList(), nn.ModuleList()
        for blocks in _DECODER:
            up = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.PixelShuffle(2))
            self.up.append(up)
            width //= 2
            self.decoder.append(_restorer_blocks(width, blocks))
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Restore images of any size."""
        height, width = image.shape[-2:]
        step = 2 ** len(_ENCODER)
        padded = F.pad(image, (0, -width % step, 0, -height % step), mode="replicate")
        features, skips = self.stem(padded), []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            skips.append(blocks(features))
            features = down(skips[-1])
        features = self.middle(features)
        for blocks, up in zip(self.decoder, self.up, strict=True):
            features = blocks(up(features) + skips.pop())
        restored: Tensor = padded + self.head(features)
        return restored[..., :height, :width]


class RestorerBlock(nn.Module):
    """A residual block: depthwise convolution with channel attention, then a gated 1 x 1 layer.

    The residual branches start at 0, so a new block is the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 2 * width, 1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            Gate(),
        )
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1))
        self.project = nn.Conv2d(width, width, 1)
        self.feed = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 2 * width, 1),
            Gate(),
            nn.Conv2d(width, width, 1),
        )
        self.scale = nn.Parameter(torch.zeros(2, width, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, width, H, W) to the same shape."""
        mixed = self.mix(features)
        features = features + self.scale[0] * self.project(mixed * self.attention(mixed))
        out: Tensor = features + self.scale[1] * self.feed(features)
        return out


class Gate(nn.Module):
    """Multiplies the two halves of the channels."""

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, 2 C, H, W) to (B, C, H, W)."""
        left, right = features.chunk(2, 1)
        return left * right


def _restorer_blocks(width: int, number: int) -> nn.Sequential:
    return nn.Sequential(*(RestorerBlock(width) for _ in range(number)))


# Ridge penalties that are tried, as multiples of the mean variance of a principal component.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_NEGLIGIBLE = 1e-10  # variance of a component, as a share of the largest
_BLOCK = 4096  # pixels that are converted to float64 together


class LinearMap(nn.Module):
    """Maps stored images (B, 3, H, W) to raw images: ridge regression on all pixels.

    It has a closed form, so it takes seconds, and neither learning rate nor length must be chosen.
    A network that reconstructs worse than this was trained too little. Computed on the principal
    components of the stored images, so that memory grows with the number of images N and not with
    the square of the pixels.
    """

    def __init__(self, stored: Tensor, raw: Tensor) -> None:
        super().__init__()
        center, mean = stored.mean(0), raw.mean(0)
        rows, targets = (stored - center).flatten(1), (raw - mean).flatten(1)
        blocks = (block.double() for block in rows.split(_BLOCK, dim=1))
        gram = sum((block @ block.T for block in blocks), torch.zeros((), dtype=torch.float64))
        variances, vectors = torch.linalg.eigh(gram)
        used = variances > _NEGLIGIBLE * variances.max()
        variances, vectors = variances[used], vectors[:, used]
        self.center, self.mean = nn.Buffer(center), nn.Buffer(mean)
        self.components = nn.Buffer(_product(vectors / variances.sqrt(), rows))
        self.targets = nn.Buffer(_product(vectors, targets))
        self.variances = nn.Buffer(variances)
        self.gains = nn.Buffer(torch.empty(len(variances)))
        self.set_penalty(PENALTIES[0])

    def set_penalty(self, penalty: float) -> None:
        """Set the ridge penalty, a multiple of the mean variance of a component."""
        shrunk = self.variances + penalty * self.variances.mean()
        self.gains.copy_(self.variances.sqrt() / shrunk)

    def forward(self, image: Tensor) -> Tensor:
        """Return the estimate of the raw images, in float32 also under autocast."""
        with full_precision(image):
            scores = (image.float() - self.center).flatten(1) @ self.components.T
            return ((scores * self.gains) @ self.targets).view_as(image) + self.mean


def fit_linear(
    plain: Tensor,
    raw: Tensor,
    observe: Callable[[Tensor], Tensor],
    validation: tuple[Tensor, Tensor],
    bench: TrainingSetup,
) -> tuple[LinearMap, float, float]:
    """Return the map with the best penalty on held-out identities, its penalty and PSNR (dB).

    The arguments are those of ``train_recovery``; mirrored images are added.
    """
    plain, raw = (torch.cat([images, images.flip(-1)]) for images in (plain, raw))
    linear = LinearMap(observe(plain), raw).to(bench.device)
    truth = bench.pixels.denormalize(validation[1])
    scores = {}
    for penalty in PENALTIES:
        linear.set_penalty(penalty)
        estimate = bench.pictures(linear, validation[0])
        scores[penalty] = float(quality(truth, estimate)[0].mean())
    best = max(scores, key=scores.__getitem__)
    linear.set_penalty(best)
    return linear.eval(), best, scores[best]


def _product(vectors: Tensor, rows: Tensor) -> Tensor:
    """Return vectors^T rows as float32, computed in float64."""
    blocks = [(vectors.T @ block.double()).float() for block in rows.split(_BLOCK, dim=1)]
    return torch.cat(blocks, dim=1)
