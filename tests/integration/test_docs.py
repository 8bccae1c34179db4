"""Commands, links, file names and keys in README.md and docs/ are valid."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from configs.defaults import KEY_BY_NAME
from configs.loading import load
from data.datasets import synthetic
from data.desensitize import DESENSITIZERS, make_desensitizer
from data.people.photograph import draw_walks
from data.registry import DATASETS, load_splits
from modeling.backbones.registry import REID_DESIGNS
from modeling.build import build_objectives, build_reid
from modeling.objectives import GENERATOR_TERMS
from tests.fixtures import tiny
from tests.fixtures.paths import ROOT
from tests.fixtures.protection import draw, save_checkpoint
from tools.lib.command_line import INTERRUPTED

README = ROOT / "README.md"
PAGES = {str(page.relative_to(ROOT)): page for page in (README, *sorted(ROOT.glob("docs/*.md")))}
NOTEBOOK = json.loads((ROOT / "docs/tour.ipynb").read_text("utf-8"))
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python3|torchrun .*?) ((?:tools|data)/.*)")
_PLACEHOLDERS = re.compile(r"\.\.\.|[<>|]|\bKEY\b|\bFILE\b")
_FOLDERS = "configs|data|docs|engine|layers|modeling|solver|tests|tools|utils"


def _blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in _BLOCK.findall(_text(page)) if language in languages]


def _text(page: Path) -> str:
    return page.read_text("utf-8")


def _commands() -> list[str]:
    """Return every call of a script of this project, in code blocks and in sentences."""
    lines: list[str] = []
    for page in PAGES.values():
        for body in _blocks(page, "", "sh", "bash"):
            lines += body.replace("\\\n", " ").splitlines()
        lines += re.findall(r"`([^`\n]+)`", _BLOCK.sub("", _text(page)))
    matches = (_COMMAND.match(line.strip()) for line in lines)
    return list(dict.fromkeys(match[1] for match in matches if match))


def test_commands_are_collected() -> None:
    commands = _commands()
    for script in ("tools/main.py", "tools/benchmark.py step", "tools/attack.py", "tools/data.py"):
        assert any(line.startswith(script) for line in commands), script


@pytest.mark.parametrize("line", _commands())
def test_command_lines_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script accepts every option, value and key of the line; its work is not done."""
    script, *words = shlex.split(line, comments=True)
    assert (ROOT / script).is_file(), line
    if _PLACEHOLDERS.search(line):
        return
    program = _program(script)
    monkeypatch.setattr(program, "exit_code_of", lambda *_, **__: INTERRUPTED)
    assert program.main(words) == INTERRUPTED
    if script == "tools/main.py":
        _check_keys(words)


def _program(script: str) -> Any:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def _check_keys(words: list[str]) -> None:
    files = [word.split("=", 1)[1] for word in words if word.startswith("--config_file=")]
    if "--config_file" in words:
        files.append(words[words.index("--config_file") + 1])
    keys = [index for index, word in enumerate(words) if word in KEY_BY_NAME]
    for name in files:
        assert (ROOT / name).is_file(), name
    load(ROOT / files[0] if files else None, words[keys[0] :] if keys else ())


@pytest.mark.parametrize("name", PAGES)
def test_link_targets_exist(name: str) -> None:
    page = PAGES[name]
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)", _text(page)):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{name} links to {target}, which does not exist"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", _text(linked), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{name} links to the heading {target}, which does not exist"


@pytest.mark.parametrize("name", PAGES)
def test_files_and_keys_exist(name: str) -> None:
    text = _text(PAGES[name])
    for path in re.findall(rf"`((?:{_FOLDERS})/[\w/.*]+)`", text):
        assert list(ROOT.glob(path)), f"{name} names {path}, which does not exist"
    for key in re.findall(r"\b[A-Z][A-Z0-9]+\.[A-Z][A-Z0-9_]+\b", text):
        assert key in KEY_BY_NAME, f"{name} names {key}, which is not a key"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", _text(ROOT / "Makefile"), re.MULTILINE))
    for page in PAGES.values():
        shown = re.findall(r"(?:^|`)make ([a-z-]+)", _text(page), re.MULTILINE)
        assert set(shown) <= targets, page


def test_the_python_example_runs(
    make_cfg: Callable[..., CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small checkpoint and drawn images under the names that the example uses."""
    tiny.install(monkeypatch)
    examples = [body for body in _blocks(README, "python") if "import" in body]
    assert examples
    for body in examples:
        _prepare(body, make_cfg, tmp_path)
        monkeypatch.chdir(tmp_path)
        exec(compile(body, str(README), "exec"), {"__name__": "example"})  # noqa: S102


def _prepare(body: str, make_cfg: Callable[..., CfgNode], folder: Path) -> None:
    """Create the images and the checkpoint folder that an example names."""
    for number, name in enumerate(re.findall(r"""["']([^"']+\.(?:jpg|jpeg|png))["']""", body)):
        if not (folder / name).exists():
            draw(folder / name, number)
    for name in re.findall(r"""from_checkpoint\(\s*["']([^"']+)["']""", body):
        if not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            save_checkpoint(make_cfg, folder / name)


def test_the_example_of_scoring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (body,) = _blocks(ROOT / "docs/SCORING.md", "python")
    exec(compile(body, "SCORING.md", "exec"), {"__name__": "example"})  # noqa: S102
    assert re.fullmatch(r"rank-1 .*% \(.*%\), mAP .*%\n", capsys.readouterr().out)


def test_the_examples_of_extending_work(
    make_cfg: Callable[..., CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each addition can be selected by its name in the configuration."""
    registries: tuple[dict[str, Any], ...]
    registries = (DATASETS, DESENSITIZERS, REID_DESIGNS, GENERATOR_TERMS)
    for registry in registries:  # restored after the test
        monkeypatch.setitem(registry, "placeholder", None)
        monkeypatch.delitem(registry, "placeholder")
    before = [set(registry) for registry in registries]
    try:
        for body in _blocks(ROOT / "docs/EXTENDING.md", "python"):
            exec(compile(body, "EXTENDING.md", "exec"), {"__name__": "example"})  # noqa: S102
        for number, subset in enumerate(("train", "val_query", "val_gallery", "query", "gallery")):
            for camera in (0, 1):
                draw(tmp_path / f"crowd/{subset}/{number // 2}-{camera}-0.png", number)
        splits = load_splits("crowd", tmp_path)
        assert [sample.camid for sample in splits.train] == [0, 1]
        images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
        assert len(make_desensitizer("posterize", 4)(images).unique()) == 4
        cfg = make_cfg("MODEL.NAME", "patches", "MODEL.PRETRAIN_CHOICE", "none")
        assert build_reid(cfg, 3).feature_size == 12
        assert build_objectives(cfg, 3, 12).weights["mean_colour"] == cfg.LOSS.RECOVERY
    finally:
        for registry, names in zip(registries, before, strict=True):
            for name in set(registry) - names:
                del registry[name]


def test_the_notebook_runs(
    make_cfg: Callable[..., CfgNode],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With an untrained model and a few images, in the folders that the notebook names."""
    tiny.install(monkeypatch)
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    demo, people = re.findall(r'= Path\("\.\./(\w.*)"\)', cells[0])
    (tmp_path / "docs").mkdir()
    (tmp_path / demo).mkdir(parents=True)
    save_checkpoint(make_cfg, tmp_path / demo)
    for pid in (81, 82):
        for camera in (1, 2):
            name = f"{pid:04}_c{camera}s1_000000_00.jpg"
            for subset in ("query", "bounding_box_test"):
                draw(tmp_path / people / subset / name, 10 * pid + camera)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(_made(tmp_path / "workplace")))
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setattr("sys.argv", ["notebook"])
    scope: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        exec(compile(cell, "tour.ipynb", "exec"), scope)  # noqa: S102
    printed = capsys.readouterr()
    assert "4 sealed, 0 already present, 0 failed" in printed.out
    assert "2 good, 2 failed" in printed.out
    assert printed.err.count("DestroyedKey") == 2
    assert "raw       -> protected  rank-1" in printed.out


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_notebook_has_small_outputs_without_paths_of_a_machine() -> None:
    assert (ROOT / "docs/tour.ipynb").stat().st_size < 1_000_000
    outputs = [out for cell in NOTEBOOK["cells"] for out in cell.get("outputs", ())]
    images = [out for out in outputs if "image/png" in out.get("data", ())]
    assert len(images) == 4
    texts = "".join("".join(out.get("text", "")) for out in outputs)
    assert "rank-1" in texts
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", texts)
    assert not any(out["output_type"] == "error" for out in outputs)


def test_the_searched_image_is_in_the_synthetic_set(tmp_path: Path) -> None:
    """The demo draws the image that README.md searches for."""
    people = re.search(r"PEOPLE=datasets/(\S+)", _text(README))
    shown = re.search(r"\$PEOPLE/(\w+/(\d+)_c\d\S+)", _text(README))
    assert people is not None
    assert shown is not None
    options = synthetic.SyntheticOptions()
    assert people[1] == options.folder
    for name in synthetic.FOLDERS:
        (tmp_path / name).mkdir()
    walks = [walk for walk in synthetic._plan(options) if walk.pid == int(shown[2])]
    list(draw_walks(tmp_path, walks, options.seed))
    assert (tmp_path / shown[1]).is_file()


def test_the_image_that_getting_started_searches_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`data.py draw people` draws it; only this person is drawn here."""
    page = _text(ROOT / "docs/GETTING_STARTED.md")
    shown = re.search(r"search people/(query/(\d+)/\S+)", page)
    assert shown is not None

    def draw_one(folder: Path, walks: list[Any], seed: int) -> Any:
        chosen = [walk for walk in walks if (walk.pid, walk.camera) == (int(shown[2]), 0)]
        return draw_walks(folder, chosen, seed)

    monkeypatch.setattr(synthetic, "draw_walks", draw_one)
    given = _program("tools/data.py")._parser().parse_args(["draw", str(tmp_path / "people")])
    size = (given.identities, given.cameras, given.images, given.seed)
    synthetic.draw_folders(given.output, synthetic.SyntheticOptions(*size))
    assert (tmp_path / "people" / shown[1]).is_file()


def test_the_protection_example_runs(
    make_cfg: Callable[..., CfgNode],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run it line by line in an empty folder, with a small model and the names of the demo."""
    tiny.install(monkeypatch)
    block = next(body for body in _blocks(README, "") if "PEOPLE=" in body)
    first, *lines = block.splitlines()
    people = tmp_path / first.removeprefix("PEOPLE=")
    for camera in range(1, 7):
        draw(people / f"query/0081_c{camera}s1_00000{camera}_01.jpg", camera)
    draw(people / "query/0082_c1s1_000001_01.jpg", 9)
    searched = re.search(r"\$PEOPLE/(bounding_box_test/\S+)", block)
    assert searched is not None
    draw(people / searched[1], 1)
    (tmp_path / "demo/full").mkdir(parents=True)
    save_checkpoint(make_cfg, tmp_path / "demo/full")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    for line in lines:
        python, script, *words = shlex.split(line.replace("$PEOPLE", str(people)))
        assert python == "python3"
        assert _program(script).main(words) == 0, line
    sealed = list((tmp_path / "sealed").rglob("*.png"))
    assert len(sealed) == len(list((tmp_path / "recovered").rglob("*.png"))) == 7
    # As README.md states: after ``destroy`` the six images of this identity cannot be opened.
    capsys.readouterr()
    for verb in ("verify", "recover"):
        line = next(line for line in lines if f"protect.py {verb} " in line)
        _, script, *words = shlex.split(line.replace(" recovered", " again"))
        assert _program(script).main(words) != 0
        errors = capsys.readouterr().err
        assert len(re.findall(r"sealed/\w+\.png: DestroyedKey", errors)) == 6, errors


def test_architecture_names_existing_code() -> None:
    """Each ``file: name`` exists; other names are defined in one of the files of the page."""
    text = " ".join(_text(ROOT / "docs/ARCHITECTURE.md").split())
    pairs = re.findall(rf"`((?:{_FOLDERS})/[\w/]+\.py): ([\w.]+)`", text)
    assert len(pairs) > 30
    defined = {path: _definitions(ROOT / path) for path, _ in pairs}
    missing = [f"{path}: {name}" for path, name in pairs if name not in defined[path]]
    anywhere = set().union(*defined.values())
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", text):
        is_package = (ROOT / name.replace(".", "/")).exists() or name == "build"
        if not is_package and name not in anywhere and name != "results.json":
            missing.append(name)
    assert not missing


def _definitions(path: Path) -> set[str]:
    """Return the names that a module defines; methods also as ``Class.method``."""
    names = set()
    for node in ast.parse(_text(path)).body if path.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            names.update(methods, (f"{node.name}.{method}" for method in methods))
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names
