"""Model attack: whoever has the public anonymizer can train a network that undoes it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from engine.attacks.base import Outcome, decibels, percent, shown, shows_own
from engine.attacks.context import AttackContext
from engine.attacks.levels import fresh_observer
from engine.attacks.links import link_measures
from engine.attacks.results import Measure, Point
from engine.attacks.statistics import image_measures
from engine.attacks.training import Trained, train_recovery

BUDGET_PARTS = (16, 4, 1)
_LEAST_IMAGES = 8


class ModelAttack:
    """Trains recovery networks on public pairs (stored, raw), for several data budgets.

    Encrypted levels are imitated under a new key of the attacker's own for every image and epoch,
    so that the network learns the scheme and not a key. Scored on private persons.
    """

    name: ClassVar[str] = "model"
    question: ClassVar[str] = "Can a network trained on public people draw the photographs?"

    def reason_against(self, level: str) -> str:  # noqa: ARG002
        """See ``Attack``: it applies everywhere; on raw images it is the control."""
        return ""

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored, truth = context.stored(level), context.unit(context.plain("private", "raw"))
        guess = context.mean_public("raw")
        show = shown(context.private.pids)
        columns = {"raw": truth[show], "stored": context.unit(stored.observed[show])}
        points, trained = [], {}
        for part, budget in zip(BUDGET_PARTS, budgets(context.settings.budget), strict=True):
            trained[budget] = self._train(context, level, budget)
            pictures = context.bench.pictures(trained[budget].network, stored.observed)
            measures = image_measures(pictures, truth, guess, context.private.pids, context.seed)
            points.append(Point(budget, (*measures, *_reid(context, pictures))))
            columns["all images" if part == 1 else f"1/{part} of them"] = pictures[show]
        columns["blind guess"] = guess.expand_as(truth[show])
        last = points[-1].measures
        result = context.result(
            self.name,
            level,
            _sentence(last, context.settings.budget),
            measures=last,
            curve_of="public images the attacker trains on",
            curve=tuple(points),
            details={
                "updates": context.bench.steps,
                "best_update": {str(k): v.best_step for k, v in trained.items()},
                "validation_psnr_db": {str(k): v.validation for k, v in trained.items()},
            },
        )
        return Outcome(result, columns)

    def _train(self, context: AttackContext, level: str, budget: int) -> Trained:
        return train_recovery(
            context.makers.recovery,
            context.plain("public", level)[:budget],
            context.plain("public", "raw")[:budget],
            fresh_observer(level),
            (context.imitated("validation", level).observed, context.plain("validation", "raw")),
            context.bench,
            f"Model attack on {level}, {budget} images",
        )


def budgets(most: int) -> list[int]:
    """Return the data budgets of the curve, ascending; the last is the whole one."""
    least = min(most, _LEAST_IMAGES)
    return [max(least, most // part) for part in BUDGET_PARTS]


def _reid(context: AttackContext, pictures: Tensor) -> tuple[Measure, ...]:
    """Look with the recovered pictures for the persons among raw photographs."""
    network = context.public_reid()
    normalised = context.protector.pixels.normalize(pictures)
    recovered = context.bench.embeddings(network, normalised)
    raw = context.bench.embeddings(network, context.plain("private", "raw"))
    query, gallery = context.sides(recovered, raw)
    return link_measures(
        query, gallery, context.seed, cross_camera=context.cross_camera, prefix="recovered_"
    )


def _sentence(measures: tuple[Measure, ...], budget: int) -> str:
    by_name = {measure.name: measure for measure in measures}
    own = (
        "they show the very person, closer than pictures of others by "
        f"{by_name['psnr_own_gain'].value.value:.2f} dB"
        if shows_own(measures)
        else "they show nobody in particular"
    )
    return (
        f"Trained on {budget} public pictures, an attacker's network draws photographs of "
        f"strangers at {decibels(by_name['psnr'])}; {own}, and a search with them finds the "
        f"person first in {percent(by_name['recovered_rank1'])} of cases."
    )
