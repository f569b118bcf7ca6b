"""Named architectures: rows of numbers and part names, nothing else.

Sizes of the vision models: arXiv 2410.23168, Table 9 (with the misprinted feed-forward of Large-matched read as
3072, the only reading that gives the published 304 M). The Small and Tiny rows follow DeiT's widths and depths.
Sizes of the language models: appendix F (Pile), appendix D (``owt``: the growth ladder on OpenWebText) and the
published configs (``owt2``: the pair on OpenWebText2). Names hold the size as published, and so ``owt_1_4b`` has
1,309,705,728 parameters.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Optional, get_type_hints

from lit_tokenformer.errors import unknown_name
from lit_tokenformer.models.backbone import Tokenformer
from lit_tokenformer.models.config import TokenformerConfig

_TINY = {"dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"dim": 1024, "depth": 24, "num_heads": 16}
_VIT = {"projection": "linear", "feed_forward": "mlp", "bias": True, "norm_affine": True, "norm_eps": 1e-6}
_LM = {"stem": "token", "head": "language", "positions": "rotary", "causal": True}
_PILE = {**_LM, "context_length": 2048}
_OWT = {**_LM, **_BASE}
_OWT2 = {**_LM, **_LARGE}

PRESETS: dict[str, dict[str, Any]] = {
    "tokenformer_vit_tiny_patch16_224": {**_TINY, "param_tokens": 192},
    "tokenformer_vit_small_patch16_224": {**_SMALL, "param_tokens": 384},
    "tokenformer_vit_base_matched_patch16_224": {**_BASE, "param_tokens": 576},
    "tokenformer_vit_base_patch16_224": {**_BASE, "param_tokens": 768},
    "tokenformer_vit_large_matched_patch16_224": {**_LARGE, "param_tokens": 768},
    "tokenformer_vit_large_patch16_224": {**_LARGE, "param_tokens": 1024},
    "tokenformer_lm_tiny": {**_LM, "dim": 128, "depth": 4, "num_heads": 4, "param_tokens": 128},
    "tokenformer_lm_small": {**_LM, "dim": 192, "depth": 4, "num_heads": 6, "param_tokens": 192},
    "tokenformer_150m": {**_PILE, **_BASE, "param_tokens": 768},
    "tokenformer_450m": {**_PILE, **_LARGE, "param_tokens": 1024},
    "tokenformer_900m": {**_PILE, "dim": 1280, "depth": 32, "num_heads": 16, "param_tokens": 1280},
    "tokenformer_1_5b": {**_PILE, "dim": 1536, "depth": 40, "num_heads": 16, "param_tokens": 1536},
    "tokenformer_owt_124m": {**_OWT, "param_tokens": 576},
    "tokenformer_owt_354m": {**_OWT, "param_tokens": 2140},
    "tokenformer_owt_757m": {**_OWT, "param_tokens": 4850},
    "tokenformer_owt_1_4b": {**_OWT, "param_tokens": 8620},
    "tokenformer_owt2_354m": {**_OWT2, "param_tokens": 768},
    "tokenformer_owt2_757m": {**_OWT2, "param_tokens": 1792},
    "vit_tiny_patch16_224": {**_TINY, **_VIT},
    "vit_small_patch16_224": {**_SMALL, **_VIT},
    "vit_base_patch16_224": {**_BASE, **_VIT},
    "vit_large_patch16_224": {**_LARGE, **_VIT},
}

if TYPE_CHECKING:
    BackboneOverrides = TokenformerConfig
else:  # the fields of the config, each optional, so that every one is an option of the command line
    BackboneOverrides = dataclasses.make_dataclass(
        "BackboneOverrides",
        [(name, Optional[kind], None) for name, kind in get_type_hints(TokenformerConfig).items()],  # noqa: UP045
        namespace={"__doc__": TokenformerConfig.__doc__},
        frozen=True,
    )
    BackboneOverrides.__module__ = __name__


def list_presets() -> list[str]:
    """The names that :func:`create_backbone` takes.

    Example:
        >>> "tokenformer_vit_small_patch16_224" in list_presets()
        True
    """
    return sorted(PRESETS)


def preset_config(name: str, **overrides: Any) -> TokenformerConfig:
    """The config of a preset, with some of its fields replaced.

    Args:
        name: One of :func:`list_presets`.
        overrides: Fields of :class:`TokenformerConfig`; ``None`` keeps the preset's value.

    Raises:
        ValueError: For an unknown preset or field (the nearest right one is named), or fields that do not fit.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    known = [field.name for field in dataclasses.fields(TokenformerConfig)]
    for key in overrides:
        if key not in known:
            raise unknown_name("overrides", key, known)
    given = {key: value for key, value in overrides.items() if value is not None}
    return TokenformerConfig(**{**PRESETS[name], **given})


def create_backbone(name: str, **overrides: Any) -> Tokenformer:
    """A model with fresh weights.

    Args:
        name: One of :func:`list_presets`.
        overrides: Fields of :class:`TokenformerConfig` that replace the preset's.

    Returns:
        The model, weights drawn from torch's global generator.

    Raises:
        ValueError: As :func:`preset_config`.

    Example:
        >>> import torch
        >>> model = create_backbone("tokenformer_vit_tiny_patch16_224", depth=2, image_size=32, num_classes=10)
        >>> model(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return Tokenformer(preset_config(name, **overrides))
