"""Folders of pictures under keys: anonymize and seal, open, recover, verify, search."""
