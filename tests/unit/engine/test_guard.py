"""A loss that is not finite stops the run; its name and batch are reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.records import Batch
from engine import trainer as module
from engine.trainer import LossGuard, NonFiniteError
from utils.errors import UserError
from utils.files import WriteError


def _batch(value: float = 0.0, device: str = "cpu") -> Batch:
    images = torch.full((2, 3, 4, 4), value, device=device)
    numbers = torch.arange(2)
    on = numbers.to(device)
    return Batch(images, images + 1, on, on + 10, on, numbers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_loss_is_named_at_once(tmp_path: Path, value: float) -> None:
    guard = LossGuard(tmp_path)
    losses = {"recovery": torch.tensor(1.0), "reid_raw_triplet": torch.tensor(value)}
    with pytest.raises(NonFiniteError, match=rf"step 17 \(reid_raw_triplet = {value}\)") as caught:
        guard.observe(losses, _batch(), 17)
    assert isinstance(caught.value, UserError)
    assert caught.value.exit_code != 0
    assert "recovery" not in str(caught.value).split("(")[1]


def test_the_batch_is_saved(tmp_path: Path) -> None:
    guard = LossGuard(tmp_path)
    guard.observe({"a": torch.tensor(1.0)}, _batch(1.0), 1)
    with pytest.raises(NonFiniteError):
        guard.observe({"a": torch.tensor(float("nan")), "b": torch.tensor(2.0)}, _batch(5.0), 2)
    saved = torch.load(tmp_path / "nan_batch.pth", weights_only=True)
    assert saved["step"] == 2
    assert torch.equal(saved["raw"], torch.full((2, 3, 4, 4), 5.0))
    assert torch.equal(saved["desensitized"], torch.full((2, 3, 4, 4), 6.0))
    assert saved["label"].tolist() == saved["index"].tolist() == [0, 1]
    assert saved["losses"]["b"] == 2.0


def test_every_bad_loss_is_named(tmp_path: Path) -> None:
    bad = {"a": torch.tensor(float("nan")), "b": torch.tensor(float("inf"))}
    with pytest.raises(NonFiniteError, match="a = nan, b = inf"):
        LossGuard(tmp_path).observe(bad, _batch(), 1)


def test_finite_losses_pass(tmp_path: Path) -> None:
    guard = LossGuard(tmp_path)
    for step in range(10):
        guard.observe({"a": torch.tensor(3e38), "b": torch.tensor(-1.0)}, _batch(), step)
    guard.check()
    assert not list(tmp_path.iterdir())


def test_losses_keep_their_gradients(tmp_path: Path) -> None:
    weight = torch.ones(1, requires_grad=True)
    loss = (2 * weight).sum()
    LossGuard(tmp_path).observe({"a": loss}, _batch(), 1)
    loss.backward()
    assert weight.grad == 2


def test_a_full_disk_does_not_hide_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(content: object, path: Path) -> None:
        raise WriteError("no space left")

    monkeypatch.setattr(module, "save_tensors", full)
    with pytest.raises(NonFiniteError, match="a = nan.*could not be saved .no space left"):
        LossGuard(tmp_path).observe({"a": torch.tensor(float("nan"))}, _batch(), 1)


@pytest.mark.gpu
def test_on_a_gpu_the_check_lags_a_few_steps(tmp_path: Path) -> None:
    guard = LossGuard(tmp_path, depth=2)
    guard.observe({"a": torch.tensor(float("nan"), device="cuda")}, _batch(7.0, "cuda"), 1)
    guard.observe({"a": torch.tensor(1.0, device="cuda")}, _batch(8.0, "cuda"), 2)
    with pytest.raises(NonFiniteError, match="step 1 "):
        guard.observe({"a": torch.tensor(1.0, device="cuda")}, _batch(9.0, "cuda"), 3)
    saved = torch.load(tmp_path / "nan_batch.pth", weights_only=True)
    assert float(saved["raw"].mean()) == 7.0


@pytest.mark.gpu
def test_on_a_gpu_all_steps_are_checked_before_a_save(tmp_path: Path) -> None:
    guard = LossGuard(tmp_path)
    guard.observe({"a": torch.tensor(float("nan"), device="cuda")}, _batch(0.0, "cuda"), 1)
    with pytest.raises(NonFiniteError, match="step 1 "):
        guard.check()
