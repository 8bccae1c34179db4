"""Training of attackers' networks: recovery and re-identification.

Both train on public images for a fixed number of updates, and keep the weights with the best score
on held-out public identities. Private images are never used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from data.samplers import IdentitySampler
from engine.attacks.measures import quality
from engine.scoring.features import Features
from engine.scoring.retrieval import score_retrieval
from engine.train_step import Autocast
from layers.pixels import PixelSpace
from modeling.objectives import Objectives, reid_losses, weighted
from modeling.reid_network import ReIDNetwork, ReIDPair
from utils.errors import UserError
from utils.logger import Progress
from utils.seeding import derive_seed, seed_everything, torch_generator


@dataclass(frozen=True)
class TrainingSetup:
    """Device, batch size and length of attackers' trainings."""

    device: torch.device  # device of the networks
    autocast: Autocast  # context that they run in
    pixels: PixelSpace  # pixel space of the images
    batch_size: int  # images per update
    steps: int  # updates of each network; the same for every data budget
    seed: int  # seed of start values and batches

    def pictures(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return the output of an image network as values in [0, 1]."""
        return self.pixels.denormalize(self.run(network, images)).clamp_(0, 1)

    def embeddings(self, network: ReIDNetwork, images: Tensor) -> Tensor:
        """Return embeddings (N, D) of normalised images, float32 on the CPU."""
        return self.run(network, images, network.embed)

    @torch.inference_mode()
    def run(
        self,
        network: nn.Module,
        images: Tensor,
        function: Callable[[Tensor], Tensor] | None = None,
        *,
        title: str = "Embed",
    ) -> Tensor:
        """Return the output of a network, or of its function, for images, float32 on the CPU."""
        was_training = network.training
        network.eval()
        parts = []
        for batch in Progress.over(images.split(self.batch_size), title, unit="batch"):
            with self.autocast():
                parts.append((function or network)(batch.to(self.device)).float().cpu())
        network.train(was_training)
        return torch.cat(parts)


_VALIDATIONS = 8
_WARMUP_SHARE = 0.1
RECOVERY_RATE = 1e-3
REID_RATE = 7e-4
_WEIGHT_DECAY = 5e-4
_INSTANCES = 4


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images of public persons that an attacker does not train on."""

    images: Tensor  # observed images, normalised (N, 3, H, W)
    pids: Tensor  # identities (N,)
    camids: Tensor  # cameras (N,)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network."""

    network: nn.Module  # the network with the weights of the best validation, in evaluation mode
    best_step: int  # number of updates before that validation
    validation: float  # score of that validation: PSNR (dB) of recovery, mAP of re-ID


def train_recovery(
    make_network: Callable[[], nn.Module],
    plain: Tensor,
    raw: Tensor,
    observe: Callable[[Tensor], Tensor],
    validation: tuple[Tensor, Tensor],
    bench: TrainingSetup,
    title: str,
) -> Trained:
    """Train a network that reconstructs raw images from observed protected ones.

    Args:
        make_network: Builds the network.
        plain: Public images before encryption, normalised (N, 3, H, W).
        raw: The raw images of the same samples, normalised.
        observe: Returns plain images as an outsider sees them, under new keys of the attacker.
        validation: Images of held-out public identities, observed and raw, both normalised.
        bench: Device and length of the training.
        title: Title of the progress bar.
    """
    seed_everything(derive_seed(bench.seed, title))
    network = make_network().to(bench.device)
    optimizer = Adam(network.parameters(), lr=RECOVERY_RATE, betas=(0.5, 0.999))
    generator = torch_generator(bench.seed, title, "batches")
    truth = bench.pixels.denormalize(validation[1])

    def update(step: int) -> Tensor:  # noqa: ARG001 - each batch is random
        index = torch.randint(len(plain), (bench.batch_size,), generator=generator)
        flip = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5
        before, target = (
            torch.where(flip, images[index].flip(-1), images[index]) for images in (plain, raw)
        )
        observed, target = observe(before).to(bench.device), target.to(bench.device)
        with bench.autocast():
            output = network(observed)
        return F.l1_loss(output.float(), target)

    def score() -> float:
        return float(quality(truth, bench.pictures(network, validation[0]))[0].mean())

    return _train(network, optimizer, RECOVERY_RATE, update, score, bench, title)


def train_reid(
    network: ReIDNetwork,
    images: Tensor,
    pids: Tensor,
    validation: HeldOut,
    objectives: Objectives,
    bench: TrainingSetup,
    title: str,
    *,
    cross_camera: bool = True,
) -> Trained:
    """Train a re-ID network on normalised images (N, 3, H, W) of identities (N,).

    Its classifier has one class per identity. The progress bar shows the title, which is
    also part of the seed.

    Raises:
        UserError: There are too few identities for a batch.
    """
    identities, labels = torch.unique(pids, return_inverse=True)
    batch = min(bench.batch_size, _INSTANCES * len(identities)) // _INSTANCES * _INSTANCES
    seed = derive_seed(bench.seed, title)
    seed_everything(seed)  # layers that drop features have no generator of their own
    sampler = IdentitySampler(
        pids.tolist(), batch_size=batch, num_instances=_INSTANCES, seed=seed % 2**31
    )
    trainable = [p for p in network.parameters() if p.requires_grad]
    optimizer = Adam(trainable, lr=REID_RATE, weight_decay=_WEIGHT_DECAY)
    generator = torch_generator(seed, "flips")
    plan = lru_cache(1)(sampler.plan)

    def update(step: int) -> Tensor:
        epoch, number = divmod(step, len(sampler))
        index = plan(epoch)[number]
        flip = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5
        chosen = torch.where(flip, images[index].flip(-1), images[index])
        with bench.autocast():
            output = network(chosen.to(bench.device))
            losses = reid_losses(ReIDPair(output, None), labels[index].to(bench.device), objectives)
        return weighted(losses, objectives.weights)

    def score() -> float:
        embeddings = bench.embeddings(network, validation.images)
        return _held_out_map(embeddings, validation, cross_camera=cross_camera)

    return _train(network, optimizer, REID_RATE, update, score, bench, title)


def _train(
    network: nn.Module,
    optimizer: Optimizer,
    rate: float,
    update: Callable[[int], Tensor],
    score: Callable[[], float],
    bench: TrainingSetup,
    title: str,
) -> Trained:
    """Run all updates, and load the weights of the best validation."""
    network.train()
    best, best_score, best_step = copy.deepcopy(network.state_dict()), -math.inf, 0
    checks = {round((i + 1) * bench.steps / _VALIDATIONS) for i in range(_VALIDATIONS)}
    with Progress(bench.steps, title, unit="step") as bar:
        for step in range(bench.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * _factor(step, bench.steps)
            loss = update(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step + 1 in checks:
                current = score()
                network.train()
                if current > best_score:
                    best, best_score = copy.deepcopy(network.state_dict()), current
                    best_step = step + 1
            bar.update()
    if best_step == 0:
        raise UserError(
            f"{title}: the attacker's network had no finite score on any validation; try another "
            "--seed, or RUNTIME.PRECISION float32"
        )
    network.load_state_dict(best)
    return Trained(network.eval(), best_step, best_score)


def _factor(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, then half a cosine."""
    warmup = max(1.0, _WARMUP_SHARE * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))


def _held_out_map(embeddings: Tensor, held_out: HeldOut, *, cross_camera: bool) -> float:
    """Return the mAP with every second image of each identity as query, the others as gallery."""
    order = np.argsort(held_out.pids.numpy(), kind="stable")
    sides = [torch.from_numpy(order[start::2].copy()) for start in (0, 1)]
    query, gallery = (
        Features(embeddings[side], held_out.pids[side], held_out.camids[side]) for side in sides
    )
    scores = score_retrieval(query, gallery, cross_camera=cross_camera)
    return -math.inf if scores.degenerate else scores.mAP
