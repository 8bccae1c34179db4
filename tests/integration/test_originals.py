"""Sealed source files: keeping, revealing and erasing them, and answers to access requests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.vault import keyring_admin, reading, reveal, sealing_work
from engine.vault.audit_reader import AuditLog, commands
from engine.vault.keyring import Keyring
from engine.vault.keyring_rows import ORIGINAL
from engine.vault.master import Passphrase
from engine.vault.reading import original_name, read_image
from modeling.encryption.sealed_image import Metadata, new_file_key
from modeling.encryption.sealed_original import seal_original
from tests.fixtures.format_reader import Archive, open_original
from tests.fixtures.keyrings import CHEAP
from tests.fixtures.protection import PEOPLE, Scene, draw
from tools import keyring as keyring_tool
from tools.protect import main

COUNT = sum(PEOPLE.values())
_TEMPLATES: list[Scene] = []


@pytest.fixture
def kept(sealed: Scene, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Return a scene with sealed images and originals; one source is a JPEG file with EXIF data."""
    if not _TEMPLATES:
        template = Scene(tmp_path_factory.mktemp("kept") / "scene")
        shutil.copytree(sealed.root, template.root, symlinks=True)
        exif = Image.Exif()
        exif[0x010F] = "a camera"
        draw(template.photos / "0003/0003_c3.png", 40)
        with Image.open(template.photos / "0003/0003_c3.png") as image:
            image.save(template.photos / "0003/0003_c3.jpg", exif=exif)
        (template.photos / "0003/0003_c3.png").unlink()
        assert main(template.protect("--keep-original")) == 0
        _TEMPLATES.append(template)
    shutil.rmtree(sealed.root)
    shutil.copytree(_TEMPLATES[0].root, sealed.root, symlinks=True)
    return sealed


def _originals(scene: Scene) -> list[Path]:
    return sorted(scene.sealed.glob("*.original"))


def _reveal(scene: Scene, *more: str) -> int:
    return main(["reveal", str(scene.sealed), str(scene.out), *scene.keys, *more])


def _verify(scene: Scene) -> int:
    return main(["verify", str(scene.sealed), *scene.keys])


def _contents(scene: Scene) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((scene.out / "contents.json").read_text("utf-8"))
    return contents


def _sources(scene: Scene) -> dict[str, bytes]:
    files = (path for path in scene.photos.rglob("*") if path.is_file())
    return {path.relative_to(scene.photos).as_posix(): path.read_bytes() for path in files}


def _revealed(scene: Scene) -> dict[str, bytes]:
    files = (path for path in scene.out.rglob("*") if path.is_file())
    names = {path.relative_to(scene.out).as_posix(): path.read_bytes() for path in files}
    del names["contents.json"]
    return names


def _pair(scene: Scene, path: str) -> tuple[Path, Path]:
    """Return the sealed image and the original of a source."""
    with scene.keyring() as keyring:
        name = keyring.file_name("photos", path)
    return scene.sealed / name, scene.sealed / original_name(name)


# ---- keep and reveal --------------------------------------------------------------------------


def test_originals_return_bit_for_bit(kept: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(_originals(kept)) == COUNT + 1
    assert _verify(kept) == 0
    assert f"{2 * COUNT + 2} good, 0 failed" in capsys.readouterr().out
    assert _reveal(kept) == 0
    assert _revealed(kept) == _sources(kept)
    with Image.open(kept.out / "0003/0003_c3.jpg") as image:
        assert image.getexif()[0x010F] == "a camera"
    for path in kept.out.rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 == 0o600
    assert kept.out.stat().st_mode & 0o777 == 0o700
    contents = _contents(kept)
    assert contents["subject"] is None
    assert contents["finished"] is True
    assert {entry["file"]: entry["content"] for entry in contents["files"]} == dict.fromkeys(
        _sources(kept), "original"
    )
    before = {path: path.stat().st_ino for path in kept.out.rglob("*.png")}
    assert _reveal(kept) == 0  # the same files count as written
    assert before == {path: path.stat().st_ino for path in kept.out.rglob("*.png")}


def test_the_second_reader_opens_originals(kept: Scene) -> None:
    archive = Archive(kept.keyring_path, kept.master.path.read_bytes())
    sources = _sources(kept)
    for path in _originals(kept):
        opened = open_original(archive, path.read_bytes(), path.stem)
        assert opened["content"] == sources.pop(opened["path"])
        assert archive.purposes[opened["key_id"]] == ORIGINAL
        assert archive.file_name("photos", opened["path"]) == f"{path.stem}.png"
    assert sources == {}


def test_originals_are_not_kept_by_default(sealed: Scene) -> None:
    assert _originals(sealed) == []
    with sealed.keyring() as keyring:
        assert {row.purpose for row in keyring.rows} == {"image"}


def test_nothing_of_an_original_shows_without_keys(kept: Scene) -> None:
    for path in _originals(kept):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_mtime == 0
        content = path.read_bytes()
        assert b"PNG" not in content
        assert len(content) in range(400, 8000)
    heads = [path.read_bytes()[:88] for path in _originals(kept)]
    for start, stop in ((8, 40), (40, 56), (56, 88)):
        assert len({head[start:stop] for head in heads}) == COUNT + 1


def test_one_file_is_revealed_from_either_of_its_two_names(kept: Scene) -> None:
    for index, path in enumerate(_pair(kept, "0002/0002_c1.png")):
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
    assert main(["open", str(_originals(kept)[0]), str(kept.out), *kept.keys]) == 1
    assert "`protect reveal` opens it" in capsys.readouterr().err


def test_open_and_recover_ignore_originals(kept: Scene) -> None:
    assert main(["recover", str(kept.sealed), str(kept.out), *kept.keys, *kept.model]) == 0
    assert len(list(kept.out.rglob("*.png"))) == COUNT + 1
    assert (kept.out / "0001/0001_c1.png").read_bytes() != _sources(kept)["0001/0001_c1.png"]


# ---- access requests --------------------------------------------------------------------------


def test_one_subject_is_revealed_and_nothing_else(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    label = kept.root / "label.txt"
    label.write_text("photos/0001\n")
    _pair(kept, "0001/0001_c2.png")[1].unlink()  # no original was kept
    _pair(kept, "0001/0001_c3.png")[0].unlink()  # only the original is left
    assert _reveal(kept, "--subject-file", str(label)) == 0
    names = {f"0001/0001_c{index}.png" for index in (1, 2, 3)}
    assert set(_revealed(kept)) == names
    for name in names - {"0001/0001_c2.png"}:
        assert _revealed(kept)[name] == _sources(kept)[name]
    assert "2 original, 0 recovered, 1 anonymized, 0 failed" in capsys.readouterr().out
    contents = _contents(kept)
    assert contents["subject"] == "photos/0001"
    assert {entry["source"]: entry["content"] for entry in contents["files"]} == {
        "0001/0001_c1.png": "original",
        "0001/0001_c2.png": "anonymized",
        "0001/0001_c3.png": "original",
    }
    assert _reveal(kept, "--subject", "photos/0001", *kept.model) == 1  # other content is kept
    assert _reveal(kept, "--subject", "photos/0001", *kept.model, "--overwrite") == 0
    assert "recovered" in {entry["content"] for entry in _contents(kept)["files"]}


@pytest.mark.parametrize("suffix", [".png", ".original"])
def test_a_file_exchanged_during_the_command_is_not_revealed(
    kept: Scene, suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = (_pair(kept, f"{name}_c1.png") for name in ("0001/0001", "0002/0002"))
    index = suffix == ".original"
    if not index:
        own[1].unlink()

    def exchanged(path: Path, keyring: Keyring) -> bytes:
        key_id = reading.key_id_of(path, keyring)
        if path == own[index] and not index:
            shutil.copy2(other[0], path)
        elif path == own[index]:  # only its own name opens an original
            source = _sources(kept)["0002/0002_c1.png"]
            digest = hashlib.sha256(source).digest()
            key = new_file_key(keyring.sealing_key("photos/0002", ORIGINAL))
            metadata = Metadata("0002/0002_c1.png", digest)
            own[0].unlink()
            path.write_bytes(seal_original(key, source, metadata, path.stem))
        return key_id

    monkeypatch.setattr(reveal, "key_id_of", exchanged)
    assert _reveal(kept, "--subject", "photos/0001") == 5
    assert "was exchanged for the file of another subject" in capsys.readouterr().err
    assert not any(name.startswith("0002") for name in _revealed(kept))


def test_each_file_is_counted_once_in_the_audit_log(kept: Scene) -> None:
    assert _verify(kept) == 0
    with kept.keyring() as keyring:
        *_, last = commands(AuditLog(keyring))
    assert (last.command, last.files) == ("protect verify", 2 * (COUNT + 1))


def test_two_subjects_never_share_an_output_folder(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _reveal(kept, "--subject", "photos/0001") == 0
    before = _revealed(kept)
    for more in (["--subject", "photos/0002"], []):
        assert _reveal(kept, *more) == 2
        assert "choose an empty output folder" in capsys.readouterr().err
    assert _revealed(kept) == before


def test_a_subject_without_files_has_an_empty_list_and_an_unknown_one_is_an_error(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with kept.keyring() as keyring:
        keyring.ensure(["photos/none"])
    assert _reveal(kept, "--subject", "photos/none") == 0
    assert _contents(kept)["files"] == []
    capsys.readouterr()
    assert _reveal(kept, "--subject", "photos/typo") == 1
    assert "MissingKey" in capsys.readouterr().err


def test_a_file_that_may_be_the_subjects_is_an_error(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged header hides whose file it is, so the answer may be incomplete."""
    image, original = _pair(kept, "0002/0002_c1.png")
    for path in (image, original):
        content = bytearray(path.read_bytes())
        content[50 if path is image else 10] ^= 1
        path.write_bytes(content)
    assert _reveal(kept, "--subject", "photos/0001") == 1
    err = capsys.readouterr().err
    assert err.count("error:") == err.count("MissingKey") == 2
    assert len(_revealed(kept)) == PEOPLE["0001"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_file_with_the_locator_of_another_file_is_an_error(
    kept: Scene, index: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its locator identifies another subject, so it would be missing in the answer."""
    pairs = [_pair(kept, f"{name}_c1.png") for name in ("0001/0001", "0002/0002")]
    own, other = (pair[index] for pair in pairs)
    pairs[0][1 - index].unlink()
    start = (49, 8)[index]
    content = bytearray(own.read_bytes())
    content[start : start + 48] = other.read_bytes()[start : start + 48]
    own.write_bytes(content)
    assert _reveal(kept, "--subject", "photos/0001") == 5
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
        if path.stem not in {p.stem for n in (1, 2, 3) for p in _pair(kept, f"0001/0001_c{n}.png")}:
            path.unlink()
    with Keyring.create(other.keyring_path, other.master) as keyring:
        keyring_admin.import_subject(keyring, exported, phrase)
    assert _reveal(other, "--subject", "photos/0001") == 0
    assert len(_revealed(other)) == PEOPLE["0001"]
    assert _revealed(other).items() <= _sources(kept).items()


# ---- keys -------------------------------------------------------------------------------------


def test_destroying_the_keys_of_originals_makes_a_folder_irreversible_again(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    for person in PEOPLE:
        command = ["destroy", f"photos/{person}", "--original-only", "--yes"]
        assert keyring_tool.main([*kept.keys, *command]) == 0
    capsys.readouterr()
    assert _reveal(kept) == 1
    captured = capsys.readouterr()
    assert captured.err.count("DestroyedKey") == COUNT + 1
    assert f"0 original, 0 recovered, {COUNT + 1} anonymized" in captured.out
    assert not set(_revealed(kept).values()) & set(_sources(kept).values())
    assert main(["open", str(kept.sealed), str(kept.root / "opened"), *kept.keys]) == 0
    assert main(kept.protect()) == 0  # the images are present
    assert main(kept.protect("--keep-original")) == 1  # no new key by accident
    for path in _originals(kept):
        path.unlink()
    assert main(["verify", str(kept.sealed), *kept.keys, "--accept"]) == 5  # missing files
    assert _verify(kept) == 0


def test_revoked_keys_reveal_nothing_until_they_are_allowed_again(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with kept.keyring() as keyring:
        keyring_admin.revoke(keyring, "photos/0002")
    assert _reveal(kept) == 1
    assert capsys.readouterr().err.count("RevokedKey") == 2 * PEOPLE["0002"]
    assert not [name for name in _revealed(kept) if name.startswith("0002/")]
    with kept.keyring() as keyring:
        keyring_admin.restore(keyring, "photos/0002")
    assert _reveal(kept) == 0
    assert _revealed(kept) == _sources(kept)


def test_destroying_a_subject_destroys_its_originals(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with kept.keyring() as keyring:
        keyring_admin.destroy(keyring, "photos/0001")
    assert _reveal(kept, "--subject", "photos/0001") == 1
    assert capsys.readouterr().err.count("DestroyedKey") == 2 * PEOPLE["0001"]
    assert _revealed(kept) == {}
    assert {"error"} < set(_contents(kept)["files"][0])


# ---- protect runs on existing folders -----------------------------------------------------------


def test_a_second_run_completes_missing_originals_and_images(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in kept.sealed.iterdir()}
    _pair(kept, "0001/0001_c1.png")[0].unlink()
    _pair(kept, "0001/0001_c2.png")[1].unlink()
    for path in _pair(kept, "0002/0002_c1.png"):
        path.unlink()
    assert main(kept.protect("--keep-original")) == 0
    out = capsys.readouterr().out
    assert f"2 sealed, {COUNT - 1} already present, 0 failed" in out
    assert "2 originals sealed: their keys open the photographs themselves" in out
    assert _verify(kept) == 0
    after = {path.name: path.read_bytes() for path in kept.sealed.iterdir()}
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in before) == 5  # with the manifest
    assert _reveal(kept) == 0
    assert _revealed(kept) == _sources(kept)


def test_overwrite_replaces_both_files(kept: Scene) -> None:
    before = {path: path.read_bytes() for path in (*kept.files, *_originals(kept))}
    draw(kept.photos / "0001/0001_c1.png", 99)
    assert main(kept.protect("--keep-original", "--overwrite")) == 0
    assert all(path.read_bytes() != content for path, content in before.items())
    assert _verify(kept) == 0
    assert _reveal(kept) == 0
    assert _revealed(kept) == _sources(kept)


def test_an_image_is_not_replaced_next_to_an_older_original(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in kept.files}
    assert main(kept.protect("--overwrite")) == 1
    err = capsys.readouterr().err
    assert err.count("give --keep-original too, or delete it") == COUNT + 1
    assert {path: path.read_bytes() for path in kept.files} == before
    assert _verify(kept) == 0


@pytest.mark.parametrize("deleted", ["nothing", "image"])
def test_an_original_of_another_version_is_kept_and_reported(
    kept: Scene, deleted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image, original = _pair(kept, "0001/0001_c1.png")
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
    image, original = _pair(kept, "0001/0001_c1.png")
    source = _sources(kept)["0001/0001_c1.png"]
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
    assert scene.files == _originals(scene) == []


# ---- attacks ----------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path, Path], object], str, int]] = {
    "changed": (lambda one, two: _flip(one), "Tampered", 1),
    "truncated": (lambda one, two: os.truncate(one, 200), "FormatError", 1),
    "huge": (lambda one, two: os.truncate(one, 1 << 40), "FormatError", 1),
    "empty": (lambda one, two: os.truncate(one, 0), "FormatError", 1),
    "moved over another": (lambda one, two: one.rename(two), "Tampered", 2),
    "link": (lambda one, two: (one.unlink(), one.symlink_to(two)), "Tampered", 1),
    "deleted": (lambda one, two: one.unlink(), "Tampered", 1),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_changed_original_is_refused(
    kept: Scene, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (_pair(kept, f"0001/0001_c{index}.png")[1] for index in (1, 2))
    act, error, count = CHANGES[change]
    act(one, two)
    assert _verify(kept) in (1, 5)
    err = capsys.readouterr().err
    assert err.count(f"{error}: ") == err.count("error:") == count
    _reveal(kept)
    assert {
        name: content for name, content in _revealed(kept).items() if not name.startswith("0001/")
    } == {name: content for name, content in _sources(kept).items() if name[:5] != "0001/"}
    for name, content in _revealed(kept).items():
        with Image.open(kept.out / name) as image:  # an original, or the sealed image
            assert content == _sources(kept)[name] or image.size == (32, 64)


def test_an_old_original_next_to_a_new_image_is_refused(
    kept: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    _, original = _pair(kept, "0001/0001_c1.png")
    old = original.read_bytes()
    draw(kept.photos / "0001/0001_c1.png", 99)
    assert main(kept.protect("--keep-original", "--overwrite")) == 0
    original.write_bytes(old)
    assert _verify(kept) == 5
    assert _reveal(kept) == 5
    assert capsys.readouterr().err.count("the original of another version of the image") == 2
    assert main(["verify", str(kept.sealed), *kept.keys, "--accept"]) == 5
    assert _verify(kept) == 5  # it was not accepted


def test_hostile_paths_and_links_write_nothing_outside(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program with the key may seal such metadata."""
    scene.sealed.mkdir()
    paths = [
        "contents.json",
        "a/.profile",
        "contents.json/a.png",
        "link/a.png",
        "ok/a.png",
        "b.png",
    ]
    with scene.keyring() as keyring:
        key = keyring.sealing_key("photos/0001", ORIGINAL)
        for index, path in enumerate(paths):
            metadata = Metadata(path, hashlib.sha256(b"x").digest())
            stored = seal_original(new_file_key(key), b"x", metadata, f"{index}")
            (scene.sealed / f"{index}.original").write_bytes(stored)
    outside = scene.root / "outside"
    outside.mkdir()
    scene.out.mkdir()
    (scene.out / "link").symlink_to(outside)
    (outside / "b.png").write_bytes(b"kept")
    (scene.out / "b.png").symlink_to(outside / "b.png")
    assert _reveal(scene) == 1
    err = capsys.readouterr().err
    assert err.count("UnsafePath") == 3
    assert err.count("OutputBlocked") == 1
    assert err.count("OutputExists") == 1
    assert [path.name for path in outside.iterdir()] == ["b.png"]
    assert (outside / "b.png").read_bytes() == b"kept"
    assert set(_revealed(scene)) - {"b.png"} == {"ok/a.png"}
    assert _reveal(scene, "--overwrite") == 1  # replaces the link, not its target
    assert (scene.out / "b.png").read_bytes() == b"x"
    assert (outside / "b.png").read_bytes() == b"kept"


def test_an_original_does_not_replace_the_image_of_another_source(kept: Scene) -> None:
    """The image of x.jpg and the original of x.jpg.png have the same output name."""
    shutil.rmtree(kept.photos)
    shutil.rmtree(kept.sealed)
    draw(kept.photos / "1/a.jpg.png", 2)
    assert main(kept.protect("--keep-original")) == 0
    draw(kept.photos / "1/a.jpg", 1)
    assert main(kept.protect()) == 0
    assert _reveal(kept, "--overwrite") == 1
    assert _revealed(kept) == {"1/a.jpg.png": (kept.photos / "1/a.jpg.png").read_bytes()}
