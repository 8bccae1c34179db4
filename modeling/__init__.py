"""The five networks, their losses, and encryption.

- `build`: `build_networks`, `build_objectives`, `build_cipher`, `CIPHERS`: from the configuration.
- `privacy_networks`: `PrivacyNetworks` (mode GCR), `ReIDOnly` (mode C).
- `reid_network`: `ReIDNetwork`, `ReIDOutput`, `PrivacyOutput`.
- `gan`: `UNet`, `PatchDiscriminator`: the networks with adversarial losses.
- `objectives`: `GENERATOR_TERMS`, `REID_TERMS`, `discriminator_losses`, `generator_losses`,
  `reid_losses`.
- `weights`: `load_matching`, `load_imagenet_weights`: weights from files.

`backbones` contains the feature extractors, `encryption` the ciphers.
"""
