"""The protect command from end to end, and every row of its error table."""

from __future__ import annotations

import errno
import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from yacs.config import CfgNode

from engine.api import Anonymizer
from engine.vault import keyring_admin
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile
from engine.vault.opening import _place
from engine.vault.sources import decode_source
from modeling.encryption import png_format
from modeling.encryption.cipher import quantize_pixels
from modeling.encryption.ised_errors import (
    BadInput,
    DestroyedKey,
    FormatError,
    IsedError,
    MissingKey,
    NotProtected,
    PathTooLong,
    RevokedKey,
    Tampered,
    TooLarge,
    UnsafePath,
    UnsupportedVersion,
    WrongKey,
)
from modeling.encryption.sealed_image import Metadata, open_image, seal_image
from tests.fixtures.protection import PEOPLE, Scene, draw, make_scene
from tests.fixtures.sealing import repaired
from tools.protect import main

COUNT = sum(PEOPLE.values())


_TEMPLATES: dict[str, Scene] = {}


@pytest.fixture
def sealed(
    make_cfg: Callable[..., CfgNode], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Scene:
    """Return a copy of a protected scene, which is made once."""
    if "sealed" not in _TEMPLATES:
        template = make_scene(make_cfg, tmp_path_factory.mktemp("template"))
        assert main(template.protect()) == 0
        _TEMPLATES["sealed"] = template
    shutil.copytree(_TEMPLATES["sealed"].root, tmp_path / "scene")
    return Scene(tmp_path / "scene")


@pytest.fixture
def scene(sealed: Scene) -> Scene:
    """Return a scene in which nothing was protected yet."""
    shutil.rmtree(sealed.sealed)
    sealed.keyring_path.unlink()
    Keyring.create(sealed.keyring_path, sealed.master).close()
    return sealed


def _error(capsys: pytest.CaptureFixture[str], kind: type[IsedError]) -> str:
    """Return the one error line, after checking its form."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    assert f"{kind.__name__}: " in lines[0]
    return lines[0]


# ---- what it is for ---------------------------------------------------------------------------


def test_protect_then_recover_is_what_the_networks_give(sealed: Scene) -> None:
    model = Anonymizer.from_checkpoint(sealed.checkpoint, device="cpu", precision="float32")
    assert len(sealed.files) == COUNT
    with sealed.keyring() as keyring:
        for path in sealed.files:
            picture = png_format.decode(path.read_bytes())
            opened = open_image(keyring.opening_key(picture.chunk), picture)
            source = sealed.photos / opened.metadata.path
            raw = decode_source(source.read_bytes(), model.size)
            expected = model.anonymize_tensor(torch.from_numpy(raw.pixels.copy()).unsqueeze(0))
            levels = quantize_pixels(expected)[0].numpy()
            # another batch size may round the last bit of the network's output otherwise
            assert np.abs(opened.pixels.astype(int) - levels.astype(int)).max() <= 1
            assert (opened.metadata.orig_w, opened.metadata.orig_h) == (24, 48)
    assert main(["recover", str(sealed.sealed), str(sealed.out), *sealed.keys, *sealed.model]) == 0
    assert len(list(sealed.out.rglob("*.png"))) == COUNT
    with Image.open(sealed.out / "0001/0001_c1.png") as recovered:
        assert (recovered.height, recovered.width) == model.size


def test_an_outsider_sees_no_name_no_date_and_no_link(sealed: Scene) -> None:
    for path in (sealed.sealed, *sealed.sealed.iterdir()):
        assert path.stat().st_mtime == 0
    for path in sealed.files:
        assert len(path.stem) == 26
        assert path.stat().st_mode & 0o777 == 0o600
    chunks = [png_format.decode(path.read_bytes()).chunk for path in sealed.files]
    for start, stop in ((8, 40), (40, 56), (56, 88), (88, 344), (344, 360)):
        assert len({chunk[start:stop] for chunk in chunks}) == COUNT
    assert {p.name for p in sealed.sealed.iterdir()} == {
        "manifest.ised",
        *(path.name for path in sealed.files),
    }


def test_open_gives_colours_or_the_exact_bytes_back(sealed: Scene) -> None:
    place = [str(sealed.sealed), str(sealed.out)]
    assert main(["open", *place, *sealed.keys, "--original-size"]) == 0
    with Image.open(sealed.out / "0002/0002_c1.png") as opened:
        assert opened.size == (24, 48)
    exact = sealed.root / "exact"
    assert main(["open", place[0], str(exact), *sealed.keys, "--exact"]) == 0
    with sealed.keyring() as keyring:
        for path in sealed.files:
            picture = png_format.decode(path.read_bytes())
            stored = open_image(keyring.opening_key(picture.chunk), picture)
            with Image.open(exact / stored.metadata.path) as opened:
                assert np.array_equal(np.asarray(opened), stored.pixels)
    assert main(["open", place[0], str(exact), *sealed.keys, "--exact"]) == 0  # done already
    assert main(["open", place[0], str(exact), *sealed.keys]) == 1  # other content is kept
    assert main(["open", place[0], str(exact), *sealed.keys, "--overwrite"]) == 0


def test_a_second_run_keeps_everything_and_overwrite_does_not(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in sealed.files}
    capsys.readouterr()
    assert main(sealed.protect()) == 0
    assert f"0 sealed, {COUNT} there already" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in sealed.files} == before
    assert main(sealed.protect("--overwrite")) == 0
    after = {path.name: path.read_bytes() for path in sealed.files}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)  # fresh salts
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 0


def test_worker_processes_give_the_same_folder(scene: Scene) -> None:
    assert main([*scene.protect(), "--workers", "2", "--batch", "2"]) == 0
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0
    assert len(scene.files) == COUNT


def test_search_finds_the_same_picture_first(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with sealed.keyring() as keyring:
        name = keyring.file_name("photos", "0002/0002_c2.png")
    base = [str(sealed.sealed), *sealed.keys, *sealed.model]
    assert main(["search", str(sealed.sealed / name), *base, "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    hits = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert len(hits) == 3
    assert hits[0][2:] == [str(sealed.sealed / name), "0002/0002_c2.png"]
    assert float(hits[0][1]) == pytest.approx(1, abs=1e-3)
    raw = str(sealed.photos / "0002/0002_c2.png")
    assert main(["search", raw, str(sealed.sealed), *sealed.keys, *sealed.model]) == 0


def test_orientation_is_applied_and_exif_is_dropped(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(scene.photos)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    scene.photos.joinpath("9").mkdir(parents=True)
    picture = Image.fromarray(np.tile(np.arange(48, dtype=np.uint8)[:, None, None], (1, 24, 3)))
    picture.save(scene.photos / "9/turned.jpg", exif=exif)
    assert main(scene.protect()) == 0
    assert "EXIF data of 1 pictures was not kept" in capsys.readouterr().out
    with scene.keyring() as keyring:
        sealed = png_format.decode(scene.files[0].read_bytes())
        metadata = open_image(keyring.opening_key(sealed.chunk), sealed).metadata
    assert (metadata.orig_w, metadata.orig_h) == (48, 24)


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        (["--subject-from", "folder"], {"photos/0001", "photos/0002", "photos/0003"}),
        (["--subject-from", "regex"], {"photos/0001", "photos/0002", "photos/0003"}),
        (
            ["--subject-from", "regex", "--subject-regex", r"_c(\d)"],
            {"photos/1", "photos/2", "photos/3"},
        ),
        (["--subject-from", "folder", "--dataset", "d"], {"d/0001", "d/0002", "d/0003"}),
    ],
)
def test_subjects(scene: Scene, arguments: list[str], labels: set[str]) -> None:
    assert main(scene.protect(*arguments)) == 0
    with scene.keyring() as keyring:
        assert {info.subject for info in keyring_admin.list_keys(keyring)} == labels


def test_subjects_from_a_table_and_none(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    table = scene.root / "subjects.csv"
    table.write_text("path,subject\n0001/0001_c1.png,anna\n0002/0002_c1.png,ben\n")
    assert main(scene.protect("--subject-from", "csv", "--subject-csv", str(table))) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len([x for x in errors if "BadInput" in x and "subjects.csv" in x]) == COUNT - 2
    assert len(scene.files) == 2
    shutil.rmtree(scene.sealed)
    assert main(scene.protect("--subject-from", "none")) == 0
    with scene.keyring() as keyring:
        assert len(keyring.rows) == COUNT + 2


def test_folders_that_spell_one_name_in_two_ways_are_one_subject(scene: Scene) -> None:
    shutil.rmtree(scene.photos)
    for index, name in enumerate(("Zo\u00eb", "Zoe\u0308")):
        draw(scene.photos / name / f"{index}.png", index)
    assert main(scene.protect()) == 0
    with scene.keyring() as keyring:
        assert [info.subject for info in keyring_admin.list_keys(keyring)] == ["photos/Zo\u00eb"]
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0


# ---- the error table ----------------------------------------------------------------------------


def _damage(path: Path, place: int, value: int | None = None, *, repair: bool = True) -> None:
    data = bytearray(path.read_bytes())
    data[place] = data[place] ^ 1 if value is None else value
    height, width = struct.unpack(">II", data[16:24])[::-1]
    path.write_bytes(repaired(bytes(data), width, height) if repair else bytes(data))


CHUNK, PIXELS = 41, 420  # where the header chunk and the pixels begin
DAMAGES: dict[str, tuple[Callable[[Path], object], type[IsedError], int]] = {
    "commit": (lambda p: _damage(p, CHUNK + 60), WrongKey, 5),
    "salt": (lambda p: _damage(p, CHUNK + 10), MissingKey, 1),
    "locator": (lambda p: _damage(p, CHUNK + 45), MissingKey, 1),
    "pixel bit": (lambda p: _damage(p, PIXELS + 9, repair=False), FormatError, 1),
    "pixel": (lambda p: _damage(p, PIXELS + 9), Tampered, 5),
    "metadata": (lambda p: _damage(p, CHUNK + 100), Tampered, 5),
    "tag": (lambda p: _damage(p, CHUNK + 350), Tampered, 5),
    "kind 0": (lambda p: _damage(p, CHUNK + 5, 0), FormatError, 1),
    "kind 2": (lambda p: _damage(p, CHUNK + 5, 2), FormatError, 1),
    "reserved": (lambda p: _damage(p, CHUNK + 7, 1), FormatError, 1),
    "version": (lambda p: _damage(p, CHUNK + 4, 2), UnsupportedVersion, 1),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), FormatError, 1),
    "trailing": (lambda p: p.write_bytes(p.read_bytes() + b"x"), FormatError, 1),
    "empty": (lambda p: p.write_bytes(b""), FormatError, 1),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_file_is_named_and_the_others_open(
    sealed: Scene, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, kind, code = DAMAGES[damage]
    harm(sealed.files[2])
    capsys.readouterr()
    assert main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys]) == code
    line = _error(capsys, kind)
    assert str(sealed.files[2]) in line
    assert len(list(sealed.out.rglob("*.png"))) == COUNT - 1
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == code


def test_header_of_another_file(sealed: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = sealed.files[:2]
    mixed = other.read_bytes()[:405] + one.read_bytes()[405:]
    one.write_bytes(mixed)
    assert main(["open", str(one), str(sealed.out), *sealed.keys]) == 5
    _error(capsys, Tampered)


def test_sides_swapped_with_rows_repacked(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sealed.files[0]
    picture = png_format.decode(path.read_bytes())
    swapped = png_format.SealedImage(picture.height, picture.width, picture.chunk, picture.pixels)
    path.write_bytes(png_format.encode(swapped))
    assert main(["open", str(path), str(sealed.out), *sealed.keys]) == 5
    _error(capsys, Tampered)


@pytest.mark.parametrize("keep", [False, True])
def test_saved_again_by_an_editor(
    sealed: Scene, keep: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sealed.files[0]
    data = path.read_bytes()
    stream = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(stream, "PNG")
    again = stream.getvalue()
    path.write_bytes(again[:33] + data[33:405] + again[33:] if keep else again)
    assert main(["open", str(path), str(sealed.out), *sealed.keys]) == 1
    assert "image editor?" in _error(capsys, FormatError if keep else NotProtected)


def test_too_large_is_refused_before_memory_is_taken(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sealed.files[0]
    data = path.read_bytes()
    header = b"IHDR" + struct.pack(">IIBBBBB", 16384, 16384, 8, 2, 0, 0, 0)
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    assert main(["open", str(path), str(sealed.out), *sealed.keys]) == 1
    _error(capsys, TooLarge)


@pytest.mark.parametrize(
    ("act", "kind"), [(keyring_admin.revoke, RevokedKey), (keyring_admin.destroy, DestroyedKey)]
)
def test_revoked_and_destroyed_keys_never_open_nor_seal(
    sealed: Scene,
    act: Callable[[Keyring, str], int],
    kind: type[IsedError],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with sealed.keyring() as keyring:
        act(keyring, "photos/0002")
    capsys.readouterr()
    assert main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys]) == 1
    err = capsys.readouterr().err
    assert err.count(f"{kind.__name__}: ") == PEOPLE["0002"]
    assert not (sealed.out / "0002").exists()
    assert len(list(sealed.out.rglob("*.png"))) == COUNT - PEOPLE["0002"]
    assert main(sealed.protect("--overwrite")) == 1
    assert capsys.readouterr().err.count(f"{kind.__name__}: ") == PEOPLE["0002"]


def test_another_keyring_has_no_key(sealed: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["--keyring", str(sealed.root / "o.db"), "--master", str(sealed.root / "o.key")]
    Keyring.create(other[1], KeyFile(Path(other[3]))).close()
    assert main(["open", str(sealed.files[0]), str(sealed.out), *other]) == 1
    line = _error(capsys, MissingKey)
    assert "another keyring" in line
    assert "row is lost" in line
    assert "salt or locator is damaged" in line
    assert main(["verify", str(sealed.sealed), *other]) == 5
    _error(capsys, WrongKey)


def _png16() -> bytes:
    rows = b"".join(b"\0" + bytes(range(48)) for _ in range(8))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
    )
    return png_format.SIGNATURE + b"".join(
        b"".join(png_format._chunk(name, data)) for name, data in (*chunks, (b"IEND", b""))
    )


def _picture(mode: str, suffix: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (8, 16)).save(stream, suffix)
    return stream.getvalue()


def _animated() -> bytes:
    stream = io.BytesIO()
    first, second = (Image.new("RGB", (8, 16), color) for color in ("red", "blue"))
    first.save(stream, "TIFF", save_all=True, append_images=[second])
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"no picture", "not a picture"),
        (_picture("RGB")[:48], "damaged"),
        (_picture("RGBA"), "mode RGBA"),
        (_picture("LA"), "mode LA"),
        (_picture("CMYK", "JPEG"), "mode CMYK"),
        (_picture("I;16"), "of 16 bit per channel"),
        (_png16(), "16 bit"),
        (_animated(), "2 pictures in one file"),
    ],
    ids=[
        *("empty", "text", "cut", "alpha", "grey alpha", "cmyk"),
        *("16-bit grey", "16-bit colour", "animated"),
    ],
)
def test_bad_sources_are_named_and_the_others_done(
    scene: Scene, content: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (scene.photos / "0001/bad.png").write_bytes(content)
    assert main(scene.protect()) == 1
    assert words in _error(capsys, BadInput)
    assert len(scene.files) == COUNT


def test_grey_pictures_are_converted(scene: Scene) -> None:
    for index, mode in enumerate(("L", "1", "P")):
        Image.new(mode, (8, 16)).save(scene.photos / f"0001/grey{index}.png")
    assert main(scene.protect()) == 0
    assert len(scene.files) == COUNT + 3


def test_unreadable_source(
    scene: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = scene.photos / "0001/0001_c1.png"
    bad.unlink()
    bad.symlink_to(scene.root / "nowhere.png")
    assert main(scene.protect()) == 1
    assert "cannot be read" in _error(capsys, BadInput)


def test_long_and_odd_paths(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    draw(scene.photos / ("d" * 200) / "0001_c1_0000000.png", 1)
    assert main(scene.protect()) == 1
    _error(capsys, PathTooLong)
    shutil.rmtree(scene.photos / ("d" * 200))
    source = os.fsencode(scene.photos / "0001/0001_c1.png")
    shutil.copy(source, os.fsencode(scene.photos) + b"/\xff.png")
    assert main(scene.protect()) == 1
    _error(capsys, UnsafePath)


@pytest.mark.parametrize(
    "path", ["/etc/x", "../x", "a/../../x", "a\0b", "a\nb", "a\\b", "a//b", "./a"]
)
def test_unsafe_paths_in_metadata(
    sealed: Scene, path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder of the key who does not use this program still cannot write elsewhere."""
    from modeling.encryption import sealed_image as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "check_relative_path", lambda path: None)
        hostile = Metadata(path).to_bytes()
    with pytest.raises(UnsafePath):
        Metadata.from_bytes(hostile)
    with pytest.raises(UnsafePath):
        Metadata(path).to_bytes()
    with sealed.keyring() as keyring, monkeypatch.context() as patch:
        patch.setattr(module, "check_relative_path", lambda path: None)
        picture = seal_image(
            keyring.sealing_key("photos/0001"), np.zeros((64, 32, 3), np.uint8), Metadata(path)
        )
    sealed.files[0].write_bytes(png_format.encode(picture))
    assert main(["open", str(sealed.files[0]), str(sealed.out), *sealed.keys]) == 1
    _error(capsys, UnsafePath)
    assert not sealed.out.exists()


def test_too_long_path_in_metadata() -> None:
    stored = bytearray(Metadata("a").to_bytes())
    stored[37:39] = (218).to_bytes(2, "big")
    with pytest.raises(PathTooLong):
        Metadata.from_bytes(bytes(stored))
    with pytest.raises(PathTooLong):
        Metadata("ä" * 109).to_bytes()
    assert Metadata.from_bytes(Metadata("a" * 217).to_bytes()).path == "a" * 217


def test_a_link_in_the_output_leads_nowhere(sealed: Scene) -> None:
    outside = sealed.root / "outside"
    outside.mkdir()
    sealed.out.mkdir()
    (sealed.out / "0001").symlink_to(outside)
    assert main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys]) == 1
    assert list(outside.iterdir()) == []


def test_whatever_the_image_library_lets_out_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(picture: Image.Image) -> None:  # as for a JPEG with one changed byte of its EXIF
        raise AttributeError("'IFDRational' object has no attribute 'encode'")

    monkeypatch.setattr("engine.vault.sources.ImageOps.exif_transpose", refuse)
    stream = io.BytesIO()
    Image.new("RGB", (4, 8)).save(stream, "PNG")
    with pytest.raises(BadInput, match="damaged"):
        decode_source(stream.getvalue(), (8, 4))


def test_a_link_further_up_makes_no_folder_outside(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafePath):
        _place(tmp_path / "out", "a/b/c.png")
    assert list((tmp_path / "outside").iterdir()) == []


def test_opening_removes_pictures_that_a_killed_run_left(sealed: Scene) -> None:
    left = sealed.out / "0001/.0001_c1.99999999-0badcafe.tmp.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"an opened picture")
    assert main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys]) == 0
    assert not left.exists()


def test_what_is_no_file_is_named_and_not_waited_for(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(sealed.sealed / "pipe.png")
    (sealed.sealed / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(sealed.photos / "0001/pipe.png")
    assert main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys]) == 1
    assert main(sealed.protect()) == 1
    assert capsys.readouterr().err.count("not a regular file") == 3


def test_secrets_in_the_output_are_a_usage_error(sealed: Scene) -> None:
    shutil.copy(sealed.root / "master.key", sealed.sealed / "master.key")
    keys = [*sealed.keys[:3], str(sealed.sealed / "master.key")]
    command = ["protect", str(sealed.photos), str(sealed.sealed), *keys, *sealed.model]
    assert main(command) == 2


def test_two_data_sets_in_one_folder_share_its_manifest(sealed: Scene) -> None:
    assert main(sealed.protect("--dataset", "another")) == 0
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 0


def test_folders_that_cannot_be_read_are_not_left_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(place: Path) -> object:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))

    monkeypatch.setattr("engine.vault.sources.os.scandir", refuse)
    assert main(scene.protect()) == 1
    assert "cannot be read (Permission denied)" in capsys.readouterr().err


def test_files_that_are_no_pictures_are_said(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    (scene.photos / "0001/phone.heic").write_bytes(b"a picture that is not read")
    assert main(scene.protect()) == 0
    assert "1 other files were left out, the first is 0001/phone.heic" in capsys.readouterr().out


def test_output_of_another_source_is_kept(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in sealed.files}
    draw(sealed.photos / "0001/0001_c1.png", 77)
    capsys.readouterr()
    assert main(sealed.protect()) == 1
    err = capsys.readouterr().err
    assert "OutputExists" in err
    assert "--overwrite" in err
    assert {path.name: path.read_bytes() for path in sealed.files} == before
    assert main(sealed.protect("--overwrite")) == 0


def test_folders_that_overlap_are_a_usage_error(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = str(scene.photos)
    for source, target in (
        (photos, photos),
        (photos, f"{photos}/sealed"),
        (photos, str(scene.root)),
        (photos, str(scene.keyring_path)),
    ):
        assert main(["protect", source, target, *scene.keys, *scene.model]) == 2
        assert "UsageError: " in capsys.readouterr().err
    assert sorted(p.name for p in scene.photos.iterdir()) == sorted(PEOPLE)
    assert not scene.sealed.exists()


def test_keyring_mistakes_stop_everything(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    missing = [x.replace("keys.db", "none.db") for x in scene.protect()]
    assert main(missing) == 4
    assert "KeyringMissing: " in capsys.readouterr().err
    wrong = [x.replace("master.key", "other.key") for x in scene.protect()]
    KeyFile(scene.root / "other.key").create_if_missing()
    assert main(wrong) == 4
    assert "WrongMaster: " in capsys.readouterr().err
    scene.keyring_path.chmod(0o644)
    assert main(scene.protect()) == 4
    assert "chmod 600" in capsys.readouterr().err
    assert not scene.sealed.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.files[0].unlink(), "missing"),
        (lambda s: [path.unlink() for path in s.files], "missing"),
        (lambda s: s.files[0].rename(s.sealed / f"{'a' * 26}.png"), "not in the manifest"),
        (lambda s: shutil.copy(s.files[0], s.files[1]), "not the manifest's file"),
        (lambda s: (s.sealed / "manifest.ised").unlink(), "no manifest"),
        (lambda s: _flip(s.sealed / "manifest.ised"), "changed"),
    ],
    ids=[
        "missing",
        "emptied",
        "renamed",
        "replaced by a valid file",
        "no manifest",
        "changed manifest",
    ],
)
def test_verify_compares_the_folder_with_its_manifest(
    sealed: Scene,
    change: Callable[[Scene], object],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 0
    change(sealed)
    capsys.readouterr()
    code = 1 if words == "no manifest" else 5
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == code
    assert words in capsys.readouterr().err


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def test_verify_accept_takes_a_folder_as_it_is(sealed: Scene) -> None:
    sealed.files[0].unlink()
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 5
    assert main(["verify", str(sealed.sealed), *sealed.keys, "--accept"]) == 5
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 0


def test_no_message_holds_key_material(sealed: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    with sealed.keyring() as keyring:
        keys = [keyring.unwrap(row) for row in keyring.rows]
    for path in sealed.files:
        _damage(path, CHUNK + 60)
    main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys])
    err = capsys.readouterr().err
    assert all(key.hex()[:16] not in err and repr(key)[2:12] not in err for key in keys)


def test_checkpoint_of_another_size_is_named(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with sealed.keyring() as keyring:
        key = keyring.sealing_key("photos/0001")
    small = seal_image(key, np.zeros((32, 32, 3), np.uint8), Metadata("a.png"))
    sealed.files[0].write_bytes(png_format.encode(small))
    assert (
        main(["recover", str(sealed.files[0]), str(sealed.out), *sealed.keys, *sealed.model]) == 1
    )
    assert "32 x 64" in _error(capsys, BadInput)
