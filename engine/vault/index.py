"""The index of a sealed folder: one encrypted embedding per image, for `search`.

An index consists of segments, files that are written once and never changed (docs/FORMAT.md). A
segment has a table, sealed under the keyring, and one ciphertext per vector. Each vector is
encrypted under a key derived from its subject's key, so that destroying that key destroys it. It is
bound to the SHA-256 of its sealed file and to the network that computed it.

Vectors are encrypted with AES-256-GCM and random nonces. For 2^32 vectors under one key, the
probability of a repeated nonce is 2^-33.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray
from torch import Tensor

from engine.api import Anonymizer
from engine.vault.keyring import Keyring
from engine.vault.sealed_folder import publish
from modeling.encryption.ised_errors import (
    AuthenticationError,
    BadInput,
    FormatError,
    IsedError,
    MissingKey,
    Tampered,
    UnsupportedVersion,
)
from modeling.encryption.primitives import OVERHEAD_BYTES, TAG_BYTES, derive_key, open_sealed, seal
from utils.files import check_regular, sync_folder

MAX_VECTORS = 4096  # in one segment: 16 MiB for 2,048 dimensions
MAX_DIM = 1 << 15
DIGEST_BYTES = 32
KEY_ID_BYTES = 16
NONCE_BYTES = 12
ENTRY_BYTES = DIGEST_BYTES + KEY_ID_BYTES + NONCE_BYTES

_NAME = re.compile(r"index-[0-9a-f]{16}\.ised")
_MAGIC = b"ISEI"
_VERSION = 1
_HEAD = struct.Struct(">4sB3xII")  # magic, version, number of vectors, dimensions
_CONTEXT = "index"
_VECTOR_CONTEXT = "vector"
_CIPHERS = 4096  # keys of subjects that are kept
_VECTOR_AAD = b"securereid/ised/vector/1"
_REMEDY = "delete it and run `protect.py index`"
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Segment:
    """One file of an index. Its table is opened, its vectors are not."""

    path: Path
    dim: int  # dimensions of its vectors
    network: bytes  # digest of the network that computed them, see `Anonymizer.embedding_digest`
    table: bytes  # for each vector: SHA-256 of its sealed file, id of its key, and nonce

    @classmethod
    def read(cls, path: Path, key: bytes) -> Segment:
        """Read and authenticate the table of a segment, given the manifest key of the keyring.

        Raises:
            FileNotFoundError: It does not exist.
            IsedError: It cannot be read, is not exactly one segment, was changed, or was made under
                another keyring.
        """
        try:
            check_regular(path)
            with path.open("rb") as file:
                head = file.read(_HEAD.size)
                count, dim = _parse_head(path, head)
                sealed_bytes = OVERHEAD_BYTES + DIGEST_BYTES + count * ENTRY_BYTES
                size = _HEAD.size + sealed_bytes + count * _ciphertext_bytes(dim)
                if os.fstat(file.fileno()).st_size != size:
                    raise FormatError(
                        f"{path} does not have {size} bytes: it is damaged; {_REMEDY}"
                    )
                sealed = file.read(sealed_bytes)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror})") from None
        try:
            message = open_sealed(key, _CONTEXT, head, sealed)
        except AuthenticationError as error:
            raise type(error)(f"{path}: {error}; {_REMEDY}") from None
        return cls(path, dim, message[:DIGEST_BYTES], message[DIGEST_BYTES:])

    def __len__(self) -> int:
        return len(self.table) // ENTRY_BYTES

    def entries(self) -> Iterator[bytes]:
        """Yield the entry of each vector."""
        for start in range(0, len(self.table), ENTRY_BYTES):
            yield self.table[start : start + ENTRY_BYTES]

    def vectors(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield entry and ciphertext of each vector; raise FileNotFoundError after a deletion."""
        size = _ciphertext_bytes(self.dim)
        try:
            with self.path.open("rb", buffering=_READ_BYTES) as file:
                file.seek(-size * len(self), os.SEEK_END)
                for entry in self.entries():
                    yield entry, file.read(size)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BadInput(f"{self.path} cannot be read ({error.strerror})") from None


def is_segment(name: str) -> bool:
    """Return whether a file with this name is a segment."""
    return _NAME.fullmatch(name) is not None


def read_segments(folder: Path, keyring: Keyring) -> list[Segment]:
    """Return the segments of a folder; a segment that is deleted meanwhile is left out.

    Raises:
        IsedError: A segment is damaged, was changed, or was made under another keyring.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_segment(entry.name))
    segments, key = [], keyring.manifest_key()
    for name in names:
        with suppress(FileNotFoundError):
            segments.append(Segment.read(folder / name, key))
    return segments


class VectorKeys:
    """Seals and opens vectors under the keys of their subjects.

    The last ``_CIPHERS`` keys are kept, since the files of a subject follow one another in most
    folders. All keys of an archive of 100,000 subjects would take as much memory as its vectors.
    """

    def __init__(self, keyring: Keyring) -> None:
        """Use the keys that the keyring has now."""
        keyring.refresh()
        self._keyring = keyring
        self._cipher = lru_cache(_CIPHERS)(self._new_cipher)

    def seal(
        self, key_id: bytes, digest: bytes, network: bytes, vector: NDArray[np.float16]
    ) -> tuple[bytes, bytes]:
        """Return the entry and the ciphertext of a vector, float16 (D,).

        It is bound to the SHA-256 of its sealed file and to the digest of the network.
        """
        file_and_key, nonce = digest + key_id, os.urandom(NONCE_BYTES)
        message = vector.astype("<f2").tobytes()
        aad = _VECTOR_AAD + network + file_and_key
        return file_and_key + nonce, self._cipher(key_id).encrypt(nonce, message, aad)

    def open(self, segment: Segment, entry: bytes, ciphertext: bytes) -> bytes:
        """Return a vector: its values as little-endian float16.

        Raises:
            MissingKey, RevokedKey, DestroyedKey: There is no usable key.
            Tampered: The vector was changed.
        """
        file_and_key, nonce = entry[:-NONCE_BYTES], entry[-NONCE_BYTES:]
        cipher = self._cipher(file_and_key[DIGEST_BYTES:])
        try:
            return cipher.decrypt(nonce, ciphertext, _VECTOR_AAD + segment.network + file_and_key)
        except InvalidTag:
            raise Tampered(f"{segment.path}: a vector was changed; {_REMEDY}") from None

    def _new_cipher(self, key_id: bytes) -> AESGCM:
        row = self._keyring.row(key_id)
        if row is None:
            raise MissingKey("no key for this file: its key row is lost")
        row.check_usable()
        return AESGCM(derive_key(self._keyring.unwrap(row), _VECTOR_CONTEXT))


class IndexWriter:
    """Collects vectors and writes a segment for every MAX_VECTORS of them."""

    def __init__(self, folder: Path, keyring: Keyring, network: bytes) -> None:
        """Write segments of a network (see `Anonymizer.embedding_digest`) into a folder."""
        self._folder, self._keyring, self.network = folder, keyring, network
        self._keys = VectorKeys(keyring)
        self._sealed: list[tuple[bytes, bytes]] = []

    def add(self, key_id: bytes, digest: bytes, vector: NDArray[np.float16]) -> None:
        """Seal the vector (D,) of a sealed file with this SHA-256; write a full segment."""
        self.copy(*self._keys.seal(key_id, digest, self.network, vector))

    def copy(self, entry: bytes, ciphertext: bytes) -> None:
        """Add a vector of another segment of the same network."""
        self._sealed.append((entry, ciphertext))
        if len(self._sealed) == MAX_VECTORS:
            self.flush()

    def flush(self) -> None:
        """Write the vectors that were added; they are on the disk when this returns.

        Raises:
            StorageError: The disk is full, read-only or failing; no partial file is left.
        """
        if not self._sealed:
            return
        entries, ciphertexts = zip(*self._sealed, strict=True)
        dim = (len(ciphertexts[0]) - TAG_BYTES) // 2
        head = _HEAD.pack(_MAGIC, _VERSION, len(entries), dim)
        table = seal(self._keyring.manifest_key(), _CONTEXT, head, self.network + b"".join(entries))
        path = self._folder / f"index-{secrets.token_hex(8)}.ised"
        publish(path, b"".join((head, table, *ciphertexts)), overwrite=False)
        sync_folder(self._folder)
        self._sealed.clear()


def embeddings(model: Anonymizer, images: Tensor) -> NDArray[np.float16]:
    """Return unit embeddings as the index stores them, float16 (B, D)."""
    return model.embed_tensor(images).half().cpu().numpy()


def check_segment(path: Path, keyring: Keyring) -> IsedError | None:
    """Return why a segment is not valid; open every vector whose key can be used."""
    try:
        segment, keys = Segment.read(path, keyring.manifest_key()), VectorKeys(keyring)
        for entry, ciphertext in segment.vectors():
            try:
                keys.open(segment, entry, ciphertext)
            except AuthenticationError:
                raise
            except IsedError:  # revoked or destroyed: an error of the sealed file, if it exists
                continue
    except FileNotFoundError:
        return BadInput("was deleted meanwhile; run the command again")
    except IsedError as error:
        return error.of_one_file()
    return None


def _parse_head(path: Path, head: bytes) -> tuple[int, int]:
    """Return the number of vectors and their dimensions."""
    if len(head) < _HEAD.size or head[:4] != _MAGIC:
        raise FormatError(f"{path} is not a segment of an index; {_REMEDY}", 0)
    _, version, count, dim = _HEAD.unpack(head)
    if version != _VERSION:
        raise UnsupportedVersion(f"{path} has version {version}; this program reads {_VERSION}", 4)
    if head != _HEAD.pack(_MAGIC, _VERSION, count, dim):
        raise FormatError(f"{path} has reserved bytes that are not zero; {_REMEDY}", 5)
    if not 1 <= count <= MAX_VECTORS or not 1 <= dim <= MAX_DIM:
        raise FormatError(f"{path} has {count} vectors of {dim} dimensions; {_REMEDY}", 8)
    return count, dim


def _ciphertext_bytes(dim: int) -> int:
    return 2 * dim + TAG_BYTES
