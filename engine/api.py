"""The trained networks behind three verbs: anonymize, recover, embed. Images in, images out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from data.images import resize, upright
from engine.checkpoint import LoadedWeights, find_weights, load_networks
from layers.pixels import PixelSpace
from modeling.reid_network import ReIDNetwork
from modeling.unet import UNet
from modeling.weights import num_classes_of
from utils.device import resolve_device, resolve_precision
from utils.errors import UserError, out_of_memory
from utils.precision import exact_convolutions

Pixels = NDArray[np.uint8]
Picture = Image.Image | Pixels
Given = TypeVar("Given", Image.Image, Pixels, list[Image.Image], list[Pixels])

# What official files mean; a native checkpoint says it itself.
PUBLISHED: Mapping[str, Any] = {
    "MODEL.NAME": "resnet50_nl",
    "MODEL.LAST_STRIDE": 1,
    "MODEL.STEM_RELU": False,
    "MODEL.NGF": 64,
    "UNET.NUM_DOWNS": 7,
    "INPUT.IMG_SIZE": (256, 128),
    "INPUT.PIXEL_MEAN": (0.485, 0.456, 0.406),
    "INPUT.PIXEL_STD": (0.5, 0.5, 0.5),
}
_BATCH = 64


def find_joint_weights(folder: str | Path) -> LoadedWeights:
    """Read what an ``Anonymizer`` is made of: the best weights of a folder, or else the latest.

    Raises:
        UserError: The checkpoint is missing, damaged, or of mode C.
    """
    return find_weights(Path(folder), ("G", "G_R", "C"))


class Anonymizer:
    """A trained joint model (mode GCR).

    Pictures are 8-bit RGB: PIL images, or uint8 arrays (H, W, 3), one or a list of them; what comes
    back is of the same kind, at the network's size. The ``..._tensor`` methods keep the networks'
    full precision and are what files are sealed from. In float32 one thread at a time may compute:
    what cuDNN may round is a setting of the whole process.

    Attributes:
        size: Height and width of the networks' images in pixels.
        pixels: Pixel space of the networks' images.
        device: Where the networks are.
    """

    def __init__(
        self,
        anonymizer: nn.Module,
        recovery: nn.Module,
        reid: nn.Module,
        *,
        size: tuple[int, int],
        pixels: PixelSpace,
        device: torch.device,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self._anonymizer, self._recovery, self._reid = (
            network.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            for network in (anonymizer, recovery, reid)
        )
        self.size, self.pixels, self.device = size, pixels, device
        self._precision = precision

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, *, device: str = "auto", precision: str = "auto"
    ) -> Anonymizer:
        """Load the best weights of a folder, or else the latest.

        Args:
            folder: OUTPUT_DIR of a training in mode GCR, or official files of the published size.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            precision: ``auto``, ``float32`` or ``bfloat16``.

        Raises:
            UserError: The checkpoint is missing, damaged, or of mode C, or the device is not there.
        """
        target = resolve_device(device)
        return cls.from_weights(find_joint_weights(folder), target, precision=precision)

    @classmethod
    def from_weights(
        cls, weights: LoadedWeights, device: torch.device, *, precision: str = "auto"
    ) -> Anonymizer:
        """Build the networks that weights were found for, and load them.

        Args:
            weights: As of ``find_joint_weights``.
            device: Where the networks are to be.
            precision: As of ``from_checkpoint``.

        Raises:
            UserError: The weights do not fit the networks they are said to be of.
        """
        made = {**PUBLISHED, **weights.info.get("architecture", {})}
        num_downs, width = made["UNET.NUM_DOWNS"], made["MODEL.NGF"]
        networks: dict[str, nn.Module] = {
            "G": UNet(num_downs, width),
            "G_R": UNet(num_downs, width),
            "C": ReIDNetwork(
                num_classes_of(weights.networks["C"], weights.source),
                made["MODEL.NAME"],
                last_stride=made["MODEL.LAST_STRIDE"],
                stem_relu=made["MODEL.STEM_RELU"],
            ),
        }
        load_networks(networks, weights)
        height, width = made["INPUT.IMG_SIZE"]
        return cls(
            networks["G"],
            networks["G_R"],
            networks["C"],
            size=(int(height), int(width)),
            pixels=PixelSpace(made["INPUT.PIXEL_MEAN"], made["INPUT.PIXEL_STD"]),
            device=device,
            precision=resolve_precision(precision, device),
        )

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks themselves, by verb; they take normalised images (B, 3, H, W)."""
        return {"anonymize": self._anonymizer, "recover": self._recovery, "embed": self._reid}

    def anonymize(self, pictures: Given) -> Given:
        """Return anonymized pictures, rounded to 8-bit RGB."""
        return self._convert(pictures, self.anonymize_tensor)

    def recover(self, pictures: Given) -> Given:
        """Return recovered pictures for anonymized ones."""
        return self._convert(pictures, lambda pixels: self.recover_tensor(self._normalized(pixels)))

    def embed(self, pictures: Picture | Sequence[Picture]) -> NDArray[np.float32]:
        """Return identity embeddings of raw or anonymized pictures, float32 (N, D), unit length.

        The dot product of two is their cosine similarity. One picture gives N = 1.

        Raises:
            UserError: No picture was given, or one is none (see ``resized``).
        """
        given = _listed(pictures)
        if not given:
            raise UserError("no pictures to embed; expected at least one")
        batches = self._batched(given, lambda pixels: self.embed_tensor(self._normalized(pixels)))
        return torch.cat(list(batches)).cpu().numpy()

    @torch.inference_mode()
    def anonymize_tensor(self, pixels: Tensor) -> Tensor:
        """Return anonymized images, float32 (B, 3, H, W) in [-1, 1].

        Args:
            pixels: Raw images at the networks' size, uint8 (B, H, W, 3).
        """
        with self._autocast():
            anonymized: Tensor = self._anonymizer(self._normalized(pixels))
        return anonymized.float()

    @torch.inference_mode()
    def recover_tensor(self, anonymized: Tensor) -> Tensor:
        """Return recovered images for anonymized ones, both float32 (B, 3, H, W)."""
        with self._autocast():
            recovered: Tensor = self._recovery(anonymized.to(self.device))
        return recovered.float()

    @torch.inference_mode()
    def embed_tensor(self, images: Tensor) -> Tensor:
        """Return unit embeddings, float32 (B, D), for normalised images (B, 3, H, W)."""
        with self._autocast():
            embedding: Tensor = self._reid(images.to(self.device)).embedding
        return F.normalize(embedding.float())

    def resized(self, picture: Picture) -> Pixels:
        """Return a picture at the networks' size, uint8 (H, W, 3), resized as in training.

        Raises:
            UserError: It is neither a PIL image of 8 bits nor a uint8 array (H, W, 3).
        """
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise UserError(
                    f"got an array {picture.shape} of {picture.dtype}; expected RGB pixels, uint8 "
                    "(H, W, 3)"
                )
            picture = Image.fromarray(picture)
        if not isinstance(picture, Image.Image):
            raise UserError(
                f"got a {type(picture).__name__}; expected a PIL image or a uint8 array (H, W, 3)"
            )
        if picture.mode.startswith(("I", "F")):  # converted it would be white, or black, all over
            raise UserError(
                f"got a picture of mode {picture.mode}; expected 8 bits a channel, convert it first"
            )
        picture.load()
        picture = upright(picture, "an image given to resized()")
        return resize(picture if picture.mode == "RGB" else picture.convert("RGB"), self.size)

    def to_pixels(self, images: Tensor) -> Pixels:
        """Return uint8 (B, H, W, 3) for normalised images (B, 3, H, W), rounded and clamped."""
        return self.pixels.to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def _convert(self, pictures: Given, step: Callable[[Tensor], Tensor]) -> Given:
        """Run a step on 8-bit batches; return pictures of the kind that was given."""
        given = _listed(pictures)
        done = [p for batch in self._batched(given, step) for p in self.to_pixels(batch)]
        out = [
            Image.fromarray(pixels) if isinstance(picture, Image.Image) else pixels
            for pixels, picture in zip(done, given, strict=True)
        ]
        return out[0] if isinstance(pictures, Image.Image | np.ndarray) else out  # type: ignore[return-value]

    def _batched(
        self, pictures: Sequence[Picture], step: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """Yield what a step makes of uint8 batches (B, H, W, 3); fewer where memory runs out."""
        start, size = 0, _BATCH
        while start < len(pictures):
            batch = [self.resized(picture) for picture in pictures[start : start + size]]
            try:
                done = step(torch.from_numpy(np.stack(batch)))
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or not out_of_memory(error):
                    raise
                size = len(batch) // 2
                continue
            start += len(batch)
            yield done

    def _normalized(self, pixels: Tensor) -> Tensor:
        """Return normalised images (B, 3, H, W) on the device for uint8 (B, H, W, 3)."""
        return self.pixels.normalize(pixels.to(self.device).permute(0, 3, 1, 2))

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """Run the networks in their precision; the caller's settings are left as they were."""
        mixed = self._precision != torch.float32
        exact = contextlib.nullcontext() if mixed else exact_convolutions()
        with exact, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed):
            yield


def _listed(pictures: Picture | Sequence[Picture]) -> Sequence[Any]:
    """Return one picture as a list of one.

    Raises:
        UserError: It is neither a picture nor a list of them.
    """
    if isinstance(pictures, Image.Image | np.ndarray):
        return [pictures]
    if not isinstance(pictures, list | tuple):
        raise UserError(
            f"got a {type(pictures).__name__}; expected a PIL image, a uint8 array (H, W, 3), or a "
            "list of them"
        )
    return pictures
