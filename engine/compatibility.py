"""Whether a checkpoint belongs to the run or the evaluation that reads it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def differences(
    was: Mapping[str, Any], now: Mapping[str, Any], leave_out: Collection[str] = ()
) -> list[str]:
    """Say which values of a checkpoint are others now; what it does not record is left out."""
    return [
        f"{name} {was[name]!r} (now {now[name]!r})"
        for name in now
        if name in was and name not in leave_out and was[name] != now[name]
    ]


def run_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in what a training differs from the one that a checkpoint is of.

    Going on with other images or people would look like one training and be neither; a learning
    rate or a number of epochs may change on the way.

    Args:
        was: What the native checkpoint says of itself (``engine.model.model_info``).
        now: The same of the run that would go on.
    """
    found = differences(was.get("architecture", {}), now.get("architecture", {}))
    found += [
        f"INPUT.{text}" for text in differences(*(_desensitizer(info) for info in (was, now)))
    ]
    before, after = (info.get("pid_of_label") for info in (was, now))
    if before is not None and after is not None and before != after:
        found.append(
            f"{len(before)} identities of {was.get('dataset')} "
            f"(now {len(after)} others, of {now.get('dataset')})"
        )
    return found


def _desensitizer(info: Mapping[str, Any]) -> dict[str, Any]:
    return {name.upper(): value for name, value in info.get("desensitizer", {}).items()}
