"""Sealed folders that are changed between two runs, and keyrings that change during a run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.vault import keyring_admin, opening
from engine.vault.master import KeyFile
from engine.vault.sealed_folder import MANIFEST_NAME, Manifest
from engine.vault.sources import decode_source
from modeling.encryption import png_format
from modeling.encryption.ised_errors import BadInput
from modeling.encryption.sealed_image import Metadata, seal_image
from tests.fixtures.keyrings import to_format
from tests.fixtures.protection import PEOPLE, Scene, draw
from tools.protect import main
from utils.files import WriteError

COUNT = sum(PEOPLE.values())


def _open(scene: Scene, *more: str) -> int:
    return main(["open", str(scene.sealed), str(scene.out), *scene.keys, *more])


def test_an_old_file_that_was_put_back_is_not_added_to_the_manifest(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    old = scene.files[0].read_bytes()
    assert main(scene.protect("--overwrite")) == 0
    scene.files[0].write_bytes(old)
    assert main(scene.verify()) == 5
    capsys.readouterr()
    assert main(scene.protect()) == 1
    assert "is not the file that the manifest lists" in capsys.readouterr().err
    assert main(scene.verify()) == 5  # the manifest is unchanged
    assert main(scene.protect("--overwrite")) == 0
    assert main(scene.verify()) == 0


def test_a_file_whose_source_cannot_be_read_stays_in_the_manifest(scene: Scene) -> None:
    """`--overwrite` did not replace it, so it is no foreign file."""
    assert main(scene.protect("--keep-original")) == 0
    failing, changed = (scene.pair(f"0001/0001_c{number}.png") for number in (1, 2))
    old = changed[0].read_bytes()
    assert main(scene.protect("--keep-original", "--overwrite")) == 0
    for number in (1, 2):
        (scene.photos / f"0001/0001_c{number}.png").write_bytes(b"not an image")
    changed[0].write_bytes(old)
    assert main(scene.protect("--keep-original", "--overwrite")) == 1
    assert main(scene.verify()) == 5  # the file that was put back is not listed again
    changed[0].unlink()
    assert main(scene.verify()) == 0
    failing[0].unlink()
    assert main(scene.verify()) == 5


def test_a_file_sealed_for_another_subject_is_not_accepted(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corrected table: the images of 0001 show person B, whose keys are then destroyed."""
    assert main(scene.protect()) == 0
    with scene.keyring() as keyring:
        keyring_admin.rotate(keyring, "photos/0002")
    assert main(scene.protect()) == 0  # a retired key of the same subject is accepted
    names = (path.relative_to(scene.photos).as_posix() for path in scene.photos.rglob("*.png"))
    table = scene.root / "people.csv"
    lines = [f"{name},{'B' if name.startswith('0001/') else name[:4]}" for name in names]
    table.write_text("\n".join(["path,subject", *lines]))
    csv = ["--subject-from", "csv", "--subject-csv", str(table)]
    capsys.readouterr()
    assert main(scene.protect(*csv)) == 1
    err = capsys.readouterr().err
    assert err.count("was sealed for another subject") == err.count("error:") == PEOPLE["0001"]
    assert main(scene.protect(*csv, "--overwrite")) == 0
    with scene.keyring() as keyring:
        keyring_admin.destroy(keyring, "photos/B")
    assert _open(scene) == 1
    assert len(list(scene.out.rglob("*.png"))) == COUNT - PEOPLE["0001"]


def test_two_images_with_the_same_output_name_do_not_replace_each_other(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(scene.photos)
    draw(scene.photos / "1/a.jpg", 1)
    draw(scene.photos / "1/a.jpg.png", 2)
    assert main(scene.protect()) == 0
    assert _open(scene, "--overwrite") == 1
    assert "OutputExists" in capsys.readouterr().err
    assert len(list(scene.out.rglob("*.png"))) == 1


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_manifest_that_is_not_a_file_is_reported_without_waiting(
    scene: Scene, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    path = scene.sealed / MANIFEST_NAME
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    for run in (lambda: main(scene.verify()), lambda: main(scene.protect())):
        capsys.readouterr()
        assert run() == 1
        assert "BadInput" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["open", "recover"])
def test_opening_reports_missing_and_replaced_files(
    scene: Scene, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    old = scene.files[1].read_bytes()
    assert main(scene.protect("--overwrite")) == 0
    scene.files[1].write_bytes(old)
    missing, replaced, other, *_ = scene.files
    missing.unlink()
    model = scene.model if command == "recover" else []
    capsys.readouterr()
    assert main([command, str(scene.sealed), str(scene.out), *scene.keys, *model]) == 5
    err = capsys.readouterr().err
    assert err.count("error:") == 2
    assert f"{missing}: Tampered: is in the manifest and missing here" in err
    assert f"{replaced}: Tampered: is not the file that the manifest lists" in err
    assert len(list(scene.out.rglob("*.png"))) == COUNT - 2
    one = [command, str(other), str(scene.root / "one"), *scene.keys, *model]
    assert main(one) == 0
    assert capsys.readouterr().err.count("manifest") == 0


def test_a_manifest_that_cannot_be_written_is_an_error(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Manifest, folder: Path, key: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", full)
        assert main(scene.protect()) == 3
    assert "No space left" in capsys.readouterr().err
    assert len(scene.files) == COUNT
    assert main(scene.protect()) == 0
    assert main(scene.verify()) == 0


def test_opening_stops_when_the_master_of_the_keyring_was_changed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error line and exit code 4, not one for each remaining file."""
    assert main(scene.protect()) == 0
    written, write = [], opening.publish

    def rekeying(*arguments: object, **options: object) -> None:
        write(*arguments, **options)  # type: ignore[arg-type]
        written.append(arguments)
        if len(written) == 2:
            with scene.keyring() as keyring:
                keyring_admin.rekey(keyring, KeyFile(scene.root / "new.key"))

    monkeypatch.setattr(opening, "publish", rekeying)
    capsys.readouterr()
    assert _open(scene) == 4
    assert capsys.readouterr().err.count("error:") == 1
    assert len(written) == 2


def test_postscript_is_not_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would pass a PostScript file with an image suffix to Ghostscript."""
    from PIL import EpsImagePlugin

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", refuse)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 16\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadInput, match="not an image"):
        decode_source(content, (16, 8))


def test_a_folder_sealed_under_an_old_data_set_name_still_opens(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before names with a slash were rejected, dataset photos/0001 and folder 1 shared a key."""
    draw(scene.root / "one/1/a.png", 1)
    old = ["protect", str(scene.root / "one"), *scene.protect("--dataset", "photos/0001")[2:]]
    with monkeypatch.context() as patch:
        patch.setattr("engine.vault.subjects.check_dataset", lambda name: None)
        patch.setattr("engine.vault.protect.check_dataset", lambda name: None, raising=False)
        assert main(old) == 0
    assert main(scene.verify()) == 0
    assert _open(scene) == 0
    capsys.readouterr()
    assert main(old) == 2
    assert "data set name 'photos/0001'" in capsys.readouterr().err
    with scene.keyring() as keyring:
        assert keyring_admin.destroy(keyring, "photos/0001/1") == 1
    assert _open(scene, "--overwrite") == 1


def test_files_sealed_under_an_old_label_count_as_present(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before labels were normalised, a folder name with a trailing blank was its own subject."""
    (scene.photos / "0001").rename(scene.photos / "0001 ")
    with monkeypatch.context() as patch:
        patch.setattr("engine.vault.subjects.normalized", lambda text: text)
        patch.setattr("engine.vault.keyring.normalized", lambda text: text)
        assert main(scene.protect()) == 0
    with scene.keyring() as keyring:
        to_format(1, keyring)
    capsys.readouterr()
    assert main(scene.protect()) == 0
    assert f"0 sealed, {COUNT} already present" in capsys.readouterr().out
    with scene.keyring() as keyring:
        assert keyring_admin.destroy(keyring, "photos/0001") == 1
    assert _open(scene) == 1
    assert len(list(scene.out.rglob("*.png"))) == COUNT - PEOPLE["0001"]


def test_a_huge_manifest_is_rejected_before_it_is_read(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sparse file of 3 GiB took 13 GiB of memory."""
    assert main(scene.protect()) == 0
    os.truncate(scene.sealed / MANIFEST_NAME, 1 << 40)
    capsys.readouterr()
    for run in (lambda: main(scene.verify()), lambda: main(scene.protect())):
        assert run() == 5
        assert "longer than any manifest" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--accept",)])
def test_verify_reports_everything_that_is_not_in_the_manifest(
    scene: Scene, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    for name in ("person.jpg", "raw.PNG", "raw.png", ".hidden.png", "notes"):
        shutil.copy(scene.photos / "0001/0001_c1.png", scene.sealed / name)
    draw(scene.sealed / "photos/person.png", 3)
    (scene.sealed / "link.png").symlink_to(scene.photos / "0001/0001_c1.png")
    (scene.sealed / "sealed_link.png").symlink_to(scene.files[0])
    (scene.sealed / "gone").symlink_to("nowhere")
    os.mkfifo(scene.sealed / "pipe")
    foreign = {path.name for path in scene.sealed.iterdir() if len(path.stem) < 20}
    foreign.discard(MANIFEST_NAME)
    assert len(foreign) == 10
    capsys.readouterr()
    assert main(["verify", str(scene.sealed), *scene.keys, *more]) == 5
    captured = capsys.readouterr()
    assert f"{COUNT} good, 10 failed" in captured.out
    for name in foreign:
        assert f"error: {scene.sealed / name}: Tampered: " in captured.err
    if more:  # the new manifest does not list them
        assert main(scene.verify()) == 5


def test_a_lock_file_is_known_and_a_photograph_of_that_name_is_not(scene: Scene) -> None:
    assert main(scene.protect()) == 0
    (scene.sealed / ".lock").write_text("process 1 on host a\n")
    assert main(scene.verify()) == 0
    shutil.copy(scene.photos / "0001/0001_c1.png", scene.sealed / ".lock")
    assert main(scene.verify()) == 5


def test_a_listed_file_that_became_a_link_is_reported(scene: Scene) -> None:
    assert main(scene.protect()) == 0
    file = scene.files[0]
    file.rename(scene.root / file.name)
    file.symlink_to(scene.root / file.name)
    assert main(scene.verify()) == 5


def test_a_photograph_in_a_folder_without_manifest_is_reported(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    (scene.sealed / MANIFEST_NAME).unlink()
    shutil.copy(scene.photos / "0001/0001_c1.png", scene.sealed / "person.jpg")
    capsys.readouterr()
    assert main(scene.verify()) == 1
    assert "person.jpg: NotProtected" in capsys.readouterr().err


def _full(*_: object, **__: object) -> object:
    raise WriteError("cannot write manifest.ised: No space left on device")


@pytest.mark.parametrize("command", ["protect", "verify"])
def test_a_full_disk_while_the_manifest_is_written_is_exit_code_3(
    scene: Scene,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(scene.protect()) == 0
    scene.files[0].unlink()
    with monkeypatch.context() as patch:
        patch.setattr("engine.vault.sealed_folder.atomic_write", _full)
        if command == "protect":
            assert main(scene.protect()) == 3
        else:
            assert main(["verify", str(scene.sealed), *scene.keys, "--accept"]) == 3
    assert "error: StorageError: " in capsys.readouterr().err


def test_a_read_only_folder_is_exit_code_3(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    with monkeypatch.context() as patch:  # as for a user who may not write; root always may
        patch.setattr("utils.files.os.access", lambda path, mode: False)
        assert main(["verify", str(scene.sealed), *scene.keys, "--accept"]) == 3
        assert main(scene.protect()) == 3
        assert _open(scene) == 3
    assert capsys.readouterr().err.count("error: StorageError: ") == 3


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def _loop(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(path.name)


# In the place of 0001/0001_c1.png; number of images that fail, without and with --overwrite.
BLOCKERS: dict[str, tuple[Callable[[Path], object], int, int]] = {
    "folder": (lambda path: path.mkdir(parents=True), 1, 1),
    "link loop": (_loop, 1, 0),
    "file instead of its folder": (lambda path: _write(path.parent), 3, 3),
    "link loop instead of its folder": (lambda path: _loop(path.parent), 3, 3),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("blocker", sorted(BLOCKERS))
def test_an_output_that_cannot_be_written_does_not_stop_the_others(
    scene: Scene, blocker: str, overwrite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    make, *failures = BLOCKERS[blocker]
    make(scene.out / "0001/0001_c1.png")
    capsys.readouterr()
    code = _open(scene, *(["--overwrite"] if overwrite else []))
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == failures[overwrite]
    assert code == (1 if errors else 0)
    assert all(f"error: {scene.sealed}/" in line for line in errors)
    written = [path for path in scene.out.rglob("*.png") if path.is_file()]
    assert len(written) == COUNT - len(errors)


def test_a_folder_with_the_name_of_an_output_does_not_stop_protect(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scene.protect()) == 0
    blocked = scene.files[2]
    blocked.unlink()
    blocked.mkdir()
    capsys.readouterr()
    for more in ((), ("--overwrite",)):
        assert main(scene.protect(*more)) == 1
        error = capsys.readouterr().err
        assert error.count("error:") == 1
        assert blocked.name in error
    blocked.rmdir()
    assert main(scene.protect()) == 0
    assert main(scene.verify()) == 0


def test_colliding_paths_and_a_huge_original_size_in_metadata_do_not_stop_opening(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program with the key may seal such metadata."""
    pixels = np.zeros((64, 32, 3), np.uint8)
    scene.sealed.mkdir()
    metadata = [
        Metadata("a.png"), Metadata("a.png/b.png"), Metadata("c.png"),
        Metadata("huge.png", orig_h=65_535, orig_w=65_535), Metadata("z.png", orig_h=8, orig_w=4),
    ]  # fmt: skip
    with scene.keyring() as keyring:
        for index, one in enumerate(metadata):
            image = seal_image(keyring.sealing_key("photos/0001"), pixels, one)
            (scene.sealed / f"{index}.png").write_bytes(png_format.encode(image))
    assert _open(scene, "--original-size") == 1
    error = capsys.readouterr().err
    assert "1.png: OutputBlocked" in error
    assert "3.png: BadInput: original size 65535 x 65535" in error
    assert sorted(path.name for path in scene.out.iterdir()) == ["a.png", "c.png", "z.png"]


def test_a_revocation_takes_effect_in_a_running_protect(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine.vault import sealing_work

    publish, revoked = sealing_work.publish, []

    def revoking(path: Path, content: bytes, *, overwrite: bool) -> None:
        publish(path, content, overwrite=overwrite)
        if not revoked:
            with scene.keyring() as keyring:
                revoked.extend(["photos/0001", "photos/0002", "photos/0003"])
                for subject in revoked:
                    keyring_admin.revoke(keyring, subject)

    monkeypatch.setattr(sealing_work, "publish", revoking)
    assert main(scene.protect("--batch", "1")) == 1
    captured = capsys.readouterr()
    assert f"1 sealed, 0 already present, {COUNT - 1} failed" in captured.out
    assert captured.err.count("RevokedKey: ") == COUNT - 1
