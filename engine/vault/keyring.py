"""The keyring: a random key per subject, each wrapped under a root key, in one SQLite file.

The master (key file or passphrase) wraps the root; the root wraps every row and the service keys.
Service keys mask locators, name output files, encrypt labels, authenticate the audit log and sign
certificates. They are random, so that a new master and root invalidate no file.

A subject has one active key for each purpose: `image` seals anonymized images, `original` seals
source files.

Every row is bound to its content by its own wrap. The head authenticates the set of rows, so that
removing a row, or restoring an older version of one, is detected (docs/FORMAT.md).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from engine.vault.audit import KeyUse, log_path
from engine.vault.keyring_rows import FORMAT, IMAGE, OLD_SERVICES, SERVICES, HeadRow, KeyRow, RowSet
from engine.vault.keyring_store import BUSY_TIMEOUT_MS, KeyringStore, today
from engine.vault.master import (
    KeyFile,
    Master,
    NewKey,
    new_root,
    row_aad,
    service_aad,
    unlock_root,
    unwrap,
)
from engine.vault.secret_files import check_private, new_private_file
from engine.vault.subjects import any_label, checked_label, normalized, spellings
from modeling.encryption.ised_errors import (
    AuthenticationError,
    DestroyedKey,
    KeyringCorrupt,
    KeyringError,
    KeyringExists,
    MissingKey,
    RevokedKey,
    StorageError,
)
from modeling.encryption.primitives import SubjectKey, derive_key, hmac_sha256, random_key, seal
from modeling.encryption.sealed_image import LOCATOR_BYTES, is_under, key_id_of
from utils.files import remove_leftovers
from utils.logger import Progress


class Keyring:
    """An open keyring. Use it in one process and one thread only.

    Rows are read and authenticated as a whole when the keyring is opened, and again when another
    process has changed one. Writing a row takes the same time in a keyring of any size.
    """

    def __init__(self, store: KeyringStore, root: bytes, head: HeadRow) -> None:
        """Use an unlocked file, of which nothing is read yet; see `open` and `create`."""
        self.store = store
        self.use = KeyUse()  # for the audit log
        self._root = root
        self.head = head  # the row about the keyring, as last read
        self._services: dict[str, bytes] = {}
        self._wrapped_services: dict[str, bytes] = {}
        self._rows = RowSet(root)
        self._unwrapped: dict[bytes, bytes] = {}
        self._only_normalized = True  # every label is in the form that new labels get
        self._odd_tags: dict[str, list[bytes]] | None = None
        self._data_version: int | None = None

    @classmethod
    def create(cls, path: str | os.PathLike[str], master: Master) -> Keyring:
        """Create a keyring and open it. If several processes try, exactly one succeeds.

        Raises:
            KeyringExists: The file, or the audit log of a former keyring of that name, exists.
            StorageError: It cannot be written.
        """
        path = Path(path)
        for taken in filter(os.path.lexists, (path, log_path(path))):
            raise _exists(taken)
        if isinstance(master, KeyFile):
            master.create_if_missing()
        new_key = master.new_key()
        try:
            with (
                new_private_file(path) as empty,
                closing(KeyringStore(empty, create=True)) as store,
            ):
                keyring = cls(store, *new_root(os.urandom(16), master.kdf, new_key, epoch=0))
                keyring._services = {name: random_key() for name in SERVICES}
                with store.transaction(write=True):
                    keyring._put_services()
                    keyring._put_head()
        except FileExistsError:
            raise _exists(path) from None
        return cls.open(path, master)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], master: Master, busy_timeout_ms: int = BUSY_TIMEOUT_MS
    ) -> Keyring:
        """Unlock a keyring and authenticate all of it; raise a KeyringError if that fails."""
        path = Path(path)
        check_private(path, "keyring")
        remove_leftovers(path.parent, path.name)  # a killed process may have left a copy
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
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    # ---- keys ----------------------------------------------------------------------------------

    def sealing_key(self, subject: str, purpose: str = IMAGE) -> SubjectKey:
        """Return the active key of a subject. A new key is on disk before it is returned.

        The first call of a day also stores the day as the last use of the key.

        Raises:
            RevokedKey, DestroyedKey: The subject's keys were revoked or destroyed; a new key needs
                `rotate`.
        """
        self.refresh()
        row = self.active_row(subject, purpose)
        if row is None or row.used_day < today():
            with self.writing():
                row = self._used_row(subject, purpose)
        self.use.files[row.key_id] += 1
        return SubjectKey(row.key_id, self.unwrap(row), self._services["locate"])

    def ensure(self, subjects: Iterable[str], purpose: str = IMAGE) -> None:
        """Prepare many subjects for `sealing_key` in one transaction: create keys, store the day.

        Skips subjects whose keys were revoked or destroyed; `sealing_key` raises for those.
        """
        self.refresh()
        rows = {subject: self.active_row(subject, purpose) for subject in subjects}
        due = sorted(name for name, row in rows.items() if row is None or row.used_day < today())
        if due:
            with self.writing():
                for subject in due:
                    with suppress(RevokedKey, DestroyedKey):
                        self._used_row(subject, purpose)

    def opening_key(self, header: bytes, *, counted: bool = True) -> bytes:
        """Return the key that a public header identifies; count its file for the audit log.

        Raises:
            MissingKey, RevokedKey, DestroyedKey: There is no usable key.
        """
        row = self.row_of(header)
        if row is None:
            raise MissingKey(
                "no key for this file: it was sealed under another keyring, its key row is lost, "
                "or its salt or locator is damaged"
            )
        row.check_usable()
        self.use.files[row.key_id] += counted
        return self.unwrap(row)

    def row_of(self, header: bytes) -> KeyRow | None:
        """Return the row, in any state, of the key that a public header identifies.

        Exports lack the locator key, so the commitment of the file identifies an imported key.
        """
        self.refresh()
        row = self._rows.by_id.get(key_id_of(header, self._services["locate"]))
        if row is not None:
            return row
        imports = (row for row in self._rows.imported.values() if row.wrapped is not None)
        return next((x for x in imports if is_under(self.unwrap(x, counted=False), header)), None)

    def locates(self, header: bytes) -> bool:
        """Return whether the locator of a public header names a key: this keyring sealed the file.

        False for the files of other keyrings, also under imported keys.
        """
        self.refresh()
        return key_id_of(header, self._services["locate"]) in self._rows.by_id

    def file_name(self, dataset: str, path: str) -> str:
        """Return the output name of a source: a keyed hash, which reveals nothing to outsiders."""
        message = b"file" + dataset.encode() + b"\0" + path.encode()
        digest = hmac_sha256(self._services["name"], message)[:16]
        return base64.b32encode(digest).decode().rstrip("=").lower() + ".png"

    def manifest_key(self) -> bytes:
        """Return the key that manifests of sealed folders are sealed under."""
        return derive_key(self._services["name"], "manifest")

    def audit_key(self) -> bytes:
        """Return the key that authenticates the audit log. Converts an older keyring."""
        return self._service("audit")

    def signing_key(self) -> Ed25519PrivateKey:
        """Return the key that signs certificates. Converts an older keyring."""
        return Ed25519PrivateKey.from_private_bytes(self._service("sign"))

    def audit_state(self) -> tuple[int, bytes]:
        """Return the number of entries of the audit log and the hash of the last one (32 bytes)."""
        self.refresh()
        return self.head.audit_count, self.head.audit_hash

    def set_audit_state(self, count: int, digest: bytes) -> None:
        """Change what `audit_state` returns. Call this within `writing` only."""
        self.head = replace(self.head, audit_count=count, audit_hash=digest)

    # ---- rows ----------------------------------------------------------------------------------

    @property
    def rows(self) -> list[KeyRow]:
        """Every key row, as last read."""
        return list(self._rows.by_id.values())

    def row(self, key_id: bytes) -> KeyRow | None:
        """Return the row of a key id, if there is one."""
        return self._rows.by_id.get(key_id)

    def rows_of(self, subject: str, purpose: str | None = None) -> list[KeyRow]:
        """Return the rows of a subject, or those of one purpose, oldest generation first."""
        rows = [
            row for tag in self._tags(subject) for row in self._rows.by_tag.get(tag, {}).values()
        ]
        rows = [row for row in rows if purpose in (None, row.purpose)]
        return sorted(rows, key=lambda row: (row.generation, row.purpose))

    def active_row(self, subject: str, purpose: str = IMAGE) -> KeyRow | None:
        """Return the row whose key seals for a subject and purpose, if there is one."""
        keys = [(tag, purpose) for tag in self._tags(subject)]
        return next((self._rows.active[key] for key in keys if key in self._rows.active), None)

    def subject_tag(self, subject: str) -> bytes:
        """Return the 32 bytes that stand for a valid subject label in new rows and tombstones."""
        return self._tag(any_label(subject))

    def check_subject(self, subject: str, purpose: str = IMAGE) -> None:
        """Raise BadInput, RevokedKey or DestroyedKey if a subject cannot get a key to seal with."""
        if self.active_row(subject, purpose) is not None:
            return
        rows = self.rows_of(subject, purpose)
        if not rows and self.active_row(subject) is None:
            rows = self.rows_of(subject)  # an erased person gets no key of another purpose either
        states = {row.state for row in rows}
        if "revoked" in states:
            raise RevokedKey(
                "the subject's keys were revoked; `keyring revoke --undo` allows them again"
            )
        if "destroyed" in states:  # an imported key of the subject opens, but allows no new key
            option = "" if purpose == IMAGE else f" --{purpose}"
            raise DestroyedKey(
                f"the subject's keys were destroyed; `keyring rotate{option}` allows a new key"
            )
        checked_label(subject)

    def unwrap(self, row: KeyRow, *, counted: bool = True) -> bytes:
        """Return the key of a row in any state; not `counted` in the audit log if only compared.

        Raises:
            KeyringCorrupt: The row was edited, or its key was destroyed.
        """
        if counted:
            self.use.keys.add(row.key_id)
        key = self._unwrapped.get(row.key_id)
        if key is None:
            key = unwrap(self._root, "key", row_aad(self.head.keyring_id, row), row.wrapped or b"")
            self._unwrapped[row.key_id] = key
        return key

    def label_of(self, row: KeyRow) -> str | None:
        """Return the subject label of a row; None after its key was destroyed."""
        if row.label_ct is None:
            return None
        aad = self.head.keyring_id + row.key_id
        return unwrap(self._services["label"], "label", aad, row.label_ct).decode()

    # ---- writing -------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read the file again if another process has written.

        Raises:
            KeyringCorrupt: A row is missing, added, older than the others, or damaged.
            KeyringError: The master was changed meanwhile.
        """
        if self.store.data_version() != self._data_version:
            with self.store.transaction(write=False):
                self._load()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the file for writing. The rows put in the block are committed together or not."""
        root, head = self._root, self.head
        try:
            with self.store.transaction(write=True):
                if self.store.data_version() != self._data_version:
                    self._load()
                if self.head.format != FORMAT:
                    self._convert()
                yield
                self._put_head()
        except BaseException:
            self._data_version = None  # memory and disk may differ: read again
            if self._root != root:  # the change was rolled back, or the error follows the commit
                with suppress(KeyringError, StorageError), self.store.transaction(write=False):
                    if self.store.head().root_wrap == head.root_wrap:
                        self._root, self.head = root, head
            raise

    def new_row(
        self, subject: str, state: str, key_id: bytes | None = None, purpose: str = IMAGE
    ) -> KeyRow:
        """Return a row for a new key of a subject, not yet wrapped or written."""
        key_id, day = key_id or os.urandom(LOCATOR_BYTES), today()
        tag, label = self.subject_tag(subject), self._seal_label(key_id, checked_label(subject))
        generation = 1 + max((row.generation for row in self.rows_of(subject, purpose)), default=0)
        return KeyRow(key_id, tag, label, generation, state, 0, None, day, purpose, day)

    def put(self, row: KeyRow, key: bytes | None) -> KeyRow:
        """Wrap a key for its row, or None for a tombstone, and write the row with its ``wrapped``.

        Call this within `writing` only.
        """
        aad = row_aad(self.head.keyring_id, row)
        row = replace(row, wrapped=None if key is None else seal(self._root, "key", aad, key))
        self.store.put_row(row)
        self._rows.put(row)
        self._unwrapped.pop(row.key_id, None)
        self.use.keys.add(row.key_id)
        return row

    def change_root(self, kdf: str, new_key: NewKey) -> None:
        """Wrap everything under a new root and a new master. Call this within `writing` only.

        The master's `new_key` runs external commands or takes seconds, so call it before `writing`.

        Labels get a new key too. Otherwise the new master would open labels of erased subjects in
        old copies. The keys of names and locators stay: tags, file names and locators use them.
        """
        rows, audit = self.rows, (self.head.audit_count, self.head.audit_hash)
        keys = [None if row.wrapped is None else self.unwrap(row) for row in rows]
        labels = [self.label_of(row) for row in rows]
        root, head = new_root(self.head.keyring_id, kdf, new_key, self.head.epoch + 1)
        self._root, self.head, self._rows = root, head, RowSet(root)
        self.set_audit_state(*audit)
        self._services["label"] = random_key()
        self._put_services()
        old = zip(Progress.over(rows, "Rekey", unit="key"), keys, labels, strict=True)
        for row, key, label in old:
            label_ct = None if label is None else self._seal_label(row.key_id, label)
            self.put(replace(row, label_ct=label_ct), key)

    def _used_row(self, subject: str, purpose: str) -> KeyRow:
        """Return the active row of a subject, created if necessary, with its last use today.

        Call this within `writing` only.
        """
        row = self.active_row(subject, purpose)
        if row is None:
            self.check_subject(subject, purpose)
            return self.put(self.new_row(subject, "active", purpose=purpose), random_key())
        if row.used_day < today():
            row = replace(row, used_day=today())
            self.store.put_row(row)
            self._rows.put(row)
        return row

    def _convert(self) -> None:
        """Convert an older format to `FORMAT`. Call this within `writing` only."""
        self._only_normalized = not self._old_tags()
        self.store.convert(self.rows)
        self._rows = RowSet(self._root, self.rows)
        self.head = replace(self.head, format=FORMAT)
        for name in set(SERVICES) - set(OLD_SERVICES):
            self._services[name] = random_key()
        self._put_services()

    def _service(self, name: str) -> bytes:
        """Return a service key that older formats lack; add it by a conversion."""
        self.refresh()
        if name not in self._services:
            with self.writing():
                pass
        return self._services[name]

    def _seal_label(self, key_id: bytes, label: str) -> bytes:
        aad = self.head.keyring_id + key_id
        return seal(self._services["label"], "label", aad, label.encode())

    def _put_services(self) -> None:
        for name, service in self._services.items():
            wrapped = seal(self._root, "service", service_aad(self.head, name), service)
            self._wrapped_services[name] = wrapped
            self.store.put_service(name, wrapped)

    def _put_head(self) -> None:
        """Write the head with the record that authenticates the present rows."""
        sealed_sum = self._rows.sealed_sum(
            self._root, self.head, self._wrapped_services, normalized=self._only_normalized
        )
        self.head = replace(self.head, rows_mac=sealed_sum)
        self.store.put_head(self.head)

    def _load(self) -> None:
        """Read and authenticate the whole file. Call this within a transaction."""
        head, services = self.store.head(), self.store.services()
        if head.root_wrap != self.head.root_wrap:
            raise KeyringError(
                "the keyring's master was changed by another process; run the command again"
            )
        if set(services) != set(SERVICES if head.format == FORMAT else OLD_SERVICES):
            raise KeyringCorrupt(f"keyring {self.store.path} lacks a service key; restore a backup")
        rows = self._rows
        if self._data_version is None or not rows.are_current(self._root, head, services):
            rows = RowSet(self._root, self.store.rows(), head.format)
        try:
            self._only_normalized = rows.authenticate(self._root, head, services)
        except AuthenticationError:
            raise KeyringCorrupt(
                f"rows of keyring {self.store.path} were edited, removed or put back; "
                "restore a backup"
            ) from None
        self.head, self._rows, self._wrapped_services = head, rows, services
        self._services = {
            name: unwrap(self._root, "service", service_aad(head, name), wrapped)
            for name, wrapped in services.items()
        }
        self._unwrapped.clear()
        self._odd_tags = None
        self._data_version = self.store.data_version()

    # ---- labels of older versions ---------------------------------------------------------------

    def _tag(self, label: str) -> bytes:
        """Return the tag of a label in exactly this spelling."""
        return hmac_sha256(self._services["name"], b"subject" + label.encode())

    def _tags(self, subject: str) -> list[bytes]:
        """Return all tags that rows of a subject may have, the tag of new rows first."""
        tags = [self._tag(spelling) for spelling in spellings(subject)]
        tags += self._old_tags().get(any_label(subject), ())
        return list(dict.fromkeys(tags))

    def _old_tags(self) -> dict[str, list[bytes]]:
        """Return the tags of rows whose labels are not normalised, by the normalised label.

        Only rows from versions that did not normalise labels. They keep their tags, as a tombstone
        has no label from which a new tag could be computed. Labels that normalise to ASCII are
        affected too: U+212A (kelvin) becomes K.
        """
        if self._only_normalized:
            return {}
        if self._odd_tags is None:
            self._odd_tags = {}
            for row in self.rows:
                label = self.label_of(row)
                if label is not None and label != normalized(label):
                    self._odd_tags.setdefault(normalized(label), []).append(row.subject_tag)
        return self._odd_tags


def _exists(path: Path) -> KeyringExists:
    return KeyringExists(f"{path} exists already; give another --keyring, or move it away")
