"""tools/export.py: what onnxruntime makes of a file is what the API answers, or it is not there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.api import Anonymizer
from engine.exporting import export as exporting
from engine.exporting import onnx_file
from engine.exporting.onnx_file import VERBS, Graph, ImageGraph
from layers.pixels import PixelSpace
from tests.fixtures.exporting import save_lived_in
from tests.fixtures.paths import ROOT
from tests.fixtures.protection import draw
from tools import export as command

onnx = pytest.importorskip("onnx", reason="needs the extra `onnx`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lived_in(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "exported"
    assert command.main([str(checkpoint), str(folder)]) == 0
    return folder


@pytest.fixture
def model(checkpoint: Path) -> Anonymizer:
    return Anonymizer.from_checkpoint(checkpoint, device="cpu", precision="float32")


def _refused(capfd: pytest.CaptureFixture[str], argv: list[object], code: int, *words: str) -> None:
    capfd.readouterr()
    assert command.main([str(word) for word in argv]) == code
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1, told.err
    for word in words:
        assert word in told.err


def _files(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- what is written -----------------------------------------------------------------------------


def _answer(path: Path, pictures: list[Image.Image]) -> np.ndarray:
    """What somebody gets who has the file, its metadata, and no code of ours."""
    session = onnxruntime.InferenceSession(str(path))
    says = session.get_modelmeta().custom_metadata_map
    assert (says["format"], says["channel_order"]) == ("securereid-export", "RGB")
    assert says["resize"].startswith("Pillow bilinear")
    size = int(says["width"]), int(says["height"])
    resized = [one.convert("RGB").resize(size, Image.Resampling.BILINEAR) for one in pictures]
    batch = np.stack([np.asarray(one) for one in resized])
    (answer,) = session.run(None, {session.get_inputs()[0].name: batch})
    return np.asarray(answer)


@pytest.mark.parametrize("count", [1, 5])
def test_a_stranger_gets_what_the_api_answers(
    exported: Path, model: Anonymizer, tmp_path: Path, count: int
) -> None:
    for number in range(count):
        draw(tmp_path / f"{number}.png", number)
    pictures = [Image.open(tmp_path / f"{number}.png") for number in range(count)]
    for verb in ("anonymize", "recover"):
        found = _answer(exported / f"{verb}.onnx", pictures).astype(int)
        expected = np.stack([np.asarray(one) for one in getattr(model, verb)(pictures)])
        assert expected.std() > 5  # not one grey, which anything would equal
        assert np.abs(found - expected).max() <= 1
        assert (found != expected).mean() < 1e-3
    found = _answer(exported / "embed.onnx", pictures)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, model.embed(pictures), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_shapes_are_in_the_file(exported: Path) -> None:
    shapes = {"anonymize": ["N", 64, 32, 3], "recover": ["N", 64, 32, 3], "embed": ["N", 512]}
    for verb, shape in shapes.items():
        session = onnxruntime.InferenceSession(str(exported / f"{verb}.onnx"))
        (given,), (returned,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.type, given.shape) == (
            "pixels", "tensor(uint8)", ["N", 64, 32, 3],
        )  # fmt: skip
        assert returned.shape == shape
        assert returned.name == ("embeddings" if verb == "embed" else "images")
        onnx.checker.check_model(str(exported / f"{verb}.onnx"))


def test_a_file_tells_no_folder_and_no_number_of_people(exported: Path) -> None:
    for path in exported.iterdir():
        content = path.read_bytes()
        assert str(ROOT).encode() not in content
        assert b"classifier" not in content


def test_a_line_for_each_file_and_nothing_else(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [str(checkpoint), str(tmp_path), "--networks", "anonymize", "anonymize"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert command.main(argv) == 0
    told = capfd.readouterr()
    assert told.err == ""
    (line,) = told.out.splitlines()
    told_of = r"(not one value differs|at most 1 grey level, in \S+ % of the values)"
    assert re.search(rf"anonymize\.onnx: 0\.\d MiB; against the network {told_of}$", line)
    assert _files(tmp_path) == ["anonymize.onnx"]


@pytest.mark.parametrize(("verb", "opset"), [("anonymize", 13), ("embed", 20)])
def test_opsets(checkpoint: Path, tmp_path: Path, verb: str, opset: int) -> None:
    argv = [str(checkpoint), str(tmp_path), "--networks", verb, "--opset", str(opset)]
    assert command.main(argv) == 0
    (version,) = onnx.load(str(tmp_path / f"{verb}.onnx")).opset_import
    assert version.version == opset


# ---- parity --------------------------------------------------------------------------------------


def _change_a_weight(path: Path) -> None:
    content = onnx.load(str(path))
    tensor = next(one for one in content.graph.initializer if one.name.endswith("weight"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] += 0.5
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(content, str(path))


def _spoil(monkeypatch: pytest.MonkeyPatch, verb: str, spoil: Callable[[Path], None]) -> None:
    """Let something happen to the file of a verb between writing and comparing."""
    label = onnx_file.label

    def spoiled(graph: Graph, path: Path, metadata: dict[str, str]) -> None:
        label(graph, path, metadata)
        if metadata["verb"] == verb:
            spoil(path)

    monkeypatch.setattr(onnx_file, "label", spoiled)


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_with_another_weight_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _spoil(monkeypatch, verb, _change_a_weight)
    argv = [checkpoint, tmp_path / "out", "--networks", verb]
    words = ["answers otherwise than the network", "allowed: ", "nothing was exported"]
    _refused(capfd, argv, 1, verb, *words)
    assert _files(tmp_path / "out") == []


def test_all_or_none_and_old_files_stay(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "anonymize.onnx").write_text("old")
    _spoil(monkeypatch, "recover", _change_a_weight)
    argv = [checkpoint, tmp_path, "--networks", "anonymize", "recover", "--overwrite"]
    _refused(capfd, argv, 1, "recover")
    assert _files(tmp_path) == ["anonymize.onnx"]
    assert (tmp_path / "anonymize.onnx").read_text() == "old"


@pytest.mark.parametrize("verb", ["anonymize", "embed"])
def test_a_guessed_preprocessing_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The published constants instead of the checkpoint's."""
    graph_of = exporting.graph_of

    def guessed(*arguments: Any) -> Graph:
        graph = graph_of(*arguments)
        graph.space = PixelSpace((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
        return graph

    monkeypatch.setattr(exporting, "graph_of", guessed)
    _refused(capfd, [checkpoint, tmp_path, "--networks", verb], 1, "answers otherwise")
    assert _files(tmp_path) == []


def test_a_network_changed_after_it_was_written_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    anonymize = Anonymizer.anonymize_tensor

    def turned(self: Anonymizer, pixels: torch.Tensor) -> torch.Tensor:
        return anonymize(self, pixels).flip(dims=[3])

    monkeypatch.setattr(Anonymizer, "anonymize_tensor", turned)
    argv = [checkpoint, tmp_path, "--networks", "anonymize"]
    _refused(capfd, argv, 1, "anonymize: the exported file", "grey levels")
    assert _files(tmp_path) == []


def test_a_network_that_cannot_be_expressed_is_named(tmp_path: Path) -> None:
    class Decomposed(ImageGraph):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svd(pixels.float())[1]

    graph = Decomposed(torch.nn.Identity(), PixelSpace((0, 0, 0), (1, 1, 1)), (8, 8))
    with pytest.raises(onnx_file.ExportError, match=r"with ONNX opset 17 \(.*give another --opset"):
        onnx_file.write(graph, (8, 8), tmp_path / "x.onnx", 17)


def test_a_file_that_does_not_run_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _spoil(monkeypatch, "anonymize", lambda path: path.write_bytes(path.read_bytes()[:1000]))
    argv = [checkpoint, tmp_path, "--networks", "anonymize"]
    _refused(capfd, argv, 1, "onnxruntime", "does not run", "--opset")
    assert _files(tmp_path) == []


# ---- faults and wrong input ----------------------------------------------------------------------


def test_ctrl_c_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    _spoil(monkeypatch, "recover", interrupt)
    assert command.main([str(checkpoint), str(tmp_path)]) == 130
    assert _files(tmp_path) == []


def test_a_full_disk_is_named_and_leaves_nothing(
    checkpoint: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _refused(capfd, [checkpoint, small_disk / "out"], 2, "cannot write", "free some space")
    assert _files(small_disk / "out") == []


def test_what_a_killed_export_left_goes(checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    left = tmp_path / f".anonymize.{done.pid}-abcdef12.tmp.onnx"
    left.write_text("half")
    assert command.main([str(checkpoint), str(tmp_path), "--networks", "anonymize"]) == 0
    assert _files(tmp_path) == ["anonymize.onnx"]


def test_files_that_are_there_stay_unless_told_otherwise(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "anonymize.onnx"
    old.write_text("old")
    _refused(capfd, [checkpoint, tmp_path], 2, f"{old} exists", "--overwrite")
    assert (_files(tmp_path), old.read_text()) == (["anonymize.onnx"], "old")
    argv = [str(checkpoint), str(tmp_path), "--networks", "anonymize", "--overwrite"]
    assert command.main(argv) == 0
    assert old.stat().st_size > 1000


def test_checkpoints_that_cannot_be_exported(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _refused(capfd, [tmp_path / "none", tmp_path / "out"], 2, "none' is not a folder")
    alone = save_lived_in(tmp_path / "c", "MODEL.MODE", "C")
    _refused(capfd, [alone, tmp_path / "out", "--networks", "embed"], 2, "no network G, G_R")
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    content = torch.load(broken / "checkpoint_best.pth", weights_only=True)
    content["networks"]["C"]["bottleneck.weight"][3] = torch.nan
    torch.save(content, broken / "checkpoint_best.pth")
    words = ["no numbers (network C, bottleneck.weight)", "how its training ended"]
    _refused(capfd, [broken, tmp_path / "out"], 2, *words)
    _refused(capfd, [checkpoint, __file__], 2, "cannot write")
    assert not (tmp_path / "out").exists()


# ---- docs/EXPORT.md ------------------------------------------------------------------------------


def test_the_examples_of_the_documentation_run(
    exported: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(exported, tmp_path / "exported")
    shutil.copytree(checkpoint, tmp_path / "demo" / "full")
    draw(tmp_path / "person.jpg", 1)
    draw(tmp_path / "other.jpg", 2)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/EXPORT.md").read_text("utf-8")
    lines = re.findall(r"^python3 tools/export.py (.*)$", text, re.MULTILINE)
    assert lines[0] == "demo/full exported"  # which the fixture did
    assert [command.main(line.split()) for line in lines[1:]] == [0]
    assert _files(tmp_path / "camera") == ["anonymize.onnx"]
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "EXPORT.md", "exec"), scope)  # noqa: S102
    told = capsys.readouterr().out.splitlines()
    assert -1 <= float(told[1]) <= 1
    assert told[2] == "True"  # the weights are those of the checkpoint


def test_the_documentation_names_every_entry(exported: Path) -> None:
    text = (ROOT / "docs/EXPORT.md").read_text("utf-8")
    session = onnxruntime.InferenceSession(str(exported / "embed.onnx"))
    says = session.get_modelmeta().custom_metadata_map
    assert json.loads(says["mean"]) == [0.45, 0.4, 0.5]
    assert json.loads(says["std"]) == [0.5, 0.45, 0.55]
    assert (says["verb"], says["epoch"], says["checkpoint"]) == ("embed", "7", "best")
    for name in says:
        assert f"`{name}`" in text, name
