"""State dicts are loaded by name; a mismatch is named and changes nothing."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from modeling.reid_network import ReIDNetwork
from modeling.weights import load_matching, num_classes_of
from utils.errors import UserError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def state_of_another(seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        key: torch.randn_like(value) if value.is_floating_point() else torch.tensor(7)
        for key, value in network().state_dict().items()
    }


def expect_equal(module: nn.Module, state: dict[str, Tensor]) -> None:
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_everything_is_copied_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    module, state = network(), state_of_another()
    with caplog.at_level(logging.INFO):
        load_matching(module, state, "some.pth")
    expect_equal(module, state)
    assert "some.pth: 7 keys match; missing: none; unexpected: none" in caplog.text


def test_an_old_file_may_lack_batch_counters() -> None:
    module, state = network(), state_of_another()
    del state["1.num_batches_tracked"]
    load_matching(module, state, "old.pth")
    expect_equal(module, state | {"1.num_batches_tracked": torch.tensor(0)})


def test_the_prefix_of_data_parallel_training_is_removed() -> None:
    module, state = network(), state_of_another()
    load_matching(module, {f"module.{key}": value for key, value in state.items()}, "dp.pth")
    expect_equal(module, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None}, r"c\.pth does not fit Sequential: it lacks 0\.weight; build the"),
        ({"2.weight": torch.ones(1)}, r"c\.pth .* the network has no 2\.weight"),
        (
            {"0.weight": torch.ones(3, 5)},
            r"0\.weight has shape \(3, 5\), the network \(3, 2\)",
        ),
    ],
)
def test_a_mismatch_is_named_and_nothing_is_loaded(
    change: dict[str, Tensor | None], message: str
) -> None:
    module = network()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = {k: v for k, v in (state_of_another() | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        load_matching(module, state, "c.pth")
    expect_equal(module, before)


def test_allowed_differences() -> None:
    module, state = network(), state_of_another()
    del state["1.weight"]
    load_matching(
        module, state | {"fc.weight": torch.ones(1)}, "c.pth", may_miss=("1.",), may_ignore=("fc.",)
    )
    assert torch.equal(module[0].weight, state["0.weight"])


def test_a_long_list_is_cut() -> None:
    with pytest.raises(UserError, match=r"it lacks 0\.weight, .* and 2 more"):
        load_matching(network(), {}, "empty.pth")


def test_number_of_classes_comes_from_the_checkpoint() -> None:
    state = ReIDNetwork(17, "resnet18").state_dict()
    assert num_classes_of(state) == 17
    assert num_classes_of({f"module.{key}": value for key, value in state.items()}) == 17
    load_matching(ReIDNetwork(num_classes_of(state), "resnet18"), state, "C.pth")
    shapes = r"classifier.weight has shape \(17, 512\), the network"
    with pytest.raises(UserError, match=shapes) as raised:
        load_matching(ReIDNetwork(16, "resnet18"), state, "C.pth")
    # The data set is wrong, not the architecture.
    assert "identities that it was trained on" in str(raised.value)
    assert "name, widths" not in str(raised.value)


def test_a_state_without_classifier_has_no_number_of_classes() -> None:
    with pytest.raises(UserError, match=r"G\.pth contains no classifier\.weight"):
        num_classes_of(state_of_another(), "G.pth")
