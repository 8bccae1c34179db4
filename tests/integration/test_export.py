"""tools/export.py: onnxruntime's output equals the API's, or the file is not saved."""

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

from engine import export as exporting
from engine.api import Anonymizer
from engine.export import VERBS, Graph, ImageGraph
from layers.pixels import PixelSpace
from tests.fixtures import tiny
from tests.fixtures.exporting import save_random_model
from tests.fixtures.paths import ROOT
from tests.fixtures.protection import draw
from tools import export as command

onnx = pytest.importorskip("onnx", reason="needs the extra `onnx`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "exported"
    assert command.main([str(checkpoint), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with tiny.tiny_backbone():
        return save_random_model(tmp_path_factory.mktemp("small") / "run")


@pytest.fixture
def small(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkpoint with the tiny backbone, for tests of what is not saved."""
    tiny.install(monkeypatch)
    return small_checkpoint


@pytest.fixture
def model(checkpoint: Path) -> Anonymizer:
    return Anonymizer.from_checkpoint(checkpoint, device="cpu", precision="float32")


def _fails(capfd: pytest.CaptureFixture[str], argv: list[object], code: int, *words: str) -> None:
    capfd.readouterr()
    assert command.main([str(word) for word in argv]) == code
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1, output.err
    for word in words:
        assert word in output.err


def _files(folder: Path) -> list[str]:
    """Return the file names in a folder, including hidden ones."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- exported files ------------------------------------------------------------------------------


def _run_alone(path: Path, images: list[Image.Image]) -> np.ndarray:
    """Run a file with its metadata only, without code of this project."""
    session = onnxruntime.InferenceSession(str(path))
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["format"], metadata["channel_order"]) == ("securereid-export", "RGB")
    assert metadata["resize"].startswith("Pillow bilinear")
    size = int(metadata["width"]), int(metadata["height"])
    resized = [image.convert("RGB").resize(size, Image.Resampling.BILINEAR) for image in images]
    batch = np.stack([np.asarray(image) for image in resized])
    (output,) = session.run(None, {session.get_inputs()[0].name: batch})
    return np.asarray(output)


@pytest.mark.parametrize("count", [1, 5])
def test_outputs_equal_the_api(
    exported: Path, model: Anonymizer, tmp_path: Path, count: int
) -> None:
    for number in range(count):
        draw(tmp_path / f"{number}.png", number)
    images = [Image.open(tmp_path / f"{number}.png") for number in range(count)]
    for verb in ("anonymize", "recover"):
        output = _run_alone(exported / f"{verb}.onnx", images).astype(int)
        expected = np.stack([np.asarray(image) for image in getattr(model, verb)(images)])
        assert expected.std() > 5  # not a constant image
        assert np.abs(output - expected).max() <= 1
        assert (output != expected).mean() < 1e-3
    output = _run_alone(exported / "embed.onnx", images)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, model.embed(images), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(output, axis=1), 1, rtol=1e-5)


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


def test_a_file_contains_no_folder_and_no_number_of_identities(exported: Path) -> None:
    for path in exported.iterdir():
        content = path.read_bytes()
        assert str(ROOT).encode() not in content
        assert b"classifier" not in content


def test_the_command_prints_one_line_for_each_file(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [str(checkpoint), str(tmp_path), "--networks", "anonymize", "anonymize"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert command.main(argv) == 0
    output = capfd.readouterr()
    assert output.err == ""
    (line,) = output.out.splitlines()
    difference = r"(no value differs|at most 1 grey level, in \S+ % of the values)"
    assert re.search(rf"anonymize\.onnx: 0\.\d MiB; compared with PyTorch: {difference}$", line)
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
    tensor = next(item for item in content.graph.initializer if item.name.endswith("weight"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] += 0.5
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(content, str(path))


def _damage(monkeypatch: pytest.MonkeyPatch, verb: str, damage: Callable[[Path], None]) -> None:
    """Change the file of a verb after it is written and before it is compared."""
    label = exporting.label

    def damaged(graph: Graph, path: Path, metadata: dict[str, str]) -> None:
        label(graph, path, metadata)
        if metadata["verb"] == verb:
            damage(path)

    monkeypatch.setattr(exporting, "label", damaged)


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_with_a_changed_weight_is_not_saved(
    small: Path,
    tmp_path: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _damage(monkeypatch, verb, _change_a_weight)
    argv = [small, tmp_path / "out", "--networks", verb]
    words = ["differs from the network", "allowed: ", "nothing was exported"]
    _fails(capfd, argv, 1, verb, *words)
    assert _files(tmp_path / "out") == []


def test_if_one_file_fails_none_is_saved_and_old_files_stay(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "anonymize.onnx").write_text("old")
    _damage(monkeypatch, "recover", _change_a_weight)
    argv = [small, tmp_path, "--networks", "anonymize", "recover", "--overwrite"]
    _fails(capfd, argv, 1, "recover")
    assert _files(tmp_path) == ["anonymize.onnx"]
    assert (tmp_path / "anonymize.onnx").read_text() == "old"


@pytest.mark.parametrize("verb", ["anonymize", "embed"])
def test_a_wrong_normalisation_is_not_saved(
    small: Path,
    tmp_path: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The published constants instead of the checkpoint's."""
    graph_of = exporting.graph_of

    def wrong(*arguments: Any) -> Graph:
        graph = graph_of(*arguments)
        graph.space = PixelSpace((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
        return graph

    monkeypatch.setattr(exporting, "graph_of", wrong)
    _fails(capfd, [small, tmp_path, "--networks", verb], 1, "differs from the network")
    assert _files(tmp_path) == []


def test_a_network_that_changes_after_the_export_is_detected(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    anonymize = Anonymizer.anonymize_tensor

    def mirrored(self: Anonymizer, pixels: torch.Tensor) -> torch.Tensor:
        return anonymize(self, pixels).flip(dims=[3])

    monkeypatch.setattr(Anonymizer, "anonymize_tensor", mirrored)
    argv = [small, tmp_path, "--networks", "anonymize"]
    _fails(capfd, argv, 1, "anonymize: the output of the exported file", "grey levels")
    assert _files(tmp_path) == []


def test_a_network_that_onnx_cannot_express_is_an_error(tmp_path: Path) -> None:
    class Decomposed(ImageGraph):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svd(pixels.float())[1]

    graph = Decomposed(torch.nn.Identity(), PixelSpace((0, 0, 0), (1, 1, 1)), (8, 8))
    with pytest.raises(exporting.ExportError, match=r"with ONNX opset 17 \(.*try another --opset"):
        exporting.write_graph(graph, (8, 8), tmp_path / "x.onnx", 17)


def test_a_file_that_does_not_run_is_not_saved(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _damage(monkeypatch, "anonymize", lambda path: path.write_bytes(path.read_bytes()[:1000]))
    argv = [small, tmp_path, "--networks", "anonymize"]
    _fails(capfd, argv, 1, "onnxruntime", "cannot run", "--opset")
    assert _files(tmp_path) == []


# ---- faults and wrong input ----------------------------------------------------------------------


def test_ctrl_c_leaves_no_file(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    _damage(monkeypatch, "recover", interrupt)
    assert command.main([str(small), str(tmp_path)]) == 130
    assert _files(tmp_path) == []


def test_a_full_disk_is_named_and_leaves_no_file(
    small: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _fails(capfd, [small, small_disk / "out"], 2, "cannot write", "free some space")
    assert _files(small_disk / "out") == []


def test_files_of_a_killed_export_are_removed(small: Path, tmp_path: Path) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    left = tmp_path / f".anonymize.{done.pid}-abcdef12.tmp.onnx"
    left.write_text("half")
    assert command.main([str(small), str(tmp_path), "--networks", "anonymize"]) == 0
    assert _files(tmp_path) == ["anonymize.onnx"]


def test_existing_files_stay_without_overwrite(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "anonymize.onnx"
    old.write_text("old")
    _fails(capfd, [small, tmp_path], 2, f"{old} exists", "--overwrite")
    assert (_files(tmp_path), old.read_text()) == (["anonymize.onnx"], "old")
    argv = [str(small), str(tmp_path), "--networks", "anonymize", "--overwrite"]
    assert command.main(argv) == 0
    assert old.stat().st_size > 1000


def test_checkpoints_that_cannot_be_exported_are_errors(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _fails(capfd, [tmp_path / "none", tmp_path / "out"], 2, "none' is not a folder")
    alone = save_random_model(tmp_path / "c", "MODEL.MODE", "C")
    _fails(capfd, [alone, tmp_path / "out", "--networks", "embed"], 2, "no network G, G_R")
    broken = shutil.copytree(small, tmp_path / "broken")
    content = torch.load(broken / "checkpoint_best.pth", weights_only=True)
    content["networks"]["C"]["bottleneck.weight"][3] = torch.nan
    torch.save(content, broken / "checkpoint_best.pth")
    words = ["NaN or infinity (network C, bottleneck.weight)", "check the losses"]
    _fails(capfd, [broken, tmp_path / "out"], 2, *words)
    _fails(capfd, [small, __file__], 2, "cannot write")
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
    assert lines[0] == "demo/full exported"  # the fixture ran it
    assert [command.main(line.split()) for line in lines[1:]] == [0]
    assert _files(tmp_path / "camera") == ["anonymize.onnx"]
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "EXPORT.md", "exec"), scope)  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert -1 <= float(printed[1]) <= 1
    assert printed[2] == "True"  # the weights of the checkpoint


def test_the_documentation_lists_every_metadata_entry(exported: Path) -> None:
    text = (ROOT / "docs/EXPORT.md").read_text("utf-8")
    session = onnxruntime.InferenceSession(str(exported / "embed.onnx"))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mean"]) == [0.45, 0.4, 0.5]
    assert json.loads(metadata["std"]) == [0.5, 0.45, 0.55]
    assert (metadata["verb"], metadata["epoch"], metadata["checkpoint"]) == ("embed", "7", "best")
    for name in metadata:
        assert f"`{name}`" in text, name
