"""Charts of a report as inline SVG: curves of a training, CMC, and supervision upgradation."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.report import DIRECTIONS
from engine.supervision import UpgradePolicy, Validation
from tools.lib.run_files import RunFiles, by_epoch

# Colours that readers with any kind of colour vision can tell apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Matplotlib writes this colour for text and axes; the page replaces it by the colour of its theme.
_INK = "#010203"


def percent(rate: float) -> str:
    """Return a rate in [0, 1] as a percentage with one decimal."""
    return f"{100 * rate:.1f}"


def _svg(figure: Figure, salt: str) -> str:
    """Return a figure as inline SVG whose text and axes take the colour of the page."""
    stream = io.StringIO()
    # The salt keeps the identifiers of several charts on one page apart.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        # Without the date, the same scores give the same file.
        no_date = {"Date": None}
        figure.savefig(
            stream, format="svg", transparent=True, bbox_inches="tight", metadata=no_date
        )
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _axes(title: str, label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 2.8))
    axes = figure.add_subplot()
    _style(axes, title, label)
    return figure, axes


def _style(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, color=_INK, fontsize=10, loc="left")
    axes.set_xlabel(label, color=_INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=_INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(side in ("left", "bottom"))
    axes.grid(visible=True, color="#8a929c", alpha=0.3, linewidth=0.5)


def _legend(owner: Axes | Figure, **options: Any) -> None:
    owner.legend(fontsize=8, frameon=False, labelcolor=_INK, **options)


def validations(run: RunFiles) -> list[dict[int, float]]:
    """Return validation rank-1 by epoch, for each direction; each is empty without validations."""
    names = (f"eval/{'->'.join(direction)}/rank1" for direction in DIRECTIONS)
    return [by_epoch(run.metrics, name) for name in names]


def validation_chart(runs: Sequence[RunFiles]) -> str:
    """Return validation rank-1 of several trainings by epoch, a panel for each direction.

    Stars mark the epochs after which supervision was upgraded. Empty with fewer than two such
    trainings.
    """
    curves = [(run, validations(run)) for run in runs]
    curves = [(run, points) for run, points in curves if all(points)]
    if len(curves) < 2:
        return ""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    for axes, direction in zip(panels, DIRECTIONS, strict=True):
        _style(axes, f"{' -> '.join(direction)}, rank-1 (%)", "")
    names = [run.folder.name for run, _ in curves]
    styles = cycle(product((".-", ".--", ".:"), _COLOURS))
    for (run, points), (line, colour) in zip(curves, styles, strict=False):
        unique = names.count(run.folder.name) == 1
        label = run.folder.name if unique else str(run.folder)
        upgraded = _upgraded_epochs(run)
        for axes, values in zip(panels, points, strict=True):
            rates = {epoch: 100 * rate for epoch, rate in values.items()}
            axes.plot(list(rates), list(rates.values()), line, color=colour, label=label)
            stars = [epoch for epoch in upgraded if epoch in rates]
            axes.plot(stars, [rates[epoch] for epoch in stars], "*", color=colour, markersize=12)
    handles, _ = panels[0].get_legend_handles_labels()
    _legend(figure, handles=handles, loc="outside upper center", ncols=3)
    figure.supxlabel("epoch", color=_INK, fontsize=9)
    return _svg(figure, "-".join(str(run.folder) for run, _ in curves))


def _upgraded_epochs(run: RunFiles) -> list[int]:
    """Return the epochs after which the number of upgrades had grown."""
    count = by_epoch(run.metrics, "upgrade/count")
    before = [0.0, *count.values()]
    return [epoch for (epoch, now), last in zip(count.items(), before, strict=False) if now > last]


def cmc_chart(run: RunFiles) -> str:
    """Return the CMC curves of all directions up to rank 20; empty without details.json."""
    curves = {
        name: direction["retrieval"]["cmc"]
        for name in map("->".join, DIRECTIONS)
        if (direction := run.details.get(name))
    }
    if not curves:
        return ""
    figure, axes = _axes("CMC: queries with a match among the first k gallery images (%)", "k")
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
        shown = curve[:20]
        ranks = range(1, len(shown) + 1)
        axes.plot(ranks, [100 * rate for rate in shown], label=name, color=colour)
    axes.set_ylim(0, 102)
    axes.set_xticks([1, 5, 10, 15, 20])
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


def training_curves(run: RunFiles) -> list[str]:
    """Return loss and learning-rate curves, a point for each epoch."""
    charts = []
    for title, names in _CURVES:
        series = {name: points for name in names if (points := by_epoch(run.metrics, name))}
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


def upgrade_timeline(run: RunFiles) -> dict[str, Any] | None:
    """Return each validation of a joint training against the thresholds of upgradation.

    Returns:
        ``sentence``, ``charts`` and ``rows`` for the template; None without validations.
    """
    names = {  # in the order of the fields of Validation
        "rank1": "eval/raw->protected/rank1",
        "psnr": "privacy/anonymized/psnr",
        "psnr_desensitized": "privacy/desensitized/psnr",
        "ssim": "privacy/anonymized/ssim",
        "ssim_desensitized": "privacy/desensitized/ssim",
    }
    series = {key: by_epoch(run.metrics, name) for key, name in names.items()}
    rank1_raw = by_epoch(run.metrics, "eval/raw->raw/rank1")
    epochs = sorted(set.intersection(*(set(points) for points in series.values())))
    if not epochs:
        return None
    config = run.config
    policy = UpgradePolicy.of(
        config.get("MODEL.VAL_R1", math.inf),
        float(config.get("MODEL.VAL_R1_SLACK", 0.05)),
        float(config.get("MODEL.PSNR", 1.0)),
        float(config.get("MODEL.SSIM", 0.05)),
    )
    in_force = by_epoch(run.metrics, "upgrade/in_force")
    rows, needed = [], []
    upgrades = [epoch for epoch in _upgraded_epochs(run) if epoch in epochs]
    ema = float(config.get("MODEL.TEACHER_EMA", 0.0))
    for epoch in epochs:
        scores = [points[epoch] for points in series.values()]
        scores.append(rank1_raw.get(epoch, math.nan))
        validation = Validation(*scores)
        needed.append(policy.threshold(validation))
        earlier = [upgrade for upgrade in upgrades if upgrade <= epoch]
        target = "desensitized images"
        if in_force.get(epoch) and earlier:
            anonymizer = f"the anonymizer of epoch {earlier[-1]}"
            target = f"the moving average that began with {anonymizer}" if ema else anonymizer
        rows.append(
            {
                "epoch": epoch,
                "rank1": percent(validation.rank1),
                "psnr": f"{validation.psnr_anonymized_db:.2f}",
                "ssim": f"{validation.ssim_anonymized:.3f}",
                "decision": _decision(policy, validation, epoch in upgrades, target),
            }
        )
    return {
        "sentence": _timeline_sentence(policy, upgrades, len(epochs), ema),
        "charts": _timeline_charts(run, series, epochs, policy, needed, upgrades),
        "rows": rows,
    }


def _decision(policy: UpgradePolicy, validation: Validation, upgraded: bool, target: str) -> str:
    if not policy.enabled:
        return "upgradation is off"
    reasons = []
    if not policy.good_enough(validation):
        reasons.append(f"rank-1 is not above {percent(policy.threshold(validation))} %")
    if not policy.private_enough(validation):
        reasons.append("images are too close to the original")
    if reasons:
        return f"does not qualify: {', '.join(reasons)}; target: {target}"
    if upgraded:
        return "qualifies with the best rank-1 so far: this anonymizer becomes the target"
    return f"qualifies, but not with the best rank-1; target: {target}"


def _timeline_sentence(policy: UpgradePolicy, upgrades: Sequence[int], num: int, ema: float) -> str:
    if not policy.enabled:
        return "Supervision upgradation was off (MODEL.VAL_R1 is inf): the target never changed."
    rule = f"VAL_R1 - VAL_R1_SLACK = {percent(policy.rank1 - policy.rank1_slack)} %"
    if policy.rank1_share:
        rule = f"{policy.rank1_share} x raw->raw rank-1"
    rule = f"Rank-1 had to exceed {rule}."
    if not upgrades:
        return f"None of {num} validations qualified, so the target never changed. {rule}"
    epochs = (
        f"epochs {', '.join(map(str, upgrades))}" if len(upgrades) > 1 else f"epoch {upgrades[0]}"
    )
    follows = f" It then followed the anonymizer as a moving average (decay {ema:g})." * bool(ema)
    return f"The anonymizer's own output became the target at {epochs}.{follows} {rule}"


def _timeline_charts(
    run: RunFiles,
    series: Mapping[str, Mapping[int, float]],
    epochs: Sequence[int],
    policy: UpgradePolicy,
    needed: list[float],
    upgrades: Sequence[int],
) -> list[str]:
    private = {
        name: [series[f"{name}_desensitized"][epoch] + margin for epoch in epochs]
        for name, margin in (("psnr", policy.psnr_margin_db), ("ssim", policy.ssim_margin))
    }
    panels = (
        ("Rank-1, raw->protected (%): above the line", "rank1", 100.0, needed),
        ("PSNR of anonymized images (dB): below the line", "psnr", 1.0, private["psnr"]),
        ("SSIM of anonymized images: below the line", "ssim", 1.0, private["ssim"]),
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
