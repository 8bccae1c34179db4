"""Hostile and damaged files of tensors: a named error, before memory or time is spent."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.api import Anonymizer
from engine.checkpoint import FORMAT, FORMAT_VERSION, find_weights
from engine.model import networks_of
from tests.fixtures.paths import ROOT
from utils import tensor_files
from utils.errors import UserError
from utils.tensor_files import TensorFileError, read_tensors, save_tensors


def test_tensors_and_plain_values_come_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    content = {
        "tensor": shared, "same": shared, "view": shared.view(2, 3).t(), "scalar": torch.tensor(2),
        "half": torch.ones(2, dtype=torch.bfloat16), "none": None, "values": [1, 2.5, (True, "a")],
        "expanded": torch.zeros(1).expand(1000), "empty": torch.zeros(0),
    }  # fmt: skip
    save_tensors(content, tmp_path / "a.pth")
    loaded = read_tensors(tmp_path / "a.pth")
    (tmp_path / "a.pth").unlink()  # the tensors own their memory
    assert loaded.keys() == content.keys()
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(loaded[name], value)
            assert loaded[name].dtype == value.dtype
        else:
            assert loaded[name] == value
    assert loaded["same"] is loaded["tensor"]


def _compressed(path: Path) -> None:
    """A zip bomb: 64 MiB of zeros in some 64 KiB."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2**24)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record), zipfile.ZIP_DEFLATED)


def _repeated(path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**40)}, path)


def _unfolding(path: Path) -> None:
    """Lists that contain one another twice: 2 ** 40 values."""
    value: list[Any] = [0]
    for _ in range(40):
        value = [value, value]
    torch.save({"a": value}, path)


def _nested(path: Path) -> None:
    value: list[Any] = []
    for _ in range(300):
        value = [value]
    torch.save({"a": value}, path)


def _claiming(path: Path) -> None:
    """A storage that claims more bytes than its record has."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            data = source.read(record)
            if record.filename.endswith("data.pkl"):
                # the storage's and the tensor's size, both a 1-byte integer 4
                data = data.replace(b"K\x04t", b"J\x00\x00\x00\x7ft")
                data = data.replace(b"K\x04\x85", b"J\x00\x00\x00\x7f\x85")
            target.writestr(record.filename, data)


def _sparse(path: Path) -> None:
    torch.save({"a": torch.zeros(2, 2).to_sparse()}, path)


def _legacy(path: Path) -> None:
    """A file of before torch 1.6 that claims more than it has."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue()[:-8])


@pytest.mark.parametrize(
    "make", [_compressed, _repeated, _unfolding, _nested, _claiming, _sparse, _legacy]
)
def test_hostile_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(tensor_files, "_MAX_VALUES", 50_000)  # which are counted one by one
    path = tmp_path / "hostile.pth"
    make(path)
    with pytest.raises(TensorFileError, match=r"hostile\.pth"):
        read_tensors(path)


def _content(**changes: object) -> dict[str, Any]:
    states = {letter: {"classifier.weight": torch.zeros(2, 4)} for letter in ("G", "G_R", "C")}
    plain = {"format": FORMAT, "version": FORMAT_VERSION, "epoch": 1, "info": {}}
    return plain | {"networks": states} | changes


def _info(**architecture: object) -> dict[str, Any]:
    recorded = {name.replace("__", "."): value for name, value in architecture.items()}
    return _content(info={"architecture": recorded})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_content(epoch="1"), "wrong type"),
        (_content(info=[]), "wrong type"),
        (_content(info={"architecture": 3}), "wrong type"),
        (_content(networks=[]), "wrong type"),
        (_content(networks={"G": 1, "G_R": 1, "C": 1}), "wrong type"),
        (_content(networks={x: {1: 2} for x in ("G", "G_R", "C")}), "wrong type"),
        (_info(UNET__NUM_DOWNS=10**9), "UNET.NUM_DOWNS is 1000000000"),
        (_info(UNET__NUM_DOWNS="7"), "UNET.NUM_DOWNS '7'"),
        (_info(UNET__NUM_DOWNS=True), "UNET.NUM_DOWNS True"),
        (_info(INPUT__IMG_SIZE=[10**9, 10**9]), "INPUT.IMG_SIZE is 1000000000"),
        (_info(INPUT__IMG_SIZE=[1] * 10**5), r"INPUT.IMG_SIZE \[1, 1, 1"),
        (_info(INPUT__IMG_SIZE=None), "INPUT.IMG_SIZE None"),
        (_info(MODEL__NGF=10**9), "MODEL.NGF is 1000000000"),
        (_info(MODEL__NAME=["a"]), "MODEL.NAME"),
        (_info(MODEL__NAME="nonesuch"), "nonesuch"),
        (_info(INPUT__PIXEL_MEAN=["a", "b", "c"]), "INPUT.PIXEL_MEAN"),
    ],
)  # fmt: skip
def test_hostile_checkpoints_are_refused(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    torch.save(content, tmp_path / "checkpoint_best.pth")
    with pytest.raises(UserError, match=message):
        Anonymizer.from_checkpoint(tmp_path, device="cpu")


def test_a_huge_number_of_classes_is_refused(tmp_path: Path) -> None:
    states = {x: {"classifier.weight": torch.zeros(1).expand(10**9, 2)} for x in ("G", "G_R", "C")}
    torch.save(_content(networks=states), tmp_path / "checkpoint_best.pth")
    with pytest.raises(UserError, match="repeat fewer stored values"):
        find_weights(tmp_path, ("C",))
    states = {x: {"classifier.weight": torch.zeros(10**6, 1)} for x in ("G", "G_R", "C")}
    torch.save(_content(networks=states), tmp_path / "checkpoint_best.pth")
    with pytest.raises(UserError, match="1000000 classes; expected at most 200000"):
        networks_of(find_weights(tmp_path, ("C",)))


def test_an_official_file_of_other_values_is_refused(tmp_path: Path) -> None:
    torch.save({"classifier.weight": "text"}, tmp_path / "epoch_best_net_C.pth")
    with pytest.raises(UserError, match="other values than tensors"):
        find_weights(tmp_path, ("C",))


def test_no_file_is_unpickled_by_other_code() -> None:
    """`read_tensors` is the only place that loads with torch, and no code uses pickle."""
    places = []
    for folder in ("configs", "data", "engine", "layers", "modeling", "solver", "tools", "utils"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text("utf-8")
            if "torch.load(" in text or "pickle.load" in text:
                places.append(str(path.relative_to(ROOT)))
    assert places == ["utils/tensor_files.py"]
