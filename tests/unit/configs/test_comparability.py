from __future__ import annotations

import json

import pytest

from configs import loading
from configs.defaults import KEYS
from configs.loading import OF_A_RESULT, OF_A_TRAINING, differing, values_of_a_result

PLACES_AND_SPEED = {
    "MODEL.DEVICE", "MODEL.DEVICE_ID", "DATASETS.ROOT_DIR", "OUTPUT_DIR", "DATALOADER.NUM_WORKERS",
    "CACHE.MODE", "CACHE.LIMIT_MIB", "TEST.IMS_PER_BATCH", "RUNTIME.CHANNELS_LAST",
    "RUNTIME.COMPILE", "RUNTIME.CUDNN_BENCHMARK", "RUNTIME.THREADS", "SOLVER.GRAD_CHECKPOINT",
    "SOLVER.RESUME", "SOLVER.LOG_PERIOD", "SOLVER.CHECKPOINT_PERIOD", "EVAL.REPORT",
    "EVAL.IMAGES", "RUNTIME.TRACKERS",
}  # fmt: skip


def test_every_key_changes_numbers_or_is_named() -> None:
    assert {key.name for key in KEYS} - set(OF_A_RESULT) == PLACES_AND_SPEED


def test_keys_of_an_evaluation_do_not_change_a_training() -> None:
    left = set(OF_A_RESULT) - set(OF_A_TRAINING)
    assert left and all(name.startswith(("TEST.", "EVAL.", "ISED.")) for name in left)
    assert "TEST.CROSS_CAMERA" in OF_A_TRAINING


def test_values_are_plain_json() -> None:
    values = values_of_a_result(loading.load())
    assert values["MODEL.VAL_R1"] == "inf" and values["INPUT.IMG_SIZE"] == [256, 128]
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert set(values) == set(OF_A_RESULT)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("SOLVER.SEED", "2"), ["SOLVER.SEED 1 (now 2)"]),
        (("MODEL.DEVICE", "cpu", "RUNTIME.THREADS", "3"), []),
        (("ISED.SCHEME", "aead"), ["ISED.SCHEME additive (now aead)"]),
        # Weights are compared by file name, and ROOT_DIR only for paths relative to it.
        (("MODEL.PRETRAIN_PATH", "w/resnet50-0676ba61.pth"), []),
        (("MODEL.PRETRAIN_PATH", "w/a.pth"), ["MODEL.PRETRAIN_PATH  (now w/a.pth)"]),
        (("DATASETS.ROOT_DIR", "elsewhere"), []),
    ],
)
def test_differing_values_are_named(given: tuple[str, ...], words: list[str]) -> None:
    assert differing(loading.load(), loading.load(None, given)) == words


def test_other_keys_are_not_compared() -> None:
    assert not differing(loading.load(), loading.load(None, ("ISED.SCHEME", "aead")), OF_A_TRAINING)


def test_the_folder_of_own_data_is_compared() -> None:
    own = ("DATASETS.NAMES", "folder:mine", "DATASETS.ROOT_DIR")
    words = differing(loading.load(None, (*own, "a")), loading.load(None, (*own, "b")))
    assert words == ["DATASETS.ROOT_DIR a (now b)"]
