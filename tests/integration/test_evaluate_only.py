"""Evaluating a checkpoint gives the numbers that its training reported."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import loading
from tests.fixtures import tiny
from tools import main as command

SCORES = ("rank1", "rank5", "rank10", "mAP", "mINP")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)


def _evaluation(folder: Path, *more: str) -> tuple[str, ...]:
    choice = ("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(folder))
    return ("TEST.EVALUATE_ONLY", "on", *choice, *more)


def _rows(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["query"], row["gallery"], row["key"]): row for row in result["retrieval"]}


@pytest.mark.parametrize("mode", ["GCR", "C"])
def test_it_equals_the_report_in_training(
    tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.finished(*(("MODEL.MODE", "C") if mode == "C" else ()))
    capsys.readouterr()
    keys = ("MODEL.MODE", mode, *_evaluation(run, "EVAL.SPLIT", "val"))
    assert command.main(["--json", *tiny.arguments(tmp_path, *keys, output="alone")]) == 0
    result, epoch = json.loads(capsys.readouterr().out), tiny.native(run, "best")["epoch"]
    assert result == tiny.results(tmp_path / "alone")
    assert result["epoch"] == epoch
    assert result["split"] == "val"
    (reported,) = (
        line for line in tiny.losses(run) if line["epoch"] == epoch and _is_validation(line)
    )
    rows = _rows(result)
    for query, gallery, key in rows:
        if key == "none":
            for score in SCORES:
                value = reported[f"eval/{query}->{gallery}/{score}"]
                assert rows[query, gallery, key][score] == value
    for kind in ("desensitized", "anonymized", "recovered")[: 1 if mode == "C" else 3]:
        quality = result["image_quality"][kind]
        assert math.isclose(quality["psnr_db"], reported[f"privacy/{kind}/psnr"], rel_tol=1e-5)
        assert math.isclose(quality["ssim"], reported[f"privacy/{kind}/ssim"], rel_tol=1e-5)


def _is_validation(line: dict[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in line)


def test_the_best_epoch_is_that_of_the_highest_rank1(tmp_path: Path) -> None:
    plan = ("MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "4", "SOLVER.BASE_LR", "0.01")
    run = tiny.run(tmp_path, *plan)
    rank1_of = [
        (line["eval/raw->protected/rank1"], line["epoch"])
        for line in tiny.losses(run)
        if _is_validation(line)
    ]
    highest = max(rank1 for rank1, _ in rank1_of)
    assert tiny.native(run, "best")["epoch"] == next(e for r, e in rank1_of if r == highest)
    assert tiny.native(run)["epoch"] == 4


def test_official_files_alone_give_the_same_numbers(tmp_path: Path) -> None:
    run = tiny.finished(*tiny.PERMISSIVE)
    native = tiny.results(tiny.run(tmp_path, *_evaluation(run), output="native"))
    official = tmp_path / "official"
    official.mkdir()
    for letter in ("G", "G_R", "C"):  # the files of a published folder
        name = f"epoch_best_net_{letter}.pth"
        shutil.copy(run / name, official / name)
    alone = tiny.results(tiny.run(tmp_path, *_evaluation(official), output="alone"))
    assert alone["retrieval"] == native["retrieval"]
    assert alone["image_quality"] == native["image_quality"]
    assert native["epoch"] == tiny.native(run, "best")["epoch"]
    assert str(official) in alone["notes"]["weights"]


def test_classes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """The data set's training part has other identities than the checkpoint."""
    run = tiny.finished()
    classes = len(torch.load(run / "epoch_best_net_C.pth", weights_only=True)["classifier.weight"])
    other = tiny.run(tmp_path, *_evaluation(run, "SYNTHETIC.IDENTITIES", "20"), output="other")
    assert classes == 12
    assert tiny.results(other)["retrieval"]
    assert "pid_of_label" in tiny.native(run)["info"]


@pytest.mark.parametrize("scheme", ["additive", "aead"])
def test_key_states_and_headline(tmp_path: Path, scheme: str) -> None:
    run = tiny.finished()
    with_key = _evaluation(run, "ISED.SCHEME", scheme)
    result = tiny.results(tiny.run(tmp_path, *with_key, output="on"))
    without = tiny.results(
        tiny.run(tmp_path, *with_key, "TEST.RETRIEVE_WITH_KEY", "off", output="off")
    )
    rows = _rows(result)
    assert {key for _, _, key in rows} == {"none", "right", "wrong", "ciphertext"}
    assert [key for query, gallery, key in rows if query == gallery == "raw"] == ["none"]
    refused = {key for (_, _, key), row in rows.items() if row.get("refused")}
    assert refused == ({"wrong"} if scheme == "aead" else set())
    for report, key in ((result, "right"), (without, "ciphertext")):
        cells = [rows["raw", "raw", "none"]] + [
            _rows(report)[query, gallery, key]
            for query, gallery in (("raw", "protected"), ("protected", "raw"), ("protected",) * 2)
        ]
        assert report["published_row"] == "/".join(f"{100 * c['rank1']:.1f}" for c in cells)


def test_re_ranked_rows_are_added_to_the_plain_ones(tmp_path: Path) -> None:
    run = tiny.finished()
    alone = tiny.run(tmp_path, *_evaluation(run, "TEST.RE_RANKING", "on"), output="alone")
    result = tiny.results(alone)
    plain, again = (_rows({"retrieval": result[k]}) for k in ("retrieval", "retrieval_reranked"))
    assert set(plain) == set(again)
    assert "re-ranked" in (alone / "log.txt").read_text("utf-8")


def test_in_the_folder_of_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only with SOLVER.RESUME, so that results of a training are not replaced by accident."""
    run = tiny.trained(tmp_path)
    before = {name: (run / name).read_bytes() for name in ("config.yml", "results.json")}
    capsys.readouterr()
    assert command.main(tiny.arguments(tmp_path, *_evaluation(run))) != 0
    assert "choose another OUTPUT_DIR" in capsys.readouterr().err
    assert before == {name: (run / name).read_bytes() for name in before}
    tiny.run(tmp_path, "TEST.EVALUATE_ONLY", "on", "SOLVER.RESUME", "True")
    assert tiny.results(run)["split"] == "test"
    assert (run / "config.yml").read_bytes() == before["config.yml"]


def test_val_r1_is_ignored(tmp_path: Path) -> None:
    run = tiny.finished("MODEL.MODE", "C")
    alone = tiny.run(
        tmp_path, "MODEL.MODE", "C", *_evaluation(run, *tiny.PERMISSIVE), output="alone"
    )
    assert tiny.results(alone)["mode"] == "C"


def test_the_weights_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny.run(
        tmp_path, "MODEL.VAL_R1", "1.0", "MODEL.VAL_R1_SLACK", "0.0", "SOLVER.MAX_EPOCHS", "1"
    )
    assert not tiny.native(run, "best")["info"]["best"]["qualified"]
    assert "no validation qualified" in tiny.results(run)["notes"]["weights"]
    base = tiny.finished("MODEL.MODE", "C")
    assert "qualified" not in tiny.results(base)["notes"]["weights"]  # the baseline cannot qualify
    qualified = tiny.finished(*tiny.PERMISSIVE)
    assert tiny.native(qualified, "best")["info"]["best"]["qualified"]
    assert "no validation qualified" not in tiny.results(qualified)["notes"]["weights"]
    (run / "checkpoint_best.pth").unlink()
    for path in run.glob("epoch_best_*"):
        path.unlink()
    alone = tiny.results(tiny.run(tmp_path, *_evaluation(run), output="alone"))
    assert alone["notes"]["weights"].startswith("latest")
    assert logging.getLogger("reid_baseline").handlers


def test_another_desensitizer_than_in_training_is_noted(tmp_path: Path) -> None:
    run = tiny.finished("MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    same = tiny.results(tiny.run(tmp_path, "MODEL.MODE", "C", *_evaluation(run), output="same"))
    assert same["notes"]["desensitized by"] == "mosaic 8"
    assert "trained with" not in same["notes"]
    blur = ("MODEL.MODE", "C", "INPUT.TYPE", "blur", "INPUT.RADIUS", "3")
    other = tiny.results(tiny.run(tmp_path, *blur, *_evaluation(run), output="other"))
    assert other["notes"]["desensitized by"] == "blur 3"
    assert other["notes"]["trained with"] == "mosaic 8"


def test_a_training_does_not_begin_if_no_query_can_be_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(loading.load(tiny.finished() / "config.yml").DATASETS.ROOT_DIR)
    people = next(root.glob("synthetic*-12x2x2-*"))
    copy = shutil.copytree(people, tmp_path / "sets" / "own")
    queries = list((copy / "bounding_box_val_query").glob("*.jpg"))
    for picture in queries:
        picture.write_bytes(picture.read_bytes()[:100])
    assert queries
    own = ("DATASETS.NAMES", f"folder:{copy}", "CACHE.SKIP_BAD", "True")
    assert command.main(tiny.arguments(tmp_path, *own)) == 2
    assert "validation" in capsys.readouterr().err
    assert "Epoch 1" not in (tmp_path / "run" / "log.txt").read_text("utf-8")


def test_the_number_of_skipped_images_is_noted(tmp_path: Path) -> None:
    run = tiny.finished()
    root = Path(loading.load(run / "config.yml").DATASETS.ROOT_DIR)
    people = next(root.glob("synthetic*-12x2x2-*"))
    copy = shutil.copytree(people, tmp_path / "sets" / "own")
    broken = sorted((copy / "query").glob("*.jpg"))[:2]
    for picture in broken:
        picture.write_bytes(picture.read_bytes()[:100])
    total = len(list((copy / "query").glob("*.jpg")))
    own = ("DATASETS.NAMES", f"folder:{copy}", "CACHE.SKIP_BAD", "True")
    for mode in ("memory", "stream"):
        found = tiny.run(tmp_path, *_evaluation(run, *own, "CACHE.MODE", mode), output=mode)
        result = tiny.results(found)
        assert result["retrieval"][0]["num_queries"] == total - 2
        assert result["notes"]["left out"].startswith(f"2 of {total} queries and 0 of ")
