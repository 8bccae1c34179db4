"""The key file that a rekey makes: gone if the rekey fails, gone on with if it was killed.

A mark lies beside the file until the keyring is under it. It names the keyring, its epoch, which
every rekey raises, and the key by a hash: who has the keyring open at that epoch, and finds mark
and file to agree, knows the file to be that of a rekey that did not get through. A former master,
or a file that somebody else put there, does not agree.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from modeling.encryption.errors import StorageError, UsageError
from modeling.encryption.keyring_rows import HeadRow
from modeling.encryption.primitives import random_key
from modeling.encryption.secret_files import read_private, sync_folder, write_new_private
from utils.errors import UserError


class NewMasterFile:
    """A master key file on its way into force; used while the keyring is held for writing."""

    def __init__(self, path: Path, head: HeadRow) -> None:
        """Take the new file's path, and the keyring's head as it is before.

        Raises:
            UsageError: The file exists, and is not of a killed rekey of this keyring.
        """
        self._path, self._mark = path, mark_of(path)
        self._keyring_id, self._epoch = head.keyring_id, head.epoch
        self._made: dict[Path, bytes] = {}  # what this run wrote, or was about to
        self._is_leftover()

    def make(self) -> None:
        """Write the mark and the file, unless a killed rekey did.

        Raises:
            UsageError: The file exists.
            StorageError: It cannot be written.
        """
        if self._is_leftover():
            return
        key = random_key()
        self._made = {self._path: key, self._mark: claim_of(key, self._keyring_id, self._epoch)}
        try:
            self._mark.unlink(missing_ok=True)  # of a rekey killed before it wrote its key
            write_new_private(self._mark, self._made[self._mark])
            write_new_private(self._path, key)
        except FileExistsError:  # somebody was quicker, and it is theirs
            raise _exists(self._path) from None
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from None

    def remove(self) -> None:
        """Take back what this run made; only where the keyring is known not to be under it."""
        for path, content in self._made.items():
            if _content(path) == content:
                path.unlink(missing_ok=True)
        if self._made:
            sync_folder(self._path.parent)

    def _is_leftover(self) -> bool:
        """Whether the file is there, of a killed rekey of this keyring.

        Raises:
            UsageError: It is there, and is none.
        """
        if not os.path.lexists(self._path):
            return False
        if not is_claimed(self._path, self._keyring_id, self._epoch):
            raise _exists(self._path)
        return True


def mark_of(path: Path) -> Path:
    """Return where the mark of a new master key file lies."""
    return path.with_name(f".{path.name}.rekey")


def claim_of(key: bytes, keyring_id: bytes, epoch: int) -> bytes:
    """Return the content of the mark of a new master key for a keyring at an epoch."""
    digest = hashlib.sha256(b"ised rekey" + key).hexdigest()
    return f"{keyring_id.hex()} {epoch} {digest}\n".encode()


def is_claimed(path: Path, keyring_id: bytes, epoch: int) -> bool:
    """Tell whether a key file is of a rekey of this keyring that began at this epoch."""
    key = _content(path)
    return key is not None and _content(mark_of(path)) == claim_of(key, keyring_id, epoch)


def drop_mark(path: Path, keyring_id: bytes, epoch: int) -> bool:
    """Remove the mark of a rekey that got through; False, and nothing, if it is of another."""
    if not is_claimed(path, keyring_id, epoch):
        return False
    mark_of(path).unlink(missing_ok=True)
    return True


def _content(path: Path) -> bytes | None:
    """Return what a private file holds; None where there is none, also for links and pipes."""
    with suppress(UserError, OSError):
        return read_private(path, "new master key file")
    return None


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists already; name a file for the new master key")
