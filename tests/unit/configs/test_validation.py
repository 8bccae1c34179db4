from __future__ import annotations

import pytest

from configs.loading import load
from configs.validation import ConfigError
from utils.errors import UserError

BAD = [
    (["MODEL.NAM", "x"], "MODEL.NAM is not a key of the configuration; did you mean MODEL.NAME?"),
    (["model.name", "x"], "did you mean MODEL.NAME?"),
    (["DATASETS.NAME", "x"], "did you mean DATASETS.NAMES?"),
    (["SOLVER.SEED", "3", "--config_file", "x.yml"], "option --config_file is after a key"),
    (["--config_file=x.yml", "SOLVER.SEED", "3"], "option --config_file is after a key"),
    (["MAX_EPOCHS", "3"], "did you mean SOLVER.MAX_EPOCHS?"),
    (["INPUT.SEED", "3"], "did you mean SOLVER.SEED or SYNTHETIC.SEED?"),
    (["QQQ.QQQ", "3"], "QQQ.QQQ is not a key of the configuration; expected a key of"),
    (["MODEL", "3"], "MODEL is a section, not a key; expected one of MODEL.CENTER_LOSS"),
    (["INPUT.TYPE", "mosiac"], "INPUT.TYPE is 'mosiac'; expected one of blur, mosaic, noise"),
    (["MODEL.MODE"], "override 'MODEL.MODE' has no value; expected KEY VALUE pairs"),
    (["MODEL.MODE=C"], "expected KEY VALUE: MODEL.MODE 'C'"),
    (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu'; expected auto, cpu, cuda or cuda:N"),
    (["MODEL.DEVICE", "cuda:"], "MODEL.DEVICE is 'cuda:'"),
    (["MODEL.DEVICE_ID", "0,1"], "MODEL.DEVICE_ID is '0,1'; expected the number of one GPU"),
    (["MODEL.DEVICE", "cuda:1", "MODEL.DEVICE_ID", "2"], "expected one of the two to name the GPU"),
    (["MODEL.VAL_R1", "75"], "MODEL.VAL_R1 is '75'; expected a number from 0 to 1, or inf"),
    (["MODEL.VAL_R1", "90x"], "or inf, or a share of raw->raw rank-1 such as 0.9x"),
    (["MODEL.TEACHER_EMA", "1"], "MODEL.TEACHER_EMA is '1'; expected a number from 0 to 0.999999"),
    (["LOSS.ALIGNMENT", "-1"], "LOSS.ALIGNMENT is '-1'; expected a number from 0 to 1,000,000,000"),
    (["LOSS.ALIGNMENT", "1", "MODEL.OUTPUT_MODE", "origin"],
     "LOSS.ALIGNMENT is 1 with MODEL.OUTPUT_MODE origin; expected both or joined"),
    (["MODEL.OUTPUT_MODE", "none", "MODEL.VAL_R1", "0.5"],
     "MODEL.VAL_R1 is 0.5 with MODEL.OUTPUT_MODE none; expected inf"),
    (["MODEL.OUTPUT_MODE", "none", "MODEL.MODE", "C"],
     "MODEL.OUTPUT_MODE is none with MODEL.MODE C, which trains no network; expected"),
    (["INPUT.IMG_SIZE", "(250, 128)"], "has height 250; expected a multiple of 128"),
    (["INPUT.IMG_SIZE", "(256, 64)"], "has width 64; expected a multiple of 128"),
    (["UNET.NUM_DOWNS", "4"], "UNET.NUM_DOWNS is '4'; expected a whole number from 5 to 10"),
    (["INPUT.RADIUS", "0"], "INPUT.RADIUS is '0'; expected a number above 0"),
    (["INPUT.RADIUS", "0.5"], "expected a whole number of pixels, 2 or more"),
    (["INPUT.RADIUS", "1"], "2 or more (INPUT.RADIUS)"),
    (["INPUT.TYPE", "noise"], "expected a standard deviation"),
    (["INPUT.PADDING", "128"], "INPUT.PADDING is 128; expected less than the image's shorter side"),
    (["SOLVER.IMS_PER_BATCH", "81"], "SOLVER.IMS_PER_BATCH is 81; expected a multiple"),
    (["SOLVER.IMS_PER_BATCH", "4"], "at least 2 identities, such as 8"),
    (["SOLVER.STEPS", "[80, 40]"], "SOLVER.STEPS is [80, 40]; expected epochs in increasing order"),
    (["SOLVER.STEPS", "[40, 40]"], "each once"),
    (["MODEL.PRETRAIN_CHOICE", "self"], "expected the folder of the checkpoint"),
    (["MODEL.PRETRAIN_DIR", "./x"], "would not be read; expected MODEL.PRETRAIN_CHOICE self"),
    (["TEST.EVALUATE_ONLY", "on"], "TEST.EVALUATE_ONLY is on without a checkpoint"),
    (["LOSS.TRIPLET_NORMALIZED", "True", "MODEL.WEIGHT_REGULARIZED_TRIPLET", "off"],
     "the batch-hard loss has no normalised form"),
    (["OUTPUT_DIR", " "], "OUTPUT_DIR is ' '; expected a path"),
    (["DATASETS.NAMES", "('a', 'b')"], "expected the name of one data set"),
    (["INPUT.PIXEL_STD", "(0.5, 0, 0.5)"], "each a number above 0 and at most 10"),
    # Sizes that would allocate all memory.
    (["UNET.NUM_DOWNS", "1000000000"], "expected a whole number from 5 to 10"),
    (["INPUT.IMG_SIZE", "[1000000000, 128]"], "each a whole number from 16 to 4,096"),
    (["MODEL.NGF", "100000"], "expected a whole number from 1 to 1,024"),
    (["MODEL.NDF", "0x" + "f" * 5000], "expected a whole number from 1 to 1,024"),
    (["SOLVER.IMS_PER_BATCH", "10000000000"], "expected a whole number from 1 to 65,536"),
    (["SOLVER.STEPS", str(list(range(1, 1002)))], "SOLVER.STEPS is '[1, 2, 3,"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[" ".join(b[0])[:60] for b in BAD])
def test_a_mistake_is_one_sentence_with_the_remedy(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    assert len(caught.value.problems) == 1
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


GOOD = [
    ["MODEL.MODE", "C", "MODEL.VAL_R1", "0.5"],  # a baseline from a file with upgradation
    ["MODEL.MODE", "C", "INPUT.IMG_SIZE", "(250, 100)"],
    ["INPUT.TYPE", "noise", "INPUT.RADIUS", "0.5"],
    ["INPUT.TYPE", "blur", "INPUT.RADIUS", "1.5"],
    ["TEST.EVALUATE_ONLY", "on", "SOLVER.RESUME", "True"],
    ["TEST.EVALUATE_ONLY", "on", "MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", "x"],
    ["TEST.EVALUATE_ONLY", "on", "MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", "x",
     "MODEL.MODE", "C", "MODEL.VAL_R1", "0.5"],
    ["MODEL.DEVICE", "cuda:1"],
    ["MODEL.DEVICE", "cuda:1", "MODEL.DEVICE_ID", "1"],
    ["UNET.NUM_DOWNS", "5", "INPUT.IMG_SIZE", "(64, 32)"],
    ["SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", GOOD, ids=" ".join)
def test_allowed_combinations(overrides: list[str]) -> None:
    load(None, overrides)


def test_all_problems_are_reported_together() -> None:
    overrides = [item for bad, _ in BAD[:1] + BAD[6:7] + BAD[22:23] for item in bad]
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    assert len(caught.value.problems) == 3
    assert str(caught.value).startswith("3 problems in the configuration:\n")


def test_a_wrong_value_is_not_reported_again_by_checks_between_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, ["UNET.NUM_DOWNS", "x", "SOLVER.IMS_PER_BATCH", "no", "SOLVER.STEPS", "z"])
    assert len(caught.value.problems) == 3
