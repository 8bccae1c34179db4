"""Retrieval scores against brute force, golden values and the protocol's rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scoring import ranking
from engine.scoring.features import Features, UnitFeatures
from engine.scoring.reranking import score_reranked
from engine.scoring.retrieval import score_directions, score_retrieval
from engine.scoring.single_shot import score_single_shot
from engine.scoring.verification import score_verification
from tests.fixtures.naive_retrieval import distances, naive_scores
from tests.fixtures.paths import GOLDEN
from utils import memory
from utils.errors import UserError


@pytest.fixture(params=["bisection", "comparing"])
def counting(request, monkeypatch):
    """The algorithm for CPUs, and on the CPU the one for GPUs."""
    if request.param == "comparing":
        monkeypatch.setattr(ranking, "_ranks_by_sorting", ranking._ranks_by_comparing)
    return request.param


def golden():
    file = np.load(GOLDEN / "retrieval.npz")
    query = Features(torch.tensor(file["query_feat"]), file["query_pid"], file["query_cam"])
    gallery = Features(torch.tensor(file["gallery_feat"]), file["gallery_pid"], file["gallery_cam"])
    return file, query, gallery


def line_up(matches, *, pids=None, **options):
    """Score one query (pid 1) in a gallery ordered from closest to furthest."""
    angle = torch.linspace(0, 3, len(matches), dtype=torch.float64)
    gallery = torch.stack([angle.cos(), angle.sin()], 1).float()
    pids = [1 if match else 2 for match in matches] if pids is None else pids
    return score_retrieval(
        Features(torch.tensor([[1.0, 0.0]]), [1], [0]),
        Features(gallery, pids, [1] * len(matches)),
        **options,
    )


def random_sets(seed, *, ties, num_query=9, num_gallery=40, dim=16):
    """Small sets with distractors, junk, skipped queries and unused cameras."""
    rng = np.random.default_rng(seed)
    num_query, num_gallery = rng.integers(1, num_query), rng.integers(1, num_gallery)
    parts = []
    for count in (num_query, num_gallery):
        embeddings = rng.standard_normal((count, dim)).astype(np.float32)
        if ties:  # norms of 4: cosines are exact, and few values occur
            embeddings = np.where(embeddings < 0.3, -1, 1).astype(np.float32)
            embeddings[:, 3:] = 1
        pids = rng.choice([-1, 0, 1, 2, 3, 7], count, p=[0.1, 0.1, 0.3, 0.3, 0.15, 0.05])
        parts.append((embeddings, pids, rng.choice([0, 1, 5], count)))
    return parts


def assert_equal(scores, expected):
    np.testing.assert_allclose(scores.cmc, expected["cmc"], atol=1e-12)
    assert scores.mAP == pytest.approx(expected["mAP"], abs=1e-12)
    assert scores.mINP == pytest.approx(expected["mINP"], abs=1e-12)
    assert scores.num_queries == expected["num_queries"]
    assert scores.num_skipped == expected["num_skipped"]
    np.testing.assert_allclose(scores.per_query.average_precision, expected["average_precision"])
    np.testing.assert_array_equal(scores.per_query.first_rank, expected["first_rank"])


def check_against_naive(query, gallery, cross_camera, dist=None):
    sets = [Features(torch.tensor(one[0]), *one[1:]) for one in (query, gallery)]
    dist = distances(query[0], gallery[0]) if dist is None else dist
    expected = naive_scores(dist, *query[1:], *gallery[1:], cross_camera=cross_camera)
    if expected is None:
        with pytest.raises(UserError, match=r"none of the \d+ queries can be scored"):
            score_retrieval(*sets, cross_camera=cross_camera)
        return
    scores = score_retrieval(*sets, cross_camera=cross_camera)
    if not scores.degenerate:
        assert_equal(scores, expected)


def test_golden_scores(counting):
    file, query, gallery = golden()
    scores = score_retrieval(query, gallery)
    np.testing.assert_allclose(scores.cmc, file["cmc"], atol=1e-6)
    assert scores.mAP == pytest.approx(float(file["mAP"]), abs=1e-6)
    assert scores.mINP == pytest.approx(float(file["mINP"]), abs=1e-6)
    assert (scores.num_gallery, scores.degenerate) == (700, False)
    assert scores.num_queries + scores.num_skipped == 120


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cross_camera=st.booleans(), ties=st.booleans())
def test_equals_brute_force(seed, cross_camera, ties):
    check_against_naive(*random_sets(seed, ties=ties), cross_camera)


@pytest.mark.parametrize("seed", range(40))
def test_every_way_of_counting_equals_brute_force(seed, counting):
    check_against_naive(*random_sets(seed, ties=seed % 2 == 0), seed % 3 > 0)


@pytest.mark.parametrize("seed", range(10))
def test_a_duplicated_gallery_ties_and_the_first_copy_wins(seed, counting):
    query, gallery = random_sets(seed, ties=False, num_gallery=300, dim=33)
    doubled = tuple(np.concatenate([one, one]) for one in gallery)
    dist = distances(query[0], gallery[0])
    check_against_naive(query, doubled, True, np.concatenate([dist, dist], axis=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [4096, 7])
def test_other_types_are_scored_in_float32(dtype, block, monkeypatch):
    monkeypatch.setattr(ranking, "_CONVERT_ROWS", block)
    for seed in range(10):
        query, gallery = random_sets(seed, ties=False)
        sets = [Features(torch.tensor(one[0]).to(dtype), *one[1:]) for one in (query, gallery)]
        rounded = [one.embeddings.float().numpy() for one in sets]
        expected = naive_scores(distances(*rounded), *query[1:], *gallery[1:])
        if expected is not None:
            assert_equal(score_retrieval(*sets), expected)


def test_threads_change_nothing(monkeypatch):
    query, gallery = random_sets(11, ties=False, num_query=60, num_gallery=300)
    sets = [Features(torch.tensor(one[0]), *one[1:]) for one in (query, gallery)]
    alone = score_retrieval(*sets)
    monkeypatch.setattr(ranking, "_WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = score_retrieval(*sets)
    assert (alone.mAP, alone.mINP) == (together.mAP, together.mINP)


def test_small_chunks_change_nothing(monkeypatch):
    query, gallery = random_sets(3, ties=False, num_query=60, num_gallery=300)
    sets = [Features(torch.tensor(one[0]), *one[1:]) for one in (query, gallery)]
    whole = score_retrieval(*sets)
    monkeypatch.setitem(ranking._CHUNK_MIB, "cpu", 0.01)
    pieces = score_retrieval(*sets)
    assert (whole.mAP, whole.mINP) == (pieces.mAP, pieces.mINP)
    np.testing.assert_array_equal(whole.per_query.last_rank, pieces.per_query.last_rank)


def test_hits_at_ranks_1_2_4_7(counting):
    scores = line_up([1, 1, 0, 1, 0, 0, 1, 0])
    assert scores.mAP == pytest.approx((1 + 1 + 3 / 4 + 4 / 7) / 4)
    assert scores.mINP == pytest.approx(4 / 7)
    assert (scores.rank1, scores.rank5, scores.rank10) == (1, 1, 1)


def test_named_rates_are_those_of_their_rank():
    """One query for each rank: the match of the k-th comes k-th."""
    gallery = torch.linspace(0, 1, 12).unsqueeze(1) * torch.tensor([1.0, 0.0])
    gallery[:, 1] = 1.0
    query = torch.tensor([[0.0, 1.0]]).repeat(12, 1)
    scores = score_retrieval(
        Features(query, range(12), [0] * 12), Features(gallery, range(12), [1] * 12)
    )
    assert scores.per_query.first_rank.tolist() == list(range(1, 13))
    assert scores.rank1 == pytest.approx(1 / 12)
    assert scores.rank5 == pytest.approx(5 / 12)
    assert scores.rank10 == pytest.approx(10 / 12)


def test_same_person_and_camera_is_ignored():
    query = Features(torch.tensor([[1.0, 0.0]]), [1], [0])
    gallery = Features(torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, 1.0]]), [1, 2, 1], [0, 0, 1])
    assert score_retrieval(query, gallery).per_query.first_rank.tolist() == [2]
    assert score_retrieval(query, gallery, cross_camera=False).per_query.first_rank.tolist() == [1]


def test_distractors_count_as_misses_and_junk_does_not_exist():
    assert line_up([0, 1], pids=[0, 1]).per_query.first_rank.tolist() == [2]
    scores = line_up([0, 1], pids=[-1, 1])
    assert scores.per_query.first_rank.tolist() == [1]
    assert scores.num_gallery == 1


def test_queries_without_a_match_are_left_out_by_reason():
    query = Features(torch.eye(4), [1, 2, 3, -1], [0, 0, 0, 0])
    gallery = Features(torch.eye(4), [1, 2, 2, -1], [1, 0, 0, 1])
    scores = score_retrieval(query, gallery)
    assert scores.skipped == {"junk": 1, "not_in_gallery": 1, "only_same_camera": 1}
    assert (scores.num_queries, scores.num_skipped) == (1, 3)
    assert scores.per_query.index.tolist() == [0]


def test_no_valid_query_says_which_rule_removed_them():
    query = Features(torch.eye(3), [1, 2, -1], [0, 0, 0])
    gallery = Features(torch.eye(3), [1, 1, 3], [0, 0, 0])
    with pytest.raises(UserError) as error:
        score_retrieval(query, gallery)
    text = str(error.value)
    assert "none of the 3 queries" in text
    assert "1 are junk" in text
    assert "1 have no image of their identity in the gallery" in text
    assert "1 have images of their identity only from their own camera" in text
    assert "TEST.CROSS_CAMERA False" in text


def test_a_gallery_of_one_image_pads_the_curve():
    scores = line_up([1])
    assert scores.cmc.tolist() == [1.0] * 50
    assert not scores.degenerate


def test_empty_sets_are_an_error():
    with pytest.raises(UserError, match="0 gallery images"):
        score_retrieval(Features(torch.eye(2), [1, 2], [0, 0]), Features(torch.empty(0, 2), [], []))


@pytest.mark.parametrize("what", ["nan", "inf", "zero", "constant", "constant-scaled"])
@pytest.mark.parametrize("side", ["query", "gallery"])
def test_features_without_a_direction_are_flagged_and_not_scored_as_perfect(what, side, counting):
    sets = {"query": torch.eye(4)[:2], "gallery": torch.eye(4)}
    broken = sets[side].clone()
    if what.startswith("constant"):
        broken[:] = torch.ones(4)
        broken *= torch.arange(1, len(broken) + 1)[:, None] if "scaled" in what else 1
    else:
        broken[0] = {"nan": torch.nan, "inf": torch.inf, "zero": 0.0}[what]
    sets[side] = broken
    query = Features(sets["query"], [1, 2], [0, 0])
    scores = score_retrieval(query, Features(sets["gallery"], [1, 2, 3, 4], [1, 1, 1, 1]))
    assert scores.degenerate
    assert scores.rank1 < 1
    assert np.isfinite([scores.mAP, scores.mINP]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
@pytest.mark.parametrize("count", [2, 20, 30])
def test_broken_matches_come_after_every_wrong_image_wherever_they_lie(value, count, counting):
    embeddings = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    embeddings[:count] = value
    query = Features(torch.randn(2, 8).abs(), [1, 1], [0, 0])  # times infinity: infinity
    pids = [1, 1] + [2] * 28
    for order in (range(30), range(29, -1, -1)):
        order = list(order)
        gallery = Features(embeddings[order], torch.tensor(pids)[order], [1] * 30)
        scores = score_retrieval(query, gallery)
        assert scores.degenerate
        assert scores.per_query.first_rank.tolist() == [29, 29]
        assert scores.per_query.last_rank.tolist() == [30, 30]


def test_a_broken_query_finds_its_matches_last_among_what_it_is_compared_with():
    query = Features(torch.tensor([[torch.nan, 0.0]]), [1], [0])
    gallery = Features(torch.eye(2).repeat(3, 1), [1, 1, 2, -1, 1, 3], [0, 1, 1, 1, 2, 1])
    scores = score_retrieval(query, gallery)  # one is ignored, one is junk: 4 are left
    assert (scores.per_query.first_rank, scores.per_query.last_rank) == (3, 4)


def test_constant_features_get_the_worst_ranks():
    scores = score_retrieval(
        Features(torch.ones(2, 3), [1, 2], [0, 0]),
        Features(torch.ones(5, 3), [1, 1, 2, 3, 4], [1] * 5),
    )
    assert scores.per_query.first_rank.tolist() == [4, 5]


def test_tiny_and_huge_features_are_sound():
    matrix = torch.tensor([[3e-25, 0], [0, 2e-25], [1e-25, 1e-25], [2e25, 0], [0, 1e25]])
    unit = UnitFeatures.of(Features(matrix, range(5), [0] * 5))
    assert not unit.degenerate
    norms = unit.unit_rows(torch.arange(5)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(5))


def test_permuting_the_gallery_changes_nothing():
    query, gallery = random_sets(5, ties=False, num_query=40, num_gallery=200)
    order = np.random.default_rng(0).permutation(len(gallery[0]))
    first, second = (
        score_retrieval(
            Features(torch.tensor(query[0]), *query[1:]),
            Features(torch.tensor(gallery[0][index]), gallery[1][index], gallery[2][index]),
        )
        for index in (np.arange(len(order)), order)
    )
    np.testing.assert_array_equal(first.cmc, second.cmc)
    assert first.mAP == pytest.approx(second.mAP, abs=1e-12)


def test_directions_equal_single_scores():
    (query, pids, cams), (gallery, gallery_pids, gallery_cams) = random_sets(8, ties=False)
    noise = torch.Generator().manual_seed(0)

    def blurred(matrix):
        return torch.tensor(matrix) + 0.5 * torch.randn(matrix.shape, generator=noise)

    queries = {"raw": Features(torch.tensor(query), pids, cams)}
    queries["protected"] = Features(blurred(query), pids, cams)
    galleries = {"raw": Features(torch.tensor(gallery), gallery_pids, gallery_cams)}
    galleries["protected"] = Features(blurred(gallery), gallery_pids, gallery_cams)
    scores = score_directions(queries, galleries)
    assert len(scores) == 4
    for (first, second), one in scores.items():
        alone = score_retrieval(queries[first], galleries[second])
        assert (one.mAP, one.mINP) == (alone.mAP, alone.mINP)
    with pytest.raises(UserError, match="'raw' and 'other' differ"):
        score_directions(
            {"raw": queries["raw"], "other": Features(torch.tensor(query), pids, cams + 1)},
            galleries,
        )
    renamed = Features(torch.tensor(gallery), gallery_pids + 1, gallery_cams)
    with pytest.raises(UserError, match="'raw' and 'other' differ"):
        score_directions(queries, {"raw": galleries["raw"], "other": renamed})


def test_unusual_identity_and_camera_numbers_equal_naive_code():
    """Negative numbers other than -1 are identities, and so are numbers beyond int32."""
    rng = np.random.default_rng(0)
    values = np.array([0, -1, -2, 10**15])
    query, gallery = (
        (
            rng.standard_normal((count, 8)).astype(np.float32),
            rng.choice(values, count),
            rng.integers(-1, 3, count),
        )
        for count in (60, 300)
    )
    precisions, hits = [], []
    for row, pid, cam in zip(distances(query[0], gallery[0]), *query[1:], strict=True):
        keep = (gallery[1] != -1) & ~((gallery[1] == pid) & (gallery[2] == cam))
        order = np.argsort(row[keep], kind="stable")
        found = (gallery[1][keep] == pid)[order]
        if pid != -1 and found.any():
            ranks = np.flatnonzero(found) + 1
            precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
            hits.append(ranks[0] == 1)
    scores = score_retrieval(
        *(Features(torch.tensor(part[0]), *part[1:]) for part in (query, gallery))
    )
    assert scores.num_queries == len(precisions)
    assert scores.mAP == pytest.approx(np.mean(precisions), abs=1e-12)
    assert scores.rank1 == pytest.approx(np.mean(hits), abs=1e-12)


def test_sizes_that_do_not_fit_are_refused_with_the_estimate(monkeypatch):
    query, gallery = (
        Features(torch.eye(3), [1, 2, 3], [0] * 3),
        Features(torch.ones(3000, 3), range(3000), [1] * 3000),
    )
    monkeypatch.setattr(memory, "available_mib", lambda _: 1e-3)
    with pytest.raises(UserError, match=r"among 3000 gallery images needs about .* MiB"):
        score_retrieval(query, gallery)
    monkeypatch.setattr(memory, "available_mib", lambda _: 1e-9)
    with pytest.raises(UserError, match="free memory"):
        score_retrieval(query, gallery)


@pytest.mark.parametrize(
    "score", [score_retrieval, score_reranked, score_single_shot, score_verification]
)
def test_more_pairs_of_one_identity_than_fit_are_refused_before_they_are_listed(score, monkeypatch):
    monkeypatch.setattr(memory, "available_mib", lambda _: 100 / 0.9)
    one_person = Features(torch.ones(2000, 1), [1] * 2000, [0] * 2000)
    with pytest.raises(UserError, match=r"4,000,000 pairs of images .* about 183 MiB .* 100 MiB"):
        score(one_person, one_person, cross_camera=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(3), [1, 2, 3], [0, 0, 0]), "matrix with one row for each image"),
        ((torch.ones(3, 2, dtype=torch.int64), [1, 2, 3], [0, 0, 0]), "floating-point"),
        ((torch.ones(3, 2), [1, 2], [0, 0, 0]), "expected one of each"),
        ((torch.ones(1, 2), torch.tensor([0.5]), [0]), "expected whole numbers"),
    ],
)
def test_features_that_do_not_fit_together_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        Features(*arguments)


def test_networks_of_different_feature_sizes_are_refused():
    with pytest.raises(UserError, match=r"sizes \[2, 3\]"):
        score_retrieval(
            Features(torch.eye(2), [1, 2], [0, 0]), Features(torch.eye(3), [1] * 3, [1] * 3)
        )


def test_callers_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            line_up([1, 0, 1])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_golden_scores_on_cuda():
    file, query, gallery = golden()
    on_gpu = [Features(one.embeddings.cuda(), one.pids, one.camids) for one in (query, gallery)]
    scores = score_retrieval(*on_gpu)
    np.testing.assert_allclose(scores.cmc, file["cmc"], atol=1e-6)
    assert scores.mAP == pytest.approx(float(file["mAP"]), abs=1e-6)


def test_constant_features_are_noticed_whatever_the_caller_computes_in():
    row = torch.randn(1, 333, generator=torch.Generator().manual_seed(1))
    gallery = Features(row * torch.linspace(0.1, 3.3, 6)[:, None], [5, 6, 7] * 2, [1] * 6)
    query = Features(row.repeat(3, 1), [5, 6, 7], [0] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = score_retrieval(query, gallery)
    assert found.degenerate
    assert found.mAP == score_retrieval(query, gallery).mAP
