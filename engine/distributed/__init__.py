"""Several processes of one run, started by torchrun.

- `processes`: `joined`, `leave`, `world`, `is_main`, `from_main`, `share`, `all_gather`.
- `parallel`: `shared_step`, `parallel_phases`: gradients of the whole batch.
"""
