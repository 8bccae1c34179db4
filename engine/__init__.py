"""Training and evaluation.

- `api`: `Anonymizer`: trained networks for Python programs.
- `build`: `build_trainer`, `build_step`: from the configuration.
- `trainer`: `Trainer`: train an epoch, validate, upgrade, save; `LossGuard`.
- `train_step`: `JointStep`, `BaselineStep`: from a batch to its losses.
- `supervision`: `Supervision`, `UpgradePolicy`: the anonymization target and its upgrades.
- `evaluation`: `Evaluator`, `build_evaluation`: all scores from one pass.
- `views`: `Views`, `ViewMaker`: anonymized, encrypted, decrypted and recovered images of a batch;
  `image_grid`, `draw_ranked_lists`, `activation_maps`: images for people.
- `report`: `EvalReport`, `Results`: tables, log lines and results.json; `details`: `ScoreDetails`.
- `model`: `Model`, `build_model`, `pretrained_model`.
- `export`: `export`, `check_parity`: ONNX files that equal the networks.
- `checkpoint`: `find_weights`, `save_native`, `RunFolder`: the checkpoints in OUTPUT_DIR.

`scoring` computes scores, `attacks` measures protection, `vault` manages keys and sealed folders,
`distributed` runs several processes.
"""
