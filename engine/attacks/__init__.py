"""Attacks on every level of protection.

- `suite`: `ATTACKS`, `Suite`: attacks by name, their verdicts and files.
- `attack`: `Attack`, `CipherAttack`: the interface; `AttackContext`: what all attacks of a run
  share.
- `build`: `plan_attacks`: from the configuration of a checkpoint.
- `levels`: `LEVELS`, `seal`: what is stored at each level.
- `measures`: `Result`, `Measure`: a score with its floor, interval and verdict; `lpips_measure`.
- `training`: `TrainingSetup`, `train_recovery`, `train_reid`: networks of an attacker.
- `charts`: figures; `foreign`: `foreign_attacks`: third-party re-ID networks.
- `brute_force`, `key_reuse`, `linkage`, `network_attacks`, `tampering`: the attacks.
"""
