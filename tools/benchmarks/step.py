"""Speed of a training step, compared with a plain float32 loop on the same networks.

Both train the networks of the configuration file on one batch of random images. They run in turns,
in separate processes; the best turn of each counts.

The plain loop uses float32, contiguous tensors, torch's Adam with its defaults and the system's
allocator, and copies the losses to the host at every step.

Examples:
    python3 tools/benchmark.py step --batch 16
    python3 tools/benchmark.py step --config_file configs/demo.yml --batch 40 --json step.json
    python3 tools/benchmark.py step --profile log/profile RUNTIME.COMPILE on
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, Adam, Optimizer
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from configs.loading import load
from data.records import Batch
from engine.build import build_step
from engine.model import Model, build_model, compile_model
from engine.supervision import Supervision, UpgradePolicy
from engine.train_step import TrainStep
from modeling.build import build_networks, build_objectives
from modeling.objectives import discriminator_losses, generator_losses, reid_losses, weighted
from modeling.privacy_networks import PrivacyNetworks, frozen
from modeling.reid_network import PUBLISHED_PIXELS
from solver.optimizers import build_optimizers
from tools.benchmarks.measuring import Work, add_measuring_arguments, conditions, contest
from tools.lib.command_line import whole_number
from utils.config_tree import changed
from utils.device import resolve_device, resolve_precision, set_threads
from utils.memory import keep_freed_memory

PLAIN = (
    "RUNTIME.PRECISION", "float32", "RUNTIME.CHANNELS_LAST", "False", "RUNTIME.COMPILE", "off",
)  # fmt: skip
_STEPS = {"cuda": 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_network_arguments(parser)
    parser.add_argument(
        "--batch", type=whole_number(0), default=0, help="images; 0: SOLVER.IMS_PER_BATCH"
    )
    parser.add_argument(
        "--steps", type=whole_number(1), default=0, help="steps in a turn (1 on a CPU, 20 on a GPU)"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="DIR",
        help="instead of measuring, write a trace and the table of the top kernels here",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return the numbers."""
    set_threads(arguments.threads)
    device = resolve_device(arguments.device)
    given = (arguments.config_file, tuple(arguments.opts), str(device))
    cfg = network_config(*given)
    batch = arguments.batch or cfg.SOLVER.IMS_PER_BATCH
    if arguments.profile is not None:
        profile_step(given, batch, arguments.profile)
        return {}
    precision = resolve_precision(cfg.RUNTIME.PRECISION, device)
    # A GPU computes asynchronously: a single step would measure its latency.
    steps = arguments.steps or _STEPS.get(device.type, 1)
    flops, work = step_flops(cfg), (given, batch, steps)
    makers = {"plain": (make_plain_step, work), "ours": (make_step, work)}
    outcome = contest(arguments, precision, flops, makers)
    print(
        f"step: {Path(arguments.config_file).stem}, batch {batch}, {flops / 1e9:.1f} GFLOP an "
        f"image, {conditions(precision, device)}\n{outcome}"
    )
    return outcome.numbers


def make_step(given: tuple[str, tuple[str, ...], str], count: int, steps: int) -> Work:
    """Build this project's training step, as ``engine.build`` does."""
    keep_freed_memory()
    cfg = network_config(*given)
    model = build_model(cfg, NUM_CLASSES)
    compile_model(cfg, model)
    torch.backends.cudnn.benchmark = cfg.RUNTIME.CUDNN_BENCHMARK
    step = _step_of(cfg, model)
    batch = random_batch(cfg, count, model.device)
    model.nets.train()

    def work() -> int:
        for _ in range(steps):
            step(batch)
        return steps * count

    return work


def _step_of(cfg: CfgNode, model: Model) -> TrainStep:
    objectives = build_objectives(cfg, NUM_CLASSES, model.nets.reid.feature_size)
    if objectives.centers is not None:
        objectives.centers.to(model.device)
    optimizers = build_optimizers(cfg, model.nets.official_networks, objectives.centers)
    return build_step(model, objectives, optimizers, Supervision(UpgradePolicy()))


def make_plain_step(given: tuple[str, tuple[str, ...], str], count: int, steps: int) -> Work:
    """Build the same networks in float32 with a plain loop."""
    config_file, opts, device = given
    cfg = network_config(config_file, (*opts, *PLAIN), device)
    model = build_model(cfg, NUM_CLASSES)
    nets = model.nets.train()
    objectives = build_objectives(cfg, NUM_CLASSES, nets.reid.feature_size)
    discriminators = list(nets.discriminators)
    others = [network for network in nets.children() if network not in discriminators]
    decay = cfg.SOLVER.WEIGHT_DECAY
    first: list[Optimizer] = [Adam(n.parameters(), weight_decay=decay) for n in discriminators]
    second: list[Optimizer] = [Adam(n.parameters(), weight_decay=decay) for n in others]
    if objectives.centers is not None:
        centers = objectives.centers.to(model.device)
        second.append(SGD(centers.parameters(), lr=cfg.SOLVER.CENTER_LR))
    batch = random_batch(cfg, count, model.device)

    def step() -> dict[str, float]:
        judged, losses = {}, {}
        out = nets(batch.raw, batch.desensitized)
        if isinstance(nets, PrivacyNetworks):
            judged = discriminator_losses(nets, batch.raw, batch.desensitized, out, objectives)
            _minimise(weighted(judged), first)
            with frozen(*discriminators):
                losses = generator_losses(nets, batch.raw, batch.desensitized, out, objectives)
        losses |= reid_losses(out, batch.label, objectives)
        _minimise(weighted(losses, objectives.weights), second)
        return {name: loss.item() for name, loss in (judged | losses).items()}

    def work() -> int:
        for _ in range(steps):
            step()
        return steps * count

    return work


def _minimise(total: torch.Tensor, optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    total.backward()
    for optimizer in optimizers:
        optimizer.step()


def profile_step(given: tuple[str, tuple[str, ...], str], count: int, folder: Path) -> None:
    """Write ``trace.json`` (for chrome://tracing or Perfetto) and ``kernels.txt`` of one step."""
    folder.mkdir(parents=True, exist_ok=True)
    work = make_step(given, count, 1)
    work()
    work()
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.device(given[2]).type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(folder / "trace.json"))
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
    (folder / "kernels.txt").write_text(table + "\n", encoding="utf-8")
    print(table)
    print(f"The trace is {folder / 'trace.json'}, the table kernels.txt in the same folder")


NUM_CLASSES = 751  # training identities of Market-1501


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all benchmarks of networks."""
    parser.add_argument(
        "--config_file", default="configs/AGW_baseline.yml", help="configuration (AGW_baseline.yml)"
    )
    add_measuring_arguments(parser)
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="keys of the configuration that override it"
    )


def network_config(config_file: str, opts: Sequence[str], device: str) -> CfgNode:
    """Return a configuration with random start weights."""
    fixed = ("MODEL.PRETRAIN_CHOICE", "none", "MODEL.DEVICE", device)
    return load(config_file, [*opts, *fixed])


def random_batch(cfg: CfgNode, count: int, device: torch.device) -> Batch:
    """Return a batch of random images with the identities of a P x K batch."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, *cfg.INPUT.IMG_SIZE)
    raw, other = (torch.rand(shape, generator=generator).mul_(2).sub_(1) for _ in range(2))
    index = torch.arange(count)
    label = (index // cfg.DATALOADER.NUM_INSTANCE).to(device)
    return Batch(raw.to(device), other.to(device), label, label, label, index)


def step_flops(cfg: CfgNode, count: int = 8) -> float:
    """Return the floating-point operations of one training image: convolutions and products.

    Torch counts them on tensors without values; a multiplication and an addition are two. The
    recomputation of SOLVER.GRAD_CHECKPOINT is not counted.
    """
    cfg = changed(cfg, {"SOLVER.GRAD_CHECKPOINT": False})
    with torch.device("meta"):
        nets = build_networks(cfg, NUM_CLASSES).train()
        images, label = torch.empty(count, 3, *cfg.INPUT.IMG_SIZE), torch.empty(count).long()
        model = Model(nets, images.device, torch.float32, PUBLISHED_PIXELS)
        step = _step_of(cfg, model)
    # Not on the meta device, since Adam reads its step counts.
    with FlopCounterMode(display=False) as counter:
        step(Batch(images, images, label, label, label, label))
    return counter.get_total_flops() / count


def evaluation_flops(cfg: CfgNode, num_embedded: int, count: int = 2) -> float:
    """Return the floating-point operations of one image in an evaluation pass."""
    with torch.device("meta"), torch.inference_mode():
        nets = build_networks(cfg, NUM_CLASSES).eval()
        raw = torch.empty(count, 3, *cfg.INPUT.IMG_SIZE)
        with FlopCounterMode(display=False) as counter:
            for _ in range(num_embedded):
                nets.reid.embed(raw)
            if isinstance(nets, PrivacyNetworks):
                nets.recovery(nets.anonymizer(raw))
    return counter.get_total_flops() / count
