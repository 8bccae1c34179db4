"""k-reciprocal re-ranking against the dense definition and golden values."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scoring import reranking
from engine.scoring.features import Features, UnitFeatures
from engine.scoring.reranking import Images, Reranker, nearest_neighbors, score_reranked
from engine.scoring.retrieval import score_retrieval
from tests.fixtures.naive_retrieval import naive_reranked_distances, naive_scores
from tests.fixtures.paths import GOLDEN
from utils import memory
from utils.errors import UserError


@pytest.fixture(params=["whole", "tiled", "recomputed"])
def layout(request, monkeypatch):
    """Tiles smaller than the sets, and similarities that are not kept."""
    if request.param != "whole":
        monkeypatch.setattr(reranking, "TILE", 32)
    if request.param == "recomputed":
        monkeypatch.setattr(reranking, "_KEEP_MIB", 0.0)


def clustered(seed, num_query=20, num_gallery=90, dim=12, spread=0.6):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((12, dim))
    sets = []
    for count in (num_query, num_gallery):
        pids = rng.integers(0, 12, count)
        embeddings = centers[pids] + spread * rng.standard_normal((count, dim))
        sets.append((embeddings.astype(np.float32), pids, rng.integers(0, 3, count)))
    return sets


def features(part):
    return Features(torch.tensor(part[0]), *part[1:])


def test_golden_distances_and_scores(layout):
    file = np.load(GOLDEN / "retrieval.npz")
    query, gallery = (
        Features(torch.tensor(file[f"{name}_feat"]), file[f"{name}_pid"], file[f"{name}_cam"])
        for name in ("query", "gallery")
    )
    found = Reranker(query, gallery).distances(np.arange(len(query)))
    np.testing.assert_allclose(found, file["rerank_dist_float32_reference"], atol=1e-6)
    scores = score_reranked(query, gallery)
    np.testing.assert_allclose(scores.cmc, file["rerank_cmc"], atol=1e-6)
    assert scores.mAP == pytest.approx(float(file["rerank_mAP"]), abs=1e-6)
    assert scores.mINP == pytest.approx(float(file["rerank_mINP"]), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    k1=st.sampled_from([1, 2, 5, 7, 20]),
    k2=st.sampled_from([1, 3, 6]),
    spread=st.sampled_from([0.2, 0.6, 3.0]),
)
def test_distances_equal_the_dense_definition(seed, k1, k2, spread):
    query, gallery = clustered(seed, spread=spread)
    found = Reranker(features(query), features(gallery), k1=k1, k2=k2).distances(np.arange(20))
    expected = naive_reranked_distances(query[0], gallery[0], k1, k2)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("lambda_value", [0.0, 0.3, 1.0])
def test_scores_equal_the_dense_definition(layout, lambda_value):
    query, gallery = clustered(1)
    gallery[1][:5] = query[1][[2, 9]] = -1  # junk takes no part, not even as a neighbour
    asked, sound = ([one[part[1] != -1] for one in part] for part in (query, gallery))
    dist = naive_reranked_distances(asked[0], sound[0], lambda_value=lambda_value)
    expected = naive_scores(dist, *asked[1:], *sound[1:])
    scores = score_reranked(features(query), features(gallery), lambda_value=lambda_value)
    assert (scores.num_gallery, scores.skipped["junk"]) == (85, 2)
    assert not {2, 9} & set(scores.per_query.index.tolist())
    if lambda_value:  # with Jaccard distances alone everybody far away is tied but for rounding
        assert scores.mAP == pytest.approx(expected["mAP"], abs=1e-9)
        np.testing.assert_allclose(scores.cmc, expected["cmc"])


def test_neighbours_and_ties_are_those_of_a_stable_sort(layout):
    rng = np.random.default_rng(0)
    signs = np.where(rng.standard_normal((100, 16)) < 0.5, -1, 1).astype(np.float32)
    signs[:, 3:] = 1  # eight different images only
    parts = [
        UnitFeatures.of(Features(torch.tensor(one), [0] * len(one), [0] * len(one)))
        for one in (signs[:40], signs[40:])
    ]
    found = nearest_neighbors(Images(*parts), 21)
    cosine = signs @ signs.T / 16
    expected = np.argsort(-cosine, axis=1, kind="stable")[:, :21]
    np.testing.assert_array_equal(found.index, expected)
    np.testing.assert_allclose(found.similarity, np.take_along_axis(cosine, expected, 1), atol=1e-6)
    np.testing.assert_allclose(found.lowest, cosine.min(1), atol=1e-6)


def test_fewer_images_than_neighbours():
    query, gallery = clustered(2, num_query=2, num_gallery=5)
    found = Reranker(features(query), features(gallery)).distances(np.arange(2))
    np.testing.assert_allclose(found, naive_reranked_distances(query[0], gallery[0]), atol=2e-6)


@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_broken_features_are_flagged_and_come_last(value):
    query = Features(torch.eye(6)[[5, 0, 1]], [-1, 1, 2], [0, 0, 0])  # junk first: others move up
    query.embeddings[1] = value
    scores = score_reranked(query, Features(torch.eye(6), [1, 2, 3, 4, 5, 6], [1] * 6))
    assert scores.degenerate
    assert scores.per_query.first_rank.tolist() == [6, 1]


@pytest.mark.parametrize("count", [1, 20, 30])
def test_broken_matches_come_after_every_wrong_image(count):
    embeddings = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    embeddings[:count] = torch.nan
    gallery = Features(embeddings, [1] + [2] * 29, [1] * 30)
    scores = score_reranked(Features(torch.eye(8)[:2], [1, 1], [0, 0]), gallery)
    assert scores.degenerate
    assert scores.per_query.first_rank.tolist() == [30, 30]


def test_constant_features_are_flagged():
    query = Features(torch.ones(2, 3), [1, 2], [0, 0])
    scores = score_reranked(query, Features(torch.ones(30, 3), list(range(30)), [1] * 30))
    assert scores.degenerate
    assert scores.rank1 == 0


def test_a_gallery_of_one_image():
    query, gallery = Features(torch.ones(1, 3), [1], [0]), Features(torch.ones(1, 3), [1], [1])
    assert score_reranked(query, gallery).rank1 == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k1": 0}, "at least 1"),
        ({"lambda_value": 1.5}, "lambda from 0 to 1"),
    ],
)
def test_what_cannot_be_done_is_refused(options, words):
    query, gallery = clustered(0)
    with pytest.raises(UserError, match=words):
        score_reranked(features(query), features(gallery), **options)


def test_a_set_that_does_not_fit_is_refused(monkeypatch):
    query, gallery = clustered(0)
    monkeypatch.setattr(memory, "available_mib", lambda _: 1 / 0.9)
    with pytest.raises(UserError, match=r"needs about [\d,]+ MiB of memory but 1 MiB may be used"):
        score_reranked(features(query), features(gallery))


def test_features_of_two_sizes_are_refused():
    query, gallery = clustered(0)
    wide = Features(torch.ones(len(gallery[0]), 99), *gallery[1:])
    with pytest.raises(UserError, match="gallery features 99; expected one size"):
        score_reranked(features(query), wide)


def test_long_runs_print_their_estimate_first(caplog, monkeypatch):
    monkeypatch.setattr(memory, "WORTH_TELLING", 1)
    query, gallery = clustered(0)
    with caplog.at_level(logging.INFO, logger="reid_baseline"):
        score_reranked(features(query), features(gallery))
        score_retrieval(features(query), features(gallery))
    text = " ".join(caplog.messages)
    assert re.search(r"Scoring \d+ queries in \d+ gallery images, \d+ at a time: about \d", text)
    assert "MiB besides the features" in text


@pytest.mark.parametrize("count", [2, 3, 5])
def test_one_person_of_equal_images_is_all_found(count):
    """There is no furthest image; what rounding leaves of the distances must not be blown up."""
    for seed in range(8):
        row = np.random.default_rng(seed).standard_normal((1, 7)).astype(np.float32)
        query, gallery = (
            features((row.repeat(count, 0), np.full(count, 5), np.full(count, camera)))
            for camera in (0, 1)
        )
        assert Reranker(query, gallery).distances(np.arange(count)).isfinite().all()
        scores = score_reranked(query, gallery)
        assert (scores.mAP, scores.mINP, scores.rank1) == (1.0, 1.0, 1.0)
