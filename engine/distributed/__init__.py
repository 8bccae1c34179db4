"""Several processes of one run, started by torchrun.

- `group`: `joined`, `leave`, `device_of_rank`: joining and leaving the process group.
- `processes`: `world`, `is_main`, `from_main`, `share`, `all_gather`, `gather_rows`.
- `parallel`: `shared_step`, `parallel_phases`: gradients of the whole batch.
"""
