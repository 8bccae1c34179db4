"""The SQLite file of a keyring: schema, settings, transactions and typed rows (docs/FORMAT.md)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields
from itertools import product
from pathlib import Path
from typing import Any

from engine.vault.keyring_rows import HeadRow, KeyRow
from modeling.encryption.ised_errors import KeyringCorrupt, KeyringLocked, StorageError

BUSY_TIMEOUT_MS = 20_000

_APPLICATION_ID = 0x49534544  # "ISED"
_SCHEMA = """
CREATE TABLE keyring (
  id INTEGER PRIMARY KEY CHECK (id = 1), format INTEGER NOT NULL, keyring_id BLOB NOT NULL,
  kdf TEXT NOT NULL CHECK (kdf IN ('file', 'argon2id')), kdf_params TEXT NOT NULL,
  kdf_salt BLOB NOT NULL, root_wrap BLOB NOT NULL, epoch INTEGER NOT NULL, rows_mac BLOB NOT NULL);
CREATE TABLE service (
  name TEXT PRIMARY KEY CHECK (name IN ('locate', 'name', 'label')), wrapped BLOB NOT NULL);
CREATE TABLE keys (
  key_id BLOB PRIMARY KEY CHECK (length(key_id) = 16),
  subject_tag BLOB NOT NULL CHECK (length(subject_tag) = 32), label_ct BLOB,
  generation INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('active', 'retired', 'revoked', 'destroyed')),
  imported INTEGER NOT NULL CHECK (imported IN (0, 1)), wrapped BLOB, created_day INTEGER NOT NULL,
  CHECK ((state = 'destroyed') = (wrapped IS NULL)),
  CHECK ((state = 'destroyed') = (label_ct IS NULL)));
CREATE UNIQUE INDEX one_active ON keys (subject_tag) WHERE state = 'active';
"""
_PRAGMAS = (
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cell_size_check = ON",
    "PRAGMA journal_mode = DELETE",
    # FULL does not sync the folder after the journal is deleted. A power cut could bring the
    # journal back, which undoes the transaction.
    "PRAGMA synchronous = EXTRA",
    "PRAGMA secure_delete = ON",
)
# Bounds on values, checked before they are read: SQLite would allow 1 GB for each.
_TOO_LONG = """SELECT EXISTS (SELECT 1 FROM keyring WHERE max(length(keyring_id),
    length(kdf_params), length(kdf_salt), length(root_wrap), length(rows_mac)) > 256)
  OR EXISTS (SELECT 1 FROM service WHERE length(wrapped) > 256)
  OR EXISTS (SELECT 1 FROM keys WHERE length(label_ct) > 2048 OR length(wrapped) > 256)"""
# For a file that nothing reads before it is complete.
_NO_JOURNAL_FILE = "PRAGMA journal_mode = MEMORY"


class KeyringStore:
    """A connection to one keyring file."""

    def __init__(self, path: Path, busy_timeout_ms: int = BUSY_TIMEOUT_MS) -> None:
        """Open an existing file.

        Args:
            path: The file; the caller has checked its permissions.
            busy_timeout_ms: How long to wait for another process.

        Raises:
            KeyringCorrupt: The file is not a keyring, or its tables were edited.
            KeyringLocked: Another process held it longer than the timeout.
            StorageError: It cannot be read or written.
        """
        self.path = path
        with self._connected(busy_timeout_ms):
            if _single_value(self._connection, "PRAGMA application_id") != _APPLICATION_ID:
                raise KeyringCorrupt(f"{path} is not a keyring")
            if _schema_of(self._connection) != _expected_schema():
                raise KeyringCorrupt(
                    f"the tables of {path} are not those of a keyring; restore a backup"
                )
            if _single_value(self._connection, _TOO_LONG):
                raise KeyringCorrupt(f"{path} contains values that are too long; restore a backup")

    @classmethod
    def create(cls, path: Path) -> KeyringStore:
        """Write the schema into an empty temporary file and open it."""
        store = cls.__new__(cls)
        store.path = path
        with store._connected(BUSY_TIMEOUT_MS):
            store._connection.execute(_NO_JOURNAL_FILE)
            store._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            store._connection.executescript(_SCHEMA)
        return store

    @contextmanager
    def _connected(self, busy_timeout_ms: int) -> Iterator[None]:
        """Connect with all settings; close the connection if anything in the block fails."""
        with self.translated():
            address = f"{self.path.absolute().as_uri()}?mode=rw"
            self._connection = sqlite3.connect(
                address, uri=True, isolation_level=None, timeout=busy_timeout_ms / 1000
            )
            try:
                for pragma in _PRAGMAS:
                    self._connection.execute(pragma)
                yield
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Convert errors of SQLite to named errors."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text or "busy" in text:
                raise KeyringLocked(
                    f"keyring {self.path} is in use by another process; try again when it is done"
                ) from None
            if any(word in text for word in ("full", "I/O", "readonly", "unable to open")):
                raise StorageError(f"keyring {self.path}: {text}; check the disk") from None
            raise KeyringCorrupt(f"keyring {self.path}: {text}; restore a backup") from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            # sqlite3 raises UnicodeDecodeError for damaged text, also in its own messages.
            raise KeyringCorrupt(f"keyring {self.path}: {error}; restore a backup") from None

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[None]:
        """Hold a consistent view; with ``write``, no other process can write meanwhile."""
        with self.translated():
            self._connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself rolls back after some errors
                    self._connection.execute("ROLLBACK")
                raise

    def data_version(self) -> int:
        """Return a number that changes when another connection has changed the file."""
        with self.translated():
            return int(_single_value(self._connection, "PRAGMA data_version"))

    def head(self) -> HeadRow:
        """Return the row about the keyring."""
        names = ", ".join(field.name for field in fields(HeadRow))
        rows = self._connection.execute(f"SELECT {names} FROM keyring").fetchall()
        head: HeadRow
        (head,) = self._typed(HeadRow, rows if len(rows) == 1 else [()])
        if head.epoch < 0:  # the authentication encodes it as an unsigned number
            raise KeyringCorrupt(f"keyring {self.path} has epoch {head.epoch}; restore a backup")
        return head

    def services(self) -> dict[str, bytes]:
        """Return the wrapped service keys by name."""
        rows = self._connection.execute("SELECT name, wrapped FROM service").fetchall()
        if not all(isinstance(wrapped, bytes) for _, wrapped in rows):
            raise KeyringCorrupt(f"a service key of {self.path} has a wrong type; restore a backup")
        return dict(rows)

    def rows(self) -> list[KeyRow]:
        """Return every key row, ordered by key_id."""
        names = ", ".join(field.name for field in fields(KeyRow))
        rows = self._connection.execute(f"SELECT {names} FROM keys ORDER BY key_id")
        return self._typed(KeyRow, rows)

    def put_head(self, head: HeadRow) -> None:
        """Write the row about the keyring."""
        self._upsert(
            "keyring", ("id", *(field.name for field in fields(head))), (1, *astuple(head))
        )

    def put_service(self, name: str, wrapped: bytes) -> None:
        """Write one wrapped service key."""
        self._upsert("service", ("name", "wrapped"), (name, wrapped))

    def put_row(self, row: KeyRow) -> None:
        """Write one key row in place of the row with its key_id."""
        self._upsert("keys", [field.name for field in fields(row)], astuple(row))

    def copy_to(self, path: Path) -> None:
        """Copy a consistent state into an empty temporary file (SQLite's online backup)."""
        with self.translated():
            target = sqlite3.connect(path)
            try:
                target.execute(_NO_JOURNAL_FILE)
                self._connection.backup(target)
            finally:
                target.close()

    def _typed(self, record: type[Any], rows: Any) -> list[Any]:
        """Return rows as records. Checks the type of every column: SQLite itself does not."""
        allowed: dict[str, tuple[type, ...]] = {
            "int": (int,),
            "str": (str,),
            "bytes": (bytes,),
            "bytes | None": (bytes, type(None)),
        }
        signatures = set(product(*(allowed[str(field.type)] for field in fields(record))))
        records = []
        for row in rows:
            if tuple(map(type, row)) not in signatures:
                raise KeyringCorrupt(
                    f"a row of keyring {self.path} has a wrong type; restore a backup"
                )
            records.append(record(*row))
        return records

    def _upsert(self, table: str, names: Sequence[str], values: Sequence[Any]) -> None:
        """Write a row of a table; names come from this file only."""
        key, *others = names
        marks = ", ".join("?" * len(names))
        updates = ", ".join(f"{name} = excluded.{name}" for name in others)
        # Not INSERT OR REPLACE: that would delete a second active key instead of failing.
        self._connection.execute(
            f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks}) "
            f"ON CONFLICT ({key}) DO UPDATE SET {updates}",
            values,
        )


def _single_value(connection: sqlite3.Connection, query: str) -> Any:
    return connection.execute(query).fetchone()[0]


def _schema_of(connection: sqlite3.Connection) -> list[tuple[str, str, str]]:
    """Return every definition in a database, triggers and views included."""
    query = (
        "SELECT type, name, substr(sql, 1, 2048) FROM sqlite_master "
        "WHERE sql IS NOT NULL ORDER BY name LIMIT 9"
    )
    return connection.execute(query).fetchall()


def _expected_schema() -> list[tuple[str, str, str]]:
    """Return the definitions of a keyring."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(_SCHEMA)
        return _schema_of(connection)
    finally:
        connection.close()
