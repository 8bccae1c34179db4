"""Build networks, objectives and ciphers from the configuration."""

from __future__ import annotations

from functools import partial

import torch
from yacs.config import CfgNode

from layers.blocks import set_recompute
from layers.losses import (
    GAN_LOSSES,
    CenterLoss,
    batch_hard_triplet_loss,
    weighted_regularized_triplet_loss,
)
from layers.pixels import PixelSpace
from modeling.backbones.registry import imagenet_weights
from modeling.backbones.timm_backbone import TimmBackbone
from modeling.encryption.additive import AdditiveCipher
from modeling.encryption.aead import AeadCipher
from modeling.encryption.cipher import Cipher
from modeling.gan import PatchDiscriminator, UNet, check_divisible
from modeling.objectives import Objectives, TripletLoss, term_weights
from modeling.privacy_networks import Networks, PrivacyNetworks, ReIDOnly
from modeling.reid_network import ReIDNetwork
from modeling.weights import load_imagenet_weights
from utils.config_tree import get_value
from utils.errors import UserError, naming_keys
from utils.logger import get_logger
from utils.memory import MAX_CHANNELS, MAX_IMAGE_SIDE, NUM_DOWNS

_LOGGER = get_logger()

# Values of ISED.SCHEME. A new cipher needs one class and one line here; engine/attacks then has a
# level with its name. Called without arguments, each class creates new keys.
CIPHERS: dict[str, type[Cipher]] = {
    AdditiveCipher.name: AdditiveCipher,
    AeadCipher.name: AeadCipher,
}


def build_networks(cfg: CfgNode, num_classes: int) -> Networks:
    """Build the networks of MODEL.MODE on the CPU, with start weights from the global generator.

    Reads MODEL.{MODE, NAME, LAST_STRIDE, STEM_RELU, PRETRAIN_CHOICE, PRETRAIN_PATH, OUTPUT_MODE,
    NGF, NDF}, UNET.NUM_DOWNS, INPUT.IMG_SIZE, SOLVER.GRAD_CHECKPOINT and RUNTIME.CHANNELS_LAST.
    ``num_classes`` is the number of training identities; for a checkpoint, of its training.

    Raises:
        UserError: A size is not allowed (checkpoints record sizes), or there are no ImageNet
            weights.
    """
    _check_sizes(cfg)
    num_downs, width = cfg.UNET.NUM_DOWNS, cfg.MODEL.NGF
    networks: Networks
    if cfg.MODEL.MODE == "C":
        networks = ReIDOnly(build_reid(cfg, num_classes), output_mode=cfg.MODEL.OUTPUT_MODE)
    else:
        networks = PrivacyNetworks(
            anonymizer=UNet(num_downs, width),
            recovery=UNet(num_downs, width),
            reid=build_reid(cfg, num_classes),
            discriminator_anonymized=PatchDiscriminator(cfg.MODEL.NDF),
            discriminator_recovered=PatchDiscriminator(cfg.MODEL.NDF),
            output_mode=cfg.MODEL.OUTPUT_MODE,
        )
    networks.to(memory_format=memory_format_of(cfg))
    set_recompute(networks, cfg.SOLVER.GRAD_CHECKPOINT)
    return networks


def memory_format_of(cfg: CfgNode) -> torch.memory_format:
    """Return the memory format of networks and images, from RUNTIME.CHANNELS_LAST."""
    return torch.channels_last if cfg.RUNTIME.CHANNELS_LAST else torch.contiguous_format


def build_objectives(cfg: CfgNode, num_classes: int, feature_size: int) -> Objectives:
    """Build the losses and their weights; ``Objectives.centers`` has trained parameters.

    Reads MODEL.{CENTER_LOSS, WEIGHT_REGULARIZED_TRIPLET, GAN_MODE}, LOSS.{LABEL_SMOOTHING,
    TRIPLET_NORMALIZED}, SOLVER.MARGIN, and the weights that the terms of ``objectives`` name.
    """
    return Objectives(
        triplet=_triplet_loss(cfg),
        label_smoothing=cfg.LOSS.LABEL_SMOOTHING,
        centers=CenterLoss(num_classes, feature_size) if cfg.MODEL.CENTER_LOSS == "on" else None,
        gan=GAN_LOSSES[cfg.MODEL.GAN_MODE],
        weights=term_weights(lambda key: get_value(cfg, key)),
    )


def build_reid(cfg: CfgNode, num_classes: int) -> ReIDNetwork:
    """Build the re-ID network with the start weights of MODEL.PRETRAIN_CHOICE.

    For ``self`` the weights are random, and the caller loads a checkpoint.

    Raises:
        UserError: There are no ImageNet weights.
    """
    choice = cfg.MODEL.PRETRAIN_CHOICE
    reid = ReIDNetwork(
        num_classes,
        cfg.MODEL.NAME,
        last_stride=cfg.MODEL.LAST_STRIDE,
        stem_relu=cfg.MODEL.STEM_RELU,
        image_size=tuple(cfg.INPUT.IMG_SIZE),
        pixels=PixelSpace(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD),
    )
    if choice == "imagenet" and isinstance(reid.base, TimmBackbone):
        reid.base.load_imagenet_weights(cfg.MODEL.PRETRAIN_PATH)
    elif choice == "imagenet":
        with naming_keys("MODEL.PRETRAIN_PATH"):
            weights = imagenet_weights(cfg.MODEL.NAME)
            load_imagenet_weights(reid.base, weights, cfg.MODEL.PRETRAIN_PATH)
    elif choice == "none":
        _LOGGER.info("re-ID network starts from random weights (MODEL.PRETRAIN_CHOICE none)")
    return reid


def build_cipher(cfg: CfgNode) -> Cipher:
    """Build the cipher of ISED.SCHEME with new keys, for one evaluation."""
    return CIPHERS[cfg.ISED.SCHEME]()


def _triplet_loss(cfg: CfgNode) -> TripletLoss:
    if cfg.MODEL.WEIGHT_REGULARIZED_TRIPLET == "on":
        return partial(weighted_regularized_triplet_loss, normalized=cfg.LOSS.TRIPLET_NORMALIZED)
    return partial(batch_hard_triplet_loss, margin=cfg.SOLVER.MARGIN)


def _check_sizes(cfg: CfgNode) -> None:
    """Raise before a size that a hostile checkpoint may record allocates all memory."""
    size = tuple(cfg.INPUT.IMG_SIZE)
    if len(size) != 2:
        raise UserError(f"INPUT.IMG_SIZE is {size!r}; expected height and width")
    limits = (
        *(("INPUT.IMG_SIZE", side, 1, MAX_IMAGE_SIDE) for side in size),
        ("MODEL.NGF", cfg.MODEL.NGF, 1, MAX_CHANNELS),
        ("MODEL.NDF", cfg.MODEL.NDF, 1, MAX_CHANNELS),
        ("UNET.NUM_DOWNS", cfg.UNET.NUM_DOWNS, *NUM_DOWNS),
    )
    for key, value, low, high in limits:
        if not (isinstance(value, int) and low <= value <= high):
            raise UserError(f"{key} is {value!r}; expected a whole number from {low} to {high}")
    if cfg.MODEL.MODE == "GCR":
        with naming_keys("INPUT.IMG_SIZE", "UNET.NUM_DOWNS"):
            check_divisible(size, cfg.UNET.NUM_DOWNS)
