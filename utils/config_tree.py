"""Configuration trees by dotted names: read, change and compare values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode


def get_value(cfg: CfgNode, name: str) -> Any:
    """Return the value of a dotted name, such as ``SOLVER.BASE_LR``."""
    value: Any = cfg
    for part in name.split("."):
        value = value[part]
    return value


def values_by_name(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return all values by dotted name, such as ``SOLVER.BASE_LR``."""
    values: dict[str, Any] = {}
    for part, value in cfg.items():
        name = f"{prefix}{part}"
        values |= values_by_name(value, f"{name}.") if isinstance(value, CfgNode) else {name: value}
    return values


def changed(cfg: CfgNode, values: Mapping[str, object]) -> CfgNode:
    """Return a frozen copy with other values.

    Values are not converted: yacs' own ``merge_from_list`` would read a folder named ``2024`` as a
    number.

    Args:
        cfg: The configuration; not changed.
        values: New values by dotted name, such as ``{"EVAL.SPLIT": "val"}``.

    Raises:
        KeyError: The configuration has no such key.
    """
    copy = cfg.clone()
    copy.defrost()
    for name, value in values.items():
        *sections, leaf = name.split(".")
        node = copy
        for section in sections:
            node = node[section]
        if leaf not in node:
            raise KeyError(name)
        node[leaf] = value
    copy.freeze()
    return copy


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return ``NAME 1 (now 2)`` for every value that differs, for messages.

    Args:
        before: Old values by name.
        now: New values by name. A name that only one of the two has is not compared.
    """
    return [
        f"{name} {before[name]!r} (now {value!r})"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
