"""Any timm model as feature extractor of the re-ID network: MODEL.NAME ``timm:<name>``."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from layers.blocks import Backbone
from layers.pixels import PixelSpace
from modeling.weights import load_matching
from utils.errors import UserError, optional_package
from utils.files import expanded
from utils.logger import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

_LOGGER = get_logger()

PREFIX = "timm:"
_REFUSALS = (AssertionError, RuntimeError, ValueError)  # what models raise for a size they refuse


class TimmBackbone(Backbone):
    """A timm model without its classifier and its pooling.

    Images are first mapped from the project's pixel space to the mean and deviation that timm
    states for the model. Folding this map into the first convolution would change the result at the
    borders, because zero padding has to be zero in the model's own space.

    SOLVER.GRAD_CHECKPOINT does not apply to it: timm's own recomputation would update the running
    statistics of batch norms twice.

    The name in timm may have a tag: ``tf_efficientnet_lite0``, ``resnet50.a1_in1k``. The last stage
    has stride 1 or 2; 1 doubles the resolution of the feature map. A model without such a stage,
    for example a ViT, accepts only the default 1. ``stem_relu`` must be False, because the stem is
    part of the model. Position embeddings are resampled to the image size (height and width, px).

    Raises:
        UserError: If timm is not installed or has no such model, or if the model has no spatial
            features or does not accept the image size or the stride.
    """

    model: Any  # timm's models have no common base class
    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        name: str,
        *,
        last_stride: int,
        stem_relu: bool,
        image_size: tuple[int, int],
        pixels: PixelSpace,
    ) -> None:
        super().__init__()
        if stem_relu:
            raise UserError(
                f"MODEL.STEM_RELU is True with MODEL.NAME {PREFIX}{name}; expected False: the stem "
                "of a timm model is not changed"
            )
        if last_stride not in (1, 2):
            raise UserError(f"MODEL.LAST_STRIDE is {last_stride}; expected 1 or 2")
        self._name, self._last_stride, self._image_size = name, last_stride, image_size
        model = _create(name)
        mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
        scale, shift = torch.tensor(pixels.std) / std, (torch.tensor(pixels.mean) - mean) / std
        self.register_buffer("_scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("_shift", shift.view(3, 1, 1), persistent=False)
        self.model = self._fitted(_without_head(model, name))
        self.out_channels = _probe(self.model, self._image_size).shape[1]
        # Half of the features after a layer norm are negative.
        self.signed = any(isinstance(module, nn.LayerNorm) for module in self.model.modules())

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to (B, out_channels, H', W').

        The N patch tokens of a transformer become (B, out_channels, N, 1).
        """
        return _feature_map(self.model, image * self._scale + self._shift)

    def load_imagenet_weights(self, path: str = "") -> None:
        """Load the weights of a file or folder, or else those that timm downloads.

        The path (MODEL.PRETRAIN_PATH) is a file in timm's format, or a folder that contains
        ``<name>.pth`` or ``<name>.safetensors``; '' to download.

        Raises:
            UserError: If no weights are available, or they belong to another model.
        """
        candidates = _candidates(path, self._name)
        file = next((file for file in candidates if file.is_file()), None)
        if file is None:
            model = _without_head(_downloaded(self._name, candidates), self._name)
        else:
            model = _create(self._name)
            names = model.pretrained_cfg.get("classifier") or ()
            names = [names] if isinstance(names, str) else names
            model = _without_head(model, self._name)
            classifier = tuple(f"{name}." for name in names)
            load_matching(model, _read(file), file, may_ignore=classifier)
            _LOGGER.info("ImageNet weights of %s%s: %s", PREFIX, self._name, file)
        self.model = self._fitted(model)

    def _fitted(self, model: Any) -> Any:
        """Set the image size and the last stride of a model, whose weights are loaded before."""
        if model.pretrained_cfg.get("fixed_input_size") and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=self._image_size)
        try:
            strided = _last_strided(model, self._image_size)
        except _REFUSALS as error:
            raise UserError(
                f"INPUT.IMG_SIZE is {self._image_size}, which MODEL.NAME {PREFIX}{self._name} "
                f"cannot process ({error}); choose another size or another model"
            ) from error
        if not strided and self._last_stride != 1:
            raise UserError(
                f"MODEL.LAST_STRIDE is {self._last_stride} with MODEL.NAME {PREFIX}{self._name}, "
                "whose last stage has no stride; expected 1, the default"
            )
        if strided and self._last_stride == 1:
            for module in strided:
                module.stride = (1, 1)
            try:
                _probe(model, self._image_size)
            except _REFUSALS as error:
                raise UserError(
                    f"MODEL.LAST_STRIDE is 1 with MODEL.NAME {PREFIX}{self._name}, whose last "
                    "stage requires stride 2; expected 2"
                ) from error
        features = _probe(model, self._image_size)
        if features.ndim != 4 or features.shape[2:] == (1, 1):  # no map, no patch tokens
            raise _no_spatial_features(self._name)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                module.forward = partial(_depthwise, module.forward)  # type: ignore[method-assign]
        return model


def _depthwise(convolve: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute a depthwise convolution of a training on a CPU in float32 under autocast.

    Its gradients for kernels of 5 or a stride of 2 take 5 to 13 times as long in bfloat16. With
    this, EfficientNet-Lite0 trains 1.9 times as fast in bfloat16 (Xeon with AMX, torch 2.14.1).
    """
    mixed = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not mixed or not torch.is_grad_enabled():
        return convolve(x)
    with torch.autocast("cpu", enabled=False):
        return convolve(x.float()).to(torch.get_autocast_dtype("cpu"))


def _feature_map(model: Any, image: Tensor) -> Tensor:
    """Return features (B, C, H', W'): (B, C, N, 1) of N patch tokens, without class tokens."""
    features: Tensor = model(image)
    if features.ndim == 3:
        tokens = features[:, getattr(model, "num_prefix_tokens", 0) :]
        return tokens.transpose(1, 2).unsqueeze(-1)
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return features.permute(0, 3, 1, 2)
    return features


def _probe(model: Any, image_size: tuple[int, int]) -> Tensor:
    """Return the feature map of one image, in evaluation mode."""
    training = model.training
    with torch.no_grad():
        features = _feature_map(model.eval(), torch.zeros(1, 3, *image_size))
    model.train(training)
    return features


def _last_strided(model: Any, image_size: tuple[int, int]) -> list[Any]:
    """Return the layers with stride 2 whose output has the resolution of the feature map."""
    outputs: list[tuple[Any, torch.Size]] = []
    hooks = [
        module.register_forward_hook(
            lambda module, _, output: outputs.append((module, output.shape[2:]))
        )
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))
        and module.stride in (2, (2, 2))
    ]
    try:
        features = _probe(model, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    return [module for module, size in outputs if size == features.shape[2:]]


def _create(name: str, *, pretrained: bool = False) -> Any:
    """Return a timm model with its classifier."""
    timm = optional_package("timm", f"MODEL.NAME {PREFIX}{name}", "python3 -m pip install timm")
    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    if tag and architecture in known:
        known = timm.list_models(f"{architecture}.*", pretrained=True)
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=4, cutoff=0.4))
        raise UserError(
            f"MODEL.NAME is '{PREFIX}{name}', which timm {timm.__version__} does not have; "
            f"expected a name of timm.list_models(){near and f', such as {near}'}"
        )
    return timm.create_model(name, pretrained=pretrained)


def _without_head(model: Any, name: str) -> Any:
    """Remove the classifier and the pooling."""
    try:
        model.reset_classifier(0, global_pool="")
    except (AssertionError, AttributeError, TypeError) as error:
        raise _no_spatial_features(name) from error
    return model


def _no_spatial_features(name: str) -> UserError:
    return UserError(
        f"MODEL.NAME is '{PREFIX}{name}', which returns one vector instead of spatial features; "
        "choose larger images, or a model with a feature map or patch tokens, such as "
        f"{PREFIX}tf_efficientnet_lite0 or {PREFIX}vit_tiny_patch16_224"
    )


def _candidates(path: str, name: str) -> list[Path]:
    """Return the files that may hold the weights: MODEL.PRETRAIN_PATH, or names in that folder."""
    if not path:
        return []
    given = expanded(path)
    if not given.exists():
        raise UserError(
            f"MODEL.PRETRAIN_PATH is {path!r}, which does not exist; expected a file or folder "
            "with ImageNet weights, or '' to let timm download them"
        )
    if given.is_file():
        return [given]
    names = dict.fromkeys((name, name.partition(".")[0]))
    return [given / f"{stem}{suffix}" for stem in names for suffix in (".pth", ".safetensors")]


def _downloaded(name: str, tried: list[Path]) -> Any:
    """Return a model with the weights that timm downloads or has in its cache."""
    try:
        return _create(name, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # each of timm's download paths raises its own types
        attempts = [*map(str, tried), f"download by timm ({error})"]
        raise UserError(
            f"no ImageNet weights for {PREFIX}{name}; tried {'; '.join(attempts)}: point "
            f"MODEL.PRETRAIN_PATH to {name}.pth or {name}.safetensors in timm's format, or to its "
            "folder, or ask for random weights with MODEL.PRETRAIN_CHOICE none"
        ) from error


def _read(file: Path) -> dict[str, Tensor]:
    timm = optional_package("timm", f"reading {file}", "python3 -m pip install timm")
    try:
        return cast("dict[str, Tensor]", timm.models.load_state_dict(str(file)))
    except Exception as error:  # unpickling a foreign file raises many types
        raise UserError(f"{file} cannot be read as weights of a timm model: {error}") from error
