"""Decoding: pixels, damaged images, and batches from memory and from workers."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import store
from data.desensitize import Blur
from data.store import ResidentPixels, StreamedPixels, count_workers, decode
from tests.fixtures.images import write_image, write_samples
from utils.errors import UserError

SIZE = (32, 16)


@pytest.fixture
def paths(tmp_path):
    return [sample.path for sample in write_samples(tmp_path, [7, 5])]


@pytest.fixture
def damaged(paths):
    """The same files, the 4th truncated and the 9th an HTML page."""
    with Path(paths[3]).open("r+b") as file:
        file.truncate(700)
    Path(paths[8]).write_bytes(b"<html>not found</html>")
    return paths


def _all(source) -> tuple[torch.Tensor, torch.Tensor | None]:
    plan = torch.arange(12).split(5)
    batches = list(source.batches(plan))
    assert [len(raw) for raw, _ in batches] == [5, 5, 2]
    desensitized = [kept for _, kept in batches if kept is not None]
    return torch.cat([raw for raw, _ in batches]), (
        torch.cat(desensitized) if desensitized else None
    )


def test_images_are_resized_with_pillows_bilinear_filter(tmp_path):
    path = write_image(tmp_path / "a.png", 1)
    expected = np.asarray(Image.open(path).resize((16, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode(path, SIZE), expected.transpose(2, 0, 1))


def test_memory_and_stream_hold_the_same_pixels(paths):
    raw, desensitized = _all(ResidentPixels(paths, SIZE, num_workers=2))
    assert desensitized is None
    np.testing.assert_array_equal(raw.numpy(), np.stack([decode(p, SIZE) for p in paths]))
    for workers in (0, 2):
        assert torch.equal(_all(StreamedPixels(paths, SIZE, num_workers=workers))[0], raw)


def test_memory_and_stream_hold_the_same_desensitized_pixels(paths):
    resident = ResidentPixels(paths, SIZE)
    resident.keep_desensitized(Blur(3.0))
    assert resident.num_bytes == 2 * 12 * 3 * 32 * 16
    raw, desensitized = _all(resident)
    assert torch.equal(desensitized, Blur(3.0)(raw))
    streamed = _all(StreamedPixels(paths, SIZE, num_workers=1, desensitizer=Blur(3.0)))
    assert torch.equal(streamed[0], raw)
    assert torch.equal(streamed[1], desensitized)


def test_batches_follow_the_plan(paths):
    plan = [torch.tensor([4, 4, 0]), torch.tensor([11])]
    whole = ResidentPixels(paths, SIZE).raw
    for source in (ResidentPixels(paths, SIZE), StreamedPixels(paths, SIZE, num_workers=1)):
        for indices, (raw, _) in zip(plan, source.batches(plan), strict=True):
            assert torch.equal(raw, whole[indices])


def test_damaged_images_are_counted_and_named(damaged):
    with pytest.raises(UserError, match="2 of 12 images cannot be decoded") as caught:
        ResidentPixels(damaged, SIZE)
    for part in (damaged[3], damaged[8], "HTML page", "CACHE.SKIP_BAD True"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [ResidentPixels, StreamedPixels])
def test_damaged_images_are_left_out_with_a_warning(damaged, kind, caplog):
    with caplog.at_level(logging.WARNING, logger="reid_baseline"):
        source = kind(damaged, SIZE, skip_bad=True, num_workers=1)
    assert source.usable.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert "2 of 12 images" in caplog.text
    assert damaged[3] in caplog.text
    raw, _ = next(source.batches([source.usable]))
    assert torch.equal(raw[3], torch.from_numpy(decode(damaged[4], SIZE).copy()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_in_a_stream_is_one_line(damaged, workers):
    with pytest.raises(UserError) as caught:
        _all(StreamedPixels(damaged, SIZE, num_workers=workers))
    assert damaged[3] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_many_damaged_images_some_are_named(tmp_path):
    paths = [str(tmp_path / f"missing_{i}.jpg") for i in range(40)]
    with pytest.raises(UserError, match="40 of 40.*and 35 more"):
        ResidentPixels(paths, SIZE)


def test_an_empty_list_is_allowed():
    assert len(ResidentPixels([], SIZE).usable) == 0


def test_number_of_workers():
    assert count_workers(3) == 3
    assert count_workers(0) == 0
    assert 1 <= count_workers(-1) <= 16


def test_streaming_does_not_use_shared_memory(paths, monkeypatch):
    """Containers have a small /dev/shm; a worker that cannot allocate there would never answer."""

    def full(*_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    # Workers inherit the replaced function through fork.
    monkeypatch.setattr(torch.UntypedStorage, "_new_using_fd_cpu", full)
    monkeypatch.setattr(torch.UntypedStorage, "_new_using_filename_cpu", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    raw, desensitized = _all(StreamedPixels(paths, SIZE, num_workers=2, desensitizer=Blur(3.0)))
    assert torch.equal(raw, ResidentPixels(paths, SIZE).raw)
    assert torch.equal(desensitized, Blur(3.0)(raw))


@pytest.mark.filterwarnings("ignore:Exception ignored in.*DataLoaderIter")
def test_a_full_dev_shm_is_one_line_that_names_the_option(paths, monkeypatch):
    """Starting workers needs a few bytes there, for semaphores."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch.multiprocessing, "Queue", full)
    monkeypatch.setattr(multiprocessing.context.BaseContext, "Queue", full)
    with pytest.raises(UserError, match="/dev/shm is full; .*--shm-size"):
        _all(StreamedPixels(paths, SIZE, num_workers=2))


def test_a_killed_worker_is_one_line(paths):
    batches = StreamedPixels(paths, SIZE, num_workers=1).batches([torch.arange(2)] * 50)
    next(batches)
    (worker,) = multiprocessing.active_children()
    with pytest.raises(UserError, match="a worker process died, perhaps because memory ran"):
        os.kill(worker.pid, signal.SIGKILL)
        list(batches)


def test_a_worker_that_never_answers_is_one_line(paths, monkeypatch):
    monkeypatch.setattr(store, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(store, "decode", lambda *_: time.sleep(1))
    with pytest.raises(UserError, match="the workers decoded no image for 0.2 s"):
        list(StreamedPixels(paths, SIZE, num_workers=1).batches([torch.arange(1)]))
