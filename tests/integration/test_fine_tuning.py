"""Start weights from checkpoints of other identities, and from other kinds of files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.loading import load
from engine.build import build_trainer
from engine.trainer import Trainer
from modeling.weights import CLASSIFIER_KEY
from tests.fixtures import tiny
from utils.errors import UserError

ONE_EPOCH = ("SOLVER.MAX_EPOCHS", "1")
States = dict[str, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)


@pytest.fixture
def trained() -> Path:
    """OUTPUT_DIR of a tiny training on 12 identities."""
    return tiny.finished(*ONE_EPOCH)


def _trainer(folder: Path, source: Path, *overrides: str) -> Trainer:
    start = ("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(source))
    config, *words = tiny.arguments(folder, *start, *overrides, output="tuned")
    (folder / "tuned").mkdir(exist_ok=True)
    return build_trainer(load(config.split("=")[1], words))


def _states(trainer: Trainer) -> States:
    networks = trainer.networks.official_networks
    return {letter: network.state_dict() for letter, network in networks.items()}


def test_other_identities_get_a_new_classifier_and_all_other_weights(
    tmp_path: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer(tmp_path, trained, "SYNTHETIC.IDENTITIES", "10")
    saved, states = tiny.native(trained, "best")["networks"], _states(trainer)
    classifier = states["C"].pop(CLASSIFIER_KEY)
    assert (len(classifier), len(saved["C"].pop(CLASSIFIER_KEY))) == (10, 12)
    assert classifier.std() == pytest.approx(0.001, rel=0.3)
    assert states.keys() == saved.keys()
    for letter, state in states.items():
        tiny.assert_equal(dict(state), dict(saved[letter]), letter)
    assert trainer.centers.centers.shape == (10, 16)
    warning = "was trained on 12 identities, and this data set has 10 for training; the classifier"
    assert warning in caplog.text
    assert trainer.fit() is not None


def test_as_many_others_get_a_new_classifier_too(
    tmp_path: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    content = tiny.native(copy, "best")
    content["info"]["pid_of_label"] = [1000 + pid for pid in content["info"]["pid_of_label"]]
    torch.save(content, copy / "checkpoint_best.pth")
    states = _states(_trainer(tmp_path, copy))
    assert not torch.equal(states["C"][CLASSIFIER_KEY], content["networks"]["C"][CLASSIFIER_KEY])
    assert "this data set has 12 others" in caplog.text


def test_the_same_identities_keep_the_classifier(tmp_path: Path, trained: Path) -> None:
    states = _states(_trainer(tmp_path, trained))
    expected = tiny.native(trained, "best")["networks"]["C"][CLASSIFIER_KEY]
    assert torch.equal(states["C"][CLASSIFIER_KEY], expected)


def test_the_joint_model_starts_from_a_reid_network_alone(
    tmp_path: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reid = shutil.copytree(trained, tmp_path / "reid")
    content = tiny.native(reid, "best")
    content["networks"] = {"C": content["networks"]["C"]}
    content["info"]["architecture"] |= {"MODEL.MODE": "C", "MODEL.NGF": 64, "UNET.NUM_DOWNS": 7}
    torch.save(content, reid / "checkpoint_best.pth")
    trainer = _trainer(tmp_path, reid)
    states = _states(trainer)
    assert states.keys() == {"G", "G_R", "C", "D1", "D2"}
    tiny.assert_equal(dict(states["C"]), dict(content["networks"]["C"]), "C")
    assert "start from random weights" in caplog.text
    assert "D1, D2, G, G_R" in caplog.text
    assert trainer.fit() is not None


def test_start_weights_of_a_part_of_the_joint_model_are_refused(
    tmp_path: Path, trained: Path
) -> None:
    part = shutil.copytree(trained, tmp_path / "part")
    content = tiny.native(part, "best")
    del content["networks"]["G_R"]
    torch.save(content, part / "checkpoint_best.pth")
    with pytest.raises(UserError, match="has no network G_R"):
        _trainer(tmp_path, part)


def _plain(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def _with_prefix(state: dict[str, Tensor], path: Path) -> None:
    torch.save({f"module.{name}": value for name, value in state.items()}, path)


def _before_1_6(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def _before_0_4_1(state: dict[str, Tensor], path: Path) -> None:
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)


def _half(state: dict[str, Tensor], path: Path) -> None:
    halved = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(halved, path)


@pytest.mark.parametrize("save", [_plain, _with_prefix, _before_1_6, _before_0_4_1, _half])
def test_the_same_model_from_every_kind_of_file(
    tmp_path: Path, trained: Path, save: Callable[[Any, Path], None]
) -> None:
    networks = tiny.native(trained, "best")["networks"]
    (tmp_path / "files").mkdir()
    for letter, state in networks.items():
        save(state, tmp_path / "files" / f"epoch_best_net_{letter}.pth")
    states = _states(_trainer(tmp_path, tmp_path / "files"))
    for letter in networks:
        for name, value in states[letter].items():
            expected = networks[letter][name]
            if save is _half and expected.is_floating_point():
                expected = expected.half().float()
            if not (save is _before_0_4_1 and name.endswith("num_batches_tracked")):
                assert value.dtype == expected.dtype
                assert torch.equal(value, expected), f"{letter}/{name}"
