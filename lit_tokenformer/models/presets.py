"""Model presets: one row of sizes and part names per architecture.

Sizes of the vision models: arXiv 2410.23168, Table 9 (with the misprinted feed-forward of Large-matched read as 3072,
the only reading that reproduces the published 304 M). The Small and Tiny rows follow DeiT's widths and depths. Sizes of
the language models: appendix F (Pile), appendix D (``owt``: the growth ladder on OpenWebText) and the published configs
(``owt2``: the pair on OpenWebText2). Names carry the published size; ``owt_1_4b`` has 1,309,705,728 parameters.

Baselines: ``transformer`` (TokenFormer with linear projections), GPT-2 (Radford et al. 2019), Pythia (arXiv
2304.01373), BERT (arXiv 1810.04805), RoBERTa (arXiv 1907.11692), MosaicBERT (arXiv 2312.17482), RWKV-4 (arXiv
2305.13048), LLaMA (arXiv 2302.13971) and PanGu-pi (arXiv 2312.17276; its hidden width is not published and follows
LLaMA's, 8/3). Segment embeddings of the BERT family and RoBERTa's two padding positions are omitted. Each family has a
``tiny`` and a ``small`` row with the sizes of ``tokenformer_lm_tiny`` and ``tokenformer_lm_small``. ``tokenformer_mlm``
is TokenFormer for masked language modeling. ``hybrid`` is RWKV-4 with attention in every third of six blocks and
without position encoding, since the recurrence encodes order (as in Jamba, arXiv 2403.19887, section 6.6).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Optional, get_type_hints

from lit_tokenformer.errors import unknown_name
from lit_tokenformer.models.backbone import Tokenformer
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.registry import PRESETS

_TINY = {"dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"dim": 1024, "depth": 24, "num_heads": 16}
_VIT = {"projection": "linear", "feed_forward": "mlp", "bias": True, "norm_affine": True, "norm_eps": 1e-6}
_LM = {"stem": "token", "head": "language", "positions": "rotary", "causal": True}
_MLM = {"stem": "token", "head": "masked_language"}
_LINEAR = {"projection": "linear", "feed_forward": "mlp"}
_AFFINE = {"bias": True, "norm_affine": True}

_FAMILIES: dict[str, dict[str, Any]] = {
    "tokenformer_lm": _LM,
    "tokenformer_mlm": {**_MLM, "positions": "rotary"},
    "transformer": {**_LM, **_LINEAR, "init": "neox"},
    "gpt2": {**_LM, **_LINEAR, **_AFFINE, "positions": "learned", "activation": "gelu_tanh", "init": "gpt2"},
    "pythia": {**_LM, **_LINEAR, **_AFFINE, "norm_position": "parallel", "tie_embeddings": False, "init": "neox"},
    "rwkv4": {
        **_LM,
        "projection": "linear",
        "mixer": "wkv",
        "feed_forward": "channel_mix",
        "positions": "none",
        "norm_affine": True,
        "stem_norm": True,
        "tie_embeddings": False,
        "init": "rwkv",
    },
    "pangu_pi": {
        **_LM,
        "projection": "linear",
        "feed_forward": "glu",
        "mlp_ratio": 8 / 3,
        "activation": "silu",
        "series": 2,
        "shortcut_reduction": 32,
        "rotary_fraction": 1.0,
        "norm": "rms_norm",
        "norm_affine": True,
        "norm_eps": 1e-6,
        "tie_embeddings": False,
        "init": "normal",
    },
    "bert": {
        **_MLM,
        **_LINEAR,
        **_AFFINE,
        "positions": "learned",
        "norm_position": "post",
        "norm_eps": 1e-12,
        "stem_norm": True,
        "init": "normal",
        "dropout": 0.1,
        "attn_dropout": 0.1,
    },
}
_FAMILIES["llama"] = {**_FAMILIES["pangu_pi"], "series": 1, "shortcut_reduction": 0}
_HYBRID = {**_FAMILIES["rwkv4"], "layers": ("wkv", "wkv", "attention+mlp")}
_FAMILIES["roberta"] = {**_FAMILIES["bert"], "norm_eps": 1e-5}
_FAMILIES["mosaic_bert"] = {
    **_FAMILIES["bert"],
    "feed_forward": "glu",
    "positions": "alibi",
    "attn_dropout": 0.0,
    "unpad": True,
}
_SIZES = {
    "tiny": {"dim": 128, "depth": 4, "num_heads": 4, "param_tokens": 128},
    "small": {"dim": 192, "depth": 4, "num_heads": 6, "param_tokens": 192},
}
_PILE = {**_LM, "context_length": 2048}
_OWT = {**_LM, **_BASE}
_OWT2 = {**_LM, **_LARGE}

_ROWS: dict[str, dict[str, Any]] = {
    "tokenformer_vit_tiny_patch16_224": {**_TINY, "param_tokens": 192},
    "tokenformer_vit_small_patch16_224": {**_SMALL, "param_tokens": 384},
    "tokenformer_vit_base_matched_patch16_224": {**_BASE, "param_tokens": 576},
    "tokenformer_vit_base_patch16_224": {**_BASE, "param_tokens": 768},
    "tokenformer_vit_large_matched_patch16_224": {**_LARGE, "param_tokens": 768},
    "tokenformer_vit_large_patch16_224": {**_LARGE, "param_tokens": 1024},
    **{f"{family}_{size}": {**_FAMILIES[family], **_SIZES[size]} for family in _FAMILIES for size in _SIZES},
    "hybrid_tiny": {**_HYBRID, **_SIZES["tiny"], "depth": 6},
    "hybrid_small": {**_HYBRID, **_SIZES["small"], "depth": 6},
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
    "transformer_124m": {**_FAMILIES["transformer"], **_BASE, "context_length": 2048},
    "gpt2_124m": {**_FAMILIES["gpt2"], **_BASE, "vocab_size": 50257, "dropout": 0.1, "attn_dropout": 0.1},
    "pythia_160m": {**_FAMILIES["pythia"], **_BASE, "context_length": 2048},
    "rwkv4_169m": {**_FAMILIES["rwkv4"], **_BASE, "vocab_size": 50277},
    "rwkv4_430m": {**_FAMILIES["rwkv4"], **_LARGE, "vocab_size": 50277},
    "pangu_pi_1b": {
        **_FAMILIES["pangu_pi"],
        **{"dim": 2048, "depth": 12, "num_heads": 16, "vocab_size": 100883, "context_length": 2048},
    },
    "bert_base": {**_FAMILIES["bert"], **_BASE, "vocab_size": 30522, "context_length": 512},
    "roberta_base": {**_FAMILIES["roberta"], **_BASE, "vocab_size": 50265, "context_length": 512},
    "mosaic_bert_base": {**_FAMILIES["mosaic_bert"], **_BASE, "vocab_size": 30528, "context_length": 512},
    "vit_tiny_patch16_224": {**_TINY, **_VIT},
    "vit_small_patch16_224": {**_SMALL, **_VIT},
    "vit_base_patch16_224": {**_BASE, **_VIT},
    "vit_large_patch16_224": {**_LARGE, **_VIT},
}

for _name, _row in _ROWS.items():
    PRESETS.register(_name)(_row)

if TYPE_CHECKING:
    BackboneOverrides = TokenformerConfig
else:  # every field of the config, optional, so that each is a command-line option
    BackboneOverrides = dataclasses.make_dataclass(
        "BackboneOverrides",
        [(name, Optional[kind], None) for name, kind in get_type_hints(TokenformerConfig).items()],  # noqa: UP045
        namespace={"__doc__": TokenformerConfig.__doc__},
        frozen=True,
    )
    BackboneOverrides.__module__ = __name__


def list_presets() -> list[str]:
    """List the names of all presets.

    Example:
        >>> "tokenformer_vit_small_patch16_224" in list_presets()
        True
    """
    return PRESETS.names()


def preset_config(name: str, **overrides: Any) -> TokenformerConfig:
    """Build the config of a preset.

    Args:
        name: Preset name, see :func:`list_presets`.
        overrides: Fields of :class:`TokenformerConfig` to replace; ``None`` keeps the preset's value.

    Raises:
        UserError: If the preset or a field is unknown, or the fields are invalid together.
    """
    preset = PRESETS[name]
    known = [field.name for field in dataclasses.fields(TokenformerConfig)]
    for key in overrides:
        if key not in known:
            raise unknown_name("overrides", key, known)
    given = {key: value for key, value in overrides.items() if value is not None}
    return TokenformerConfig(**{**preset, **given})


def create_backbone(name: str, **overrides: Any) -> Tokenformer:
    """Create a model with freshly initialized weights.

    Args:
        name: Preset name, see :func:`list_presets`.
        overrides: Fields of :class:`TokenformerConfig` to replace.

    Returns:
        Model, initialized from torch's global random state.

    Raises:
        UserError: See :func:`preset_config`.

    Example:
        >>> import torch
        >>> model = create_backbone("tokenformer_vit_tiny_patch16_224", depth=2, image_size=32, num_classes=10)
        >>> model(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return Tokenformer(preset_config(name, **overrides))
