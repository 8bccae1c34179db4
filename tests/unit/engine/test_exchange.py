"""What processes tell each other; with several of them in tests/integration/test_distributed.py."""

from __future__ import annotations

import torch

from engine import exchange


def test_alone_there_is_nothing_to_do() -> None:
    assert exchange.all_gather("mine") == ["mine"]
    assert exchange.broadcast("mine") == "mine"
    assert exchange.from_main(lambda: None) is None
    rows = torch.ones(2, 3)
    assert exchange.gather_rows(rows) is rows
    exchange.barrier()
