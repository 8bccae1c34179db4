"""The keyring: random keys per subject, wrapped under a root, wrapped under the master.

``master -> root -> every row``. The service keys (locator, names, labels) are random and wrapped
too, so that changing master and root orphans no file.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from modeling.encryption.errors import (
    DestroyedKey,
    IsedError,
    KeyringExists,
    RevokedKey,
)
from modeling.encryption.key_lookup import KeySnapshot, check_usable, fits, missing_key
from modeling.encryption.keyring_root import new_root, unlock_root
from modeling.encryption.keyring_rows import KeyRow
from modeling.encryption.keyring_store import BUSY_TIMEOUT_MS, KeyringStore
from modeling.encryption.keyring_table import KeyTable
from modeling.encryption.keys import SubjectKey
from modeling.encryption.master import KeyFile, Master
from modeling.encryption.picture import LOCATOR_BYTES, key_id_of
from modeling.encryption.primitives import (
    derive_key,
    hmac_sha256,
    random_key,
)
from modeling.encryption.secret_files import check_private, new_private_file
from modeling.encryption.subject_labels import checked_label
from utils.files import remove_leftovers

_DAY_S = 86_400


class Keyring(KeyTable):
    """An open keyring; a `KeySource`. Use it in one process and one thread."""

    @classmethod
    def create(cls, path: str | os.PathLike[str], master: Master) -> Keyring:
        """Make a new keyring; of several processes exactly one succeeds.

        Raises:
            KeyringExists: There is one already.
            StorageError: It cannot be written.
        """
        path = Path(path)
        if path.exists() or path.is_symlink():
            raise KeyringExists(f"{path} exists already; it is never overwritten")
        if isinstance(master, KeyFile):
            master.create_if_missing()
        try:
            with new_private_file(path) as temporary:
                store = KeyringStore.create(temporary)
                try:
                    KeyTable(store, *new_root(os.urandom(16), master, epoch=0)).found()
                finally:
                    store.close()
        except FileExistsError:
            raise KeyringExists(f"{path} exists already; it is never overwritten") from None
        return cls.open(path, master)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], master: Master, busy_timeout_ms: int = BUSY_TIMEOUT_MS
    ) -> Keyring:
        """Unlock a keyring.

        Raises:
            KeyringMissing, InsecurePermissions, KeyringLocked, KeyringCorrupt, WrongMaster: What
                the class says.
        """
        path = Path(path)
        check_private(path, "keyring")
        remove_leftovers(path.parent, path.name)  # second names of this file or copies of it
        store = KeyringStore(path, busy_timeout_ms)
        try:
            with store.transaction(write=False):
                head = store.head()
            keyring = cls(store, unlock_root(head, master, path), head)
            keyring.refresh()
        except BaseException:
            store.close()
            raise
        return keyring

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    def __enter__(self) -> Keyring:
        """Return the keyring itself."""
        return self

    def __exit__(self, *args: object) -> None:
        """Close the file."""
        self.close()

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the active key of a subject; a new one is on disk before it is returned.

        Raises:
            RevokedKey, DestroyedKey: The subject's keys were; a new one needs an explicit rotate.
        """
        self.refresh()
        row = self.active_row(subject)
        if row is None:
            with self.writing():
                row = self.active_row(subject) or self._first_key(subject)
        return SubjectKey(row.key_id, self.unwrap(row), self._services["locate"])

    def ensure(self, subjects: Iterable[str]) -> None:
        """Make the missing keys of many subjects in one transaction.

        Subjects whose keys were revoked or destroyed are passed over: `sealing_key` says so.
        """
        self.refresh()
        missing = sorted({s for s in subjects if self.active_row(s) is None})
        if not missing:
            return
        with self.writing():
            for subject in missing:
                if self.active_row(subject) is None:
                    try:
                        self._first_key(subject)
                    except (RevokedKey, DestroyedKey):
                        continue

    def opening_key(self, header: bytes) -> bytes:
        """Return the key that the locator of a header chunk names.

        Raises:
            MissingKey, RevokedKey, DestroyedKey: There is none to be used.
        """
        self.refresh()
        row = self._rows.get(key_id_of(header, self._services["locate"]))
        if row is None:
            row = next((row for row in self._imported() if fits(self.unwrap(row), header)), None)
        if row is None:
            raise missing_key()
        check_usable(row.state)
        return self.unwrap(row)

    def file_name(self, dataset: str, path: str) -> str:
        """Return the output name of a source: a function of it that tells an outsider nothing."""
        message = b"file" + dataset.encode() + b"\0" + path.encode()
        digest = hmac_sha256(self._services["name"], message)[:16]
        return base64.b32encode(digest).decode().rstrip("=").lower() + ".png"

    def manifest_key(self) -> bytes:
        """Return the key that manifests of sealed folders are sealed under."""
        return derive_key(self._services["name"], "manifest")

    def new_row(self, subject: str, state: str, key_id: bytes | None = None) -> KeyRow:
        """Return a row for a new key of a subject, not yet wrapped or written."""
        key_id = os.urandom(LOCATOR_BYTES) if key_id is None else key_id
        tag = self.subject_tag(subject)
        generation = 1 + max((row.generation for row in self.rows_of(subject)), default=0)
        label = self.sealed_label(key_id, checked_label(subject))
        day = int(time.time() // _DAY_S)
        return KeyRow(key_id, tag, label, generation, state, 0, None, day)

    def snapshot(self, subjects: Iterable[str] = ()) -> KeySnapshot:
        """Return the keys as they are now, to hand to worker processes through their pipes.

        Args:
            subjects: Whose active keys to include; missing ones are made, in one transaction.
        """
        wanted = sorted(set(subjects))
        self.ensure(wanted)
        sealing: dict[str, SubjectKey | IsedError] = {}
        for subject in wanted:
            try:
                sealing[subject] = self.sealing_key(subject)
            except (RevokedKey, DestroyedKey) as refusal:
                sealing[subject] = refusal
        return KeySnapshot(
            locator_key=self._services["locate"],
            held={row.key_id: (row.state, self._usable(row)) for row in self.rows},
            imported=tuple((row.state, self.unwrap(row)) for row in self._imported()),
            sealing=sealing,
        )

    def _usable(self, row: KeyRow) -> bytes | None:
        """Return the key of a row, None where its state forbids to use it."""
        return self.unwrap(row) if row.state in ("active", "retired") else None

    def _first_key(self, subject: str) -> KeyRow:
        """Make the active key of a subject that has none; within `writing` only."""
        states = {row.state for row in self.rows_of(subject)}
        if "revoked" in states:
            raise RevokedKey(
                "the subject's keys were revoked; `keyring revoke --undo` allows it again"
            )
        if "destroyed" in states:  # a key imported since opens, it does not allow a new one
            raise DestroyedKey(
                "the subject's keys were destroyed; `keyring rotate` allows it to be protected anew"
            )
        return self.put(self.new_row(subject, "active"), random_key())

    def _imported(self) -> Iterator[KeyRow]:
        """Yield the rows whose files the locator does not find; see `key_lookup`."""
        return (row for row in self._rows.values() if row.imported and row.wrapped is not None)
