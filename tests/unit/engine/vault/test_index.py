"""Segments of an index: authentic as a whole, bound to keys and files; the search in vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.vault import index, keyring_admin, search
from engine.vault.index import (
    DIGEST_BYTES,
    ENTRY_BYTES,
    IndexWriter,
    Segment,
    VectorKeys,
    check_segment,
    is_segment,
    read_segments,
)
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile
from engine.vault.search import most_similar
from modeling.encryption.ised_errors import (
    DestroyedKey,
    FormatError,
    IsedError,
    RevokedKey,
    Tampered,
    WrongKey,
)

NETWORK = bytes(range(32))
VECTORS = np.linspace(-1, 1, 12, dtype=np.float16).reshape(3, 4)
DIGESTS = [bytes([number]) * 32 for number in (1, 2, 3)]
SUBJECTS = ["set/1", "set/2", "set/1"]


@pytest.fixture
def keyring(tmp_path: Path) -> Iterator[Keyring]:
    with Keyring.create(tmp_path / "keys.db", KeyFile(tmp_path / "master.key")) as keyring:
        yield keyring


@pytest.fixture
def segment(keyring: Keyring, tmp_path: Path) -> Segment:
    """Return a segment with two vectors of one subject and one of another."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    writer = IndexWriter(folder, keyring, NETWORK)
    for subject, digest, vector in zip(SUBJECTS, DIGESTS, VECTORS, strict=True):
        writer.add(keyring.sealing_key(subject).key_id, digest, vector)
    writer.flush()
    writer.flush()  # nothing is left to write
    (segment,) = read_segments(folder, keyring)
    return segment


def _opened(segment: Segment, keyring: Keyring) -> list[np.ndarray | type[IsedError]]:
    """Return each vector of a segment, or the class of its error."""
    keys, vectors = VectorKeys(keyring), []
    for entry, ciphertext in segment.vectors():
        try:
            vectors.append(np.frombuffer(keys.open(segment, entry, ciphertext), np.float16))
        except IsedError as error:
            vectors.append(type(error))
    return vectors


def test_vectors_open_as_they_were_written(keyring: Keyring, segment: Segment) -> None:
    assert [entry[:DIGEST_BYTES] for entry in segment.entries()] == DIGESTS
    assert (segment.network, segment.dim, len(segment)) == (NETWORK, 4, 3)
    assert np.array_equal(_opened(segment, keyring), VECTORS)
    assert check_segment(segment.path, keyring) is None
    assert is_segment(segment.path.name)
    assert segment.path.stat().st_mtime == 0
    assert segment.path.stat().st_mode & 0o777 == 0o600


def test_more_subjects_than_kept_keys(
    keyring: Keyring, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_CIPHERS", 1)
    assert np.array_equal(_opened(segment, keyring), VECTORS)


def test_no_changed_byte_is_accepted(keyring: Keyring, segment: Segment) -> None:
    content = segment.path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        segment.path.write_bytes(changed)
        assert isinstance(check_segment(segment.path, keyring), IsedError), position
    for length in (*range(0, len(content), 37), len(content) - 1, len(content) + 1, 1 << 20):
        segment.path.write_bytes((content + bytes(1 << 20))[:length])
        assert isinstance(check_segment(segment.path, keyring), FormatError), length
    segment.path.write_bytes(content)
    assert check_segment(segment.path, keyring) is None


@pytest.mark.parametrize("part", ["digest", "key", "nonce", "network", "ciphertext"])
def test_a_vector_is_bound_to_file_key_and_network(
    keyring: Keyring, segment: Segment, part: str
) -> None:
    """A person with the manifest key, but without the subjects' keys, cannot move a vector."""
    (entry, ciphertext), (other, _), (third, sibling) = segment.vectors()
    forged = {
        "digest": other[:32] + entry[32:],
        "key": entry[:32] + other[32:48] + entry[48:],
        "nonce": entry[:48] + third[48:],
    }.get(part, entry)
    network = bytes(32) if part == "network" else NETWORK
    writer = IndexWriter(segment.path.parent, keyring, network)
    writer.copy(forged, sibling if part == "ciphertext" else ciphertext)
    segment.path.unlink()
    writer.flush()
    (moved,) = read_segments(segment.path.parent, keyring)
    assert _opened(moved, keyring) == [Tampered]
    assert isinstance(check_segment(moved.path, keyring), Tampered)


def test_vectors_share_the_fate_of_their_keys(
    keyring: Keyring, segment: Segment, tmp_path: Path
) -> None:
    keyring_admin.revoke(keyring, "set/1")
    revoked = _opened(segment, keyring)
    assert revoked[0] == revoked[2] == RevokedKey
    assert np.array_equal(revoked[1], VECTORS[1])
    assert check_segment(segment.path, keyring) is None
    keyring_admin.restore(keyring, "set/1")
    keyring_admin.rotate(keyring, "set/2")
    keyring_admin.rekey(keyring, KeyFile(tmp_path / "new.key"))
    assert np.array_equal(_opened(segment, keyring), VECTORS)
    keyring_admin.destroy(keyring, "set/1")
    destroyed = _opened(segment, keyring)
    assert destroyed[0] == destroyed[2] == DestroyedKey
    assert np.array_equal(destroyed[1], VECTORS[1])


def test_another_keyring_does_not_open_a_segment(segment: Segment, tmp_path: Path) -> None:
    with Keyring.create(tmp_path / "other.db", KeyFile(tmp_path / "other.key")) as other:
        assert isinstance(check_segment(segment.path, other), WrongKey)


def test_a_segment_reveals_neither_persons_nor_files(keyring: Keyring, tmp_path: Path) -> None:
    key = keyring.sealing_key("set/1")
    writer = IndexWriter(tmp_path, keyring, NETWORK)
    for number in range(200):  # equal vectors of one person
        writer.add(key.key_id, bytes([number]) * 32, VECTORS[0])
    writer.flush()
    (segment,) = read_segments(tmp_path, keyring)
    content = segment.path.read_bytes()
    for secret in (key.key_id, key.key, NETWORK, VECTORS[0].tobytes(), bytes([7]) * 8):
        assert secret not in content
    body = content[16:]  # any 4 bytes twice by chance: about .04 pairs expected for 6 bytes
    windows = Counter(body[start : start + 6] for start in range(len(body) - 5))
    assert max(windows.values()) == 1


@pytest.mark.parametrize(
    ("count", "dim"), [(0, 4), (index.MAX_VECTORS + 1, 4), (2**32 - 1, 4), (3, 0), (3, 2**32 - 1)]
)
def test_a_hostile_head_is_refused_before_anything_is_read(
    keyring: Keyring, segment: Segment, count: int, dim: int
) -> None:
    content = segment.path.read_bytes()
    head = content[:8] + count.to_bytes(4, "big") + dim.to_bytes(4, "big")
    segment.path.write_bytes(head + content[16:])
    with pytest.raises(FormatError, match="vectors of"):
        Segment.read(segment.path, keyring.manifest_key())


def test_full_segments_are_written_at_once(
    keyring: Keyring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_VECTORS", 4)
    writer = IndexWriter(tmp_path, keyring, NETWORK)
    key_id = keyring.sealing_key("set/1").key_id
    for number in range(9):
        writer.add(key_id, bytes([number]) * 32, VECTORS[0])
    assert [len(segment) for segment in read_segments(tmp_path, keyring)] == [4, 4]
    writer.flush()
    segments = read_segments(tmp_path, keyring)
    assert sorted(len(segment) for segment in segments) == [1, 4, 4]
    assert all(len(segment.table) % ENTRY_BYTES == 0 for segment in segments)


@pytest.mark.parametrize("count", [1, 5, 100])
def test_search_returns_the_highest_cosines(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_BLOCK_ROWS", 16)
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((50, 8)) / 8).astype(np.float16)
    vectors[[3, 20]] = np.nan
    queries = rng.standard_normal((3, 8)).astype(np.float32)
    similarities, rows = most_similar(vectors, torch.from_numpy(queries), count)
    expected = np.nan_to_num(queries @ vectors.astype(np.float32).T, nan=-1.0).clip(-1, 1)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :count]
    assert rows.shape == (3, min(count, 50))
    best = np.take_along_axis(expected, order, axis=1)
    assert np.allclose(similarities, best, atol=1e-5)
    assert np.allclose(np.take_along_axis(expected, rows, axis=1), best, atol=1e-5)


def test_an_image_with_a_nan_embedding_is_ranked_last() -> None:
    vectors = np.array([[0.1], [np.nan], [0.9], [0.5], [np.nan], [0.7]], np.float16)
    _, rows = most_similar(vectors, torch.ones(1, 1), 4)
    assert rows.tolist() == [[2, 5, 3, 0]]
