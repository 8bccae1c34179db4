"""Print docs/configuration.md, the tables of all keys: ``python3 -m configs.reference``."""

from __future__ import annotations

import sys

from configs.defaults import KEYS
from configs.schema import Key

_HEAD = """# Configuration

`python3 -m configs.reference > docs/configuration.md` writes this page from `configs/defaults.py`.

`KEY VALUE` pairs on the command line override the file given by `--config_file`, which overrides
the defaults below. Quotes and parentheses around a value, as in published command lines
(`OUTPUT_DIR "('./log/run')"`), are removed. All mistakes are reported together, before anything is
loaded. The effective configuration is saved as `config.yml` in OUTPUT_DIR and can be given to
`--config_file` again.

In YAML files every value is read as on the command line: `OUTPUT_DIR: 010` is the folder `010`. A
file has at most 256 KiB and no aliases (`*name`).
"""


def markdown() -> str:
    """Return the page: a table for each section, with the keys in the order of the defaults."""
    sections: dict[str, list[str]] = {}
    for key in KEYS:
        sections.setdefault(key.name.rpartition(".")[0] or "Top level", []).append(_row(key))
    head = "| key | default | allowed | meaning |\n|---|---|---|---|\n"
    tables = [f"## {section}\n\n{head}{''.join(rows)}" for section, rows in sections.items()]
    return "\n".join((_HEAD, *tables))


def _row(key: Key) -> str:
    default = list(key.default) if isinstance(key.default, tuple) else key.default
    shown = "''" if default == "" else default
    cells = (f"`{key.name}`", f"`{shown}`", key.allowed.expected, key.meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
