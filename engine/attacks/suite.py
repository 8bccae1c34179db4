"""All attacks by name, a run of them in a folder, and the report of their verdicts."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.attacks.attack import Attack, AttackContext, Outcome
from engine.attacks.brute_force import KeyBruteForce
from engine.attacks.build import Plan
from engine.attacks.charts import curve_chart, image_sheet, verdict_chart
from engine.attacks.foreign import PREFIX, ForeignReID
from engine.attacks.key_reuse import Averaging, Denoisers, Difference, KnownPlaintext
from engine.attacks.linkage import MetadataLinkage, NoisePrintLinkage
from engine.attacks.measures import FAILS, SETTINGS_NAME, Result
from engine.attacks.network_attacks import (
    REID_ATTACKS,
    LinearAttack,
    ModelAttack,
    RestorerAttack,
)
from engine.attacks.tampering import Malleability, StorageRoundTrip, WrongKey
from engine.report import RESULTS_NAME
from engine.views import save_image
from utils.errors import UserError
from utils.files import ensure_folder, write_text
from utils.logger import get_logger

_ALL: tuple[Attack, ...] = (
    NoisePrintLinkage(),
    KeyBruteForce(),
    KnownPlaintext(),
    Averaging(),
    Difference(),
    Denoisers(),
    WrongKey(),
    Malleability(),
    StorageRoundTrip(),
    MetadataLinkage(),
    *REID_ATTACKS,
    ModelAttack(),
    RestorerAttack(),
    LinearAttack(),
)
ATTACKS: dict[str, Attack] = {attack.name: attack for attack in _ALL}


def chosen_attacks(names: Sequence[str], foreign: Sequence[Attack] = ()) -> list[Attack]:
    """Return attacks by name, in the order of ``ATTACKS``; all without names.

    Raises:
        UserError: A name is unknown; the message contains the most similar one.
    """
    known = ATTACKS | {attack.name: attack for attack in foreign}
    return [known[name] for name in chosen_names(names, list(known), "attack")]


def chosen_names(names: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """Return the known names that are in ``names``, in their order; all without names.

    Raises:
        UserError: A name is unknown; the message contains the most similar one.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, 1, 0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown {what} {name!r}; expected one of {', '.join(known)}{hint}")
    return [name for name in known if name in names or not names]


VERDICTS_NAME = "verdicts.json"

# With a badly trained attack, or too few identities, every level holds.
_NO_LEVEL_FAILED = (
    "  No level failed, so this run does not show that the attack works, and its verdicts mean "
    "little. Run it on raw and additive too, with more --budget, --epochs or --people."
)

Verdicts = dict[str, dict[str, str]]


def verdicts_of(results: Sequence[Result]) -> Verdicts:
    """Return verdicts by attack and level, the content of ``verdicts.json``."""
    verdicts: Verdicts = {}
    for result in results:
        verdicts.setdefault(result.attack, {})[result.level] = result.verdict
    return verdicts


def read_expectation(path: Path) -> Verdicts:
    """Return expected verdicts from a file such as ``verdicts.json``.

    Raises:
        UserError: The file is missing or has another form.
    """
    try:
        content: Verdicts = json.loads(path.read_text(encoding="utf-8"))
        is_table = all(isinstance(v, str) for row in content.values() for v in row.values())
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; expected a {VERDICTS_NAME} that a run has written"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    except AttributeError:  # not a table of tables
        is_table = False
    if not is_table:
        raise UserError(
            f"{path} is not a table of verdicts; expected {{attack: {{level: verdict}}}}"
        )
    return content


def unexpected_verdicts(verdicts: Verdicts, expected: Verdicts) -> list[str]:
    """Return a line for each verdict that differs from the expected one.

    Attacks and levels that were not run are not compared. If nothing can be compared, one line
    states that.
    """
    compared = [
        (f"{attack} on {level}", verdicts[attack][level], verdict)
        for attack, row in expected.items()
        for level, verdict in row.items()
        if level in verdicts.get(attack, {})
    ]
    if not compared:
        return ["the expected verdicts contain no attack and level of this run"]
    return [f"{cell}: {got}, expected {want}" for cell, got, want in compared if got != want]


def report(results: Sequence[Result]) -> str:
    """Return a table of verdicts and a sentence for each result."""
    levels = list(dict.fromkeys(result.level for result in results))
    attacks = list(dict.fromkeys(result.attack for result in results))
    by_cell = {(result.attack, result.level): result for result in results}
    width = max((len(name) for name in attacks), default=6) + 2
    lines = [f"{'attack':<{width}}" + "".join(f"{level:>15}" for level in levels)]
    for attack in attacks:
        present = [by_cell[attack, level] for level in levels if (attack, level) in by_cell]
        verdicts = {result.level: result.verdict for result in present if result.applies}
        cells = (f"{verdicts.get(level, '-'):>15}" for level in levels)
        lines.append(f"{attack:<{width}}" + "".join(cells))
    lines += ["", "holds: the attack reached no more than chance; -: the attack does not apply"]
    for attack in attacks:
        lines += ["", attack]
        reasons: dict[str, list[str]] = {}
        present = [by_cell[attack, level] for level in levels if (attack, level) in by_cell]
        for result in present:
            if result.applies:
                lines.append(f"  {result.level}: {result.verdict}. {result.sentence}")
            else:
                reasons.setdefault(result.sentence, []).append(result.level)
        for reason, without in reasons.items():
            lines.append(f"  {', '.join(without)}: not applicable: {reason}.")
        if not any(result.verdict == FAILS for result in present):
            lines.append(_NO_LEVEL_FAILED)
    return "\n".join(lines)


_LOGGER = get_logger()

TABLE_NAME = "table.txt"


class Suite:
    """A run of attacks in one folder.

    Each finished attack has its own file, so an interrupted run continues with the first attack
    without one. A folder belongs to one checkpoint and one set of settings.

    Args:
        folder: Folder of the results.
        plan: The attacked model and data. The context is built once, and only if an attack is not
            finished.

    Raises:
        UserError: The folder contains results of another checkpoint or other settings.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self._plan = plan
        self._context: AttackContext | None = None
        # everything that the numbers depend on, as read from JSON
        self.record: dict[str, Any] = json.loads(json.dumps(plan.record))
        path = folder / SETTINGS_NAME
        if path.is_file():
            _check_same(path, self.record)
        else:
            _write_json(path, self.record)

    def run(self, attacks: Sequence[Attack]) -> list[Result]:
        """Run attacks on all levels; write everything and return their results."""
        self.work(attacks)
        return self.finish(attacks)

    def work(self, attacks: Sequence[Attack]) -> None:
        """Run the attacks that are not finished; each writes its own files.

        Several processes may share a folder if they run different attacks.
        """
        for number, attack in enumerate(attacks, 1):
            finished = self._read(attack.name)
            if finished is not None:
                if isinstance(attack, ForeignReID) and any(
                    result.details.get("sha256") != attack.sha256 for result in finished[0]
                ):
                    raise UserError(
                        f"{self._path(attack.name)} contains results of another network with this "
                        "name; rename the card, or choose another --output"
                    )
                _LOGGER.info("%d/%d %s: already finished", number, len(attacks), attack.name)
                continue
            _LOGGER.info("%d/%d %s: %s", number, len(attacks), attack.name, attack.question)
            self._attack(attack)

    def finish(self, attacks: Sequence[Attack]) -> list[Result]:
        """Return the results of finished attacks.

        Writes ``results.json``, ``verdicts.json`` and ``table.txt`` about all finished attacks.
        """
        finished = self._finished()
        results = [result for results, _ in finished.values() for result in results]
        content = {
            "settings": self.record,
            "versions": self.versions(),
            "results": [result.to_json() for result in results],
        }
        _write_json(self.folder / RESULTS_NAME, content)
        _write_json(self.folder / VERDICTS_NAME, verdicts_of(results))
        write_text(self.folder / TABLE_NAME, report(results) + "\n")
        chosen = [finished[attack.name] for attack in attacks if attack.name in finished]
        return [result for results, _ in chosen for result in results]

    def versions(self) -> dict[str, dict[str, str]]:
        """Return versions of software and machine by the name of each finished attack."""
        return {name: versions for name, (_, versions) in self._finished().items()}

    @property
    def context(self) -> AttackContext:
        """The context of all attacks, built on first use."""
        if self._context is None:
            self._context = self._plan.make_context(ensure_folder(self.folder / "attackers"))
        return self._context

    def _attack(self, attack: Attack) -> None:
        outcomes: dict[str, Outcome] = {}
        start = time.monotonic()
        for level in self._plan.settings.levels:
            reason = attack.reason_against(level)
            if reason:
                outcomes[level] = Outcome(Result(attack.name, level, reason, applies=False))
                continue
            outcomes[level] = attack.run(self.context, level)
            result = outcomes[level].result
            _LOGGER.info("%s on %s: %s. %s", attack.name, level, result.verdict, result.sentence)
        results = [outcome.result for outcome in outcomes.values()]
        if any(result.applies for result in results):
            self._draw(attack, outcomes, results)
        # Written last: this file marks the attack as finished.
        _write_json(
            self._path(attack.name),
            {
                "attack": attack.name,
                "question": attack.question,
                "seconds": round(time.monotonic() - start, 1),
                "versions": self._plan.versions,
                "results": [result.to_json() for result in results],
            },
        )

    def _draw(
        self, attack: Attack, outcomes: Mapping[str, Outcome], results: Sequence[Result]
    ) -> None:
        title = f"{attack.name}: {attack.question}"
        columns = {level: outcome.columns for level, outcome in outcomes.items()}
        images = {
            "": verdict_chart(results, title),
            "_curve": curve_chart(results, title),
            "_images": image_sheet(columns, self.context.bench.pixels),
        }
        for suffix, image in images.items():
            if image is not None:
                save_image(image, self.folder / f"{attack.name}{suffix}.png")

    def _finished(self) -> dict[str, tuple[list[Result], dict[str, str]]]:
        """Return results and versions of all finished attacks, also of earlier calls, by name."""
        names = [*ATTACKS, *sorted(path.stem for path in self.folder.glob(f"{PREFIX}*.json"))]
        return {name: content for name in names if (content := self._read(name)) is not None}

    def _read(self, name: str) -> tuple[list[Result], dict[str, str]] | None:
        """Return results and versions of an attack; None if it is not finished."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            results = [Result.from_json(item) for item in content["results"]]
            return results, dict(content["versions"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({error}); delete it to run the attack again"
            ) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _check_same(path: Path, now: Mapping[str, Any]) -> None:
    try:
        was = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); choose another --output") from error
    if was.get("format") != now["format"]:
        raise UserError(
            f"{path.parent} contains attacks of another version of this program, whose numbers may "
            "differ; choose another --output"
        )
    differing = [
        f"{name} {was.get(name)!r} (now {now.get(name)!r})"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"{path.parent} contains attacks with {', '.join(differing)}; choose another --output, "
            "or give the same values to continue"
        )


def _write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")
