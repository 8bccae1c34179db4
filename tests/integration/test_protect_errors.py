"""Every row of the table of errors in docs/ISED.md."""

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
from PIL import Image

from engine.vault import keyring_admin
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile
from engine.vault.opening import OutputFolder
from modeling.encryption import png_format
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
from modeling.encryption.sealed_image import Metadata, seal_image
from tests.fixtures.protection import PEOPLE, Scene, draw
from tests.fixtures.sealing import repaired
from tools.protect import main

COUNT = sum(PEOPLE.values())


def _error(capsys: pytest.CaptureFixture[str], error: type[IsedError]) -> str:
    """Return the only error line after checking its form."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    assert f"{error.__name__}: " in lines[0]
    return lines[0]


def _damage(path: Path, offset: int, value: int | None = None, *, repair: bool = True) -> None:
    data = bytearray(path.read_bytes())
    data[offset] = data[offset] ^ 1 if value is None else value
    height, width = struct.unpack(">II", data[16:24])[::-1]
    path.write_bytes(repaired(bytes(data), width, height) if repair else bytes(data))


CHUNK, PIXELS = 41, 420  # offsets of the header chunk and the pixels
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
def test_a_damaged_file_is_reported_and_the_others_open(
    sealed: Scene, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, error, code = DAMAGES[damage]
    change(sealed.files[2])
    capsys.readouterr()
    assert main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys]) == code
    line = _error(capsys, error)
    assert str(sealed.files[2]) in line
    assert len(list(sealed.out.rglob("*.png"))) == COUNT - 1
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == code


def test_the_header_of_another_file_is_rejected(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = sealed.files[:2]
    mixed = other.read_bytes()[:405] + path.read_bytes()[405:]
    path.write_bytes(mixed)
    assert main(["open", str(path), str(sealed.out), *sealed.keys]) == 5
    _error(capsys, Tampered)


def test_swapped_width_and_height_are_rejected(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sealed.files[0]
    image = png_format.decode(path.read_bytes())
    swapped = png_format.SealedImage(image.height, image.width, image.chunk, image.pixels)
    path.write_bytes(png_format.encode(swapped))
    assert main(["open", str(path), str(sealed.out), *sealed.keys]) == 5
    _error(capsys, Tampered)


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_saved_by_an_image_editor_is_reported(
    sealed: Scene, keep: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sealed.files[0]
    data = path.read_bytes()
    stream = io.BytesIO()
    with Image.open(path) as image:
        image.save(stream, "PNG")
    saved = stream.getvalue()
    path.write_bytes(saved[:33] + data[33:405] + saved[33:] if keep else saved)
    assert main(["open", str(path), str(sealed.out), *sealed.keys]) == 1
    assert "image editor?" in _error(capsys, FormatError if keep else NotProtected)


def test_a_file_that_is_too_large_is_rejected_before_memory_is_allocated(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sealed.files[0]
    data = path.read_bytes()
    header = b"IHDR" + struct.pack(">IIBBBBB", 16384, 16384, 8, 2, 0, 0, 0)
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    assert main(["open", str(path), str(sealed.out), *sealed.keys]) == 1
    _error(capsys, TooLarge)


@pytest.mark.parametrize(
    ("act", "error"), [(keyring_admin.revoke, RevokedKey), (keyring_admin.destroy, DestroyedKey)]
)
def test_revoked_and_destroyed_keys_neither_open_nor_seal(
    sealed: Scene,
    act: Callable[[Keyring, str], int],
    error: type[IsedError],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with sealed.keyring() as keyring:
        act(keyring, "photos/0002")
    capsys.readouterr()
    assert main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys]) == 1
    err = capsys.readouterr().err
    assert err.count(f"{error.__name__}: ") == PEOPLE["0002"]
    assert not (sealed.out / "0002").exists()
    assert len(list(sealed.out.rglob("*.png"))) == COUNT - PEOPLE["0002"]
    assert main(sealed.protect("--overwrite")) == 1
    assert capsys.readouterr().err.count(f"{error.__name__}: ") == PEOPLE["0002"]


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


def _image(mode: str, suffix: str = "PNG") -> bytes:
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
        (b"not an image", "not an image"),
        (_image("RGB")[:48], "damaged"),
        (_image("RGBA"), "mode RGBA"),
        (_image("LA"), "mode LA"),
        (_image("CMYK", "JPEG"), "mode CMYK"),
        (_image("I;16"), "with 16 bits per channel"),
        (_png16(), "16 bit"),
        (_animated(), "several images in one file"),
    ],
    ids=[
        *("empty", "text", "cut", "alpha", "grey alpha", "cmyk"),
        *("16-bit grey", "16-bit colour", "animated"),
    ],
)
def test_a_bad_source_is_reported_and_the_others_are_sealed(
    scene: Scene, content: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (scene.photos / "0001/bad.png").write_bytes(content)
    assert main(scene.protect()) == 1
    assert words in _error(capsys, BadInput)
    assert len(scene.files) == COUNT


def test_grey_images_are_converted(scene: Scene) -> None:
    for index, mode in enumerate(("L", "1", "P")):
        Image.new(mode, (8, 16)).save(scene.photos / f"0001/grey{index}.png")
    assert main(scene.protect()) == 0
    assert len(scene.files) == COUNT + 3


def test_an_unreadable_source_is_reported(
    scene: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = scene.photos / "0001/0001_c1.png"
    bad.unlink()
    bad.symlink_to(scene.root / "nowhere.png")
    assert main(scene.protect()) == 1
    assert "symbolic link cannot be followed" in _error(capsys, BadInput)


def test_paths_that_the_metadata_cannot_hold_are_reported(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
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
def test_unsafe_paths_in_metadata_are_rejected(
    sealed: Scene, path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender with the key, using another program, cannot write outside of the output folder."""
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
        image = seal_image(
            keyring.sealing_key("photos/0001"), np.zeros((64, 32, 3), np.uint8), Metadata(path)
        )
    sealed.files[0].write_bytes(png_format.encode(image))
    assert main(["open", str(sealed.files[0]), str(sealed.out), *sealed.keys]) == 1
    _error(capsys, UnsafePath)
    assert not sealed.out.exists()


def test_a_path_that_is_too_long_for_the_metadata_is_rejected() -> None:
    stored = bytearray(Metadata("a").to_bytes())
    stored[37:39] = (218).to_bytes(2, "big")
    with pytest.raises(PathTooLong):
        Metadata.from_bytes(bytes(stored))
    with pytest.raises(PathTooLong):
        Metadata("ä" * 109).to_bytes()
    assert Metadata.from_bytes(Metadata("a" * 217).to_bytes()).path == "a" * 217


def test_a_symbolic_link_in_the_output_folder_is_not_followed(sealed: Scene) -> None:
    outside = sealed.root / "outside"
    outside.mkdir()
    sealed.out.mkdir()
    (sealed.out / "0001").symlink_to(outside)
    assert main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys]) == 1
    assert list(outside.iterdir()) == []


def test_no_folder_is_created_behind_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafePath):
        OutputFolder(tmp_path / "out").write("a/b/c.png", b"png")
    assert list((tmp_path / "outside").iterdir()) == []


def test_opening_removes_images_that_a_killed_run_left(sealed: Scene) -> None:
    left = sealed.out / "0001/.0001_c1.99999999-0badcafe.tmp.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"an opened image")
    assert main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys]) == 0
    assert not left.exists()


def test_pipes_and_devices_are_reported_without_waiting(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(sealed.sealed / "pipe.png")
    (sealed.sealed / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(sealed.photos / "0001/pipe.png")
    assert main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys]) == 1
    assert main(sealed.protect()) == 1
    assert capsys.readouterr().err.count("not a regular file") == 3


def test_a_secret_in_the_output_folder_is_a_usage_error(sealed: Scene) -> None:
    shutil.copy(sealed.root / "master.key", sealed.sealed / "master.key")
    keys = [*sealed.keys[:3], str(sealed.sealed / "master.key")]
    command = ["protect", str(sealed.photos), str(sealed.sealed), *keys, *sealed.model]
    assert main(command) == 2


def test_options_that_would_be_ignored_are_refused(sealed: Scene) -> None:
    assert main(sealed.reveal("--device", "cpu")) == 2
    command = ["open", str(sealed.sealed), str(sealed.out), *sealed.keys, "--exact"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--checkpoint", str(sealed.checkpoint)])
    assert not sealed.out.exists()


def test_two_data_sets_in_one_folder_share_the_manifest(sealed: Scene) -> None:
    assert main(sealed.protect("--dataset", "another")) == 0
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 0


def test_a_folder_that_cannot_be_read_is_an_error(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> object:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("engine.vault.sources.os.scandir", refuse)
    assert main(scene.protect()) == 1
    assert "cannot be read (Permission denied)" in capsys.readouterr().err


def test_files_that_are_not_images_are_counted(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    (scene.photos / "0001/phone.heic").write_bytes(b"not a supported format")
    assert main(scene.protect()) == 0
    assert "1 left out" in (out := capsys.readouterr().out) and "0001/phone.heic" in out


def test_the_output_of_another_source_is_kept(
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


def test_overlapping_folders_are_a_usage_error(
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


def test_errors_of_the_keyring_stop_the_run(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
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
        (lambda s: shutil.copy(s.files[0], s.files[1]), "not the file that the manifest lists"),
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


def test_verify_accept_writes_a_new_manifest(sealed: Scene) -> None:
    sealed.files[0].unlink()
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 5
    assert main(["verify", str(sealed.sealed), *sealed.keys, "--accept"]) == 5
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 0


def test_messages_contain_no_key_material(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with sealed.keyring() as keyring:
        keys = [keyring.unwrap(row) for row in keyring.rows]
    for path in sealed.files:
        _damage(path, CHUNK + 60)
    main(["open", str(sealed.sealed), str(sealed.out), *sealed.keys])
    err = capsys.readouterr().err
    assert all(key.hex()[:16] not in err and repr(key)[2:12] not in err for key in keys)


def test_a_checkpoint_of_another_image_size_is_reported(
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
