"""Another configuration made from a frozen one."""

from __future__ import annotations

from collections.abc import Mapping

from yacs.config import CfgNode


def changed(cfg: CfgNode, values: Mapping[str, object]) -> CfgNode:
    """Return a frozen copy with other values; the one that was given stays as it is.

    Values are taken as they are: yacs' own ``merge_from_list`` would read a folder named ``2024``
    as a number.

    Args:
        cfg: The configuration.
        values: New values by dotted name, such as ``{"EVAL.SPLIT": "val"}``.

    Raises:
        KeyError: There is no such key.
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
