"""A master key that an external command wraps: a key service, a smart card, the machine's TPM.

docs/OPERATING.md has examples for Vault, cloud KMS, PKCS#11 and systemd-creds.
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from typing import ClassVar

from modeling.encryption.ised_errors import KeyringError, UsageError
from modeling.encryption.primitives import KEY_BYTES, random_key

KDF_COMMAND = "command"
MAX_WRAPPED_BYTES = 1 << 16
TIME_LIMIT_S = 60  # also enough to enter a PIN


@dataclass(frozen=True)
class WrapCommand:
    """A random master key that an external command wraps; the keyring stores the wrapped key.

    The commands read standard input, write standard output, and are not run in a shell. So a key
    service or a smart card protects the keyring, and sees neither the root nor any other key.
    """

    unwrap_line: str  # command line that returns the master key for the wrapped key
    wrap_line: str | None = None  # command line that wraps a master key; only for a new master
    kdf: ClassVar[str] = KDF_COMMAND

    def new_key(self) -> tuple[str, bytes, bytes]:
        """Return parameters, the wrapped key to store, and a new random master key.

        Raises:
            UsageError: There is no wrap command, or a command cannot be run.
            KeyringError: It fails, or the unwrap command does not return what was wrapped.
        """
        if self.wrap_line is None:
            raise UsageError("a new master needs --wrap-command in addition to --unwrap-command")
        key = random_key()
        wrapped, shown = _run("wrap", self.wrap_line, key)
        if not 0 < len(wrapped) <= MAX_WRAPPED_BYTES:
            raise KeyringError(
                f"the wrap command returned {len(wrapped)} bytes; expected 1 to "
                f"{MAX_WRAPPED_BYTES}{shown}"
            )
        if key in wrapped:
            raise KeyringError("the wrap command returned the master key unencrypted")
        if self.unlock("", wrapped) != key:
            raise KeyringError("the unwrap command does not return the key that was wrapped")
        return "", wrapped, key

    def unlock(self, params: str, data: bytes) -> bytes:
        """Return the master key for the wrapped key of the keyring.

        Raises:
            UsageError: The command cannot be run.
            KeyringError: It fails, or does not return 32 bytes.
        """
        del params
        key, shown = _run("unwrap", self.unwrap_line, data)
        if len(key) != KEY_BYTES:
            raise KeyringError(
                f"the unwrap command returned {len(key)} bytes; expected {KEY_BYTES}{shown}"
            )
        return key


def _run(name: str, line: str, content: bytes) -> tuple[bytes, str]:
    """Return the standard output of a command, and its standard error as the end of a message."""
    option = f"--{name}-command {line!r}"
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{option} is not a command line: {error}") from None
    if not words:
        raise UsageError(f"{option} is empty")
    try:
        done = subprocess.run(  # noqa: S603 - the user's own command
            words, input=content, capture_output=True, timeout=TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise KeyringError(f"{option} did not end within {TIME_LIMIT_S} s") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{option} cannot be run: {reason}") from None
    text = " / ".join(done.stderr.decode(errors="replace").split("\n")).strip(" /")
    shown = f"; it wrote: {text[-500:]}" if text else ""
    if done.returncode:
        code = done.returncode
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise KeyringError(f"{option} ended with {end}{shown}")
    return done.stdout, shown
