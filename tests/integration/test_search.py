"""`protect.py search` and `index`: results, thresholds, changes, keys, kills and full disks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from engine.api import Anonymizer
from engine.checkpoint import save_native
from engine.details import save_calibrations
from engine.model import build_model, model_info
from engine.scoring.verification import Calibration
from engine.vault import index, keyring_admin, opening
from engine.vault import protect as protect_module
from engine.vault import search as search_module
from engine.vault.index import is_segment
from engine.vault.sealed_folder import MANIFEST_NAME
from engine.vault.search import IndexSummary
from modeling.encryption import png_format
from tests.fixtures.keyrings import seal_pixels
from tests.fixtures.protection import PEOPLE, Scene, draw
from tools import protect as protect_tool
from tools.protect import main
from utils.files import locked_folder

COUNT = sum(PEOPLE.values())


@pytest.fixture
def indexed(sealed: Scene) -> Scene:
    """Return a scene with an index."""
    assert main(_index(sealed)) == 0
    return sealed


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the names of all images that are opened from now on."""
    names: list[str] = []
    unseal = opening.unseal

    def recorded(paths: Iterable[Path], *more: Any) -> Iterator[opening.OpenedFile]:
        for file in unseal(paths, *more):
            names.append(file.path.name)
            yield file

    monkeypatch.setattr(search_module, "unseal", recorded)
    return names


def _index(scene: Scene) -> list[str]:
    return ["index", str(scene.sealed), *scene.keys, *scene.model]


def _search(scene: Scene, *more: str, query: str = "0002/0002_c2.png") -> list[str]:
    paths = [str(scene.photos / query), str(scene.sealed)]
    return ["search", *paths, *scene.keys, *scene.model, *more]


def _segments(scene: Scene) -> list[Path]:
    return sorted(path for path in scene.sealed.iterdir() if is_segment(path.name))


def _results(scene: Scene, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, float]:
    """Search for one image; return the similarity by path of all results."""
    capsys.readouterr()
    assert main(_search(scene, "-k", "99", "--json")) == code
    (result,) = json.loads(capsys.readouterr().out)
    return {match["path"]: match["similarity"] for match in result["matches"]}


def _check(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """Complete an index; check that it is valid and finds every image that the folder has."""
    assert main(_index(scene)) == 0
    assert [path.name for path in scene.sealed.iterdir() if ".tmp" in path.name] == []
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0
    assert len(_results(scene, capsys)) == len(scene.files)
    assert "no vector" not in capsys.readouterr().err


def test_protect_writes_the_vectors_that_index_computes(
    scene: Scene, capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    assert main(scene.protect("--index", "--batch", "3")) == 0
    assert len(_segments(scene)) == 1
    assert all(path.stat().st_mtime == 0 for path in (scene.sealed, *scene.sealed.iterdir()))
    assert opened == []
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0
    results = _results(scene, capsys)
    assert len(results) == len(opened) == COUNT  # only to read the paths of the results
    _segments(scene)[0].unlink()
    assert _results(scene, capsys) == pytest.approx(results, abs=1e-3)
    assert main(_index(scene)) == 0
    assert f"{COUNT} added, 0 already present, 0 failed" in capsys.readouterr().out
    assert _results(scene, capsys) == pytest.approx(results, abs=1e-3)
    assert main(_index(scene)) == 0
    assert f"0 added, {COUNT} already present, 0 failed" in capsys.readouterr().out


def test_a_folder_without_an_index_is_opened(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_search(sealed, "-k", "2")) == 0
    out, err = capsys.readouterr()
    assert len([line for line in out.splitlines() if line.strip()[:1].isdigit()]) == 2
    assert f"{sealed.sealed} has no index; opening all images" in err
    assert "calibration.json does not exist" in err


def test_images_without_a_vector_are_opened(
    indexed: Scene, capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    draw(indexed.photos / "0004/new.png", 90)
    assert main(indexed.protect()) == 0  # with --no-index
    capsys.readouterr()
    assert main(_search(indexed, "-k", "1")) == 0
    assert f"1 of {COUNT + 1} images have no vector; opening them" in capsys.readouterr().err
    assert len(opened) == 2  # and the best match
    assert main(indexed.protect("--index")) == 0
    assert "index: 1 images that were sealed before were added" in capsys.readouterr().out
    assert len(_segments(indexed)) == 2
    assert main(_index(indexed)) == 0
    assert len(_segments(indexed)) == 1  # small segments are merged
    _check(indexed, capsys)


def test_deleted_and_replaced_files_are_not_found_by_their_old_vectors(
    indexed: Scene, capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    indexed.files[0].unlink()
    draw(indexed.photos / "0003/0003_c1.png", 91)
    shutil.copy(indexed.photos / "0003/0003_c1.png", indexed.photos / "0003/0003_c2.png")
    before = _results(indexed, capsys)
    assert len(before) == COUNT - 1
    assert main(indexed.protect("--overwrite")) == 0
    opened.clear()
    after = _results(indexed, capsys)
    assert len(after) == COUNT
    assert len(opened) == 2 * COUNT  # no vector belongs to the new files
    assert after["0003/0003_c1.png"] == pytest.approx(after["0003/0003_c2.png"], abs=1e-3)
    _check(indexed, capsys)
    assert len(_segments(indexed)) == 1


def test_a_file_that_was_exchanged_is_not_returned(
    indexed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(indexed.files[0], indexed.files[1])
    assert len(_results(indexed, capsys, code=5)) == COUNT - 1


def test_keys_decide_what_is_found(indexed: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    others = COUNT - PEOPLE["0001"]
    with indexed.keyring() as keyring:
        keyring_admin.rotate(keyring, "photos/0002")
        keyring_admin.revoke(keyring, "photos/0001")
    assert len(_results(indexed, capsys, code=1)) == others
    assert main(_index(indexed)) == 0  # the vectors stay, for `revoke --undo`
    with indexed.keyring() as keyring:
        keyring_admin.restore(keyring, "photos/0001")
    assert len(_results(indexed, capsys)) == COUNT
    with indexed.keyring() as keyring:
        keyring_admin.destroy(keyring, "photos/0001")
    assert len(_results(indexed, capsys, code=1)) == others
    size = _segments(indexed)[0].stat().st_size
    assert main(_index(indexed)) == 1
    assert capsys.readouterr().err.count("DestroyedKey") == PEOPLE["0001"]
    assert _segments(indexed)[0].stat().st_size < size  # the destroyed vectors are removed
    assert len(_results(indexed, capsys, code=1)) == others


def test_another_checkpoint_is_an_error(
    indexed: Scene, make_cfg: Callable[..., CfgNode], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = make_cfg("MODEL.PRETRAIN_CHOICE", "none", "MODEL.MODE", "GCR")
    model, info = build_model(cfg, num_classes=5), model_info(cfg, {7: 0})
    networks = model.nets.official_networks
    with torch.no_grad():
        next(networks["C"].parameters()).add_(1e-3)
    indexed.checkpoint.unlink()
    save_native(indexed.checkpoint, "latest", networks, 1, info)
    assert main(_search(indexed)) == 2
    assert "was made with another checkpoint (digest " in capsys.readouterr().err
    assert main(_index(indexed)) == 0
    assert f"{COUNT} added, 0 already present" in capsys.readouterr().out
    _check(indexed, capsys)
    assert len(_segments(indexed)) == 1


def test_matches_are_above_the_threshold_of_the_calibration(
    indexed: Scene, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = indexed.checkpoint.resolve()
    indexed.checkpoint.unlink()
    shutil.copytree(checkpoint, indexed.checkpoint)
    similarities = sorted(_results(indexed, capsys).values(), reverse=True)
    middle = (similarities[1] + similarities[2]) / 2
    sealed = Calibration(1.00001, 0.01, 0.0, 0.0, 10, 1000)
    raw = Calibration(middle, 0.01, 0.005, 0.75, 10, 1000)
    save_calibrations({"raw->protected": raw, "protected->protected": sealed}, indexed.checkpoint)
    queries = [str(indexed.files[0]), *_search(indexed)[1:]]
    assert main(["search", *queries, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["matches"] == []
    assert first["threshold"] == 1.00001
    found = [match["similarity"] for match in second["matches"]]
    assert found == pytest.approx(similarities[:2], abs=1e-6)
    assert second["highest_similarity"] == found[0]
    assert second["true_positive_rate"] == 0.75
    assert second["expected_false_matches"] == pytest.approx(0.005 * COUNT)
    assert main(["search", *queries]) == 0
    out = capsys.readouterr().out
    assert out.count(":\n") == 2
    assert "no match: highest similarity +" in out
    assert f"threshold {middle:.4f} accepts 75.0% of the pairs of one person and 0.50%" in out
    assert main(["search", *queries, "--threshold", "0.99"]) == 0
    out = capsys.readouterr().out
    assert out.count("no match") == 1  # the sealed query is in the folder itself
    assert "validation" not in out  # the rates of this threshold are unknown


def test_a_query_that_does_not_open_does_not_stop_the_others(
    indexed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = indexed.root / "broken.png"
    broken.write_bytes(b"not an image")
    small = indexed.root / "small.png"  # sealed, 8 x 4 pixels
    with indexed.keyring() as keyring:
        small.write_bytes(png_format.encode(seal_pixels(keyring, "photos/0001")))
    queries = [str(broken), str(small), *_search(indexed)[1:]]
    assert main(["search", *queries, "-k", "1"]) == 1
    out, err = capsys.readouterr()
    assert "broken.png: BadInput: " in err
    assert "small.png: BadInput: 8 x 4 pixels; this checkpoint works on 32 x 64" in err
    assert "0002_c2.png:\n" in out
    alone = ["search", str(broken), str(indexed.sealed), *indexed.keys, *indexed.model]
    assert main([*alone, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_a_changed_segment_is_an_error_of_search_index_and_verify(
    indexed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    (segment,) = _segments(indexed)
    content = bytearray(segment.read_bytes())
    content[-20] ^= 1
    segment.write_bytes(content)
    assert main(_search(indexed)) == 5
    assert f"{segment}: a vector was changed; delete it and run" in capsys.readouterr().err
    assert main(["verify", str(indexed.sealed), *indexed.keys]) == 5
    content[-20] ^= 1
    content[200] ^= 1
    segment.write_bytes(content)
    for command in (_search(indexed), _index(indexed)):
        assert main(command) == 5
    segment.unlink()
    _check(indexed, capsys)


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_something_else_under_the_name_of_a_segment_is_reported(
    indexed: Scene, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = indexed.sealed / "index-0123456789abcdef.ised"
    if kind == "link":
        entry.symlink_to(indexed.photos / "0002/0002_c2.png")
    else:
        entry.mkdir()
    assert main(["verify", str(indexed.sealed), *indexed.keys]) == 5
    assert entry.name in capsys.readouterr().err
    assert main(_search(indexed)) == 1
    assert entry.name in capsys.readouterr().err


def test_index_needs_a_manifest_and_the_lock_of_the_folder(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked_folder(sealed.sealed):
        assert main(_index(sealed)) == 2
        assert "is in use by process" in capsys.readouterr().err
    (sealed.sealed / "manifest.ised").unlink()
    assert main(_index(sealed)) == 1
    assert "MissingManifest" in capsys.readouterr().err
    assert main(_search(sealed)) == 0


# ---- two programs in one folder ---------------------------------------------------------------


@pytest.mark.parametrize("first", ["index", "protect"])
def test_a_second_writer_is_refused(
    sealed: Scene, first: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = search_module if first == "index" else protect_module
    embeddings, codes = module.embeddings, []

    def during(model: Anonymizer, images: torch.Tensor) -> Any:
        monkeypatch.setattr(module, "embeddings", embeddings)
        verify = ["verify", str(sealed.sealed), *sealed.keys]
        writers = (_index(sealed), sealed.protect("--overwrite"), [*verify, "--accept"])
        codes.extend(map(main, (*writers, _search(sealed))))
        return embeddings(model, images)

    monkeypatch.setattr(module, "embeddings", during)
    protect = sealed.protect("--overwrite", "--index")
    assert main(_index(sealed) if first == "index" else protect) == 0
    assert codes[:3] == [2, 2, 2]
    assert capsys.readouterr().err.count(f"{sealed.sealed} is in use by process") == 3
    assert codes[3] in ((0,) if first == "index" else (0, 5))
    _check(sealed, capsys)


def test_search_while_index_merges_segments(
    indexed: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The segments that search has listed are deleted before it reads their vectors."""
    draw(indexed.photos / "0004/new.png", 90)
    with monkeypatch.context() as patch:  # a killed run, which has not merged the segments
        patch.setattr(protect_tool, "_complete_index", lambda *_: IndexSummary())
        assert main(indexed.protect("--index")) == 0
    assert len(_segments(indexed)) == 2
    expected, read = _results(indexed, capsys), search_module._read_index

    def merged(*given: Any) -> None:
        monkeypatch.setattr(search_module, "_read_index", read)
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(_index(indexed)) == 0
        read(*given)

    monkeypatch.setattr(search_module, "_read_index", merged)
    assert _results(indexed, capsys) == pytest.approx(expected, abs=1e-3)
    assert len(_segments(indexed)) == 1
    assert len(expected) == COUNT + 1


def test_imported_keys_search_a_folder_of_another_keyring(
    indexed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """Manifest and index belong to the other keyring; the images are opened."""
    keys = indexed.root / "other"
    keys.mkdir()
    other = Scene(keys)
    query = str(indexed.photos / "0002/0002_c2.png")
    with other_keyring(other) as keyring:
        keyring.ensure(["photos/0001"])
    command = ["search", query, str(indexed.sealed), *other.keys, *indexed.model, "-k", "9"]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "belongs to another keyring; opening all images" in err
    assert err.count("MissingKey") == COUNT


@pytest.mark.parametrize("position", [40, -1], ids=["commitment", "end"])
def test_a_changed_manifest_is_an_error(
    indexed: Scene, position: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the manifest, files that were put back would be found without a check."""
    manifest = indexed.sealed / MANIFEST_NAME
    content = bytearray(manifest.read_bytes())
    content[position] ^= 1
    manifest.write_bytes(content)
    assert main(_search(indexed)) == 5
    out, err = capsys.readouterr()
    assert out == "" and f"{manifest}: " in err and "has no index" not in err


def test_a_file_without_a_vector_that_was_put_back_is_reported(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = sealed.pair("0003/0003_c1.png")
    old = path.read_bytes()
    assert main(sealed.protect("--overwrite")) == 0
    path.write_bytes(old)
    assert main(_search(sealed, "-k", "1")) == 5
    assert f"{path}: Tampered: is not the file that the manifest lists" in capsys.readouterr().err


def other_keyring(scene: Scene) -> Any:
    return index.Keyring.create(scene.keyring_path, scene.master)


# ---- interrupted runs --------------------------------------------------------------------------


def _start(scene: Scene, command: list[str]) -> Any:
    def run() -> None:
        index.MAX_VECTORS = search_module.MAX_VECTORS = 2  # several segments
        os._exit(main([*command, "--batch", "1"]))

    process = get_context("fork").Process(target=run)
    process.start()
    return process


def _kill_at_random(scene: Scene, rounds: int, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    _start(scene, _index(scene)).join()
    duration = time.monotonic() - started
    for seed in range(rounds):
        if seed % 2 == 0:  # otherwise complete and merge what the last one left
            for path in _segments(scene):
                path.unlink()
        process = _start(scene, _index(scene))
        time.sleep(duration * random.Random(seed).random())
        process.kill()
        process.join()
        # `verify` reports the unfinished file of a killed run; the next run removes it.
        unfinished = list(scene.sealed.glob(".index-*.tmp*"))
        assert main(["verify", str(scene.sealed), *scene.keys]) == (5 if unfinished else 0)
        assert len(_results(scene, capsys)) == COUNT
    assert main(_index(scene)) == 0
    assert main(["verify", str(scene.sealed), *scene.keys]) == 0
    _check(scene, capsys)


def test_kill_9_of_index_at_random_moments(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    _kill_at_random(sealed, 3, capsys)


@pytest.mark.slow
def test_kill_9_of_index_at_forty_random_moments(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    _kill_at_random(sealed, 40, capsys)


def test_index_removes_the_unfinished_file_of_a_killed_run(
    sealed: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = sealed.sealed / ".index-0123456789abcdef.0123456789abcdef.tmp.ised"
    unfinished.write_bytes(b"cut")
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 5
    assert main(_index(sealed)) == 0
    assert not unfinished.exists()
    assert main(["verify", str(sealed.sealed), *sealed.keys]) == 0
    _check(sealed, capsys)


def test_an_interrupted_index_keeps_the_batches_that_are_done(
    sealed: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = search_module.embeddings

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(search_module, "embeddings", interrupted)
        assert main([*_index(sealed), "--batch", "3"]) == 130
    out = capsys.readouterr().out
    assert "3 added, 0 already present, 0 failed" in out
    assert "interrupted; the same command continues" in out
    assert main(_index(sealed)) == 0
    assert f"{COUNT - 3} added, 3 already present" in capsys.readouterr().out
    _check(sealed, capsys)


def test_a_full_disk_stops_index_and_leaves_no_partial_segment(
    sealed: Scene, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = small_disk / "sealed"
    shutil.copytree(sealed.sealed, target)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    command = [x if x != str(sealed.sealed) else str(target) for x in _index(sealed)]
    assert main(command) == 3
    err = capsys.readouterr().err
    assert "StorageError" in err
    assert "No space left" in err
    assert {path.name for path in target.iterdir()} == {p.name for p in sealed.sealed.iterdir()}
    filler.unlink()
    for path in list(target.glob("*.png"))[:3]:
        path.unlink()
    assert main(command) == 0
    assert f"{COUNT - 3} added" in capsys.readouterr().out
