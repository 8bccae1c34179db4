"""Small replacements for files of published weights."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import resnet18

from modeling.backbones.resnet import RESNET18_WEIGHTS
from modeling.weights import ImageNetWeights, KnownFile


class FakeWeights:
    """Three files of ResNet-18 weights whose names bear their own checksums."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # One number expanded: as many keys and shapes as the real thing, a few kilobytes.
        self.state: dict[str, Tensor] = {
            key: torch.tensor(3, dtype=value.dtype).expand(value.shape)
            for key, value in _shapes().items()
        }
        self.content = {what: self._bytes(what, {}) for what in ("V1", "old", "V2")}

    @property
    def known(self) -> dict[str, KnownFile]:
        return {
            what: KnownFile(
                f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth",
                what,
                sought=what != "V2",
                torchvision="the V1 address" if what == "V1" else "",
            )
            for what, content in self.content.items()
        }

    @property
    def weights(self) -> ImageNetWeights:
        """Those of a ResNet-18, with these files in place of the published ones."""
        return replace(RESNET18_WEIGHTS, files=tuple(self.known.values()))

    def remake(self, what: str, change: dict[str, Tensor | None]) -> None:
        """Change some keys of a file (None removes one), before it is put anywhere."""
        self.content[what] = self._bytes(what, change)

    def put(self, what: str, folder: str) -> Path:
        """Write a file into a folder under the root."""
        file = self.root / folder / self.known[what].name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.content[what])
        return file

    def _bytes(self, what: str, change: dict[str, Tensor | None]) -> bytes:
        state = {k: v for k, v in {**self.state, **change}.items() if v is not None}
        if what != "V1":  # three different files
            state["fc.bias"] = torch.tensor({"old": 1.0, "V2": 2.0}[what]).expand(1000)
        stream = io.BytesIO()
        torch.save(state, stream)
        return stream.getvalue()


@cache
def _shapes() -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(resnet18().state_dict())
