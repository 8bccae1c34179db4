"""The key file that a rekey makes: gone if the rekey fails, gone on with if it was killed.

A mark lies beside the file until the keyring is under it. It names the keyring and its epoch, which
every rekey raises; so who has the keyring open at that epoch, and finds the mark, knows the file to
be that of a rekey that did not get through, and no former master.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from modeling.encryption.errors import StorageError, UsageError
from modeling.encryption.keyring_rows import HeadRow
from modeling.encryption.primitives import random_key
from modeling.encryption.secret_files import sync_folder, write_new_private


class NewMasterFile:
    """A master key file on its way into force; used while the keyring is held for writing."""

    def __init__(self, path: Path, head: HeadRow) -> None:
        """Take the new file's path, and the keyring's head as it is before.

        Raises:
            UsageError: The file exists, and is not of a killed rekey of this keyring.
        """
        self._path, self._mark = path, mark_of(path)
        self._claim = f"{head.keyring_id.hex()} {head.epoch}\n".encode()
        self.is_made = False  # by this run
        if os.path.lexists(path) and not self._is_claimed():
            raise _exists(path)

    def make(self) -> None:
        """Write the mark and the file, unless a killed rekey did.

        Raises:
            UsageError: The file exists.
            StorageError: It cannot be written.
        """
        if os.path.lexists(self._path):
            if not self._is_claimed():
                raise _exists(self._path)
            return
        try:
            self._mark.unlink(missing_ok=True)
            write_new_private(self._mark, self._claim)
            self.is_made = True
            write_new_private(self._path, random_key())
        except FileExistsError:  # somebody was quicker, and it is theirs
            self.is_made = False
            raise _exists(self._path) from None
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from None

    def remove(self) -> None:
        """Take back what was made; only where the keyring is known not to be under it."""
        for path in (self._path, self._mark):
            path.unlink(missing_ok=True)
        sync_folder(self._path.parent)

    def _is_claimed(self) -> bool:
        """Whether the file is of a rekey of this keyring, from where it is now."""
        with suppress(OSError):
            return self._mark.read_bytes() == self._claim
        return False


def mark_of(path: Path) -> Path:
    """Return where the mark of a new master key file lies."""
    return path.with_name(f".{path.name}.rekey")


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists already; name a file for the new master key")
