"""Loading state dicts by name, saying what matched and refusing what does not.

ImageNet weights for the backbones: found, verified, or fetched; never replaced by chance.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_weight

from utils.errors import UserError
from utils.logger import get_logger
from utils.tensor_files import read_tensors

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
    state = without_prefix(state)
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
    weight = without_prefix(state).get(CLASSIFIER_KEY)
    if weight is None or weight.ndim != 2:
        raise UserError(
            f"{source} holds no {CLASSIFIER_KEY}; expected the state dict of a re-ID network: "
            "point to the file of network C"
        )
    return len(weight)


def without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state dict without the ``module.`` that data-parallel training puts before names."""
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


@dataclass(frozen=True)
class KnownFile:
    """A published file of ImageNet weights.

    Attributes:
        name: File name; the hexadecimal digits in it start the file's SHA-256.
        what: Which weights these are.
        sought: Whether it is looked for by itself, or used only where a path leads to it.
        torchvision: torchvision's name for it, to download by; empty if it has none.
    """

    name: str
    what: str
    sought: bool = True
    torchvision: str = ""

    @property
    def digest_start(self) -> str:
        """Hexadecimal digits that the file's SHA-256 starts with."""
        return Path(self.name).stem.rpartition("-")[2]


@dataclass(frozen=True)
class ImageNetWeights:
    """The ImageNet weights of a backbone.

    Attributes:
        architecture: What it is called, for messages.
        files: Published files, at least one, in the order they are looked for.
        may_miss: Prefixes of what of the backbone the files lack; it keeps its start values.
        may_ignore: Prefixes of what the files hold besides, such as the classifier.
    """

    architecture: str
    files: tuple[KnownFile, ...]
    may_miss: tuple[str, ...] = ()
    may_ignore: tuple[str, ...] = ()


Fetch = Callable[[KnownFile, Path], None]


def load_imagenet_weights(
    backbone: nn.Module,
    weights: ImageNetWeights,
    path: str = "",
    *,
    fetch: Fetch | None = None,
) -> Path:
    """Load ImageNet weights into a backbone.

    Args:
        backbone: Where to.
        weights: Which.
        path: File or folder to look in before the usual places (MODEL.PRETRAIN_PATH), or ''.
        fetch: Downloads a file to a path; torchvision's address with a progress bar if None.

    Returns:
        The file that was loaded.

    Raises:
        UserError: If no file can be had, with every path tried, or one does not fit.
    """
    file, known = find_weights(weights, path, fetch=fetch or _fetch)
    _LOGGER.info("ImageNet weights of %s: %s (%s)", weights.architecture, file, known.what)
    load_matching(
        backbone,
        read_tensors(file),
        file,
        may_miss=weights.may_miss,
        may_ignore=weights.may_ignore,
    )
    return file


def find_weights(weights: ImageNetWeights, path: str, *, fetch: Fetch) -> tuple[Path, KnownFile]:
    """Return the verified weight file of a backbone, downloading it as the last resort.

    Looked in, in this order: ``path``, $TORCH_HOME/hub/checkpoints, ~/.cache/torch/hub/checkpoints,
    ./pretrained.

    Raises:
        UserError: If there is none, with every path tried and what to do; if ``path`` does not
            exist; or if it is a file that is none of the known ones.
    """
    if path and not Path(path).expanduser().exists():
        raise UserError(
            f"MODEL.PRETRAIN_PATH is {path!r}, which does not exist; expected a file or folder "
            "with ImageNet weights: correct it, or leave it empty to search the usual places"
        )
    if path and Path(path).expanduser().is_file():
        return _identified(Path(path).expanduser(), weights.files)
    tried: list[str] = []
    for folder in _folders(path):
        for candidate in weights.files:
            # A folder given by hand may hold an ablation's weights, if nothing else.
            if not candidate.sought and folder != Path(path).expanduser():
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
    folders = [Path(path).expanduser()] if path else []
    folders += [Path(torch_home).expanduser() / "hub" / "checkpoints"] if torch_home else []
    folders += [Path.home() / ".cache" / "torch" / "hub" / "checkpoints", Path("pretrained")]
    return list(dict.fromkeys(folders))


def _identified(file: Path, known: tuple[KnownFile, ...]) -> tuple[Path, KnownFile]:
    """Tell which known weights a file holds, whatever it is called."""
    digest = _sha256(file)
    for candidate in known:
        if digest.startswith(candidate.digest_start):
            return file, candidate
    raise UserError(
        f"MODEL.PRETRAIN_PATH is {str(file)!r}, whose SHA-256 starts with {digest[:8]}; expected "
        f"one of {', '.join(candidate.name for candidate in known)}: the file is damaged, or "
        "belongs to another MODEL.NAME"
    )


def _problem(file: Path, known: KnownFile) -> str | None:
    """Return why a file cannot be used, or None."""
    if not file.is_file():
        return "not there"
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
        if not file.exists():  # a damaged file is reported above and left to its owner
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
        f"{(source or weights.files[0]).name} into one of these folders, point "
        "MODEL.PRETRAIN_PATH to it, or ask for random weights with MODEL.PRETRAIN_CHOICE none"
    )


def _fetch(known: KnownFile, file: Path) -> None:
    """Download from torchvision's address; the file appears only when whole and verified."""
    torch.hub.download_url_to_file(
        get_weight(known.torchvision).url, str(file), hash_prefix=known.digest_start, progress=True
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
