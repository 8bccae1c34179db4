"""Identity-specific encryption and decryption (ISED) of anonymized images.

Ciphers: `Cipher`, `Sealed`, `read_sealed`, `quantize_pixels`, `dequantize_pixels` (`cipher`);
`AdditiveCipher` (`additive`), `AeadCipher` (`aead`); registered in `modeling.build.CIPHERS`.
Sealed files: `seal_image`, `open_image`, `Metadata` (`sealed_image`), `encode`, `decode`
(`png_format`), `seal`, `open_sealed` (`primitives`), `SubjectKey`, `KeySource` (`keys`). These
modules do not import torch, so that the worker processes of `protect` start fast.
Errors: `ised_errors`.
"""
