"""The Python interface to trained networks: anonymize, recover and embed images."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
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
from engine.checkpoint import LoadedWeights, find_weights
from engine.model import networks_of, recorded_config
from layers.pixels import PixelSpace
from modeling.privacy_networks import PrivacyNetworks
from utils.device import exact_convolutions, resolve_device, resolve_precision
from utils.errors import UserError, out_of_memory

Pixels = NDArray[np.uint8]
ImageLike = Image.Image | Pixels
Images = TypeVar("Images", Image.Image, Pixels, list[Image.Image], list[Pixels])

_BATCH = 64


def find_joint_weights(folder: str | Path) -> LoadedWeights:
    """Read the weights that ``Anonymizer`` needs: the best ones of a folder, or else the latest.

    Raises:
        UserError: The checkpoint is missing, damaged, or of mode C.
    """
    return find_weights(Path(folder), ("G", "G_R", "C"))


class Anonymizer:
    """A trained joint model (mode GCR).

    Images are 8-bit RGB: PIL images or uint8 arrays (H, W, 3), one or a list of them. Results have
    the same type, at the networks' size. The ``..._tensor`` methods keep the networks' full
    precision; `protect` seals their results. In float32 only one thread at a time may compute,
    because cuDNN's rounding is a setting of the whole process.

    ``size`` is the height and width of the networks' images (px), ``pixels`` their pixel space.
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
            UserError: The checkpoint is missing, damaged, or of mode C, or there is no such device.
        """
        target = resolve_device(device)
        return cls.from_weights(find_joint_weights(folder), target, precision=precision)

    @classmethod
    def from_weights(
        cls, weights: LoadedWeights, device: torch.device, *, precision: str = "auto"
    ) -> Anonymizer:
        """Build the networks of a checkpoint and load its weights from ``find_joint_weights``.

        Raises:
            UserError: The weights do not fit the architecture that the checkpoint records.
        """
        recorded = recorded_config(weights)
        nets = networks_of(weights)
        if not isinstance(nets, PrivacyNetworks):
            raise UserError(f"{weights.source} has no anonymizer; expected a training in mode GCR")
        height, width = recorded.INPUT.IMG_SIZE
        return cls(
            nets.anonymizer,
            nets.recovery,
            nets.reid,
            size=(int(height), int(width)),
            pixels=PixelSpace(recorded.INPUT.PIXEL_MEAN, recorded.INPUT.PIXEL_STD),
            device=device,
            precision=resolve_precision(precision, device),
        )

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by verb; they take normalised images (B, 3, H, W)."""
        return {"anonymize": self._anonymizer, "recover": self._recovery, "embed": self._reid}

    @functools.cached_property
    def embedding_digest(self) -> bytes:
        """SHA-256 of what embeddings depend on: weights of the re-ID network, size, pixel space."""
        digest = hashlib.sha256(repr((self.size, self.pixels)).encode())
        for name, value in sorted(self._reid.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.digest()

    def anonymize(self, images: Images) -> Images:
        """Return anonymized images, rounded to 8-bit RGB."""
        return self._convert(images, self.anonymize_tensor)

    def recover(self, images: Images) -> Images:
        """Return recovered images for anonymized ones."""
        return self._convert(images, lambda pixels: self.recover_tensor(self._normalized(pixels)))

    def embed(self, images: ImageLike | Sequence[ImageLike]) -> NDArray[np.float32]:
        """Return identity embeddings of raw or anonymized images, float32 (N, D), unit length.

        The dot product of two is their cosine similarity. One image gives N = 1.

        Raises:
            UserError: The list is empty, or an argument is not an image (see ``resized``).
        """
        images = _listed(images)
        if not images:
            raise UserError("no images to embed; expected at least one")
        batches = self._batched(images, lambda pixels: self.embed_tensor(self._normalized(pixels)))
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

    def resized(self, image: ImageLike) -> Pixels:
        """Return an image at the networks' size, uint8 (H, W, 3), resized as in training.

        Raises:
            UserError: It is neither a PIL image of 8 bits nor a uint8 array (H, W, 3).
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise UserError(
                    f"got an array {image.shape} of {image.dtype}; expected RGB pixels, uint8 "
                    "(H, W, 3)"
                )
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise UserError(
                f"got a {type(image).__name__}; expected a PIL image or a uint8 array (H, W, 3)"
            )
        if image.mode.startswith(("I", "F")):  # converted, it would be all white or all black
            raise UserError(
                f"got an image of mode {image.mode}; expected 8 bits a channel, convert it first"
            )
        image.load()
        image = upright(image, "an image given to resized()")
        return resize(image if image.mode == "RGB" else image.convert("RGB"), self.size)

    def to_pixels(self, images: Tensor) -> Pixels:
        """Return uint8 (B, H, W, 3) for normalised images (B, 3, H, W), rounded and clamped."""
        return self.pixels.to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def _convert(self, images: Images, step: Callable[[Tensor], Tensor]) -> Images:
        """Run a step on 8-bit batches; return images of the same type as the given ones."""
        listed = _listed(images)
        results = [pixels for out in self._batched(listed, step) for pixels in self.to_pixels(out)]
        converted = [
            Image.fromarray(pixels) if isinstance(image, Image.Image) else pixels
            for pixels, image in zip(results, listed, strict=True)
        ]
        return converted[0] if isinstance(images, Image.Image | np.ndarray) else converted  # type: ignore[return-value]

    def _batched(
        self, images: Sequence[ImageLike], step: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """Yield a step's result for uint8 batches (B, H, W, 3); smaller ones if memory runs out."""
        start, size = 0, _BATCH
        while start < len(images):
            batch = [self.resized(image) for image in images[start : start + size]]
            try:
                result = step(torch.from_numpy(np.stack(batch)))
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or not out_of_memory(error):
                    raise
                size = len(batch) // 2
                continue
            start += len(batch)
            yield result

    def _normalized(self, pixels: Tensor) -> Tensor:
        """Return normalised images (B, 3, H, W) on the device for uint8 (B, H, W, 3)."""
        return self.pixels.normalize(pixels.to(self.device).permute(0, 3, 1, 2))

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """Return the context of the networks' precision; torch's settings are restored."""
        mixed = self._precision != torch.float32
        exact = contextlib.nullcontext() if mixed else exact_convolutions()
        with exact, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed):
            yield


def _listed(images: ImageLike | Sequence[ImageLike]) -> Sequence[Any]:
    """Return a single image as a list of one."""
    if isinstance(images, Image.Image | np.ndarray):
        return [images]
    if not isinstance(images, list | tuple):
        raise UserError(
            f"got a {type(images).__name__}; expected a PIL image, a uint8 array (H, W, 3), or a "
            "list of them"
        )
    return images
