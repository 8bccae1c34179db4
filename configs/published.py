"""The published table: rank-1 that a training of the published configuration should reach.

Source: SecureReID (IEEE TIFS 2024). One number per cell, without seeds or spread.
"""

from __future__ import annotations

from collections.abc import Mapping

# INPUT.RADIUS of each INPUT.TYPE, and MODEL.VAL_R1 of the full method.
STRENGTHS: Mapping[str, float] = {"blur": 12.0, "mosaic": 24.0, "noise": 0.5}
VAL_R1 = 0.75
IMAGENET_FILE = "resnet50-0676ba61.pth"  # start weights of ResNet-50

# Points of rank-1 by which a mean may differ and still agree with the published number. The
# publication reports no spread. Seeds usually differ by a few tenths with thousands of queries
# (Market-1501 3,368, MSMT17 11,659), and by more with the 1,400 of CUHK03.
TOLERANCE: Mapping[str, float] = {"market1501": 1.5, "msmt17": 1.5, "cuhk03": 3.0}

# Rank-1 in % by data set and method, for each INPUT.TYPE in the order of STRENGTHS:
# raw->raw/raw->protected/protected->raw/protected->protected.
RANK1: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("market1501", "base"): ("84.8/40.1/18.3/67.3", "87.4/75.3/70.9/64.3", "75.9/50.8/41.7/68.7"),
    ("market1501", "without"): (
        "83.1/68.3/46.8/75.8",
        "86.3/80.1/75.1/73.2",
        "90.4/77.5/67.5/84.4",
    ),
    ("market1501", "full"): ("91.6/88.2/82.5/89.2", "89.4/88.5/86.8/87.0", "91.7/83.5/83.8/91.2"),
    ("msmt17", "base"): ("30.5/21.3/16.2/15.2", "25.0/16.3/14.6/10.6", "24.1/20.1/18.5/18.2"),
    ("msmt17", "without"): ("43.6/28.4/10.0/14.7", "34.3/26.2/24.6/20.5", "41.9/36.0/29.4/31.3"),
    ("msmt17", "full"): ("51.5/51.1/50.5/48.7", "48.6/49.1/48.5/48.1", "46.9/48.1/46.2/46.0"),
    ("cuhk03", "base"): ("30.4/14.6/10.4/8.2", "28.5/17.7/15.1/8.8", "14.0/9.1/8.6/8.1"),
    ("cuhk03", "without"): ("31.6/13.8/8.9/14.3", "24.9/24.2/19.6/12.1", "28.1/30.4/30.4/31.9"),
    ("cuhk03", "full"): ("41.9/39.2/35.3/33.2", "38.8/37.8/30.4/27.6", "35.8/36.4/37.9/41.9"),
}


def published_rank1(dataset: str, method: str, desensitizer: str) -> tuple[float, ...] | None:
    """Return four rates in [0, 1], in the order of ``DIRECTIONS``; None if nothing is published."""
    if (dataset, method) not in RANK1 or desensitizer not in STRENGTHS:
        return None
    cell = RANK1[dataset, method][list(STRENGTHS).index(desensitizer)]
    return tuple(float(number) / 100 for number in cell.split("/"))
