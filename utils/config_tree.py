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


def set_value(cfg: CfgNode, name: str, value: object) -> None:
    """Set the value of a dotted name; missing sections are created."""
    *sections, leaf = name.split(".")
    for section in sections:
        cfg = cfg.setdefault(section, CfgNode())
    cfg[leaf] = value


def values_by_name(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return all values by dotted name, such as ``SOLVER.BASE_LR``."""
    values: dict[str, Any] = {}
    for part, value in cfg.items():
        name = f"{prefix}{part}"
        values |= values_by_name(value, f"{name}.") if isinstance(value, CfgNode) else {name: value}
    return values


def changed(cfg: CfgNode, values: Mapping[str, object]) -> CfgNode:
    """Return a frozen copy with other values, by dotted name, such as ``{"EVAL.SPLIT": "val"}``.

    Values are not converted: yacs' own ``merge_from_list`` would read a folder named ``2024`` as a
    number.

    Raises:
        KeyError: The configuration has no such key.
    """
    copy = cfg.clone()
    copy.defrost()
    for name, value in values.items():
        get_value(copy, name)  # raises if there is no such key
        set_value(copy, name, value)
    copy.freeze()
    return copy


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return ``NAME 1 (now 2)`` for every value that differs, for messages.

    A name that only one of the two has is not compared.
    """
    return [
        f"{name} {before[name]!r} (now {value!r})"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
