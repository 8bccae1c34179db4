"""The keyring's rows in memory: read whole, authenticated, written back in one transaction.

The keyring: random keys per subject, wrapped under a root, wrapped under the master.

``master -> root -> every row``. The service keys (locator, names, labels) are random and wrapped
too, so that changing master and root orphans no file.
"""

from __future__ import annotations

import base64
import hmac
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engine.vault.key_snapshot import KeySnapshot, check_usable, fits, missing_key
from engine.vault.keyring_store import BUSY_TIMEOUT_MS, SERVICES, HeadRow, KeyringStore, KeyRow
from engine.vault.master import KeyFile, Master, new_root, opened, row_aad, service_aad, unlock_root
from engine.vault.secret_files import check_private, new_private_file
from engine.vault.subjects import any_label, checked_label, spellings
from modeling.encryption.ised_errors import (
    DestroyedKey,
    IsedError,
    KeyringCorrupt,
    KeyringError,
    KeyringExists,
    RevokedKey,
)
from modeling.encryption.keys import SubjectKey
from modeling.encryption.primitives import derive_key, hmac_sha256, random_key, seal
from modeling.encryption.sealed_image import LOCATOR_BYTES, key_id_of
from utils.files import remove_leftovers
from utils.text import composed


class KeyTable:
    """Rows and service keys of an unlocked keyring.

    One authentication code covers all rows, beside the wrap of each: no row can be swapped,
    dropped, or put back from an older copy of the same file without being noticed.
    """

    def __init__(self, store: KeyringStore, root: bytes, head: HeadRow) -> None:
        """Take an unlocked file; nothing is read before `refresh`."""
        self.store = store
        self._root: bytes
        self._head: HeadRow
        self._set_root(root, head)
        self._services: dict[str, bytes] = {}
        self._rows: dict[bytes, KeyRow] = {}
        self._active: dict[bytes, KeyRow] = {}
        self._by_tag: dict[bytes, dict[bytes, KeyRow]] = {}
        self._unwrapped: dict[bytes, bytes] = {}
        self._odd_tags: dict[str, list[bytes]] | None = None
        self._plain: set[bytes] = set()  # labels, encrypted, known to be composed: not to open anew
        self._version = -1

    @property
    def head(self) -> HeadRow:
        """The row about the keyring, as last read."""
        return self._head

    @property
    def rows(self) -> list[KeyRow]:
        """Every key row, as last read."""
        return list(self._rows.values())

    def subject_tag(self, subject: str) -> bytes:
        """Return the 32 bytes that stand for a subject label in new rows and tombstones.

        Raises:
            BadInput: It is no label.
        """
        return self._tag(any_label(subject))

    def check_subject(self, subject: str) -> None:
        """Refuse a subject that has no key to seal with and cannot get one.

        Raises:
            BadInput: Its label is none, or too long for a new key.
        """
        if self.active_row(subject) is None:
            checked_label(subject)

    def rows_of(self, subject: str) -> list[KeyRow]:
        """Return the rows of a subject, oldest generation first."""
        rows = [row for tag in self._tags(subject) for row in self._by_tag.get(tag, {}).values()]
        return sorted(rows, key=lambda row: row.generation)

    def active_row(self, subject: str) -> KeyRow | None:
        """Return the row whose key seals for a subject, if there is one."""
        tags = self._tags(subject)
        return next((self._active[tag] for tag in tags if tag in self._active), None)

    def unwrap(self, row: KeyRow) -> bytes:
        """Return the key of a row, whatever its state.

        Raises:
            KeyringCorrupt: The row was edited.
        """
        key = self._unwrapped.get(row.key_id)
        if key is None:
            key = opened(self._root, "key", row_aad(self._head.keyring_id, row), row.wrapped or b"")
            self._unwrapped[row.key_id] = key
        return key

    def label_of(self, row: KeyRow) -> str | None:
        """Return the subject label of a row; None once it was destroyed."""
        if row.label_ct is None:
            return None
        aad = self._head.keyring_id + row.key_id
        return opened(self._services["label"], "label", aad, row.label_ct).decode()

    def sealed_label(self, key_id: bytes, label: str) -> bytes:
        """Return a label as the row of a key holds it."""
        aad = self._head.keyring_id + key_id
        return seal(self._services["label"], "label", aad, label.encode())

    def refresh(self) -> None:
        """Read again if another process has written.

        Raises:
            KeyringCorrupt: A row is missing, foreign, older than the others, or damaged.
            KeyringError: The master was changed meanwhile.
        """
        if self.store.data_version() != self._version:
            with self.store.transaction(write=False):
                self._load()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the file for writing; rows put within are committed together, or none is."""
        try:
            with self.store.transaction(write=True):
                self._load()
                yield
                self._put_head(self._head)
        except BaseException:
            self._version = -1  # what is in memory may not be on disk
            raise

    def put(self, row: KeyRow, key: bytes | None) -> KeyRow:
        """Wrap a key for its row and write the row; within `writing` only.

        Args:
            row: The row; its ``wrapped`` is replaced.
            key: The key, or None for a tombstone.
        """
        aad = row_aad(self._head.keyring_id, row)
        row = replace(row, wrapped=None if key is None else seal(self._root, "key", aad, key))
        self.store.put_row(row)
        before = self._rows.get(row.key_id, row)
        if self._active.get(before.subject_tag, before).key_id == row.key_id:
            self._active.pop(before.subject_tag, None)
        self._by_tag.get(before.subject_tag, {}).pop(row.key_id, None)
        if row.state == "active":
            self._active[row.subject_tag] = row
        self._rows[row.key_id] = row
        self._by_tag.setdefault(row.subject_tag, {})[row.key_id] = row
        self._unwrapped.pop(row.key_id, None)
        return row

    def change_root(self, master: Master) -> None:
        """Wrap everything under a new root and a new master; within `writing` only.

        Labels get a new key too, or the new master would open those of erased subjects in old
        copies. Tags and file names depend on the key of names, which has to stay, as locators do.
        """
        keys = {row.key_id: self.unwrap(row) for row in self.rows if row.wrapped is not None}
        labels = {row.key_id: self.label_of(row) for row in self.rows}
        root, head = new_root(self._head.keyring_id, master, self._head.epoch + 1)
        self._set_root(root, head)
        self._services["label"] = random_key()
        for name, service in self._services.items():
            self.store.put_service(name, seal(root, "service", service_aad(head, name), service))
        for row in self.rows:
            label = labels[row.key_id]
            label_ct = None if label is None else self.sealed_label(row.key_id, label)
            self.put(replace(row, label_ct=label_ct), keys.get(row.key_id))

    def found(self) -> None:
        """Write head and new random service keys into an empty file."""
        with self.store.transaction(write=True):
            for name in SERVICES:
                aad = service_aad(self._head, name)
                self.store.put_service(name, seal(self._root, "service", aad, random_key()))
            self._put_head(self._head)

    def _tag(self, spelling: str) -> bytes:
        """Return the tag of a label as it is written."""
        return hmac_sha256(self._services["name"], b"subject" + spelling.encode())

    def _tags(self, subject: str) -> list[bytes]:
        """Return every tag that rows of a subject bear, that of new rows first.

        Labels from before they were composed keep their tags: a tombstone has no label to make a
        new one of. ASCII labels have other spellings too: the sign for kelvin composes to K.
        """
        tags = [self._tag(spelling) for spelling in spellings(subject)]
        tags += self._uncomposed().get(any_label(subject), ())
        return list(dict.fromkeys(tags))

    def _uncomposed(self) -> dict[str, list[bytes]]:
        """Return the tags of rows whose labels are not composed, by the composed label."""
        if self._odd_tags is None:
            self._odd_tags = {}
            for row in self.rows:
                if row.label_ct is None or row.label_ct in self._plain:
                    continue
                label = self.label_of(row)
                assert label is not None  # it has a label_ct
                if label == composed(label):
                    self._plain.add(row.label_ct)
                else:
                    self._odd_tags.setdefault(composed(label), []).append(row.subject_tag)
        return self._odd_tags

    def _load(self) -> None:
        """Read and authenticate the whole file, within a transaction."""
        head, services, rows = self.store.head(), self.store.services(), self.store.rows()
        if head.root_wrap != self._head.root_wrap:
            raise KeyringError("the keyring's master was changed meanwhile; start again")
        if set(services) != set(SERVICES):
            raise KeyringCorrupt(f"keyring {self.store.path} lacks a service key; restore a backup")
        if not hmac.compare_digest(self._rows_mac(head, services, rows), head.rows_mac):
            raise KeyringCorrupt(
                f"rows of keyring {self.store.path} were edited, dropped or put back; use a backup"
            )
        self._head = head
        self._services = {
            name: opened(self._root, "service", service_aad(head, name), wrapped)
            for name, wrapped in services.items()
        }
        self._rows = {row.key_id: row for row in rows}
        self._by_tag = {}
        for row in rows:
            self._by_tag.setdefault(row.subject_tag, {})[row.key_id] = row
        self._active = {row.subject_tag: row for row in rows if row.state == "active"}
        self._unwrapped.clear()
        self._odd_tags = None
        self._version = self.store.data_version()

    def _put_head(self, head: HeadRow) -> None:
        """Write the head with the code over all rows as they are now in the file."""
        mac = self._rows_mac(head, self.store.services(), self.store.rows())
        self._head = replace(head, rows_mac=mac)
        self.store.put_head(self._head)

    def _rows_mac(self, head: HeadRow, services: dict[str, bytes], rows: list[KeyRow]) -> bytes:
        """Return the authentication code over everything the head's own wrap does not cover."""
        code = hmac.new(self._rows_key, head.epoch.to_bytes(8, "big"), "sha256")
        for name in sorted(services):
            code.update(name.encode() + len(services[name]).to_bytes(4, "big") + services[name])
        for row in rows:
            code.update(row.to_bytes())
        return code.digest()

    def _set_root(self, root: bytes, head: HeadRow) -> None:
        """Use a root from now on."""
        self._root, self._head = root, head
        self._rows_key = derive_key(root, "rows")


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
