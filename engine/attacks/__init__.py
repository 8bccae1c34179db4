"""Attacks on every level of protection.

- `suite`: `ATTACKS`, `Suite`: attacks by name, their verdicts and files.
- `attack`: `Attack`, `CipherAttack`: the interface.
- `context`: `AttackContext`: identities, stored images and networks that all attacks share.
- `build`: `build_context`: from the configuration of a checkpoint.
- `levels`: `LEVELS`, `Protector`: what is stored at each level.
- `measures`: `Result`, `Measure`: a score with its floor, interval and verdict.
- `training`: `TrainingSetup`, `train_recovery`, `train_reid`: networks of an attacker.
- `frontier`: `FrontierPoint`: privacy against utility; `charts`: figures.
- `foreign`: `foreign_attacks`: third-party re-ID networks; `restorer`: a network for recovery.
- `linear`: `LinearMap`, `fit_linear`: ridge regression; `perceptual`: `lpips_measure`: LPIPS.
- `averaging`, `brute_force`, `linkage`, `network_attacks`, `pairs`, `tampering`: the attacks.
"""
