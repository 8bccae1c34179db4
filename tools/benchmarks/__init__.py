"""The benchmarks of `tools/benchmark.py`; each module has `add_arguments` and `run`.

- `data`, `step`, `evaluation`, `retrieval`, `ised`: one benchmark each.
- `measuring`: `contest`, `seconds`, `PeakMemory`; `step`: `step_flops`, `evaluation_flops`.
"""
