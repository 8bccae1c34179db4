"""The SQLite file of a keyring: schema, settings, transactions and typed rows (docs/FORMAT.md)."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from engine.vault.keyring_rows import FORMAT, KDFS, OLD_FORMATS, HeadRow, KeyRow
from modeling.encryption.ised_errors import KeyringCorrupt, KeyringLocked, StorageError

BUSY_TIMEOUT_MS = 20_000

_APPLICATION_ID = 0x49534544  # "ISED"
# SQLite stores the text of the statements, which is compared.
_KEYS = """
CREATE TABLE keys (
  key_id BLOB PRIMARY KEY CHECK (length(key_id) = 16),
  subject_tag BLOB NOT NULL CHECK (length(subject_tag) = 32), label_ct BLOB,
  generation INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('active', 'retired', 'revoked', 'destroyed')),
  imported INTEGER NOT NULL CHECK (imported IN (0, 1)), wrapped BLOB, created_day INTEGER NOT NULL,
{more_columns}  CHECK ((state = 'destroyed') = (wrapped IS NULL)),
  CHECK ((state = 'destroyed') = (label_ct IS NULL)));
CREATE UNIQUE INDEX one_active ON keys ({unique}) WHERE state = 'active';
"""
# Formats 1 and 2.
_OLD_SCHEMA = """
CREATE TABLE keyring (
  id INTEGER PRIMARY KEY CHECK (id = 1), format INTEGER NOT NULL, keyring_id BLOB NOT NULL,
  kdf TEXT NOT NULL CHECK (kdf IN ('file', 'argon2id')), kdf_params TEXT NOT NULL,
  kdf_salt BLOB NOT NULL, root_wrap BLOB NOT NULL, epoch INTEGER NOT NULL, rows_mac BLOB NOT NULL);
CREATE TABLE service (
  name TEXT PRIMARY KEY CHECK (name IN ('locate', 'name', 'label')), wrapped BLOB NOT NULL);
""" + _KEYS.format(more_columns="", unique="subject_tag")
_SCHEMA = """
CREATE TABLE keyring (
  id INTEGER PRIMARY KEY CHECK (id = 1), format INTEGER NOT NULL, keyring_id BLOB NOT NULL,
  kdf TEXT NOT NULL CHECK (kdf IN ('file', 'argon2id', 'command')), kdf_params TEXT NOT NULL,
  kdf_data BLOB NOT NULL, root_wrap BLOB NOT NULL, epoch INTEGER NOT NULL, rows_mac BLOB NOT NULL,
  audit_count INTEGER NOT NULL, audit_hash BLOB NOT NULL CHECK (length(audit_hash) = 32));
CREATE TABLE service (
  name TEXT PRIMARY KEY CHECK (name IN ('audit', 'label', 'locate', 'name', 'sign')),
  wrapped BLOB NOT NULL);
""" + _KEYS.format(
    more_columns="  purpose TEXT NOT NULL CHECK (purpose IN ('image', 'original')), "
    "used_day INTEGER NOT NULL,\n",
    unique="subject_tag, purpose",
)
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
    length(kdf_params), length(root_wrap), length(rows_mac), length({audit_hash})) > 256
    OR length({kdf_data}) > 65536)
  OR EXISTS (SELECT 1 FROM service WHERE length(wrapped) > 256)
  OR EXISTS (SELECT 1 FROM keys WHERE length(label_ct) > 2048 OR length(wrapped) > 256)"""

# What SQLite may return for a field of a row.
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "str": (str,), "bytes": (bytes,), "bytes | None": (bytes, type(None)),
}  # fmt: skip


class KeyringStore:
    """A connection to one keyring file."""

    def __init__(
        self, path: Path, busy_timeout_ms: int = BUSY_TIMEOUT_MS, *, create: bool = False
    ) -> None:
        """Open a file, whose permissions the caller has checked, or create tables in an empty one.

        Raises:
            KeyringCorrupt: The file is not a keyring, or its tables were edited.
            KeyringLocked: Another process held it longer than the timeout.
            StorageError: It cannot be read or written.
        """
        self.path = path
        with self._connected(busy_timeout_ms):
            if create:
                self._connection.execute("PRAGMA journal_mode = MEMORY")  # nothing else reads it
                self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                self._create_tables()
            if self._single_value("PRAGMA application_id") != _APPLICATION_ID:
                raise KeyringCorrupt(f"{path} is not a keyring")
            if self._single_value(_TOO_LONG.format_map(self._columns())):
                raise KeyringCorrupt(f"{path} contains values that are too long; restore a backup")

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
            return int(self._single_value("PRAGMA data_version"))

    def head(self) -> HeadRow:
        """Return the row about the keyring."""
        records: list[HeadRow] = self._select(HeadRow, "keyring")
        if len(records) != 1:
            raise KeyringCorrupt(f"keyring {self.path} has no head; restore a backup")
        head = records[0]
        if head.epoch < 0 or head.audit_count < 0:  # they are encoded as unsigned numbers
            raise KeyringCorrupt(f"keyring {self.path} has a negative number; restore a backup")
        if head.kdf not in KDFS:
            raise KeyringCorrupt(
                f"keyring {self.path} has master {head.kdf!a}; expected {', '.join(KDFS)}; restore "
                "a backup"
            )
        if head.format not in (OLD_FORMATS if self._is_old() else (FORMAT,)):
            raise KeyringCorrupt(
                f"keyring {self.path} has format {head.format}, which does not fit its tables; "
                "restore a backup"
            )
        return head

    def services(self) -> dict[str, bytes]:
        """Return the wrapped service keys by name."""
        rows = self._connection.execute("SELECT name, wrapped FROM service").fetchall()
        if not all(isinstance(wrapped, bytes) for _, wrapped in rows):
            raise KeyringCorrupt(f"a service key of {self.path} has a wrong type; restore a backup")
        return dict(rows)

    def rows(self) -> list[KeyRow]:
        """Return every key row, ordered by key_id."""
        return self._select(KeyRow, "keys ORDER BY key_id")

    def convert(self, rows: Iterable[KeyRow]) -> None:
        """Replace the tables of formats 1 and 2 by those of `FORMAT`, with these rows.

        Call this within a transaction that then writes the service keys and the head. SQLite cannot
        change the constraints of a table.
        """
        for table in ("keyring", "service", "keys"):
            self._connection.execute(f"DROP TABLE {table}")
        self._create_tables()
        for row in rows:
            self.put_row(row)

    def _create_tables(self) -> None:
        for statement in _SCHEMA.split(";"):
            self._connection.execute(statement)

    def put_head(self, head: HeadRow) -> None:
        """Write the row about the keyring."""
        names = [field.name for field in fields(head)]
        self._upsert("keyring", ["id", *names], (1, *astuple(head)))

    def put_service(self, name: str, wrapped: bytes) -> None:
        """Write one wrapped service key."""
        self._upsert("service", ("name", "wrapped"), (name, wrapped))

    def put_row(self, row: KeyRow) -> None:
        """Write one key row in place of the row with its key_id."""
        self._upsert("keys", [field.name for field in fields(row)], astuple(row))

    def copy_to(self, path: Path) -> None:
        """Copy a consistent state into an empty temporary file (SQLite's online backup)."""
        with self.translated(), closing(sqlite3.connect(path)) as target:
            target.execute("PRAGMA journal_mode = MEMORY")  # nothing reads it before it is complete
            self._connection.backup(target)

    def _single_value(self, query: str) -> Any:
        return self._connection.execute(query).fetchone()[0]

    def _is_old(self) -> bool:
        """Return whether the tables are of formats 1 and 2; another process may convert them."""
        schema = _schema_of(self._connection)
        is_old = schema == _definitions(_OLD_SCHEMA)
        if not is_old and schema != _definitions(_SCHEMA):
            raise KeyringCorrupt(
                f"the tables of {self.path} are not those of a keyring of format 1 to {FORMAT}; "
                "restore a backup, or use the program version that wrote it"
            )
        return is_old

    def _columns(self) -> dict[str, str]:
        """Return the SQL expression of every column, by its name in the present format.

        Formats 1 and 2 do not contain the last use of a key. A key that may have been used until
        now gets the present day, so that its retention period is not cut short.
        """
        columns = {field.name: field.name for field in (*fields(HeadRow), *fields(KeyRow))}
        if self._is_old():
            may_be_used = "imported = 0 AND state <> 'destroyed'"
            columns.update(
                kdf_data="kdf_salt",
                audit_count="0",
                audit_hash="zeroblob(32)",
                purpose="'image'",
                used_day=f"CASE WHEN {may_be_used} THEN {today()} ELSE created_day END",
            )
        return columns

    def _select(self, record: type[Any], source: str) -> list[Any]:
        """Return rows as records. Checks the type of every column: SQLite itself does not."""
        columns = self._columns()
        names = ", ".join(columns[field.name] for field in fields(record))
        rows = self._connection.execute(f"SELECT {names} FROM {source}").fetchall()
        signatures = set(product(*(_TYPES[str(field.type)] for field in fields(record))))
        if not {tuple(map(type, row)) for row in rows} <= signatures:
            raise KeyringCorrupt(f"a row of keyring {self.path} has a wrong type; restore a backup")
        return [record(*row) for row in rows]

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


def today() -> int:
    """Return the number of days since 1970-01-01 (UTC)."""
    return int(time.time() // 86_400)


def _schema_of(connection: sqlite3.Connection) -> list[tuple[str, str, str]]:
    """Return every definition in a database, triggers and views included."""
    query = (
        "SELECT type, name, substr(sql, 1, 2048) FROM sqlite_master "
        "WHERE sql IS NOT NULL ORDER BY name LIMIT 9"
    )
    return connection.execute(query).fetchall()


@cache
def _definitions(schema: str) -> list[tuple[str, str, str]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(schema)
        return _schema_of(connection)
