"""The registry of encryption schemes and the one place that reads ISED.SCHEME."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modeling.encryption.additive import AdditiveCipher
from modeling.encryption.aead import AeadCipher
from modeling.encryption.cipher import Cipher

if TYPE_CHECKING:
    from yacs.config import CfgNode

# A cipher is added with one class and one line; the attacks of engine/attacks then have a level of
# its name. Each makes fresh keys of its own kind when called without arguments.
CIPHERS: dict[str, type[Cipher]] = {
    AdditiveCipher.name: AdditiveCipher,
    AeadCipher.name: AeadCipher,
}


def build_cipher(cfg: CfgNode) -> Cipher:
    """Return the cipher of ISED.SCHEME with keys of its own, for one evaluation.

    Raises:
        ValueError: The scheme is not known.
    """
    scheme = cfg.ISED.SCHEME
    if scheme not in CIPHERS:
        raise ValueError(f"ISED.SCHEME is {scheme!r}; expected one of {', '.join(sorted(CIPHERS))}")
    return CIPHERS[scheme]()
