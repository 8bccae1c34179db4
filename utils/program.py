"""Settings that must be made before any other package is imported; every script imports it first.

- Ctrl-C during the imports, and a package that is not installed, are reported in one line.
- File names that are not UTF-8 are printed with escapes.
- Threads of GNU OpenMP that wait for another thread sleep soon. By default they spin for 300,000
  rounds (milliseconds) and take the core from the thread that they wait for. Next to another
  program a training then keeps a twentieth of its speed instead of half (docs/PERFORMANCE.md).
  Alone on its cores a program is as fast either way. Torch reads the variable when it is loaded,
  and child processes inherit it.
"""

from __future__ import annotations

import io
import os
import sys

from utils.errors import brief_excepthook

# An empty loop of some tenths of a millisecond: longer than the threads of one operation are apart
# if each has its own core, and a tenth of a time slice of the scheduler.
_SPIN_ROUNDS = "5000"

sys.excepthook = brief_excepthook
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8
if "OMP_WAIT_POLICY" not in os.environ:  # the user's own settings are kept
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_ROUNDS)
