from __future__ import annotations

import csv
import json
import math
import shlex
import statistics
from dataclasses import astuple
from pathlib import Path

import pytest
from yacs.config import CfgNode

from configs import loading
from configs.published import STRENGTHS
from data.train_split import make_split
from engine.report import DIRECTIONS
from engine.scoring.intervals import Access
from tests.fixtures import trees
from tests.fixtures.paths import ROOT
from tests.unit.engine.test_report import content
from tools import reproduce
from tools.lib import run as run_module
from utils.files import locked_folder

# The published command lines; `{more}` is what distinguishes the methods.
PUBLISHED = (
    "DATASETS.ROOT_DIR D DATASETS.NAMES \"('{set}{val}')\" INPUT.TYPE {type} INPUT.RADIUS {radius} "
    "OUTPUT_DIR log/x{more}"
)
MORE = {"base": " MODEL.MODE C", "without": "", "full": " MODEL.VAL_R1 0.75"}
TEST = " TEST.EVALUATE_ONLY \"('on')\" MODEL.PRETRAIN_CHOICE \"('self')\" MODEL.PRETRAIN_DIR log/t"
PREPARE = reproduce._prepare
NAMES = ["->".join(direction) for direction in DIRECTIONS]


def command(root: Path, *options: str) -> list[str]:
    places = ["DATASETS.ROOT_DIR", str(root), "MODEL.DEVICE", "cpu"]
    return ["--output", str(root / "out"), *options, *places]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[CfgNode]:
    """Record the configurations that are run, and write the files that a test would write."""
    seen: list[CfgNode] = []

    def run(cfg: CfgNode) -> None:
        seen.append(cfg)
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        loading.dump(cfg, folder / "config.yml")
        if cfg.TEST.EVALUATE_ONLY == "on":
            more = 0.01 * cfg.SOLVER.SEED + (0.1 if cfg.MODEL.MODE == "GCR" else 0)
            key = "right" if cfg.TEST.RETRIEVE_WITH_KEY == "on" else "ciphertext"
            _write_test(folder, more, Access(key, "aead") if cfg.MODEL.MODE == "GCR" else Access())

    monkeypatch.setattr(run_module, "run", run)
    monkeypatch.setattr(reproduce, "_prepare", lambda _: None)  # no data are needed either
    return seen


def _write_test(folder: Path, more: float, access: Access) -> None:
    found = content()
    for row in found["retrieval"]:
        row["rank1"] += more
        row["mAP"] += more
    (folder / "results.json").write_text(json.dumps(found), "utf-8")
    with (folder / "per_query.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        head = ("direction", "key", "scheme", "path", "pid", "first_rank", "average_precision")
        writer.writerow(head)
        for name in NAMES:
            start = (name, *astuple(access.of(name)))
            writer.writerows((*start, f"{q}.png", q % 4, 2, 0.5 + more) for q in range(8))


@pytest.mark.parametrize("method", MORE)
@pytest.mark.parametrize("kind", STRENGTHS)
@pytest.mark.parametrize("dataset", ["market1501", "msmt17", "cuhk03"])
def test_a_cell_is_what_the_published_command_lines_train(
    runs: list[CfgNode], tmp_path: Path, dataset: str, kind: str, method: str
) -> None:
    (tmp_path / f"{dataset}_val").mkdir()
    asked = ["--datasets", dataset, "--desensitizers", kind, "--methods", method]
    reproduce.main(command(tmp_path, *asked))
    values = {"set": dataset, "type": kind, "radius": STRENGTHS[kind], "more": MORE[method]}
    lines = (PUBLISHED.format(val="_val", **values), PUBLISHED.format(val="", **values) + TEST)
    assert len(runs) == 2
    for cfg, line in zip(runs, lines, strict=True):
        published = loading.load(ROOT / "configs/AGW_baseline.yml", shlex.split(line))
        changed = set(loading.changes(published, cfg))
        assert changed <= {
            "DATASETS.ROOT_DIR", "OUTPUT_DIR", "MODEL.PRETRAIN_DIR", "MODEL.DEVICE", "EVAL.DETAILS",
        }  # fmt: skip
    rows = json.loads((tmp_path / "out/reproduction.json").read_text("utf-8"))
    assert rows[0]["retrieval"]["raw->raw"]["rank1_published"] is not None


def test_means_spread_and_differences(
    runs: list[CfgNode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ["--config_file", str(ROOT / "configs/demo.yml")]
    assert (
        reproduce.main(command(tmp_path, *demo, "--seeds", "1,2,4", "--methods", "base,full")) == 0
    )
    # A seed of every row comes before the next seed.
    order = [(cfg.SOLVER.SEED, cfg.MODEL.MODE) for cfg in runs[::2]]
    assert order == [(seed, mode) for seed in (1, 2, 4) for mode in ("C", "GCR")]
    base, full = json.loads((tmp_path / "out/reproduction.json").read_text("utf-8"))
    assert base["seeds"] == [1, 2, 4]
    line = command(tmp_path, *demo, "--seeds", "1,2,4", "--methods", "base,full", "--json")
    text = capsys.readouterr().out
    assert reproduce.main(line) == 0
    assert json.loads(capsys.readouterr().out) == [base, full]
    assert reproduce.main([*line, "--plan"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [each["state"] for each in plan] == ["finished"] * 6
    found = full["retrieval"]["protected->raw"]
    values = [0.21 + 0.1 + 0.01 * seed for seed in (1, 2, 4)]
    assert found["rank1"] == pytest.approx(values)
    assert found["rank1_published"] is None and full["agrees"] is None
    mean, deviation = 100 * statistics.fmean(values), 100 * statistics.stdev(values)
    assert f"{mean:.1f} ± {deviation:.1f} / " in text
    line = next(line for line in text.splitlines() if "full - base, mAP" in line)
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["+10.0 [+10.0, +10.0], 3 of 3"] * 4
    assert (tmp_path / "out/reproduction.md").read_text("utf-8").strip() in text
    assert "not compared" not in text  # nothing is published for this data set
    assert "opened in different ways" not in text  # the right key shows what was never encrypted


def test_methods_read_with_different_keys_are_reported(
    runs: list[CfgNode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ["--config_file", str(ROOT / "configs/demo.yml"), "--methods", "base,full"]
    assert reproduce.main(command(tmp_path, *demo, "TEST.RETRIEVE_WITH_KEY", "off")) == 0
    text = capsys.readouterr().out
    assert "opened in different ways (base: key none; full: key ciphertext, scheme aead)" in text


def test_published_numbers_are_compared(
    runs: list[CfgNode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "market1501_val").mkdir()
    cell = command(tmp_path, "--datasets", "market1501", "--methods", "full")
    assert reproduce.main(cell) == 1  # the invented rates are far from the published rates
    text = capsys.readouterr().out
    assert "| off by (! above 1.5)" in text
    assert "89.4" in text and "-78.4 !" in text  # raw->raw: 0 + .1 + .01
    # Published numbers are compared with results of both precisions.
    exact = command(tmp_path / "exact", "--datasets", "market1501", "--methods", "full")
    (tmp_path / "exact/market1501_val").mkdir(parents=True)
    assert reproduce.main([*exact, "RUNTIME.PRECISION", "float32"]) == 1
    assert "-78.4 !" in capsys.readouterr().out
    # A training with fewer epochs is not compared.
    other = command(tmp_path / "other", "--datasets", "market1501", "--methods", "full")
    (tmp_path / "other/market1501_val").mkdir(parents=True)
    assert reproduce.main([*other, "SOLVER.MAX_EPOCHS", "60"]) == 0
    text = capsys.readouterr().out
    assert "full is not compared with the published numbers" in text
    assert "SOLVER.MAX_EPOCHS 120 (now 60)" in text and "off by" not in text
    # Nor one with another strength.
    assert reproduce.main([*other, "--desensitizers", "mosaic:12"]) == 0
    assert "INPUT.RADIUS 24.0 (now 12.0)" in capsys.readouterr().out
    assert runs[-1].INPUT.RADIUS == 12


def test_finished_tests_are_kept_and_changed_ones_repeated(
    runs: list[CfgNode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ("--config_file", str(ROOT / "configs/demo.yml"), "--methods", "without")
    line = command(tmp_path, *demo)
    assert reproduce.main([*line, "--plan"]) == 0
    assert capsys.readouterr().out.startswith("to do ")
    assert not runs and not (tmp_path / "out").exists()
    assert reproduce.main(line) == 0
    training = Path(runs[0].OUTPUT_DIR)
    (training / "checkpoint_latest.pth").touch()
    assert reproduce.main([*line, "MODEL.DEVICE_ID", "1"]) == 0
    assert len(runs) == 2
    assert reproduce.main([*line, "--seeds", "1,2", "--plan"]) == 0
    states = [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert states == ["finished", "to"]
    # Another kind of test: the training resumes and has nothing left to do.
    assert reproduce.main([*line, "TEST.RE_RANKING", "on"]) == 0
    assert [cfg.SOLVER.RESUME for cfg in runs] == [False, False, True, False]
    # Another training in the same folder is an error, before anything is changed.
    assert reproduce.main([*line, "SOLVER.BASE_LR", "0.01", "--plan"]) == 2
    assert reproduce.main([*line, "SOLVER.BASE_LR", "0.01"]) == 2
    error = capsys.readouterr().err
    assert "contains a training with SOLVER.BASE_LR 0.0007 (now 0.01)" in error
    assert reproduce.main([*line, "RUNTIME.PRECISION", "float32"]) == 2
    assert "RUNTIME.PRECISION auto (now float32)" in capsys.readouterr().err
    assert len(runs) == 4


def test_old_results_are_not_taken_for_those_of_a_killed_test(
    runs: list[CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = command(tmp_path, "--config_file", str(ROOT / "configs/demo.yml"), "--methods", "base")
    assert reproduce.main(line) == 0
    again = [*line, "TEST.RE_RANKING", "on"]

    def killed(cfg: CfgNode) -> None:
        loading.dump(cfg, Path(cfg.OUTPUT_DIR) / "config.yml")
        if cfg.TEST.EVALUATE_ONLY == "on":
            raise KeyboardInterrupt

    whole = run_module.run
    monkeypatch.setattr(run_module, "run", killed)
    assert reproduce.main(again) == 130
    monkeypatch.setattr(run_module, "run", whole)
    before = len(runs)
    assert reproduce.main(again) == 0
    assert len(runs) == before + 2


def test_a_missing_validation_split_is_created(
    runs: list[CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "_prepare", PREPARE)
    trees.market1501(tmp_path)
    assert reproduce.main(command(tmp_path, "--datasets", "market1501", "--methods", "base")) == 1
    assert (tmp_path / "market1501_val/bounding_box_val_query").is_dir()
    assert [cfg.DATASETS.NAMES for cfg in runs] == ["market1501_val", "market1501"]


def test_an_existing_split_of_the_other_boxes_is_an_error(
    runs: list[CfgNode],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(reproduce, "_prepare", PREPARE)
    trees.cuhk03_raw(tmp_path)
    make_split(tmp_path, "cuhk03", cuhk03_kind="labeled")
    line = command(tmp_path, "--datasets", "cuhk03", "--methods", "base")
    assert reproduce.main([*line, "CUHK03.KIND", "detected"]) == 2
    assert "was made with CUHK03.KIND labeled, but CUHK03.KIND is" in capsys.readouterr().err
    assert not runs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "best"], "'best', expected one of base, without, full"),
        (["--desensitizers", "fog"], "'fog', expected blur, mosaic, noise"),
        (["--desensitizers", "mosaic:much"], "'mosaic:much', expected"),
        (["--seeds", "1,x"], "'x'"),
        (["--desensitizers", "fog:3"], "INPUT.TYPE is 'fog'"),
        (["--datasets", "marked1501"], "did you mean market1501?"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    try:
        code: object = reproduce.main(command(tmp_path, *options))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error


def test_commands_with_different_seeds_share_an_output_folder(
    runs: list[CfgNode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ("--config_file", str(ROOT / "configs/demo.yml"), "--methods", "base")
    line = command(tmp_path, *demo)
    assert reproduce.main([*line, "--seeds", "1,2"]) == 0
    training, test = (Path(cfg.OUTPUT_DIR) for cfg in runs[:2])
    (test / "per_query.csv").unlink()  # as if the test still ran
    with locked_folder(tmp_path / "out"), locked_folder(test):
        assert reproduce.main([*line, "--seeds", "2,3"]) == 0
        assert reproduce.main([*line, "--seeds", "1"]) == 2
    assert f"{test} is in use by process" in capsys.readouterr().err
    assert (test / "results.json").is_file() and training.is_dir()
    assert reproduce.main([*line, "--seeds", "1,2,3"]) == 0
    (row,) = json.loads((tmp_path / "out/reproduction.json").read_text("utf-8"))
    assert row["seeds"] == [1, 2, 3]


def test_val_r1_of_the_file_is_kept(runs: list[CfgNode], tmp_path: Path) -> None:
    line = command(tmp_path, "--config_file", str(ROOT / "configs/demo.yml"))
    assert reproduce.main(line) == 0
    assert [cfg.MODEL.VAL_R1 for cfg in runs[::2]] == [math.inf, math.inf, 0.5]


def test_overrides_cannot_change_a_method(
    runs: list[CfgNode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = command(tmp_path, "--config_file", str(ROOT / "configs/demo.yml"))
    assert reproduce.main([*line, "MODEL.VAL_R1", "0.25"]) == 0
    made = [(cfg.MODEL.MODE, cfg.MODEL.VAL_R1) for cfg in runs[::2]]
    assert made == [("C", math.inf), ("GCR", math.inf), ("GCR", 0.25)]
    for key, value, words in (
        ("MODEL.MODE", "C", "MODEL.MODE is set by the method (base, without, full)"),
        ("SOLVER.SEED", "4", "SOLVER.SEED is set by --seeds"),
        ("OUTPUT_DIR", "x", "OUTPUT_DIR is set by --output"),
    ):
        assert reproduce.main([*line, key, value]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert reproduce.main([*line, "--output", str(tmp_path / "file")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err


def test_a_test_that_was_killed_at_its_details_is_repeated(
    runs: list[CfgNode], tmp_path: Path
) -> None:
    line = command(tmp_path, "--config_file", str(ROOT / "configs/demo.yml"), "--methods", "base")
    assert reproduce.main(line) == 0
    (Path(runs[1].OUTPUT_DIR) / "per_query.csv").unlink()
    assert reproduce.main(line) == 0
    assert len(runs) == 4


def test_all_data_sets_are_checked_before_the_first_training(
    runs: list[CfgNode],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(reproduce, "_prepare", PREPARE)
    trees.market1501(tmp_path)
    for names, words in (
        ("market1501,marked1501", "did you mean market1501?"),
        ("market1501,msmt17", "MSMT17 is not in"),
        ("market1501,folder:none", "folder:none"),
    ):
        asked = [] if "folder" in names else ["--datasets", names]
        own = ["DATASETS.NAMES", "folder:none"] if "folder" in names else []
        assert reproduce.main([*command(tmp_path, *asked), *own]) == 2
        assert words in capsys.readouterr().err
    assert not runs
    assert reproduce.main(command(tmp_path, "--datasets", "market1501,marked1501", "--plan")) == 2
    # A data set name cannot lead out of the output folder.
    assert reproduce.main(command(tmp_path, "--datasets", "folder:../..", "--plan")) == 0
    assert f"{tmp_path}/out/folder-/" in capsys.readouterr().out


def test_own_data_in_another_folder_are_other_data(runs: list[CfgNode], tmp_path: Path) -> None:
    for part in ("first", "second"):
        line = command(tmp_path, "--datasets", "folder:mine", "--methods", "base")
        code = reproduce.main([*line, "DATASETS.ROOT_DIR", str(tmp_path / part)])
        assert code == (0 if part == "first" else 2)
    assert len(runs) == 2


def test_seeds_of_different_arithmetic_are_named(
    runs: list[CfgNode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = command(tmp_path, "--config_file", str(ROOT / "configs/demo.yml"), "--methods", "base")
    assert reproduce.main([*line, "--seeds", "1,2"]) == 0
    assert "mixes" not in capsys.readouterr().out
    path = Path(runs[1].OUTPUT_DIR) / "results.json"
    found = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(found | {"versions": {"precision": "bfloat16"}}), "utf-8")
    assert reproduce.main([*line, "--seeds", "1,2"]) == 0
    assert "base mixes precision bfloat16 and unknown over its seeds" in capsys.readouterr().out
