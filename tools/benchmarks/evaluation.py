"""Speed of the evaluation pass, compared with a plain float32 pass and with the networks alone.

The pass anonymizes, encrypts, decrypts with every key, embeds, recovers and compares drawn images
with the networks of the configuration file (random weights). The plain pass decodes one image after
the other, runs one network after the other in float32 with contiguous tensors, and copies every
result to the host at once. The networks alone, on one batch, are an upper limit of the speed.

Examples:
    python3 tools/benchmark.py eval --batch 32
    python3 tools/benchmark.py eval --images 512 --json eval.json ISED.SCHEME aead
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from data.desensitize import make_desensitizer
from data.records import DatasetSplits, Sample
from data.store import decode
from engine.evaluation import build_evaluator
from engine.model import build_model
from engine.scoring.image_quality import QualityAccumulator
from modeling.build import CIPHERS, build_cipher
from modeling.encryption.cipher import KeyState, read_sealed
from modeling.privacy_networks import PrivacyNetworks
from tools.benchmarks.data import draw_images
from tools.benchmarks.measuring import Maker, Work, conditions, contest
from tools.benchmarks.step import (
    NUM_CLASSES,
    PLAIN,
    add_network_arguments,
    evaluation_flops,
    network_config,
    random_batch,
)
from tools.lib.command_line import whole_number
from utils.device import resolve_device, resolve_precision, set_threads
from utils.errors import UserError
from utils.memory import keep_freed_memory

_IMAGES = {"cpu": 64, "cuda": 2048}
_SHOTS = 4  # images of each identity, of which the first is the query
_READINGS: tuple[KeyState, ...] = ("right", "wrong", "ciphertext")

Given = tuple[str, tuple[str, ...], str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_network_arguments(parser)
    parser.add_argument(
        "--batch", type=whole_number(0), default=0, help="images; 0: TEST.IMS_PER_BATCH"
    )
    parser.add_argument(
        "--images", type=whole_number(_SHOTS), default=0,
        help="images in a turn (64 on a CPU, 2048 on a GPU)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return the numbers."""
    set_threads(arguments.threads)
    device = resolve_device(arguments.device)
    opts = tuple(arguments.opts)
    if arguments.batch:
        opts += ("TEST.IMS_PER_BATCH", str(arguments.batch))
    given: Given = (arguments.config_file, opts, str(device))
    cfg = network_config(*given)
    if cfg.MODEL.MODE != "GCR":
        raise UserError("MODEL.MODE is C; expected GCR, since the pass of all networks is measured")
    precision = resolve_precision(cfg.RUNTIME.PRECISION, device)
    flops = evaluation_flops(cfg, _embedded(cfg))
    num_images = arguments.images or _IMAGES.get(device.type, _IMAGES["cpu"])
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder), num_images)
        makers: dict[str, Maker] = {
            "plain": (make_plain_pass, (given, folder)),
            "ours": (make_pass, (given, folder)),
            "bare": (make_bare, (given, num_images)),
        }
        outcome = contest(arguments, precision, flops, makers)
    ours, bare = outcome.images_per_s["ours"], outcome.images_per_s["bare"]
    print(
        f"eval: {Path(arguments.config_file).stem}, batch {cfg.TEST.IMS_PER_BATCH}, "
        f"{cfg.ISED.SCHEME}, {flops / 1e9:.1f} GFLOP an image, "
        f"{conditions(precision, device)}\n{outcome}\n"
        f"  bare networks     {bare:12,.2f}   the pass has {100 * ours / bare:.0f} % of their speed"
    )
    return outcome.numbers


def make_pass(given: Given, folder: str) -> Work:
    """Build this project's evaluation; one turn is its pass over all images."""
    keep_freed_memory()
    cfg = network_config(*given)
    model = build_model(cfg, NUM_CLASSES)
    query, gallery = _sides(folder)
    splits = DatasetSplits("benchmark", query=query, gallery=gallery)
    evaluator = build_evaluator(cfg, model, splits, "test", build_cipher(cfg), {})

    def work() -> int:
        evaluator.extract()
        return len(query) + len(gallery)

    return work


def make_bare(given: Given, num_images: int) -> Work:
    """Build the networks of the pass alone, on one batch in memory."""
    keep_freed_memory()
    cfg = network_config(*given)
    model = build_model(cfg, NUM_CLASSES)
    nets = model.nets.eval()
    assert isinstance(nets, PrivacyNetworks)
    size = min(num_images, cfg.TEST.IMS_PER_BATCH)
    raw = random_batch(cfg, size, model.device).raw
    embedded = _embedded(cfg)

    @torch.inference_mode()
    def work() -> int:
        for _ in range(-(-num_images // size)):
            with model.autocast():
                anonymized = nets.anonymizer(raw)
                nets.recovery(anonymized)
                for _ in range(embedded):
                    nets.reid.embed(anonymized)
        return -(-num_images // size) * size

    return work


def make_plain_pass(given: Given, folder: str) -> Work:
    """Build the same evaluation as a plain loop in float32."""
    config_file, opts, device = given
    cfg = network_config(config_file, (*opts, *PLAIN), device)
    model = build_model(cfg, NUM_CLASSES)
    nets = model.nets.eval()
    assert isinstance(nets, PrivacyNetworks)
    cipher, batch = build_cipher(cfg), cfg.TEST.IMS_PER_BATCH
    desensitizer = make_desensitizer(cfg.INPUT.TYPE, cfg.INPUT.RADIUS)
    samples = [sample for side in _sides(folder) for sample in side]

    @torch.no_grad()
    def work() -> int:
        quality: dict[str, QualityAccumulator] = {}
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            arrays = [decode(sample.path, tuple(cfg.INPUT.IMG_SIZE)) for sample in part]
            pixels = torch.from_numpy(np.stack(arrays))
            raw, blurred = (
                model.pixels.normalize(images.to(model.device))
                for images in (pixels, desensitizer(pixels))
            )
            kinds = {"desensitized": blurred, "anonymized": nets.anonymizer(raw)}
            sealed = cipher.seal(kinds["anonymized"], [sample.subject for sample in part])
            opened = {state: read_sealed(cipher, sealed, state).images for state in _READINGS}
            kinds |= {"encrypted": opened["ciphertext"], "decrypted": opened["right"]}
            kinds["recovered"] = nets.recovery(opened["right"])
            for images in (raw, kinds["anonymized"], *opened.values()):
                nets.reid(images).embedding.cpu()
            for kind, images in kinds.items():
                accumulator = quality.setdefault(kind, QualityAccumulator())
                accumulator.update(model.pixels.denormalize(raw), model.pixels.denormalize(images))
        for accumulator in quality.values():
            accumulator.result()
        return len(samples)

    return work


def _embedded(cfg: CfgNode) -> int:
    """Return how often each image is embedded.

    Once raw, once anonymized, and once for each key state. A secure scheme rejects wrong keys, so
    that a wrong key gives the same image as no key.
    """
    return 4 if CIPHERS[cfg.ISED.SCHEME].secure else 5


def _sides(folder: str) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Return the drawn images as query and gallery of identities under two cameras."""
    samples = []
    for index, path in enumerate(sorted(Path(folder).iterdir())):
        pid, shot = divmod(index, _SHOTS)
        samples.append(Sample(str(path), pid, int(shot > 0), f"benchmark/test/{pid}"))
    query = tuple(sample for sample in samples if not sample.camid)
    return query, tuple(sample for sample in samples if sample.camid)
