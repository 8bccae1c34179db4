"""docs/FORMAT.md is complete and right: a reader written from it opens what this program writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from yacs.config import CfgNode

from engine.vault import audit, keyring_admin
from engine.vault.index import VectorKeys, read_segments
from engine.vault.keyring import Keyring
from engine.vault.keyring_admin import export_subject
from engine.vault.keyring_rows import KeyRow, RowSet
from engine.vault.master import KeyFile, Passphrase
from engine.vault.opening import unseal
from engine.vault.sealed_folder import MANIFEST_NAME, Manifest
from engine.vault.shares import Share, combine, split
from modeling.encryption.png_format import decode
from modeling.encryption.primitives import derive_key, existing_message_key, hmac_sha256
from modeling.encryption.sealed_image import mask_locator, open_image
from tests.fixtures import format_reader, tiny
from tests.fixtures.format_reader import Archive, open_export
from tests.fixtures.keyrings import CHEAP, to_format
from tests.fixtures.paths import GOLDEN, ROOT
from tests.fixtures.protection import make_scene
from tools import protect as protect_tool

KEY, SALT, KEY_ID = bytes(range(32)), bytes(range(0x40, 0x60)), bytes(range(0x10, 0x20))


def _from_sql(known: dict[str, Any], path: Path) -> bytes:
    """Write the keyring of a known answer; return its master key."""
    path.touch(0o600)
    connection = sqlite3.connect(path)
    connection.executescript("\n".join(known["sql"]))
    connection.execute(f"PRAGMA application_id = {0x49534544}")
    connection.close()
    return bytes.fromhex(known["master"])


def test_known_answers_of_the_document() -> None:
    text = (ROOT / "docs/FORMAT.md").read_text("utf-8")
    block = text[text.index("## Known answers") :]
    answers = re.findall(r"[0-9a-f]{46,}", block)
    row = KeyRow(KEY_ID, bytes(32), None, 2, "destroyed", 0, None, 20_000, "image", 20_001)
    okm = existing_message_key(KEY, "test", SALT, bytes.fromhex(answers[2]))
    assert answers == [
        KEY.hex(),
        SALT.hex(),
        okm.commit.hex(),
        okm.encrypt(b"aad", b"message").hex(),
        derive_key(KEY, "manifest").hex(),
        hmac_sha256(KEY, b"subject" + b"set/test/1").hex(),
        row.to_bytes(2).hex(),
        f"{RowSet(KEY, number=2)._hash(row):064x}",
        f"{RowSet(KEY)._hash(row):064x}",
        Passphrase("correct horse").unlock("m=8192,t=1,p=1", SALT).hex(),
        derive_key(KEY, "vector").hex(),
        format_reader.AESGCM(derive_key(KEY, "vector"))
        .encrypt(
            bytes(range(12)),
            np.array([0.5, -0.5, 0.5, -0.5], "<f2").tobytes(),
            b"securereid/ised/vector/1" + KEY + SALT + KEY_ID,
        )
        .hex(),
    ]
    assert mask_locator(KEY, SALT, KEY_ID).hex() in block
    assert row.to_bytes()[len(row.to_bytes(2)) :].hex() in block
    row_of_reader = b"".join(
        format_reader.field(value)
        for value in (KEY_ID, bytes(32), None, b"2", b"'destroyed'", b"0", None, b"20000")
    )
    assert row_of_reader == row.to_bytes(2)


def _check_golden(known: dict[str, Any], archive: Archive) -> None:
    rows = {bytes.fromhex(row["key_id"]): row for row in known["rows"]}
    assert archive.states == {key_id: row["state"] for key_id, row in rows.items()}
    kept = {key_id: row for key_id, row in rows.items() if row["key"]}
    assert archive.labels == {key_id: row["label"] for key_id, row in kept.items()}
    assert {key_id: key.hex() for key_id, key in archive.keys.items()} == {
        key_id: row["key"] for key_id, row in kept.items()
    }
    assert {name: key.hex() for name, key in archive.services.items()} == known["services"]
    purposes = {key_id: row.get("purpose", "image") for key_id, row in rows.items()}
    assert archive.purposes == purposes
    assert [archive.audit_log[0], archive.audit_log[1].hex()] == known.get("audit", [0, 64 * "0"])


@pytest.mark.parametrize("number", [2, 3])
def test_the_reader_opens_the_golden_archive(tmp_path: Path, number: int) -> None:
    known = json.loads((GOLDEN / f"archive_v{number}.json").read_text("utf-8"))
    archive = Archive(tmp_path / "k.db", _from_sql(known, tmp_path / "k.db"))
    _check_golden(known, archive)
    content = bytes.fromhex(known["file"])
    opened = archive.open_file(content)
    assert opened["pixels"].hex() == known["pixels"]
    assert opened["size"] == (known["width"], known["height"])
    assert list(opened["original"]) == known["original_size"]
    assert opened["source"].hex() == known["source_sha256"]
    assert archive.labels[opened["key_id"]] == "set/1"
    assert archive.file_name(known["dataset"], opened["path"]) == known["file_name"]
    digest = hashlib.sha256(content).hexdigest()
    manifest = archive.manifest(bytes.fromhex(known["manifest"]))
    assert manifest == {"dataset": known["dataset"], "files": {known["file_name"]: digest}}
    exported = open_export(bytes.fromhex(known["export"]), known["passphrase"])
    assert exported["subject"] == known["exported_subject"]
    for entry in exported["keys"]:
        key_id = bytes.fromhex(entry["key_id"])
        assert archive.keys[key_id].hex() == entry["key"]
        assert archive.purposes[key_id] == entry.get("purpose", "image")


@pytest.mark.parametrize("number", [2, 3])
def test_this_program_opens_the_golden_archive(tmp_path: Path, number: int) -> None:
    known = json.loads((GOLDEN / f"archive_v{number}.json").read_text("utf-8"))
    master, folder = tmp_path / "m.key", tmp_path / "sealed"
    folder.mkdir()
    master.touch(0o600)
    master.write_bytes(_from_sql(known, tmp_path / "k.db"))
    (folder / known["file_name"]).write_bytes(bytes.fromhex(known["file"]))
    (folder / MANIFEST_NAME).write_bytes(bytes.fromhex(known["manifest"]))
    with Keyring.open(tmp_path / "k.db", KeyFile(master)) as keyring:
        sealed = decode(bytes.fromhex(known["file"]))
        opened = open_image(keyring.opening_key(sealed.chunk), sealed)
        assert opened.pixels.tobytes().hex() == known["pixels"]
        assert opened.metadata.path == known["path"]
        assert keyring.file_name(known["dataset"], known["path"]) == known["file_name"]
        if number == 3:
            count, digest = keyring.audit_state()
            assert [count, digest.hex()] == known["audit"]
            public_key = keyring.signing_key().public_key().public_bytes_raw()
            assert public_key.hex() == known["public_key"]
            assert keyring.audit_key().hex() == known["services"]["audit"]
        rows = [
            {
                "key_id": row.key_id.hex(),
                "label": keyring.label_of(row),
                "state": row.state,
                **({"purpose": row.purpose, "used_day": row.used_day} if number == 3 else {}),
                "imported": row.imported,
                "key": None if row.wrapped is None else keyring.unwrap(row).hex(),
            }
            for row in keyring.rows
        ]
        assert rows == sorted(known["rows"], key=lambda row: row["key_id"])
        if number == 3:
            audit.restart(keyring)  # the entries of the golden keyring are not stored
    keys = ["--keyring", str(tmp_path / "k.db"), "--master", str(master)]
    assert protect_tool.main(["verify", str(folder), *keys]) == 0


def test_reader_and_program_open_the_golden_index(tmp_path: Path) -> None:
    known = json.loads((GOLDEN / "index_v1.json").read_text("utf-8"))
    archive_v3 = json.loads((GOLDEN / "archive_v3.json").read_text("utf-8"))
    master = tmp_path / "m.key"
    master.touch(0o600)
    master.write_bytes(_from_sql(archive_v3, tmp_path / "k.db"))
    content, network = bytes.fromhex(known["segment"]), bytes.fromhex(known["network"])
    expected = [
        (network, bytes.fromhex(vector["digest"]), tuple(vector["values"]))
        for vector in known["vectors"]
    ]
    assert Archive(tmp_path / "k.db", master.read_bytes()).index(content) == expected
    (tmp_path / known["name"]).write_bytes(content)
    with Keyring.open(tmp_path / "k.db", KeyFile(master)) as keyring:
        (segment,) = read_segments(tmp_path, keyring)
        keys = VectorKeys(keyring)
        opened = [
            (
                segment.network,
                entry[:32],
                tuple(np.frombuffer(keys.open(segment, entry, text), "<f2")),
            )
            for entry, text in segment.vectors()
        ]
        assert opened == expected
        assert [entry[32:48].hex() for entry in segment.entries()] == [
            vector["key_id"] for vector in known["vectors"]
        ]


def test_the_reader_opens_format_1(tmp_path: Path) -> None:
    known = json.loads((GOLDEN / "keyring_v1.json").read_text("utf-8"))
    archive = Archive(tmp_path / "k.db", _from_sql(known, tmp_path / "k.db"))
    for key_id, key in known["keys"].values():
        assert archive.keys[bytes.fromhex(key_id)].hex() == key
    assert archive.file_name("set", "a/b.jpg") == known["file_name"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_reader_opens_all_that_this_program_writes(
    make_cfg: Callable[..., CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tiny.install(monkeypatch)
    scene = make_scene(make_cfg, tmp_path)
    phrase = Passphrase("cr\u00e8me br\u00fbl\u00e9e", CHEAP)
    assert protect_tool.main(scene.protect("--subject-from", "folder", "--index")) == 0
    with scene.keyring() as keyring:
        key_ids = {row.key_id: keyring.label_of(row) for row in keyring.rows}
        tags = {label: keyring.subject_tag(label) for label in key_ids.values() if label}
        (gone,) = keyring.rows_of("photos/0003")
        keyring_admin.rotate(keyring, "photos/0001")
        keyring_admin.destroy(keyring, "photos/0003")
        export_subject(keyring, "photos/0001", tmp_path / "one.keys", phrase)
        keyring_admin.rekey(keyring, phrase)
        opened = {file.path.name: file for file in unseal(scene.files, keyring.opening_key)}
        manifest = Manifest.load(scene.sealed, keyring.manifest_key())
        assert manifest is not None
        if number < 3:
            to_format(number, keyring)
        else:
            keyring.ensure(["photos/0001"], "original")
    archive = Archive(scene.keyring_path, phrase.text)
    content = archive.manifest((scene.sealed / MANIFEST_NAME).read_bytes())
    assert content["files"] == manifest.files
    for path in scene.files:
        stored = path.read_bytes()
        assert hashlib.sha256(stored).hexdigest() == content["files"][path.name]
        image = opened[path.name].image
        if image is None:  # the key of its subject was destroyed
            with pytest.raises(KeyError):
                archive.open_file(stored)
            continue
        read = archive.open_file(stored)
        assert read["pixels"] == image.pixels.tobytes()
        assert read["path"] == image.metadata.path
        assert read["source"] == image.metadata.source_sha256
        assert archive.labels[read["key_id"]] == key_ids[read["key_id"]]
        assert archive.tag(archive.labels[read["key_id"]]) == tags[archive.labels[read["key_id"]]]
        assert archive.file_name("photos", read["path"]) == path.name
    assert archive.states[gone.key_id] == "destroyed"
    (segment,) = scene.sealed.glob("index-*.ised")
    vectors = archive.index(segment.read_bytes())
    assert {digest.hex() for _, digest, _ in vectors} == set(content["files"].values())
    for _, digest, values in vectors:
        (name,) = [name for name, value in content["files"].items() if value == digest.hex()]
        if opened[name].image is None:
            assert values is None
        else:
            assert sum(value**2 for value in values or ()) == pytest.approx(1, abs=0.01)
    exported = open_export((tmp_path / "one.keys").read_bytes(), phrase.text)
    assert {bytes.fromhex(entry["key_id"]) for entry in exported["keys"]} <= set(archive.keys)


def test_the_reader_notices_changed_rows(tmp_path: Path) -> None:
    with Keyring.create(tmp_path / "k.db", KeyFile(tmp_path / "m.key")) as keyring:
        keyring.ensure(["set/1", "set/2"])
    connection = sqlite3.connect(tmp_path / "k.db")
    connection.execute("DELETE FROM keys WHERE rowid = 1")
    connection.commit()
    connection.close()
    with pytest.raises(AssertionError, match="rows were changed"):
        Archive(tmp_path / "k.db", (tmp_path / "m.key").read_bytes())


def _section(heading: str) -> str:
    """Return a section of the document."""
    text = (ROOT / "docs/FORMAT.md").read_text("utf-8")
    return text[text.index(f"## {heading}") :].split("\n## ", 1)[0]


def test_the_reader_and_this_program_read_the_audit_log_of_the_document() -> None:
    section = _section("What is in an audit log?")
    (digest,) = re.findall("its hash `([0-9a-f]{64})`", section)
    (line,) = re.findall('^[0-9a-f]{64} {"entry".*', section, re.M)
    (entry,) = format_reader.read_audit_log(f"{line}\n".encode(), KEY, 1, bytes.fromhex(digest))
    assert entry["command"] == "keyring list"
    assert audit.authentic_entry(derive_key(KEY, "audit entry"), line.encode()) == entry
    assert audit.line_hash(line.encode()).hex() == digest


def test_the_reader_reads_the_audit_log_that_this_program_writes(tmp_path: Path) -> None:
    path = tmp_path / "k.db"
    with Keyring.create(path, KeyFile(tmp_path / "m.key")) as keyring:
        for name in ("one", "two"):
            with audit.recorded(keyring, name):
                keyring.sealing_key("set/1")
    archive = Archive(path, (tmp_path / "m.key").read_bytes())
    count, last = archive.audit_log
    content = audit.log_path(path).read_bytes()
    entries = format_reader.read_audit_log(content, archive.services["audit"], count, last)
    assert [entry["event"] for entry in entries] == ["begin", "end"] * 2
    (key_id,) = archive.keys
    assert entries[1]["keys"] == {key_id.hex(): 1}
    with pytest.raises(AssertionError):
        changed = content.replace(b"one", b"eno")
        format_reader.read_audit_log(changed, archive.services["audit"], count, last)


def test_the_reader_and_this_program_combine_the_shares_of_the_document() -> None:
    section = _section("What is in a share of a master key?")
    (text,) = re.findall("```\n(SecureReID share.*?)```", section, re.S)
    share = Share.parse(text.encode(), "the document")
    first = replace(share, number=1, value=bytes([0x40] * 32))
    assert combine([first, share]) == KEY
    assert format_reader.combine_shares([first.to_text(), text]) == KEY


def test_the_reader_combines_the_shares_that_this_program_writes() -> None:
    key = os.urandom(32)
    shares = split(key, 3, 5)
    for chosen in combinations(shares, 3):
        assert format_reader.combine_shares([share.to_text() for share in chosen]) == key
