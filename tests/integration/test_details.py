"""details.json, per_query.csv and calibration.json, and tools/match.py, which reads the last."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engine.details import load_calibration, save_calibrations
from engine.scoring.intervals import Access, read_queries
from engine.scoring.verification import BINS, Calibration, threshold_of
from tests.fixtures import tiny
from tools import match
from utils.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """OUTPUT_DIR of a tiny training with a validation split and EVAL.DETAILS on."""
    asked = ("EVAL.DETAILS", "on", "TEST.RE_RANKING", "on")
    with tiny.tiny_backbone():
        yield tiny.run(tmp_path_factory.mktemp("details"), *asked)


def test_details_agree_with_the_results(trained: Path) -> None:
    details = json.loads((trained / "details.json").read_text("utf-8"))
    rows = {
        f"{row['query']}->{row['gallery']}": row
        for row in tiny.results(trained)["retrieval"]
        if row["key"] == ("right" if "protected" in (row["query"], row["gallery"]) else "none")
    }
    assert set(details) == set(rows)
    for name, found in details.items():
        interval = found["retrieval"]["rank1"]
        assert interval["value"] == pytest.approx(rows[name]["rank1"])
        assert interval["low"] <= interval["value"] <= interval["high"]
    with (trained / "per_query.csv").open(encoding="utf-8", newline="") as file:
        queries = list(csv.DictReader(file))
    for name, row in rows.items():
        mine = [query for query in queries if query["direction"] == name]
        assert len(mine) == row["num_queries"]
        first = [int(query["first_rank"]) == 1 for query in mine]
        assert sum(first) / len(first) == pytest.approx(row["rank1"])
        assert all(Path(query["path"]).is_file() for query in mine)
        assert all(Path(query["path"]).parent.name.endswith("query") for query in mine)
        assert all(
            Path(query["path"]).name.startswith(f"{int(query['pid']):04d}_") for query in mine
        )


def test_details_record_how_protected_images_were_read(trained: Path, tmp_path: Path) -> None:
    plan = ("TEST.EVALUATE_ONLY", "on", "EVAL.DETAILS", "on", "TEST.RETRIEVE_WITH_KEY", "off")
    start = ("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(trained))
    with tiny.tiny_backbone():
        test = tiny.run(tmp_path, *plan, *start, "ISED.SCHEME", "aead", output="test")
    states = {trained: ("right", "additive"), test: ("ciphertext", "aead")}
    for folder, (key, scheme) in states.items():
        details = json.loads((folder / "details.json").read_text("utf-8"))
        table = read_queries(folder)
        assert table.access == Access(key, scheme)
        for name, found in details.items():
            encrypted = "protected" in name
            expected = (key, scheme) if encrypted else ("none", "none")
            assert (found["key"], found["scheme"]) == expected
        log = (folder / "log.txt").read_text("utf-8")
        assert f"protected images: key {key}, scheme {scheme}\n95 % intervals over people" in log


def test_re_ranked_rates_have_intervals_too(trained: Path) -> None:
    details = json.loads((trained / "details.json").read_text("utf-8"))
    checked = 0
    for row in tiny.results(trained)["retrieval_reranked"]:
        found = details[f"{row['query']}->{row['gallery']}"]
        if row["key"] == found["key"]:
            checked += 1
            for score in ("rank1", "rank5", "rank10", "mAP", "mINP"):
                interval = found["reranked"][score]
                assert interval["value"] == pytest.approx(row[score])
                assert interval["low"] <= interval["value"] <= interval["high"]
    assert checked == 4
    assert (trained / "log.txt").read_text("utf-8").count("\n    re-ranked ") == 4


@pytest.fixture
def images() -> list[str]:
    """Two images of the synthetic set, of different identities."""
    folder = next(Path(tiny.arguments(Path(), output="x")[_root_place()]).glob("synthetic*"))
    found = sorted((folder / "query").glob("*.jpg"))
    return [str(found[0]), str(found[-1])]


def _root_place() -> int:
    return tiny.arguments(Path()).index("DATASETS.ROOT_DIR") + 1


def test_match_uses_the_threshold_of_validation(
    trained: Path, images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = json.loads((trained / "calibration.json").read_text("utf-8"))
    arguments = [*images, "--checkpoint", str(trained), "--device", "cpu"]
    code = match.main(arguments)
    printed = capsys.readouterr().out
    assert f"threshold {calibration['raw->raw']['threshold']:.4f}" in printed
    assert ("not the same person" in printed) == (code == 1)
    assert match.main([*arguments, "--json"]) == code
    content = json.loads(capsys.readouterr().out)
    assert content["threshold"] == float(calibration["raw->raw"]["threshold"])
    assert content["same_person"] == (content["similarity"] >= content["threshold"])


def test_an_image_matches_itself(trained: Path, images: list[str]) -> None:
    same = [images[0], images[0], "--checkpoint", str(trained), "--device", "cpu"]
    assert match.main([*same, "--threshold", "0.999"]) == 0
    assert match.main([*same, "--threshold", str(threshold_of(BINS + 1))]) == 1


def test_match_without_calibration_explains_what_to_do(
    trained: Path, images: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert match.main([*images, "--checkpoint", str(tmp_path)]) == 2
    assert "--threshold" in capsys.readouterr().err
    missing = [images[0], "no-such.jpg", "--checkpoint", str(trained), "--device", "cpu"]
    assert match.main([*missing, "--threshold", "0.5"]) == 2
    assert "no-such.jpg does not exist; expected an image" in capsys.readouterr().err


def test_an_unexpected_error_does_not_mean_another_person(
    images: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def defect(*_: object, **__: object) -> None:
        raise RuntimeError("a defect of the driver")

    monkeypatch.setattr(match.Anonymizer, "from_checkpoint", defect)
    assert match.main([*images, "--checkpoint", str(tmp_path), "--threshold", "0.5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "a defect of the driver" in error


def test_match_explains_the_threshold_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        match.main(["a", "b", "--checkpoint", "c", "--threshold", "1.5"])
    assert exit_info.value.code == 2
    assert "got '1.5', expected a cosine from -1 to 1; " in capsys.readouterr().err


@pytest.mark.parametrize("threshold", ["NaN", "Infinity", "7", '"high"'])
def test_a_damaged_threshold_is_refused(tmp_path: Path, threshold: str) -> None:
    """With NaN no two images would match."""
    calibration = Calibration(0.5, 0.001, 0.001, 0.8, 10, 1000)
    save_calibrations({"raw->raw": calibration}, tmp_path)
    assert load_calibration(tmp_path, "raw", "raw") == calibration
    text = (tmp_path / "calibration.json").read_text("utf-8")
    content = text.replace('"threshold": 0.5', f'"threshold": {threshold}')
    (tmp_path / "calibration.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="has no threshold for raw->raw; set it"):
        load_calibration(tmp_path, "raw", "raw")


def test_match_refuses_a_sealed_image(
    trained: Path, images: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chunk = PngInfo()
    chunk.add(b"isEd", bytes(360))
    sealed = tmp_path / "sealed.png"
    Image.new("RGB", (64, 128)).save(sealed, pnginfo=chunk)
    arguments = [images[0], str(sealed), "--checkpoint", str(trained), "--device", "cpu"]
    assert match.main([*arguments, "--kinds", "raw", "protected"]) == 2
    assert "sealed.png is sealed; open it first" in capsys.readouterr().err


def test_match_names_a_file_that_is_not_an_image(
    trained: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message does not suggest to skip the image, because match.py has no such option."""
    letter = tmp_path / "letter.jpg"
    letter.write_text("dear sir", encoding="utf-8")
    arguments = [str(letter), images[0], "--checkpoint", str(trained), "--threshold", "0.5"]
    assert match.main(arguments) == 2
    error = capsys.readouterr().err
    assert error == f"error: {letter}: the file is not an image; use another copy of the image\n"
