"""A batch that does not fit into memory: the largest size that fits is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.records import Batch
from engine.train_step import BatchTooLarge, JointStep, StepOutput, step_that_fits
from tests.fixtures import tiny
from tools import main as command

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU")


class Step:
    """A step that takes batches up to a size."""

    anonymizer = None

    def __init__(self, limit: int, error: Exception = OUT_OF_MEMORY) -> None:
        self.limit, self.sizes, self.error = limit, list[int](), error

    def __call__(self, batch: Batch) -> StepOutput:
        self.sizes.append(len(batch))
        if len(batch) > self.limit:
            raise self.error
        return StepOutput({}, torch.zeros(()), torch.zeros(()))


def _batch(count: int) -> Batch:
    number = torch.arange(count)
    return Batch(number, number, number, number, number, number)


@pytest.mark.parametrize("limit", range(8, 48, 3))
def test_the_largest_size_that_fits_is_reported(limit: int) -> None:
    step, cleaned = Step(limit), []
    with pytest.raises(BatchTooLarge) as caught:
        step_that_fits(
            step, _batch(48), num_instances=4, clean=lambda: cleaned.append(1), alone=True
        )
    assert (caught.value.size, caught.value.fits) == (48, limit // 4 * 4)
    assert f"{limit // 4 * 4} images were tried and fit" in str(caught.value)
    assert "Tried to allocate" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(size % 4 == 0 and size >= 8 for size in step.sizes)
    assert len(cleaned) == len({*step.sizes}) - 1 <= 5


class Growing(Step):
    """A step that takes fewer images once the optimisers have their moments."""

    def __call__(self, batch: Batch) -> StepOutput:
        output = super().__call__(batch)
        self.limit = min(self.limit, 20)
        return output


def test_a_size_that_fits_once_only_does_not_fit() -> None:
    with pytest.raises(BatchTooLarge, match="20 images were tried"):
        step_that_fits(Growing(40), _batch(48), num_instances=4, clean=lambda: None, alone=True)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ],
)
def test_out_of_memory_errors_of_libraries_count(text: str) -> None:
    step = Step(20, RuntimeError(text))
    with pytest.raises(BatchTooLarge, match="20 images were tried") as caught:
        step_that_fits(step, _batch(48), num_instances=4, clean=lambda: None, alone=True)
    assert "\n" not in str(caught.value)


def test_other_errors_are_raised_unchanged() -> None:
    step = Step(20, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        step_that_fits(step, _batch(48), num_instances=4, clean=lambda: None, alone=True)
    assert step.sizes == [48]


def test_nothing_fits() -> None:
    with pytest.raises(BatchTooLarge, match="no batch of two or more identities fits"):
        step_that_fits(Step(3), _batch(16), num_instances=4, clean=lambda: None, alone=True)


def test_no_size_is_tried_in_a_distributed_run() -> None:
    step = Step(3)
    with pytest.raises(BatchTooLarge) as caught:
        step_that_fits(step, _batch(16), num_instances=4, clean=lambda: None, alone=False)
    assert caught.value.fits is None
    assert step.sizes == [16]


def test_a_batch_that_fits_runs_once() -> None:
    step = Step(16)
    step_that_fits(step, _batch(16), num_instances=4, clean=pytest.fail, alone=True)
    assert step.sizes == [16]


def test_a_run_ends_in_one_line_and_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.install(monkeypatch)
    whole, calls = JointStep.__call__, []

    def limited(self: JointStep, batch: Batch) -> StepOutput:
        calls.append(len(batch))
        if len(calls) > 7 and len(batch) > 12:  # in the second epoch
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, batch)

    monkeypatch.setattr(JointStep, "__call__", limited)
    overrides = ("SOLVER.IMS_PER_BATCH", "24", "DATALOADER.NUM_INSTANCE", "4")
    assert command.main(tiny.arguments(tmp_path, *overrides, "SOLVER.MAX_EPOCHS", "9")) == 1
    line = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(line) == 1
    assert "SOLVER.IMS_PER_BATCH 12 instead of 24" in line[0]
    assert tiny.native(tmp_path / "run")["epoch"] >= 1
