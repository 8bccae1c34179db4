from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.defaults import KEY_BY_NAME, default_config
from configs.loading import changes, dump, load, recorded_values
from configs.validation import ConfigError
from tests.fixtures.paths import ROOT
from utils.config_tree import get_value

BASELINE = ROOT / "configs/AGW_baseline.yml"
BASE = [
    "DATASETS.ROOT_DIR", "D", "DATASETS.NAMES", "('market1501_val')", "INPUT.TYPE", "mosaic",
    "INPUT.RADIUS", "24.0", "OUTPUT_DIR", "('./log/market1501/market1501-base-mosaic')",
]  # fmt: skip
TEST = [
    "TEST.EVALUATE_ONLY", "('on')", "MODEL.PRETRAIN_CHOICE", "('self')",
    "MODEL.PRETRAIN_DIR", "./log/market1501/market1501-base-mosaic",
]  # fmt: skip


COMMON = {
    "DATASETS.ROOT_DIR": "D",
    "DATASETS.NAMES": "market1501_val",
    "OUTPUT_DIR": "./log/market1501/market1501-base-mosaic",
}
PUBLISHED = {
    "base": ([*BASE, "MODEL.MODE", "C"], {"MODEL.MODE": "C"}),
    "without": (BASE, {}),
    "full": ([*BASE, "MODEL.VAL_R1", "0.75"], {"MODEL.VAL_R1": 0.75}),
    "blur": ([*BASE, "INPUT.TYPE", "blur", "INPUT.RADIUS", "12.0"],
             {"INPUT.TYPE": "blur", "INPUT.RADIUS": 12.0}),
    "noise": ([*BASE, "INPUT.TYPE", "noise", "INPUT.RADIUS", "0.5"],
              {"INPUT.TYPE": "noise", "INPUT.RADIUS": 0.5}),
    "device": ([*BASE, "MODEL.DEVICE_ID", "'1'"], {"MODEL.DEVICE_ID": "1"}),
    "test": (
        [*BASE, "MODEL.MODE", "C", "DATASETS.NAMES", "('market1501')",
         "OUTPUT_DIR", "('./log/test')", *TEST],
        {"MODEL.MODE": "C", "DATASETS.NAMES": "market1501", "OUTPUT_DIR": "./log/test",
         "TEST.EVALUATE_ONLY": "on", "MODEL.PRETRAIN_CHOICE": "self",
         "MODEL.PRETRAIN_DIR": "./log/market1501/market1501-base-mosaic"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_command_lines_change_only_their_keys(name: str) -> None:
    overrides, expected = PUBLISHED[name]
    found = changes(default_config(), load(BASELINE, overrides))
    assert {name: now for name, (_, now) in found.items()} == {**COMMON, **expected}


CONVERSIONS = [
    ("DATASETS.ROOT_DIR", "/data/re id (old)", "/data/re id (old)"),
    ("DATASETS.ROOT_DIR", "(1)", "(1)"),
    ("DATASETS.ROOT_DIR", "[x]/y", "[x]/y"),
    ("DATASETS.ROOT_DIR", "it's", "it's"),
    ("DATASETS.ROOT_DIR", "2024", "2024"),
    ("DATASETS.ROOT_DIR", "1_000", "1_000"),
    ("DATASETS.ROOT_DIR", "None", "None"),
    ("DATASETS.ROOT_DIR", "('./a b')", "./a b"),
    ("DATASETS.ROOT_DIR", "('./a b',)", "./a b"),
    ("DATASETS.ROOT_DIR", "~/sets", str(Path("~/sets").expanduser())),
    ("DATASETS.ROOT_DIR", "~no user/sets", "~no user/sets"),
    ("DATASETS.NAMES", "folder:./my people (2)", "folder:./my people (2)"),
    ("DATASETS.NAMES", "csv:C:/x.csv", "csv:C:/x.csv"),
    ("MODEL.DEVICE_ID", "0", "0"),
    ("MODEL.DEVICE_ID", "'0'", "0"),
    ("MODEL.DEVICE_ID", "('0')", "0"),
    ("MODEL.DEVICE", "cuda:3", "cuda:3"),
    ("MODEL.VAL_R1", "inf", math.inf),
    ("MODEL.VAL_R1", "float('inf')", None),
    ("MODEL.VAL_R1", "nan", None),
    ("MODEL.VAL_R1", "-inf", None),
    ("MODEL.VAL_R1", "1", 1.0),
    ("MODEL.VAL_R1", "('0.75')", 0.75),
    ("MODEL.VAL_R1", "('0.9x')", "0.9x"),
    ("MODEL.VAL_R1", "1x", "1.0x"),
    ("MODEL.VAL_R1", "0x", None),
    ("MODEL.VAL_R1", "1.1x", None),
    ("MODEL.VAL_R1", "x", None),
    ("SOLVER.BASE_LR", "5e-4", 5e-4),
    ("SOLVER.BASE_LR", "inf", None),
    ("SOLVER.BASE_LR", "0", None),
    ("SOLVER.BASE_LR", "True", None),
    ("SOLVER.MAX_EPOCHS", "120.0", 120),
    ("SOLVER.MAX_EPOCHS", "1.5", None),
    ("SOLVER.MAX_EPOCHS", "1e999", None),
    ("SOLVER.MAX_EPOCHS", "", None),
    ("SOLVER.SEED", str(2**62 + 1), 2**62 + 1),
    ("INPUT.IMG_SIZE", "[384, 128]", (384, 128)),
    ("INPUT.IMG_SIZE", "(384, 128)", (384, 128)),
    ("INPUT.IMG_SIZE", "384,128", (384, 128)),
    ("INPUT.IMG_SIZE", "384 128", (384, 128)),
    ("INPUT.IMG_SIZE", "384x128", None),
    ("INPUT.IMG_SIZE", "384", None),
    ("SOLVER.STEPS", "[]", ()),
    ("SOLVER.STEPS", "40", (40,)),
    ("SOLVER.STEPS", "[40, 80.5]", None),
    ("SOLVER.STEPS", "[40, [80]]", (40, 80)),
    ("SOLVER.RESUME", "on", True),
    ("SOLVER.RESUME", "True", True),
    ("SOLVER.RESUME", "2", None),
    ("TEST.RE_RANKING", "True", "on"),
    ("TEST.RE_RANKING", "'on'", "on"),
    ("TEST.RE_RANKING", "maybe", None),
    ("CACHE.LIMIT_MIB", "auto", -1),
    ("CACHE.LIMIT_MIB", "-2", None),
    ("DATALOADER.NUM_WORKERS", "0", 0),
]


@pytest.mark.parametrize(("name", "text", "expected"), CONVERSIONS)
def test_text_becomes_a_value(name: str, text: str, expected: object) -> None:
    if expected is None:
        with pytest.raises(ConfigError) as caught:
            load(None, [name, text])
        assert caught.value.problems == (
            f"{name} is {text!r}; expected {KEY_BY_NAME[name].allowed.expected}",
        )
    else:
        value = get_value(load(None, [name, text]), name)
        assert value == expected
        assert type(value) is type(expected)


YAML = [
    ("MODEL: {DEVICE_ID: 0}", "MODEL.DEVICE_ID", "0"),
    ("TEST: {RE_RANKING: on}", "TEST.RE_RANKING", "on"),
    ("TEST: {RE_RANKING: off}", "TEST.RE_RANKING", "off"),
    ("TEST: {RE_RANKING: ('on')}", "TEST.RE_RANKING", "on"),
    ("SOLVER: {BASE_LR: 5e-4}", "SOLVER.BASE_LR", 5e-4),
    ("INPUT: {RADIUS: 24}", "INPUT.RADIUS", 24.0),
    ("MODEL: {VAL_R1: .inf}", "MODEL.VAL_R1", math.inf),
    ("MODEL: {VAL_R1: inf}", "MODEL.VAL_R1", math.inf),
    ("INPUT: {IMG_SIZE: (384, 128)}", "INPUT.IMG_SIZE", None),  # YAML reads the keys (384 and 128)
    ("OUTPUT_DIR: 010", "OUTPUT_DIR", "010"),
    ("OUTPUT_DIR: 0x1F", "OUTPUT_DIR", "0x1F"),
    ("OUTPUT_DIR: 12:30", "OUTPUT_DIR", "12:30"),
    ("OUTPUT_DIR: 2024-01-01", "OUTPUT_DIR", "2024-01-01"),
    ("OUTPUT_DIR: 1e3", "OUTPUT_DIR", "1e3"),
    ("OUTPUT_DIR: 007.50", "OUTPUT_DIR", "007.50"),
    ("OUTPUT_DIR: on", "OUTPUT_DIR", "on"),
    ("OUTPUT_DIR: null", "OUTPUT_DIR", "null"),
    ("DATASETS: {ROOT_DIR: 0o17}", "DATASETS.ROOT_DIR", "0o17"),
    ("MODEL: {DEVICE_ID: 00}", "MODEL.DEVICE_ID", "00"),
    ("SOLVER: {MAX_EPOCHS: 1_0}", "SOLVER.MAX_EPOCHS", 10),
    ("SOLVER: {RESUME: yes}", "SOLVER.RESUME", True),
    ("INPUT: {IMG_SIZE: [384, 128]}", "INPUT.IMG_SIZE", (384, 128)),
    ("INPUT: {IMG_SIZE: '(384, 128)'}", "INPUT.IMG_SIZE", (384, 128)),
    ("DATASETS: {NAMES: ('market1501')}", "DATASETS.NAMES", "market1501"),
    ("DATASETS: {NAMES: [a, b]}", "DATASETS.NAMES", None),
    ("DATASETS: {NAMES: }", "DATASETS.NAMES", None),
    ("MODEL:", "MODEL.NAME", "resnet50_nl"),
    ("", "MODEL.NAME", "resnet50_nl"),
]


@pytest.mark.parametrize(("text", "name", "expected"), YAML)
def test_yaml_values_are_read_as_on_the_command_line(
    text: str, name: str, expected: object, tmp_path: Path
) -> None:
    path = tmp_path / "c.yml"
    path.write_text(text)
    if expected is None:
        with pytest.raises(ConfigError, match=name):
            load(path)
    else:
        value = get_value(load(path), name)
        assert value == expected
        assert type(value) is type(expected)


BROKEN = [
    ("MODEL: [1", "not valid YAML: line"),
    ("MODEL: {NAME: resnet50}\nMODEL: {MODE: C}", "line 2: the key MODEL is repeated"),
    ("MODEL: {MODE: C, MODE: GCR}", "the key MODE is repeated"),
    ("- 1", "is a list; expected sections"),
    ("MODEL: 3", "MODEL in .* is '3'; expected a section"),
    ("MODLE: {NAME: x}", "did you mean MODEL"),
    ("MODEL: {NAME: {X: 1}}", "MODEL.NAME is {'X': '1'}"),
    ("3: x", "3 is not a key"),
    ("!!python/object/apply:os.system ['true']", "is a list; expected sections"),
    # Aliases can describe an endless or a huge value in a few lines.
    ("OUTPUT_DIR: &a [*a]", r"line 1: the alias \*a is not supported"),
    ("MODEL: &a {NAME: *a}", r"the alias \*a is not supported"),
    ("A: &a [x, x]\nB: &b [*a, *a]", r"line 2: the alias \*a is not supported"),
    ("OUTPUT_DIR: " + "[" * 100_000, "nested too deeply"),
    ("OUTPUT_DIR: " + "x" * 300_000, "more than 256 KiB"),
    ("OUTPUT_DIR: " + "[" * 90 + "]" * 90, "OUTPUT_DIR is"),
]


@pytest.mark.parametrize(("text", "words"), BROKEN)
def test_broken_files_are_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_a_missing_file_and_one_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; .*AGW_baseline\.yml"):
        load(ROOT / "configs/AGW.yml")
    (tmp_path / "c.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8|not valid YAML"):
        load(tmp_path / "c.yml")


def test_recorded_values_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(
        "OUTPUT_DIR: 010\nMODEL: {NGF: 32, MODE: X, OLD_KEY: 3}\nINPUT: {IMG_SIZE: [64, 32]}"
    )
    assert recorded_values(path) == {
        "OUTPUT_DIR": "010",
        "MODEL.NGF": 32,
        "MODEL.MODE": "X",
        "MODEL.OLD_KEY": "3",
        "INPUT.IMG_SIZE": (64, 32),
    }


def test_a_later_override_wins_and_beats_the_file() -> None:
    cfg = load(BASELINE, ["SOLVER.MAX_EPOCHS", "5", "SOLVER.MAX_EPOCHS", "6"])
    assert cfg.SOLVER.MAX_EPOCHS == 6


def test_changes_name_old_and_new_value_of_each_key_that_differs() -> None:
    before, now = load(), load(None, ["SOLVER.STEPS", "30", "MODEL.VAL_R1", "0.5"])
    assert changes(before, before) == {}
    assert changes(before, now) == {
        "MODEL.VAL_R1": (math.inf, 0.5),
        "SOLVER.STEPS": ((40, 80), (30,)),
    }


def test_the_result_is_frozen_and_not_shared() -> None:
    cfg = load()
    with pytest.raises(AttributeError):
        cfg.MODEL.NAME = "x"
    other = load(None, ["MODEL.NAME", "resnet18"])
    assert (cfg.MODEL.NAME, other.MODEL.NAME) == ("resnet50_nl", "resnet18")


@given(path=st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1))
def test_any_folder_name_survives_the_dump(path: str, tmp_path_factory: object) -> None:
    try:
        cfg = load(None, ["OUTPUT_DIR", path])
    except ConfigError:
        return  # several strings in brackets, or nothing but spaces
    target = Path(tmp_path_factory.getbasetemp()) / "dumped.yml"  # type: ignore[attr-defined]
    dump(cfg, target)
    assert load(target) == cfg
