"""What the programs that run attacks share: configuration, options and output folders."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from yacs.config import CfgNode

from configs import loading
from configs.loading import values_of_a_result
from engine.attacks.attack import Settings
from engine.attacks.build import Plan, plan_attacks
from engine.attacks.measures import SETTINGS_NAME
from tools.lib.command_line import whole_number
from utils.errors import UserError
from utils.files import ensure_folder, remove_leftovers


def checkpoint_config(checkpoint: Path, overrides: Sequence[str]) -> tuple[CfgNode, str]:
    """Return the configuration of a training, and the start weights of attackers' networks.

    These are ImageNet weights if the training started from them (MODEL.PRETRAIN_CHOICE), and random
    ones otherwise, because an attacker does not have the owner's weights.

    Raises:
        UserError: The folder contains no training.
    """
    path = checkpoint / "config.yml"
    if not checkpoint.is_dir() or not path.is_file():
        what = "does not exist" if not checkpoint.exists() else "has no config.yml"
        raise UserError(
            f"checkpoint {checkpoint} {what}; expected the OUTPUT_DIR of a training, such as "
            "demo/full"
        )
    weights = ("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(checkpoint))
    cfg = loading.load(path, [*overrides, *weights])
    trained = loading.recorded_values(path)
    given = dict(zip(overrides[::2], overrides[1::2], strict=False))
    choice = given.get("MODEL.PRETRAIN_CHOICE") or trained.get("MODEL.PRETRAIN_CHOICE", "imagenet")
    return cfg, "imagenet" if choice == "imagenet" else "none"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that the numbers of attacks depend on."""
    parser.add_argument(
        "--foreign", type=Path, action="append", default=[], metavar="CARD",
        help="also attack with a third-party re-ID network (ONNX) that a JSON card describes; may "
        "be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=whole_number(16, 10**6), metavar="N",
        help="public images that an attacker trains on (default: all, at most 4096)",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=whole_number(1, 10**4), default=40, metavar="N",
        help="passes over them; smaller budgets of a curve have equally many updates (default: 40)",
    )  # fmt: skip
    parser.add_argument(
        "--people", type=whole_number(6, 10**5), default=100, metavar="N",
        help="maximum number of private identities to score on (default: 100)",
    )  # fmt: skip
    parser.add_argument(
        "--keys", type=whole_number(1, 10**7), default=10_000, metavar="N",
        help="keys that the brute force tries for each image (default: 10000)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=whole_number(0, 2**31 - 1), default=1,
        help="seed of all random choices (default: 1)",
    )  # fmt: skip


def make_plan(cfg: CfgNode, start: str, levels: Sequence[str], args: argparse.Namespace) -> Plan:
    """Plan attacks, and record every value that can change their numbers.

    Raises:
        UserError: As for ``plan_attacks``.
    """
    settings = Settings(
        args.seed, args.budget or 0, args.epochs, args.people, tuple(levels), args.keys, start
    )
    plan = plan_attacks(cfg, settings)
    values = values_of_a_result(cfg)
    del values["MODEL.PRETRAIN_DIR"]  # the weights themselves are recorded
    return replace(plan, record=values | plan.record)


def prepare_output(output: Path) -> Path:
    """Create the folder of a run of attacks, and return it.

    Raises:
        UserError: It contains a training or an evaluation, whose files would be replaced.
    """
    config = output / "config.yml"
    if config.is_file() and not (output / SETTINGS_NAME).is_file():
        raise UserError(
            f"{config} exists, but no {SETTINGS_NAME} of attacks: the folder contains a training "
            "or an evaluation, whose files would be replaced; choose another --output"
        )
    folder = ensure_folder(output)
    remove_leftovers(folder)
    return folder
