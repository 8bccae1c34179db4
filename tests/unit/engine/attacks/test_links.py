"""Who finds whom among few images: the scores of a real retrieval, and no luck taken for a leak."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.attacks.linkage import PairRules, cosines, link_measures
from engine.attacks.measures import FAILS, HOLDS, Measure, Result
from engine.scoring.features import Features
from engine.scoring.retrieval import score_retrieval
from engine.scoring.verification import score_verification
from utils.errors import UserError


def side(count: int, seed: int, people: int = 8, cameras: int = 3) -> Features:
    generator = torch.Generator().manual_seed(seed)
    pids = torch.arange(count) % people
    return Features(
        torch.randn(count, 6, generator=generator),
        pids[torch.randperm(count, generator=generator)],
        torch.randint(cameras, (count,), generator=generator),
    )


def verdict(measures: tuple[Measure, ...]) -> str:
    return Result("a", "raw", "s", measures).verdict


@pytest.mark.parametrize("cross_camera", [True, False])
def test_tables_give_the_scores_of_the_retrieval_that_holds_none(cross_camera: bool) -> None:
    query, gallery = side(24, 1), side(60, 2)
    expected = score_retrieval(query, gallery, cross_camera=cross_camera)
    rules = PairRules.of(query, gallery, cross_camera=cross_camera)
    found = rules.scores(cosines(query, gallery))
    assert rules.scored.tolist() == expected.per_query.index.tolist()
    assert np.array_equal(found["rank1"], expected.per_query.first_rank == 1)
    assert np.allclose(found["mAP"], expected.per_query.average_precision)


def test_area_is_the_chance_that_a_match_is_closer() -> None:
    query, gallery = side(1, 3), side(40, 4)
    found = PairRules.of(query, gallery, cross_camera=True).scores(cosines(query, gallery))
    expected = score_verification(query, gallery).area_under_roc()
    assert found["auc"][0] == pytest.approx(expected, abs=1e-5)


def test_nobody_to_find_is_said() -> None:
    query, gallery = side(4, 5, cameras=1), side(8, 6, cameras=1)
    with pytest.raises(UserError, match="CROSS_CAMERA"):
        PairRules.of(query, gallery, cross_camera=True)


def test_luck_does_not_pass_for_a_leak_in_searches() -> None:
    """Embeddings that know nothing, many times."""
    alarms = 0
    for seed in range(40):
        measures = link_measures(side(32, seed), side(64, 1000 + seed), seed, cross_camera=True)
        alarms += verdict(measures) == FAILS
    assert alarms == 0


def test_a_network_that_knows_cameras_alone_finds_nobody() -> None:
    query, gallery = side(48, 1), side(96, 2)
    by_camera = [
        Features(torch.eye(3)[one.camids] + 0.01 * one.embeddings[:, :3], one.pids, one.camids)
        for one in (query, gallery)
    ]
    assert verdict(link_measures(*by_camera, 1, cross_camera=True)) == HOLDS


def test_a_network_that_knows_tracks_alone_has_the_floor_of_one_that_knows_nothing() -> None:
    """Images of one person and camera are similar, which a search between cameras must not use."""
    persons, each = 12, 8
    pids = torch.arange(persons).repeat_interleave(2 * each)
    camids = torch.arange(2).repeat_interleave(each).repeat(persons)
    is_query = torch.arange(len(pids)) % each == 0
    gaps = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        track = torch.randn(2 * persons, 32, generator=generator)[2 * pids + camids]
        seen = 2 * track + torch.randn(track.shape, generator=generator)
        sides = [Features(seen[m], pids[m], camids[m]) for m in (is_query, ~is_query)]
        (auc,) = link_measures(*sides, seed, cross_camera=True, names=("auc",))
        gaps.append(auc.value.value - auc.floor.value)
    assert abs(sum(gaps) / len(gaps)) < 0.02  # it was .04 while doubles stood in the way


def test_persons_who_each_have_a_camera_of_their_own_are_dealt_among_all() -> None:
    """Among themselves their queries change nothing, and the floor would be the score."""
    people, seen = torch.arange(8).repeat_interleave(6), torch.arange(8).repeat_interleave(4)
    query = Features(torch.eye(8)[people], people, people)
    gallery = Features(torch.eye(8)[seen], seen, torch.full((32,), 99))
    measures = link_measures(query, gallery, 1, cross_camera=True)
    assert [measure.value.value for measure in measures] == [1.0, 1.0]
    assert all(measure.beyond_floor for measure in measures)


def test_a_network_that_knows_persons_is_found_out() -> None:
    query, gallery = side(32, 1), side(64, 2)
    known = [
        Features(torch.eye(8)[one.pids] + 0.1 * one.embeddings[:, :1], one.pids, one.camids)
        for one in (query, gallery)
    ]
    measures = link_measures(*known, 1, cross_camera=True, names=("rank1", "mAP", "auc"))
    assert [measure.name for measure in measures] == ["rank1", "mAP", "auc"]
    assert all(measure.beyond_floor for measure in measures)
    assert measures[0].value.value > 0.9


def test_given_similarities_take_the_place_of_the_embeddings() -> None:
    query, gallery = side(32, 5), side(64, 6)
    blind = Features(torch.zeros(64, 1), gallery.pids, gallery.camids)
    by_embedding = link_measures(query, gallery, 1, cross_camera=True)
    given = {"similarity": cosines(query, gallery), "cross_camera": True}
    assert link_measures(query, blind, 1, **given) == by_embedding


@pytest.mark.parametrize("people", [[5, 5, 5, 5], [5, 5, 5, 5, 3], [3] * 5, [5, 5, 5, 1]])
def test_a_network_that_knows_sites_alone_finds_nobody(people: list[int]) -> None:
    """Each identity is seen by the two cameras of its site; a site may have few identities."""
    alarms = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        site = torch.arange(len(people)).repeat_interleave(torch.tensor(people))
        pids = torch.arange(len(site)).repeat_interleave(6)
        image = torch.arange(len(pids))
        camids, is_query = 2 * site[pids] + image % 2, image % 6 < 2
        noise = torch.randn(len(pids), 16, generator=generator)
        embeddings = torch.cat([4 * torch.eye(len(people))[site[pids]], noise], 1)
        sides = [Features(embeddings[m], pids[m], camids[m]) for m in (is_query, ~is_query)]
        alarms += verdict(link_measures(*sides, seed, cross_camera=True)) == FAILS
    assert alarms == 0
