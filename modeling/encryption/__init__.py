"""Identity-specific encryption and decryption (ISED): two schemes behind one interface."""
