"""The synthetic data set: repeatable, disjoint, complete, created safely, and not trivial."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.datasets.synthetic import FOLDERS, SyntheticOptions, ensure_synthetic
from data.people import photograph as drawing
from data.people.appearance import GARMENT_COLOURS, draw_people
from data.people.figure import build_figure, walking_joints
from data.people.photograph import SIZE, build_camera, draw_track, photograph
from data.people.raster import Frame, Light, Tube, View, render
from data.people.scenery import SCENES
from data.registry import load_splits
from utils.errors import UserError

SMALL = {"identities": 2, "cameras": 2, "images": 2}
NAME = re.compile(r"(\d{4})_c([1-9])s(\d)_(\d{6})_(\d{2})\.jpg")


def names_in(tree: Path, folder: str) -> list[tuple[int, int]]:
    """Return (pid, camera) of every image; every name must be Market-style."""
    matches = [NAME.fullmatch(p.name) for p in sorted((tree / folder).iterdir())]
    assert all(matches)
    return [(int(m[1]), int(m[2])) for m in matches if m]


def contents(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_synthetic(tmp_path_factory.mktemp("drawn"), **SMALL)


def test_the_same_seed_gives_the_same_bytes(tree, tmp_path):
    again = ensure_synthetic(tmp_path, **SMALL)
    assert again.name == tree.name
    assert contents(again) == contents(tree)


def test_processes_draw_what_one_process_draws(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "_MIN_PARALLEL", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert contents(ensure_synthetic(tmp_path, **SMALL)) == contents(tree)


def test_another_seed_is_another_folder_with_other_people(tree, tmp_path):
    other = ensure_synthetic(tmp_path, **SMALL, seed=2)
    assert other.name != tree.name
    mine, theirs = contents(tree), contents(other)
    images = [{c for n, c in files.items() if n.endswith(".jpg")} for files in (mine, theirs)]
    assert not images[0] & images[1]


@pytest.mark.parametrize("change", [{"identities": 3}, {"cameras": 3}, {"images": 3}, {"seed": 9}])
def test_every_parameter_is_in_the_name(change):
    assert SyntheticOptions(**SMALL).folder != SyntheticOptions(**(SMALL | change)).folder


def test_an_existing_set_is_left_alone(tree):
    before = {p: p.stat().st_mtime_ns for p in tree.rglob("*")}
    assert ensure_synthetic(tree.parent, **SMALL) == tree
    assert before == {p: p.stat().st_mtime_ns for p in tree.rglob("*")}


def test_splits_share_no_identity_and_are_complete(tree):
    pids = {folder: {pid for pid, _ in names_in(tree, folder)} for folder in FOLDERS}
    train, val_query, val_gallery, query, gallery = (pids[f] for f in FOLDERS)
    assert val_query == val_gallery
    assert query == gallery - {0}
    assert 0 in gallery
    assert not (train & val_query or train & query or val_query & query)
    counts = SyntheticOptions(**SMALL).counts
    assert [len(train), len(val_query), len(query)] == [
        counts["train"], counts["val"], counts["test"],
    ]  # fmt: skip
    assert sum(pid == 0 for pid, _ in names_in(tree, FOLDERS[4])) == counts["distractors"]


@pytest.mark.parametrize(("queries", "gallery"), [FOLDERS[1:3], FOLDERS[3:5]])
def test_one_query_per_identity_and_camera_with_a_match_elsewhere(tree, queries, gallery):
    asked, offered = names_in(tree, queries), names_in(tree, gallery)
    assert len(asked) == len(set(asked))
    assert {camera for _, camera in asked} == {1, 2}
    for pid, camera in asked:
        assert any(p == pid and c != camera for p, c in offered)


def test_the_loader_reads_it(tree):
    splits = load_splits("synthetic", tree.parent, synthetic_options=SMALL | {"seed": 1})
    assert len(splits.train) == 2 * 2 * 2
    assert splits.has_validation
    assert {s.camid for s in splits.query} == {0, 1}


def test_the_size_of_images_and_the_record_of_a_set(tree):
    for path in tree.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", SIZE)
    assert "None of them exists" in (tree / "README.txt").read_text(encoding="utf-8")
    record = json.loads((tree / "synthetic.json").read_text(encoding="utf-8"))
    assert record["parameters"] == SMALL | {"seed": 1}
    assert record["images"] == {f: len(names_in(tree, f)) for f in FOLDERS}


@pytest.mark.parametrize(
    ("option", "value"),
    [("identities", 1), ("identities", 4001), ("cameras", 1), ("cameras", 10), ("images", 1),
     ("images", 51), ("seed", -1), ("images", 2.0), ("cameras", True)],
)  # fmt: skip
def test_values_out_of_range_are_one_line_and_write_nothing(tmp_path, option, value):
    with pytest.raises(UserError, match=rf"synthetic {option} is {value}; expected .* from \d"):
        ensure_synthetic(tmp_path / "new", **{option: value})
    assert not (tmp_path / "new").exists()


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    saved, real = itertools.count(), Image.Image.save

    def failing(self, *args, **kwargs):
        if next(saved) == 7:
            raise OSError(28, "No space left on device")
        real(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(OSError, match="No space"):
        ensure_synthetic(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


def forked(root: Path, **options: int) -> multiprocessing.process.BaseProcess:
    """Draw a set in another process; a fork saves the seconds in which it would import torch."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=ensure_synthetic, args=(root,), kwargs=options)
    process.start()
    return process


def test_a_killed_run_leaves_no_set_and_its_files_are_removed_later(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "_MIN_PARALLEL", 10**6)
    run = forked(tmp_path, identities=12)
    while not list(tmp_path.rglob("*.jpg")) and run.is_alive():
        time.sleep(0.02)
    run.kill()
    run.join()
    left = list(tmp_path.iterdir())
    assert [".partial-" in p.name for p in left] == [True]
    left[0].rename(tmp_path / f".{tree.name}.partial-killed")  # as if this set had been drawn
    made = ensure_synthetic(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == [made]
    assert contents(made) == contents(tree)


def test_racing_processes_end_with_one_whole_set(tree, tmp_path):
    runs = [forked(tmp_path, **SMALL) for _ in range(2)]
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == [tree.name]
    assert contents(tmp_path / tree.name) == contents(tree)


def test_the_message_for_a_damaged_set_contains_the_fix(tmp_path):
    made = ensure_synthetic(tmp_path, **SMALL)
    next((made / "query").iterdir()).unlink()
    with pytest.raises(UserError, match="delete .* and it is created again"):
        ensure_synthetic(tmp_path, **SMALL)
    (made / "synthetic.json").unlink()
    with pytest.raises(UserError, match=r"no readable synthetic\.json"):
        ensure_synthetic(tmp_path, **SMALL)


@pytest.fixture(scope="module")
def walks() -> tuple[list[list[Image.Image]], np.ndarray, np.ndarray]:
    """Return two images of each walk of 12 people past 4 cameras, with pids and cameras."""
    people = draw_people(1, 12)
    pairs, owners = [], list(itertools.product(range(12), range(4)))
    for pid, camera in owners:
        rng = np.random.default_rng([5, pid, camera])
        track = draw_track(build_camera(1, camera)[0], rng)
        pairs.append([photograph(people[pid], 1, camera, track, rng) for _ in range(2)])
    pid, camera = np.array(owners).T
    return pairs, pid, camera


def histogram(image: Image.Image, stripes: int) -> np.ndarray:
    bins = np.asarray(image, int) // 32 @ [64, 8, 1]
    counts = [np.bincount(b.ravel(), minlength=512) for b in np.array_split(bins, stripes)]
    return np.sqrt(np.concatenate(counts))


@pytest.mark.parametrize("stripes", [1, 6])
@pytest.mark.parametrize("space", ["RGB", "HSV"])
@pytest.mark.parametrize("other_cameras", [False, True])
def test_a_colour_histogram_is_not_enough(walks, stripes, space, other_cameras):
    # Fewer identities and cameras than in the default test set, so this task is easier.
    pairs, pid, camera = walks
    query, gallery = (
        np.stack([histogram(pair[k].convert(space), stripes) for pair in pairs]) for k in (0, 1)
    )
    hidden = camera[:, None] == camera
    if not other_cameras:  # the protocol of Market-1501
        hidden &= pid[:, None] == pid
    best = np.where(hidden, -1, query @ gallery.T).argmax(1)
    assert (pid[best] == pid).mean() < 0.6


def test_people_differ_in_large_attributes():
    people = draw_people(1, 112)
    attributes = {
        (p.upper.colour, p.upper.pattern, p.lower.colour, p.lower.cut, p.bag, p.bag_colour)
        for p in people
    }
    assert len(attributes) == len(people)
    assert people[:16] == draw_people(1, 16)


def test_any_number_of_people_can_be_drawn():
    assert len(draw_people(3, 40, apart=20.0, attempts=1)) == 40


@pytest.mark.parametrize("camera", range(9))
def test_every_camera_records_a_person_and_a_scene(camera):
    settings, scene = build_camera(4, camera)
    assert settings.scene in SCENES
    assert len(scene.getcolors(1 << 20)) > 500  # a scene, not a plain wall
    person = draw_people(4, 1)[0]
    rng = np.random.default_rng(camera)
    image = np.asarray(photograph(person, 4, camera, draw_track(settings, rng), rng), int)
    assert image.std() > 12


@pytest.mark.parametrize("phase", np.linspace(0, 2 * math.pi, 9))
def test_one_foot_is_on_the_ground_and_bones_keep_their_length(phase):
    joints = walking_joints(phase, stride=0.4, lean=0.05, shoulder=0.17)
    assert min(joints["ankle_l"][1], joints["ankle_r"][1]) == pytest.approx(0.07)
    for side in "lr":
        thigh = np.linalg.norm(joints[f"hip_{side}"] - joints[f"knee_{side}"])
        shin = np.linalg.norm(joints[f"knee_{side}"] - joints[f"ankle_{side}"])
        assert (thigh, shin) == pytest.approx((0.43, 0.40), abs=1e-3)


def covered(person, yaw: float, colour: tuple[float, float, float]) -> np.ndarray:
    """Return the columns, relative to the middle of the person, that a hue covers."""
    frame = Frame(60.0, (32.0, 120.0), SIZE)
    shades, mask = render(
        build_figure(person, 0.3), View(yaw, 0.0), Light((0, 0, 1), 1.0, 0.0), frame
    )
    hue = np.asarray(colour) / np.linalg.norm(colour)
    norm = np.linalg.norm(shades, axis=2) + 1e-6
    return np.nonzero(mask & (shades @ hue / norm > 0.999))[1] - 32


def test_a_bag_stays_on_its_side_when_the_person_turns():
    plain = draw_people(1, 1)[0]
    red = GARMENT_COLOURS["red"]
    person = dataclasses.replace(
        plain, bag="shoulder", bag_colour="red", side=1, shoes="black",
        upper=dataclasses.replace(plain.upper, cut="tee", colour="green", pattern="plain"),
        lower=dataclasses.replace(plain.lower, cut="slim", colour="navy", pattern="plain"),
    )  # fmt: skip
    assert (
        covered(person, 0.0, red).mean() > 3
    )  # seen from the front, the left hand is on the right
    assert covered(person, math.pi, red).mean() < -3
    pack = dataclasses.replace(person, bag="backpack")
    assert len(covered(pack, math.pi, red)) > 2 * len(covered(pack, 0.0, red))


@pytest.mark.parametrize("yaw", np.linspace(-math.pi, math.pi, 13))
def test_a_tube_shows_the_side_that_faces_the_camera(yaw):
    angles: list[np.ndarray] = []

    def paint(along, around, metres):
        angles.append(around)
        return np.full((len(along), 3), 200.0, np.float32)

    tube = Tube(np.array([0.0, 0.2, 0]), np.array([0.0, 1.4, 0]), (0.3, 0.3), (0.1, 0.1), paint)
    frame = Frame(60.0, (32.0, 110.0), SIZE)
    _, mask = render([tube], View(float(yaw), 0.0), Light((0, 0, 1), 0.5, 0.5), frame)
    around = np.concatenate(angles)
    # Outward normals of the ellipse, turned with the person, point towards the camera.
    near = -np.cos(around) / 0.3 * math.sin(yaw) + np.sin(around) / 0.1 * math.cos(yaw)
    assert near.min() > -1e-3
    wide = 2 * 60 * math.hypot(0.3 * math.cos(yaw), 0.1 * math.sin(yaw))
    assert np.ptp(np.nonzero(mask)[1]) + 1 == pytest.approx(wide, abs=1.5)
