"""The record of one direction: plain JSON that agrees with the scores it is made of."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engine.details import details_table, score_details
from engine.scoring.features import Features
from engine.scoring.intervals import Access
from engine.scoring.retrieval import score_retrieval
from engine.scoring.single_shot import score_single_shot
from engine.scoring.verification import score_verification


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((10, 16))
    sets = []
    for count in (40, 150):
        pids = rng.integers(0, 10, count)
        embeddings = centers[pids] + rng.standard_normal((count, 16))
        sets.append(Features(torch.tensor(embeddings), pids, rng.integers(0, 3, count)))
    return sets


@pytest.fixture
def details(sets):
    return score_details(*sets)


@pytest.mark.parametrize("cross_camera", [True, False])
def test_every_score_is_made_with_the_same_options(sets, cross_camera):
    details = score_details(*sets, cross_camera=cross_camera, seed=5)
    retrieval = score_retrieval(*sets, cross_camera=cross_camera)
    assert (details.retrieval.mAP, details.retrieval.mINP) == (retrieval.mAP, retrieval.mINP)
    verification = score_verification(*sets, cross_camera=cross_camera)
    assert details.verification.num_genuine == verification.num_genuine
    single_shot = score_single_shot(*sets, cross_camera=cross_camera, seed=5)
    np.testing.assert_array_equal(details.single_shot.ranks, single_shot.ranks)


def test_it_is_plain_json_and_agrees_with_the_scores(details):
    content = json.loads(json.dumps(details.rates, allow_nan=False))
    assert content["retrieval"]["mAP"]["value"] == pytest.approx(details.retrieval.mAP)
    assert content["single_shot"]["rank1"]["value"] == pytest.approx(details.single_shot.cmc[0])
    rates = content["verification"]["tpr_at_fpr"]
    assert set(rates) == {"0.1", "0.01", "0.001", "0.0001"}
    for rate, interval in rates.items():
        scores = details.verification
        assert interval["value"] == pytest.approx(scores.rates_at(scores.bin_at(float(rate)))[0])
    for name in ("area_under_roc", "equal_error_rate"):
        interval = content["verification"][name]
        assert interval["value"] == getattr(details.verification, name)()
        assert interval["low"] < interval["value"] < interval["high"]


def test_the_curve_is_thinned_but_keeps_its_ends(details):
    curve = details.rates["verification"]["roc"]
    assert len(curve["fpr"]) <= 200
    assert (curve["fpr"][-1], curve["tpr"][-1]) == (1.0, 1.0)
    for name in ("fpr", "tpr"):
        assert (np.diff(curve[name]) >= 0).all()


def test_a_single_shot_gallery_is_harder_than_the_whole(details):
    assert details.single_shot.cmc[0] <= details.retrieval.rank1


def test_one_identity_has_no_verification_rates(caplog):
    embeddings = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    pids = torch.full((6,), 7)
    one = [Features(embeddings, pids, torch.full((6,), camera)) for camera in (0, 1)]
    details = score_details(*one)
    assert details.verification is None
    assert details.retrieval.rank1 == 1.0
    assert json.loads(json.dumps(details.rates, allow_nan=False))["verification"] is None
    assert "Verification rates are left out of the details: every pair" in caplog.text
    row = details_table({"raw->raw": details}, Access()).splitlines()[-1]
    assert row.split()[:1] == ["raw->raw"]
    assert " - " in row
