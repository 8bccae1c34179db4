"""The training loop: validate, upgrade, save, in this order; and the best validation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from configs.loading import load
from data.records import Batch
from engine.build import build_trainer
from engine.checkpoint import RunFolder
from engine.report import EvalReport
from engine.supervision import Supervision
from engine.train_step import StepOutput
from engine.trainer import (
    Best,
    LossGuard,
    NonFiniteError,
    Trainer,
    TrainPlan,
    ValidationRun,
)
from tests.fixtures import tiny


@pytest.fixture
def make_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    tiny.install(monkeypatch)

    def make(*overrides: str) -> Trainer:
        config, *words = tiny.arguments(tmp_path, *overrides)
        (tmp_path / "run").mkdir(exist_ok=True)
        cfg: CfgNode = load(config.split("=")[1], words)
        return build_trainer(cfg)

    return make


@pytest.mark.parametrize(
    ("before", "rank1", "qualified", "beaten"),
    [
        (Best(), 0.0, False, True),  # any validation is better than none
        (Best(1, 0.5, qualified=False), 0.6, False, True),
        (Best(1, 0.5, qualified=False), 0.5, False, False),  # the earlier one stays
        (Best(1, 0.5, qualified=False), 0.4, False, False),
        (
            Best(1, 0.9, qualified=False),
            0.1,
            True,
            True,
        ),  # a qualified validation is better than all others
        (Best(1, 0.1, qualified=True), 0.9, False, False),
        (Best(1, 0.5, qualified=True), 0.6, True, True),
        (Best(1, 0.5, qualified=True), 0.5, True, False),
        (Best(1, 0.5, qualified=True), 0.4, True, False),
    ],
)
def test_the_best_validation(before: Best, rank1: float, qualified: bool, beaten: bool) -> None:
    assert before.beaten_by(rank1, qualified=qualified) is beaten


def test_periods_and_the_last_epoch_are_due() -> None:
    plan = TrainPlan(max_epochs=7, val_period=3, checkpoint_period=2, log_period=1)
    epochs = range(1, 8)
    assert [e for e in epochs if plan.due(e, plan.val_period)] == [3, 6, 7]
    assert [e for e in epochs if plan.due(e, plan.checkpoint_period)] == [2, 4, 6, 7]


@pytest.mark.parametrize(
    ("output_mode", "direction"),
    [
        ("both", ("raw", "protected")),
        ("origin", ("raw", "raw")),
        ("protected", ("protected", "protected")),
    ],
)
def test_the_best_validation_is_chosen_by_a_direction_that_is_trained(
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    output_mode: str,
    direction: tuple[str, str],
) -> None:
    trainer = make_trainer("MODEL.OUTPUT_MODE", output_mode, "SOLVER.MAX_EPOCHS", "1")
    assert trainer.validation is not None
    report = trainer.validation.evaluate(1)
    rows = tuple(
        replace(row, rank1=0.875 if (row.query, row.gallery) == direction else 0.25)
        for row in report.retrieval
    )
    validation = ValidationRun(lambda _: replace(report, retrieval=rows), None)
    monkeypatch.setattr(trainer, "validation", validation)
    trainer.fit()
    assert trainer.state.best.rank1 == 0.875


def test_without_re_id_the_last_validation_is_the_best(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        "MODEL.OUTPUT_MODE", "none", "MODEL.VAL_R1", "inf",
        "SOLVER.MAX_EPOCHS", "2", "SOLVER.VAL_PERIOD", "1",
    )  # fmt: skip
    assert trainer.validation is not None
    report = trainer.validation.evaluate(1)
    scores = iter((0.75, 0.25))

    def validate(_: int) -> EvalReport:
        rank1 = next(scores)
        return replace(report, retrieval=tuple(replace(r, rank1=rank1) for r in report.retrieval))

    monkeypatch.setattr(trainer, "validation", ValidationRun(validate, None))
    trainer.fit()
    assert trainer.state.best.epoch == 2


def _watched(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Record the calls of a trainer, in order."""
    events: list[tuple[str, Any]] = []

    def note(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: object, *args: Any) -> Any:
            events.append((name, args))
            return call(self, *args)

        return noted

    for owner, name in (
        (Supervision, "update"), (RunFolder, "save_latest"), (RunFolder, "save_best"),
        (Trainer, "_train_epoch"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, note(name, getattr(owner, name)))
    assert trainer.validation is not None
    evaluate, draw = trainer.validation.evaluate, trainer.validation.draw

    def evaluating(epoch: int) -> Any:
        events.append(("evaluate", (epoch,)))
        return evaluate(epoch)

    trainer.validation = ValidationRun(evaluating, draw)
    return events


def test_train_validate_upgrade_save(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(*tiny.PERMISSIVE, "SOLVER.MAX_EPOCHS", "3", "SOLVER.VAL_PERIOD", "2")
    events = _watched(trainer, monkeypatch)
    report = trainer.fit()
    assert [name for name, _ in events if name != "save_best"] == [
        "save_latest",  # of epoch 0, so that a resume is always possible
        "_train_epoch", "save_latest",
        "_train_epoch", "evaluate", "update", "save_latest",
        "_train_epoch", "evaluate", "update", "save_latest",  # the last epoch is always validated
    ]  # fmt: skip
    names = [name for name, _ in events]
    assert names[names.index("save_best") - 1] == "update"
    saved = [args for name, args in events if name == "save_latest"]
    assert [args[0] for args in saved] == [0, 1, 2, 3]
    # The checkpoint of epoch 2 contains the decision of epoch 2.
    assert saved[1][1]["supervision"]["state"]["in_force"] is False
    assert saved[2][1]["supervision"]["state"]["in_force"] is True
    assert saved[2][1]["supervision"]["teacher"] is not None
    assert report is not None
    assert report.epoch == 3


def test_epochs_have_different_batches_and_losses_are_checked_before_a_checkpoint(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("SOLVER.MAX_EPOCHS", "2")
    batches_of: list[torch.Tensor] = []
    events = _watched(trainer, monkeypatch)
    step, check = Trainer._step, LossGuard.check

    def stepping(self: Trainer, batch: Batch) -> StepOutput:
        batches_of.append(batch.index)
        return step(self, batch)

    def checking(self: LossGuard) -> None:
        events.append(("check", ()))  # on a GPU the last losses are known only now
        check(self)

    monkeypatch.setattr(Trainer, "_step", stepping)
    monkeypatch.setattr(LossGuard, "check", checking)
    trainer.fit()
    names = [name for name, _ in events if name in ("_train_epoch", "check", "save_latest")]
    assert names == ["save_latest", *["_train_epoch", "check", "save_latest"] * 2]
    plans = [trainer.loader.sampler.plan(epoch) for epoch in (1, 2)]
    assert torch.equal(torch.stack(batches_of), torch.cat(plans))
    assert not torch.equal(*plans)


def test_without_val_r1_nothing_is_upgraded(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer("MODEL.VAL_R1", "inf", "SOLVER.MAX_EPOCHS", "1")
    trainer.fit()
    assert trainer.supervision.state.count == 0
    assert trainer.state.best.epoch == 1
    assert not trainer.state.best.qualified


def test_the_baseline_is_not_upgraded(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer(*tiny.PERMISSIVE, "MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    trainer.fit()
    assert trainer.supervision.state.count == 0
    names = {path.name for path in (tmp_path / "run").glob("epoch_*")}
    assert names == {"epoch_best_net_C.pth", "epoch_latest_net_C.pth"}


def test_log_lines_and_metrics_for_scripts(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """Loss lines of log.txt in the usual form of this field, and metric names with slashes."""
    plan = ("SOLVER.MAX_EPOCHS", "1", "SOLVER.IMS_PER_BATCH", "8", "SOLVER.LOG_PERIOD", "4")
    run = tiny.run(tmp_path, *plan)
    log = (run / "log.txt").read_text("utf-8")
    number = r"\d+\.\d{3}"
    line = (
        rf"(?m)^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} reid_baseline INFO: Epoch\[1\] "
        rf"Iteration\[4/6\] Loss: {number}, Acc: {number}, Base Lr: \d\.\d\de-04$"
    )
    assert re.search(line, log)
    assert "Iteration[6/6]" in log  # the rest of an epoch is not left out
    assert "Iteration[5/6]" not in log
    last = [one for one in tiny.losses(run) if "loss/total" in one][-1]
    for name in ("loss/recovery", "loss/anonymization", "train/accuracy", "train/learning_rate"):
        assert name in last
    events = list((run / "runs").iterdir())
    assert events
    assert events[0].stat().st_size > 10_000  # images and curves


def test_weights_that_are_not_finite_are_not_saved(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of the last step of an epoch are computed before the update that destroys it."""
    trainer = make_trainer("MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "2")
    step = Trainer._step

    def diverging(self: Trainer, batch: Batch) -> StepOutput:
        output = step(self, batch)
        if self.state.step + 1 == 2 * len(self.loader):
            next(self.networks.parameters()).data.fill_(torch.inf)
        return output

    monkeypatch.setattr(Trainer, "_step", diverging)
    steps = 2 * len(trainer.loader)
    with pytest.raises(NonFiniteError, match=f"no longer finite after step {steps}; the last"):
        trainer.fit()
    saved = tiny.native(tmp_path / "run")
    assert saved["epoch"] == 1
    assert all(weight.isfinite().all() for weight in saved["networks"]["C"].values())
