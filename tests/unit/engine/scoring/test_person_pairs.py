"""Intervals of the area under the curve and of the equal error rate against drawing all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.scoring import products, verification
from engine.scoring import verification as person_pairs
from engine.scoring.bootstrap import draws
from engine.scoring.features import Features
from engine.scoring.verification import score_verification
from tests.fixtures.naive_retrieval import unit

SAMPLES = 300


def people(seed, *, offset=0.0, num_query=80, num_gallery=240, num_people=12):
    """Some people look like everybody, so that pairs with others hang together, too."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((num_people, 16))
    centers[::3] *= 0.3
    sets = []
    for count in (num_query, num_gallery):
        pids = rng.integers(0, num_people, count)
        embeddings = centers[pids] + rng.standard_normal((count, 16)) + offset
        sets.append((embeddings.astype(np.float32), pids, rng.integers(0, 3, count)))
    return sets


def features(part):
    return Features(torch.tensor(part[0]), *part[1:])


def naive_pairs(query, gallery):
    """Return cosine, whether it is of one person, and the query's person, of every pair."""
    found = []
    for row, pid, cam in zip(unit(query[0]) @ unit(gallery[0]).T, *query[1:], strict=True):
        counts = (gallery[1] != pid) | (gallery[2] != cam)
        found.append((row[counts], gallery[1][counts] == pid, np.full(counts.sum(), pid)))
    return [np.concatenate(part) for part in zip(*found, strict=True)]


def naive_rates(genuine, weight):
    """Return area and equal error rate of weighted pairs, closest first, at every threshold."""
    true, false = (
        np.concatenate([[0], np.cumsum(weight * kind)]) / (weight * kind).sum()
        for kind in (genuine, ~genuine)
    )
    area = (np.diff(false) * (true[1:] + true[:-1]) / 2).sum()
    gap = false - (1 - true)
    place = np.flatnonzero(gap >= 0)[0]
    part = gap[place] / (gap[place] - gap[place - 1])
    return area, false[place] + part * (false[place - 1] - false[place])


def naive_bounds(query, gallery):
    cosine, genuine, person = naive_pairs(query, gallery)
    order = np.argsort(-cosine)
    numbers = np.unique(person[order], return_inverse=True)[1]
    times = draws(numbers.max() + 1, SAMPLES, 1)
    drawn = [naive_rates(genuine[order], one[numbers]) for one in times]
    return np.quantile(drawn, [0.025, 0.975], axis=0)


def bounds(scores):
    found = scores.curve_intervals(samples=SAMPLES)
    rates = [found["area_under_roc"], found["equal_error_rate"]]
    for rate, value in zip(
        rates, (scores.area_under_roc(), scores.equal_error_rate()), strict=True
    ):
        assert rate.value == value
    return np.array([[rate.low for rate in rates], [rate.high for rate in rates]])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("offset", [0.0, 6.0])
def test_intervals_equal_drawing_all_pairs_of_a_person(seed, offset):
    """Also where all cosines lie within a few hundredths."""
    query, gallery = people(seed, offset=offset)
    expected = naive_bounds(query, gallery)
    found = bounds(score_verification(features(query), features(gallery)))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert (expected[1] - expected[0] > 0.05).all()  # which is to be seen


def test_few_thresholds_are_close(monkeypatch):
    monkeypatch.setattr(person_pairs, "_MOST_COUNTS", 0)
    query, gallery = people(5)
    scores = score_verification(features(query), features(gallery))
    assert scores.by_person.genuine.shape[1] <= 16
    np.testing.assert_allclose(bounds(scores), naive_bounds(query, gallery), atol=2e-2)


def test_counts_of_many_people_stay_small(monkeypatch):
    monkeypatch.setattr(person_pairs, "_MOST_COUNTS", 600 * 40)
    query, gallery = people(6, num_query=900, num_gallery=2400, num_people=600)
    counts = score_verification(features(query), features(gallery)).by_person
    assert counts.genuine.shape == counts.impostor.shape
    assert counts.genuine.size <= 600 * 40


def test_a_block_of_many_queries_counts_by_person(monkeypatch):
    """A small gallery makes blocks of very many rows, each of which must not have counts."""
    sizes, bincount = [], torch.bincount
    query, gallery = people(8, num_query=5000, num_gallery=40)
    monkeypatch.setattr(torch, "bincount", lambda *a, **o: sizes.append(o) or bincount(*a, **o))
    score_verification(features(query), features(gallery))
    assert max(one["minlength"] for one in sizes) <= max(verification.BINS + 2, 12 * 1025)


def test_every_pair_is_counted_once_whatever_the_pieces(monkeypatch):
    query, gallery = people(7)
    gallery[1][:20] = -1  # junk
    whole = score_verification(features(query), features(gallery))
    assert whole.by_person.genuine.sum() == whole.num_genuine
    assert whole.by_person.impostor.sum() == whole.num_impostor
    _, genuine, person = naive_pairs(query, [part[20:] for part in gallery])
    for row, pid in enumerate(np.unique(whole.query_pid)):
        assert whole.by_person.genuine[row].sum() == (genuine & (person == pid)).sum()
        assert whole.by_person.impostor[row].sum() == (~genuine & (person == pid)).sum()
    monkeypatch.setitem(products._CHUNK_MIB, "cpu", 0.02)
    monkeypatch.setattr(verification, "_BLOCK_VALUES", 500)
    pieces = score_verification(features(query), features(gallery))
    np.testing.assert_allclose(bounds(pieces), bounds(whole), atol=1e-4)


def test_a_single_person_has_intervals_of_no_width():
    query = Features(torch.eye(3)[:1], [1], [0])
    gallery = Features(torch.eye(3) + 0.1, [1, 2, 3], [1, 1, 1])
    found = score_verification(query, gallery).curve_intervals(samples=20)
    for rate in found.values():
        assert rate.low == rate.value == rate.high
