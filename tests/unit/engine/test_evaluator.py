"""One pass over the images equals the naive passes, for every direction and key state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from yacs.config import CfgNode

from configs.loading import load
from data.build import build_eval_loader, build_splits
from data.records import DatasetSplits, Sample
from engine.evaluation import Evaluator, build_evaluator, build_image_grid
from engine.model import Model, build_model
from engine.report import DIRECTIONS, EvalReport
from engine.scoring.image_quality import QualityAccumulator
from modeling.build import CIPHERS
from modeling.encryption.additive import AdditiveCipher
from modeling.encryption.aead import AeadCipher
from modeling.encryption.cipher import Cipher
from modeling.privacy_networks import PrivacyNetworks
from tests.fixtures import tiny
from tests.fixtures.naive_retrieval import distances, naive_scores


class Scene:
    """A small untrained model with random statistics, and the test split of the synthetic set."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.splits: DatasetSplits = build_splits(cfg)
        self.model: Model = build_model(cfg, len(self.splits.label_of))
        generator = torch.Generator().manual_seed(3)
        for (
            name,
            value,
        ) in self.model.nets.named_parameters():  # far from the start values, so that images differ
            if value.ndim > 1 and "discriminator" not in name:
                value.data = 0.3 * torch.randn(value.shape, generator=generator)

    def evaluator(self, cipher: Cipher | None, *overrides: str) -> Evaluator:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(list(overrides))
        return build_evaluator(cfg, self.model, self.splits, "test", cipher, {})

    def batches(self, samples: tuple[Sample, ...]) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Raw and desensitized images one by one, and the subject of each."""
        for batch in build_eval_loader(self.cfg, samples, self.model.device):
            for place, index in enumerate(batch.index.tolist()):
                one = slice(place, place + 1)
                yield batch.raw[one], batch.desensitized[one], [samples[index].subject]


@pytest.fixture
def make_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scene]:
    tiny.install(monkeypatch)

    def make(*overrides: str) -> Scene:
        config, *words = tiny.arguments(tmp_path, *overrides)
        return Scene(load(config.split("=")[1], words))

    return make


def _naive_rows(
    scene: Scene,
    protect: Callable[[Tensor, Tensor, list[str]], Tensor],
    *,
    cross_camera: bool = True,
) -> dict[tuple[str, str], dict[str, float]]:
    """Return the scores of each direction, image by image; ``protect`` returns protected images."""
    nets, sides = scene.model.nets.eval(), {}
    for side, samples in (("query", scene.splits.query), ("gallery", scene.splits.gallery)):
        found: dict[str, list[np.ndarray]] = {"raw": [], "protected": []}
        with torch.no_grad():
            for raw, desensitized, subject in scene.batches(samples):
                images = {"raw": raw, "protected": protect(raw, desensitized, subject)}
                for kind, image in images.items():
                    found[kind].append(nets.reid(image).embedding[0].numpy())
        sides[side] = {kind: np.stack(rows) for kind, rows in found.items()}
    who = [
        [getattr(sample, name) for sample in samples]
        for samples in (scene.splits.query, scene.splits.gallery)
        for name in ("pid", "camid")
    ]
    rows = {}
    for direction in DIRECTIONS:
        matrix = distances(sides["query"][direction[0]], sides["gallery"][direction[1]])
        scores = naive_scores(matrix, *who, cross_camera=cross_camera)
        assert scores is not None
        rows[direction] = {"rank1": scores["cmc"][0], "rank5": scores["cmc"][4]}
        rows[direction] |= {"mAP": scores["mAP"], "mINP": scores["mINP"]}
    return rows


def _expect(report: EvalReport, key: str, rows: dict[tuple[str, str], dict[str, float]]) -> None:
    for direction, scores in rows.items():
        row = report.row(*direction, key)
        for name, value in scores.items():
            assert getattr(row, name) == pytest.approx(value, abs=1e-9), (direction, key, name)


def test_every_key_state_equals_the_naive_passes(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    cipher, nets = AdditiveCipher(), scene.model.nets
    assert isinstance(nets, PrivacyNetworks)
    report = scene.evaluator(cipher).evaluate(4)
    assert report.epoch == 4

    def pad(pid: int) -> Tensor:
        generator = torch.Generator().manual_seed(pid)
        return 2 * torch.rand(3, 32, 32, generator=generator) - 1

    def pid_of(subject: list[str]) -> int:
        return int(subject[0].rsplit("/", 1)[1])

    protections: dict[str, Callable[[Tensor, Tensor, list[str]], Tensor]] = {
        "none": lambda raw, _, __: nets.anonymizer(raw),
        "right": lambda raw, _, s: nets.anonymizer(raw) + pad(pid_of(s)) - pad(pid_of(s)),
        "wrong": lambda raw, _, s: nets.anonymizer(raw) + pad(pid_of(s)) - pad(pid_of(s) + 1),
        "ciphertext": lambda raw, _, s: nets.anonymizer(raw) + pad(pid_of(s)),
    }
    assert {row.key for row in report.retrieval} == set(protections)
    assert len(report.retrieval) == 4 + 3 * 3
    rows = {key: _naive_rows(scene, protect) for key, protect in protections.items()}
    for key in protections:
        _expect(report, key, rows[key])
    assert rows["none"] != rows["wrong"] != rows["ciphertext"]  # otherwise nothing is tested


def test_same_camera_matches_count_in_every_direction_if_asked_for(
    make_scene: Callable[..., Scene],
) -> None:
    scene = make_scene()
    scene.splits = replace(scene.splits, gallery=scene.splits.query + scene.splits.gallery)
    report = scene.evaluator(None, "TEST.CROSS_CAMERA", "False").evaluate(1)
    assert isinstance(scene.model.nets, PrivacyNetworks)
    anonymizer = scene.model.nets.anonymizer
    rows = _naive_rows(scene, lambda raw, _, __: anonymizer(raw), cross_camera=False)
    _expect(report, "none", rows)
    assert rows["raw", "raw"]["rank1"] == 1.0  # every query is in the gallery itself


def test_the_baseline_protects_by_desensitizing(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("MODEL.MODE", "C")
    report = scene.evaluator(None).evaluate(1)
    assert {row.key for row in report.retrieval} == {"none"}
    assert set(report.image_quality) == {"desensitized"}
    assert report.headline_key == "none"
    _expect(report, "none", _naive_rows(scene, lambda _, desensitized, __: desensitized))


def test_image_quality_is_computed_from_every_image(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    nets, pixels = scene.model.nets.eval(), scene.model.pixels
    assert isinstance(nets, PrivacyNetworks)
    report = scene.evaluator(AdditiveCipher()).evaluate(1)
    kinds = ("desensitized", "anonymized", "encrypted", "decrypted", "recovered")
    assert tuple(report.image_quality) == kinds
    expected = {kind: QualityAccumulator() for kind in ("desensitized", "anonymized", "recovered")}
    with torch.no_grad():
        for raw, desensitized, _ in scene.batches((*scene.splits.query, *scene.splits.gallery)):
            anonymized = nets.anonymizer(raw)
            images = {"desensitized": desensitized, "anonymized": anonymized}
            images["recovered"] = nets.recovery(anonymized)
            for kind, accumulator in expected.items():
                accumulator.update(pixels.denormalize(raw), pixels.denormalize(images[kind]))
    for kind, accumulator in expected.items():
        quality, expected = report.image_quality[kind], accumulator.result()
        assert quality.psnr_db == pytest.approx(expected.psnr_db, rel=1e-5)
        assert quality.ssim == pytest.approx(expected.ssim, rel=1e-4)
    quality = report.image_quality
    assert quality["decrypted"].psnr_db == pytest.approx(quality["anonymized"].psnr_db, rel=1e-5)
    assert quality["encrypted"].psnr_db < quality["anonymized"].psnr_db


def test_the_right_key_of_aead_gives_the_rounded_images(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    cipher, nets = AeadCipher(), scene.model.nets
    assert isinstance(nets, PrivacyNetworks)
    report = scene.evaluator(cipher).evaluate(1)
    rounded = _naive_rows(scene, lambda raw, _, __: cipher.quantize(nets.anonymizer(raw)))
    _expect(report, "right", rounded)
    refused = {row.key: row.refused for row in report.retrieval}
    assert refused == {"none": False, "right": False, "wrong": True, "ciphertext": False}
    for direction in DIRECTIONS[1:]:  # a refused image is scored as ciphertext
        wrong, seen = report.row(*direction, "wrong"), report.row(*direction, "ciphertext")
        assert (wrong.rank1, wrong.mAP, wrong.mINP) == (seen.rank1, seen.mAP, seen.mINP)


@pytest.mark.parametrize("scheme", sorted(CIPHERS))
def test_recovery_gets_the_decrypted_or_encrypted_image(
    make_scene: Callable[..., Scene], scheme: str
) -> None:
    scene = make_scene()
    nets, pixels = scene.model.nets.eval(), scene.model.pixels
    assert isinstance(nets, PrivacyNetworks)
    reports = {
        state: scene.evaluator(CIPHERS[scheme](), "TEST.RECOVERY_WITH_KEY", state).evaluate(1)
        for state in ("on", "off")
    }
    expected = QualityAccumulator()
    with torch.no_grad():
        for raw, _, __ in scene.batches((*scene.splits.query, *scene.splits.gallery)):
            recovered = nets.recovery(CIPHERS[scheme]().quantize(nets.anonymizer(raw)))
            expected.update(pixels.denormalize(raw), pixels.denormalize(recovered))
    quality = reports["on"].image_quality["recovered"]
    assert quality.psnr_db == pytest.approx(expected.result().psnr_db, rel=1e-4)
    assert reports["off"].image_quality["recovered"].psnr_db != pytest.approx(quality.psnr_db, 1e-3)
    assert reports["off"].notes["recovered from"] == "encrypted images"
    assert "recovered from" not in reports["on"].notes
    assert [r.rank1 for r in reports["on"].retrieval][:4] == [
        r.rank1 for r in reports["off"].retrieval
    ][:4]  # re-ID does not see recovered images


@pytest.mark.parametrize(("state", "key"), [("on", "right"), ("off", "ciphertext")])
def test_retrieve_with_key_chooses_the_headline(
    make_scene: Callable[..., Scene], state: str, key: str
) -> None:
    scene = make_scene()
    report = scene.evaluator(AdditiveCipher(), "TEST.RETRIEVE_WITH_KEY", state).evaluate(1)
    assert report.headline_key == key
    cells = [report.row(*direction, key).rank1 for direction in DIRECTIONS]
    assert report.published_row() == "/".join(f"{100 * cell:.1f}" for cell in cells)
    assert {row.key for row in report.retrieval} == {"none", "right", "wrong", "ciphertext"}


@pytest.mark.parametrize("training", [True, False])
def test_the_networks_are_unchanged(make_scene: Callable[..., Scene], training: bool) -> None:
    """So are their running statistics, also if the pass fails."""
    scene = make_scene()
    nets = scene.model.nets.train(training)
    before = {name: value.clone() for name, value in nets.state_dict().items()}
    evaluator = scene.evaluator(None)
    evaluator.evaluate(1)
    assert all(module.training is training for module in nets.modules())
    tiny.assert_equal(before, dict(nets.state_dict()))
    with pytest.raises(ZeroDivisionError):
        _broken(scene).evaluate(1)
    assert all(module.training is training for module in nets.modules())


def test_an_image_grid_is_drawn_in_evaluation_mode_and_changes_nothing(
    make_scene: Callable[..., Scene],
) -> None:
    """Batch statistics would mix identities, and change the running statistics."""
    scene = make_scene()
    nets = scene.model.nets
    draw = build_image_grid(scene.cfg, scene.model, scene.splits.query)
    nets.eval()
    expected = draw()
    before = {name: value.clone() for name, value in nets.train().state_dict().items()}
    assert draw().tobytes() == expected.tobytes()
    assert all(module.training for module in nets.modules())
    tiny.assert_equal(before, dict(nets.state_dict()))


def _broken(scene: Scene) -> Evaluator:
    class Breaks:
        def denormalize(self, images: Tensor) -> Tensor:
            raise ZeroDivisionError

    evaluator = scene.evaluator(None)
    object.__setattr__(evaluator, "pixels", Breaks())
    return evaluator


def test_scores_do_not_depend_on_the_batch(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    reports = [
        scene.evaluator(AdditiveCipher(), "TEST.IMS_PER_BATCH", size).evaluate(1)
        for size in ("1", "7", "256")
    ]
    for report in reports[1:]:
        for row, same in zip(report.retrieval, reports[0].retrieval, strict=True):
            assert (row.rank1, row.key) == (same.rank1, same.key)
            assert row.mAP == pytest.approx(same.mAP, abs=1e-6)
        for kind, quality in report.image_quality.items():
            assert quality.psnr_db == pytest.approx(reports[0].image_quality[kind].psnr_db, 1e-5)


def test_the_report_contains_notes_and_versions(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    scene.splits.notes["protocol"] = "MSMT17, trained on trainval"
    report = scene.evaluator(AdditiveCipher(), "TEST.CROSS_CAMERA", "False").evaluate(1)
    assert report.notes["encryption"] == "additive (not secure)"
    assert "single camera" in report.notes["matches"]
    assert report.notes["protocol"] == "MSMT17, trained on trainval"
    assert {"torch", "python", "device"} <= set(report.versions)


@pytest.mark.parametrize(("cipher", "count"), [(AdditiveCipher, 1), (AeadCipher, 0), (None, 0)])
def test_the_table_warns_that_a_repeated_pad_identifies_a_subject(
    make_scene: Callable[..., Scene], cipher: type[AdditiveCipher | AeadCipher] | None, count: int
) -> None:
    report = make_scene().evaluator(cipher() if cipher else None).evaluate(1)
    assert report.table().count("this leak, not re-ID") == count


@pytest.mark.parametrize(("name", "passes"), [("additive", 5), ("aead", 4), (None, 2)])
def test_no_image_is_embedded_twice(
    make_scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, name: str | None, passes: int
) -> None:
    """aead refuses a wrong key; the ciphertext view is scored instead, and embedded once."""
    scene = make_scene()
    reid, seen = scene.model.nets.reid, list[int]()
    embed = reid.embed

    def counting(images: Tensor) -> Tensor:
        seen.append(len(images))
        return embed(images)

    monkeypatch.setattr(reid, "embed", counting)
    evaluator = scene.evaluator(CIPHERS[name]() if name else None)
    found = evaluator.extract()
    assert sum(seen) == passes * (len(scene.splits.query) + len(scene.splits.gallery))
    if name == "aead":
        features = found.query.features
        assert torch.equal(features["wrong"].embeddings, features["ciphertext"].embeddings)
