"""Ranked lists against brute force, drawings, and activation maps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.scoring.features import Features
from engine.scoring.retrieval import score_retrieval
from engine.views import (
    RankedList,
    activation_maps,
    choose_queries,
    draw_ranked_lists,
    overlay,
    rank_gallery,
)
from utils.errors import UserError


def features(count: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(count, 8, generator=generator),
        torch.randint(-1, 5, (count,), generator=generator),
        torch.randint(0, 3, (count,), generator=generator),
    )


@pytest.mark.parametrize("cross_camera", [True, False])
def test_ranked_lists_equal_brute_force(cross_camera: bool) -> None:
    query, gallery = features(6, 1), features(40, 2)
    lists = rank_gallery(query, gallery, range(6), cross_camera=cross_camera, top=7)
    for ranked in lists:
        own, camera = int(query.pids[ranked.query]), int(query.camids[ranked.query])
        candidates = []
        for index in range(40):
            pid, camid = int(gallery.pids[index]), int(gallery.camids[index])
            if pid == -1 or (cross_camera and pid == own and camid == camera):
                continue
            a, b = query.embeddings[ranked.query], gallery.embeddings[index]
            candidates.append((-float(a @ b / (a.norm() * b.norm())), index, pid == own))
        expected = sorted(candidates)[:7]
        assert list(ranked.gallery) == [index for _, index, _ in expected]
        assert list(ranked.hit) == [hit for _, _, hit in expected]
        assert ranked.similarity == pytest.approx([-score for score, _, _ in expected], abs=1e-6)


def test_broken_features_are_last_as_in_the_scores() -> None:
    query = Features(torch.tensor([[1.0, 0.0]]), [1], [0])
    gallery = Features(
        torch.tensor([[torch.nan, 0], [0, 0], [-1.0, 0], [1, 1]]), [2, 2, 2, 1], [1] * 4
    )
    (ranked,) = rank_gallery(query, gallery, [0], cross_camera=True)
    assert ranked.gallery == (3, 2, 0, 1)
    assert score_retrieval(query, gallery).cmc[0] == 1


def test_the_first_image_of_a_list_is_what_rank_1_counts() -> None:
    query, gallery = features(30, 3), features(60, 4)
    results = score_retrieval(query, gallery).per_query
    lists = rank_gallery(query, gallery, results.index.tolist(), cross_camera=True, top=1)
    assert [ranked.hit[0] for ranked in lists] == (results.first_rank == 1).tolist()


def test_a_short_gallery_gives_a_short_list() -> None:
    (ranked,) = rank_gallery(features(1, 1), features(3, 2), [0], cross_camera=False, top=10)
    assert len(ranked.gallery) <= 3


def test_queries_are_chosen_by_average_precision() -> None:
    precision = np.array([0.5, 0.9, 0.1, 0.7, 0.3])
    results = SimpleNamespace(index=np.arange(10, 15), average_precision=precision)
    assert choose_queries(results, 1) == {"best": [11], "median": [10], "worst": [12]}
    assert choose_queries(results, 2)["worst"] == [14, 12]
    assert choose_queries(results, 9)["best"] == [11, 13, 10, 14, 12]


def test_hits_and_misses_differ_in_colour_and_style() -> None:
    image = np.full((40, 20, 3), 128, np.uint8)
    ranked = RankedList(0, (0, 1), (0.9, 0.8), (True, False))
    sheet = np.array(draw_ranked_lists([("best", ranked)], [image], [[image, image]]))
    blue = (sheet == (0, 114, 178)).all(axis=2)
    orange = (sheet == (213, 94, 0)).all(axis=2)
    assert blue.any() and orange.any()
    left = np.flatnonzero(blue.any(axis=0))[0]
    column = blue[:, left]
    assert column[np.flatnonzero(column)[0] : np.flatnonzero(column)[-1]].all()  # solid
    left = np.flatnonzero(orange.any(axis=0))[0]
    column = orange[:, left]
    assert not column[np.flatnonzero(column)[0] : np.flatnonzero(column)[-1]].all()  # dashed


def network(output: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(base=lambda _: output, name="stub")


def test_the_map_is_largest_where_the_features_are() -> None:
    output = torch.zeros(2, 3, 4, 2)
    output[0, :, 0, 0], output[1, 1, 3, 1] = 2.0, -5.0
    maps = activation_maps(network(output), torch.zeros(2, 3, 32, 16))
    assert maps.shape == (2, 32, 16)
    assert maps.amin() == 0 and maps.amax() == 1
    assert maps[0, 0, 0] == 1 and maps[0, -1, -1] == 0
    assert maps[1, -1, -1] == 1 and maps[1, 0, 0] == 0


def test_a_constant_map_has_no_nan() -> None:
    maps = activation_maps(network(torch.ones(1, 3, 4, 2)), torch.zeros(1, 3, 8, 4))
    assert torch.equal(maps, torch.zeros(1, 8, 4))


def test_features_without_places_are_refused() -> None:
    with pytest.raises(UserError, match=r"features of shape \(1, 3\)"):
        activation_maps(network(torch.ones(1, 3)), torch.zeros(1, 3, 8, 4))


def test_an_overlay_keeps_size_and_shows_image_and_map() -> None:
    image = np.random.default_rng(1).integers(0, 256, (8, 4, 3), np.uint8)
    low, high = overlay(image, np.zeros((8, 4))), overlay(image, np.ones((8, 4)))
    assert low.shape == image.shape and low.dtype == np.uint8
    assert not np.array_equal(low, high)
    assert not np.array_equal(low, overlay(255 - image, np.zeros((8, 4))))
