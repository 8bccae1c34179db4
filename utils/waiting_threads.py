"""How long threads of an operation wait in vain for each other."""

from __future__ import annotations

from collections.abc import MutableMapping

# Rounds of an empty loop, some tenths of a millisecond: longer than the threads of one operation
# are apart when each has a core of its own, and a tenth of a scheduler's turn.
_ROUNDS = "5000"


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let a thread that waits for another one sleep soon; a user's own settings are kept.

    PyTorch splits an operation among threads of GNU OpenMP, and those that are done spin until
    the last one is, by default for 300,000 rounds, which are milliseconds. Where other programs
    want the cores too, the spinning uses up the time that the last thread was to get: a training
    beside a busy program then loses most of its speed, not half (docs/PERFORMANCE.md). Alone on
    its cores a program is as fast either way.

    It is read when the library is loaded, with torch, and by child processes.

    Args:
        environment: os.environ, before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _ROUNDS)
