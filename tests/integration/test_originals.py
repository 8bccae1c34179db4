"""Sealed source files: keeping, revealing and erasing them, and answers to access requests."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from PIL import Image

from engine.vault import keyring_admin, reading, reveal, sealing_work
from engine.vault.audit_reader import AuditLog, commands
from engine.vault.keyring import Keyring
from engine.vault.keyring_rows import ORIGINAL
from engine.vault.master import Passphrase
from engine.vault.reading import read_image
from modeling.encryption.sealed_image import Metadata, new_file_key
from modeling.encryption.sealed_original import seal_original
from tests.fixtures.format_reader import Archive, open_original
from tests.fixtures.keyrings import CHEAP
from tests.fixtures.protection import PEOPLE, Scene, draw
from tools import keyring as keyring_tool
from tools.protect import main

COUNT = sum(PEOPLE.values())


# ---- keep and reveal --------------------------------------------------------------------------


def test_originals_return_bit_for_bit(kept: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(kept.originals()) == COUNT + 1
    assert main(kept.verify()) == 0
    assert f"{2 * COUNT + 2} good, 0 failed" in capsys.readouterr().out
    assert main(kept.reveal()) == 0
    assert kept.revealed_files() == kept.source_files()
    with Image.open(kept.out / "0003/0003_c3.jpg") as image:
        assert image.getexif()[0x010F] == "a camera"
    for path in kept.out.rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 == 0o600
    assert kept.out.stat().st_mode & 0o777 == 0o700
    contents = kept.contents()
    assert contents["subject"] is None
    assert contents["finished"] is True
    assert {entry["file"]: entry["content"] for entry in contents["files"]} == dict.fromkeys(
        kept.source_files(), "original"
    )
    before = {path: path.stat().st_ino for path in kept.out.rglob("*.png")}
    assert main(kept.reveal()) == 0  # the same files count as written
    assert before == {path: path.stat().st_ino for path in kept.out.rglob("*.png")}


def test_the_second_reader_opens_originals(kept: Scene) -> None:
    archive = Archive(kept.keyring_path, kept.master.path.read_bytes())
    sources = kept.source_files()
    for path in kept.originals():
        opened = open_original(archive, path.read_bytes(), path.stem)
        assert opened["content"] == sources.pop(opened["path"])
        assert archive.purposes[opened["key_id"]] == ORIGINAL
        assert archive.file_name("photos", opened["path"]) == f"{path.stem}.png"
    assert sources == {}


def test_originals_are_not_kept_by_default(sealed: Scene) -> None:
    assert sealed.originals() == []
    with sealed.keyring() as keyring:
        assert {row.purpose for row in keyring.rows} == {"image"}


def test_nothing_of_an_original_shows_without_keys(kept: Scene) -> None:
    for path in kept.originals():
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_mtime == 0
        content = path.read_bytes()
        assert b"PNG" not in content
        assert len(content) in range(400, 8000)
    heads = [path.read_bytes()[:88] for path in kept.originals()]
    for start, stop in ((8, 40), (40, 56), (56, 88)):
        assert len({head[start:stop] for head in heads}) == COUNT + 1


def test_one_file_is_revealed_from_either_of_its_two_names(kept: Scene) -> None:
    for index, path in enumerate(kept.pair("0002/0002_c1.png")):
        out = kept.root / f"one{index}"
        assert main(["reveal", str(path), str(out), *kept.keys]) == 0
        assert [p.name for p in out.rglob("*.png")] == ["0002_c1.png"]


def test_another_file_of_the_folder_is_not_revealed(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = kept.sealed / "manifest.ised"
    assert main(["reveal", str(manifest), str(kept.out), *kept.keys]) == 1
    assert "contains no sealed files (*.png, *.original)" in capsys.readouterr().err
    assert not kept.out.exists()


def test_open_of_an_original_names_the_command_that_opens_it(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["open", str(kept.originals()[0]), str(kept.out), *kept.keys]) == 1
    assert "`protect reveal` opens it" in capsys.readouterr().err


def test_open_and_recover_ignore_originals(kept: Scene) -> None:
    assert main(["recover", str(kept.sealed), str(kept.out), *kept.keys, *kept.model]) == 0
    assert len(list(kept.out.rglob("*.png"))) == COUNT + 1
    assert (kept.out / "0001/0001_c1.png").read_bytes() != kept.source_files()["0001/0001_c1.png"]


# ---- access requests --------------------------------------------------------------------------


def test_one_subject_is_revealed_and_nothing_else(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    label = kept.root / "label.txt"
    label.write_text("photos/0001\n")
    kept.pair("0001/0001_c2.png")[1].unlink()  # no original was kept
    kept.pair("0001/0001_c3.png")[0].unlink()  # only the original is left
    assert main(kept.accept()) == 5
    capsys.readouterr()
    assert main(kept.reveal("--subject-file", str(label))) == 0
    names = {f"0001/0001_c{index}.png" for index in (1, 2, 3)}
    assert set(kept.revealed_files()) == names
    for name in names - {"0001/0001_c2.png"}:
        assert kept.revealed_files()[name] == kept.source_files()[name]
    assert "2 original, 0 recovered, 1 anonymized, 0 failed" in capsys.readouterr().out
    contents = kept.contents()
    assert contents["subject"] == "photos/0001"
    assert {entry["source"]: entry["content"] for entry in contents["files"]} == {
        "0001/0001_c1.png": "original",
        "0001/0001_c2.png": "anonymized",
        "0001/0001_c3.png": "original",
    }
    assert main(kept.reveal("--subject", "photos/0001", *kept.model)) == 1  # other content is kept
    assert main(kept.reveal("--subject", "photos/0001", *kept.model, "--overwrite")) == 0
    assert "recovered" in {entry["content"] for entry in kept.contents()["files"]}


@pytest.mark.parametrize("suffix", [".png", ".original"])
def test_a_file_exchanged_during_the_command_is_not_revealed(
    kept: Scene, suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = (kept.pair(f"{name}_c1.png") for name in ("0001/0001", "0002/0002"))
    index = suffix == ".original"
    if not index:
        own[1].unlink()

    def exchanged(path: Path, keyring: Keyring) -> bytes:
        key_id = reading.key_id_of(path, keyring)
        if path == own[index] and not index:
            shutil.copy2(other[0], path)
        elif path == own[index]:  # only its own name opens an original
            source = kept.source_files()["0002/0002_c1.png"]
            digest = hashlib.sha256(source).digest()
            key = new_file_key(keyring.sealing_key("photos/0002", ORIGINAL))
            metadata = Metadata("0002/0002_c1.png", digest)
            own[0].unlink()
            path.write_bytes(seal_original(key, source, metadata, path.stem))
        return key_id

    monkeypatch.setattr(reveal, "key_id_of", exchanged)
    assert main(kept.reveal("--subject", "photos/0001")) == 5
    assert "was exchanged for the file of another subject" in capsys.readouterr().err
    assert not any(name.startswith("0002") for name in kept.revealed_files())


def test_each_file_is_counted_once_in_the_audit_log(kept: Scene) -> None:
    assert main(kept.verify()) == 0
    with kept.keyring() as keyring:
        *_, last = commands(AuditLog(keyring))
    assert (last.command, last.files) == ("protect verify", 2 * (COUNT + 1))


def test_two_subjects_never_share_an_output_folder(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(kept.reveal("--subject", "photos/0001")) == 0
    before = kept.revealed_files()
    for more in (["--subject", "photos/0002"], []):
        assert main(kept.reveal(*more)) == 2
        assert "choose an empty output folder" in capsys.readouterr().err
    assert kept.revealed_files() == before


def test_a_subject_without_files_has_an_empty_list_and_an_unknown_one_is_an_error(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with kept.keyring() as keyring:
        keyring.ensure(["photos/none"])
    assert main(kept.reveal("--subject", "photos/none")) == 0
    assert kept.contents()["files"] == []
    capsys.readouterr()
    assert main(kept.reveal("--subject", "photos/typo")) == 1
    assert "MissingKey" in capsys.readouterr().err


def test_a_file_that_may_be_the_subjects_is_an_error(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged header hides whose file it is, so the answer may be incomplete."""
    image, original = kept.pair("0002/0002_c1.png")
    for path in (image, original):
        content = bytearray(path.read_bytes())
        content[50 if path is image else 10] ^= 1
        path.write_bytes(content)
    assert main(kept.reveal("--subject", "photos/0001")) == 1
    err = capsys.readouterr().err
    assert err.count("error:") == err.count("MissingKey") == 2
    assert len(kept.revealed_files()) == PEOPLE["0001"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_file_with_the_locator_of_another_file_is_an_error(
    kept: Scene, index: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its locator identifies another subject, so it would be missing in the answer."""
    pairs = [kept.pair(f"{name}_c1.png") for name in ("0001/0001", "0002/0002")]
    own, other = (pair[index] for pair in pairs)
    pairs[0][1 - index].unlink()
    assert main(kept.accept()) == 5
    capsys.readouterr()
    start = (49, 8)[index]
    content = bytearray(own.read_bytes())
    content[start : start + 48] = other.read_bytes()[start : start + 48]
    own.write_bytes(content)
    assert main(kept.reveal("--subject", "photos/0001")) == 5
    assert capsys.readouterr().err.count("its locator was changed") == 1
    with kept.keyring() as keyring:
        *_, last = commands(AuditLog(keyring))
    assert (last.subjects, last.failed) == (1, 1)  # comparing keys is not a use


def test_imported_keys_reveal_the_files_of_their_subject(kept: Scene) -> None:
    phrase, exported = Passphrase("correct horse", CHEAP), kept.root / "one.keys"
    with kept.keyring() as keyring:
        keyring_admin.export_subject(keyring, "photos/0001", exported, phrase)
    other = Scene(kept.root / "other")
    other.root.mkdir()
    shutil.copytree(kept.sealed, other.sealed)
    for path in other.sealed.iterdir():
        if path.stem not in {p.stem for n in (1, 2, 3) for p in kept.pair(f"0001/0001_c{n}.png")}:
            path.unlink()
    with Keyring.create(other.keyring_path, other.master) as keyring:
        keyring_admin.import_subject(keyring, exported, phrase)
    assert main(other.reveal("--subject", "photos/0001")) == 0
    assert len(other.revealed_files()) == PEOPLE["0001"]
    assert other.revealed_files().items() <= kept.source_files().items()


# ---- keys -------------------------------------------------------------------------------------


def test_destroying_the_keys_of_originals_makes_a_folder_irreversible_again(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    for person in PEOPLE:
        command = ["destroy", f"photos/{person}", "--original-only", "--yes"]
        assert keyring_tool.main([*kept.keys, *command]) == 0
    capsys.readouterr()
    assert main(kept.reveal()) == 1
    captured = capsys.readouterr()
    assert captured.err.count("DestroyedKey") == COUNT + 1
    assert f"0 original, 0 recovered, {COUNT + 1} anonymized" in captured.out
    assert not set(kept.revealed_files().values()) & set(kept.source_files().values())
    assert main(["open", str(kept.sealed), str(kept.root / "opened"), *kept.keys]) == 0
    assert main(kept.protect()) == 0  # the images are present
    assert main(kept.protect("--keep-original")) == 1  # no new key by accident
    for path in kept.originals():
        path.unlink()
    assert main(["verify", str(kept.sealed), *kept.keys, "--accept"]) == 5  # missing files
    assert main(kept.verify()) == 0


@pytest.mark.parametrize("left", [[], [".original"]], ids=["nothing", "originals"])
def test_a_folder_without_images_is_accepted(kept: Scene, left: list[str]) -> None:
    """An erasure may leave nothing, and the manifest must not list its files for ever."""
    for path in kept.sealed.iterdir():
        if path.name != "manifest.ised" and path.suffix not in left:
            path.unlink()
    assert main(kept.accept()) == 5
    assert main(kept.verify()) == 0
    (kept.sealed / "manifest.ised").unlink()
    assert main(kept.accept()) == 1
    assert (kept.sealed / "manifest.ised").exists() == bool(left)


def test_revoked_keys_reveal_nothing_until_they_are_allowed_again(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with kept.keyring() as keyring:
        keyring_admin.revoke(keyring, "photos/0002")
    assert main(kept.reveal()) == 1
    assert capsys.readouterr().err.count("RevokedKey") == 2 * PEOPLE["0002"]
    assert not [name for name in kept.revealed_files() if name.startswith("0002/")]
    with kept.keyring() as keyring:
        keyring_admin.restore(keyring, "photos/0002")
    assert main(kept.reveal()) == 0
    assert kept.revealed_files() == kept.source_files()


def test_destroying_a_subject_destroys_its_originals(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with kept.keyring() as keyring:
        keyring_admin.destroy(keyring, "photos/0001")
    assert main(kept.reveal("--subject", "photos/0001")) == 1
    assert capsys.readouterr().err.count("DestroyedKey") == 2 * PEOPLE["0001"]
    assert kept.revealed_files() == {}
    assert {"error"} < set(kept.contents()["files"][0])


# ---- protect runs on existing folders -----------------------------------------------------------


def test_a_second_run_completes_missing_originals_and_images(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in kept.sealed.iterdir()}
    kept.pair("0001/0001_c1.png")[0].unlink()
    kept.pair("0001/0001_c2.png")[1].unlink()
    for path in kept.pair("0002/0002_c1.png"):
        path.unlink()
    assert main(kept.protect("--keep-original")) == 0
    out = capsys.readouterr().out
    assert f"2 sealed, {COUNT - 1} already present, 0 failed" in out
    assert "2 originals sealed: their keys open the photographs themselves" in out
    assert main(kept.verify()) == 0
    after = {path.name: path.read_bytes() for path in kept.sealed.iterdir()}
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in before) == 5  # with the manifest
    assert main(kept.reveal()) == 0
    assert kept.revealed_files() == kept.source_files()


def test_overwrite_replaces_both_files(kept: Scene) -> None:
    before = {path: path.read_bytes() for path in (*kept.files, *kept.originals())}
    draw(kept.photos / "0001/0001_c1.png", 99)
    assert main(kept.protect("--keep-original", "--overwrite")) == 0
    assert all(path.read_bytes() != content for path, content in before.items())
    assert main(kept.verify()) == 0
    assert main(kept.reveal()) == 0
    assert kept.revealed_files() == kept.source_files()


def test_an_image_is_not_replaced_next_to_an_older_original(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in kept.files}
    assert main(kept.protect("--overwrite")) == 1
    err = capsys.readouterr().err
    assert err.count("give --keep-original too, or delete it") == COUNT + 1
    assert {path: path.read_bytes() for path in kept.files} == before
    assert main(kept.verify()) == 0


@pytest.mark.parametrize("deleted", ["nothing", "image"])
def test_an_original_of_another_version_is_kept_and_reported(
    kept: Scene, deleted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image, original = kept.pair("0001/0001_c1.png")
    draw(kept.photos / "0001/0001_c1.png", 99)
    if deleted == "image":
        image.unlink()
    before = original.read_bytes()
    assert main(kept.protect("--keep-original")) == 1
    assert "was made from another version" in capsys.readouterr().err
    assert original.read_bytes() == before


def test_an_original_of_another_subject_is_kept_and_reported(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    image, original = kept.pair("0001/0001_c1.png")
    source = kept.source_files()["0001/0001_c1.png"]
    with kept.keyring() as keyring:
        metadata = read_image(image, keyring.opening_key)[0].metadata
        key = new_file_key(keyring.sealing_key("photos/0002", ORIGINAL))
    original.write_bytes(seal_original(key, source, metadata, original.stem))
    assert main(kept.protect("--keep-original")) == 1
    assert "was sealed for another subject" in capsys.readouterr().err


def test_a_source_that_changes_during_the_run_is_reported(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, calls = sealing_work.read_bytes, []

    def changed(path: Path) -> bytes:
        calls.append(path)
        return read(path) + b"\0" * (len(calls) > COUNT)

    monkeypatch.setattr(sealing_work, "read_bytes", changed)
    assert main(scene.protect("--keep-original")) == 1
    assert capsys.readouterr().err.count("was changed while it was sealed") == COUNT
    assert scene.files == scene.originals() == []
