"""Attacks with third-party re-ID networks: ONNX files that were trained elsewhere.

A card (JSON) describes the network's input. The *adapted* variant adds a linear discriminant that
is fitted on public images as stored. It takes a minute and is much stronger.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engine.attacks.attack import UNTRAINED, Attack, AttackContext, Outcome, percent
from engine.attacks.linkage import search_measures, search_sentence
from engine.attacks.measures import Measure
from engine.export import start_session
from utils.errors import UserError, first_line, optional_package
from utils.logger import Progress

PREFIX = "foreign-"
_KEYS = (
    "file", "source", "licence", "height", "width", "channels", "range", "mean", "scale", "batch",
)  # fmt: skip
_BATCH = 32  # of networks that take any number of images

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Card:
    """The description of a third-party network.

    The input is ((pixels * range / 255) - mean) / scale, (B, 3, height, width) in the given channel
    order.
    """

    path: Path  # the ONNX file; its name in the card is relative to the card
    source: str
    licence: str
    height: int  # input size in pixels
    width: int
    channels: str  # ``RGB`` or ``BGR``
    range: float  # largest pixel value before mean and scale: 1 or 255
    mean: tuple[float, ...]  # for each channel, in the order of ``channels``
    scale: tuple[float, ...]
    batch: int | None  # fixed number of images for each call; None for any number


def read_card(path: Path) -> Card:
    """Read a card.

    Raises:
        UserError: The card is missing, a key is missing, or a value is not allowed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"card {path} cannot be read ({error.strerror}); give another") from None
    except ValueError as error:
        raise UserError(f"card {path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"card {path} is not a JSON object; expected the keys {', '.join(_KEYS)}")
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise UserError(
            f"card {path} has no {' and no '.join(missing)}; expected the keys {', '.join(_KEYS)}"
        )

    def check(key: str, is_allowed: bool, allowed: str) -> None:
        if not is_allowed:
            raise UserError(f"card {path}: {key} is {content[key]!r}; expected {allowed}")

    for key in ("height", "width"):
        check(key, _is_count(content[key]), "a number of pixels of at least 1")
    check("channels", content["channels"] in ("RGB", "BGR"), "RGB or BGR")
    check("range", content["range"] in (1, 255), "1 or 255")
    for key in ("mean", "scale"):
        values = content[key]
        is_list = isinstance(values, list) and len(values) == 3
        is_list = is_list and all(isinstance(v, (int, float)) for v in values)
        check(key, is_list and (key == "mean" or 0 not in values), "three numbers, no scale of 0")
    batch = content["batch"]
    check("batch", batch is None or _is_count(batch), "a number of images, or null for any number")
    values = {key: content[key] for key in _KEYS if key != "file"}
    for key in ("mean", "scale"):
        values[key] = tuple(map(float, values[key]))
    return Card(path.parent / str(content["file"]), **values)


class ForeignNetwork:
    """A third-party network, run by onnxruntime on the CPU.

    Raises:
        UserError: The file is missing or is not what the card describes.
    """

    def __init__(self, card: Card) -> None:
        runtime = optional_package("onnxruntime", "--foreign", "python3 -m pip install onnxruntime")
        self.card = card
        try:
            content = card.path.read_bytes()
        except OSError as error:
            raise UserError(
                f"network {card.path} cannot be read ({error.strerror}); the file in a card is "
                "relative to the card's folder"
            ) from None
        values = {name: value for name, value in asdict(card).items() if name != "path"}
        # of the ONNX file and of the card's values, on which the results depend
        self.sha256 = sha256(content + json.dumps(values).encode()).hexdigest()
        try:
            self._session = start_session(runtime, content)
        except Exception as error:  # the runtime's errors have no common base class
            raise UserError(
                f"onnxruntime cannot load {card.path} ({first_line(error)}); expected an ONNX file"
            ) from error
        self._check_input()
        self._check_output()

    def embed(self, images: list[NDArray[np.uint8]] | Tensor, title: str = "") -> Tensor:
        """Return the embeddings of images, float32 (N, D).

        Args:
            images: RGB, each uint8 (H, W, 3), or uint8 (N, 3, H, W). Other sizes than the
                network's are resized with Pillow's bilinear filter.
            title: Title of the progress bar.
        """
        parts, size = [], self.card.batch or _BATCH
        with Progress(len(images), title or "Embed") as bar:
            for start in range(0, len(images), size):
                batch = images[start : start + size]
                if isinstance(batch, Tensor):
                    batch = list(batch.permute(0, 2, 3, 1).cpu().numpy())
                inputs = np.stack([self._input(image) for image in batch])
                if self.card.batch:  # fill up the last batch
                    inputs = np.concatenate([inputs, inputs[:1].repeat(size - len(batch), 0)])
                (output,) = self._run(inputs)
                parts.append(output.reshape(len(inputs), -1)[: len(batch)].astype(np.float32))
                bar.update(len(batch))
        return torch.from_numpy(np.concatenate(parts))

    def _input(self, image: NDArray[np.uint8]) -> Floats:
        card = self.card
        if image.shape[:2] != (card.height, card.width):
            size = (card.width, card.height)
            resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
            image = np.asarray(resized)
        values = image.astype(np.float32) * np.float32(card.range / 255)
        if card.channels == "BGR":
            values = values[:, :, ::-1]
        values = (values - np.array(card.mean, np.float32)) / np.array(card.scale, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def _run(self, inputs: Floats) -> list[Floats]:
        """Return all outputs of the network."""
        outputs: list[Floats] = self._session.run(
            None, {self._session.get_inputs()[0].name: inputs}
        )
        return outputs

    def _check_input(self) -> None:
        card, inputs = self.card, self._session.get_inputs()
        shape = list(inputs[0].shape)
        if len(inputs) != 1 or len(shape) != 4 or inputs[0].type != "tensor(float)":
            raise UserError(
                f"{card.path} takes {len(inputs)} inputs, the first of {inputs[0].type} with shape "
                f"{shape}; expected one batch of float images (N, 3, height, width)"
            )
        expected = [3, card.height, card.width]
        given = [have if isinstance(have, int) else want
                 for have, want in zip(shape[1:], expected, strict=True)]  # fmt: skip
        if given != expected:
            raise UserError(
                f"{card.path} takes images of shape {given}, but its card describes {expected} "
                "(channels, height, width); correct height and width in the card"
            )
        if isinstance(shape[0], int) and shape[0] != card.batch:
            raise UserError(
                f"{card.path} takes batches of exactly {shape[0]}, but batch is "
                f"{json.dumps(card.batch)} in its card; set it to {shape[0]}"
            )

    def _check_output(self) -> None:
        count = self.card.batch or 2
        inputs = np.zeros((count, 3, self.card.height, self.card.width), np.float32)
        try:
            outputs = self._run(inputs)
        except Exception as error:  # see above
            raise UserError(
                f"onnxruntime cannot run {self.card.path} on {count} images "
                f"({first_line(error)}); if the network takes a fixed number of images, set batch "
                "in its card"
            ) from error
        shapes = [np.shape(output) for output in outputs]
        is_vector = len(shapes) == 1 and shapes[0][:1] == (count,) and len(shapes[0]) >= 2
        if not is_vector or set(shapes[0][2:]) - {1}:
            raise UserError(
                f"{self.card.path} returns {' and '.join(map(str, shapes))} for {count} images; "
                f"expected one vector for each image, ({count}, D)"
            )


_RIDGE = 0.01  # share of the mean variance that is added to each direction


@dataclass(frozen=True, eq=False)
class Discriminant:
    """A linear discriminant of identities, in whose space embeddings are compared by cosine.

    Its directions v solve B v = w W v, with B and W the covariance between and within identities.
    In the space of v, variance within identities is 1 and between them w. Each direction is
    multiplied by w / (1 + w), which gives the expected position of the identity of an image
    (Ioffe, "Probabilistic Linear Discriminant Analysis", ECCV 2006).
    """

    mean: Tensor  # mean of the fitted embeddings (D,)
    projection: Tensor  # the scaled directions as columns (D, D)

    @classmethod
    def fit(cls, embeddings: Tensor, pids: Tensor) -> Discriminant:
        """Fit it on embeddings (N, D) of public images with identities (N,).

        Embeddings are L2-normalised first. A hundredth of the mean variance within identities is
        added to each direction, so that few images suffice.
        """
        unit = torch.nn.functional.normalize(embeddings.double())
        identities, index = torch.unique(pids, return_inverse=True)
        counts = torch.bincount(index).double()[:, None]
        means = torch.zeros(len(identities), unit.shape[1], dtype=torch.float64)
        means = means.index_add_(0, index, unit) / counts
        within = torch.cov((unit - means[index]).T, correction=0)
        between = torch.cov(means[index].T, correction=0)
        ridge = _RIDGE * within.diagonal().mean().clamp_min(1e-12)
        within += ridge * torch.eye(len(within), dtype=torch.float64)
        ratio, directions = scipy.linalg.eigh(between.numpy(), within.numpy())
        ratio = np.maximum(ratio, 0.0)
        return cls(unit.mean(0), torch.from_numpy(directions * (ratio / (1 + ratio))))

    def apply(self, embeddings: Tensor) -> Tensor:
        """Return projected embeddings, float32 (N, D)."""
        unit = torch.nn.functional.normalize(embeddings.double())
        return ((unit - self.mean) @ self.projection).float()


class ForeignReID(Attack):
    """Searches with a third-party network, unchanged or adapted to the stored images.

    An adapted one has a linear discriminant that is fitted on the public images as stored.
    """

    def __init__(self, network: ForeignNetwork, name: str, *, adapted: bool) -> None:
        self._network, self._adapted = network, adapted
        self.name = f"{PREFIX}{name}{'-adapted' * adapted}"
        self.question = "Does a network that was trained elsewhere find identities?"
        if adapted:
            self.question = (
                "Does it find identities after a linear discriminant was fitted on public images?"
            )
        self.sha256 = network.sha256

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored = self._embed(context, context.stored(level).observed)
        raw = self._embed(context, context.plain("private", "raw"))
        discriminant = None
        if self._adapted:
            public = self._embed(context, context.imitated("public", level).observed)
            discriminant = Discriminant.fit(public, context.public.pids)
        measures = _measures(context, stored, None if level == "raw" else raw, discriminant)
        if level == "anonymized":
            images = context.bench.run(context.recovery, context.stored(level).observed)
            recovered = self._embed(context, images)
            if discriminant is not None:
                images = context.bench.run(context.recovery, context.plain("public", level))
                discriminant = Discriminant.fit(self._embed(context, images), context.public.pids)
            # The owner's recovery network is not available to an attacker.
            measures += tuple(
                replace(measure, name=f"recovered_{measure.name}", decides=False)
                for measure in _measures(context, recovered, raw, discriminant)
            )
        card = self._network.card
        return context.outcome(
            self,
            level,
            self._sentence({measure.name: measure for measure in measures}, level),
            measures=measures,
            details={"source": card.source, "licence": card.licence, "sha256": self.sha256},
            **({} if self._adapted else UNTRAINED),
        )

    def _embed(self, context: AttackContext, images: Tensor) -> Tensor:
        """Return embeddings of normalised images, rounded to 8 bits as in a file."""
        pixels = context.bench.pixels.to_uint8(images)
        return self._network.embed(pixels, self.name)

    def _sentence(self, measures: dict[str, Measure], level: str) -> str:
        subject = "A network trained elsewhere"
        if self._adapted:
            subject += ", adapted to public images of this level,"
        text = search_sentence(subject, measures, level)
        if "to_raw_rank1" in measures:
            text += f"; among raw images in {percent(measures['to_raw_rank1'])}"
        if "recovered_rank1" in measures:
            text += (
                f"; among images recovered by the owner's network in "
                f"{percent(measures['recovered_rank1'])}"
            )
        return text + "."


def foreign_attacks(cards: list[Path]) -> list[ForeignReID]:
    """Return two attacks for each card: the network unchanged, and adapted.

    Raises:
        UserError: A card or network cannot be used, or two attacks have the same name.
    """
    attacks: dict[str, ForeignReID] = {}
    for card in cards:
        network = ForeignNetwork(read_card(card))
        for adapted in (False, True):
            attack = ForeignReID(network, card.stem, adapted=adapted)
            if attack.name in attacks:
                raise UserError(
                    f"two cards give an attack {attack.name!r}; expected different file names"
                )
            attacks[attack.name] = attack
    return list(attacks.values())


def _measures(
    context: AttackContext, stored: Tensor, raw: Tensor | None, discriminant: Discriminant | None
) -> tuple[Measure, ...]:
    """Return the scores of stored images in stored and, if given, in raw images."""
    if discriminant is not None:
        stored = discriminant.apply(stored)
        raw = None if raw is None else discriminant.apply(raw)
    return search_measures(context, stored, raw)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
