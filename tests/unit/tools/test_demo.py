from __future__ import annotations

from pathlib import Path

import pytest
from yacs.config import CfgNode

from configs import loading
from tools import demo
from tools.lib import experiment


class _EnoughError(Exception):
    """Two configurations were seen."""


def test_keys_may_surround_an_option_and_a_resume_does_not_reach_the_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[CfgNode] = []

    def run(cfg: CfgNode) -> None:
        seen.append(cfg)
        if len(seen) == 2:
            raise _EnoughError

    monkeypatch.setattr(experiment, "run", run)
    output = ["--output", str(tmp_path)]
    with pytest.raises(_EnoughError):
        demo.main(["SOLVER.MAX_EPOCHS", "2", *output, "SOLVER.RESUME", "True"])
    training, test = seen
    assert training.SOLVER.MAX_EPOCHS == 2
    assert Path(test.MODEL.PRETRAIN_DIR) == tmp_path / "full"
    assert test.TEST.EVALUATE_ONLY == "on"
    assert not training.SOLVER.RESUME  # nothing to go on from
    assert not test.SOLVER.RESUME


def test_an_interruption_says_how_the_demo_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(cfg: CfgNode) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", run)
    assert demo.main(["--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on where it stopped\n"


def test_a_demo_of_other_values_is_not_taken_for_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[CfgNode] = []

    def run(cfg: CfgNode) -> None:
        seen.append(cfg)
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", run)
    output = ["--output", str(tmp_path)]
    loading.dump(loading.load(demo.CONFIG, ["MODEL.NGF", "8"]), _made(tmp_path / "full"))
    assert demo.main([*output, "SOLVER.BASE_LR", "0.01"]) == 2
    error = capsys.readouterr().err
    assert "MODEL.NGF 8 (now 16), SOLVER.BASE_LR 0.00035 (now 0.01)" in error
    assert "another --output" in error
    assert not seen
    # On another device, with its images elsewhere, it is the same demo.
    same = ["MODEL.NGF", "8", "MODEL.DEVICE", "cpu", "DATASETS.ROOT_DIR", str(tmp_path)]
    assert demo.main([*output, *same]) == 130
    assert len(seen) == 1


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder / "config.yml"
