"""Import and export of published TokenFormer checkpoints: ``pytorch_model.bin`` or ``.safetensors``, ``config.json``.

Source: github.com/Haiyang-W/TokenFormer. Its models are GPT-NeoX pipelines flattened by DeepSpeed: tensors have the
names of ``SequentialWrapper.sequential`` (``megatron/model/gpt2_model.py``), and ``config.json`` has the keys of the
NeoX configs. The table ``TENSORS`` maps names in both directions, as does ``SETTINGS`` for the configs.

The format has no tau: it is always sqrt(N). Here tau is a buffer and may differ, for example after growth by
``zero_keys``; such a model is not representable in the format and is rejected.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.interop.weight_format import (
    CONFIG_FILE,
    WEIGHTS,
    WeightFormat,
    cast,
    check_export,
    check_plain,
    find_weights,
    read_json,
    write_json,
)
from lit_tokenformer.models import ParamTokens, Tokenformer, TokenformerConfig
from lit_tokenformer.models.config import OF_EXPERTS
from lit_tokenformer.registry import WEIGHT_FORMATS
from lit_tokenformer.tensor_files import read_tensors, write_tensors


class Row(NamedTuple):
    """Tensor of the published format.

    Args:
        published: Published name; block i is layer i + 2 of the pipeline, followed by norm and head.
        ours: Name in a :class:`Tokenformer`.
        shape: Shape, in keys of ``config.json``.
    """

    published: str
    ours: str
    shape: tuple[str, ...]


_WORDS = ("vocab_size", "hidden_size")
_QKV = ("qkv_slot_num", "hidden_size")
_PROJ = ("proj_slot_num", "hidden_size")
_FFN = ("ffn_slot_num", "hidden_size")
_NORM = ("hidden_size",)

TENSORS = (
    Row("sequential.0.word_embeddings.weight", "stem.embedding.weight", _WORDS),
    Row("sequential.{layer}.attention.query.key_param_tokens", "blocks.{block}.attn.query.key_tokens", _QKV),
    Row("sequential.{layer}.attention.query.value_param_tokens", "blocks.{block}.attn.query.value_tokens", _QKV),
    Row("sequential.{layer}.attention.key.key_param_tokens", "blocks.{block}.attn.key.key_tokens", _QKV),
    Row("sequential.{layer}.attention.key.value_param_tokens", "blocks.{block}.attn.key.value_tokens", _QKV),
    Row("sequential.{layer}.attention.value.key_param_tokens", "blocks.{block}.attn.value.key_tokens", _QKV),
    Row("sequential.{layer}.attention.value.value_param_tokens", "blocks.{block}.attn.value.value_tokens", _QKV),
    Row("sequential.{layer}.attention.proj.key_param_tokens", "blocks.{block}.attn.proj.key_tokens", _PROJ),
    Row("sequential.{layer}.attention.proj.value_param_tokens", "blocks.{block}.attn.proj.value_tokens", _PROJ),
    Row("sequential.{layer}.mlp.key_param_tokens", "blocks.{block}.mlp.key_tokens", _FFN),
    Row("sequential.{layer}.mlp.value_param_tokens", "blocks.{block}.mlp.value_tokens", _FFN),
    Row("sequential.{norm}.norm.weight", "norm.weight", _NORM),
    Row("sequential.{norm}.norm.bias", "norm.bias", _NORM),
    Row("sequential.{head}.final_linear.weight", "head.weight", _WORDS),  # only without tied embeddings
)

SETTINGS = {
    "num_layers": "depth",
    "hidden_size": "dim",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "seq_length": "context_length",
    "rotary_pct": "rotary_fraction",
    "rotary_emb_base": "rotary_base",
    "layernorm_epsilon": "norm_eps",
}
"""Keys of ``config.json`` and the equivalent fields of :class:`TokenformerConfig`."""

SLOTS = {"qkv_slot_num": "qkv", "proj_slot_num": "proj", "ffn_slot_num": "ffn"}
"""Keys of ``config.json`` for the number of parameter tokens, and the kinds of projection."""

SCORE_NORMS = {"l2_norm_gelu": "l2_gelu", "gelu_l2_norm": "gelu_l2", "softmax": "softmax"}
"""Names of the score normalizations, published and ours."""

DEFAULTS: dict[str, Any] = {
    "rotary_emb_base": 10000,
    "layernorm_epsilon": 1e-5,
    "no_weight_tying": False,
    "norm_activation_type": "l2_norm_gelu",
}
"""Defaults of ``config.json``, as in the NeoX arguments. ``rotary_pct`` is required: no published model has the NeoX
default."""

FIXED = {
    "pos_emb": "rotary",
    "norm": "layernorm_nonparam",
    "final_norm": "layernorm",
    "gpt_j_residual": False,
    "apply_query_key_layer_scaling": False,
    "use_mup": False,
}
"""Settings shared by all published models; other values are unsupported architectures."""

_FIXED_PARTS: dict[str, Any] = {"stem": "token", "head": "language", "positions": "rotary", "causal": True}
_FREE = ("param_tokens", "drop_path", *OF_EXPERTS)  # the first changes with growth, the second is used in training only


def read_published(
    source: str | os.PathLike[str], config_json: str | os.PathLike[str] | None = None
) -> tuple[TokenformerConfig, dict[str, Tensor]]:
    """Load the architecture and the weights of a published checkpoint.

    Args:
        source: ``pytorch_model.bin``, a ``.safetensors`` file, or a folder with one of them.
        config_json: Config of the architecture. Default: the ``config.json`` next to the weights.

    Returns:
        Config, and a state dict that a :class:`Tokenformer` of this config loads strictly. Tensors keep the precision
        of the file; tau, absent from the format, is sqrt(N) in float64.

    Raises:
        ValueError: If a file cannot be read or contains pickled code, if the config has another architecture, or if a
            tensor is missing, unexpected or of a shape that does not match the config.
    """
    weights = _find(source)
    settings = _read_settings(Path(config_json) if config_json else weights.with_name(CONFIG_FILE))
    tensors = read_tensors(weights, "source")
    embedding = tensors.get(TENSORS[0].published)
    rows = 1 if embedding is None or embedding.ndim == 0 else embedding.shape[0]
    settings["vocab_size"] = _vocab_size(settings, rows)
    names = {row.published: row.ours for row in _rows(settings)}
    for problem in _problems(tensors, {row.published: row for row in _rows(settings)}, settings):
        raise UserError(f"source: {weights}: {problem}")
    try:
        config = _config(settings)
    except ValueError as error:
        raise UserError(f"config_json: {error}") from None
    state = {names[name]: tensor for name, tensor in tensors.items()}
    if config.tie_embeddings:
        state["head.weight"] = state["stem.embedding.weight"]
    for name in [name for name in state if name.endswith(".key_tokens")]:
        root = math.sqrt(state[name].shape[0])
        state[name.replace(".key_tokens", ".tau")] = torch.tensor(root, dtype=torch.float64)
    return config, state


def load_published(source: str | os.PathLike[str], config_json: str | os.PathLike[str] | None = None) -> Tokenformer:
    """Load a model with published weights, in torch's default dtype.

    Args:
        source: As in :func:`read_published`.
        config_json: As in :func:`read_published`.

    Returns:
        Model, token ids (B, T) -> logits (B, T, V).

    Raises:
        ValueError: As :func:`read_published`.
    """
    config, state = read_published(source, config_json)
    model = Tokenformer(config)
    model.load_state_dict(state)
    return model


def write_published(
    folder: str | os.PathLike[str],
    config: TokenformerConfig,
    state: Mapping[str, Tensor],
    dtype: str | None = None,
    format: str = "safetensors",
) -> None:
    """Write weights and ``config.json`` in the published format.

    Args:
        folder: Empty output folder.
        config: Initial architecture, before growth.
        state: State dict of a :class:`Tokenformer` of this config, grown or not.
        dtype: Precision of the weights: float32, float16 or bfloat16; ``None`` keeps that of ``state``.
        format: ``safetensors``, or ``bin`` for a pickled state dict.

    Raises:
        ValueError: For an unknown ``dtype`` or ``format``, values that overflow ``dtype``, an architecture that is not
            representable in the format, or a tau other than sqrt(N). Nothing is written then.
    """
    check_export(format, dtype)
    check_plain(state)
    settings = _settings(config, state)
    taus = {name: tensor for name, tensor in state.items() if name.endswith(".tau")}
    for name, tau in taus.items():
        count = state[name.replace(".tau", ".key_tokens")].shape[0]
        if not math.isclose(tau.item(), math.sqrt(count), rel_tol=1e-6):
            raise UserError(
                f"state: tau of {name.removesuffix('.tau')} is {tau.item():.6g}, and the published format has only "
                f"sqrt({count}) = {math.sqrt(count):.6g}; zero_keys growth keeps tau: grow by an integer factor with "
                "method split, or anneal tau in a fit with tau_steps of ParameterGrowthCallback; or use format "
                "'lit_tokenformer'"
            )
    rows = {row.ours: row for row in _rows(settings)}
    skipped = {*taus, "head.weight"} if config.tie_embeddings else set(taus)
    own = {name: tensor for name, tensor in state.items() if name not in skipped}
    for problem in _problems(own, rows, settings):
        raise UserError(f"state: {problem}")
    tensors = {row.published: cast(own[name], name, dtype) for name, row in rows.items()}
    settings["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_tensors(tensors, Path(folder) / WEIGHTS[format])
    write_json(Path(folder) / CONFIG_FILE, settings)


def _rows(settings: Mapping[str, Any]) -> Iterator[Row]:
    """Expand the table for a model of this size: a row per tensor, with layer numbers."""
    depth = settings["num_layers"]
    for row in TENSORS:
        if "{head}" in row.published and not settings["no_weight_tying"]:
            continue
        for block in range(depth if "{layer}" in row.published else 1):
            published = row.published.format(layer=block + 2, norm=depth + 3, head=depth + 4)
            yield Row(published, row.ours.format(block=block), row.shape)


def _problems(found: Mapping[str, Tensor], rows: Mapping[str, Row], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each tensor that is missing, unexpected or of another shape than its row of the table."""
    for name, row in rows.items():
        expected = tuple(settings[key] for key in row.shape)
        wanted = f"expected {expected}, which is ({', '.join(row.shape)})"
        if name not in found:
            yield f"{name} is missing, {wanted}"
        elif tuple(found[name].shape) != expected:
            yield f"{name} has shape {tuple(found[name].shape)}, {wanted}"
    for name in found:
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            yield f"{name} is not one of the {len(rows)} tensors of a model with {settings['num_layers']} layers{hint}"


def _read_settings(path: Path) -> dict[str, Any]:
    """Load a ``config.json``, with defaults filled in and required keys validated."""
    given = read_json(path)
    settings = {key.replace("-", "_"): value for key, value in given.items() if value is not None}
    if "max_position_embeddings" in settings:
        settings.setdefault("seq_length", settings["max_position_embeddings"])
    settings = {**DEFAULTS, **settings}
    for key in [*SETTINGS, *SLOTS]:
        if key not in settings and key != "vocab_size":
            raise UserError(f"config_json: {path} has no {key}")
    real = ("rotary_pct", "rotary_emb_base", "layernorm_epsilon")
    for key in [*SETTINGS, *SLOTS, "padded_vocab_size", "make_vocab_size_divisible_by"]:
        value = settings.get(key, 1)
        if key in real and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"config_json: {path}: {key}: expected a number, got {value!r}")
        if key not in real and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"config_json: {path}: {key}: expected a whole number of at least 1, got {value!r}")
    for key, value in {**FIXED, "no_weight_tying": settings["no_weight_tying"] is True}.items():
        if settings.get(key, value) != value:
            raise UserError(f"config_json: {path}: {key}: expected {value!r}, got {settings[key]!r}")
    if settings["norm_activation_type"] not in SCORE_NORMS:
        raise unknown_name(f"config_json: {path}: norm_activation_type", settings["norm_activation_type"], SCORE_NORMS)
    return settings


def _vocab_size(settings: Mapping[str, Any], rows: int) -> int:
    """Return the number of embedding rows: NeoX pads the vocabulary and may store either size."""
    if "padded_vocab_size" in settings:
        return settings["padded_vocab_size"]
    stored = settings.get("vocab_size", rows)
    multiple = settings.get("make_vocab_size_divisible_by", 128)
    padded = -(-stored // multiple) * multiple
    return padded if rows == padded else stored


def _config(settings: Mapping[str, Any]) -> TokenformerConfig:
    """Build the architecture of a complete ``config.json``."""
    tokens = ParamTokens(**{kind: settings[key] for key, kind in SLOTS.items()})
    usual = tokens == ParamTokens.parse(tokens.qkv)
    return TokenformerConfig(
        **{field: settings[key] for key, field in SETTINGS.items()},
        **_FIXED_PARTS,
        param_tokens=tokens.qkv if usual else dict(tokens.items()),
        score_norm=SCORE_NORMS[settings["norm_activation_type"]],
        tie_embeddings=not settings["no_weight_tying"],
    )


def _settings(config: TokenformerConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Build the ``config.json`` of a model; settings lost in a round trip are rejected."""
    activations = {ours: theirs for theirs, ours in SCORE_NORMS.items()}
    slots = dict(config.tokens.items())
    for row in TENSORS:
        tokens = state.get(row.ours.format(block=0))
        if tokens is not None and row.shape[0] in SLOTS:
            slots[SLOTS[row.shape[0]]] = tokens.shape[0]
    settings = {
        "architectures": ["TokenFormerForCausalLM"],
        **{key: getattr(config, field) for key, field in SETTINGS.items()},
        "max_position_embeddings": config.context_length,
        **{key: slots[kind] for key, kind in SLOTS.items()},
        "attention_config": [[["tokenformer"], config.depth]],
        "norm_activation_type": activations.get(config.score_norm, DEFAULTS["norm_activation_type"]),
        "no_weight_tying": not config.tie_embeddings,
        **FIXED,
    }
    if float(config.rotary_base).is_integer():  # an integer in the format
        settings["rotary_emb_base"] = int(config.rotary_base)
    back = _config(settings)
    names = [field.name for field in dataclasses.fields(config) if field.name not in _FREE]
    lost = [name for name in names if getattr(config, name) != getattr(back, name)]
    if lost:
        listed = ", ".join(f"{name} {getattr(config, name)!r} (only {getattr(back, name)!r})" for name in lost)
        raise UserError(f"config: the published format has no {listed}; format 'lit_tokenformer' has")
    return settings


def _find(source: str | os.PathLike[str]) -> Path:
    return find_weights(source, sharded=False)


def _recognizes(config: Mapping[str, Any]) -> bool:
    return bool({*SLOTS, *(key.replace("_", "-") for key in SLOTS)} & config.keys())


WEIGHT_FORMATS.register("tokenformer")(WeightFormat(_find, read_published, write_published, _recognizes))
