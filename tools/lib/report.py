"""One self-contained HTML page about runs, made from the files in their output folders.

Every section appears only if the folder contains what it needs, so that the page can be made from
a training, an evaluation, an attack, or an older run. The page loads nothing: charts are inline SVG
and images are embedded as PNG.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from configs.defaults import KEY_BY_NAME
from configs.published import published_rank1
from engine.report import DIRECTIONS, IMAGE_KINDS, headline_row
from tools.lib.report_charts import (
    cmc_chart,
    percent,
    training_curves,
    upgrade_timeline,
    validation_chart,
    validations,
)
from tools.lib.run import is_as_published
from tools.lib.run_files import RunFiles, is_of_real_people, read_run
from utils.errors import UserError
from utils.files import write_text
from utils.logger import Progress, get_logger

REPORT_NAME = "report.html"
CARD_NAME = "MODEL_CARD.md"
MAX_IMAGE_BYTES = 3_500_000  # of all embedded images, so that a page stays below 5 MB

_NAMES = tuple("->".join(direction) for direction in DIRECTIONS)
_SCORES = ("rank1", "rank5", "rank10", "mAP", "mINP")
_KEYS = ("right", "wrong", "ciphertext")
_KINDS = {
    "GCR": "An anonymizer, a recovery network and a re-ID network that were trained together.",
    "C": "A re-ID network that was trained on raw and on desensitized images.",
}
_HIDDEN = "they may show real people; --with-images includes them."
_TOO_LARGE = "the page would exceed 5 MB."
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError)


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
    sections = [
        _checked_section(run, budget) for run in Progress.over(runs, "Write the report", unit="run")
    ]
    title = title or "SecureReID: " + ", ".join(section["name"] for section in sections)
    template = _template("report.html.jinja", autoescape=True)
    chart = validation_chart(runs)
    page = template.render(title=title, runs=sections, directions=_NAMES, validations=chart)
    write_text(path, page)
    return path


def write_chart(folders: Sequence[Path], path: Path) -> None:
    """Write the validation scores of several trainings as one SVG chart.

    Args:
        folders: Output folders, in the order of the legend.
        path: The file; replaced if it exists.

    Raises:
        UserError: There are fewer than two folders, one contains no validations, or a file is
            damaged.
    """
    runs = [read_run(folder) for folder in folders]
    without = [str(run.folder) for run in runs if not all(validations(run))]
    if without or len(runs) < 2:
        raise UserError(
            "--chart compares the validations of two or more trainings; "
            f"given: {len(runs)}, without validations: {', '.join(without) or 'none'}"
        )
    chart = validation_chart(runs)
    # Grey lines can be read on a light and on a dark page.
    write_text(path, chart.replace("currentColor", "#7a828c"))


def report_of_run(folder: Path) -> None:
    """Write the page of a run that has just finished, and log its path.

    If the page cannot be written, log a warning: the results are already on disk.
    """
    try:
        path = write_report([folder], folder / REPORT_NAME)
    except UserError as error:
        get_logger().warning("No report was written: %s", error)
    else:
        get_logger().info("The report is %s", path)


def write_model_card(folder: Path, path: Path) -> None:
    """Write a model card (Markdown) with the scores of a run and gaps for what only people know.

    An existing file is never replaced, because people edit it.

    Raises:
        UserError: The file exists, or the folder contains no evaluation or a damaged file.
    """
    if path.exists():
        raise UserError(f"model card {path} exists and may have been edited; give another --output")
    run = read_run(folder)
    if not run.results:
        raise UserError(f"{folder} contains no evaluation; a model card needs its scores")
    section = _checked_section(run, _ImageBudget(0, with_images=False))
    height, width = run.config.get("INPUT.IMG_SIZE", ("?", "?"))
    versions, notes = run.results.get("versions", {}), run.results.get("notes", {})
    facts = {
        "re-ID network": run.config.get("MODEL.NAME", "?"),
        "image size": f"{height} x {width}",
        "desensitized by": notes.get("desensitized by", "?"),
        "epoch": run.results["epoch"],
        "secure-reid, commit": f"{versions.get('secure-reid', '?')}, {versions.get('git', '?')}",
        "torch": versions.get("torch", "?"),
    }
    # The path of the weights does not belong into a file that is published.
    unused = ("weights: ", "desensitized by: ")
    section["notes"] = [note for note in _notes(run) if not note.startswith(unused)]
    trained_here = run.config.get("TEST.EVALUATE_ONLY") == "off"
    text = _template("model_card.md.jinja", autoescape=False).render(
        run=section,
        kind=_KINDS[run.results["mode"]],
        facts=facts.items(),
        trained_on=run.config.get("DATASETS.NAMES", "") if trained_here else "",
    )
    write_text(path, text)


def _template(name: str, *, autoescape: bool) -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _checked_section(run: RunFiles, budget: _ImageBudget) -> dict[str, Any]:
    try:
        return _section(run, budget)
    except _DAMAGED as error:
        raise UserError(
            f"a file in {run.folder} does not have the expected content ({error!r}); "
            "evaluate or attack again"
        ) from error


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
        "split": _split(run),
        "subtitle": _subtitle(run),
        "directions": directions,
        "has_intervals": bool(run.details),
        "has_published": bool(published and directions),
        "key_states": _key_states(run),
        "caution": _caution(run),
        "quality": _quality(run),
        "cmc": cmc_chart(run),
        "strips": strips,
        "ranked": ranked,
        "timeline": upgrade_timeline(run),
        "curves": training_curves(run),
        "attacks": _attack_table(run.attacks),
        "attack_images": attack_images,
        "environment": sorted((run.results or run.attacks).get("versions", {}).items()),
        "config": config,
        "num_changed": sum(key["changed"] for key in config),
    }


# ---- text


def _summary(run: RunFiles) -> str:
    """Return two sentences: what re-ID reaches, and what privacy costs or attackers achieve."""
    if run.attacks and not run.results:
        return _attack_summary(run)
    if not run.results:
        epoch = run.metrics[-1].get("epoch", "?")
        return f"Training reached epoch {epoch} and has not been evaluated yet."
    both, crossed, raw = (
        f"{100 * headline_row(run.results, *direction)['rank1']:.1f} %"
        for direction in (("protected", "protected"), ("raw", "protected"), ("raw", "raw"))
    )
    first = (
        f"The network ranks the right identity first for {crossed} of raw queries in a protected "
        f"gallery and for {both} if both sides are protected; with raw images only it is {raw}."
    )
    quality = run.results["image_quality"]
    stored = "anonymized" if "anonymized" in quality else "desensitized"
    second = f"Compared with the original, stored images have {_db(quality[stored])}"
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


def _split(run: RunFiles) -> str:
    """Return the name of the evaluated split; '' without an evaluation."""
    split = str(run.results.get("split", ""))
    return {"val": "validation"}.get(split, split)


def _subtitle(run: RunFiles) -> str:
    if not run.results:
        return ""
    counts = headline_row(run.results, "raw", "raw")
    return (
        f"{run.results['dataset']}, {_split(run)} split, epoch {run.results['epoch']}: "
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


def _directions(run: RunFiles) -> list[dict[str, str]]:
    if not run.results:
        return []
    table = []
    for name, direction in zip(_NAMES, DIRECTIONS, strict=True):
        row = headline_row(run.results, *direction)
        intervals = run.details.get(name, {}).get("retrieval", {})
        cells = {"name": name, "published": ""}
        cells |= {score.lower(): percent(row[score]) for score in _SCORES}
        for score in ("rank1", "mAP"):
            cells[f"{score.lower()}_interval"] = _interval(intervals.get(score))
        table.append(cells)
    return table


def _interval(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    return f"[{percent(interval['low'])}, {percent(interval['high'])}]"


def _published(run: RunFiles) -> tuple[float, ...]:
    """Return the published rank-1 of a test that is comparable with it."""
    config, kind = run.config, run.config.get("INPUT.TYPE", "")
    method = "base" if config.get("MODEL.MODE") == "C" else "full"
    if method == "full" and str(config.get("MODEL.VAL_R1", math.inf)) == "inf":
        method = "without"
    rates = published_rank1(run.dataset, method, kind)
    if rates is None or run.results.get("split") != "test":
        return ()
    return rates if is_as_published(run.folder, run.dataset, kind, method) else ()


def _key_states(run: RunFiles) -> dict[str, Any] | None:
    rows = {
        (row["query"] + "->" + row["gallery"], row["key"]): row
        for row in run.results.get("retrieval", ())
    }
    keys = [key for key in _KEYS if key in {key for _, key in rows}]
    if not keys:
        return None
    table = [
        {"name": name, "cells": [_key_cell(rows.get((name, key))) for key in keys]}
        for name in _NAMES[1:]
    ]
    return {"states": keys, "rows": table}


def _key_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    cell = f"{percent(row['rank1'])} / {percent(row['mAP'])}"
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
    verdicts = {cell: result["verdict"] for cell, result in cells.items() if result["applies"]}
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
        {
            "name": name,
            "cells": [
                {"text": verdicts.get(cell, "-"), "style": verdicts.get(cell, "unused")}
                for cell in ((name, level) for level in levels)
            ],
        }
        for name in names
    ]
    return {"levels": levels, "rows": rows, "sentences": sentences}


def _config_rows(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every key with its value and default, changed keys first."""
    rows = []
    for name, value in config.items():
        key = KEY_BY_NAME.get(name)
        default = key.default if key else ""
        same = key is not None and _plain(value) == _plain(default)
        rows.append(
            {"name": name, "value": str(value), "default": str(default), "changed": not same}
        )
    return sorted(rows, key=lambda row: not row["changed"])


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value  # YAML has no tuples


# ---- images


class _ImageBudget:
    """Embeds images until a page is full; counts those that are left out, with the reason."""

    def __init__(self, num_bytes: int, *, with_images: bool) -> None:
        self._left, self._with_images = num_bytes, with_images
        self._left_out: Counter[tuple[Path, str]] = Counter()  # images by folder and reason

    def embed(self, run: RunFiles, path: Path, caption: str) -> list[dict[str, str]]:
        """Return the image as a list of one entry for the template, or an empty list."""
        if not path.is_file():
            return []
        if is_of_real_people(run.dataset) and not self._with_images:
            self._left_out[run.folder, _HIDDEN] += 1
            return []
        encoded = base64.b64encode(path.read_bytes()).decode("ascii")
        if len(encoded) > self._left:
            self._left_out[run.folder, _TOO_LARGE] += 1
            return []
        self._left -= len(encoded)
        return [{"source": f"data:image/png;base64,{encoded}", "caption": caption}]

    def notes_of(self, run: RunFiles) -> list[str]:
        """Return a note for each reason why images of this run were left out."""
        counts = ((self._left_out[run.folder, reason], reason) for reason in (_HIDDEN, _TOO_LARGE))
        return [
            f"{count} images were left out because {reason}" for count, reason in counts if count
        ]


def _images(
    run: RunFiles, budget: _ImageBudget
) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """Return strips of the stages, ranked lists, and what attackers see."""
    stages = [
        path for name in ("strips.png", "pictures.png") if (path := run.folder / name).is_file()
    ]
    strips = budget.embed(run, stages[0], "The stages of some images.") if stages else []
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
