"""What README.md and docs/ show can be typed: commands parse, names and links lead somewhere."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from yacs.config import CfgNode

from configs.defaults import KEY_BY_NAME
from configs.loading import load
from data.datasets import synthetic
from data.people.walks import draw_walks
from tests.fixtures.paths import ROOT
from tests.fixtures.protection import draw, save_checkpoint

README = ROOT / "README.md"
PAGES = {str(page.relative_to(ROOT)): page for page in (README, *sorted(ROOT.glob("docs/*.md")))}
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python3|torchrun .*?) ((?:tools|data)/.*)")
_PLACEHOLDERS = re.compile(r"\.\.\.|[<>|]|\bKEY\b|\bFILE\b")
_FOLDERS = "configs|data|docs|engine|layers|modeling|solver|tests|tools|utils"


def _blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in _BLOCK.findall(_text(page)) if language in languages]


def _text(page: Path) -> str:
    return page.read_text("utf-8")


def _commands() -> list[str]:
    """Every call of a script of this project, in blocks and in sentences."""
    lines: list[str] = []
    for page in PAGES.values():
        for body in _blocks(page, "", "sh", "bash"):
            lines += body.replace("\\\n", " ").splitlines()
        lines += re.findall(r"`([^`\n]+)`", _BLOCK.sub("", _text(page)))
    found = (_COMMAND.match(line.strip()) for line in lines)
    return list(dict.fromkeys(match[1] for match in found if match))


@functools.cache
def _help_of(script: str, *words: str) -> str:
    """What a script, or its sub-command, says of itself."""
    program = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit) as end:
        program.main([*words, "--help"])
    assert end.value.code == 0
    return told.getvalue()


def test_there_are_commands() -> None:
    commands = _commands()
    for script in ("tools/main.py", "tools/benchmark.py step", "tools/attack.py", "tools/data.py"):
        assert any(line.startswith(script) for line in commands), script


@pytest.mark.parametrize("line", _commands())
def test_command_lines_parse(line: str) -> None:
    """The script exists, and so does every option and every key that is shown."""
    script, *words = shlex.split(line, comments=True)
    assert (ROOT / script).is_file(), line
    verbs = set(re.findall(r"^    ([a-z]+)(?= |$)", _help_of(script), re.MULTILINE))
    chosen = next((word for word in words if word in verbs), None)
    told = _help_of(script, chosen) if chosen else _help_of(script)
    told = told.partition("options:")[2]  # not what its examples say
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", told), f"{option} in: {line}"
    if script == "tools/main.py" and not _PLACEHOLDERS.search(line):
        _check_keys(words)


def _check_keys(words: list[str]) -> None:
    files = [word.split("=", 1)[1] for word in words if word.startswith("--config_file=")]
    if "--config_file" in words:
        files.append(words[words.index("--config_file") + 1])
    keys = [place for place, word in enumerate(words) if word in KEY_BY_NAME]
    for name in files:
        assert (ROOT / name).is_file(), name
    load(ROOT / files[0] if files else None, words[keys[0] :] if keys else ())


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)", _text(page)):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{name} links to {target}, which is not there"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", _text(linked), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{name} links to {target}, which has no such heading"


@pytest.mark.parametrize("name", PAGES)
def test_files_and_keys_that_are_named_exist(name: str) -> None:
    text = _text(PAGES[name])
    for path in re.findall(rf"`((?:{_FOLDERS})/[\w/.*]+)`", text):
        assert list(ROOT.glob(path)), f"{name} names {path}, which is not there"
    for key in re.findall(r"\b[A-Z][A-Z0-9]+\.[A-Z][A-Z0-9_]+\b", text):
        assert key in KEY_BY_NAME, f"{name} names {key}, which is no key"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", _text(ROOT / "Makefile"), re.MULTILINE))
    for page in PAGES.values():
        shown = re.findall(r"(?:^|`)make ([a-z-]+)", _text(page), re.MULTILINE)
        assert set(shown) <= targets, page


def test_the_python_example_runs(
    make_cfg: Callable[..., CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small checkpoint and drawn pictures under the names that it uses."""
    examples = [body for body in _blocks(README, "python") if "import" in body]
    assert examples
    for body in examples:
        _prepare(body, make_cfg, tmp_path)
        monkeypatch.chdir(tmp_path)
        exec(compile(body, str(README), "exec"), {"__name__": "example"})  # noqa: S102


def _prepare(body: str, make_cfg: Callable[..., CfgNode], folder: Path) -> None:
    """Put a picture wherever the example names one, and a checkpoint where it names a folder."""
    for number, name in enumerate(re.findall(r"""["']([^"']+\.(?:jpg|jpeg|png))["']""", body)):
        if not (folder / name).exists():
            draw(folder / name, number)
    for name in re.findall(r"""from_checkpoint\(\s*["']([^"']+)["']""", body):
        if not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            save_checkpoint(make_cfg, folder / name)


def test_the_person_that_is_searched_for_is_drawn(tmp_path: Path) -> None:
    """By the demo, under the name that README.md shows."""
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
