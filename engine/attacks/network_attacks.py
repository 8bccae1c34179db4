"""Attacks with networks: recovery of images, and re-identification of stored images."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from engine.attacks.attack import Outcome, decibels, example_images, percent, reveals_own_identity
from engine.attacks.context import AttackContext
from engine.attacks.levels import fresh_key_observer
from engine.attacks.linear import fit_linear
from engine.attacks.linkage import link_measures, search_measures, search_sentence
from engine.attacks.measures import CurvePoint, Measure, image_measures
from engine.attacks.perceptual import lpips_measure, reason_against_lpips
from engine.attacks.restorer import Restorer
from engine.attacks.training import Trained, train_recovery
from modeling.reid_network import ReIDNetwork
from utils.logger import get_logger

_LOGGER = get_logger()
BUDGET_PARTS = (16, 4, 1)
_LEAST_IMAGES = 8


class ModelAttack:
    """Trains recovery networks on public pairs (stored, raw), for several data budgets.

    At encrypted levels, every image and epoch has a new key of the attacker, so that the network
    learns the scheme and not a key. Scores are on private identities.
    """

    name: ClassVar[str] = "model"
    question: ClassVar[str] = "Can a network trained on public images reconstruct raw images?"
    title: ClassVar[str] = "Model attack"  # part of the seed
    subject: ClassVar[str] = "an attacker's network"
    parts: ClassVar[tuple[int, ...]] = BUDGET_PARTS

    def reason_against(self, level: str) -> str:  # noqa: ARG002
        """See ``Attack``: applies to all levels; raw is the control."""
        return ""

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
            compared = (recovered, truth, guess, context.private.pids, context.seed)
            measures = image_measures(*compared)
            if not no_lpips:
                measures += (lpips_measure(*compared, context.bench.device),)
            points.append(CurvePoint(budget, (*measures, *_reid(context, recovered))))
            columns["all images" if part == 1 else f"1/{part} of them"] = recovered[show]
        columns["guess without the image"] = guess.expand_as(truth[show])
        last = points[-1].measures
        result = context.result(
            self.name,
            level,
            _sentence(self.subject, last, context.settings.budget),
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
        return Outcome(result, columns)

    def make_network(self, context: AttackContext) -> Callable[[], nn.Module]:
        """Return the function that builds the attacker's network."""
        return context.factories.recovery

    def updates(self, context: AttackContext) -> int:
        """Return the number of updates of each network."""
        return context.bench.steps

    def _train(self, context: AttackContext, level: str, budget: int) -> Trained:
        return train_recovery(
            self.make_network(context),
            context.plain("public", level)[:budget],
            context.plain("public", "raw")[:budget],
            fresh_key_observer(level),
            (context.imitated("validation", level).observed, context.plain("validation", "raw")),
            context.bench,
            f"{self.title} on {level}, {budget} images",
        )


class RestorerAttack(ModelAttack):
    """Trains an image restorer instead of the U-Net, with all public images."""

    name: ClassVar[str] = "model-restorer"
    question: ClassVar[str] = "Can an image restorer reconstruct raw images?"
    title: ClassVar[str] = "Restorer"
    parts: ClassVar[tuple[int, ...]] = (1,)

    def make_network(self, context: AttackContext) -> Callable[[], nn.Module]:  # noqa: ARG002
        """See :class:`ModelAttack`."""
        return Restorer


class LinearAttack(ModelAttack):
    """Fits a linear regression from stored to raw images instead of a network."""

    name: ClassVar[str] = "model-linear"
    question: ClassVar[str] = "Can a linear regression reconstruct raw images?"
    subject: ClassVar[str] = "a linear regression"
    parts: ClassVar[tuple[int, ...]] = (1,)

    def updates(self, context: AttackContext) -> int:  # noqa: ARG002
        """Return 0: the regression has a closed form."""
        return 0

    def _train(self, context: AttackContext, level: str, budget: int) -> Trained:
        linear, penalty, psnr_db = fit_linear(
            context.plain("public", level)[:budget],
            context.plain("public", "raw")[:budget],
            fresh_key_observer(level),
            (context.imitated("validation", level).observed, context.plain("validation", "raw")),
            context.bench,
        )
        _LOGGER.info("Linear regression on %s: penalty %g, held-out PSNR %.2f dB", level, penalty,
                     psnr_db)  # fmt: skip
        return Trained(linear, best_step=0, validation=psnr_db)


def budgets(total: int, parts: tuple[int, ...] = BUDGET_PARTS) -> list[int]:
    """Return the data budgets of the curve, ascending; the last one is ``total``."""
    least = min(total, _LEAST_IMAGES)
    return [max(least, total // part) for part in parts]


def _reid(context: AttackContext, recovered: Tensor) -> tuple[Measure, ...]:
    """Score recovered images (N, 3, H, W) as queries in a gallery of raw images."""
    network = context.public_reid()
    normalised = context.protector.pixels.normalize(recovered)
    queries = context.bench.embeddings(network, normalised)
    raw = context.bench.embeddings(network, context.plain("private", "raw"))
    query, gallery = context.sides(queries, raw)
    return link_measures(
        query, gallery, context.seed, cross_camera=context.cross_camera, prefix="recovered_"
    )


def _sentence(subject: str, measures: tuple[Measure, ...], budget: int) -> str:
    by_name = {measure.name: measure for measure in measures}
    own = (
        "they reveal the identity, by "
        f"{by_name['psnr_own_gain'].value.value:.2f} dB more than images of others"
        if reveals_own_identity(measures)
        else "they do not reveal the identity"
    )
    lpips = by_name.get("lpips")
    distance = f", LPIPS {lpips.value.value:.3f}" if lpips else ""
    return (
        f"Trained on {budget} public images, {subject} reconstructs private images at "
        f"{decibels(by_name['psnr'])}{distance}; {own}. A search with them ranks the right "
        f"identity first in {percent(by_name['recovered_rank1'])} of cases."
    )


class _ReIDAttack:
    """Searches with embeddings of stored images.

    There are two searches: in stored images (tracking an identity), and in raw images (naming an
    identity). The measures of the second begin with ``to_raw_``.
    """

    name: ClassVar[str]
    subject: ClassVar[str]

    def reason_against(self, level: str) -> str:  # noqa: ARG002
        """See ``Attack``: applies to all levels; raw is the control."""
        return ""

    def network(self, context: AttackContext, level: str) -> ReIDNetwork:
        """Return the network for a level."""
        raise NotImplementedError

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        network, bench = self.network(context, level), context.bench
        stored = bench.embeddings(network, context.stored(level).observed)
        raw = None
        if level != "raw":
            raw = bench.embeddings(network, context.plain("private", "raw"))
        measures = search_measures(context, stored, raw)
        sentence = self._sentence({measure.name: measure for measure in measures}, level)
        return Outcome(context.result(self.name, level, sentence, measures=measures))

    def _sentence(self, measures: dict[str, Measure], level: str) -> str:
        text = search_sentence(self.subject, measures, level)
        if "to_raw_rank1" in measures:
            text += (
                f"; among raw images in {percent(measures['to_raw_rank1'])} "
                f"(mAP {percent(measures['to_raw_mAP'])})"
            )
        return text + "."


class PublicReID(_ReIDAttack):
    """Uses a network that was trained on raw images of public identities only."""

    name: ClassVar[str] = "reid-public"
    question: ClassVar[str] = "Does a re-ID network trained on raw images find identities?"
    subject: ClassVar[str] = "A network trained on raw images of public identities"

    def network(self, context: AttackContext, level: str) -> ReIDNetwork:  # noqa: ARG002
        """See :class:`_ReIDAttack`."""
        return context.public_reid()


class TunedReID(_ReIDAttack):
    """Uses that network after training on public images as stored at the level.

    At encrypted levels each public identity has one key of the attacker, as with the owner: a
    network may learn to recognise a pad.
    """

    name: ClassVar[str] = "reid-tuned"
    question: ClassVar[str] = "Does a network trained on images of this level find identities?"
    subject: ClassVar[str] = "A network trained on public images stored at the same level"

    def reason_against(self, level: str) -> str:
        """See ``Attack``."""
        return "on raw images this is reid-public" * (level == "raw")

    def network(self, context: AttackContext, level: str) -> ReIDNetwork:
        """See :class:`_ReIDAttack`."""
        return context.tuned_reid(level)


class AuthorisedReID(_ReIDAttack):
    """Uses the owner's network on stored images, without a key.

    On anonymized images this is the purpose of the method, so success there is not a defect.
    """

    name: ClassVar[str] = "reid-authorised"
    question: ClassVar[str] = "Does the owner's network find identities without a key?"
    subject: ClassVar[str] = "The owner's network, without a key,"

    def network(self, context: AttackContext, level: str) -> ReIDNetwork:  # noqa: ARG002
        """See :class:`_ReIDAttack`."""
        return context.reid
