from __future__ import annotations

import pytest

from configs.loading import load
from utils.config_tree import changed


def test_only_the_copy_has_the_new_values() -> None:
    cfg = load(None, ["OUTPUT_DIR", "./log/run"])
    other = changed(cfg, {"OUTPUT_DIR": "2024", "MODEL.PRETRAIN_CHOICE": "self"})
    assert (other.OUTPUT_DIR, other.MODEL.PRETRAIN_CHOICE) == ("2024", "self")
    assert (cfg.OUTPUT_DIR, cfg.MODEL.PRETRAIN_CHOICE) == ("./log/run", "imagenet")
    for tree in (cfg, other):
        with pytest.raises(AttributeError, match="immutable"):
            tree.MODEL.MODE = "C"
    assert changed(other, {"OUTPUT_DIR": "./log/run", "MODEL.PRETRAIN_CHOICE": "imagenet"}) == cfg


@pytest.mark.parametrize("name", ["MODEL.MDOE", "MODLE.MODE", "MODE"])
def test_a_key_that_does_not_exist_is_a_defect(name: str) -> None:
    with pytest.raises(KeyError):
        changed(load(), {name: "C"})
