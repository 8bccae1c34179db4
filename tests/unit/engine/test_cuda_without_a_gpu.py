"""Training and evaluation on a fake GPU: devices agree, and the host never waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor
from yacs.config import CfgNode

from data.desensitize import make_desensitizer
from data.loaders import TrainLoader
from data.records import Batch, Sample
from data.samplers import IdentitySampler
from data.store import Pixels
from data.transforms import Augmentation, normalize_batch
from engine.attacks.training import TrainingSetup
from engine.build import build_step
from engine.model import Model
from engine.scoring.image_quality import QualityAccumulator
from engine.supervision import Supervision, UpgradePolicy, UpgradeState, frozen_copy
from engine.views import JointViews
from layers.pixels import PixelSpace
from modeling.build import build_networks, build_objectives
from modeling.encryption.additive import AdditiveCipher
from modeling.encryption.cipher import dequantize_pixels, quantize_pixels
from modeling.privacy_networks import PrivacyNetworks
from solver.optimizers import build_optimizers
from tests.fixtures import tiny
from tests.fixtures.fake_cuda import (
    CUDA,
    HostWaitsError,
    NoWaiting,
    fake_cuda,
    moved,
    without_backward,
)

MakeCfg = Callable[..., CfgNode]
SIZE = (64, 32)
NUM_CLASSES = 6
RADII = {"mosaic": 8.0, "blur": 4.0, "noise": 0.5}

pytestmark = pytest.mark.filterwarnings("ignore::modeling.encryption.additive.NotSecureWarning")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


@pytest.fixture
def space() -> PixelSpace:
    """A new one for each test, because it caches constants on each device."""
    return PixelSpace((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda on_gpu, _: on_gpu.sum().item(),
        lambda on_gpu, _: bool(on_gpu.any()),
        lambda on_gpu, _: on_gpu[on_gpu > 0],
        lambda on_gpu, _: on_gpu.nonzero(),
        lambda on_gpu, _: on_gpu.cpu(),
        lambda on_gpu, on_host: on_host.copy_(on_gpu, non_blocking=True),  # into pageable memory
        lambda _, on_host: on_host.to(CUDA),
        lambda on_gpu, on_host: on_gpu.copy_(on_host),
        lambda on_gpu, on_host: on_gpu + on_host,
        lambda on_gpu, on_host: torch.cat((on_gpu, on_host)),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_mistakes_are_found(
    gpu: None, inference: bool, mistake: Callable[[Tensor, Tensor], object]
) -> None:
    with torch.inference_mode(inference):
        on_gpu, on_host = torch.empty(3, device=CUDA), torch.empty(3)
        with NoWaiting(), pytest.raises((RuntimeError, HostWaitsError)):
            mistake(on_gpu, on_host)
        with NoWaiting():
            on_gpu += on_host.to(CUDA, non_blocking=True)


def _batch(count: int = 8) -> Batch:
    raw, desensitized = (torch.empty(count, 3, *SIZE, device=CUDA) for _ in range(2))
    label = torch.empty(count, dtype=torch.int64, device=CUDA)
    return Batch(raw, desensitized, label, label, label, torch.empty(count, dtype=torch.int64))


JOINT = ("MODEL.MODE", "GCR")
BASELINE = ("MODEL.MODE", "C", "MODEL.CENTER_LOSS", "on")
PROTECTED = ("MODEL.OUTPUT_MODE", "protected")
RECOMPUTED = ("SOLVER.GRAD_CHECKPOINT", "True", "MODEL.OUTPUT_MODE", "origin")


@pytest.mark.parametrize(
    ("precision", "keys"),
    [
        (torch.bfloat16, JOINT),
        (torch.float32, (*JOINT, "MODEL.GAN_MODE", "vanilla", "MODEL.CENTER_LOSS", "off")),
        (torch.bfloat16, (*JOINT, "MODEL.WEIGHT_REGULARIZED_TRIPLET", "off", *PROTECTED)),
        (torch.bfloat16, (*JOINT, "RUNTIME.CHANNELS_LAST", "False", *RECOMPUTED)),
        (torch.bfloat16, BASELINE),
    ],
)
def test_a_step_never_makes_the_host_wait(
    make_cfg: MakeCfg,
    monkeypatch: pytest.MonkeyPatch,
    space: PixelSpace,
    precision: torch.dtype,
    keys: tuple[str],
) -> None:
    if keys not in (JOINT, BASELINE):  # these variants do not change the backbone
        tiny.install(monkeypatch)
    cfg = make_cfg("MODEL.PRETRAIN_CHOICE", "none", *keys)
    nets = build_networks(cfg, NUM_CLASSES).train()
    objectives = build_objectives(cfg, NUM_CLASSES, nets.reid.feature_size)
    supervision = Supervision(UpgradePolicy())
    modules = [nets] if objectives.centers is None else [nets, objectives.centers]
    teacher = frozen_copy(nets.anonymizer) if isinstance(nets, PrivacyNetworks) else None
    with fake_cuda(monkeypatch):
        for module in modules:
            moved(module)
        without_backward(monkeypatch, (p for module in modules for p in module.parameters()))
        optimizers = build_optimizers(cfg, nets.official_networks, objectives.centers)
        model = Model(nets, CUDA, precision, space)
        step = build_step(model, objectives, optimizers, supervision)
        step(_batch())  # constants are sent once
        with NoWaiting():
            output = step(_batch())
        if teacher is not None and keys == JOINT:
            supervision.teacher = moved(teacher)
            supervision.state = UpgradeState(1, 0.5, 1, in_force=True)
            with NoWaiting():
                output = step(_batch())
    assert {value.device for value in output.numbers().values()} == {CUDA}
    assert {value.dtype for value in output.numbers().values()} == {torch.float32}


class _Resident:
    """Images that are kept on the GPU, with or without desensitized ones."""

    def __init__(self, count: int, *, both: bool) -> None:
        self.usable = torch.arange(count)
        self._finished = [torch.empty(count, 3, *SIZE, dtype=torch.uint8, device=CUDA)] * (1 + both)

    def batches(self, plan: Iterable[Tensor]) -> Iterator[Pixels]:
        for places in plan:
            taken = [
                kept.index_select(0, places.to(CUDA, non_blocking=True)) for kept in self._finished
            ]
            yield taken[0], taken[1] if len(taken) > 1 else None


@pytest.mark.parametrize(
    ("kind", "both", "order"),  # blur runs on the CPU and is kept
    [
        ("mosaic", False, "before"), ("mosaic", True, "before"), ("blur", True, "before"),
        ("noise", False, "before"), ("noise", True, "before"),
        ("mosaic", False, "after"), ("noise", False, "after"),
    ],
)  # fmt: skip
def test_batches_never_make_the_host_wait(
    gpu: None, space: PixelSpace, kind: str, both: bool, order: str
) -> None:
    samples = [
        Sample(f"{place}.jpg", place // 4, 0, f"set/train/{place // 4}") for place in range(24)
    ]
    loader = TrainLoader(
        _Resident(len(samples), both=both), samples, {pid: pid for pid in range(6)},
        sampler=IdentitySampler([s.pid for s in samples], batch_size=8, num_instances=4),
        desensitizer=make_desensitizer(kind, RADII[kind]),
        desensitize=order,
        augmentation=Augmentation(space), seed=1, device=CUDA,
    )  # fmt: skip
    batches = iter(loader)
    next(batches)  # constants are sent once
    with NoWaiting():
        batch = next(batches)
    for images in (batch.raw, batch.desensitized):
        assert (images.device, images.dtype) == (CUDA, torch.float32)
        assert images.shape == (8, 3, *SIZE)
    assert {one.device for one in (batch.label, batch.pid, batch.camid)} == {CUDA}
    assert batch.index.device.type == "cpu"


@pytest.mark.parametrize("kind", ["mosaic", "noise"])  # blur runs on the CPU
def test_evaluation_images(gpu: None, space: PixelSpace, kind: str) -> None:
    images = torch.empty(40, 3, *SIZE, dtype=torch.uint8, device=CUDA)
    desensitizer = make_desensitizer(kind, RADII[kind])
    normalize_batch(desensitizer(images), space)
    with NoWaiting():
        out = normalize_batch(desensitizer(images), space)
    assert (out.device, out.dtype, out.shape) == (CUDA, torch.float32, images.shape)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_the_views_of_an_evaluation(
    make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch, space: PixelSpace, precision: torch.dtype
) -> None:
    """Without the check that sealed images are finite, for which the host has to wait."""
    if precision is torch.float32:  # does not change the backbone
        tiny.install(monkeypatch)
    nets = build_networks(make_cfg("MODEL.PRETRAIN_CHOICE", "none", *JOINT), NUM_CLASSES).eval()
    assert isinstance(nets, PrivacyNetworks)
    monkeypatch.setattr("modeling.encryption.additive.check_batch", lambda *_: None)
    subjects = [f"set/test/{number // 3}" for number in range(8)]
    with fake_cuda(monkeypatch), torch.inference_mode():
        moved(nets)
        autocast = Model(nets, CUDA, precision, space).autocast
        make_views = JointViews(nets, AdditiveCipher())
        quality = QualityAccumulator()

        def look() -> set[torch.device]:
            batch = _batch()
            with autocast():
                views = make_views(batch, subjects)
                embeddings = [nets.reid.embed(images) for images in views.protected.values()]
            for images in views.kinds.values():
                quality.update(space.denormalize(batch.raw), space.denormalize(images))
            assert {one.dtype for one in embeddings} == {torch.float32}
            return {one.device for one in (*views.kinds.values(), *embeddings)}

        look()  # constants are sent once
        with NoWaiting():
            assert look() == {CUDA}


def test_pixels_are_quantized_and_dequantized(gpu: None) -> None:
    with NoWaiting():
        images = dequantize_pixels(quantize_pixels(torch.empty(2, 3, *SIZE, device=CUDA)))
    assert (images.device, images.shape) == (CUDA, (2, 3, *SIZE))


def test_an_attackers_networks(
    make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch, space: PixelSpace
) -> None:
    """The images are on the host, the networks on the GPU."""
    tiny.install(monkeypatch)
    nets = build_networks(make_cfg("MODEL.PRETRAIN_CHOICE", "none", *JOINT), NUM_CLASSES)
    assert isinstance(nets, PrivacyNetworks)
    with fake_cuda(monkeypatch):
        moved(nets)
        autocast = Model(nets, CUDA, torch.bfloat16, space).autocast
        bench = TrainingSetup(CUDA, autocast, space, batch_size=4, steps=1, seed=1)
        images = torch.empty(6, 3, *SIZE)
        for out in (bench.pictures(nets.recovery, images), bench.embeddings(nets.reid, images)):
            assert (len(out), out.device.type, out.dtype) == (6, "cpu", torch.float32)
