"""Identity-specific encryption and decryption (ISED): two schemes behind one interface."""

from modeling.encryption.build import CIPHERS, build_cipher
from modeling.encryption.cipher import Cipher, KeySource, Reading, Sealed, read_sealed

__all__ = ["CIPHERS", "Cipher", "KeySource", "Reading", "Sealed", "build_cipher", "read_sealed"]
