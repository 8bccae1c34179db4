"""Checkpoints: written and read, and damaged or foreign files refused."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.checkpoint import (
    CheckpointError,
    LoadedWeights,
    RunFolder,
    find_weights,
    load_networks,
    read_native,
    save_native,
    save_official,
    training_differences,
)
from utils.errors import UserError
from utils.tensor_files import TensorFileError, read_tensors

INFO: dict[str, Any] = {
    "architecture": {"MODEL.NAME": "resnet18", "INPUT.IMG_SIZE": [32, 32]},
    "desensitizer": {"type": "mosaic", "radius": 8.0},
    "dataset": "market1501_val",
    "pid_of_label": [2, 7, 11],
}


def _networks(seed: int = 0, width: int = 3) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {
        letter: nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
        for letter in ("G", "G_R", "C", "D1", "D2")
    }


def _states(networks: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {
        letter: {name: value.clone() for name, value in network.state_dict().items()}
        for letter, network in networks.items()
    }


def _assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("kind", ["native", "official"])
def test_saved_weights_are_loaded(tmp_path: Path, kind: str) -> None:
    source, target = _networks(1), _networks(2)
    if kind == "native":
        save_native(tmp_path, "best", source, 7, {"dataset": "synthetic"})
    else:
        save_official(tmp_path, "best", source)
    weights = find_weights(tmp_path, ("G", "G_R", "C"))
    assert weights.which == "best"
    assert weights.epoch == (7 if kind == "native" else 0)
    assert weights.info == ({"dataset": "synthetic"} if kind == "native" else {})
    chosen = {letter: target[letter] for letter in ("G", "G_R", "C")}
    load_networks(chosen, weights)
    for letter, network in chosen.items():
        _assert_same(network.state_dict(), source[letter].state_dict())


def test_a_native_file_of_version_1_is_read(tmp_path: Path) -> None:
    """Written without the project's code: existing checkpoints must stay readable."""
    content = {
        "format": "securereid-checkpoint", "version": 1, "epoch": 7, "info": {"mode": "GCR"},
        "networks": _states(_networks(1)), "training": {"step": 3},
    }  # fmt: skip
    torch.save(content, tmp_path / "checkpoint_latest.pth")
    weights = find_weights(tmp_path, ("G", "C"))
    assert (weights.which, weights.epoch, weights.info) == ("latest", 7, {"mode": "GCR"})
    _assert_same(weights.networks["C"], content["networks"]["C"])
    save_native(tmp_path, "best", _networks(1), 7, {"mode": "GCR"}, {"step": 3})
    written = torch.load(tmp_path / "checkpoint_best.pth", weights_only=True)
    assert set(written) == set(content)
    for name in ("format", "version", "epoch", "info", "training"):
        assert written[name] == content[name]


def test_official_files_are_bare_state_dicts(tmp_path: Path) -> None:
    networks = _networks()
    save_official(tmp_path, "latest", networks)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"epoch_latest_net_{letter}.pth" for letter in networks}
    for letter, network in networks.items():
        content = torch.load(tmp_path / f"epoch_latest_net_{letter}.pth", weights_only=True)
        _assert_same(content, network.state_dict())


def test_best_before_latest_and_native_before_official(tmp_path: Path) -> None:
    needed = ("C",)
    save_official(tmp_path, "latest", _networks(1))
    assert find_weights(tmp_path, needed).source.endswith("epoch_latest_net_{C}.pth")
    save_native(tmp_path, "latest", _networks(2), 9, {}, {"step": 1})
    assert find_weights(tmp_path, needed).source.endswith("checkpoint_latest.pth")
    save_official(tmp_path, "best", _networks(3))
    weights = find_weights(tmp_path, needed)
    assert (weights.which, weights.epoch) == ("best", 0)
    save_native(tmp_path, "best", _networks(4), 5, {})
    weights = find_weights(tmp_path, needed)
    assert (weights.which, weights.epoch) == ("best", 5)
    _assert_same(weights.networks["C"], _networks(4)["C"].state_dict())


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_native(tmp_path, "latest", _networks(1), 1, {})
    before = (tmp_path / "checkpoint_latest.pth").read_bytes()

    def half(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_native(tmp_path, "latest", _networks(2), 2, {})
    assert (tmp_path / "checkpoint_latest.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_latest.pth"]


def test_every_truncated_file_is_refused(tmp_path: Path) -> None:
    save_native(tmp_path, "latest", _networks(), 1, {})
    path = tmp_path / "checkpoint_latest.pth"
    data = path.read_bytes()
    for length in (*range(0, 64, 7), *range(64, len(data), len(data) // 40), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(TensorFileError, match=re.escape(str(path))):
            read_native(tmp_path, "latest")


@pytest.mark.parametrize(
    "content", [b"", b"<html>404 not found</html>", b"\x80\x04garbage", bytes(range(256))]
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint_best.pth"
    path.write_bytes(content)
    with pytest.raises(TensorFileError, match=re.escape(str(path))):
        find_weights(tmp_path, ("C",))


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.place,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, writer: str) -> None:
    path, trace = tmp_path / "epoch_best_net_C.pth", tmp_path / "executed"
    content = {"classifier.weight": _Bomb(trace)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(TensorFileError, match="was not executed"):
        find_weights(tmp_path, ("C",))
    assert not trace.exists()


def test_other_contents_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    torch.save([1, 2], path)
    with pytest.raises(TensorFileError, match="contains a list"):
        read_tensors(path)
    torch.save({"state_dict": {}, "epoch": 3}, path)
    with pytest.raises(CheckpointError, match="not a native checkpoint.*state_dict, epoch"):
        read_native(tmp_path, "latest")
    save_native(tmp_path, "latest", {}, 1, {})
    torch.save(torch.load(path, weights_only=True) | {"version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99"):
        read_native(tmp_path, "latest")


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere' is not a folder"):
        find_weights(tmp_path / "nowhere", ("C",))
    with pytest.raises(CheckpointError, match=r"contains no checkpoint; expected \S+best.pth"):
        find_weights(tmp_path, ("C",))
    with pytest.raises(TensorFileError, match="does not exist"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["native", "official"])
def test_a_baseline_is_not_the_joint_model(tmp_path: Path, kind: str) -> None:
    networks = {"C": _networks()["C"]}
    if kind == "native":
        save_native(tmp_path, "best", networks, 1, {})
    else:
        save_official(tmp_path, "best", networks)
    assert set(find_weights(tmp_path, ("C",)).networks) == {"C"}
    with pytest.raises(CheckpointError, match=r"no network G, G_R \(it has C\).*in mode C"):
        find_weights(tmp_path, ("G", "G_R", "C"))


def test_another_architecture_is_refused_with_its_shapes(tmp_path: Path) -> None:
    save_official(tmp_path, "best", _networks(width=3))
    target = _networks(width=4)
    before = _states(target)
    with pytest.raises(UserError, match=r"\(C\).*\(3, 2\).*\(4, 2\)"):
        load_networks({"C": target["C"]}, find_weights(tmp_path, ("C",)))
    _assert_same(target["C"].state_dict(), before["C"])


def test_networks_that_a_checkpoint_lacks_are_unchanged(tmp_path: Path) -> None:
    """Published folders have no discriminators; training can start from them."""
    source, target = _networks(1), _networks(2)
    before = _states(target)
    weights = LoadedWeights({"C": source["C"].state_dict()}, "best", "x", 0, {})
    load_networks(target, weights)
    _assert_same(target["C"].state_dict(), source["C"].state_dict())
    _assert_same(target["D1"].state_dict(), before["D1"])


def test_a_run_folder_resumes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, _networks(1), {"dataset": "synthetic"})
    folder.save_best(2, {"epoch": 2, "rank1": 0.5, "qualified": True})
    folder.save_latest(3, {"step": 30})
    networks = _networks(2)
    assert RunFolder(tmp_path, networks, {}).load_latest() == (3, {"step": 30})
    _assert_same(networks["D2"].state_dict(), _networks(1)["D2"].state_dict())
    assert read_native(tmp_path, "best")["info"]["best"]["rank1"] == 0.5


def test_resuming_needs_the_same_networks(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"C": _networks()["C"]}, {}).save_latest(1, {})
    with pytest.raises(CheckpointError, match="contains networks C; this training has G, G_R"):
        RunFolder(tmp_path, _networks(), {}).load_latest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": {"MODEL.NAME": "resnet50"}}, "MODEL.NAME 'resnet18' (now 'resnet50')"),
        (
            {"desensitizer": {"type": "blur", "radius": 8.0}},
            "INPUT.TYPE 'mosaic' (now 'blur')",
        ),
        ({"desensitizer": {"type": "mosaic", "radius": 4.0}}, "INPUT.RADIUS 8.0 (now 4.0)"),
        (
            {"dataset": "cuhk03_val", "pid_of_label": [1, 2]},
            "3 identities of market1501_val (now 2 others, of cuhk03_val)",
        ),
    ],
)
def test_resuming_needs_the_same_training(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    assert training_differences(INFO, INFO | change) == [message]
    network = nn.Linear(2, 2)
    RunFolder(tmp_path, {"C": network}, INFO).save_latest(3, {"step": 1})
    before = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.add_(1.0)
    with pytest.raises(CheckpointError, match="was trained with") as error:
        RunFolder(tmp_path, {"C": network}, INFO | change).load_latest()
    assert message in str(error.value)
    assert torch.equal(network.weight, before + 1.0)  # nothing was loaded


def test_the_data_set_may_have_moved(tmp_path: Path) -> None:
    assert training_differences(INFO, INFO | {"dataset": "folder:/elsewhere"}) == []
    assert training_differences({}, INFO) == []
    network = nn.Linear(2, 2)
    RunFolder(tmp_path, {"C": network}, INFO).save_latest(3, {"step": 1})
    assert RunFolder(tmp_path, {"C": network}, INFO).load_latest() == (3, {"step": 1})
