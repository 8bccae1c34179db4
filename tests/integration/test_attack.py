"""The whole suite from the command line, on a small checkpoint and drawn people, on a CPU."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs import loading
from engine.attacks.levels import LEVELS
from engine.attacks.suite import ATTACKS, Suite
from engine.checkpoint import NATIVE_NAMES
from tests.fixtures import ranks, tiny
from tests.fixtures.attack_scene import install_small_attackers
from tests.fixtures.attacked import save_attackable
from tests.fixtures.foreign import Colours, export_network, write_card
from tools import attack, demo, export, frontier, match
from tools.lib.attacking import checkpoint_config

SMALL = ("--budget", "48", "--epochs", "4", "--keys", "200")
FOREIGN = ("foreign-card", "foreign-card-adapted")
CRYPTANALYSIS = (
    "linkage", "brute-force", "known-plaintext", "averaging", "difference", "denoise", "wrong-key",
    "malleability", "storage", "metadata",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny.tiny_backbone():
        yield save_attackable(tmp_path_factory.mktemp("attacked"))


@pytest.fixture(scope="module")
def full_run(checkpoint: Path) -> Iterator[Path]:
    """All attacks on all levels, with the operating system's random numbers replaced by a seed.

    Verdicts of a secure cipher are a matter of luck one time in many; not in this test.
    """
    output = checkpoint.parent / "attacks"
    rng = random.Random(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.urandom", rng.randbytes)
        install_small_attackers(patch)
        assert attack.main(command(checkpoint, output)) == 0
    yield output


def command(checkpoint: Path, output: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--output", str(output), *SMALL, *more]


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_additive_falls_and_aead_stands(full_run: Path) -> None:
    verdicts = read(full_run / "verdicts.json")
    assert set(verdicts) == set(ATTACKS)
    for name in CRYPTANALYSIS:
        assert verdicts[name]["additive"] == "fails", name
    assert {name: row["aead"] for name, row in verdicts.items()} == dict.fromkeys(ATTACKS, "holds")
    assert verdicts["model"]["raw"] == verdicts["model"]["anonymized"] == "fails"  # it can succeed
    assert verdicts["reid-tuned"]["raw"] == "not applicable"


def test_the_table_says_everything(full_run: Path) -> None:
    table = (full_run / "table.txt").read_text("utf-8")
    reason = "raw, desensitized, anonymized: not applicable: nothing is encrypted at this level"
    assert reason in table
    assert table.count(": holds. ") + table.count(": fails. ") == sum(
        verdict != "not applicable"
        for row in read(full_run / "verdicts.json").values()
        for verdict in row.values()
    )


def test_every_result_says_what_it_rests_on(full_run: Path) -> None:
    results = read(full_run / "results.json")["results"]
    assert {(r["attack"], r["level"]) for r in results} == {(a, x) for a in ATTACKS for x in LEVELS}
    for result in results:
        assert result["sentence"]
        if result["verdict"] == "not applicable":
            continue
        assert result["seed"] == 1
        assert result["budget_unit"]
        assert result["num_persons"] == 12
        assert any(measure["decides"] for measure in result["measures"])
        for measure in result["measures"]:
            for number in (measure["value"], measure["floor"]):
                assert number["low"] <= number["value"] + 1e-9
                assert number["value"] <= number["high"] + 1e-9


def test_curves_run_over_budgets_and_images(full_run: Path) -> None:
    model = read(full_run / "model.json")["results"]
    assert [[point["x"] for point in result["curve"]] for result in model] == [[8, 12, 48]] * 5
    averaging = read(full_run / "averaging.json")["results"][-1]
    assert [point["x"] for point in averaging["curve"]] == list(range(1, 5))


def test_pictures_can_be_opened(full_run: Path) -> None:
    names = {path.name for path in full_run.glob("*.png")}
    assert {f"{name}.png" for name in ATTACKS} <= names
    assert {"model_images.png", "model_curve.png", "averaging_curve.png"} <= names
    for path in full_run.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100, path


def test_a_finished_attack_is_kept_and_a_missing_one_run(
    checkpoint: Path,
    full_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in full_run.glob("*.json")}
    (full_run / "storage.json").unlink()
    ran: list[str] = []
    whole = Suite._attack

    def counted(self: Suite, one: Any) -> Any:
        ran.append(one.name)
        return whole(self, one)

    monkeypatch.setattr(Suite, "_attack", counted)
    assert attack.main(command(checkpoint, full_run, "--json")) == 0
    assert ran == ["storage"]
    printed = json.loads(capsys.readouterr().out)
    assert printed["unexpected"] == []
    assert {result["attack"] for result in printed["results"]} == set(ATTACKS)
    after = {p.name: p.stat().st_mtime_ns for p in full_run.glob("*.json")}
    assert {n for n in after if after[n] != before[n]} == {
        "storage.json", "results.json", "verdicts.json",
    }  # fmt: skip


def test_an_interrupted_run_goes_on_with_the_same_network(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second attack: the first is kept, and so is the network that it trained."""
    only = ("--only", "reid-public", "--only", "reid-tuned", "--level", "raw", "--level", "aead")
    with monkeypatch.context() as patch:
        patch.setattr(ATTACKS["reid-tuned"], "run", _interrupt)
        assert attack.main(command(checkpoint, tmp_path, *only)) == 130
    assert (tmp_path / "reid-public.json").is_file()
    assert not (tmp_path / "results.json").exists()
    weights = (tmp_path / "attackers/public_reid.pth").read_bytes()
    assert attack.main(command(checkpoint, tmp_path, *only)) == 0
    assert (tmp_path / "attackers/public_reid.pth").read_bytes() == weights
    assert set(read(tmp_path / "verdicts.json")) == {"reid-public", "reid-tuned"}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_expectation(
    checkpoint: Path, full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = command(checkpoint, full_run, "--expect")
    assert attack.main([*run, str(full_run / "verdicts.json")]) == 0
    wrong = tmp_path / "expected.json"
    wrong.write_text(json.dumps({"linkage": {"aead": "fails", "additive": "fails"}}))
    assert attack.main([*run, str(wrong)]) == 1
    assert "linkage on aead: holds, expected fails" in capsys.readouterr().err
    wrong.write_text(json.dumps({"unheard-of": {"aead": "fails"}}))
    assert attack.main([*run, str(wrong)]) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--only", "linkages"), "did you mean linkage?"),
        (("--level", "aed"), "did you mean aead?"),
        (("--budget", "5000"), "have 80 images that are not held out"),
        (("--expect", "nowhere.json"), "nowhere.json does not exist"),
        (("SYNTHETIC.IDENTITIES", "4"), "expected at least 6"),
        (("INPUT.TIPE", "blur"), "did you mean INPUT.TYPE"),
        (("MODEL.MODE", "C"), "no anonymizer"),
    ],
)
def test_wrong_input_is_one_sentence(
    checkpoint: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [*command(checkpoint, tmp_path / "out"), *more]
    assert attack.main(given) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack.main(command(tmp_path / "none", tmp_path / "out")) == 2
    assert "does not exist; expected the OUTPUT_DIR" in capsys.readouterr().err
    assert attack.main(command(tmp_path, tmp_path / "out")) == 2
    assert "has no config.yml" in capsys.readouterr().err


def test_a_fine_tuned_checkpoint_can_be_attacked(tmp_path: Path) -> None:
    trained = loading.load("", ["MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", "elsewhere"])
    loading.dump(trained, tmp_path / "config.yml")
    cfg, start = checkpoint_config(tmp_path, [])
    assert cfg.MODEL.PRETRAIN_CHOICE == "self"
    assert Path(cfg.MODEL.PRETRAIN_DIR) == tmp_path
    assert start == "none"  # an attacker does not have the weights that the owner started from


def test_output_of_other_settings_is_left_alone(
    checkpoint: Path, full_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (full_run / "results.json").read_bytes()
    assert attack.main([*command(checkpoint, full_run), "--seed", "2"]) == 2
    assert "seed 1 (now 2); choose another --output" in capsys.readouterr().err
    assert (full_run / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        # What only the attackers' trainings read counts, too.
        ("LOSS.LABEL_SMOOTHING", "0.9", "LOSS.LABEL_SMOOTHING 0.1 (now 0.9)"),
        ("MODEL.WEIGHT_REGULARIZED_TRIPLET", "off", "_TRIPLET 'on' (now 'off')"),
        ("MODEL.VAL_R1", "inf", "(now 'inf')"),
    ],
)
def test_every_value_that_can_move_a_number_is_compared(
    checkpoint: Path,
    full_run: Path,
    key: str,
    value: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.read_bytes() for path in full_run.glob("*.*") if path.name != "log.txt"}
    given = command(checkpoint, full_run, "--only", "reid-public")
    assert attack.main([*given, key, value]) == 2
    error = capsys.readouterr().err
    assert words in error and "choose another --output, or give the same values" in error
    assert error.count("(now ") == 1
    for path, content in before.items():
        assert path.read_bytes() == content, path


def test_a_run_does_not_go_on_in_the_arithmetic_of_other_hardware(
    checkpoint: Path,
    full_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """RUNTIME.PRECISION auto is what the hardware has."""
    was = read(full_run / "settings.json")["RUNTIME.PRECISION"]
    now = "bfloat16" if was == "float32" else "float32"
    monkeypatch.setattr("utils.device.gains_from_bfloat16", lambda device: now == "bfloat16")
    assert attack.main(command(checkpoint, full_run, "RUNTIME.PRECISION", "auto")) == 2
    assert f"RUNTIME.PRECISION '{was}' (now '{now}')" in capsys.readouterr().err


def test_what_made_the_results_lies_beside_them(checkpoint: Path, full_run: Path) -> None:
    results = read(full_run / "results.json")
    assert set(results["versions"]) == set(ATTACKS)
    for versions in results["versions"].values():
        assert versions["torch"] == torch.__version__ and versions["git"]
        assert versions["device"].startswith("cpu")
    assert results["settings"] == read(full_run / "settings.json")
    settings = results["settings"]
    assert (settings["seed"], settings["budget"], settings["SOLVER.SEED"]) == (1, 48, 1)
    trained, cfg = (loading.load(one / "config.yml") for one in (checkpoint, full_run))
    assert set(loading.changes(trained, cfg)) == {"MODEL.PRETRAIN_CHOICE", "MODEL.PRETRAIN_DIR"}


def test_places_devices_and_speed_may_change(
    checkpoint: Path, full_run: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    free = ("RUNTIME.THREADS", "1", "TEST.IMS_PER_BATCH", "8", "DATALOADER.NUM_WORKERS", "1")
    assert attack.main([*command(moved, full_run, "--only", "storage"), *free]) == 0


def test_a_folder_of_an_earlier_version_is_one_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text('{"format": 2, "weights": "x", "seed": 1}')
    (tmp_path / "linkage.json").write_text("{}")
    assert attack.main(command(checkpoint, tmp_path, "--only", "linkage")) == 2
    error = capsys.readouterr().err
    assert "contains attacks of another version of this program" in error
    assert "choose another --output" in error and error.count("\n") == 1


def test_a_training_is_not_written_over(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    assert attack.main(command(checkpoint, checkpoint)) == 2
    assert "contains a training or an evaluation" in capsys.readouterr().err
    # A point of a frontier is named after its checkpoint.
    given = ["--checkpoint", str(checkpoint), "--output", str(checkpoint.parent)]
    assert frontier.main([*given, *SMALL]) == 2
    assert "contains a training or an evaluation" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_a_run_of_one_attack_hides_no_other(checkpoint: Path, full_run: Path) -> None:
    before = read(full_run / "verdicts.json")
    assert attack.main(command(checkpoint, full_run, "--only", "metadata")) == 0
    assert read(full_run / "verdicts.json") == before


@pytest.mark.gpu
def test_on_a_gpu(checkpoint: Path, tmp_path: Path) -> None:
    only = [word for name in ("linkage", "wrong-key", "reid-tuned") for word in ("--only", name)]
    keys = ("MODEL.DEVICE", "cuda", "RUNTIME.PRECISION", "bfloat16")
    assert attack.main(command(checkpoint, tmp_path, *only, *keys)) == 0
    verdicts = read(tmp_path / "verdicts.json")
    assert verdicts["linkage"]["additive"] == "fails"


def test_a_damaged_network_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "attackers").mkdir()
    (tmp_path / "attackers/public_reid.pth").write_bytes(b"PK\3\4 nothing")
    only = ("--only", "reid-public", "--level", "raw")
    assert attack.main(command(checkpoint, tmp_path, *only)) == 2
    assert "delete it to train the network again" in capsys.readouterr().err


def test_a_damaged_result_is_named(
    checkpoint: Path, full_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = full_run / "denoise.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    try:
        assert attack.main(command(checkpoint, full_run, "--only", "denoise")) == 2
        assert "delete it to run the attack again" in capsys.readouterr().err
    finally:
        path.write_bytes(whole)


def test_a_baseline_has_nothing_to_attack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tiny.tiny_backbone():
        baseline = save_attackable(tmp_path, "MODEL.MODE", "C", "MODEL.VAL_R1", "inf")
        assert (baseline / NATIVE_NAMES["latest"]).is_file()
        assert attack.main(command(baseline, tmp_path / "out")) == 2
    assert "has no anonymizer to attack" in capsys.readouterr().err


def test_third_party_networks(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results stay in the reports of later runs without the network."""
    export_network(tmp_path, Colours())
    card, output = write_card(tmp_path, "their.json"), tmp_path / "out"
    levels = ("--level", "raw", "--level", "aead")
    run = command(checkpoint, output, *levels, "--foreign", str(card))
    names = ["foreign-their", "foreign-their-adapted"]
    only = [word for name in names for word in ("--only", name)]
    assert attack.main([*run, *only]) == 0
    verdicts = read(output / "verdicts.json")
    assert set(verdicts) == set(names)
    assert verdicts["foreign-their-adapted"]["raw"] == "fails"
    assert attack.main(command(checkpoint, output, *levels, "--only", "linkage")) == 0
    assert set(read(output / "verdicts.json")) == {"linkage", *names}
    export_network(tmp_path, torch.nn.Flatten())
    assert attack.main([*run, *only]) == 2
    error = capsys.readouterr().err
    assert "results of another network with this name" in error and error.count("\n") == 1
    write_card(tmp_path, "their.json", width=...)
    assert attack.main([*run, *only]) == 2
    assert "has no width" in capsys.readouterr().err


def test_the_report_can_be_left_out_and_does_not_fail_an_attack(
    checkpoint: Path, tmp_path: Path
) -> None:
    given = command(checkpoint, tmp_path, "--only", "storage", "EVAL.REPORT")
    assert attack.main([*given, "off"]) == 0
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "details.json").write_text("{")
    assert attack.main([*given, "on"]) == 0
    assert not (tmp_path / "report.html").exists()
    assert "No report was written" in (tmp_path / "log.txt").read_text("utf-8")
    (tmp_path / "details.json").unlink()
    assert attack.main([*given, "on"]) == 0
    assert (tmp_path / "report.html").is_file()


def test_frontier(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install_small_attackers(monkeypatch)
    export_network(tmp_path, Colours())
    foreign = ("--foreign", str(write_card(tmp_path)))
    given = ["--checkpoint", str(checkpoint), "--strength", "2", "16", "--output", str(tmp_path)]
    assert frontier.main([*given, *SMALL, *foreign, "--json", "TEST.IMS_PER_BATCH", "8"]) == 0
    points = read(tmp_path / "frontier.json")
    assert json.loads(capsys.readouterr().out) == points
    assert [point["name"] for point in points] == ["run", "mosaic 2", "mosaic 16"]
    weak, strong = points[1:]
    assert weak["recovery_ssim"]["value"] > strong["recovery_ssim"]["value"]
    for point in points:
        assert point["settings"]["seed"] == 1 and point["settings"]["budget"] == 48
        assert {found["torch"] for found in point["versions"].values()} == {torch.__version__}
        cfg = loading.load(tmp_path / point["folder"] / "config.yml")
        assert point["settings"]["INPUT.RADIUS"] == cfg.INPUT.RADIUS
        assert point["unauthorised_attack"] in ("reid-public", *FOREIGN)
        assert 0 <= point["rank1"]["low"] <= point["rank1"]["high"] <= 1
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.width > 800
    assert "mosaic 16" in (tmp_path / "table.txt").read_text("utf-8")


def test_frontier_refuses_the_same_point_twice(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--checkpoint", str(checkpoint), "--strength", "4", "4", "--output", str(tmp_path)]
    assert frontier.main(given) == 2
    assert "'mosaic 4' is given twice" in capsys.readouterr().err


def test_frontier_refuses_a_strength_before_anything_is_measured(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    given = ["--checkpoint", str(checkpoint), "--strength", "4", "0.5", "--output", str(output)]
    assert frontier.main([*given, *SMALL]) == 2
    assert "the radius is 0.5 for Mosaic" in capsys.readouterr().err
    assert not list(output.glob("*/*"))


def _in_a_rank(argv: list[str]) -> int:
    with tiny.tiny_backbone():
        return attack.main(argv)


def test_two_processes_share_the_attacks(checkpoint: Path, full_run: Path, tmp_path: Path) -> None:
    only = ("linkage", "storage", "difference")
    level = ("--level", "raw", "--level", "additive")
    argv = command(
        checkpoint, tmp_path / "shared", *level, *(x for n in only for x in ("--only", n))
    )
    ranks.finish(ranks.start(_in_a_rank, argv, folder=tmp_path), tmp_path)
    shared = {
        (r["attack"], r["level"]): r for r in read(tmp_path / "shared" / "results.json")["results"]
    }
    alone = {(r["attack"], r["level"]): r for r in read(full_run / "results.json")["results"]}
    assert set(shared) == {(name, one) for name in only for one in ("raw", "additive")}
    for place, result in shared.items():
        assert result == alone[place], place


@pytest.mark.parametrize("program", [frontier.main, match.main, demo.main, export.main])
def test_what_shares_no_work_refuses_several_processes(
    program: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for environment in ranks.environments(2)[:1]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
    argv = {
        frontier.main: ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")],
        match.main: ["a.jpg", "b.jpg", "--checkpoint", str(tmp_path)],
        demo.main: ["--output", str(tmp_path / "out")],
        export.main: [str(tmp_path), str(tmp_path / "out")],
    }[program]
    assert program(argv) != 0
    assert "run it with python3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
