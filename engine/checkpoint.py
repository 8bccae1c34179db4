"""Whether a checkpoint belongs to the run or the evaluation that reads it.

Checkpoints: one native file that a run continues from, and the official per-network files.

``checkpoint_latest.pth`` holds everything a resume needs, ``checkpoint_best.pth`` the weights of
the best validation; each is one file, so that what is read is never a mixture of two epochs. Beside
them ``epoch_{latest,best}_net_{G,G_R,C,D1,D2}.pth`` are bare state dicts under the keys that
published checkpoints have, for other people's scripts. All are written to a temporary file first
and read with ``weights_only=True``: a checkpoint can be damaged or foreign, but runs no code.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling.weights import load_matching
from utils.errors import UserError
from utils.files import atomic_write


def differences(
    was: Mapping[str, Any], now: Mapping[str, Any], leave_out: Collection[str] = ()
) -> list[str]:
    """Say which values of a checkpoint are others now; what it does not record is left out."""
    return [
        f"{name} {was[name]!r} (now {now[name]!r})"
        for name in now
        if name in was and name not in leave_out and was[name] != now[name]
    ]


def run_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in what a training differs from the one that a checkpoint is of.

    Going on with other images or people would look like one training and be neither; a learning
    rate or a number of epochs may change on the way.

    Args:
        was: What the native checkpoint says of itself (``engine.model.model_info``).
        now: The same of the run that would go on.
    """
    found = differences(was.get("architecture", {}), now.get("architecture", {}))
    found += [
        f"INPUT.{text}" for text in differences(*(_desensitizer(info) for info in (was, now)))
    ]
    before, after = (info.get("pid_of_label") for info in (was, now))
    if before is not None and after is not None and before != after:
        found.append(
            f"{len(before)} identities of {was.get('dataset')} "
            f"(now {len(after)} others, of {now.get('dataset')})"
        )
    return found


def _desensitizer(info: Mapping[str, Any]) -> dict[str, Any]:
    return {name.upper(): value for name, value in info.get("desensitizer", {}).items()}


FORMAT = "securereid-checkpoint"
FORMAT_VERSION = 1
NATIVE_NAMES = {"latest": "checkpoint_latest.pth", "best": "checkpoint_best.pth"}


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, foreign, or of another architecture."""


@dataclass(frozen=True)
class LoadedWeights:
    """Weights found in a folder.

    Attributes:
        networks: State dict of each network by its letter: G, G_R, C, D1, D2.
        which: ``best`` or ``latest``.
        source: The file or files they came from.
        epoch: Their epoch; 0 where official files do not say.
        info: What the native file says of the model (architecture, preprocessing); else empty.
    """

    networks: dict[str, dict[str, Tensor]]
    which: str
    source: str
    epoch: int
    info: dict[str, Any]


def official_path(folder: Path, which: str, letter: str) -> Path:
    """Return the path of one network's official file."""
    return folder / f"epoch_{which}_net_{letter}.pth"


def save_file(content: Mapping[str, Any], path: Path) -> None:
    """Write with ``torch.save`` so that ``path`` is the old file or the new one, never half."""
    with atomic_write(path) as temporary:
        torch.save(dict(content), temporary)


def save_official(folder: Path, which: str, networks: Mapping[str, nn.Module]) -> None:
    """Write the bare state dict of each network, by letter."""
    for letter, network in networks.items():
        save_file(network.state_dict(), official_path(folder, which, letter))


def save_native(
    folder: Path,
    which: str,
    networks: Mapping[str, nn.Module],
    epoch: int,
    info: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write the native file.

    Args:
        folder: OUTPUT_DIR.
        which: ``latest`` or ``best``.
        networks: Networks by letter.
        epoch: Last finished epoch.
        info: Architecture and preprocessing; see ``engine.model.model_info``.
        training: Optimisers, supervision and the rest a resume needs; ``latest`` only.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "epoch": epoch,
        "info": dict(info),
        "networks": {letter: network.state_dict() for letter, network in networks.items()},
    }
    if training is not None:
        content["training"] = dict(training)
    save_file(content, folder / NATIVE_NAMES[which])


def read_file(path: Path) -> dict[str, Any]:
    """Read a checkpoint, onto the CPU, without running anything it contains.

    Raises:
        CheckpointError: If the file is missing, damaged, or holds anything but tensors and plain
            values.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of tensors and plain values, and was not executed "
            f"({_first_line(error)}); it is damaged or from another program"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged ({_first_line(error)}); restore it from a copy, or start again "
            "from another checkpoint"
        ) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"{path} holds a {kind}; expected a state dict or a native file")
    return content


def read_native(folder: Path, which: str) -> dict[str, Any]:
    """Read ``checkpoint_{which}.pth`` of a folder and check that it is one of ours.

    Raises:
        CheckpointError: As of ``read_file``, or it is foreign or of another format version.
    """
    path = folder / NATIVE_NAMES[which]
    content = read_file(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a native checkpoint of this project (it holds "
            f"{', '.join(map(str, list(content)[:3]))}, ...)"
        )
    if content.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')}; this program reads "
            f"{FORMAT_VERSION}"
        )
    return content


def find_weights(folder: Path, needed: tuple[str, ...]) -> LoadedWeights:
    """Read the best weights of a folder, or else the latest; native files before official ones.

    Args:
        folder: MODEL.PRETRAIN_DIR: the OUTPUT_DIR of a training run, or official files.
        needed: Letters of the networks that must be there.

    Raises:
        CheckpointError: If the folder or one of the networks is missing, or a file is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"MODEL.PRETRAIN_DIR '{folder}' is not a folder; expected the OUTPUT_DIR of a training"
        )
    for which in ("best", "latest"):
        if (folder / NATIVE_NAMES[which]).is_file():
            content = read_native(folder, which)
            source = str(folder / NATIVE_NAMES[which])
            networks, epoch, info = content["networks"], content["epoch"], content["info"]
        elif official_path(folder, which, "C").is_file():
            present = [x for x in needed if official_path(folder, which, x).is_file()]
            networks = {
                letter: read_file(official_path(folder, which, letter)) for letter in present
            }
            source = str(folder / f"epoch_{which}_net_{{{','.join(present)}}}.pth")
            epoch, info = 0, {}
        else:
            continue
        _require(networks, needed, source)
        return LoadedWeights(networks, which, source, epoch, info)
    raise CheckpointError(
        f"MODEL.PRETRAIN_DIR '{folder}' holds no checkpoint; expected {NATIVE_NAMES['best']}, "
        f"{NATIVE_NAMES['latest']} or epoch_{{best,latest}}_net_C.pth"
    )


def training_in(folder: Path) -> Path | None:
    """Return a checkpoint of the training that a folder holds, or None where there is none."""
    natives = (folder / name for name in NATIVE_NAMES.values())
    present = (path for path in (*natives, *sorted(folder.glob("epoch_*_net_*.pth"))))
    return next((path for path in present if path.exists()), None)


def load_networks(networks: Mapping[str, nn.Module], weights: LoadedWeights) -> None:
    """Copy weights into networks, by letter; says what matched and fails on any mismatch."""
    for letter, network in networks.items():
        if letter in weights.networks:
            load_matching(network, weights.networks[letter], f"{weights.source} ({letter})")


def _require(networks: Mapping[str, Any], needed: tuple[str, ...], source: str) -> None:
    missing = [letter for letter in needed if letter not in networks]
    if missing:
        raise CheckpointError(
            f"{source} has no network {', '.join(missing)} (it has {', '.join(networks)}); a "
            "checkpoint of MODEL.MODE C holds C only: evaluate it with MODEL.MODE C"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
