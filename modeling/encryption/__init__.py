"""Encryption of anonymized images under keys of subjects (ISED).

- `cipher`: `Cipher`, `Sealed`, `read_sealed`, `quantize_pixels`, `dequantize_pixels`.
- `additive`: `AdditiveCipher`; `aead`: `AeadCipher`: registered in ``modeling.build.CIPHERS``.
- `sealed_image`: `seal_image`, `open_image`, `Metadata`; `png_format`: `encode`, `decode`.
- `sealed_original`: `seal_original`, `open_original`: source files.
- `primitives`: `seal`, `open_sealed`: authenticated encryption of bytes; `SubjectKey`, `KeyOf`.
- `ised_errors`: `IsedError` and its subclasses.

The modules for sealed files do not import torch, so that worker processes start fast.
"""
