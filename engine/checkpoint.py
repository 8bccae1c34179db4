"""Checkpoints: the native file that a run resumes from, and the official files of each network.

``checkpoint_latest.pth`` contains everything a resume needs, ``checkpoint_best.pth`` the weights of
the best validation. Each is one file, so what is read is never a mixture of two epochs.
``epoch_{latest,best}_net_{G,G_R,C,D1,D2}.pth`` next to them are bare state dicts under the keys of
published checkpoints, for other people's scripts. `RunFolder` and `Launch` use them in OUTPUT_DIR.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.distributed.processes import from_main
from modeling.weights import load_matching, without_prefix
from utils.config_tree import changed_values
from utils.errors import UserError
from utils.files import write_text
from utils.tensor_files import read_tensors, save_tensors

FORMAT = "securereid-checkpoint"
FORMAT_VERSION = 1
NATIVE_NAMES = {"latest": "checkpoint_latest.pth", "best": "checkpoint_best.pth"}


class CheckpointError(UserError):
    """A folder has no usable checkpoint, or one of another program, version or architecture."""


@dataclass(frozen=True)
class LoadedWeights:
    """Weights that were read from a folder."""

    # state dict of each network by its letter: G, G_R, C, D1, D2
    networks: dict[str, dict[str, Tensor]]
    which: str  # ``best`` or ``latest``
    source: str  # the file or files they were read from
    epoch: int  # their epoch; 0 for official files, which do not record it
    # architecture and preprocessing from a native file; empty for official files
    info: dict[str, Any]


def official_path(folder: Path, which: str, letter: str) -> Path:
    """Return the path of one network's official file."""
    return folder / f"epoch_{which}_net_{letter}.pth"


def save_official(folder: Path, which: str, networks: Mapping[str, nn.Module]) -> None:
    """Write the bare state dict of each network, by letter."""
    for letter, network in networks.items():
        save_tensors(network.state_dict(), official_path(folder, which, letter))


def save_native(
    folder: Path,
    which: str,
    networks: Mapping[str, nn.Module],
    epoch: int,
    info: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write the native file ``latest`` or ``best`` with networks by letter to OUTPUT_DIR.

    ``epoch`` is the last finished one, ``info`` is architecture and preprocessing
    (``engine.model.model_info``). ``training`` is everything else that a resume needs; ``latest``
    only.
    """
    states = {letter: network.state_dict() for letter, network in networks.items()}
    more = {} if training is None else {"training": dict(training)}
    _save(folder, which, epoch=epoch, info=dict(info), networks=states, **more)


def save_weights(folder: Path, weights: LoadedWeights) -> Path:
    """Write weights that were read from a folder as the native file of another; return its path."""
    values = {"epoch": weights.epoch, "info": weights.info, "networks": weights.networks}
    return _save(folder, weights.which, **values)


def _save(folder: Path, which: str, **content: Any) -> Path:
    path = folder / NATIVE_NAMES[which]
    save_tensors({"format": FORMAT, "version": FORMAT_VERSION} | content, path)
    return path


def read_native(folder: Path, which: str) -> dict[str, Any]:
    """Return the content of ``checkpoint_{which}.pth`` in a folder.

    Raises:
        TensorFileError: The file is missing or damaged.
        CheckpointError: It is from another program, or has another format version.
    """
    path = folder / NATIVE_NAMES[which]
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a native checkpoint of this project (it contains "
            f"{', '.join(map(str, list(content)[:3]))}, ...)"
        )
    if content.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')}; this program reads "
            f"{FORMAT_VERSION}"
        )
    info, networks = content.get("info"), content.get("networks")
    if not (
        isinstance(content.get("epoch"), int)
        and isinstance(info, dict)
        and isinstance(info.get("architecture", {}), dict)
        and isinstance(networks, dict)
        and all(_is_state(letter, state) for letter, state in networks.items())
        and isinstance(content.get("training", {}), dict)
    ):
        raise CheckpointError(f"{path} is damaged: its epoch, info or networks have a wrong type")
    return content


def _is_state(letter: object, state: object) -> bool:
    return (
        isinstance(letter, str)
        and isinstance(state, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    )


def find_weights(
    folder: Path, needed: tuple[str, ...], *, or_only_reid: bool = False
) -> LoadedWeights:
    """Read the best weights of a folder, or else the latest; native files before official ones.

    The folder is the OUTPUT_DIR of a training, or contains official files. The needed networks, by
    letter, must be in it; with ``or_only_reid``, the re-ID network alone is enough.

    Raises:
        CheckpointError: The folder, a checkpoint or one of the networks is missing.
        TensorFileError: A file is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"'{folder}' is not a folder; expected the OUTPUT_DIR of a training")
    for which in ("best", "latest"):
        if (folder / NATIVE_NAMES[which]).is_file():
            content = read_native(folder, which)
            source = str(folder / NATIVE_NAMES[which])
            networks, epoch, info = content["networks"], content["epoch"], content["info"]
        elif official_path(folder, which, "C").is_file():
            wanted = (*needed, "D1", "D2") if "G" in needed else needed  # for a training
            present = [x for x in wanted if official_path(folder, which, x).is_file()]
            networks = {
                letter: read_tensors(official_path(folder, which, letter)) for letter in present
            }
            for letter, state in networks.items():
                if not _is_state(letter, state):
                    path = official_path(folder, which, letter)
                    raise CheckpointError(f"{path} contains other values than tensors by name")
            source = str(folder / f"epoch_{which}_net_{{{','.join(present)}}}.pth")
            epoch, info = 0, {}
        else:
            continue
        if not (or_only_reid and set(networks) == {"C"}):
            missing = [letter for letter in needed if letter not in networks]
            if missing:
                raise CheckpointError(
                    f"{source} has no network {', '.join(missing)} (it has {', '.join(networks)}); "
                    "a checkpoint of mode C contains only C: evaluate it in mode C"
                )
        return LoadedWeights(networks, which, source, epoch, info)
    raise CheckpointError(
        f"'{folder}' contains no checkpoint; expected {NATIVE_NAMES['best']}, "
        f"{NATIVE_NAMES['latest']} or epoch_{{best,latest}}_net_C.pth"
    )


def training_in(folder: Path) -> Path | None:
    """Return the path of a checkpoint in a folder; None if the folder contains no training."""
    natives = (folder / name for name in NATIVE_NAMES.values())
    official = sorted(folder.glob("epoch_*_net_*.pth"))
    return next((path for path in (*natives, *official) if path.exists()), None)


def load_networks(
    networks: Mapping[str, nn.Module], weights: LoadedWeights, *, leave_out: tuple[str, ...] = ()
) -> None:
    """Copy weights into networks, by letter; log what matches, and raise on any mismatch.

    Networks that the checkpoint lacks and tensors named in ``leave_out`` keep their start values.
    """
    for letter, network in networks.items():
        if letter in weights.networks:
            state = without_prefix(weights.networks[letter])
            state = {name: value for name, value in state.items() if name not in leave_out}
            load_matching(network, state, f"{weights.source} ({letter})", may_miss=leave_out)


def training_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between a training and the checkpoint that it would resume from.

    A training that continued with other images or identities would be neither of the two; learning
    rate and number of epochs may change. What a checkpoint does not record is not compared.
    """
    problems = changed_values(before.get("architecture", {}), now.get("architecture", {}))
    problems += changed_values(_desensitizer(before), _desensitizer(now))
    pids = [info.get("pid_of_label") for info in (before, now)]
    if pids[0] is not None and pids[1] is not None and pids[0] != pids[1]:
        problems.append(
            f"{len(pids[0])} identities of {before.get('dataset')} "
            f"(now {len(pids[1])} others, of {now.get('dataset')})"
        )
    return problems


def _desensitizer(info: Mapping[str, Any]) -> dict[str, Any]:
    values = info.get("desensitizer", {})
    return {f"INPUT.{name.upper()}": value for name, value in values.items()}


@dataclass(eq=False)
class RunFolder:
    """Saves the checkpoints of one training to OUTPUT_DIR, and loads the latest one."""

    path: Path  # OUTPUT_DIR
    networks: Mapping[str, nn.Module]  # all networks by letter
    # architecture and preprocessing (``engine.model.model_info``), for the native files
    info: Mapping[str, Any]
    writes: bool = True  # whether this process saves; in a distributed run only the first one does

    def save_latest(self, epoch: int, training: Mapping[str, Any]) -> None:
        """Save the latest weights: first the native file, which a resume needs."""
        if self.writes:
            save_native(self.path, "latest", self.networks, epoch, self.info, training)
            save_official(self.path, "latest", self.networks)

    def save_best(self, epoch: int, record: Mapping[str, Any]) -> None:
        """Save the weights of the best validation, with its numbers."""
        if self.writes:
            info = {**self.info, "best": dict(record)}
            save_native(self.path, "best", self.networks, epoch, info)
            save_official(self.path, "best", self.networks)

    def load_latest(self) -> tuple[int, dict[str, Any]]:
        """Load the networks; return the epoch and the state that ``save_latest`` was given.

        The first process reads the file and sends it to the others, so only it needs the folder.

        Raises:
            CheckpointError: The file is missing or damaged, has another architecture, or belongs
                to a training on other images or identities.
        """
        path = self.path / NATIVE_NAMES["latest"]
        content = from_main(lambda: self._read(path))
        for letter, network in self.networks.items():
            load_matching(network, content["networks"][letter], f"{path} ({letter})")
        return content["epoch"], content["training"]

    def _read(self, path: Path) -> dict[str, Any]:
        content = read_native(self.path, "latest")
        if set(content["networks"]) != set(self.networks):
            raise CheckpointError(
                f"{path} contains networks {', '.join(content['networks'])}; this training "
                f"has {', '.join(self.networks)}"
            )
        if "training" not in content:
            raise CheckpointError(
                f"{path} contains weights only, so a training cannot continue from it; start a new "
                "one from these weights with MODEL.PRETRAIN_CHOICE self, MODEL.PRETRAIN_DIR "
                f"{self.path} and another OUTPUT_DIR"
            )
        differing = training_differences(content["info"], self.info)
        if differing:
            raise CheckpointError(
                f"{path} was trained with {', '.join(differing)}; give the same values to "
                "continue, or choose another output folder"
            )
        return content


_LAUNCH_NAME = ".torchrun"


@dataclass(frozen=True)
class Launch:
    """One launch of torchrun, whose restarts (``--max-restarts``) resume from the last checkpoint.

    A restart must not resume a training that was in OUTPUT_DIR before, and that the first start
    refused to overwrite. So the first start writes a file once it has accepted the folder, and a
    restart resumes only if the file contains the identifier of its launch.
    """

    path: Path | None  # the file; None if torchrun did not start this process
    resumes: bool  # whether to resume from the last checkpoint although this was not asked for

    @classmethod
    def begin(cls, folder: Path, restarts: int) -> Launch:
        """Return the launch of this process; a first start removes the file of an older launch."""
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if run_id is None:
            return cls(None, resumes=False)
        path = folder / _LAUNCH_NAME
        if not restarts:
            path.unlink(missing_ok=True)
            return cls(path, resumes=False)
        accepted = path.is_file() and path.read_text("utf-8") == run_id
        return cls(path, resumes=accepted and (folder / NATIVE_NAMES["latest"]).is_file())

    def accepted(self) -> None:
        """Record that this launch trains in the folder."""
        if self.path is not None:
            write_text(self.path, os.environ["TORCHELASTIC_RUN_ID"])

    @staticmethod
    def finished(folder: Path) -> None:
        """Remove the file once everything is written: the next launch is another run."""
        (folder / _LAUNCH_NAME).unlink(missing_ok=True)
