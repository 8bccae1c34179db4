"""Reports of runs: what the page contains, what it leaves out, and how a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from configs import loading
from configs.defaults import default_config
from tools import report
from tools.lib.report import write_report
from tools.lib.report_charts import validation_chart
from tools.lib.run import PUBLISHED_CONFIG
from tools.lib.run_files import read_run
from utils.errors import UserError

WAYS = (("raw", "raw"), ("raw", "protected"), ("protected", "raw"), ("protected", "protected"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def retrieval_row(query: str, gallery: str, key: str, rank1: float) -> dict[str, Any]:
    rates = {"rank1": rank1, "rank5": 0.9, "rank10": 0.95, "mAP": 0.5, "mINP": 0.25}
    return {
        "query": query,
        "gallery": gallery,
        "key": key,
        **rates,
        "num_queries": 8,
        "num_gallery": 32,
    }


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the charts empty: drawing them takes most of the time."""
    monkeypatch.setattr("tools.lib.report_charts._svg", lambda *_: "")


@pytest.fixture
def run(tmp_path: Path, no_charts: None) -> Path:
    """Return the output folder of a joint training with an evaluation and attacks."""
    folder = tmp_path / "full"
    make_run(folder)
    return folder


def make_run(folder: Path, dataset: str = "synthetic", **config: object) -> None:
    folder.mkdir()
    rows = [retrieval_row("raw", "raw", "none", 0.875)]
    rows += [
        retrieval_row(*way, key, 0.75 if key == "right" else 0.125)
        for key in ("right", "wrong", "ciphertext")
        for way in WAYS[1:]
    ]
    results = {
        "dataset": dataset, "split": "test", "mode": "GCR", "epoch": 4, "retrieval": rows,
        "headline_key": "right", "notes": {"weights": "best"}, "versions": {"torch": "2.14"},
        "image_quality": {
            "desensitized": {"psnr_db": 15.5, "ssim": 0.4},
            "anonymized": {"psnr_db": 14.25, "ssim": 0.35},
            "recovered": {"psnr_db": 24.5, "ssim": 0.75},
        },
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    interval = {"value": 0.75, "low": 0.625, "high": 0.8125}
    retrieval = {"rank1": interval, "mAP": interval, "cmc": [0.75, 0.875, 1.0]}
    (folder / "details.json").write_text(
        json.dumps({"->".join(way): {"retrieval": retrieval} for way in WAYS})
    )
    values = default_config()
    values.MODEL.VAL_R1, values.DATASETS.NAMES = 0.5, dataset
    values.SOLVER.STEPS = list(values.SOLVER.STEPS)
    for name, value in config.items():
        section, _, leaf = name.partition("__")
        values[section][leaf] = value
    (folder / "config.yml").write_text(values.dump())
    lines = []
    # (epoch, rank-1, PSNR, upgrades so far, in force): too weak, upgraded, too close, kept
    for epoch, rank1, psnr, count, in_force in (
        (1, 0.25, 14.0, 0, 0), (2, 0.75, 14.0, 1, 1), (3, 0.8, 19.0, 1, 0), (4, 0.7, 14.0, 1, 1),
    ):  # fmt: skip
        lines += [
            {"epoch": epoch, "step": epoch, "loss/total": 10.0 / epoch},
            {
                "epoch": epoch, "step": epoch,
                **{f"eval/{'->'.join(way)}/rank1": rank1 for way in WAYS},
                "privacy/anonymized/psnr": psnr, "privacy/desensitized/psnr": 15.0,
                "privacy/anonymized/ssim": 0.3, "privacy/desensitized/ssim": 0.4,
                "upgrade/count": float(count), "upgrade/in_force": float(in_force),
            },
        ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (24, 48), (200, 40, 40)).save(folder / "pictures.png")
    attacks = folder / "attacks"
    attacks.mkdir()
    (attacks / "results.json").write_text(
        json.dumps(
            {
                "settings": {"DATASETS.NAMES": dataset},
                "versions": {"torch": "2.14"},
                "results": [
                    verdict("linkage", "raw", "not applicable"),
                    verdict("linkage", "additive", "fails"),
                    verdict("linkage", "aead", "holds"),
                ],
            }
        )
    )
    Image.new("RGB", (24, 48), (40, 40, 200)).save(attacks / "linkage_images.png")


def verdict(attack: str, level: str, text: str) -> dict[str, Any]:
    return {
        "attack": attack, "level": level, "verdict": text, "applies": text != "not applicable",
        "sentence": f"<b>{attack}</b> on {level}",
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of one run with everything in it."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    make_run(folder)
    return page_of(folder)


def page_of(*folders: Path, **options: bool) -> str:
    path = folders[0].parent / "report.html"
    return write_report(folders, path, **options).read_text("utf-8")


def text_of(page: str) -> str:
    """Return what a reader sees, without tags, styles and charts."""
    without = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", without)).split())


def test_it_contains_scores_with_intervals_and_a_summary(whole_page: str) -> None:
    text = text_of(whole_page)
    assert "right identity first for 75.0 % of raw queries in a protected gallery" in text
    assert "recovers images at 24.5 dB" in text
    assert "raw->protected 75.0 [62.5, 81.2] 90.0 95.0 50.0" in text
    assert "protected->protected 75.0 / 50.0 12.5 / 50.0 12.5 / 50.0" in text  # by key state
    assert "anonymized 14.2 0.350" in text


def test_the_timeline_gives_each_decision_with_its_reason(whole_page: str) -> None:
    text = text_of(whole_page)
    assert "The anonymizer's own output became the target at epoch 2." in text
    assert "1 25.0 14.00 0.300 does not qualify: rank-1 is not above 45.0 %" in text
    assert "2 75.0 14.00 0.300 qualifies with the best rank-1 so far" in text
    assert "3 80.0 19.00 0.300 does not qualify: images are too close" in text
    kept = "4 70.0 14.00 0.300 qualifies, but not with the best rank-1; target: "
    assert f"{kept}the anonymizer of epoch 2" in text


@pytest.mark.usefixtures("no_charts")
def test_the_timeline_names_a_moving_average_as_the_target(tmp_path: Path) -> None:
    make_run(tmp_path / "run", MODEL__TEACHER_EMA=0.5)
    text = text_of(page_of(tmp_path / "run"))
    assert "at epoch 2. It then followed the anonymizer as a moving average (decay 0.5)." in text
    average = "the moving average that began with the anonymizer of epoch 2"
    assert f"qualifies, but not with the best rank-1; target: {average}" in text


def test_attacks_have_verdicts_and_their_text_is_escaped(whole_page: str) -> None:
    text = text_of(whole_page)
    assert "linkage - fails holds" in text
    assert "&lt;b&gt;linkage&lt;/b&gt; on aead" in whole_page


def test_changed_keys_come_first(whole_page: str) -> None:
    text = text_of(whole_page)
    assert text.index("MODEL.VAL_R1 0.5 inf") < text.index("MODEL.DEVICE auto auto")


@pytest.mark.usefixtures("no_charts")
def test_published_numbers_stand_next_to_runs_of_the_published_configuration(
    tmp_path: Path,
) -> None:
    training = tmp_path / "training"
    values = ["INPUT.TYPE", "mosaic", "INPUT.RADIUS", "24.0", "MODEL.VAL_R1", "0.75"]
    values += ["SOLVER.SEED", "3", "DATASETS.ROOT_DIR", "D"]
    trained = [*values, "DATASETS.NAMES", "market1501_val", "OUTPUT_DIR", str(training)]
    values += ["TEST.EVALUATE_ONLY", "on", "DATASETS.NAMES", "market1501"]
    values += ["MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(training)]

    def page(trained: list[str], tested: list[str]) -> str:
        folder = tmp_path / "test"
        shutil.rmtree(folder, ignore_errors=True)
        make_run(folder, "market1501")
        loading.dump(loading.load(PUBLISHED_CONFIG, tested), folder / "config.yml")
        if trained:
            loading.dump(loading.load(PUBLISHED_CONFIG, trained), training / "config.yml")
        return text_of(page_of(folder))

    published = "raw->raw 87.5 [62.5, 81.2] 90.0 95.0 50.0 [62.5, 81.2] 25.0 89.4"
    assert published in page([], values)  # published weights have no config.yml
    assert published in page(trained, values)
    assert published in page(trained, [*values, "EVAL.DETAILS", "on", "TEST.IMS_PER_BATCH", "8"])
    for key, value in (
        ("INPUT.RADIUS", "12"), ("MODEL.VAL_R1", "inf"), ("TEST.RE_RANKING", "on"),
        ("INPUT.IMG_SIZE", "(256, 256)"), ("TEST.RETRIEVE_WITH_KEY", "off"),
    ):  # fmt: skip
        assert "published rank-1" not in page(trained, [*values, key, value])
    for key, value in (("SOLVER.MAX_EPOCHS", "60"), ("DATASETS.NAMES", "market1501")):
        assert "published rank-1" not in page([*trained, key, value], values)


def test_several_runs_are_compared(run: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "base")
    text = text_of(page_of(run, tmp_path / "base"))
    row = "87.5 / 50.0 75.0 / 50.0 75.0 / 50.0 75.0 / 50.0"
    assert f"full test {row} base test {row}" in text


def test_validations_of_several_trainings_are_drawn_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("tools.lib.report_charts._svg", lambda figure, _: figures.append(figure))
    for name in ("full", "base"):
        make_run(tmp_path / name)
    validation_chart([read_run(tmp_path / name) for name in ("full", "base")])
    (figure,) = figures
    panels = figure.get_axes()
    titles = [f"{' -> '.join(way)}, rank-1 (%)" for way in WAYS]
    assert [axes.get_title(loc="left") for axes in panels] == titles
    for axes in panels:
        curve, star, *other = axes.get_lines()
        assert np.array_equal(curve.get_xydata(), [[1, 25], [2, 75], [3, 80], [4, 70]])
        assert np.array_equal(star.get_xydata(), [[2, 75]])
        assert curve.get_label() == "full" and other[0].get_label() == "base"


def test_the_chart_is_written_as_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "full", tmp_path / "base"]
    for folder in folders:
        make_run(folder)
    chart = tmp_path / "both.svg"
    assert report.main([*map(str, folders), "--chart", str(chart)]) == 0
    root = ElementTree.parse(chart).getroot()
    assert {"full", "base", "raw -> protected, rank-1 (%)"} <= {*root.itertext()}
    assert not [element for element in root.iter() if element.tag.endswith("}date")]
    assert "currentColor" not in chart.read_text()
    assert report.main([str(folders[0]), "--chart", str(chart)]) == 2
    assert "given: 1, without validations: none" in capsys.readouterr().err
    (folders[1] / "metrics.jsonl").unlink()
    assert report.main([*map(str, folders), "--chart", str(chart)]) == 2
    assert f"given: 2, without validations: {folders[1]}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main([*map(str, folders), "--chart", str(chart), "--model-card"])


def test_scores_of_the_runs_as_json(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "base")
    page = tmp_path / "both.html"
    folders = [str(run), str(tmp_path / "base"), str(run / "attacks")]
    assert report.main([*folders, "--output", str(page), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["report"] == str(page) and page.is_file()
    assert [each["folder"] for each in content["runs"]] == folders
    assert content["runs"][1]["retrieval"]["raw->protected"]["rank1"] == 0.75
    assert content["runs"][2]["retrieval"] == {}  # attacks have no such scores


@pytest.mark.usefixtures("no_charts")
def test_images_of_real_people_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    make_run(tmp_path / "real", "folder:people")
    hidden = page_of(tmp_path / "real")
    assert "data:image/png" not in hidden
    assert "2 images were left out because they may show real people" in text_of(hidden)
    shown = page_of(tmp_path / "real", with_images=True)
    assert shown.count("data:image/png") == 2


def test_images_that_would_make_the_page_too_large_are_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (run / "pictures.png").stat().st_size
    monkeypatch.setattr("tools.lib.report.MAX_IMAGE_BYTES", 2 * size)
    page = page_of(run)
    assert page.count("data:image/png") == 1
    assert "1 images were left out because the page would exceed 5 MB" in text_of(page)


@pytest.mark.parametrize("kept", ["results.json", "metrics.jsonl", "attacks"])
def test_it_can_be_made_from_a_part_of_the_files(run: Path, kept: str) -> None:
    for path in run.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "How was it made?" in text_of(page_of(run))


def test_the_folder_of_an_attack_is_a_run(run: Path) -> None:
    files = read_run(run / "attacks")
    assert files.attacks and not files.results
    assert "of the attacks that apply" in text_of(page_of(run / "attacks")).lower()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", "{", "is not valid JSON"),
        ("results.json", "[]", "does not contain a JSON object"),
        ("results.json", '{"retrieval": []}', "does not have the expected content"),
        ("config.yml", "a: [", "is not valid YAML"),
    ],
)
def test_damaged_files_are_named(run: Path, name: str, content: str, message: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        page_of(run)


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "contains no results.json and no metrics.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_next_to_the_results(run: Path) -> None:
    assert report.main([str(run)]) == 0
    assert (run / "report.html").is_file()


def external(page: str) -> Iterator[str]:
    """Yield whatever a browser would fetch: sources, style sheets, URLs in styles."""
    for match in re.finditer(r"""(?:src|href|url\()\s*=?\s*["']?([^"'\s>)]+)""", page):
        if not match[1].startswith(("data:", "#")):
            yield match[1]


def test_the_page_refers_to_nothing_outside_itself(whole_page: str) -> None:
    assert not list(external(whole_page))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_a_browser_shows_it_without_errors_and_requests(whole_page: str, tmp_path: Path) -> None:
    probe = """<script>window.addEventListener('load', () => {
      const images = [...document.images];
      document.documentElement.setAttribute('data-seen', JSON.stringify({
        broken: images.filter(image => !image.naturalWidth).length, images: images.length,
        tables: document.querySelectorAll('table').length,
        charts: document.querySelectorAll('svg').length,
        wide: document.documentElement.scrollWidth > window.innerWidth,
        requests: performance.getEntriesByType('resource').map(entry => entry.name)
          .filter(name => !name.startsWith('data:'))}));});</script></body>"""
    probed = tmp_path / "probed.html"
    probed.write_text(whole_page.replace("</body>", probe), "utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800",
        "--enable-logging=stderr", "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout)[1]))
    assert seen == {
        "broken": 0, "images": 2, "tables": 7, "charts": 5, "wide": False, "requests": [],
    }  # fmt: skip


def test_a_model_card_has_the_scores_and_no_paths(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(run), "--model-card"]) == 0
    text = (run / "MODEL_CARD.md").read_text("utf-8")
    assert "| raw->raw | 87.5 | " in text
    assert "| anonymized | " in text
    assert "*(fill in: " in text
    assert "10.1109/TIFS.2024.3356233" in text
    assert str(run.parent) not in text
    assert "No attacks were run" not in text
    # It may have been edited, so a second call keeps it.
    assert report.main([str(run), "--model-card"]) == 2
    assert "may have been edited" in capsys.readouterr().err


def test_a_model_card_needs_one_run_with_scores(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        report.main([str(run), str(run), "--model-card"])
    (run / "results.json").unlink()
    assert report.main([str(run), "--model-card"]) == 2
    assert "a model card needs its scores" in capsys.readouterr().err
