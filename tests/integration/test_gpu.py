"""On a real GPU: numbers agree with the CPU, and the host does not wait.

``tests/unit/engine/test_cuda_without_a_gpu.py`` covers what can be tested without values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.loading import load
from engine.build import build_step, build_trainer
from engine.model import build_model
from engine.scoring.features import Features
from engine.scoring.image_quality import QualityAccumulator
from engine.scoring.reranking import score_reranked
from engine.scoring.retrieval import score_retrieval
from engine.supervision import Supervision, UpgradePolicy
from engine.train_step import BatchTooLarge, step_that_fits
from engine.trainer import LossGuard, Trainer
from modeling.build import build_objectives
from solver.optimizers import build_optimizers
from tests.fixtures import tiny
from tests.fixtures.curves import curve_of, worst_difference
from tools.benchmarks.step import NUM_CLASSES, network_config, random_batch

pytestmark = pytest.mark.gpu
GPU = "cuda"
OFF = ("RUNTIME.COMPILE", "off")
PUBLISHED = "configs/AGW_baseline.yml"


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Restore the rounding of cuDNN, which building a model changes."""
    tf32 = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = tf32
    torch.cuda.empty_cache()


def _trainer(folder: Path, device: str, *overrides: str) -> Trainer:
    words = ("MODEL.DEVICE", device, "SOLVER.WARMUP_ITERS", "0", *OFF, *overrides)
    output = f"run{len(list(folder.iterdir()))}"
    (folder / output).mkdir()
    config, *given = tiny.arguments(folder, *words, output=output)
    trainer = build_trainer(load(config.split("=")[1], given))
    trainer.networks.train()
    return trainer


@pytest.mark.parametrize("mode", ["GCR", "C"])
@pytest.mark.parametrize("cache", ["device", "memory", "stream"])
def test_training_follows_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, mode: str
) -> None:
    tiny.install(monkeypatch)
    keys = ("CACHE.MODE", cache, "MODEL.MODE", mode)
    on_cpu, on_gpu = (curve_of(_trainer(tmp_path, device, *keys)) for device in ("cpu", GPU))
    assert worst_difference(on_cpu, on_gpu) < 0.01  # rounding, which Adam's first steps amplify


def test_bfloat16_follows_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)
    plain, fast = (
        curve_of(_trainer(tmp_path, GPU, "RUNTIME.PRECISION", precision))
        for precision in ("float32", "bfloat16")
    )
    assert worst_difference(plain, fast) < 0.05


@pytest.mark.slow
def test_compiled_networks_follow_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.install(monkeypatch)
    plain, fast = (
        curve_of(_trainer(tmp_path, GPU, "RUNTIME.COMPILE", choice)) for choice in ("off", "on")
    )
    assert worst_difference(plain, fast) < 0.01


@pytest.mark.parametrize("cache", ["device", "memory"])
@pytest.mark.parametrize("kind", ["mosaic", "blur", "noise"])
def test_the_host_never_waits_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cache: str
) -> None:
    tiny.install(monkeypatch)
    radius = {"mosaic": "8", "blur": "4", "noise": "0.5"}[kind]
    keys = ("INPUT.TYPE", kind, "INPUT.RADIUS", radius, "CACHE.MODE", cache)
    trainer = _trainer(tmp_path, GPU, "RUNTIME.PRECISION", "auto", *keys)
    guard = LossGuard(tmp_path)
    trainer.loader.set_epoch(1)
    batches = iter(trainer.loader)
    for number in range(2):  # the first round copies constants
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            batch = next(batches)
            output = trainer.step(batch)
            guard.observe(output.losses, batch, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    guard.check()


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)
    keys = ("MODEL.DEVICE", GPU, *OFF, *tiny.PERMISSIVE, "TEST.RE_RANKING", "on")
    folder = tiny.run(tmp_path, *keys)
    assert torch.device(GPU).type in (folder / "results.json").read_text(encoding="utf-8")
    test = ("TEST.EVALUATE_ONLY", "on", "MODEL.PRETRAIN_CHOICE", "self")
    scores = []
    for device in ("cpu", GPU):
        words = ("MODEL.DEVICE", device, *test, "MODEL.PRETRAIN_DIR", str(folder))
        done = tiny.run(tmp_path, *words, output=f"test-{device}")
        scores.append(json.loads((done / "results.json").read_text(encoding="utf-8")))
    on_cpu, on_gpu = (one["image_quality"] for one in scores)
    for kind, quality in on_cpu.items():
        for name, value in quality.items():
            assert on_gpu[kind][name] == pytest.approx(value, rel=1e-3), (kind, name)


def _features(count: int, people: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    pids = torch.arange(count) % people - 1  # including junk
    centers = torch.randn(people, 64, generator=torch.Generator().manual_seed(0))
    embeddings = centers[pids + 1] + torch.randn(count, 64, generator=generator)
    return Features(embeddings, pids, torch.randint(3, (count,), generator=generator))


@pytest.mark.parametrize("score", [score_retrieval, score_reranked])
def test_scores_are_those_of_the_cpu(score) -> None:  # type: ignore[no-untyped-def]
    query, gallery = _features(200, 30, 1), _features(5000, 30, 2)
    on_gpu = [Features(one.embeddings.to(GPU), one.pids, one.camids) for one in (query, gallery)]
    expected, found = score(query, gallery), score(*on_gpu)
    assert found.mAP == pytest.approx(expected.mAP, abs=1e-4)
    assert found.mINP == pytest.approx(expected.mINP, abs=1e-4)
    assert found.rank1 == pytest.approx(expected.rank1, abs=0.006)  # one query may be a near tie


def test_image_quality_is_that_of_the_cpu() -> None:
    raw, image = torch.rand(2, 5, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", GPU):
        one = QualityAccumulator()
        one.update(raw.to(device), image.to(device))
        results.append(one.result())
    assert results[1].psnr_db == pytest.approx(results[0].psnr_db, abs=1e-4)
    assert results[1].ssim == pytest.approx(results[0].ssim, abs=1e-5)


def test_a_batch_that_does_not_fit() -> None:
    """With 4 GiB of the GPU's memory."""
    device = torch.device("cuda", 0)
    cfg = network_config(PUBLISHED, OFF, "cuda:0")
    model = build_model(cfg, NUM_CLASSES)
    model.nets.train()
    objectives = build_objectives(cfg, NUM_CLASSES, model.nets.reid.feature_size)
    if objectives.centers is not None:
        objectives.centers.to(device)
    optimizers = build_optimizers(cfg, model.nets.official_networks, objectives.centers)
    step = build_step(model, objectives, optimizers, Supervision(UpgradePolicy()))

    def try_to_fit(count: int) -> None:
        batch, clean = random_batch(cfg, count, device), optimizers.zero_grad
        step_that_fits(step, batch, num_instances=4, clean=clean, alone=True)

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    room = torch.cuda.memory_reserved(device) + 4 * 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    try:
        with pytest.raises(BatchTooLarge, match=r"BATCH \d+ instead of 512") as raised:
            try_to_fit(512)
        size = int(str(raised.value).split("set SOLVER.IMS_PER_BATCH ")[1].split()[0])
        assert 8 <= size < 512
        optimizers.zero_grad()
        torch.cuda.empty_cache()
        try_to_fit(size)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
