"""Read the configuration from a file and the command line, check, write and compare it."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from configs.defaults import KEY_BY_NAME, KEYS, SECTIONS, default_config
from configs.published import IMAGENET_FILE
from configs.validation import ConfigError, cross_field_problems
from utils.config_tree import get_value, set_value
from utils.files import write_text

_LARGEST_FILE = 256 * 1024  # bytes; config.yml has about 3 KiB


def load(config_file: str | Path | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """Return the effective configuration, frozen: defaults, overridden by file and command line.

    The YAML file contains sections and keys of ``defaults.py``; None or '' for none. Overrides are
    ``KEY VALUE KEY VALUE ...`` as on the command line; a later pair wins.

    Raises:
        ConfigError: Names every problem in the file, in the overrides and between keys.
    """
    problems: list[str] = []
    given: list[tuple[str, object]] = []
    if config_file:
        given += _flatten(read_yaml(Path(config_file)), problems, f" in {config_file}")
    given += _pairs(overrides, problems)

    cfg = default_config()
    failed: set[str] = set()  # wrong values, which are not checked again between keys
    for name, value in dict(given).items():
        problem = _unknown(name)
        if problem is None:
            try:
                set_value(cfg, name, KEY_BY_NAME[name].convert(value))
            except ValueError as error:
                problem = str(error)
                failed.add(name)
        if problem is not None:
            problems.append(problem)
    problems += cross_field_problems(cfg, failed)
    if problems:
        raise ConfigError(problems)
    cfg.freeze()
    return cfg


def dump(cfg: CfgNode, path: str | Path) -> None:
    """Write the configuration as YAML, from which ``load`` reads an equal configuration."""
    lines: list[str] = []
    section = ""
    for key in KEYS:
        *sections, leaf = key.name.split(".")
        if sections and section != sections[0]:
            section = sections[0]
            lines.append(f"{section}:")
        value = get_value(cfg, key.name)
        plain = list(value) if isinstance(value, tuple) else value
        # As a list of one, so that a single value ends without YAML's "..." end mark.
        text = yaml.safe_dump([plain], default_flow_style=True, width=math.inf, allow_unicode=True)
        lines.append(f"{'  ' * len(sections)}{leaf}: {text.strip()[1:-1]}")
    write_text(path, "\n".join(lines) + "\n")


def recorded_values(path: Path) -> dict[str, Any]:
    """Return the values of a config.yml by dotted name, also if another version has written it.

    Unknown keys and values that are not allowed stay text.

    Raises:
        ConfigError: The file is not YAML with sections.
    """
    values = dict(_flatten(read_yaml(path), [], ""))
    for name, value in values.items():
        if name in KEY_BY_NAME:
            with contextlib.suppress(ValueError):
                values[name] = KEY_BY_NAME[name].convert(value)
    return values


def changes(before: CfgNode, now: CfgNode) -> dict[str, tuple[object, object]]:
    """Return the old and new value of every key that differs, by name."""
    pairs = {key.name: (get_value(before, key.name), get_value(now, key.name)) for key in KEYS}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


class _TextLoader(yaml.BaseLoader):
    """Reads YAML with all values as text, which each key converts as on the command line.

    YAML's own types would read the folder 010 as the number 8, and ``on`` as True. Aliases are an
    error, since a few of them can describe an endless or a huge value. So is a repeated key, since
    YAML would ignore its first value.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor} is not supported", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping."""
        names: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value} is repeated", key_node.start_mark
                )
            names.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the sections of a configuration file; all values are text, or lists of text.

    Raises:
        ConfigError: The file does not exist, is too large, or is not YAML with sections.
    """
    if not path.is_file():
        raise ConfigError([f"config file {path} does not exist{_similar_files(path)}"])
    with path.open("rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise ConfigError(
            [f"config file {path} has more than {_LARGEST_FILE // 1024} KiB; expected a short file"]
        )
    try:
        # The loader derives from BaseLoader, which creates only texts, lists and dicts.
        tree = yaml.load(content.decode("utf-8"), _TextLoader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        deep = "nested too deeply" if isinstance(error, RecursionError) else "not UTF-8 text"
        what = getattr(error, "problem", None) or deep
        raise ConfigError([f"config file {path} is not valid YAML: {where}{what}"]) from error
    if not tree:  # None or ''
        return {}
    if not isinstance(tree, dict):
        kind = "list" if isinstance(tree, list) else "text"
        raise ConfigError([f"config file {path} is a {kind}; expected sections such as MODEL:"])
    return tree


def _similar_files(path: Path) -> str:
    folder = path.parent
    files = sorted(str(p) for p in folder.glob("*.yml")) if folder.is_dir() else []
    return f"; {folder} has {', '.join(files)}" if files else ""


def _flatten(
    tree: Mapping[str, Any], problems: list[str], where: str, prefix: str = ""
) -> Iterator[tuple[str, object]]:
    """Yield (dotted name, value) of a tree; add a problem for a section that is a single value."""
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if name in SECTIONS:
            if isinstance(value, Mapping):
                yield from _flatten(value, problems, where, f"{name}.")
            elif value != "":
                problems.append(f"{name}{where} is {value!r}; expected a section with keys")
        elif name not in KEY_BY_NAME and isinstance(value, Mapping):
            problems.append(_unknown(name, f"section{where}") or "")
        else:
            yield name, value


def _pairs(overrides: Sequence[str], problems: list[str]) -> Iterator[tuple[str, object]]:
    """Yield (dotted name, value) of command-line overrides."""
    items = list(overrides)
    while items:
        name = str(items.pop(0))
        if name.startswith("--"):
            option, equals, _ = name.partition("=")
            problems.append(f"option {option} is after a key; expected it before the first key")
            del items[: 0 if equals else 1]
        elif "=" in name and name.split("=", 1)[0] in KEY_BY_NAME:
            key, value = name.split("=", 1)
            problems.append(
                f"override {name!r} has an equals sign; expected KEY VALUE: {key} {value!r}"
            )
        elif not items:
            problems.append(
                f"override {name!r} has no value; expected KEY VALUE pairs (a value with spaces "
                "needs quotes)"
            )
        else:
            yield name, items.pop(0)


def _unknown(name: str, what: str = "key") -> str | None:
    """Return a sentence about a name that is not a key, with similar keys; None for a key."""
    if name in KEY_BY_NAME:
        return None
    if name in SECTIONS:
        keys = sorted(key for key in KEY_BY_NAME if key.startswith(f"{name}."))
        return f"{name} is a section, not a key; expected one of {', '.join(keys)}"
    near = _nearest(name, SECTIONS if what.startswith("section") else KEY_BY_NAME)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else (f"expected a key of {', '.join(sorted({key.split('.')[0] for key in KEY_BY_NAME}))}")
    )
    return f"{name} is not a {what} of the configuration; {hint}"


def _nearest(name: str, known: Mapping[str, object] | frozenset[str]) -> list[str]:
    """Return the names probably meant: a misspelt name, the same leaf elsewhere, a similar name."""
    wanted = name.upper()
    leaf = wanted.rsplit(".", 1)[-1]
    misspelt = difflib.get_close_matches(wanted, sorted(known), n=1, cutoff=0.9)
    if misspelt and misspelt[0].rpartition(".")[0] == wanted.rpartition(".")[0]:
        return misspelt
    same_leaf = sorted(key for key in known if key.rsplit(".", 1)[-1] == leaf)
    return same_leaf[:3] or difflib.get_close_matches(wanted, sorted(known), n=1, cutoff=0.6)


# Folders, devices, workers, memory, speed and logging: numbers stay the same, up to rounding. Parts
# of two folders do count: see ``differing``.
_NO_EFFECT = frozenset((
    "MODEL.DEVICE", "MODEL.DEVICE_ID", "DATASETS.ROOT_DIR", "OUTPUT_DIR",
    "DATALOADER.NUM_WORKERS", "CACHE.MODE", "CACHE.LIMIT_MIB", "TEST.IMS_PER_BATCH",
    "RUNTIME.CHANNELS_LAST", "RUNTIME.COMPILE", "RUNTIME.CUDNN_BENCHMARK", "RUNTIME.THREADS",
    "SOLVER.GRAD_CHECKPOINT", "SOLVER.RESUME", "SOLVER.LOG_PERIOD", "SOLVER.CHECKPOINT_PERIOD",
    "EVAL.REPORT",
    "EVAL.IMAGES", "RUNTIME.TRACKERS",
))  # fmt: skip
# Keys of an evaluation. One of them affects a training: its validations choose the best weights.
_OF_A_TEST = ("TEST.", "EVAL.", "ISED.")
_OF_VALIDATIONS = "TEST.CROSS_CAMERA"
_WEIGHTS = "MODEL.PRETRAIN_PATH"

# A new key of the configuration counts unless it is named above.
OF_A_RESULT = tuple(key.name for key in KEYS if key.name not in _NO_EFFECT)
OF_A_TRAINING = tuple(
    name for name in OF_A_RESULT if name == _OF_VALIDATIONS or not name.startswith(_OF_A_TEST)
)


def values_of_a_result(cfg: CfgNode) -> dict[str, Any]:
    """Return every value that can change a number, by name, as JSON types."""
    values = {name: _plain(get_value(cfg, name)) for name in OF_A_RESULT}
    return values | {_WEIGHTS: _weights(cfg.MODEL.PRETRAIN_PATH)}


def differing(before: CfgNode, now: CfgNode, names: Collection[str] = OF_A_RESULT) -> list[str]:
    """Return the values that differ, as ``SOLVER.SEED 1 (now 2)``.

    ImageNet weights are compared by the name of their file. DATASETS.ROOT_DIR is compared only if
    the data set is given as a path relative to it.
    """
    from_root = ":" in now.DATASETS.NAMES
    return [
        f"{name} {old} (now {new})"
        for name, (old, new) in changes(before, now).items()
        if (name in names or (from_root and name == "DATASETS.ROOT_DIR"))
        and not (name == _WEIGHTS and _weights(str(old)) == _weights(str(new)))
    ]


def _weights(path: str) -> str:
    """Return the file name of a MODEL.PRETRAIN_PATH; '' for the file that is the default."""
    name = Path(path).name if path.endswith(".pth") else ""
    return "" if name == IMAGENET_FILE else name


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    # JSON has no infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
