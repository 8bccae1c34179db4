"""`expire` destroys keys by age, all or none, and `destroy --certificate` states what happened."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from engine.vault import audit, erasure, keyring_admin
from engine.vault.audit import log_path
from engine.vault.erasure import parse_certificate, read_certificate, verify_certificate
from engine.vault.keyring_rows import ORIGINAL
from modeling.encryption import png_format
from modeling.encryption.ised_errors import (
    DestroyedKey,
    FormatError,
    KeyringCorrupt,
    MissingKey,
    RevokedKey,
    Tampered,
    UsageError,
)
from modeling.encryption.sealed_image import Metadata, new_file_key
from modeling.encryption.sealed_original import seal_original
from tests.fixtures.archives import PERSON, SUBJECTS, SmallArchive
from tests.fixtures.keyrings import to_format
from tools import keyring as tool

# ---- expire --------------------------------------------------------------------------------------


def test_expire_by_use_keeps_keys_in_use_and_by_creation_does_not(
    archive: SmallArchive, set_day: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    set_day(25)
    with archive.keyring() as keyring:
        keyring.sealing_key("market/1")
        keyring_admin.rotate(keyring, "market/2")
    expire = [*archive.keys, "expire", "--yes", "--older-than"]
    set_day(30)
    assert tool.main([*expire, "30d"]) == 0
    assert "0 keys last used more than 30 days ago\n" in capsys.readouterr().out
    set_day(31)
    assert tool.main([*expire, "30d", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(\S+/\S+) ", printed, re.MULTILINE) == ["cuhk/7", "cuhk/8", "market/2"]
    assert printed.endswith("3 keys last used more than 30 days ago\n")
    assert tool.main([*expire, "30d", "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [key["subject"] for key in listed["keys"]] == ["cuhk/7", "cuhk/8", "market/2"]
    assert (listed["revoked"], listed["destroyed"]) == (0, 0)
    assert tool.main([*expire, "30d"]) == 0
    assert "3 keys destroyed here" in capsys.readouterr().out
    with archive.keyring() as keyring:
        assert keyring.active_row("market/1") is not None
        assert [row.generation for row in keyring.rows_of("market/2")] == [2]
        assert keyring.rows_of("cuhk/7") == []
    assert tool.main([*expire, "30d", "--by", "created"]) == 0
    assert "1 key created more than 30 days ago\n" in capsys.readouterr().out
    assert archive.states()["market/2"] == "active"


def test_an_expired_subject_gets_a_new_key_and_an_erased_one_does_not(
    archive: SmallArchive, set_day: Callable[[int], None]
) -> None:
    with archive.keyring() as keyring:
        before = keyring.sealing_key("market/2").key_id
        keyring_admin.destroy(keyring, "market/1")
        set_day(40)
        rows, _ = erasure.expired(keyring, 30, "used")
        assert erasure.expire(keyring, 30, "used", {row.key_id for row in rows}) == 3
        assert keyring.sealing_key("market/2").key_id != before
        keyring_admin.rotate(keyring, "market/1")  # which allows this key only
        set_day(80)
        rows, _ = erasure.expired(keyring, 30, "used")
        assert erasure.expire(keyring, 30, "used", {row.key_id for row in rows}) == 2
        with pytest.raises(DestroyedKey):
            keyring.sealing_key("market/1")
        (path, *_) = sorted(archive.folder("cuhk").iterdir())
        with pytest.raises(DestroyedKey, match="gone for good"):
            keyring.opening_key(png_format.decode(path.read_bytes()).chunk)


def test_expire_keeps_revoked_keys_and_keys_used_after_the_list(
    archive: SmallArchive, set_day: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with archive.keyring() as keyring:
        keyring_admin.revoke(keyring, "market/1")
        set_day(40)
        listed = {row.key_id for row in erasure.expired(keyring, 30, "used")[0]}
        keyring.sealing_key("market/2")
        assert erasure.expire(keyring, 30, "used", listed) == 2
        with pytest.raises(RevokedKey):
            keyring.sealing_key("market/1")
        assert keyring.active_row("market/2") is not None
    assert tool.main([*archive.keys, "expire", "--older-than", "4w", "--yes"]) == 0
    assert "1 revoked key of this age: kept" in capsys.readouterr().out


def test_a_converted_keyring_keeps_keys_whose_last_use_is_unknown(
    archive: SmallArchive, set_day: Callable[[int], None]
) -> None:
    with archive.keyring() as keyring:
        to_format(2, keyring)
    set_day(40)
    with archive.keyring() as keyring:
        assert erasure.expired(keyring, 30, "used") == ([], [])
        assert len(erasure.expired(keyring, 30, "created")[0]) == 4


@pytest.mark.parametrize("age", ["30", "0d", "-1d", "30m", "d", "1.5d", "999999d", "\u0663d"])
def test_an_age_has_a_number_and_a_unit(
    archive: SmallArchive, age: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        tool.main([*archive.keys, "expire", f"--older-than={age}"])
    assert caught.value.code == 2
    assert "expected one or more days, weeks or years: 30d, 8w, 2y" in capsys.readouterr().err


def test_nothing_expires_without_a_yes(
    archive: SmallArchive, set_day: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_day(1000)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert tool.main([*archive.keys, "expire", "--older-than", "2y"]) == 2
    assert set(archive.states().values()) == {"active"}
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    assert tool.main([*archive.keys, "expire", "--older-than", "2y"]) == 0
    assert set(archive.states().values()) == {"destroyed"}


def _enter(archive: SmallArchive, patch: pytest.MonkeyPatch, *days: int) -> None:
    """Enter a command into the audit log at each of these days from now."""
    for day in days:
        now = datetime.now(timezone.utc) + timedelta(days=day)
        patch.setattr(audit, "datetime", SimpleNamespace(now=lambda _, now=now: now))
        assert tool.main([*archive.keys, "list"]) == 0
    patch.setattr(audit, "datetime", datetime)


@pytest.mark.parametrize(
    ("days", "problem"),
    [
        ((-7, 0), None),
        ((-8, -1), None),
        ((-9,), "no command used the keyring from "),
        ((-30, -21, -14, -7), "no command used the keyring from "),  # some time ago
        ((20,), "the clock went back from "),
        ((-3, 1), "the clock went back from "),
    ],
)
def test_a_clock_that_may_be_wrong_needs_a_person(
    archive: SmallArchive,
    set_day: Callable[[int], None],
    days: tuple[int, ...],
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A machine with another clock also writes its entries with that clock."""
    _enter(archive, monkeypatch, *days)
    set_day(40)
    expire = [*archive.keys, "expire", "--older-than", "30d"]
    if problem is not None:
        for _ in range(2):  # the refused command is in the log too
            assert tool.main([*expire, "--yes"]) == 2
        assert tool.main(expire) == 2  # without a terminal
        printed = capsys.readouterr().err
        assert printed.count(problem) == printed.count("run this on a terminal without --yes") == 3
        assert set(archive.states().values()) == {"active"}
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin.isatty", lambda: True)
            patch.setattr("builtins.input", lambda _: "yes")
            assert tool.main(expire) == 0
        assert problem in capsys.readouterr().out
        with archive.keyring() as keyring:
            keyring.ensure(SUBJECTS)
        set_day(80)
    assert tool.main([*expire, "--yes"]) == 0  # what a person confirmed is confirmed once
    assert set(archive.states().values()) == {"destroyed"}


def test_a_new_audit_log_does_not_hide_a_wrong_clock(
    archive: SmallArchive,
    set_day: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _enter(archive, monkeypatch, -20)
    log_path(archive.path).unlink()
    assert tool.main([*archive.keys, "audit", "--accept"]) == 0
    set_day(40)
    expire = [*archive.keys, "expire", "--older-than", "30d"]
    assert tool.main([*expire, "--yes"]) == 2
    assert "was set aside" in capsys.readouterr().err
    assert set(archive.states().values()) == {"active"}
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    assert tool.main(expire) == 0
    assert set(archive.states().values()) == {"destroyed"}


def test_a_longer_age_allows_longer_pauses(
    archive: SmallArchive, set_day: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _enter(archive, monkeypatch, -180)
    set_day(800)
    assert tool.main([*archive.keys, "expire", "--older-than", "1y", "--yes"]) == 2
    assert tool.main([*archive.keys, "expire", "--older-than", "2y", "--yes"]) == 0


# ---- certificates --------------------------------------------------------------------------------


def _file_names(archive: SmallArchive, label: str) -> list[str]:
    dataset, _, name = label.partition("/")
    with archive.keyring() as keyring:
        names = (keyring.file_name(dataset, f"{name}/{n}.jpg") for n in range(SUBJECTS[label]))
        return sorted(names)


def test_a_certificate_states_what_can_no_longer_be_opened(
    archive: SmallArchive, capsys: pytest.CaptureFixture[str]
) -> None:
    """One person in two data sets; the label is not in the certificate."""
    (archive.folder("cuhk") / "broken.png").write_bytes(b"no image")
    again = ["--folder", str(archive.folder("market"))]  # listed once
    assert tool.main(archive.destroy(*again)) == 0
    printed = capsys.readouterr().out
    assert "market/1, cuhk/7: 2 keys destroyed here" in printed
    assert "2 keys destroyed, 5 files can no longer be opened" in printed
    assert tool.main(archive.destroy(*again)) == 0
    assert "market/1, cuhk/7: keys were destroyed already" in capsys.readouterr().out
    path = archive.root / "erasure.json"
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    assert "market/1" not in text.replace(str(archive.root), "")
    with archive.keyring() as keyring:
        statement = verify_certificate(keyring, path)
        gone = {row.key_id.hex() for label in PERSON for row in keyring.rows_of(label)}
        assert statement["keyring"] == keyring.head.keyring_id.hex()
    assert {key["id"] for key in statement["keys"]} == gone
    market, cuhk = statement["folders"]
    assert (market["files"], market["unknown_key"]) == (_file_names(archive, "market/1"), [])
    assert cuhk["files"] == _file_names(archive, "cuhk/7")
    assert cuhk["unknown_key"] == ["broken.png"]
    assert "Backups" in statement["not_guaranteed"][0]
    assert tool.main([*archive.keys, "verify-certificate", str(path)]) == 0
    assert tool.main([*archive.keys, "public-key"]) == 0
    key = capsys.readouterr().out.splitlines()[-1]
    assert tool.main(["verify-certificate", str(path), "--public-key", key]) == 0
    assert "erasure.json: valid; keyring " in capsys.readouterr().out


def test_the_documented_check_accepts_a_certificate(archive: SmallArchive) -> None:
    """docs/FORMAT.md; without this program."""
    assert tool.main(archive.destroy()) == 0
    content = json.loads((archive.root / "erasure.json").read_text())
    with archive.keyring() as keyring:
        key = Ed25519PublicKey.from_public_bytes(erasure.public_key(keyring))
    signed = json.dumps(content["statement"], sort_keys=True, separators=(",", ":")).encode()
    key.verify(bytes.fromhex(content["signature"]), signed)


def test_a_repeated_command_completes_a_destruction(archive: SmallArchive) -> None:
    with archive.keyring() as keyring:  # a command that was killed before the certificate
        assert keyring_admin.destroy(keyring, *PERSON) == 2
    for _ in range(2):
        assert tool.main(archive.destroy()) == 0
    with archive.keyring() as keyring:
        assert len(verify_certificate(keyring, archive.root / "erasure.json")["keys"]) == 2
    path = archive.root / "erasure.json"
    before = path.read_bytes()
    for subjects in (("market/2",), ("market/1",), (*PERSON, "market/2")):
        assert tool.main(archive.destroy(subjects=subjects)) == 2
    assert tool.main(archive.destroy("--folder", str(archive.root))) == 2
    assert path.read_bytes() == before
    assert archive.states()["market/2"] == "active"


def test_nothing_is_destroyed_if_a_subject_or_folder_does_not_exist(archive: SmallArchive) -> None:
    assert tool.main(archive.destroy(subjects=("market/1", "market/unknown"))) == 1
    assert tool.main(archive.destroy("--folder", str(archive.root / "missing"))) == 2
    assert tool.main([*archive.keys, "destroy", "market/1", "--yes", "--folder", "x"]) == 2
    with archive.keyring() as keyring, pytest.raises(UsageError, match="nothing was destroyed"):
        missing = archive.root / "missing/erasure.json"
        erasure.destroy_with_certificate(keyring, PERSON, [], missing)
    assert set(archive.states().values()) == {"active"}
    assert not (archive.root / "erasure.json").exists()


@pytest.mark.parametrize("name", ["market", "cuhk", "."])
def test_nothing_is_destroyed_if_a_folder_cannot_be_used(
    archive: SmallArchive,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`access` is replaced, since root may read everything."""
    closed, access = archive.root / name, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    with archive.keyring() as keyring, pytest.raises(UsageError, match="nothing was destroyed"):
        folders = [archive.folder(name) for name in ("market", "cuhk")]
        erasure.destroy_with_certificate(keyring, PERSON, folders, archive.root / "erasure.json")
    assert set(archive.states().values()) == {"active"}


def test_a_file_with_the_locator_of_another_file_is_of_unknown_key(archive: SmallArchive) -> None:
    (one, other) = (archive.folder(label[:-2]) / _file_names(archive, label)[0] for label in PERSON)
    changed = one.read_bytes()[:49] + other.read_bytes()[49:97] + one.read_bytes()[97:]
    one.write_bytes(changed)
    path = archive.root / "erasure.json"
    with archive.keyring() as keyring:
        _, statement = erasure.destroy_with_certificate(
            keyring, ["market/2"], [archive.folder("market")], path
        )
    assert statement["folders"][0]["unknown_key"] == [one.name]


def test_only_the_keys_of_originals(archive: SmallArchive) -> None:
    (image,) = _file_names(archive, "market/1")[:1]
    original = Path(image).with_suffix(".original")
    with archive.keyring() as keyring:
        key = new_file_key(keyring.sealing_key("market/1", ORIGINAL))
        content = seal_original(key, b"source file", Metadata("1/0.jpg"), original.stem)
    (archive.folder("market") / original).write_bytes(content)
    command = archive.destroy("--original-only", subjects=("market/1",))
    assert tool.main(command) == tool.main(command) == 0
    with archive.keyring() as keyring:
        statement = verify_certificate(keyring, archive.root / "erasure.json")
        assert [key["purpose"] for key in statement["keys"]] == ["original"]
        assert statement["folders"][0]["files"] == [str(original)]
        keyring.sealing_key("market/1")
        with pytest.raises(DestroyedKey, match="rotate --original"):
            keyring.sealing_key("market/1", ORIGINAL)
        with pytest.raises(MissingKey, match="purpose 'original'"):
            keyring_admin.destroy(keyring, "market/2", purpose=ORIGINAL)
    assert tool.main([*archive.keys, "rotate", "market/1", "--original"]) == 0
    with archive.keyring() as keyring:
        keyring.sealing_key("market/1", ORIGINAL)
        assert [row.generation for row in keyring.rows_of("market/1", ORIGINAL)] == [1, 2]


def test_no_changed_byte_of_a_certificate_is_accepted(archive: SmallArchive) -> None:
    path = archive.root / "erasure.json"
    with archive.keyring() as keyring:
        erasure.destroy_with_certificate(keyring, ["cuhk/8"], [archive.folder("cuhk")], path)
        key = erasure.public_key(keyring)
    good = path.read_bytes()
    assert parse_certificate(good, key) == read_certificate(path, key)
    rejected = (FormatError, Tampered)
    for index, byte in enumerate(good):
        for other in {byte ^ 1, ord(" ")} - {byte}:
            with pytest.raises(rejected):
                parse_certificate(good[:index] + bytes([other]) + good[index + 1 :], key)
    signature = json.loads(good)["signature"].encode()
    for changed in (b"", good[:-1], good + b"\n", b" " + good, good.decode().encode("utf-16"),
                    good.replace(signature, signature.upper()),
                    good.replace(signature, b""), b"[]", b"{}", b"[" * 100_000):  # fmt: skip
        with pytest.raises(rejected):
            parse_certificate(changed, key)
    other_key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    with pytest.raises(Tampered, match="another keyring"):
        read_certificate(path, other_key)


def test_a_restored_backup_is_noticed(archive: SmallArchive) -> None:
    shutil.copy(archive.path, archive.root / "backup.db")
    assert tool.main(archive.destroy()) == 0
    shutil.copy(archive.root / "backup.db", archive.path)
    path = archive.root / "erasure.json"
    with archive.keyring() as keyring, pytest.raises(KeyringCorrupt, match="2 of the 2 keys"):
        verify_certificate(keyring, path)
