"""Loaders of data sets; each returns `LoadedData`.

- `layout`: `LoadRequest`, `LoadedData`: argument and result of every loader, and shared parsing.
- `market1501`, `msmt17`, `cuhk03` (with `cuhk03_raw`), `folder`, `csv_table`, `synthetic`.
"""
