"""Tokenformer vision transformers in timm's model registry.

After ``import lit_tokenformer.interop.timm``, ``timm.create_model("tokenformer_vit_small_patch16_224")`` creates
a model with timm's interface for vision transformers (``timm.models.vision_transformer``): feature extraction,
layer-wise learning-rate decay, hub folders. It grows like any :class:`~lit_tokenformer.models.Tokenformer`. Scripts of
timm run with the models registered by

    python -m lit_tokenformer.interop.timm train.py --model tokenformer_vit_small_patch16_224 ...
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.models import Pattention, Tokenformer, list_presets, preset_config
from lit_tokenformer.models.mixers import Attention
from lit_tokenformer.models.stems import PatchStem

for _part in (PatchStem, Pattention, Attention):  # their control flow depends on shapes
    register_notrace_module(_part)

ARGUMENTS = {
    "img_size": "image_size",
    "embed_dim": "dim",
    "drop_path_rate": "drop_path",
    "proj_drop_rate": "dropout",
    "attn_drop_rate": "attn_dropout",
}
"""Fields of the architecture by timm's names; other names are equal."""


class TokenformerViT(Tokenformer):
    """Tokenformer with the interface of timm's vision transformers.

    Args:
        preset: Preset name, see :func:`lit_tokenformer.models.list_presets`.
        global_pool: Type of global pooling: ``token``, ``avg`` or ``""``.
        drop_rate: Dropout rate before the classifier.
        dynamic_img_size: Ignored: the model always accepts images of other sizes, with resampled positions.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        arguments: Fields of the architecture by timm's or our names; ``None`` keeps the preset's value.

    Raises:
        UserError: For an unknown field, an invalid value, or images that are not square.
    """

    def __init__(
        self,
        preset: str,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        dynamic_img_size: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> None:
        given = {ARGUMENTS.get(name, name): value for name, value in arguments.items()}
        for name in ("image_size", "patch_size"):
            if name in given:
                given[name] = _side(name, given[name])
        with torch.device(device or torch.get_default_device()):
            super().__init__(preset_config(preset, global_pool=global_pool or "token", **given))
            self.head_drop = nn.Dropout(drop_rate)
            if not global_pool:
                self.reset_classifier(self.num_classes, "")
        self.to(dtype)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels and reduction of each block's output."""
        size = self.config.patch_size
        blocks = range(len(self.blocks))
        return [{"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": size} for i in blocks]

    @property
    def global_pool(self) -> str:
        """Type of global pooling."""
        return str(self.head.global_pool)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images (B, C, height, width) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, T, D) -> logits (B, num_classes), or the pooled features (B, D) with ``pre_logits``."""
        x = self.head_drop(self.head(x, pre_logits=True))
        return x if pre_logits else self.get_classifier()(x)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Return the outputs of blocks (DINO's interface).

        Args:
            x: Images, (B, C, height, width).
            n: Last n blocks if int, else their indices.
            reshape: Return feature maps (B, D, rows, columns) instead of sequences (B, T, D).
            return_prefix_tokens: Return pairs of patches and prefix tokens.
            norm: Apply the final norm.
        """
        return self.forward_intermediates(
            x,
            indices=n if isinstance(n, int) else list(n),
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def forward_intermediates(self, x: Tensor, *args: Any, output_dict: bool = False, **kwargs: Any) -> Any:
        """Forward features and return intermediates, see :meth:`Tokenformer.forward_intermediates`.

        Args:
            x: Images, (B, C, height, width).
            args: Arguments of the base class.
            output_dict: Return a dictionary with ``image_intermediates``, ``image_intermediates_prefix`` (with
                ``return_prefix_tokens``) and ``image_features``.
            kwargs: Arguments of the base class.

        Raises:
            UserError: For an attention mask, which image models do not support.
        """
        if kwargs.pop("attn_mask", None) is not None:
            raise UserError("attn_mask: unsupported by an image model")
        found = super().forward_intermediates(x, *args, **kwargs)
        if not output_dict:
            return found
        features, layers = (None, found) if kwargs.get("intermediates_only") else found
        pairs = bool(kwargs.get("return_prefix_tokens"))
        named: dict[str, Any] = {"image_intermediates": [one[0] for one in layers] if pairs else layers}
        if pairs:
            named["image_intermediates_prefix"] = [one[1] for one in layers]
        return named if features is None else {**named, "image_features": features}

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image and patch size; positions and patch embedding are resampled.

        Args:
            img_size: Image size in pixels.
            patch_size: Patch size in pixels.
        """
        stem, was = self.stem, self.stem.grid_size
        stem.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        stem.grid_size = stem.patch_embed.grid_size
        if stem.grid_size != was:
            positions = resample_abs_pos_embed(
                stem.pos_embed,
                new_size=list(stem.grid_size),
                old_size=list(was),
                num_prefix_tokens=self.num_prefix_tokens,
            )
            stem.pos_embed = nn.Parameter(positions.detach())


def _side(name: str, size: int | Sequence[int] | None) -> int | None:
    """Return the side of a square.

    Raises:
        UserError: If the size is not square.
    """
    if size is None or isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UserError(
            f"{name}: expected a square, got {tuple(size)}; other images are resized or resampled at run time"
        )
    return size[0]


def _pretrained_cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }


def _builder(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
        return build_model_with_cfg(TokenformerViT, name, pretrained, feature_cfg=features, preset=name, **kwargs)

    build.__name__, build.__module__ = name, __name__
    build.__doc__ = f"Create the preset ``{name}``."
    return register_model(build)


NAMES = [name for name in list_presets() if name.startswith("tokenformer_vit_")]
"""Registered models."""

default_cfgs = generate_default_cfgs({f"{name}.untrained": _pretrained_cfg() for name in NAMES})
for _name in NAMES:
    setattr(sys.modules[__name__], _name, _builder(_name))

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m lit_tokenformer.interop.timm SCRIPT [ARGUMENT ...]")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
