"""Optimizers and learning rates.

- `optimizers`: `build_optimizers`, `build_schedule`: from the configuration; `Optimizers`,
  `LearningRateSchedule`, `set_learning_rate`.
"""
