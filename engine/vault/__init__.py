"""Keys of subjects, and folders of sealed images.

- `keyring`: `Keyring`: a random key for each subject in one SQLite file.
- `keyring_admin`: `list_keys`, `rotate`, `revoke`, `destroy`, `rekey`, `backup`, `export_subject`.
- `erasure`: `expire`, `destroy_with_certificate`, `verify_certificate`.
- `keyring_rows`, `keyring_store`: authentication of rows, and the SQLite file.
- `master`: `KeyFile`, `KeyShares`, `Passphrase`, `WrapCommand`: the master key of a keyring.
- `shares`: `split`, `combine`: shares of a master key file.
- `audit`: `recorded`: the audit log of a keyring; `audit_reader`: `AuditLog`: check and list it.
- `subjects`: `subject_rule`: which subject an image belongs to.
- `sources`: `list_sources`, `decode_source`: images to protect.
- `protect`: `protect_folder`: anonymize and seal; `sealing_work`: `seal_batch`: in workers.
- `reading`: `read_image`, `read_original`, `check_existing`: single sealed files.
- `sealed_folder`: `Manifest`, `publish`: the output folder.
- `opening`: `unseal`, `write_opened`, `verify_folder`; `reveal`: `reveal`.
- `index`: `Segment`, `IndexWriter`, `VectorKeys`: the encrypted embeddings of a folder.
- `search`: `load_gallery`, `most_similar`, `complete_index`.
- `secret_files`: `read_private`, `new_private_file`: files that only their owner can read.
"""
