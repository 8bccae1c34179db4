"""Loaders built from the configuration: epochs, cache modes, ranks, noise, damaged images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.defaults import default_config
from data.build import _SOURCES, build_eval_loader, build_train_loader
from data.desensitize import make_desensitizer
from data.store import ResidentPixels, StreamedPixels
from layers.pixels import PixelSpace
from tests.fixtures.images import image_splits
from utils.errors import UserError
from utils.world import World

CPU = torch.device("cpu")
FIELDS = ("raw", "desensitized", "label", "pid", "camid", "index")
RADII = {"mosaic": 8.0, "blur": 3.0, "noise": 0.5}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return image_splits(tmp_path_factory.mktemp("images"), [3, 8, 5, 9, 4, 6])


def _config(**changes: object):
    cfg = default_config()
    cfg.INPUT.IMG_SIZE = (32, 16)
    cfg.INPUT.PADDING = 3
    cfg.INPUT.TYPE, cfg.INPUT.RADIUS = "mosaic", 8.0
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.DATALOADER.NUM_INSTANCE = 2
    cfg.DATALOADER.NUM_WORKERS = 1
    cfg.TEST.IMS_PER_BATCH = 5
    for key, value in changes.items():
        node, name = key.split("__")
        cfg[node][name] = value
    return cfg


def _epoch(loader, epoch: int = 1) -> list[tuple[torch.Tensor, ...]]:
    loader.set_epoch(epoch)
    batches = [tuple(getattr(batch, name) for name in FIELDS) for batch in loader]
    assert len(batches) == len(loader)
    return batches


def _same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_the_fields_of_a_training_batch(splits):
    loader = build_train_loader(_config(), splits, CPU)
    for batch in loader:
        assert batch.raw.shape == batch.desensitized.shape == (8, 3, 32, 16)
        assert batch.raw.dtype == batch.desensitized.dtype == torch.float32
        samples = [splits.train[index] for index in batch.index.tolist()]
        assert batch.pid.tolist() == [sample.pid for sample in samples]
        assert batch.camid.tolist() == [sample.camid for sample in samples]
        assert batch.label.tolist() == [splits.label_of[sample.pid] for sample in samples]
        assert len(batch.pid.unique()) == 4
        assert batch.raw.isfinite().all()
        assert not torch.equal(batch.raw, batch.desensitized)


def test_raw_and_desensitized_images_of_a_batch_belong_together(splits):
    plain = {"INPUT__PROB": 0.0, "INPUT__RE_PROB": 0.0, "INPUT__PADDING": 0}
    cfg = _config(**plain)
    loader = build_train_loader(cfg, splits, CPU)
    space = PixelSpace(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)
    for batch in loader:
        assert torch.equal(batch.raw, space.normalize(loader.source.raw[batch.index]))
        tiles = batch.raw[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)
        assert torch.equal(batch.desensitized, tiles)


@pytest.mark.parametrize("mode", ["memory", "stream"])
@pytest.mark.parametrize("name", ["mosaic", "blur"])
def test_images_can_be_desensitized_after_flip_and_crop(splits, name, mode):
    cfg = _config(
        INPUT__TYPE=name, INPUT__RADIUS=RADII[name], INPUT__RE_PROB=0.0, CACHE__MODE=mode,
        INPUT__DESENSITIZE="after",
    )  # fmt: skip
    space = PixelSpace(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)
    desensitize = make_desensitizer(name, RADII[name], seed=1)
    for batch in build_train_loader(cfg, splits, CPU):
        crops = space.denormalize(batch.raw).mul(255).round().to(torch.uint8)
        assert torch.equal(batch.desensitized, space.normalize(desensitize(crops)))


@pytest.mark.parametrize("name", RADII)
def test_an_epoch_is_a_function_of_seed_and_epoch_alone(splits, name):
    cfg = _config(INPUT__TYPE=name, INPUT__RADIUS=RADII[name])
    loader = build_train_loader(cfg, splits, CPU)
    torch.manual_seed(0)
    second, third = _epoch(loader, 2), _epoch(loader, 3)
    torch.manual_seed(1)  # the global generator is not used
    assert _same(_epoch(loader, 2), second)
    assert not _same(second, third)
    resumed = build_train_loader(cfg, splits, CPU)
    assert _same(_epoch(resumed, 3), third)
    other = build_train_loader(_config(SOLVER__SEED=2, INPUT__TYPE=name, INPUT__RADIUS=RADII[name]),
                               splits, CPU)  # fmt: skip
    assert not _same(_epoch(other, 2), second)


@pytest.mark.parametrize("name", RADII)
def test_streamed_images_equal_kept_images(splits, name):
    options = {"INPUT__TYPE": name, "INPUT__RADIUS": RADII[name]}
    memory = build_train_loader(_config(CACHE__MODE="memory", **options), splits, CPU)
    stream = build_train_loader(_config(CACHE__MODE="stream", **options), splits, CPU)
    assert isinstance(memory.source, ResidentPixels)
    assert isinstance(stream.source, StreamedPixels)
    assert _same(_epoch(memory), _epoch(stream))
    both = [
        list(build_eval_loader(_config(CACHE__MODE=mode, **options), splits.query, CPU))
        for mode in ("memory", "stream")
    ]
    for one, two in zip(*both, strict=True):
        assert torch.equal(one.desensitized, two.desensitized)
        assert torch.equal(one.raw, two.raw)


@pytest.mark.parametrize("name", RADII)
def test_the_batches_of_all_ranks_make_the_batch_of_one_process(splits, name):
    cfg = _config(INPUT__TYPE=name, INPUT__RADIUS=RADII[name])
    whole = _epoch(build_train_loader(cfg, splits, CPU), 4)
    ranks = [_epoch(build_train_loader(cfg, splits, CPU, World(rank, 2)), 4) for rank in (0, 1)]
    joined = [
        tuple(torch.cat(fields) for fields in zip(*shares, strict=True))
        for shares in zip(*ranks, strict=True)
    ]
    assert _same(joined, whole)


def test_evaluation_keeps_the_order_and_only_normalises(splits):
    loader = build_eval_loader(_config(), splits.gallery, CPU)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [5, 2]
    assert (len(loader), loader.num_images) == (2, 7)
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(7))
    assert torch.cat([batch.pid for batch in batches]).tolist() == [
        sample.pid for sample in splits.gallery
    ]
    assert (batches[0].label == -1).all()
    cfg = _config()
    space = PixelSpace(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)
    raw = torch.cat([batch.raw for batch in batches])
    assert torch.equal(raw, space.normalize(loader.source.raw))
    assert torch.equal(batches[0].desensitized[:, :, 3, 3], batches[0].raw[:, :, 0, 0])


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_evaluation_batches_of_all_ranks_in_order_are_those_of_one_process(splits, world_size):
    cfg = _config(TEST__IMS_PER_BATCH=2)  # 4 batches of 7 images
    whole = list(build_eval_loader(cfg, splits.gallery, CPU))
    shared = [
        batch
        for rank in range(world_size)
        for batch in build_eval_loader(cfg, splits.gallery, CPU, World(rank, world_size))
    ]
    assert len(shared) == len(whole) == 4
    for one, other in zip(shared, whole, strict=True):
        assert torch.equal(one.raw, other.raw)
        assert torch.equal(one.pid, other.pid)


def test_images_are_streamed_if_the_limit_is_0(splits):
    loader = build_train_loader(_config(CACHE__LIMIT_MIB=0), splits, CPU)
    assert isinstance(loader.source, StreamedPixels)


def test_test_time_noise_does_not_depend_on_batches_or_order(splits):
    options = {"INPUT__TYPE": "noise", "INPUT__RADIUS": 0.5}
    samples = splits.gallery
    first = build_eval_loader(_config(**options), samples, CPU)
    second = build_eval_loader(_config(TEST__IMS_PER_BATCH=2, **options), samples[::-1], CPU)
    one = torch.cat([batch.desensitized for batch in first])
    two = torch.cat([batch.desensitized for batch in second])
    assert torch.equal(one, two.flip(0))
    assert torch.equal(one, torch.cat([batch.desensitized for batch in first]))


def test_loaders_over_the_same_images_share_one_source(splits):
    cfg = _config(INPUT__TYPE="blur", INPUT__RADIUS=3.0)
    train = build_train_loader(cfg, splits, CPU)
    assert build_eval_loader(cfg, splits.train, CPU).source is train.source
    assert build_train_loader(cfg, splits, CPU, World(1, 2)).source is train.source
    assert train.source.desensitized is not None
    assert build_eval_loader(cfg, splits.query, CPU).source is not train.source


def test_images_are_freed_with_their_last_loader(splits):
    before = len(_SOURCES)
    loader = build_eval_loader(_config(INPUT__RADIUS=5.0), splits.query, CPU)
    assert len(_SOURCES) == before + 1
    del loader
    assert len(_SOURCES) == before


@pytest.mark.parametrize("mode", ["memory", "stream"])
def test_damaged_images_are_left_out_of_training_and_evaluation(tmp_path, mode):
    splits = image_splits(tmp_path, [4, 4, 4, 4])
    for index in (1, 6):
        with Path(splits.train[index].path).open("r+b") as file:
            file.truncate(300)
    cfg = _config(CACHE__MODE=mode, CACHE__SKIP_BAD=True)
    used = torch.cat([batch[5] for batch in _epoch(build_train_loader(cfg, splits, CPU))])
    assert not {1, 6} & set(used.tolist())
    loader = build_eval_loader(cfg, splits.train, CPU)
    assert loader.num_images == 14
    assert torch.cat([batch.index for batch in loader]).tolist() == [
        index for index in range(16) if index not in (1, 6)
    ]
    with pytest.raises(UserError, match=splits.train[1].path):
        list(build_eval_loader(_config(CACHE__MODE=mode), splits.train, CPU))


def test_too_few_identities_are_an_error_when_the_loader_is_built(splits):
    with pytest.raises(
        UserError, match="6 identities, but a batch needs 20 .*SOLVER.IMS_PER_BATCH"
    ):
        build_train_loader(_config(SOLVER__IMS_PER_BATCH=40), splits, CPU)


def test_an_empty_list_has_no_batches():
    assert list(build_eval_loader(_config(), (), CPU)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RADII)
@pytest.mark.parametrize("mode", ["device", "memory", "stream"])
def test_batches_on_a_gpu_equal_those_on_a_cpu(splits, name, mode):
    options = {"INPUT__TYPE": name, "INPUT__RADIUS": RADII[name]}
    on_cpu = build_train_loader(_config(**options), splits, CPU)
    on_gpu = build_train_loader(
        _config(CACHE__MODE=mode, **options), splits, torch.device("cuda", 0)
    )
    for one, two in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(two.raw.cpu(), one.raw, rtol=0, atol=1e-6)
        torch.testing.assert_close(two.desensitized.cpu(), one.desensitized, rtol=0, atol=1e-6)
        assert torch.equal(two.index, one.index)
