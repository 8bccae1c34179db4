"""The commands: each module with a `main` function is a script.

`lib` contains code that several commands share, `benchmarks` the parts of `benchmark.py`.
"""
