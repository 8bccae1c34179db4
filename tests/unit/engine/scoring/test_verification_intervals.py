"""Intervals of the area under the ROC curve and the equal error rate, against naive resampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.scoring import ranking, verification
from engine.scoring.features import Features
from engine.scoring.intervals import draws
from engine.scoring.verification import score_verification
from tests.fixtures.naive_retrieval import unit

SAMPLES = 300


def identities_with_images(seed, *, offset=0.0, num_query=80, num_gallery=240, num_identities=12):
    """Some identities are close to all others, so that impostor pairs are correlated, too."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((num_identities, 16))
    centers[::3] *= 0.3
    sets = []
    for count in (num_query, num_gallery):
        pids = rng.integers(0, num_identities, count)
        embeddings = centers[pids] + rng.standard_normal((count, 16)) + offset
        sets.append((embeddings.astype(np.float32), pids, rng.integers(0, 3, count)))
    return sets


def features(part):
    return Features(torch.tensor(part[0]), *part[1:])


def naive_pairs(query, gallery):
    """Return cosine, whether the pair is genuine, and the query's identity, of every pair."""
    pairs = []
    for row, pid, cam in zip(unit(query[0]) @ unit(gallery[0]).T, *query[1:], strict=True):
        counts = (gallery[1] != pid) | (gallery[2] != cam)
        pairs.append((row[counts], gallery[1][counts] == pid, np.full(counts.sum(), pid)))
    return [np.concatenate(part) for part in zip(*pairs, strict=True)]


def naive_rates(genuine, weight):
    """Return area and equal error rate of weighted pairs, closest first, at every threshold."""
    true, false = (
        np.concatenate([[0], np.cumsum(weight * kind)]) / (weight * kind).sum()
        for kind in (genuine, ~genuine)
    )
    area = (np.diff(false) * (true[1:] + true[:-1]) / 2).sum()
    gap = false - (1 - true)
    index = np.flatnonzero(gap >= 0)[0]
    part = gap[index] / (gap[index] - gap[index - 1])
    return area, false[index] + part * (false[index - 1] - false[index])


def naive_bounds(query, gallery):
    cosine, genuine, person = naive_pairs(query, gallery)
    order = np.argsort(-cosine)
    numbers = np.unique(person[order], return_inverse=True)[1]
    times = draws(numbers.max() + 1, SAMPLES, 1)
    drawn = [naive_rates(genuine[order], weights[numbers]) for weights in times]
    return np.quantile(drawn, [0.025, 0.975], axis=0)


def bounds(scores):
    intervals = scores.curve_intervals(samples=SAMPLES)
    rates = [intervals["area_under_roc"], intervals["equal_error_rate"]]
    for rate, value in zip(
        rates, (scores.area_under_roc(), scores.equal_error_rate()), strict=True
    ):
        assert rate.value == value
    return np.array([[rate.low for rate in rates], [rate.high for rate in rates]])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("offset", [0.0, 6.0])
def test_intervals_equal_naive_resampling(seed, offset):
    """Also if all cosines are within a few hundredths."""
    query, gallery = identities_with_images(seed, offset=offset)
    expected = naive_bounds(query, gallery)
    actual = bounds(score_verification(features(query), features(gallery)))
    np.testing.assert_allclose(actual, expected, atol=1e-3)
    assert (expected[1] - expected[0] > 0.05).all()  # wide enough to detect an error


def test_a_sample_of_the_pairs_is_close(monkeypatch):
    monkeypatch.setattr(verification, "_BOOTSTRAP_PAIRS", 2000)
    query, gallery = identities_with_images(5)
    scores = score_verification(features(query), features(gallery))
    np.testing.assert_allclose(bounds(scores), naive_bounds(query, gallery), atol=2e-2)


def test_histograms_of_many_queries_stay_small(monkeypatch):
    """A small gallery gives blocks with many rows, which must not have one histogram each."""
    sizes, bincount = [], torch.bincount
    query, gallery = identities_with_images(8, num_query=5000, num_gallery=40)
    monkeypatch.setattr(torch, "bincount", lambda *a, **o: sizes.append(o) or bincount(*a, **o))
    score_verification(features(query), features(gallery))
    assert max(options["minlength"] for options in sizes) <= verification.BINS + 2


def test_every_pair_is_counted_once_for_any_size_of_the_blocks(monkeypatch):
    query, gallery = identities_with_images(7)
    gallery[1][:20] = -1  # junk
    whole = score_verification(features(query), features(gallery))
    cosine, genuine, _ = naive_pairs(query, [part[20:] for part in gallery])
    assert whole.num_genuine == genuine.sum()
    assert whole.num_impostor == len(cosine) - genuine.sum()
    monkeypatch.setitem(ranking._CHUNK_MIB, "cpu", 0.02)
    monkeypatch.setattr(verification, "_BLOCK_VALUES", 500)
    pieces = score_verification(features(query), features(gallery))
    np.testing.assert_array_equal(pieces.genuine, whole.genuine)
    np.testing.assert_array_equal(pieces.impostor, whole.impostor)
    np.testing.assert_allclose(bounds(pieces), bounds(whole), atol=2e-2)


def test_a_single_identity_has_intervals_of_zero_width():
    query = Features(torch.eye(3)[:1], [1], [0])
    gallery = Features(torch.eye(3) + 0.1, [1, 2, 3], [1, 1, 1])
    intervals = score_verification(query, gallery).curve_intervals(samples=20)
    for rate in intervals.values():
        assert rate.low == rate.value == rate.high
