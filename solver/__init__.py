"""Optimizers and learning rates.

- `build`: `build_optimizers`, `build_schedule`: from the configuration.
- `optimizers`: `Optimizers`, `LearningRateSchedule`, `set_learning_rate`.
"""
