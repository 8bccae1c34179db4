"""The protect commands from end to end."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.api import Anonymizer
from engine.vault import keyring_admin
from engine.vault.sealing_work import WorkSettings, make_executor
from engine.vault.search import IndexSummary
from engine.vault.sources import decode_source
from modeling.encryption import png_format
from modeling.encryption.cipher import quantize_pixels
from modeling.encryption.sealed_image import open_image
from tests.fixtures.protection import PEOPLE, Scene, draw
from tools import protect as protect_tool
from tools.protect import main

COUNT = sum(PEOPLE.values())


def test_sealed_pixels_equal_the_output_of_the_networks(sealed: Scene) -> None:
    model = Anonymizer.from_checkpoint(sealed.checkpoint, device="cpu", precision="float32")
    assert len(sealed.files) == COUNT
    with sealed.keyring() as keyring:
        for path in sealed.files:
            image = png_format.decode(path.read_bytes())
            opened = open_image(keyring.opening_key(image.chunk), image)
            source = sealed.photos / opened.metadata.path
            raw = decode_source(source.read_bytes(), model.size)
            expected = model.anonymize_tensor(torch.from_numpy(raw.pixels.copy()).unsqueeze(0))
            levels = quantize_pixels(expected)[0].numpy()
            # the last bit of the network's output depends on the batch size
            assert np.abs(opened.pixels.astype(int) - levels.astype(int)).max() <= 1
            assert (opened.metadata.orig_w, opened.metadata.orig_h) == (24, 48)
    assert main(["recover", str(sealed.sealed), str(sealed.out), *sealed.keys, *sealed.model]) == 0
    assert len(list(sealed.out.rglob("*.png"))) == COUNT
    with Image.open(sealed.out / "0001/0001_c1.png") as recovered:
        assert (recovered.height, recovered.width) == model.size


def test_files_reveal_no_name_date_or_subject_without_keys(sealed: Scene) -> None:
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


def test_open_writes_colours_or_the_exact_bytes(sealed: Scene) -> None:
    folders = [str(sealed.sealed), str(sealed.out)]
    assert main(["open", *folders, *sealed.keys, "--original-size"]) == 0
    with Image.open(sealed.out / "0002/0002_c1.png") as opened:
        assert opened.size == (24, 48)
    exact = sealed.root / "exact"
    assert main(["open", folders[0], str(exact), *sealed.keys, "--exact"]) == 0
    with sealed.keyring() as keyring:
        for path in sealed.files:
            image = png_format.decode(path.read_bytes())
            stored = open_image(keyring.opening_key(image.chunk), image)
            with Image.open(exact / stored.metadata.path) as opened:
                assert np.array_equal(np.asarray(opened), stored.pixels)
    assert main(["open", folders[0], str(exact), *sealed.keys, "--exact"]) == 0  # already done
    assert main(["open", folders[0], str(exact), *sealed.keys]) == 1  # other content is kept
    assert main(["open", folders[0], str(exact), *sealed.keys, "--overwrite"]) == 0


def test_a_second_run_changes_nothing_without_overwrite(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in sealed.files}
    capsys.readouterr()
    assert main(sealed.protect()) == 0
    assert f"0 sealed, {COUNT} already present" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in sealed.files} == before
    capsys.readouterr()
    assert main(sealed.protect("--overwrite", "--json")) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["sealed"], counts["present"], counts["failed"]) == (COUNT, 0, 0)
    after = {path.name: path.read_bytes() for path in sealed.files}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)  # new salts
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 0


def test_the_last_use_changes_only_for_subjects_that_are_sealed(
    sealed: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sealed.keyring() as keyring:
        (before,) = {row.used_day for row in keyring.rows}
        name = keyring.file_name("photos", "0002/0002_c1.png")
    (sealed.sealed / name).unlink()
    monkeypatch.setattr("engine.vault.keyring.today", lambda: before + 5)
    assert main(sealed.protect()) == 0
    with sealed.keyring() as keyring:
        days = {keyring.label_of(row): row.used_day - before for row in keyring.rows}
    assert days == {"photos/0001": 0, "photos/0002": 5, "photos/0003": 0}


def test_worker_processes_seal_the_same_images(scene: Scene) -> None:
    assert main([*scene.protect(), "--workers", "2", "--batch", "2"]) == 0
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0
    assert len(scene.files) == COUNT


def test_search_ranks_the_query_image_first(
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
    found = ["search", raw, str(sealed.sealed), *sealed.keys, *sealed.model, "--json"]
    assert main(found) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert {"file", "path", "similarity"} == set(result["matches"][0])


def test_results_as_json_name_each_file_that_failed(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = sealed.files[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    folders = [str(sealed.sealed), str(sealed.out)]
    for command, counted in (
        (["verify", folders[0]], "good"),
        (["open", *folders], "images"),
        (["recover", folders[0], str(sealed.root / "recovered"), *sealed.model], "images"),
        (["reveal", folders[0], str(sealed.root / "revealed")], "anonymized"),
        (["index", folders[0], *sealed.model], "added"),
    ):
        capsys.readouterr()
        assert main([*command, *sealed.keys, "--json"]) != 0, command
        printed = capsys.readouterr()
        content = json.loads(printed.out)
        assert (content[counted], content["failed"]) == (COUNT - 1, 1), command
        (failure,) = content["errors"]
        assert failure["file"] == str(damaged)
        assert f"{failure['error']}: {failure['message']}" in printed.err
    damaged = next(path for path in sorted(sealed.photos.rglob("*")) if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-40])
    assert main(sealed.protect("--overwrite", "--json")) == 1
    content = json.loads(capsys.readouterr().out)
    assert (content["sealed"], content["failed"]) == (COUNT - 1, 1)
    assert [failure["file"] for failure in content["errors"]] == [
        damaged.relative_to(sealed.photos).as_posix()
    ]


def test_json_reports_that_the_index_was_interrupted(
    sealed: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = IndexSummary(interrupted=True)
    monkeypatch.setattr(protect_tool, "_complete_index", lambda *_: stopped)
    capsys.readouterr()
    assert main(sealed.protect("--index", "--json")) == 130
    content = json.loads(capsys.readouterr().out)
    assert (content["present"], content["interrupted"]) == (COUNT, True)


def test_exif_orientation_is_applied_and_exif_data_is_not_kept(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(scene.photos)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    scene.photos.joinpath("9").mkdir(parents=True)
    image = Image.fromarray(np.tile(np.arange(48, dtype=np.uint8)[:, None, None], (1, 24, 3)))
    image.save(scene.photos / "9/turned.jpg", exif=exif)
    assert main(scene.protect()) == 0
    assert "EXIF data of 1 images was not kept" in capsys.readouterr().out
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
def test_subject_labels_of_each_source(
    scene: Scene, arguments: list[str], labels: set[str]
) -> None:
    assert main(scene.protect(*arguments)) == 0
    with scene.keyring() as keyring:
        assert {info.subject for info in keyring_admin.list_keys(keyring)} == labels


def test_subjects_from_a_table_and_a_key_for_each_image(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_folders_in_two_unicode_forms_are_one_subject(scene: Scene) -> None:
    shutil.rmtree(scene.photos)
    for index, name in enumerate(("Zo\u00eb", "Zoe\u0308")):
        draw(scene.photos / name / f"{index}.png", index)
    assert main(scene.protect()) == 0
    with scene.keyring() as keyring:
        assert [info.subject for info in keyring_admin.list_keys(keyring)] == ["photos/Zo\u00eb"]
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0


def test_every_entry_is_counted_once(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """A symlinked subfolder was skipped silently; litter of macOS failed and got a key."""
    draw(scene.root / "elsewhere/linked.png", 50)
    (scene.photos / "9999").symlink_to(scene.root / "elsewhere")
    (scene.photos / "loop").symlink_to(scene.photos)
    (scene.photos / "gone").symlink_to(scene.root / "nothing")
    for name in ("__MACOSX/0001_c1.png", "0001/._0001_c1.png", "0001/phone.heic"):
        (scene.photos / name).parent.mkdir(exist_ok=True)
        (scene.photos / name).write_bytes(b"not an image")
    assert main(scene.protect()) == 1
    out = capsys.readouterr().out
    assert f"{COUNT + 1} sealed, 0 already present, 2 failed, 3 left out" in out
    with scene.keyring() as keyring:
        subjects = {info.subject for info in keyring_admin.list_keys(keyring)}
    assert subjects == {*(f"photos/{person}" for person in PEOPLE), "photos/9999"}
    assert main(scene.protect()) == 1
    out = capsys.readouterr().out
    assert f"0 sealed, {COUNT + 1} already present, 2 failed, 3 left out" in out


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_order_on_disk_reveals_no_subjects(scene: Scene, workers: str) -> None:
    """In the order of their paths, 53 of 59 neighbours showed the same person."""
    shutil.rmtree(scene.photos)
    for index in range(30):
        draw(scene.photos / f"{index // 5:04d}/{index:04d}.png", index)
    assert main([*scene.protect(), "--workers", workers, "--batch", "3"]) == 0
    names = [path.name for path in sorted(scene.files, key=lambda path: path.stat().st_ctime_ns)]
    if workers == "0":
        assert names == sorted(names)
    # Two workers write two batches at the same time: a file is at most a few places off.
    places = {name: place for place, name in enumerate(sorted(names))}
    assert all(abs(places[name] - place) <= 12 for place, name in enumerate(names))


@pytest.mark.parametrize("more", [(), ("--keep-original",)], ids=["images", "originals"])
def test_workers_get_no_key_of_a_subject(
    scene: Scene, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that is sent to worker processes is searched for the keys of the keyring."""
    sent: list[bytes] = []

    class Recorder(ProcessPoolExecutor):
        def __init__(self, workers: int, context: Any, start: Any, arguments: Any) -> None:
            sent.append(pickle.dumps(arguments))
            super().__init__(workers, context, start, arguments)

        def submit(self, fn: Any, /, *arguments: Any, **more: Any) -> Future[Any]:
            sent.append(pickle.dumps((arguments, more)))
            return super().submit(fn, *arguments, **more)

    monkeypatch.setattr("engine.vault.sealing_work.ProcessPoolExecutor", Recorder)
    for _ in range(2):  # the second run compares the outputs that exist
        assert main([*scene.protect(*more), "--workers", "1", "--batch", "2"]) == 0
    assert len(sent) > COUNT
    with scene.keyring() as keyring:
        keys = [keyring.unwrap(row) for row in keyring.rows]
        assert len(keys) == len(PEOPLE) * (1 + len(more))
        keys.append(keyring.sealing_key("photos/0001").locator_key)
    assert not any(key in content for key in keys for content in sent)


def test_workers_can_neither_dump_core_nor_be_read_by_debuggers() -> None:
    settings = WorkSettings(Path(), Path(), (8, 4), overwrite=False)
    with make_executor(1, settings) as executor:
        assert executor.submit(resource.getrlimit, resource.RLIMIT_CORE).result() == (0, 0)
        # PR_GET_DUMPABLE; a function of this module would import torch in the worker
        dumpable = executor.submit(eval, "__import__('ctypes').CDLL(None).prctl(3, 0, 0, 0, 0)")
        assert dumpable.result() == 0
