"""Feature extractors of the re-ID network.

- `registry`: `REID_DESIGNS`, `reid_design`: backbone and pooling of each MODEL.NAME.
- `resnet`: `ResNetBackbone`; `timm_backbone`: `TimmBackbone`.
"""
