"""Helpers without knowledge of re-ID; nothing of this project is imported.

- `errors`: `UserError`, `naming_keys`, `optional_package`: errors that a user can fix.
- `files`: `atomic_write`, `write_text`, `staged_folder`: files that are complete or absent.
- `logger`: `get_logger`, `setup_logger`; `progress`: `Progress`.
- `metric_writer`: `MetricWriter`, `read_metrics`: TensorBoard and metrics.jsonl; `trackers`:
  `Trackers`: Weights & Biases and MLflow.
- `device`: `resolve_device`, `resolve_precision`, `set_threads`; `precision`: `exact_float32`.
- `memory`: `available_mib`, `require_memory`; `compiling`: `compile_in_place`.
- `limits`: `MAX_IMAGE_SIDE`, `MAX_CHANNELS`, `MAX_IDENTITIES`, `NUM_DOWNS`.
- `seeding`: `seed_everything`, `derive_seed`; `config_tree`: `get_value`, `changed`.
- `world`: `World`; `text`: `composed`; `tensor_files`: `save_tensors`, `read_tensors`;
  `environment`: `environment_report`.
- `program`: imported first by every script.
"""
