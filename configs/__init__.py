"""Keys of the configuration, and configuration files.

- `defaults`: `KEYS`, `default_config`: every key with default, allowed values and meaning.
- `loading`: `load`, `dump`: a checked configuration from a file and overrides; `differing`: values
  that differ and can change a number.
- `schema`: `Key`, `OneOf`, `Number`, `Flag`: what a key allows.
- `validation`: `ConfigError`, `cross_field_problems`: checks between keys.
- `published`: `published_rank1`: rank-1 of the published tables.
- `reference`: `markdown`: the table in docs/configuration.md.
"""
