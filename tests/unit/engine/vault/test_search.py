"""Searching sealed pictures: the order of what is found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from engine.api import Anonymizer
from engine.vault import opening as unsealing
from engine.vault.opening import Unsealed, search


class Echo:
    """Embeds an image as itself."""

    device = torch.device("cpu")

    def embed_tensor(self, images: Tensor) -> Tensor:
        return images


def test_a_picture_that_the_network_fails_on_disorders_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    similarities = [0.1, math.nan, 0.9, 0.5, math.nan, 0.7]

    def pairs(files: Iterable[Unsealed], _: object) -> Iterator[tuple[list[Unsealed], Tensor]]:
        for file, value in zip(files, similarities, strict=True):
            yield [file], torch.tensor([[value]])

    monkeypatch.setattr(unsealing, "in_batches", pairs)
    files = [Unsealed(Path(str(place))) for place in range(6)]
    found, unusable = search(torch.ones(1), files, cast(Anonymizer, Echo()), 3)
    assert [match.file.name for match in found] == ["2", "5", "3"]
    assert not unusable
