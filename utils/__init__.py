"""Helpers without knowledge of re-ID; nothing of this project is imported.

- `errors`: `UserError`, `naming_keys`, `optional_package`: errors that a user can fix.
- `files`: `atomic_write`, `write_text`, `staged_folder`: files that are complete or absent;
  `composed`, `existing_path`: names in the two forms of Unicode.
- `logger`: `get_logger`, `setup_logger`, `Progress`.
- `metric_writer`: `MetricWriter`, `read_metrics`: TensorBoard and metrics.jsonl; `Trackers`:
  Weights & Biases and MLflow.
- `device`: `resolve_device`, `resolve_precision`, `exact_float32`, `compile_in_place`.
- `memory`: `available_mib`, `require_memory`; `MAX_IMAGE_SIDE`, `MAX_CHANNELS`, `NUM_DOWNS`.
- `seeding`: `seed_everything`, `derive_seed`; `config_tree`: `get_value`, `changed`.
- `world`: `World`; `tensor_files`: `save_tensors`, `read_tensors`;
  `environment`: `environment_report`.
- `program`: imported first by every script.
"""
