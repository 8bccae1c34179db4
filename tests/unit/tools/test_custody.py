"""Wrap commands, shares and the audit log of tools/keyring.py, as a user types them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from engine.vault import master
from engine.vault.keyring import Keyring
from engine.vault.master import Argon2Cost, KeyFile, WrapCommand
from tools import keyring as tool

# Encrypts with a key file, instead of a key service; records the length of each input. It is not
# secure, but starts ten times as fast as with the package cryptography.
SCRIPT = """
import sys
from hashlib import blake2b
folder, action = sys.argv[1:]
content = sys.stdin.buffer.read()
with open(folder + "/calls", "a") as calls:
    calls.write(f"{action} {len(content)}\\n")
with open(folder + "/service.key", "rb") as file:
    key = file.read()
def mixed(text):
    return bytes(a ^ b for a, b in zip(text, key, strict=True))
def tag(text):
    return blake2b(text, key=key, digest_size=16).digest()
if action == "wrap":
    sys.stdout.buffer.write(b"wrapped:" + mixed(content) + tag(content))
else:
    text = mixed(content[8:-16])
    assert content == b"wrapped:" + content[8:-16] + tag(text)
    sys.stdout.buffer.write(text)
"""


class Service:
    """A key service: a script with a key."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.script = folder, folder / "service.py"
        self.script.write_text(SCRIPT)
        (folder / "service.key").write_bytes(os.urandom(32))

    def line(self, action: str) -> str:
        return shlex.join([sys.executable, "-IS", str(self.script), str(self.folder), action])

    @property
    def unwrap(self) -> list[str]:
        return ["--unwrap-command", self.line("unwrap")]

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture(autouse=True)
def _cheap_passphrases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Argon2Cost.__init__, "__defaults__", (8 * 1024, 1, 1))


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path / "a service")  # a blank in the path needs quotes


@pytest.fixture
def keyring(tmp_path: Path) -> list[str]:
    return ["--keyring", str(tmp_path / "k.db")]


# ---- wrap commands ------------------------------------------------------------------------------


def test_a_command_opens_the_keyring(
    service: Service, keyring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrap = ["--wrap-command", service.line("wrap")]
    assert tool.main([*keyring, *service.unwrap, "init", *wrap]) == 0
    assert service.calls == ["wrap 32", "unwrap 56", "unwrap 56"]  # the second is a test
    assert "without the key that the unwrap command uses, nothing opens again" in (
        capsys.readouterr().out
    )
    with Keyring.open(keyring[1], WrapCommand(service.line("unwrap"))) as opened:
        opened.ensure(["set/1"])
        key = opened.sealing_key("set/1").key
    assert tool.main([*keyring, *service.unwrap, "list"]) == 0
    # To another service, and from there to a key file: the subject's key stays.
    other = Service(tmp_path / "other")
    new = ["--new-unwrap-command", other.line("unwrap"), "--new-wrap-command", other.line("wrap")]
    assert tool.main([*keyring, *service.unwrap, "rekey", *new]) == 0
    assert tool.main([*keyring, *service.unwrap, "list"]) == 4
    file = str(tmp_path / "new.key")
    assert tool.main([*keyring, *other.unwrap, "rekey", "--new-master", file]) == 0
    assert tool.main([*keyring, *other.unwrap, "list"]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("is opened by a master key file (--master) or its shares (--share)")
    with Keyring.open(keyring[1], KeyFile(Path(file))) as opened:
        assert opened.sealing_key("set/1").key == key
    assert tool.main([*keyring, "--master", file, "audit", "--verify"]) == 0


def test_a_backup_opens_with_the_same_command(
    service: Service, keyring: list[str], tmp_path: Path
) -> None:
    wrap = ["--wrap-command", service.line("wrap")]
    assert tool.main([*keyring, *service.unwrap, "init", *wrap]) == 0
    assert tool.main([*keyring, *service.unwrap, "backup", str(tmp_path / "copy.db")]) == 0
    assert tool.main(["--keyring", str(tmp_path / "copy.db"), *service.unwrap, "list"]) == 0


def test_the_master_key_is_random_and_not_the_root(service: Service) -> None:
    master = WrapCommand(service.line("unwrap"), service.line("wrap"))
    keys = {master.new_key()[2] for _ in range(2)}
    assert len(keys) == 2
    assert all(len(key) == 32 for key in keys)


PYTHON = shlex.quote(sys.executable)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("no-such-program-1234 x", 2, "cannot be run: No such file or directory"),
        ("", 2, "is empty"),
        ("cat 'open quote", 2, "is not a command line: No closing quotation"),
        ("sh -c 'echo token expired >&2; exit 3'", 4, "exit code 3; it wrote: token expired"),
        ("sh -c 'kill -9 $$'", 4, "ended with signal 9"),
        ("true", 4, "returned 0 bytes; expected 32"),
        ("sh -c 'head -c 31 /dev/zero'", 4, "returned 31 bytes; expected 32"),
        ("sh -c 'cat /dev/null; echo refused >&2'", 4, "expected 32; it wrote: refused"),
        ("head -c 32 /dev/zero", 4, "WrongMaster"),
        (f"{PYTHON} -c 'print()'", 4, "returned 1 bytes"),
    ],
)
def test_a_failing_command_is_one_clear_error(
    service: Service, keyring: list[str], line: str, code: int, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wrap = ["--wrap-command", service.line("wrap")]
    assert tool.main([*keyring, *service.unwrap, "init", *wrap]) == 0
    capsys.readouterr()
    assert tool.main([*keyring, "--unwrap-command", line, "list"]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("wrap", "unwrap", "message"),
    [
        ("cat", "cat", "returned the master key unencrypted"),
        ("true", "cat", "returned 0 bytes; expected 1 to 65536"),
        ("head -c 70000 /dev/zero", "cat", "returned 70000 bytes; expected 1 to 65536"),
        ("sha512sum", "head -c 32 /dev/zero", "does not return the key that was wrapped"),
        ("false", "cat", "--wrap-command 'false' ended with exit code 1"),
        (None, "cat", "a new master needs --wrap-command in addition to --unwrap-command"),
    ],
)
def test_no_keyring_is_made_with_commands_that_do_not_fit(
    keyring: list[str], wrap: str | None, unwrap: str, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = [] if wrap is None else ["--wrap-command", wrap]
    assert tool.main([*keyring, "--unwrap-command", unwrap, "init", *options]) in (2, 4)
    assert message in capsys.readouterr().err
    assert not Path(keyring[1]).exists()


def test_a_wrap_command_without_an_unwrap_command_is_refused(
    keyring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a key file would open a keyring whose owner believes in the key service."""
    master = ["--master", str(tmp_path / "m.key")]
    for options in ([], master):
        assert tool.main([*keyring, *options, "init", "--wrap-command", "cat"]) == 2
        assert "--wrap-command needs --unwrap-command" in capsys.readouterr().err
        assert not Path(keyring[1]).exists()
    assert tool.main([*keyring, *master, "init"]) == 0
    new = ["--new-master", str(tmp_path / "new.key"), "--new-wrap-command", "cat"]
    assert tool.main([*keyring, *master, "rekey", *new]) == 2
    assert "--new-wrap-command needs --new-unwrap-command" in capsys.readouterr().err
    assert not (tmp_path / "new.key").exists()


def test_a_command_that_does_not_end_is_stopped(
    service: Service, keyring: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wrap = ["--wrap-command", service.line("wrap")]
    assert tool.main([*keyring, *service.unwrap, "init", *wrap]) == 0
    monkeypatch.setattr(master, "TIME_LIMIT_S", 0.2)
    assert tool.main([*keyring, "--unwrap-command", "sleep 30", "list"]) == 4
    assert "--unwrap-command 'sleep 30' did not end within 0.2 s" in capsys.readouterr().err


def test_a_key_file_does_not_open_a_wrapped_keyring(
    service: Service, keyring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrap = ["--wrap-command", service.line("wrap")]
    assert tool.main([*keyring, *service.unwrap, "init", *wrap]) == 0
    KeyFile(tmp_path / "m.key").create_if_missing()
    assert tool.main([*keyring, "--master", str(tmp_path / "m.key"), "list"]) == 4
    assert "is opened by a command (--unwrap-command)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        tool.main([*keyring, *service.unwrap, "list", "--master", str(tmp_path / "m.key")])
    assert ended.value.code == 2


# ---- shares -------------------------------------------------------------------------------------


@pytest.fixture
def with_master(keyring: list[str], tmp_path: Path) -> list[str]:
    arguments = [*keyring, "--master", str(tmp_path / "m.key")]
    assert tool.main([*arguments, "init"]) == 0
    return arguments


def _shares(arguments: list[str], folder: Path, shares: int, needed: int) -> list[str]:
    command = ["shares", "create", "--shares", str(shares), "--needed", str(needed)]
    assert tool.main([*arguments, *command, "--output-folder", str(folder)]) == 0
    return [str(folder / f"share-{number}-of-{shares}.txt") for number in range(1, shares + 1)]


def test_shares_open_the_keyring_and_give_the_master_back(
    keyring: list[str], with_master: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    master = tmp_path / "m.key"
    files = _shares(with_master, tmp_path / "shares", 5, 3)
    assert "any 3 open" in capsys.readouterr().out
    content = master.read_bytes()
    master.unlink()
    chosen = [files[4], files[0], files[2]]
    given = [word for file in chosen for word in ("--share", file)]
    assert tool.main([*keyring, *given, "list"]) == 0
    assert tool.main([*keyring, *given[:4], "list"]) == 2
    assert "needs 3 of its 5 shares; got 2 (number 5, 1)" in capsys.readouterr().err
    output = str(tmp_path / "new.key")
    assert tool.main(["shares", "combine", *chosen, "--output", output]) == 0
    assert Path(output).read_bytes() == content
    assert Path(output).stat().st_mode & 0o777 == 0o600
    assert tool.main(["shares", "combine", *chosen, "--output", output]) == 4
    assert "give another --output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["shares", "combine", *chosen, "--output", output, *with_master])
    assert "--keyring: not used here" in capsys.readouterr().err
    _shares([*keyring, *given], tmp_path / "again", 2, 2)  # from shares, for other people
    assert tool.main([*keyring, "--master", output, "audit", "--verify"]) == 0


def test_mistakes_with_shares_are_one_clear_error(
    with_master: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _shares(with_master, tmp_path / "first", 3, 2)
    second = _shares(with_master, tmp_path / "second", 3, 2)
    damaged = Path(first[2])
    damaged.write_text(damaged.read_text().replace("share: 3", "share: 1"))
    capsys.readouterr()
    for files, code, message in (
        ([first[0], second[1]], 2, "the shares are of different sets"),
        ([first[0], first[0]], 2, "share 1 is given twice; give 2 different shares"),
        ([first[0]], 2, "needs 2 of its 3 shares; got 1 (number 1)"),
        ([first[0], first[2]], 1, "the checksum is wrong"),
        ([first[0], str(tmp_path / "m.key")], 1, "is not a share of a master key"),
        ([first[0], str(tmp_path / "none")], 4, "does not exist"),
    ):
        command = ["shares", "combine", *files, "--output", str(tmp_path / "out.key")]
        assert tool.main(command) == code, files
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert not (tmp_path / "out.key").exists()


def test_shares_of_another_keyring_do_not_open_it(
    with_master: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--keyring", str(tmp_path / "o.db"), "--master", str(tmp_path / "o.key")]
    assert tool.main([*other, "init"]) == 0
    files = _shares(other, tmp_path / "shares", 2, 2)
    given = [word for file in files for word in ("--share", file)]
    assert tool.main([*with_master[:2], *given, "list"]) == 4
    assert "WrongMaster" in capsys.readouterr().err


def test_a_passphrase_has_no_shares(
    keyring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phrase = tmp_path / "phrase"
    phrase.touch(0o600)
    phrase.write_text("correct horse\n")
    given = [*keyring, "--passphrase-file", str(phrase)]
    assert tool.main([*given, "init"]) == 0
    command = ["shares", "create", "--shares", "3", "--needed", "2"]
    assert tool.main([*given, *command, "--output-folder", str(tmp_path / "s")]) == 2
    assert "run `rekey --new-master NEW.key` first" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


# ---- audit --------------------------------------------------------------------------------------


def test_every_command_is_listed_and_filtered(
    with_master: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Keyring.open(with_master[1], KeyFile(tmp_path / "m.key")) as keyring:
        keyring.ensure(["set/Jane", "set/Joe"])
        jane, joe = (keyring.rows_of(name)[0].key_id.hex() for name in ("set/Jane", "set/Joe"))
    for command, code in (
        (["list"], 0),
        (["rotate", "set/Jane"], 0),
        (["revoke", "set/Joe"], 0),
        (["revoke", "set/Joe", "--undo"], 0),
        (["destroy", "set/Joe", "--yes"], 0),
        (["destroy", "set/Nobody", "--yes"], 1),
        (["backup", str(tmp_path / "copy.db")], 0),
    ):
        assert tool.main([*with_master, *command]) == code
    capsys.readouterr()

    def listed(*options: str) -> list[tuple[str, str]]:
        assert tool.main([*with_master, "audit", "--json", *options]) == 0
        records = json.loads(capsys.readouterr().out)["commands"]
        return [(record["command"], record["result"]) for record in records]

    assert listed() == [
        ("keyring init", "done"),
        ("keyring list", "done"),
        ("keyring rotate", "done"),
        ("keyring revoke", "done"),
        ("keyring revoke", "done"),
        ("keyring destroy", "done"),
        ("keyring destroy", "MissingKey"),
        ("keyring backup", "done"),
    ]
    assert listed("--command", "destroy") == [
        ("keyring destroy", "done"),
        ("keyring destroy", "MissingKey"),
    ]
    assert listed("--key-id", jane[:12]) == [("keyring rotate", "done")]
    assert [name for name, _ in listed("--key-id", joe.upper())] == [
        "keyring revoke",
        "keyring revoke",
        "keyring destroy",
    ]
    assert listed("--since", "2999-01-01") == []
    assert len(listed("--since", "2026-01-01T00:00")) == 8
    assert tool.main([*with_master, "audit"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 9
    assert [line.split()[4] for line in table[1:3]] == ["init", "list"]
    assert tool.main([*with_master, "audit", "--key-id", "mistyped"]) == 0
    assert "none of the 8 commands in the log matches" in capsys.readouterr().err
    assert "Joe" not in (tmp_path / "k.db.audit").read_text()
    with pytest.raises(SystemExit):
        tool.main([*with_master, "audit", "--since", "yesterday"])
    assert "such as 2026-11-29" in capsys.readouterr().err


def test_verify_names_changes_and_accept_begins_a_new_log(
    with_master: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "k.db.audit"
    assert tool.main([*with_master, "list"]) == 0
    assert tool.main([*with_master, "audit", "--verify"]) == 0
    assert "4 entries verified; the hash of the last one is " in capsys.readouterr().out
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]))
    assert tool.main([*with_master, "audit", "--verify"]) == 5
    captured = capsys.readouterr()
    assert captured.err == "error: audit log: entry 4 is missing at the end\n"
    assert captured.out == ""
    assert tool.main([*with_master, "audit"]) == 5  # lists what is there
    assert " init " in capsys.readouterr().out
    assert tool.main([*with_master, "list"]) == 4
    assert "`keyring audit --accept` begins a new log" in capsys.readouterr().err
    assert tool.main([*with_master, "audit", "--accept"]) == 0
    assert "k.db.audit.old-1" in capsys.readouterr().out
    assert tool.main([*with_master, "list"]) == 0
    assert tool.main([*with_master, "audit", "--verify"]) == 0
    assert "note: begins with entry 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--accept"],
        ["--verify", "--accept"],
        ["--verify", "--since", "2026-01-01"],
        ["--verify", "--command", "list"],
        ["--accept", "--key-id", "12"],
    ],
)
def test_options_that_would_be_ignored_are_refused(
    with_master: list[str], tmp_path: Path, options: list[str]
) -> None:
    log = tmp_path / "k.db.audit"
    before = log.read_bytes()
    assert _code([*with_master, "audit", *options]) == 2
    assert log.read_bytes() == before


def _code(command: list[str]) -> int | None:
    try:
        return tool.main(command)
    except SystemExit as error:  # of argparse
        return int(str(error.code))


def test_the_log_does_not_steer_the_terminal(
    with_master: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "\x1b[2Jhost")
    assert tool.main([*with_master, "list"]) == 0
    assert tool.main([*with_master, "audit"]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2Jhost" in out
    assert "\x1b" not in out
