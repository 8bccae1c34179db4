"""tools/keyring.py: every command, its exit codes, and one line for every error."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.vault.keyring import Keyring
from engine.vault.keyring_admin import export_subject
from engine.vault.master import Argon2Cost, KeyFile, Passphrase
from tests.fixtures.paths import ROOT
from tools import keyring as tool


@pytest.fixture(autouse=True)
def _cheap_passphrases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Argon2Cost.__init__, "__defaults__", (8 * 1024, 1, 1))


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    return ["--keyring", str(tmp_path / "k.db"), "--master", str(tmp_path / "m.key")]


def _sealing(base: list[str], *subjects: str) -> None:
    with Keyring.open(base[1], KeyFile(Path(base[3]))) as keyring:
        keyring.ensure(subjects)


def test_life_of_a_key(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*base, "init"]) == 0
    _sealing(base, "set/2", "set/3")
    assert tool.main([*base, "rotate", "set/2"]) == 0
    assert tool.main([*base, "revoke", "set/2"]) == 0
    assert tool.main([*base, "revoke", "set/2", "--undo"]) == 0
    assert tool.main([*base, "destroy", "set/3", "--yes"]) == 0
    assert tool.main([*base, "backup", str(tmp_path / "copy.db")]) == 0
    new = tmp_path / "new.key"
    assert tool.main([*base, "rekey", "--new-master", str(new)]) == 0
    assert tool.main([*base, "list"]) == 4
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: WrongMaster: ")
    assert tool.main([*base[:2], "--master", str(new), "list", "--json"]) == 0
    keys = json.loads(capsys.readouterr().out)
    assert [(key["subject"], key["generation"], key["state"]) for key in keys] == [
        ("set/2", 1, "retired"), ("set/2", 2, "active"), (None, 1, "destroyed"),
    ]  # fmt: skip
    assert tool.main([*base[:2], "--master", str(new), "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:1] + line.split()[2:4] for line in listed[1:]] == [
        ["set/2", "1", "retired"],
        ["set/2", "2", "active"],
        ["(erased)", "1", "destroyed"],
    ]


def test_export_and_import(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phrase = tmp_path / "phrase"
    phrase.touch(0o600)
    phrase.write_text("for the court\n")
    keys = str(tmp_path / "two.keys")
    given = ["--file-passphrase-file", str(phrase)]
    other = ["--keyring", str(tmp_path / "o.db"), "--master", str(tmp_path / "o.key")]
    assert tool.main([*base, "init"]) == tool.main([*other, "init"]) == 0
    _sealing(base, "set/2")
    assert tool.main([*base, "export", "set/2", keys, *given]) == 0
    assert tool.main([*other, "import", keys, *given]) == 0
    assert "set/2: 1 new key\n" in capsys.readouterr().out
    phrase.write_text("for the curt\n")
    assert tool.main([*other, "import", keys, *given]) == 5
    assert "error: WrongKey: " in capsys.readouterr().err


def test_passphrase_from_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--keyring", str(tmp_path / "k.db"), "--passphrase-file", "-"]
    for phrase, code in (("correct horse", 0), ("incorrect horse", 4)):
        monkeypatch.setattr("sys.stdin", io.StringIO(phrase + "\n"))
        if code == 0:
            assert tool.main([*base, "init"]) == 0
            monkeypatch.setattr("sys.stdin", io.StringIO(phrase + "\n"))
        assert tool.main([*base, "list"]) == code
    assert "horse" not in capsys.readouterr().err


def test_rekey_reads_the_old_passphrase_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--keyring", str(tmp_path / "k.db"), "--passphrase-file", "-"]
    for typed, command in (
        ("correct horse\n", ["init"]),
        ("correct horse\nbattery staple\n", ["rekey", "--new-passphrase-file", "-"]),
        ("battery staple\n", ["list"]),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert tool.main([*base, *command]) == 0


def test_export_and_import_read_the_keyrings_passphrase_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--keyring", str(tmp_path / "k.db"), "--passphrase-file", "-"]
    keys, given = str(tmp_path / "two.keys"), ["--file-passphrase-file", "-"]
    monkeypatch.setattr("sys.stdin", io.StringIO("correct horse\n"))
    assert tool.main([*base, "init"]) == 0
    with Keyring.open(base[1], Passphrase("correct horse")) as keyring:
        keyring.ensure(["set/2"])
    for command in (["export", "set/2", keys, *given], ["import", keys, *given]):
        monkeypatch.setattr("sys.stdin", io.StringIO("correct horse\nfor the court\n"))
        assert tool.main([*base, *command]) == 0


def test_imported_labels_do_not_steer_the_terminal(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phrase, keys, label = tmp_path / "phrase", tmp_path / "two.keys", "set/\x1b[2J\u202e2"
    phrase.touch(0o600)
    phrase.write_text("for the court\n")
    given = ["--file-passphrase-file", str(phrase)]
    other = ["--keyring", str(tmp_path / "o.db"), "--master", str(tmp_path / "o.key")]
    assert tool.main([*base, "init"]) == tool.main([*other, "init"]) == 0
    _sealing(base, label)
    with Keyring.open(base[1], KeyFile(Path(base[3]))) as keyring:
        export_subject(keyring, label, keys, Passphrase("for the court"))
    assert tool.main([*other, "import", str(keys), *given]) == 0
    assert tool.main([*other, "list"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("set/\\x1b[2J2") == 2  # stored without the invisible character
    assert all(char.isprintable() or char == "\n" for char in shown)


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["list"], 4, "KeyringMissing"),
        (["init"], 4, "KeyringExists"),
        (["rotate", "unknown"], 1, "MissingKey"),
        (["destroy", "set/2"], 2, "UsageError"),
        (["rekey"], 2, "UsageError"),
        (["export", "set/2", "out.keys"], 2, "UsageError"),
    ],
)
def test_errors_are_one_line(
    base: list[str],
    arguments: list[str],
    code: int,
    error: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    if arguments != ["list"]:
        assert tool.main([*base, "init"]) == 0
    capsys.readouterr()
    assert tool.main([*base, *arguments]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"error: {error}: ")
    assert err.count("\n") == 1
    if arguments == ["rekey"]:
        assert "give --new-master FILE or --new-passphrase-file FILE" in err


def test_keyring_and_master_may_follow_the_command(
    base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["init", *base]) == 0
    _sealing(base, "set/2", "set/3")
    for line in (
        ["list", *base],
        [*base[:2], "list", "set/2", *base[2:]],
        [*base[2:], "list", *base[:2]],
    ):
        capsys.readouterr()
        assert tool.main(line) == 0
        assert "set/2" in capsys.readouterr().out


def test_usage_errors_exit_with_2(base: list[str]) -> None:
    two_masters = ["--new-master", "new.key", "--new-passphrase-file", "-"]
    for wrong in (
        [*base, "explode"],
        ["list"],
        [*base, "--passphrase-file", "-", "list"],
        [*base, "rekey", *two_masters],
        [*base, "list", "--passphrase-file", "-"],
        [*base[:2], "verify-certificate", "erasure.json", "--public-key", "0" * 64],
        [*base[2:], "verify-certificate", "erasure.json", "--public-key", "0" * 64],
    ):
        with pytest.raises(SystemExit) as caught:
            tool.main(wrong)
        assert caught.value.code == 2


def test_end_of_input_at_the_question_destroys_nothing(
    base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tool.main([*base, "init"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert tool.main([*base, "destroy", "market/0002"]) == 130


def test_file_names_and_labels_are_escaped_in_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most terminals cannot print names that are not UTF-8."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    base = ["--keyring", str(tmp_path / "k\udcff.db"), "--master", str(tmp_path / "m\udcff.key")]
    assert tool.main([*base, "init"]) == 0
    _sealing(base, "set/\x1b[2J")
    copy, new = str(tmp_path / "c\udcff.db"), str(tmp_path / "n\udcff.key")
    for command in (
        ["rotate", "set/\x1b[2J"],
        ["revoke", "set/\x1b[2J"],
        ["destroy", "set/\x1b[2J", "--yes"],
        ["backup", copy],
        ["rekey", "--new-master", new],
    ):
        assert tool.main([*base, *command]) == 0
    printed = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert printed.count("\\xdcff") == 4
    assert printed.count("set/\\x1b[2J") == 3
    assert all(char.isprintable() or char == "\n" for char in printed)


@pytest.mark.parametrize("source", ["file", "-"])
def test_a_label_can_come_from_a_file(
    base: list[str],
    tmp_path: Path,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A label on the command line is in the process list and in the shell's history."""
    label, phrase = tmp_path / "label", tmp_path / "phrase"
    label.write_text("set/Zo\u00eb \n", encoding="utf-8-sig")
    phrase.touch(0o600)
    phrase.write_text("for the court\n")
    assert tool.main([*base, "init"]) == 0
    _sealing(base, "set/Zo\u00eb")
    export = [str(tmp_path / "one.keys"), "--file-passphrase-file", str(phrase)]
    for command in (["rotate"], ["export", *export], ["revoke"], ["destroy", "--yes"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("set/Zo\u00eb\n"))
        given = "-" if source == "-" else str(label)
        assert tool.main([*base, *command, "--subject-file", given]) == 0, command
    assert tool.main([*base, "list"]) == 0
    assert capsys.readouterr().out.count("(erased)") == 2
    (tmp_path / "latin").write_bytes(b"set/Zo\xeb\n")
    for name, message in (("", "(not a regular file)"), ("missing", "(No such file or directory)"),
                          ("latin", "is not UTF-8")):  # fmt: skip
        capsys.readouterr()
        assert tool.main([*base, "rotate", "--subject-file", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.endswith(f"{message}\n")
    with pytest.raises(SystemExit):
        tool.main([*base, "rotate", "set/1", "--subject-file", str(label)])
    with pytest.raises(SystemExit):
        tool.main([*base, "rotate"])


def test_options_may_be_between_label_and_file(base: list[str], tmp_path: Path) -> None:
    phrase = tmp_path / "phrase"
    phrase.touch(0o600)
    phrase.write_text("for the court\n")
    assert tool.main([*base, "init"]) == 0
    _sealing(base, "set/1")
    given = ["--file-passphrase-file", str(phrase)]
    assert tool.main([*base, "export", "set/1", *given, str(tmp_path / "one.keys")]) == 0


def test_destroy_and_revoke_can_be_repeated(
    base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that was killed after its commit is run again."""
    assert tool.main([*base, "init"]) == 0
    _sealing(base, "set/1")
    for command, first, second in (
        (["revoke", "set/1"], "1 key revoked", "0 keys revoked"),
        (["revoke", "set/1", "--undo"], "1 key allowed again", "0 keys allowed again"),
        (["destroy", "set/1", "--yes"], "1 key destroyed here", "keys were destroyed already"),
    ):
        for done in (first, second):
            assert tool.main([*base, *command]) == 0
            assert f"set/1: {done}" in capsys.readouterr().out


TERMINATED = """
import os, signal, sys
from engine.vault.keyring import Keyring
from tools import keyring
put = Keyring.put
def put_and_stop(self, row, key):
    os.kill(os.getpid(), signal.SIGTERM)
    return put(self, row, key)
Keyring.put = put_and_stop
sys.exit(keyring.main(sys.argv[1:]))
"""


def test_sigterm_undoes_a_rekey_and_exits_with_130(base: list[str], tmp_path: Path) -> None:
    assert tool.main([*base, "init"]) == 0
    _sealing(base, "set/1")
    rekey = [*base, "rekey", "--new-master", str(tmp_path / "new.key")]
    done = subprocess.run([sys.executable, "-c", TERMINATED, *rekey], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.db", "k.db.audit", "m.key"]
    assert tool.main([*base, "list"]) == 0


DUMPS = """
import ctypes, resource, sys
from tools import keyring
assert keyring.main(sys.argv[1:]) == 0
print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is a system call of Linux")
@pytest.mark.parametrize("command", [["init"], ["list"], ["backup", "copy.db"]])
def test_memory_with_keys_cannot_be_dumped(
    base: list[str], tmp_path: Path, command: list[str]
) -> None:
    if command != ["init"]:
        assert tool.main([*base, "init"]) == 0
    words = [str(tmp_path / word) if word.endswith(".db") else word for word in command]
    done = subprocess.run(
        [sys.executable, "-c", DUMPS, *base, *words], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout.splitlines()[-1] == b"(0, 0) 0"
