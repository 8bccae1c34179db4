"""Load state dicts by name, and find, verify or download ImageNet weights of backbones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import expanded
from utils.logger import get_logger
from utils.memory import MAX_IDENTITIES
from utils.tensor_files import read_tensors

_LOGGER = get_logger()

LISTED = 4  # names of a long list in a message
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
    """Copy a state dict into a module; names and shapes must agree.

    Logs how many keys match and which are missing or unexpected. Names that begin with ``may_miss``
    and batch norm's batch counter may be missing in the state; those that begin with ``may_ignore``
    are ignored. The prefix ``module.`` of data-parallel training is removed. If anything disagrees,
    the module is not changed. The source is the file of the state, for messages.

    Raises:
        UserError: A name is missing or unexpected, or a shape differs; names the file, the key and
            both shapes.
    """
    state = without_prefix(state)
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shared = [key for key in own if key in state]
    _LOGGER.info(
        "%s: %d keys match; missing: %s; unexpected: %s",
        source, len(shared), _listing(missing), _listing(unexpected),
    )  # fmt: skip
    problems = [
        f"{key} has shape {tuple(state[key].shape)}, the network {tuple(own[key].shape)}"
        for key in shared
        if state[key].shape != own[key].shape
    ]
    lacking = [k for k in missing if not (k.endswith(COUNTER) or k.startswith(may_miss))]
    foreign = [key for key in unexpected if not key.startswith(may_ignore)]
    if lacking:
        problems.append(f"it lacks {_listing(lacking)}")
    if foreign:
        problems.append(f"the network has no {_listing(foreign)}")
    if problems:
        # If only the number of classes differs, the data set is wrong, not the architecture.
        other_identities = len(problems) == 1 and problems[0].startswith(CLASSIFIER_KEY)
        remedy = (
            "use the identities that it was trained on"
            if other_identities and state[CLASSIFIER_KEY].shape[1:] == own[CLASSIFIER_KEY].shape[1:]
            else "build the network with the name, widths and down-samplings of its training"
        )
        raise UserError(
            f"{source} does not fit {type(module).__name__}: {_listing(problems, '; ')}; {remedy}"
        )
    module.load_state_dict({key: state[key] for key in shared}, strict=False)


def num_classes_of(state: Mapping[str, Tensor], source: str | Path = "the re-ID checkpoint") -> int:
    """Return the number of classes N that a re-ID network's state dict was trained with.

    Build the network with this number before loading. With a validation split, a data set has
    fewer training identities than in total.

    Raises:
        UserError: The state dict has no classifier weight (N, D).
    """
    weight = without_prefix(state).get(CLASSIFIER_KEY)
    if weight is None or weight.ndim != 2:
        raise UserError(
            f"{source} contains no {CLASSIFIER_KEY}; expected the state dict of a re-ID network: "
            "give the file of network C"
        )
    if len(weight) > MAX_IDENTITIES:
        raise UserError(
            f"{source} has {len(weight)} classes; expected at most {MAX_IDENTITIES} identities"
        )
    return len(weight)


def without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state dict without the ``module.`` that data-parallel training puts before names."""
    prefix = "module."
    if state and all(key.startswith(prefix) for key in state):
        return {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _listing(names: list[str], separator: str = ", ") -> str:
    """Join names; of a long list, the first few."""
    if not names:
        return "none"
    text = separator.join(names[:LISTED])
    return text if len(names) <= LISTED else f"{text}{separator}and {len(names) - LISTED} more"


@dataclass(frozen=True)
class KnownFile:
    """A published file of ImageNet weights."""

    name: str  # file name, with the first hexadecimal digits of the file's SHA-256
    what: str  # description of the weights
    sought: bool = True  # whether it is searched for; otherwise it is used only if a path is given
    torchvision: str = ""  # torchvision's name of the weights, for the download; '' if it has none

    @property
    def digest_start(self) -> str:
        """First eight hexadecimal digits of the file's SHA-256, all that torchvision publishes.

        They find damaged files. They do not exclude a forged file: 2^32 attempts find another file
        with the same digits. The log contains the complete digest, for comparison.
        """
        return Path(self.name).stem.rpartition("-")[2]


@dataclass(frozen=True)
class ImageNetWeights:
    """The ImageNet weights of a backbone."""

    architecture: str  # name, for messages
    files: tuple[KnownFile, ...]  # published files, at least one, in the order of the search
    # prefixes of the backbone's parameters that the files lack; they stay unchanged
    may_miss: tuple[str, ...] = ()
    # prefixes of further parameters in the files, such as the classifier
    may_ignore: tuple[str, ...] = ()


Fetch = Callable[[KnownFile, Path], None]


def load_imagenet_weights(
    backbone: nn.Module, weights: ImageNetWeights, path: str = "", *, fetch: Fetch | None = None
) -> Path:
    """Load ImageNet weights into a backbone; return the file that was loaded.

    The path is a file, or a folder that is searched before the usual folders; '' for none.
    ``fetch`` downloads a file to a path; by default from torchvision's URL, with a progress bar.

    Raises:
        UserError: There is no file (names every path that was tried), or it does not fit.
    """
    file, known = find_weights(weights, path, fetch=fetch or _fetch)
    _LOGGER.info(
        "ImageNet weights of %s: %s (%s, SHA-256 %s)",
        weights.architecture, file, known.what, _sha256(file),
    )  # fmt: skip
    load_matching(
        backbone, read_tensors(file), file, may_miss=weights.may_miss, may_ignore=weights.may_ignore
    )
    return file


def find_weights(weights: ImageNetWeights, path: str, *, fetch: Fetch) -> tuple[Path, KnownFile]:
    """Return the verified weight file of a backbone; download it if it is in no folder.

    Folders in the order of the search: ``path``, $TORCH_HOME/hub/checkpoints,
    ~/.cache/torch/hub/checkpoints, ./pretrained.

    Raises:
        UserError: There is no file (names every path that was tried), ``path`` does not exist, or
            is not one of the known files.
    """
    given = expanded(path)
    if path and not given.exists():
        raise UserError(
            f"the path {path!r} does not exist; expected a file or folder with ImageNet weights: "
            "correct it, or leave it empty to search the usual folders"
        )
    if path and given.is_file():
        return _identified(given, weights.files)
    tried: list[str] = []
    for folder in _folders(path):
        for candidate in weights.files:
            # Weights of an ablation are used only from a folder that the user names.
            if not candidate.sought and folder != given:
                continue
            file = folder / candidate.name
            problem = _problem(file, candidate)
            if problem is None:
                return file, candidate
            tried.append(f"{file} ({problem})")
    return _downloaded(weights, tried, fetch)


def _folders(path: str) -> list[Path]:
    """Return the folders to search, each once."""
    torch_home = os.environ.get("TORCH_HOME", "")
    folders = [expanded(path)] if path else []
    folders += [expanded(torch_home) / "hub" / "checkpoints"] if torch_home else []
    folders += [Path.home() / ".cache" / "torch" / "hub" / "checkpoints", Path("pretrained")]
    return list(dict.fromkeys(folders))


def _identified(file: Path, known: tuple[KnownFile, ...]) -> tuple[Path, KnownFile]:
    """Return the known weights in a file of any name, by its SHA-256."""
    digest = _sha256(file)
    for candidate in known:
        if digest.startswith(candidate.digest_start):
            return file, candidate
    raise UserError(
        f"the SHA-256 of {str(file)!r} starts with {digest[:8]}; expected one of "
        f"{', '.join(candidate.name for candidate in known)}: the file is damaged, or belongs to "
        "another backbone"
    )


def _problem(file: Path, known: KnownFile) -> str | None:
    """Return why a file cannot be used; None if it can."""
    if not file.is_file():
        return "does not exist"
    try:
        digest = _sha256(file)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if digest.startswith(known.digest_start):
        return None
    return f"damaged: its SHA-256 starts with {digest[:8]}; delete it"


def _downloaded(weights: ImageNetWeights, tried: list[str], fetch: Fetch) -> tuple[Path, KnownFile]:
    source = next((known for known in weights.files if known.torchvision), None)
    if source is not None:
        file = Path(torch.hub.get_dir()) / "checkpoints" / source.name
        if not file.exists():  # a damaged file is reported above and not deleted
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                fetch(source, file)
            except (OSError, RuntimeError) as error:  # no network; torch.hub's wrong checksum
                tried.append(f"download to {file} ({error})")
            else:
                problem = _problem(file, source)
                if problem is None:
                    return file, source
                tried.append(f"download to {file} ({problem})")
    raise UserError(
        f"no ImageNet weights for {weights.architecture}; tried {'; '.join(tried)}: put "
        f"{(source or weights.files[0]).name} into one of these folders, give its path, or start "
        "from random weights (MODEL.PRETRAIN_CHOICE none)"
    )


def _fetch(known: KnownFile, file: Path) -> None:
    """Download from torchvision's URL; the file appears when it is complete and verified."""
    from torchvision.models import get_weight  # noqa: PLC0415 - takes seconds

    torch.hub.download_url_to_file(
        get_weight(known.torchvision).url, str(file), hash_prefix=known.digest_start, progress=True
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
