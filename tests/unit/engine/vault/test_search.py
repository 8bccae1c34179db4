"""The order of search results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from engine.api import Anonymizer
from engine.vault import opening
from engine.vault.opening import OpenedFile, search


class IdentityModel:
    """Returns images as their own embeddings."""

    device = torch.device("cpu")

    def embed_tensor(self, images: Tensor) -> Tensor:
        return images


def test_an_image_with_a_nan_embedding_is_ranked_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    similarities = [0.1, math.nan, 0.9, 0.5, math.nan, 0.7]

    def pairs(files: Iterable[OpenedFile], _: object) -> Iterator[tuple[list[OpenedFile], Tensor]]:
        for file, value in zip(files, similarities, strict=True):
            yield [file], torch.tensor([[value]])

    monkeypatch.setattr(opening, "_in_batches", pairs)
    files = [OpenedFile(Path(str(index))) for index in range(6)]
    matches, unusable = search(torch.ones(1), files, cast(Anonymizer, IdentityModel()), 3)
    assert [match.file.name for match in matches] == ["2", "5", "3"]
    assert not unusable
