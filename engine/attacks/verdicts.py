"""What came out: verdicts by attack and level, beside those expected, and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from engine.attacks.results import FAILS, NOT_APPLICABLE, Result
from utils.errors import UserError

VERDICTS_NAME = "verdicts.json"

# An attack that is badly trained, or has too few persons to be seen to work, holds everywhere.
_UNPROVEN = (
    "  No level failed: this run does not show that the attack works, and until it does, holding "
    "says nothing. Run it on raw and additive too, with more --budget, --epochs or --people."
)

Verdicts = dict[str, dict[str, str]]


def verdicts_of(results: Sequence[Result]) -> Verdicts:
    """Return verdicts by attack and level: the form that an expectation has."""
    verdicts: Verdicts = {}
    for result in results:
        verdicts.setdefault(result.attack, {})[result.level] = result.verdict
    return verdicts


def read_expectation(path: Path) -> Verdicts:
    """Read verdicts that are expected, in the form of ``verdicts.json``.

    Raises:
        UserError: The file is missing or of another form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; expected verdicts such as a run writes to {VERDICTS_NAME}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    is_table = isinstance(content, dict) and all(
        isinstance(row, dict) and all(isinstance(v, str) for v in row.values())
        for row in content.values()
    )
    if not is_table:
        raise UserError(f"{path} is no table of verdicts; expected {{attack: {{level: verdict}}}}")
    return content


def differences(found: Verdicts, expected: Verdicts) -> list[str]:
    """Say in which of the expected verdicts a run differs.

    Attacks and levels that were not run are not compared; an expectation that shares nothing with
    the run is a difference.
    """
    compared, lines = 0, []
    for attack, row in expected.items():
        for level, verdict in row.items():
            got = found.get(attack, {}).get(level)
            if got is None:
                continue
            compared += 1
            if got != verdict:
                lines.append(f"{attack} on {level}: {got}, expected {verdict}")
    if not compared:
        lines.append("the expectation has no attack and level of this run")
    return lines


def report(results: Sequence[Result]) -> str:
    """Return a table of verdicts and a sentence for each result."""
    levels = list(dict.fromkeys(result.level for result in results))
    attacks = list(dict.fromkeys(result.attack for result in results))
    by_place = {(result.attack, result.level): result for result in results}
    width = max((len(name) for name in attacks), default=6) + 2
    lines = [f"{'attack':<{width}}" + "".join(f"{level:>15}" for level in levels)]
    for attack in attacks:
        cells = [_cell(by_place.get((attack, level))) for level in levels]
        lines.append(f"{attack:<{width}}" + "".join(f"{cell:>15}" for cell in cells))
    lines += [
        "",
        "holds: what the attack reached lies within what luck reaches; - : no such attack",
    ]
    for attack in attacks:
        lines += ["", attack]
        reasons: dict[str, list[str]] = {}
        for level in levels:
            result = by_place.get((attack, level))
            if result is not None and result.applies:
                lines.append(f"  {level}: {result.verdict}. {result.sentence}")
            elif result is not None:
                reasons.setdefault(result.sentence, []).append(level)
        for reason, without in reasons.items():
            lines.append(f"  {', '.join(without)}: not applicable: {reason}.")
        found = [by_place[attack, level] for level in levels if (attack, level) in by_place]
        if not any(result.verdict == FAILS for result in found):
            lines.append(_UNPROVEN)
    return "\n".join(lines)


def _cell(result: Result | None) -> str:
    if result is None or result.verdict == NOT_APPLICABLE:
        return "-"
    return result.verdict
