"""Floors and intervals of pictures: exact by brute force, or calibrated against luck."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.attacks.measures import (
    FAILS,
    HOLDS,
    PSNR_CAP_DB,
    Measure,
    Result,
    image_measures,
    permute_identities,
)

ONE_CAMERA = torch.zeros(30, dtype=torch.int64)


def verdict(measures: tuple[Measure, ...]) -> str:
    return Result("a", "raw", "s", measures).verdict


def test_pictures_are_dealt_to_others() -> None:
    pids = torch.tensor([5, 5, 7, 9, 9, 9])
    dealt = permute_identities(pids, 50, np.random.default_rng(1))
    assert dealt.shape == (50, 6)
    assert (pids.numpy()[dealt] != pids.numpy()).all()
    assert {pids.numpy()[place] for place in dealt[:, 0]} == {7, 9}


def test_pictures_are_dealt_within_cameras() -> None:
    pids, camids = torch.tensor([1, 1, 2, 3, 4, 4]), torch.tensor([0, 1, 0, 1, 2, 2])
    dealt = permute_identities(pids, 50, np.random.default_rng(1), camids)
    assert (pids.numpy()[dealt] != pids.numpy()).all()
    assert (camids.numpy()[dealt[:, :4]] == camids[:4].numpy()).all()
    assert set(dealt[:, 4]) == {0, 1, 2, 3}  # person 4 is alone at its camera


def test_a_camera_is_not_an_identity() -> None:
    """An attacker that returns the same picture for each image of a bright camera."""
    generator = torch.Generator().manual_seed(1)
    pids = torch.arange(16).repeat_interleave(10)
    camids = torch.arange(160) % 2
    people = torch.rand(16, 3, 16, 8, generator=generator) * 0.4 + 0.1
    truth = people[pids] + 0.3 * camids.view(-1, 1, 1, 1)
    drawn = (0.3 + 0.3 * camids.view(-1, 1, 1, 1)).expand_as(truth)
    guess = truth.mean(0, keepdim=True)
    assert verdict(image_measures(drawn, truth, guess, pids, camids, 1)) == HOLDS
    assert verdict(image_measures(drawn, truth, guess, pids, camids * 0, 1)) == FAILS


def scene(seed: int, persons: int = 10, images: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pids = torch.arange(persons).repeat_interleave(images)
    return torch.rand(len(pids), 3, 16, 8, generator=generator), pids


def test_luck_does_not_pass_for_a_leak_in_pictures() -> None:
    truth, pids = scene(1)
    guess = truth.mean(0, keepdim=True)
    alarms = 0
    for seed in range(25):
        drawn = scene(100 + seed)[0]
        alarms += verdict(image_measures(drawn, truth, guess, pids, ONE_CAMERA, seed)) == FAILS
    assert alarms == 0


def test_a_good_guess_for_everybody_is_no_leak() -> None:
    """The mean image scores better than noise but contains no information about identities."""
    truth, pids = scene(2)
    guess = truth.mean(0, keepdim=True)
    measures = image_measures(guess.expand_as(truth), truth, scene(9)[0][:1], pids, ONE_CAMERA, 1)
    assert measures[0].value.value > measures[0].floor.value
    assert verdict(measures) == HOLDS


def test_a_faint_trace_of_the_person_is_a_leak() -> None:
    """Below the blind guess in PSNR, and yet each picture shows its own person."""
    truth, pids = scene(3)
    drawn = 0.15 * truth + 0.85 * scene(4)[0]
    measures = image_measures(drawn, truth, truth.mean(0, keepdim=True), pids, ONE_CAMERA, 1)
    assert measures[0].value.value < measures[0].floor.value
    assert verdict(measures) == FAILS


def test_a_network_that_fails_on_one_image_still_leaks_the_others() -> None:
    truth, pids = scene(6)
    drawn = truth.clone()
    drawn[4] = float("nan")
    measures = image_measures(drawn, truth, truth.mean(0, keepdim=True), pids, ONE_CAMERA, 1)
    assert all(np.isfinite(measure.value.value) for measure in measures)
    assert verdict(measures) == FAILS


def test_the_truth_itself_is_capped_not_infinite() -> None:
    truth, pids = scene(5)
    measures = {m.name: m for m in image_measures(truth, truth, truth[:1], pids, ONE_CAMERA, 1)}
    assert measures["psnr"].value.value == PSNR_CAP_DB
    assert measures["ssim"].value.value == pytest.approx(1, abs=1e-5)
    assert measures["psnr_own_gain"].beyond_floor
