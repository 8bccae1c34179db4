"""Commands on models whose re-ID backbone is a timm model: a convolutional one and a ViT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import loading
from engine.api import Anonymizer
from tests.fixtures import tiny
from tests.fixtures.protection import draw
from tools import attack, export, keyring, protect

pytest.importorskip("timm", reason="needs the extra `timm`")

SIZE = ("INPUT.IMG_SIZE", "(64, 32)")


@pytest.fixture(scope="module", params=["test_efficientnet", "test_vit"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of two epochs, the second one after a resume."""
    folder = tmp_path_factory.mktemp("timm")
    model = ("MODEL.NAME", f"timm:{request.param}", *SIZE)
    with tiny.tiny_backbone():  # not of timm models; draws the images faster
        tiny.run(folder, *model, "SOLVER.MAX_EPOCHS", "1")
        return tiny.run(folder, *model, "SOLVER.RESUME", "True")


def model_of(run: Path) -> tuple[str, ...]:
    return "MODEL.NAME", loading.load(run / "config.yml").MODEL.NAME, *SIZE


def test_a_resumed_training_equals_an_uninterrupted_one(trained: Path, tmp_path: Path) -> None:
    tiny.assert_same_end(tiny.run(tmp_path, *model_of(trained)), trained)


def test_an_evaluation_repeats_the_scores_of_the_training(trained: Path, tmp_path: Path) -> None:
    choice = ("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(trained))
    evaluate = (*choice, "TEST.EVALUATE_ONLY", "on", "EVAL.SPLIT", "val")
    report = tiny.results(tiny.run(tmp_path, *model_of(trained), *evaluate))
    scores = [
        [row for row in rows["retrieval"] if row["key"] in ("none", "right")]
        for rows in (report, tiny.results(trained))
    ]
    assert scores[0] == scores[1] != []


def test_images_are_sealed_and_opened(trained: Path, tmp_path: Path) -> None:
    for index in range(2):
        draw(tmp_path / "images" / "0001" / f"0001_c{index + 1}.png", index)
    keys = ["--keyring", str(tmp_path / "keys.db"), "--master", str(tmp_path / "master.key")]
    folders = [str(tmp_path / name) for name in ("images", "sealed", "opened")]
    model = ["--checkpoint", str(trained), "--device", "cpu"]
    command = ["protect", *folders[:2], *keys, *model, "--workers", "0"]
    assert keyring.main([*keys, "init"]) == 0
    assert protect.main(command) == 0
    assert protect.main(["open", *folders[1:], *keys]) == 0
    assert len(list((tmp_path / "opened").rglob("*.png"))) == 2


def test_exported_embeddings_equal_those_of_the_api(trained: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    folder = tmp_path / "exported"
    assert export.main([str(trained), str(folder)]) == 0
    model = Anonymizer.from_checkpoint(trained, device="cpu", precision="float32")
    pixels = np.random.default_rng(1).integers(0, 256, (3, *model.size, 3)).astype(np.uint8)
    session = onnxruntime.InferenceSession(folder / "embed.onnx")
    given = session.get_inputs()[0]
    (embeddings,) = session.run(None, {given.name: pixels})
    expected = model.embed([Image.fromarray(image) for image in pixels])
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)


def test_an_attacker_fine_tunes_the_network(trained: Path, tmp_path: Path) -> None:
    command = ["--checkpoint", str(trained), "--output", str(tmp_path), "--budget", "40"]
    attacks = ["--epochs", "8", "--only", "reid-tuned", "--level", "anonymized"]
    assert attack.main([*command, *attacks]) == 0
    assert "reid-tuned" in json.loads((tmp_path / "verdicts.json").read_text("utf-8"))
