"""Re-ID attacks: who finds whom among stored images without opening any."""

from __future__ import annotations

from typing import Any, ClassVar

from engine.attacks.base import Outcome, percent
from engine.attacks.context import AttackContext
from engine.attacks.levels import CLEAR_LEVELS
from engine.attacks.links import link_measures
from engine.attacks.results import Measure
from modeling.reid_network import ReIDNetwork


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
