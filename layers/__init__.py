"""Blocks and loss functions without knowledge of networks.

- `losses`: `weighted_regularized_triplet_loss`, `batch_hard_triplet_loss`, `CenterLoss`,
  `GAN_LOSSES`.
- `blocks`: `NonLocalBlock`, `GeneralizedMeanPooling`, `AveragePooling`; `Recomputable`:
  activations that are recomputed to save memory.
- `pixels`: `PixelSpace`: between [0, 1] and normalised values.
- `collectives`: `gather_batch`, `synchronize_norms`: batch statistics over processes.
"""
