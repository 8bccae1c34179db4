"""Attacks on every level of protection: one file per family, named in ``registry.ATTACKS``."""
