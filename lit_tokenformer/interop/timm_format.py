"""Weights of timm's plain vision transformers, in and out: ViT and DeiT without a distillation token.

A folder is what ``push_to_hf_hub`` and ``save_for_hf`` write: weights, and a ``config.json`` with the name of the
architecture and its arguments. timm builds the architecture on the meta device, and it is compared, module by module,
with the one that has our sizes, so that no option is overlooked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.interop.architectures import Architecture, check_lossless, fused, row
from lit_tokenformer.interop.weight_format import (
    CONFIG_FILE,
    WEIGHTS,
    ReadModel,
    WeightFormat,
    cast,
    check_export,
    check_plain,
    find_weights,
    read_json,
    write_json,
)
from lit_tokenformer.models import TokenformerConfig, preset_config
from lit_tokenformer.registry import WEIGHT_FORMATS
from lit_tokenformer.tensor_files import TensorFiles, write_tensors

VIT = Architecture(
    preset="vit_tiny_patch16_224",
    fields=(),
    classes=("classifier",),
    bare=("features",),
    rows=(
        row("cls_token", "stem.cls_token"),
        row("pos_embed", "stem.pos_embed"),
        row("patch_embed.proj.*", "stem.patch_embed.proj.*"),
        row("blocks.{i}.norm1.*", "blocks.{i}.norm1.*"),
        row("blocks.{i}.norm2.*", "blocks.{i}.norm2.*"),
        row("blocks.{i}.attn.qkv.*", "blocks.{i}.attn.query.* blocks.{i}.attn.key.* blocks.{i}.attn.value.*", fused()),
        row("blocks.{i}.attn.proj.*", "blocks.{i}.attn.proj.*"),
        row("blocks.{i}.mlp.fc1.*", "blocks.{i}.mlp.fc1.*"),
        row("blocks.{i}.mlp.fc2.*", "blocks.{i}.mlp.fc2.*"),
        row("norm.*", "norm.*"),
        row("head.*", "head.fc.*"),
    ),
)

EXPORTED = "vit_tiny_patch16_224"
"""Name of an exported architecture, whose sizes are arguments."""

ARGUMENTS = {
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "qkv_bias", "qk_norm", "proj_bias", "init_values", "class_token", "no_embed_class", "reg_tokens"),
    *("pre_norm", "final_norm", "fc_norm", "pool_include_prefix", "pos_embed", "dynamic_img_size", "act_layer"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
}
"""Arguments that a ``config.json`` may pass to timm; others may read files."""

_ACTIVATIONS = {
    "GELU(approximate='none')": "gelu",
    "GELU()": "gelu",
    "GELU(approximate='tanh')": "gelu_tanh",
    "GELUTanh()": "gelu_tanh",
}
_ACTIVATIONS |= {"SiLU()": "silu", "ReLU()": "relu"}
_IGNORED = {"training", "grad_checkpointing", "fused_attn", "p", "dynamic_img_size", "strict_img_size", "output_fmt"}
_IGNORED |= {"flatten", "weight_init_mode", "fix_init", "inplace", "drop_prob", "num_classes", "head_hidden_size"}


def read_timm(source: str | os.PathLike[str], config_json: str | os.PathLike[str] | None = None) -> ReadModel:
    """Load a vision transformer that timm wrote.

    Args:
        source: Folder, weights file or index of sharded weights; safetensors are preferred.
        config_json: Config of the architecture. Default: the ``config.json`` next to the weights.

    Raises:
        UserError: If a file cannot be read or contains pickled code, if the architecture is not a plain vision
            transformer, or if a tensor is missing, unexpected or misshapen.
    """
    weights = find_weights(source)
    path = Path(config_json) if config_json else weights.with_name(CONFIG_FILE)
    given = read_json(path)
    files = TensorFiles(weights, "source")
    try:
        theirs = _build(given, len(files.shapes))
        config = _config(theirs)
    except ValueError as error:
        raise UserError(f"config_json: {path}: {error}") from None
    try:
        settings = {"architectures": ["classifier" if theirs.num_classes else "features"]}
        state, notes = VIT.read_tensors(files, config, settings)
    except ValueError as error:
        raise UserError(f"source: {weights}: {str(error).removeprefix('source: ')}") from None
    return ReadModel(config, state, tuple(notes))


def _build(given: Mapping[str, Any], tensors: int) -> VisionTransformer:
    """Build timm's model of a ``config.json`` on the meta device.

    Raises:
        UserError: If it is unknown or not a plain vision transformer.
    """
    name, arguments = given.get("architecture"), given.get("model_args") or {}
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"architecture: unknown to timm (got {name!r})")
    if not isinstance(arguments, dict):
        raise UserError(f"model_args: expected keys and values, got {arguments!r}")
    for key in arguments:
        if key not in ARGUMENTS:
            raise UserError(f"model_args: {key}: unsupported (got {arguments[key]!r})")
    top = {"num_classes": given["num_classes"]} if "num_classes" in given else {}  # the rest is information
    if isinstance(arguments.get("depth", 1), int) and arguments.get("depth", 1) > tensors:
        raise UserError(f"model_args: depth: {arguments['depth']} blocks, but only {tensors} tensors")
    try:
        with torch.device("meta"):
            theirs = timm.create_model(name, pretrained=False, **{**top, **arguments})
    except Exception as error:  # of any kind, for invalid arguments
        raise UserError(f"model_args: timm cannot build {name} ({' '.join(str(error).split())})") from None
    if type(theirs) is not VisionTransformer:
        raise UserError(
            f"architecture: unsupported (got {name!r}, a {type(theirs).__name__}, expected a VisionTransformer)"
        )
    return theirs


def _config(theirs: Any) -> TokenformerConfig:
    """Derive our architecture from timm's.

    Raises:
        UserError: For a part of the model that ours does not have.
    """
    block: Any = theirs.blocks[0]
    embed: Any = theirs.patch_embed
    try:
        activation = _ACTIVATIONS.get(repr(block.mlp.act), repr(block.mlp.act))
        hidden, heads, eps = block.mlp.fc1.out_features, block.attn.num_heads, block.norm1.eps
        size, patch, channels = embed.img_size, embed.patch_size, embed.proj.in_channels
    except AttributeError as error:
        raise UserError(f"architecture: unsupported part ({error})") from None
    for name, pair in (("img_size", size), ("patch_size", patch)):
        if pair[0] != pair[1]:
            raise UserError(f"{name}: expected a square, got {pair[0]} x {pair[1]}")
    config = preset_config(
        VIT.preset,
        dim=theirs.embed_dim,
        depth=len(theirs.blocks),
        num_heads=heads,
        mlp_ratio=hidden / theirs.embed_dim,
        activation=activation,
        norm_eps=eps,
        image_size=size[0],
        patch_size=patch[0],
        in_chans=channels,
        num_classes=theirs.num_classes or 1000,  # a new head, if the model has none
        global_pool=theirs.global_pool,
        class_token=theirs.has_class_token,
    )
    with torch.device("meta"):
        twin: Any = timm.create_model(EXPORTED, pretrained=False, **_arguments(config))
        twin.reset_classifier(theirs.num_classes)
        for module in twin.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
    for difference in _differences(theirs, twin):
        raise UserError(f"architecture: unsupported: {difference}")
    return config


def _arguments(config: TokenformerConfig) -> dict[str, Any]:
    """Return timm's arguments for our architecture."""
    ratio = config.mlp_hidden / config.dim
    if int(config.dim * ratio) != config.mlp_hidden:  # timm rounds down
        ratio = math.nextafter(ratio, math.inf)
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
    }
    arguments |= {"num_classes": config.num_classes, "global_pool": config.global_pool, "embed_dim": config.dim}
    arguments |= {"depth": config.depth, "num_heads": config.num_heads, "mlp_ratio": ratio}
    arguments |= {"class_token": config.class_token, "act_layer": config.activation, "fc_norm": False}
    return arguments


def _differences(theirs: nn.Module, twin: nn.Module) -> Iterator[str]:
    """Yield a line for each module that differs in its type or in a plain attribute."""
    found, expected = dict(theirs.named_modules()), dict(twin.named_modules())
    for name in [*found, *(name for name in expected if name not in found)]:
        kinds = [type(one.get(name)).__name__ for one in (found, expected)]
        place = name or "model"
        if name.endswith(".act"):  # read from the first block
            continue
        if kinds[0] != kinds[1] and not all("Drop" in kind or kind == "Identity" for kind in kinds):
            yield f"{place} is a {kinds[0]}, expected {kinds[1]}"
        elif kinds[0] == kinds[1]:
            ours = _plain(expected[name])
            for key, value in _plain(found[name]).items():
                if ours.get(key) != value:
                    yield f"{place}: {key}: got {value!r}, expected {ours.get(key)!r}"


def _plain(module: nn.Module) -> dict[str, Any]:
    kinds = (int, float, str, bool, tuple, type(None))
    return {key: one for key, one in vars(module).items() if isinstance(one, kinds) and key not in _IGNORED}


def write_timm(
    folder: str | os.PathLike[str],
    config: TokenformerConfig,
    state: Mapping[str, Tensor],
    dtype: str | None = None,
    format: str = "safetensors",
) -> None:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

    Args:
        folder: Empty output folder.
        config: Architecture, at its current size.
        state: State dict of a :class:`~lit_tokenformer.models.Tokenformer` of this size.
        dtype: Precision of the weights: float32, float16 or bfloat16; ``None`` keeps that of ``state``.
        format: ``safetensors``, or ``bin`` for a pickled state dict.

    Raises:
        UserError: For an unknown ``dtype`` or ``format``, values that overflow ``dtype``, or a model that timm cannot
            express. Nothing is written then.
    """
    check_export(format, dtype)
    check_plain(state)
    try:
        if config.stem != "patch":
            raise UserError(f"stem {config.stem!r} (only 'patch')")
        with torch.device("meta"):
            back = _config(timm.create_model(EXPORTED, pretrained=False, **_arguments(config)))
    except Exception as error:  # of timm too, for sizes that it rejects
        raise UserError(f"config: timm has no {' '.join(str(error).split())}") from None
    check_lossless(config, back, "config: timm has no ")
    tensors = {name: cast(one, name, dtype) for name, one in VIT.write_tensors(config, state, {}).items()}
    size = [config.in_chans, config.image_size, config.image_size]
    content = {
        "architecture": EXPORTED,
        "num_classes": config.num_classes,
        "num_features": config.dim,
        "global_pool": config.global_pool,
        "model_args": _arguments(config),
        "pretrained_cfg": {
            **{"input_size": size, "fixed_input_size": True, "num_classes": config.num_classes, "custom_load": False},
            **{"first_conv": "patch_embed.proj", "classifier": "head"},
        },
    }
    write_tensors(tensors, Path(folder) / WEIGHTS[format])
    write_json(Path(folder) / CONFIG_FILE, content)


def write_image_data(folder: Path, image_data: Mapping[str, Any]) -> None:
    """Add the class names and the evaluation transform to the ``config.json`` of an export, by timm's names.

    Args:
        folder: Folder of an exported model.
        image_data: ``ImageDataModule.image_data``.
    """
    path = folder / CONFIG_FILE
    content = read_json(path)
    content["label_names"] = list(image_data["class_names"])
    content["pretrained_cfg"] |= {name: image_data[name] for name in ("mean", "std", "crop_pct")}
    content["pretrained_cfg"]["interpolation"] = "bicubic" if image_data["interpolation"] == "bicubic" else "bilinear"
    write_json(path, content)


WEIGHT_FORMATS.register("timm")(
    WeightFormat(
        find_weights,
        read_timm,
        write_timm,
        recognizes=lambda config: "architecture" in config,
        write_image_data=write_image_data,
    )
)
