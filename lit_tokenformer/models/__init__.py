"""Architectures in plain torch and timm layers, without losses, logging or Lightning."""

from lit_tokenformer.models.axes import Axis, AxisTensor, input_units, output_units
from lit_tokenformer.models.backbone import Tokenformer, model_size, param_tokens
from lit_tokenformer.models.config import ParamTokens, TokenformerConfig, Tokens
from lit_tokenformer.models.image_text import ImageTextStem  # registers the stem
from lit_tokenformer.models.linear_form import as_linear, as_pattention
from lit_tokenformer.models.pattention import SCORE_NORMS, SERIES_STD, Pattention, pattention
from lit_tokenformer.models.presets import BackboneOverrides, create_backbone, list_presets, preset_config

__all__ = [
    "SCORE_NORMS",
    "SERIES_STD",
    "Axis",
    "AxisTensor",
    "BackboneOverrides",
    "ImageTextStem",
    "ParamTokens",
    "Pattention",
    "Tokenformer",
    "TokenformerConfig",
    "Tokens",
    "as_linear",
    "as_pattention",
    "create_backbone",
    "input_units",
    "list_presets",
    "model_size",
    "output_units",
    "param_tokens",
    "pattention",
    "preset_config",
]
