"""Loading state dicts by name, saying what matched and refusing what does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from utils.errors import UserError
from utils.logger import get_logger

_LOGGER = get_logger()

LISTED = 4  # names of a long list that a message shows
CLASSIFIER_KEY = "classifier.weight"
COUNTER = "num_batches_tracked"  # batch norm's counter: absent before PyTorch 0.4.1, and unused


def load_matching(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    *,
    may_miss: tuple[str, ...] = (),
    may_ignore: tuple[str, ...] = (),
) -> None:
    """Copy a state dict into a module; names and shapes have to agree.

    Logs how many keys matched and which are missing or unexpected. Batch norm's batch counter may
    be missing. A ``module.`` that data-parallel training put before every name is taken off. The
    module is left untouched where anything disagrees.

    Args:
        module: Where to.
        state: Tensors by name.
        source: File the state came from, for messages.
        may_miss: Prefixes of names the state need not have.
        may_ignore: Prefixes of names of the state to leave aside.

    Raises:
        UserError: If a name is missing or unexpected, or a shape differs; it says which, with the
            file and both shapes.
    """
    state = _without_prefix(state)
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shared = [key for key in own if key in state]
    tolerated = [key for key in missing if key.endswith(COUNTER) or key.startswith(may_miss)]
    ignored = [key for key in unexpected if key.startswith(may_ignore)]
    _LOGGER.info(
        "%s: %d keys match; missing: %s; unexpected: %s",
        source,
        len(shared),
        _listing(missing),
        _listing(unexpected),
    )
    problems = [
        f"{key} has shape {tuple(state[key].shape)}, the network {tuple(own[key].shape)}"
        for key in shared
        if state[key].shape != own[key].shape
    ]
    lacking = [key for key in missing if key not in tolerated]
    foreign = [key for key in unexpected if key not in ignored]
    if lacking:
        problems.append(f"it lacks {_listing(lacking)}")
    if foreign:
        problems.append(f"the network has no {_listing(foreign)}")
    if problems:
        # Where only the number of classes differs, the architecture is right and the data is not.
        other_people = len(problems) == 1 and problems[0].startswith(CLASSIFIER_KEY)
        remedy = (
            "train on the identities it was trained on"
            if other_people and state[CLASSIFIER_KEY].shape[1:] == own[CLASSIFIER_KEY].shape[1:]
            else "use the MODEL.NAME, MODEL.NGF, MODEL.NDF and UNET.NUM_DOWNS it was trained with"
        )
        raise UserError(
            f"{source} does not fit {type(module).__name__}: {_listing(problems, '; ')}; {remedy}"
        )
    module.load_state_dict({key: state[key] for key in shared}, strict=False)


def num_classes_of(state: Mapping[str, Tensor], source: str | Path = "the re-ID checkpoint") -> int:
    """Return the number of classes N that a re-ID network's state dict was trained with.

    Build the network with it before loading: the validation split of a data set leaves fewer
    training identities than the data set has.

    Raises:
        UserError: If the state dict has no classifier weight (N, D).
    """
    weight = _without_prefix(state).get(CLASSIFIER_KEY)
    if weight is None or weight.ndim != 2:
        raise UserError(
            f"{source} holds no {CLASSIFIER_KEY}; expected the state dict of a re-ID network: "
            "point to the file of network C"
        )
    return len(weight)


def _without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    prefix = "module."
    if state and all(key.startswith(prefix) for key in state):
        return {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _listing(names: list[str], separator: str = ", ") -> str:
    """Join names, the first few of a long list."""
    if not names:
        return "none"
    text = separator.join(names[:LISTED])
    return text if len(names) <= LISTED else f"{text}{separator}and {len(names) - LISTED} more"
