"""Model attack: whoever has the public anonymizer can train a network that undoes it.

Re-ID attacks: who finds whom among stored images without opening any.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from engine.attacks.attack import Outcome, decibels, percent, shown, shows_own
from engine.attacks.context import AttackContext
from engine.attacks.levels import CLEAR_LEVELS, fresh_observer
from engine.attacks.linkage import link_measures
from engine.attacks.measures import Measure, Point, image_measures
from engine.attacks.training import Trained, train_recovery
from modeling.reid_network import ReIDNetwork

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


class _ReIDAttack:
    """Embeds what an outsider sees with some network and searches with it.

    Two searches: stored images among stored images (tracking a person), and stored images among raw
    photographs (naming a person); the measures of the second begin with ``to_raw_``.
    """

    name: ClassVar[str]
    who: ClassVar[str]

    def reason_against(self, level: str) -> str:  # noqa: ARG002
        """See ``Attack``: it applies everywhere; on raw images it is the control."""
        return ""

    def network(self, context: AttackContext, level: str) -> ReIDNetwork:
        """Return the network that is used on a level."""
        raise NotImplementedError

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        network, bench = self.network(context, level), context.bench
        seen = bench.embeddings(network, context.stored(level).observed)
        options: dict[str, Any] = {"seed": context.seed, "cross_camera": context.cross_camera}
        measures: tuple[Measure, ...] = link_measures(*context.sides(seen, seen), **options)
        if level != "raw":
            raw = bench.embeddings(network, context.plain("private", "raw"))
            measures += link_measures(*context.sides(seen, raw), prefix="to_raw_", **options)
        sentence = self._sentence({measure.name: measure for measure in measures}, level)
        return Outcome(context.result(self.name, level, sentence, measures=measures))

    def _sentence(self, measures: dict[str, Measure], level: str) -> str:
        stored = "ciphertexts" if level not in CLEAR_LEVELS else f"{level} pictures"
        text = (
            f"{self.who} finds the same person first among {stored} in "
            f"{percent(measures['rank1'])} of cases, with a mean average precision of "
            f"{percent(measures['mAP'])}"
        )
        if "to_raw_rank1" in measures:
            text += (
                f"; among raw photographs in {percent(measures['to_raw_rank1'])}, with "
                f"{percent(measures['to_raw_mAP'])}"
            )
        return text + "."


class PublicReID(_ReIDAttack):
    """A network that only ever saw raw images of public persons."""

    name: ClassVar[str] = "reid-public"
    question: ClassVar[str] = "Does an ordinary re-ID network, made for photographs, find people?"
    who: ClassVar[str] = "A network that only ever saw photographs of public people"

    def network(self, context: AttackContext, level: str) -> ReIDNetwork:  # noqa: ARG002
        """See :class:`_ReIDAttack`."""
        return context.public_reid()


class TunedReID(_ReIDAttack):
    """The same after training on public images as the level stores them.

    For encrypted levels each public person has a key of the attacker's own, as the owner does it:
    a network may learn to know a pad again.
    """

    name: ClassVar[str] = "reid-tuned"
    question: ClassVar[str] = "Does a network trained on such stored images find people?"
    who: ClassVar[str] = "A network trained on public people's pictures stored in the same way"

    def reason_against(self, level: str) -> str:
        """See ``Attack``."""
        return "on raw images this is reid-public: the network has seen nothing else" * (
            level == "raw"
        )

    def network(self, context: AttackContext, level: str) -> ReIDNetwork:
        """See :class:`_ReIDAttack`."""
        return context.tuned_reid(level)


class AuthorisedReID(_ReIDAttack):
    """The owner's network on what is stored, without a key.

    On anonymized images that is the very use of the method, and finding people there is no defect.
    """

    name: ClassVar[str] = "reid-authorised"
    question: ClassVar[str] = "Does the owner's network find people without a key?"
    who: ClassVar[str] = "The owner's own network, without a key,"

    def network(self, context: AttackContext, level: str) -> ReIDNetwork:  # noqa: ARG002
        """See :class:`_ReIDAttack`."""
        return context.reid
