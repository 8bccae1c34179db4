"""Code that several commands share.

- `command_line`: `Parser`, `exit_code_of`: arguments, errors and exit codes.
- `run`: `run`: train and evaluate one configuration; `Experiment`: train and test a method.
- `tables`: `Comparison`: differences on the same queries; `Summary`: means over seeds.
- `report`: `write_report`, with `report_charts` and `run_files`; `drawing`: `Drawing`.
- `keyring_access`: `open_keyring`, `add_master_arguments`; `custody`: shares and the audit log.
"""
