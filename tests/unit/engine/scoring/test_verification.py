"""Verification, single-shot galleries and bootstrap intervals against naive versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scoring import ranking, verification
from engine.scoring.features import Features
from engine.scoring.intervals import Interval, bootstrap_ratios, retrieval_intervals
from engine.scoring.retrieval import score_retrieval
from engine.scoring.single_shot import score_single_shot
from engine.scoring.verification import BINS, calibrate, score_verification
from tests.fixtures.naive_retrieval import unit
from utils import memory
from utils.errors import UserError


def clustered(seed, num_query=30, num_gallery=120, spread=1.0):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((8, 16))
    sets = []
    for count in (num_query, num_gallery):
        pids = rng.choice([-1, 0, 1, 2, 3, 4, 5, 6], count)
        embeddings = centers[pids] + spread * rng.standard_normal((count, 16))
        sets.append((embeddings.astype(np.float32), pids, rng.integers(0, 3, count)))
    return sets


def features(part, dtype=torch.float32):
    return Features(torch.tensor(part[0]).to(dtype), *part[1:])


def naive_pairs(query, gallery, cross_camera=True):
    """Return the cosines of all genuine and of all impostor pairs of scored queries."""
    genuine, impostor = [], []
    for row, pid, cam in zip(unit(query[0]) @ unit(gallery[0]).T, *query[1:], strict=True):
        same = (gallery[1] == pid) & (pid != -1)
        hidden = same & (gallery[2] == cam) & cross_camera
        if (same & ~hidden).any():
            genuine.append(row[same & ~hidden])
            impostor.append(row[~same & (gallery[1] != -1)])
    return np.concatenate(genuine), np.concatenate(impostor)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cross_camera=st.booleans())
def test_rates_equal_those_of_all_pairs(seed, cross_camera):
    query, gallery = clustered(seed)
    scores = score_verification(features(query), features(gallery), cross_camera=cross_camera)
    genuine, impostor = naive_pairs(query, gallery, cross_camera)
    assert (scores.num_genuine, scores.num_impostor) == (len(genuine), len(impostor))
    for rate in verification.FALSE_POSITIVE_RATES:
        first_bin = scores.bin_at(rate)
        threshold = verification.threshold_of(first_bin)
        true, false = scores.rates_at(first_bin)
        # A similarity that rounding put on the other side of the edge is one pair.
        assert true == pytest.approx((genuine >= threshold).mean(), abs=1.5 / len(genuine))
        assert false == pytest.approx((impostor >= threshold).mean(), abs=1.5 / len(impostor))
        assert false <= rate
        allowed = np.sort(impostor)[::-1][int(rate * len(impostor))]
        assert true == pytest.approx((genuine > allowed).mean(), abs=1.5 / len(genuine))


def test_curve_area_and_equal_error_equal_naive_ones():
    query, gallery = clustered(3)
    scores = score_verification(features(query), features(gallery))
    genuine, impostor = naive_pairs(query, gallery)
    higher = (genuine[:, None] > impostor).mean() + (genuine[:, None] == impostor).mean() / 2
    assert scores.area_under_roc() == pytest.approx(higher, abs=1e-4)
    false, true, threshold = scores.roc()
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(threshold) < 0).all()
    for place in range(1, len(false), 50):
        edge = threshold[place] - 1e-7
        assert true[place] == pytest.approx((genuine >= edge).mean(), abs=2 / len(genuine))
    every = np.sort(np.concatenate([genuine, impostor]))
    gaps = [abs((genuine < t).mean() - (impostor >= t).mean()) for t in every]
    best = every[int(np.argmin(gaps))]
    naive = ((genuine < best).mean() + (impostor >= best).mean()) / 2
    assert scores.equal_error_rate() == pytest.approx(naive, abs=0.01)


def test_verification_does_not_depend_on_chunks_or_type(monkeypatch):
    query, gallery = clustered(4)
    whole = score_verification(features(query), features(gallery))
    monkeypatch.setitem(ranking._CHUNK_MIB, "cpu", 0.02)
    monkeypatch.setattr(verification, "_BLOCK_VALUES", 300)
    pieces = score_verification(features(query), features(gallery))
    assert np.abs(whole.pair_bin - pieces.pair_bin).max() <= 1
    np.testing.assert_array_equal(whole.pair_query, pieces.pair_query)
    half = score_verification(features(query, torch.float16), features(gallery, torch.float16))
    assert half.area_under_roc() == pytest.approx(whole.area_under_roc(), abs=1e-3)


def test_memory_of_histograms_counts_too(monkeypatch):
    query, gallery = (features(part) for part in clustered(3, num_query=400, num_gallery=600))
    whole = score_verification(query, gallery)
    monkeypatch.setattr(memory, "available_mib", lambda _: 60 / 0.9)
    tight = score_verification(query, gallery)
    assert np.array_equal(whole.impostor, tight.impostor)
    monkeypatch.setattr(memory, "available_mib", lambda _: 40 / 0.9)
    with pytest.raises(UserError, match="40 MiB may be used"):
        score_verification(query, gallery)


def test_rows_are_fewer_where_the_caller_needs_memory_for_each(monkeypatch):
    """A drawn gallery of many people takes several times the memory of its products."""
    sizes, multiply = [], ranking._multiply

    def noted(queries, index, *rest):
        sizes.append(len(index))
        multiply(queries, index, *rest)

    monkeypatch.setattr(ranking, "_multiply", noted)
    query, gallery = (
        Features(torch.randn(n, 4), torch.arange(n), torch.full((n,), camera))
        for n, camera in ((300, 0), (4000, 1))
    )
    monkeypatch.setattr(memory, "available_mib", lambda _: 4 / 0.9)
    score_single_shot(query, gallery, draws=1)
    row_bytes = 4 * (len(gallery) + 12) + 32 * len(gallery)
    assert max(sizes) * row_bytes < 4 * 2**20
    assert sum(sizes) == len(query)


def test_perfect_features_and_calibration():
    pids = np.arange(1, 41)
    embeddings = torch.eye(40)
    query = Features(embeddings, pids, [0] * 40)
    scores = score_verification(query, Features(embeddings, pids, [1] * 40))
    assert scores.rates_at(scores.bin_at(1e-4))[0] == 1
    assert (scores.area_under_roc(), scores.equal_error_rate()) == (1, 0)
    found = scores.curve_intervals(samples=50)
    assert found["area_under_roc"] == Interval(1, 1, 1)
    assert found["equal_error_rate"] == Interval(0, 0, 0)
    chosen = calibrate(scores, false_positive_rate=1e-2)
    assert (chosen.tpr, chosen.num_genuine, chosen.num_impostor) == (1, 40, 1560)
    assert chosen.fpr <= chosen.asked_fpr
    assert calibrate(scores, false_positive_rate=1 / 1560).fpr <= 1 / 1560  # of one pair


def test_the_smallest_rate_of_any_number_of_pairs_is_accepted():
    """(1 / 49) * 49 is less than 1."""
    query = Features(torch.eye(8)[:7], range(7), [0] * 7)
    scores = score_verification(query, Features(torch.eye(8), range(8), [1] * 8))
    assert scores.num_impostor == 49
    assert calibrate(scores, false_positive_rate=1 / 49).tpr == 1


def test_calibration_holds_its_promise_on_validation():
    query, gallery = clustered(6)
    scores = score_verification(features(query), features(gallery))
    genuine, impostor = naive_pairs(query, gallery)
    chosen = calibrate(scores, false_positive_rate=0.05)
    assert np.mean(np.array(impostor) >= chosen.threshold) <= 0.05
    accepted = np.mean(np.array(genuine) >= chosen.threshold)
    assert accepted == pytest.approx(chosen.tpr, abs=1.5 / len(genuine))


def test_thresholds_that_mean_nothing_are_refused():
    query, gallery = clustered(6)
    scores = score_verification(features(query), features(gallery))
    for rate in (1e-9, 0.0, 1.0):
        with pytest.raises(UserError, match="a larger validation split"):
            calibrate(scores, false_positive_rate=rate)
    constant = Features(torch.ones(3, 4), [1, 2, 3], [1, 1, 1])
    flat = score_verification(Features(torch.ones(2, 4), [1, 2], [0, 0]), constant)
    assert flat.degenerate
    assert flat.rates_at(flat.bin_at(0.1))[0] == 0
    for interval in flat.curve_intervals(samples=20).values():
        assert (interval.low, interval.value, interval.high) == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="the same for every identity"):
        calibrate(flat)
    with pytest.raises(UserError, match="at least two identities"):
        score_verification(
            Features(torch.eye(2), [1, 1], [0, 0]), Features(torch.eye(2), [1, 1], [1, 1])
        )


def test_bins_cover_every_cosine():
    values = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5, torch.nan])
    assert verification.bins_of(values).tolist() == [0, 0, BINS // 2, BINS, BINS, 0]
    assert verification.threshold_of(np.array([0, BINS // 2, BINS])).tolist() == [-1, 0, 1]


def test_intervals_of_true_positive_rates_hold_their_value():
    query, gallery = clustered(7)
    scores = score_verification(features(query), features(gallery))
    for rate, interval in scores.tpr_intervals(samples=200).items():
        assert interval.value == pytest.approx(scores.rates_at(scores.bin_at(rate))[0])
        assert interval.low <= interval.value <= interval.high


def naive_single_shot(query, gallery, draws, rng):
    """Draw galleries one by one and sort them."""
    ranks = []
    similarity = unit(query[0]) @ unit(gallery[0]).T
    images_of = {pid: np.flatnonzero(gallery[1] == pid) for pid in np.unique(gallery[1])}
    for row, pid, cam in zip(similarity, *query[1:], strict=True):
        mine = np.flatnonzero((gallery[1] == pid) & (gallery[2] != cam))
        if pid == -1 or not len(mine):
            continue
        others = [images for other, images in images_of.items() if other not in (-1, pid)]
        for _ in range(draws):
            rivals = [images[rng.integers(len(images))] for images in others]
            ranks.append(1 + (row[rivals] > row[mine[rng.integers(len(mine))]]).sum())
    return np.mean(np.array(ranks)[:, None] <= np.arange(1, 51), axis=0)


@pytest.mark.parametrize("seed", range(3))
def test_single_shot_equals_drawing_and_sorting(seed):
    query, gallery = clustered(seed)
    scores = score_single_shot(features(query), features(gallery), draws=300)
    naive = naive_single_shot(query, gallery, 150, np.random.default_rng(0))
    np.testing.assert_allclose(scores.cmc, naive, atol=0.03)
    assert scores.num_identities == 7
    assert scores.cmc[6:].tolist() == [1.0] * 44


def test_single_shot_of_one_image_a_person_is_retrieval():
    rng = np.random.default_rng(1)
    gallery = Features(torch.tensor(rng.standard_normal((30, 8))), np.arange(30), [1] * 30)
    query = Features(torch.tensor(rng.standard_normal((20, 8))), np.arange(20), [0] * 20)
    scores, plain = score_single_shot(query, gallery, draws=2), score_retrieval(query, gallery)
    np.testing.assert_allclose(scores.cmc, plain.cmc)
    np.testing.assert_array_equal(scores.ranks[:, 0], plain.per_query.first_rank)
    assert scores.intervals(samples=50)["rank1"].value == pytest.approx(plain.rank1)


def test_single_shot_of_broken_matches_is_the_worst():
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    embeddings[:6] = torch.nan
    gallery = Features(embeddings, [1, 1, 2, 3, 4, 5, 6, 7], [1] * 8)
    scores = score_single_shot(Features(torch.eye(4)[:2], [1, 1], [0, 0]), gallery)
    assert scores.degenerate
    assert (scores.ranks == 7).all()


@pytest.mark.parametrize("side", ["query", "gallery"])
def test_pairs_with_a_broken_image_are_as_far_as_can_be(side):
    sets = {"query": torch.eye(4)[:2], "gallery": torch.eye(4)}
    sets[side] = sets[side].clone()
    sets[side][0] = torch.nan
    scores = score_verification(
        Features(sets["query"], [1, 2], [0, 0]), Features(sets["gallery"], [1, 2, 3, 4], [1] * 4)
    )
    assert scores.degenerate
    assert scores.pair_bin.tolist() == [0, BINS]


def test_single_shot_of_constant_features_is_the_worst():
    query = Features(torch.ones(2, 3), [1, 2], [0, 0])
    scores = score_single_shot(query, Features(torch.ones(4, 3), [1, 2, 3, 4], [1] * 4), draws=3)
    assert scores.degenerate
    assert (scores.ranks == 4).all()


def naive_bootstrap(values, pids, samples, rng):
    people = np.unique(pids)
    rates = []
    for _ in range(samples):
        drawn = rng.choice(people, len(people))
        rates.append(np.concatenate([values[pids == one] for one in drawn]).mean())
    return np.quantile(rates, [0.025, 0.975])


def test_intervals_equal_a_naive_bootstrap():
    rng = np.random.default_rng(0)
    pids = rng.integers(0, 40, 200)
    values = (rng.random(200) < 0.2 + 0.6 * (pids % 2)).astype(float)
    (interval,) = bootstrap_ratios(values[:, None], np.ones(200), pids, samples=4000)
    assert interval.value == pytest.approx(values.mean())
    naive = naive_bootstrap(values, pids, 4000, rng)
    np.testing.assert_allclose([interval.low, interval.high], naive, atol=0.015)


def test_people_are_resampled_not_queries():
    pids = np.repeat([1, 2, 3, 4], 100)
    values = np.isin(pids, [1, 2]).astype(float)  # two people always found, two never
    (interval,) = bootstrap_ratios(values[:, None], np.ones(400), pids)
    assert (interval.low, interval.high) == (0, 1)


def test_a_single_query_has_an_interval_of_no_width():
    (interval,) = bootstrap_ratios([[0.5]], [1], [4])
    assert (interval.low, interval.value, interval.high) == (0.5, 0.5, 0.5)


def test_every_retrieval_rate_has_an_interval():
    query, gallery = clustered(2)
    scores = score_retrieval(features(query), features(gallery))
    intervals = retrieval_intervals(scores, samples=100)
    for name in ("rank1", "rank5", "rank10", "mAP", "mINP"):
        assert intervals[name].value == pytest.approx(getattr(scores, name))
        assert intervals[name].low <= intervals[name].value <= intervals[name].high
    assert intervals == retrieval_intervals(scores, samples=100)
    assert len(intervals) == 52


def test_a_bootstrap_of_no_query_is_refused():
    with pytest.raises(UserError, match="no query"):
        bootstrap_ratios(np.empty((0, 1)), [], [])
