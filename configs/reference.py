"""The table of all keys for ``docs/configuration.md``: ``python3 -m configs.reference``."""

from __future__ import annotations

import sys

from configs.defaults import KEYS
from configs.schema import Key

_HEAD = """# Configuration

Written by `python3 -m configs.reference > docs/configuration.md` from `configs/defaults.py`.

A value comes from the defaults below, then from the file given by `--config_file`, then from
`KEY VALUE` pairs on the command line; the last one wins. Quotes and parentheses around a value, as
in published command lines (`OUTPUT_DIR "('./log/run')"`), are taken off. All mistakes are reported
at once, before anything is loaded. The effective configuration is saved as `config.yml` in
OUTPUT_DIR, and can be given to `--config_file` again.
"""


def markdown() -> str:
    """Return the page: one table for each section, keys in the order of the defaults."""
    sections: dict[str, list[str]] = {}
    for key in KEYS:
        sections.setdefault(key.name.rpartition(".")[0] or "Top level", []).append(_row(key))
    head = "| key | default | allowed | meaning |\n|---|---|---|---|\n"
    tables = [f"## {section}\n\n{head}{''.join(rows)}" for section, rows in sections.items()]
    return "\n".join((_HEAD, *tables))


def _row(key: Key) -> str:
    default = list(key.default) if isinstance(key.default, tuple) else key.default
    shown = "''" if default == "" else default
    cells = (f"`{key.name}`", f"`{shown}`", key.kind.describe(), key.meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
