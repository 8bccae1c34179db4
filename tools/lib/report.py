"""One self-contained HTML page about runs, made from the files in their output folders.

Every section appears only if the folder contains what it needs, so that the page can be made from
a training, an evaluation, an attack, or an older run. The page loads nothing: charts are inline SVG
and images are embedded as PNG.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from configs.defaults import KEY_BY_NAME
from configs.published import STRENGTHS, published_rank1
from engine.results import DIRECTIONS, IMAGE_KINDS, RESULTS_NAME
from engine.supervision import UpgradePolicy, Validation
from utils.errors import UserError
from utils.files import write_text
from utils.metric_writer import read_metrics

REPORT_NAME = "report.html"
MAX_IMAGE_BYTES = 3_500_000  # of all embedded images, so that a page stays below 5 MB

_NAMES = tuple("->".join(direction) for direction in DIRECTIONS)
_KEYS = ("right", "wrong", "ciphertext")
_ATTACKS = "attacks"
# Colours that readers with any kind of colour vision can tell apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Matplotlib writes this colour for text and axes; the page replaces it by the colour of its theme.
_INK = "#010203"
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class RunFiles:
    """What an output folder contains.

    Attributes:
        folder: The folder.
        config: Values by dotted key, as ``config.yml`` records them.
        results: Content of ``results.json``; empty without an evaluation.
        details: Content of ``details.json``; empty without EVAL.DETAILS.
        metrics: Records of ``metrics.jsonl``, in order.
        attacks: Content of the attacks' ``results.json``; empty without attacks.
        attack_folder: Where that file is.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    attacks: Mapping[str, Any] = field(default_factory=dict)
    attack_folder: Path | None = None

    @property
    def dataset(self) -> str:
        """The data set's name, or '' if no file contains it."""
        settings = self.attacks.get("settings", {})
        names = self.config.get("DATASETS.NAMES") or settings.get("DATASETS.NAMES")
        return str(self.results.get("dataset") or names or "")

    @property
    def shows_real_people(self) -> bool:
        """Whether the images of this run may show real people: all but the synthetic set do."""
        return self.dataset.removesuffix("_val") != "synthetic"


def read_run(folder: Path) -> RunFiles:
    """Read the files of a training, an evaluation or an attack.

    Args:
        folder: Its output folder. Attacks may be in the folder itself or in ``attacks`` below it.

    Raises:
        UserError: The folder contains none of these files, or one is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected the output folder of a run")
    config = _read_config(folder / "config.yml")
    results = _read_json(folder / RESULTS_NAME)
    attack_folder = folder if "settings" in results else folder / _ATTACKS
    attacks = _read_json(attack_folder / RESULTS_NAME)
    if attack_folder == folder:
        results = {}
    metrics = read_metrics(folder / "metrics.jsonl")
    if not (results or metrics or attacks):
        raise UserError(
            f"{folder} contains no {RESULTS_NAME} and no metrics.jsonl; expected the output folder "
            "of a training, an evaluation or an attack"
        )
    details = _read_json(folder / "details.json")
    return RunFiles(
        folder, config, results, details, metrics, attacks, attack_folder if attacks else None
    )


def write_report(
    folders: Sequence[Path], path: Path, *, with_images: bool = False, title: str = ""
) -> Path:
    """Write one page about one or more runs.

    Args:
        folders: Output folders, in the order of the page.
        path: The HTML file; replaced if it exists.
        with_images: Whether images of real people are embedded.
        title: Heading of the page; by default the names of the folders.

    Raises:
        UserError: A folder contains no run, or a damaged file.
    """
    runs = [read_run(folder) for folder in folders]
    budget = _ImageBudget(MAX_IMAGE_BYTES, with_images=with_images)
    sections = []
    for run in runs:
        try:
            sections.append(_section(run, budget))
        except _DAMAGED as error:
            raise UserError(
                f"a file in {run.folder} does not have the expected content ({error!r}); "
                "evaluate or attack again"
            ) from error
    names = ", ".join(run.folder.name or str(run.folder) for run in runs)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=title or f"SecureReID: {names}", runs=sections, directions=_NAMES
    )
    write_text(path, page)
    return path


def _section(run: RunFiles, budget: _ImageBudget) -> dict[str, Any]:
    """Return everything that the template shows about one run."""
    directions = _directions(run)
    published = _published(run)
    for row, rate in zip(directions, published, strict=False):
        row["published"] = f"{100 * rate:.1f}"
    strips, ranked, attack_images = _images(run, budget)
    config = _config_rows(run.config)
    return {
        "name": run.folder.name or str(run.folder),
        "folder": str(run.folder),
        "summary": _summary(run),
        "notes": [*_notes(run), *budget.notes_of(run)],
        "subtitle": _subtitle(run),
        "directions": directions,
        "has_intervals": bool(run.details),
        "has_published": bool(published and directions),
        "key_states": _key_states(run),
        "caution": _caution(run),
        "quality": _quality(run),
        "cmc": _cmc_chart(run),
        "strips": strips,
        "ranked": ranked,
        "timeline": _timeline(run),
        "curves": _curves(run),
        "attacks": _attack_table(run.attacks),
        "attack_images": attack_images,
        "environment": sorted((run.results or run.attacks).get("versions", {}).items()),
        "config": config,
        "num_changed": sum(key["changed"] for key in config),
    }


# ---- text


def _summary(run: RunFiles) -> str:
    """Return two sentences: what re-ID reaches, and what privacy costs or attackers achieve."""
    if not run.results:
        return _attack_summary(run) if run.attacks else _training_summary(run)
    rows = {row["query"] + "->" + row["gallery"]: row for row in _headline_rows(run)}
    both, crossed, raw = (
        f"{100 * rows[name]['rank1']:.1f} %"
        for name in ("protected->protected", "raw->protected", "raw->raw")
    )
    first = (
        f"The network ranks the right identity first for {crossed} of raw queries in a protected "
        f"gallery and for {both} if both sides are protected; with raw images only it is {raw}."
    )
    quality = run.results["image_quality"]
    stored = "anonymized" if "anonymized" in quality else "desensitized"
    second = f"Stored images differ from the original by {_db(quality[stored])}"
    if stored == "anonymized":
        second += f" (the conventional method: {_db(quality['desensitized'])})"
    if "recovered" in quality:
        second += f", and the holder of the key recovers images at {_db(quality['recovered'])}"
    return f"{first} {second}."


def _db(quality: Mapping[str, Any]) -> str:
    """Return a PSNR with its unit; null stands for equal images."""
    psnr_db = quality["psnr_db"]
    return "no error (equal images)" if psnr_db is None else f"{psnr_db:.1f} dB PSNR"


def _attack_summary(run: RunFiles) -> str:
    results = [result for result in run.attacks["results"] if result["applies"]]
    by_level: dict[str, list[str]] = {}
    for result in results:
        by_level.setdefault(result["level"], []).append(result["verdict"])
    counts = [
        f"{level} {verdicts.count('holds')} of {len(verdicts)}"
        for level, verdicts in by_level.items()
    ]
    return (
        f"Of the attacks that apply, these many reached no more than chance: {', '.join(counts)}. "
        "A level holds only if every attack on it does."
    )


def _training_summary(run: RunFiles) -> str:
    last = run.metrics[-1]
    return f"Training reached epoch {last.get('epoch', '?')} and has not been evaluated yet."


def _subtitle(run: RunFiles) -> str:
    if not run.results:
        return ""
    split = {"val": "validation", "test": "test"}.get(run.results["split"], run.results["split"])
    counts = _headline_rows(run)[0]
    return (
        f"{run.results['dataset']}, {split} split, epoch {run.results['epoch']}: "
        f"{counts['num_queries']} queries, {counts['num_gallery']} gallery images, "
        f"key state {run.results.get('headline_key', 'none')}."
    )


def _notes(run: RunFiles) -> list[str]:
    notes = [f"{name}: {text}" for name, text in run.results.get("notes", {}).items()]
    if any(row.get("degenerate") for row in run.results.get("retrieval", ())):
        notes.append("Some embeddings are constant: their scores mean nothing.")
    return notes


def _caution(run: RunFiles) -> str:
    """Return a warning if wrong keys find identities: the published cipher's own pattern."""
    if run.config.get("ISED.SCHEME", "additive") != "additive" or not run.results:
        return ""
    if not any(row["key"] in ("wrong", "ciphertext") for row in run.results["retrieval"]):
        return ""
    return (
        "The published additive scheme adds the same pad to all images of an identity. High rates "
        "without the right key are this leak, not re-ID."
    )


# ---- tables


def _headline_rows(run: RunFiles) -> list[dict[str, Any]]:
    """Return one row of results.json for each direction, under the key state of the headline."""
    wanted = run.results.get("headline_key", "none")
    rows = {(r["query"], r["gallery"], r["key"]): r for r in run.results["retrieval"]}
    return [dict(rows.get((*way, wanted)) or rows[(*way, "none")]) for way in DIRECTIONS]


def _directions(run: RunFiles) -> list[dict[str, str]]:
    if not run.results:
        return []
    table = []
    for name, row in zip(_NAMES, _headline_rows(run), strict=True):
        intervals = run.details.get(name, {}).get("retrieval", {})
        table.append(
            {
                "name": name,
                "rank1": _percent(row["rank1"]),
                "rank5": _percent(row["rank5"]),
                "rank10": _percent(row["rank10"]),
                "map": _percent(row["mAP"]),
                "minp": _percent(row["mINP"]),
                "rank1_interval": _interval(intervals.get("rank1")),
                "map_interval": _interval(intervals.get("mAP")),
                "published": "",
            }
        )
    return table


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _interval(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    return f"[{_percent(interval['low'])}, {_percent(interval['high'])}]"


def _published(run: RunFiles) -> tuple[float, ...]:
    """Return the published rank-1 if the networks, data and desensitizer are the published ones."""
    config, kind = run.config, run.config.get("INPUT.TYPE", "")
    as_published = (
        run.results.get("split") == "test"
        and config.get("MODEL.NAME") == KEY_BY_NAME["MODEL.NAME"].default
        and config.get("INPUT.RADIUS") == STRENGTHS.get(kind)
    )
    if not as_published:
        return ()
    method = "base" if config.get("MODEL.MODE") == "C" else "full"
    if method == "full" and not math.isfinite(float(config.get("MODEL.VAL_R1", math.inf))):
        method = "without"
    return published_rank1(run.dataset, method, kind) or ()


def _key_states(run: RunFiles) -> dict[str, Any] | None:
    rows = {
        (row["query"] + "->" + row["gallery"], row["key"]): row
        for row in run.results.get("retrieval", ())
    }
    keys = [key for key in _KEYS if any(name_key[1] == key for name_key in rows)]
    if not keys:
        return None
    return {
        "states": keys,
        "rows": [
            {"name": name, "cells": [_key_cell(rows.get((name, key))) for key in keys]}
            for name in _NAMES[1:]
        ],
    }


def _key_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    cell = f"{_percent(row['rank1'])} / {_percent(row['mAP'])}"
    return f"{cell} (refused)" if row.get("refused") else cell


def _quality(run: RunFiles) -> list[dict[str, str]]:
    qualities = run.results.get("image_quality", {})
    return [
        {
            "kind": kind,
            "psnr": "equal" if quality["psnr_db"] is None else f"{quality['psnr_db']:.1f}",
            "ssim": "-" if quality["ssim"] is None else f"{quality['ssim']:.3f}",
        }
        for kind in IMAGE_KINDS
        if (quality := qualities.get(kind))
    ]


def _attack_table(attacks: Mapping[str, Any]) -> dict[str, Any] | None:
    if not attacks:
        return None
    results = attacks["results"]
    levels = list(dict.fromkeys(result["level"] for result in results))
    names = list(dict.fromkeys(result["attack"] for result in results))
    cells = {(result["attack"], result["level"]): result for result in results}
    sentences = [
        {
            "name": name,
            "lines": [
                {"level": level, "text": f"{result['verdict']}. {result['sentence']}"}
                for level in levels
                if (result := cells.get((name, level)))
            ],
        }
        for name in names
    ]
    rows = [
        {"name": name, "cells": [_verdict_cell(cells.get((name, level))) for level in levels]}
        for name in names
    ]
    return {"levels": levels, "rows": rows, "sentences": sentences}


def _verdict_cell(result: Mapping[str, Any] | None) -> dict[str, str]:
    if result is None or not result["applies"]:
        return {"text": "-", "style": "unused"}
    verdict = result["verdict"]
    return {"text": verdict, "style": verdict if verdict in ("holds", "fails") else "unused"}


def _config_rows(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every key with its value and default, changed keys first."""
    rows = []
    for name, value in config.items():
        key = KEY_BY_NAME.get(name)
        default = key.default if key else ""
        changed = key is None or not _same(value, default)
        rows.append(
            {"name": name, "value": str(value), "default": str(default), "changed": changed}
        )
    return sorted(rows, key=lambda row: not row["changed"])


def _same(value: Any, default: Any) -> bool:
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        return list(value) == list(default)
    return bool(value == default)


# ---- charts


def _svg(figure: Figure, salt: str) -> str:
    """Return a figure as inline SVG whose text and axes take the colour of the page."""
    stream = io.StringIO()
    # The salt keeps the identifiers of several charts on one page apart.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(stream, format="svg", transparent=True, bbox_inches="tight")
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return text


def _axes(title: str, label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 2.8))
    axes = figure.add_subplot()
    axes.set_title(title, color=_INK, fontsize=10, loc="left")
    axes.set_xlabel(label, color=_INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=_INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(side in ("left", "bottom"))
    axes.grid(visible=True, color="#8a929c", alpha=0.3, linewidth=0.5)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, labelcolor=_INK)


def _cmc_chart(run: RunFiles) -> str:
    curves = {
        name: direction["retrieval"]["cmc"]
        for name in _NAMES
        if (direction := run.details.get(name))
    }
    if not curves:
        return ""
    figure, axes = _axes("CMC: matches among the first k gallery images (%)", "k")
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
        shown = curve[:20]
        ranks = range(1, len(shown) + 1)
        axes.plot(ranks, [100 * rate for rate in shown], label=name, color=colour)
    axes.set_ylim(0, 102)
    _legend(axes)
    return _svg(figure, f"{run.folder}-cmc")


_CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Total loss", ("loss/total",)),
    ("Image losses (L1)", ("loss/anonymization", "loss/recovery")),
    (
        "Identity losses (cross-entropy)",
        ("loss/reid_raw_cross_entropy", "loss/reid_protected_cross_entropy"),
    ),
    ("Adversarial losses", ("loss/gan_anonymized", "loss/gan_recovered")),
    ("Accuracy on training batches", ("train/accuracy",)),
    ("Learning rate", ("train/learning_rate",)),
)


def _curves(run: RunFiles) -> list[str]:
    """Return loss and learning-rate curves, a point for each epoch."""
    charts = []
    for title, names in _CURVES:
        series = {name: points for name in names if (points := _by_epoch(run.metrics, name))}
        if not series:
            continue
        figure, axes = _axes(title, "epoch")
        for (name, points), colour in zip(series.items(), _COLOURS, strict=False):
            label = name.split("/")[1].replace("_", " ")
            axes.plot(list(points), list(points.values()), label=label, color=colour)
        if len(series) > 1:
            _legend(axes)
        charts.append(_svg(figure, f"{run.folder}-{title}"))
    return charts


def _by_epoch(metrics: Iterable[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Return the mean of a metric in each epoch."""
    values: dict[int, list[float]] = {}
    for record in metrics:
        value = record.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            values.setdefault(int(record["epoch"]), []).append(float(value))
    return {epoch: sum(numbers) / len(numbers) for epoch, numbers in sorted(values.items())}


# ---- supervision upgradation


def _timeline(run: RunFiles) -> dict[str, Any] | None:
    """Return the validations of the joint model against the thresholds of upgradation."""
    names = {
        "rank1": "eval/raw->protected/rank1",
        "psnr": "privacy/anonymized/psnr",
        "psnr_desensitized": "privacy/desensitized/psnr",
        "ssim": "privacy/anonymized/ssim",
        "ssim_desensitized": "privacy/desensitized/ssim",
    }
    series = {key: _by_epoch(run.metrics, name) for key, name in names.items()}
    epochs = sorted(set.intersection(*(set(points) for points in series.values())))
    if not epochs:
        return None
    config = run.config
    policy = UpgradePolicy(
        float(config.get("MODEL.VAL_R1", math.inf)),
        float(config.get("MODEL.VAL_R1_SLACK", 0.05)),
        float(config.get("MODEL.PSNR", 1.0)),
        float(config.get("MODEL.SSIM", 0.05)),
    )
    count, in_force = (
        _by_epoch(run.metrics, "upgrade/count"),
        _by_epoch(run.metrics, "upgrade/in_force"),
    )
    rows, upgrades, last_count = [], [], 0.0
    for epoch in epochs:
        validation = Validation(
            series["rank1"][epoch],
            series["psnr"][epoch],
            series["psnr_desensitized"][epoch],
            series["ssim"][epoch],
            series["ssim_desensitized"][epoch],
        )
        upgraded = count.get(epoch, last_count) > last_count
        last_count = count.get(epoch, last_count)
        if upgraded:
            upgrades.append(epoch)
        rows.append(
            {
                "epoch": epoch,
                "rank1": _percent(validation.rank1),
                "psnr": f"{validation.psnr_anonymized_db:.2f}",
                "ssim": f"{validation.ssim_anonymized:.3f}",
                "decision": _decision(policy, validation, upgraded, bool(in_force.get(epoch))),
            }
        )
    return {
        "sentence": _timeline_sentence(policy, upgrades, len(epochs)),
        "charts": _timeline_charts(run, series, epochs, policy, upgrades),
        "rows": rows,
    }


def _decision(policy: UpgradePolicy, validation: Validation, upgraded: bool, in_force: bool) -> str:
    if not policy.enabled:
        return "upgradation is off"
    reasons = []
    if not policy.good_enough(validation):
        reasons.append(f"rank-1 is not above {_percent(policy.rank1 - policy.rank1_slack)} %")
    if not policy.private_enough(validation):
        reasons.append("images are too close to the original")
    if reasons:
        return f"does not qualify: {', '.join(reasons)}; target: desensitized images"
    if upgraded:
        return "qualifies with the best rank-1 so far: this anonymizer becomes the target"
    kept = "the frozen anonymizer stays the target" if in_force else "target: desensitized images"
    return f"qualifies, but not with the best rank-1; {kept}"


def _timeline_sentence(policy: UpgradePolicy, upgrades: Sequence[int], num: int) -> str:
    if not policy.enabled:
        return "Supervision upgradation was off (MODEL.VAL_R1 is inf): the target never changed."
    if not upgrades:
        return f"None of {num} validations qualified, so the target never changed."
    epochs = (
        f"epochs {', '.join(map(str, upgrades))}" if len(upgrades) > 1 else f"epoch {upgrades[0]}"
    )
    return f"The anonymizer's own output became the target at {epochs}."


def _timeline_charts(
    run: RunFiles,
    series: Mapping[str, Mapping[int, float]],
    epochs: Sequence[int],
    policy: UpgradePolicy,
    upgrades: Sequence[int],
) -> list[str]:
    needed = policy.rank1 - policy.rank1_slack
    panels = (
        ("Rank-1, raw->protected (%): above the line", "rank1", 100.0, [needed] * len(epochs)),
        (
            "PSNR of anonymized images (dB): below the line",
            "psnr",
            1.0,
            [series["psnr_desensitized"][e] + policy.psnr_margin_db for e in epochs],
        ),
        (
            "SSIM of anonymized images: below the line",
            "ssim",
            1.0,
            [series["ssim_desensitized"][e] + policy.ssim_margin for e in epochs],
        ),
    )
    charts = []
    for title, name, scale, limit in panels:
        figure, axes = _axes(title, "epoch")
        values = [scale * series[name][epoch] for epoch in epochs]
        axes.plot(epochs, values, color=_COLOURS[0], marker=".", label="validation")
        if policy.enabled:
            line = [scale * value for value in limit]
            axes.plot(epochs, line, color=_COLOURS[1], linestyle="--", label="threshold")
        if upgrades:
            marked = [scale * series[name][epoch] for epoch in upgrades]
            axes.plot(upgrades, marked, "*", color=_COLOURS[2], markersize=12, label="upgraded")
        _legend(axes)
        charts.append(_svg(figure, f"{run.folder}-upgrade-{name}"))
    return charts


# ---- images


class _ImageBudget:
    """Embeds images until a page is full; counts those that are left out, with the reason."""

    def __init__(self, num_bytes: int, *, with_images: bool) -> None:
        self._left = num_bytes
        self._with_images = with_images
        self._hidden: dict[Path, int] = {}
        self._too_large: dict[Path, int] = {}

    def embed(self, run: RunFiles, path: Path, caption: str) -> list[dict[str, str]]:
        """Return the image as a list of one entry for the template, or an empty list."""
        if not path.is_file():
            return []
        if run.shows_real_people and not self._with_images:
            self._hidden[run.folder] = self._hidden.get(run.folder, 0) + 1
            return []
        encoded = base64.b64encode(path.read_bytes()).decode("ascii")
        if len(encoded) > self._left:
            self._too_large[run.folder] = self._too_large.get(run.folder, 0) + 1
            return []
        self._left -= len(encoded)
        return [{"source": f"data:image/png;base64,{encoded}", "caption": caption}]

    def notes_of(self, run: RunFiles) -> list[str]:
        """Return a note for each reason why images of this run were left out."""
        notes = []
        if hidden := self._hidden.get(run.folder):
            notes.append(
                f"{hidden} images were left out because they may show real people; "
                "--with-images includes them."
            )
        if large := self._too_large.get(run.folder):
            notes.append(f"{large} images were left out because the page would exceed 5 MB.")
        return notes


def _images(
    run: RunFiles, budget: _ImageBudget
) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """Return strips of the stages, ranked lists, and what attackers see."""
    strips = budget.embed(
        run, run.folder / "pictures.png", "The stages of some test or validation images."
    )
    ranked = []
    for path in sorted(run.folder.glob("ranks_*.png")):
        query, _, gallery = path.stem.removeprefix("ranks_").partition("-")
        ranked += budget.embed(run, path, f"{query} queries in the {gallery} gallery")
    shown = []
    if run.attack_folder is not None:
        for path in sorted(run.attack_folder.glob("*_images.png")):
            attack = path.stem.removesuffix("_images")
            shown += budget.embed(run, path, f"{attack}: what the attacker sees")
    return strips, ranked, shown


# ---- files


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it does not exist."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it or make it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not contain a JSON object; delete it or make it again")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    """Return the values of a config.yml by dotted key; empty if it does not exist."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a valid configuration ({error})") from None
    return dict(_flat(content or {}, ""))


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
