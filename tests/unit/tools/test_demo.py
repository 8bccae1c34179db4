from __future__ import annotations

from pathlib import Path

import pytest
from yacs.config import CfgNode

from configs import loading
from data.records import DatasetSplits, Sample
from tools import demo
from tools.lib import run as run_module
from tools.lib.run import Experiment

SAMPLE = Sample("0001.jpg", pid=1, camid=0, subject="any/train/1")


class _EnoughError(Exception):
    """Ends a demo after two calls of ``run``."""


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the timed training steps, which take seconds."""
    monkeypatch.setattr(demo, "expected_seconds", lambda experiments: 60.0)


def test_keys_may_surround_an_option_and_the_test_does_not_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configs: list[CfgNode] = []

    def run(cfg: CfgNode) -> None:
        configs.append(cfg)
        if len(configs) == 2:
            raise _EnoughError

    monkeypatch.setattr(run_module, "run", run)
    output = ["--output", str(tmp_path)]
    with pytest.raises(_EnoughError):
        demo.main(["SOLVER.MAX_EPOCHS", "2", *output, "SOLVER.RESUME", "True"])
    training, test = configs
    assert training.SOLVER.MAX_EPOCHS == 2
    assert Path(test.MODEL.PRETRAIN_DIR) == tmp_path / "full"
    assert test.TEST.EVALUATE_ONLY == "on"
    assert not training.SOLVER.RESUME  # there is no checkpoint yet
    assert not test.SOLVER.RESUME


def test_an_interruption_reports_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(cfg: CfgNode) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run", run)
    assert demo.main(["--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; the same command resumes the demo\n"


def test_a_demo_with_other_values_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs: list[CfgNode] = []

    def run(cfg: CfgNode) -> None:
        configs.append(cfg)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run", run)
    output = ["--output", str(tmp_path)]
    loading.dump(loading.load(demo.CONFIG, ["MODEL.NGF", "8"]), _made(tmp_path / "full"))
    assert demo.main([*output, "SOLVER.BASE_LR", "0.01"]) == 2
    error = capsys.readouterr().err
    assert "MODEL.NGF 8 (now 16), SOLVER.BASE_LR 0.0007 (now 0.01)" in error
    assert "another --output" in error
    assert not configs
    # Another device and another data folder do not change the demo.
    same = ["MODEL.NGF", "8", "MODEL.DEVICE", "cpu", "DATASETS.ROOT_DIR", str(tmp_path)]
    assert demo.main([*output, *same]) == 130
    assert len(configs) == 1


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder / "config.yml"


def test_the_expected_time_grows_with_the_number_of_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()  # the autouse fixture replaces the function that is tested here
    splits = DatasetSplits("any", train=(SAMPLE,) * 96, val_query=(SAMPLE,) * 6)
    monkeypatch.setattr(demo, "build_splits", lambda cfg: splits)
    monkeypatch.setattr(demo, "seconds", lambda step, device: 1.0)
    monkeypatch.setattr(demo, "make_step", lambda *_: lambda: None)
    monkeypatch.setattr(demo, "step_flops", lambda cfg: 3.0)
    monkeypatch.setattr(demo, "evaluation_flops", lambda cfg, num_embedded: 0.5 * num_embedded)

    def expected(method: str, *keys: str) -> float:
        overrides = ("SOLVER.IMS_PER_BATCH", "8", *keys)
        return demo.expected_seconds([Experiment(demo.CONFIG, method, tmp_path / "run", overrides)])

    validations = ("SOLVER.VAL_PERIOD", "100")
    two, four, eight = (
        expected("full", *validations, "SOLVER.MAX_EPOCHS", epochs) for epochs in ("2", "4", "8")
    )
    assert four - two == pytest.approx(2 * 96 / 8)  # a step of 8 images takes one second
    assert eight - four == pytest.approx(2 * (four - two))
    assert expected("full", "SOLVER.MAX_EPOCHS", "2") > two
