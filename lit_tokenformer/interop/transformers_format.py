"""Weights of Hugging Face transformers, in and out; the library itself is not needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lit_tokenformer.data.images.transforms import pair
from lit_tokenformer.data.text.vocabulary import ROLES, USUAL_SEPARATORS, from_text
from lit_tokenformer.errors import UserError
from lit_tokenformer.interop import transformers_models  # noqa: F401  (registers the architectures)
from lit_tokenformer.interop.architectures import Architecture
from lit_tokenformer.interop.model_card import write_card
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
from lit_tokenformer.models import Tokenformer, TokenformerConfig
from lit_tokenformer.registry import TRANSFORMERS_MODELS, WEIGHT_FORMATS
from lit_tokenformer.tensor_files import TensorFiles, write_tensors


def read_transformers(source: str | os.PathLike[str], config_json: str | os.PathLike[str] | None = None) -> ReadModel:
    """Load a model that transformers wrote, one tensor at a time.

    Args:
        source: Folder, weights file or index of sharded weights; safetensors are preferred.
        config_json: Config of the architecture. Default: the ``config.json`` next to the weights.

    Raises:
        UserError: If a file cannot be read or contains pickled code, if the config has a setting that is unsupported
            here, or if a tensor is missing, unexpected or misshapen.
    """
    weights = find_weights(source)
    path = Path(config_json) if config_json else weights.with_name(CONFIG_FILE)
    given = read_json(path)
    if given.get("model_type") in OWN:
        return read_own(weights, given)
    try:
        if "auto_map" in given:
            raise UserError("auto_map: needs code of the repository, which is never run")
        architecture: Architecture = TRANSFORMERS_MODELS[str(given.get("model_type"))]
        config, settings = architecture.read_settings(given)
    except ValueError as error:
        raise UserError(f"config_json: {path}: {str(error).removeprefix('config_json: ')}") from None
    try:
        state, notes = architecture.read_tensors(TensorFiles(weights, "source"), config, settings)
    except ValueError as error:
        raise UserError(f"source: {weights}: {str(error).removeprefix('source: ')}") from None
    return ReadModel(config, state, tuple(notes))


def write_transformers(
    folder: str | os.PathLike[str],
    config: TokenformerConfig,
    state: Mapping[str, Tensor],
    dtype: str | None = None,
    format: str = "safetensors",
    architecture: str | None = None,
) -> None:
    """Write weights and ``config.json`` that ``AutoModel`` classes load.

    Args:
        folder: Empty output folder.
        config: Architecture, at its current size.
        state: State dict of a :class:`~lit_tokenformer.models.Tokenformer` of this size.
        dtype: Precision of the weights: float32, float16 or bfloat16; ``None`` keeps that of ``state``.
        format: ``safetensors``, or ``bin`` for a pickled state dict.
        architecture: ``model_type``; ``None`` for the first that can express ``config``, else TokenFormer's own
            class, whose code is written next to the weights (see ``interop.transformers``).

    Raises:
        UserError: For an unknown ``dtype`` or ``format``, values that overflow ``dtype``, or a model that no
            architecture can express. Nothing is written then.
    """
    check_export(format, dtype)
    check_plain(state)
    problems: dict[str, str] = {}
    for name in [architecture] if architecture is not None else TRANSFORMERS_MODELS.names():
        known: Architecture = TRANSFORMERS_MODELS[name]
        try:
            settings: dict[str, Any] = {"model_type": name} | known.write_settings(config)
            break
        except ValueError as error:
            problems[name] = str(error)
    else:
        nearest = min(problems, key=lambda name: TRANSFORMERS_MODELS[name].distance(config))
        try:
            if format != "safetensors":
                raise UserError(f"format: only 'safetensors' (got {format!r})")
            write_own(folder, config, state, dtype)
        except ValueError as error:
            raise UserError(
                f"config: no architecture of transformers fits; the nearest, {nearest}, {problems[nearest]}; as "
                f"TokenFormer: {error}"
            ) from None
        return
    converted = known.write_tensors(config, state, settings)
    first = next(iter(converted.values())).dtype  # sums of positions and segments are in float64
    converted = {name: one.to(first) if one.dtype == torch.float64 else one for name, one in converted.items()}
    tensors = {name: cast(tensor, name, dtype) for name, tensor in converted.items()}
    settings["architectures"] = [known.classes[0]]
    settings["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_tensors(tensors, Path(folder) / WEIGHTS[format])
    write_json(Path(folder) / CONFIG_FILE, settings)


OWN = ("tokenformer", "growing_tokenformer")
"""``model_type`` of TokenFormer's own classes."""


def write_own(
    folder: str | os.PathLike[str], config: TokenformerConfig, state: Mapping[str, Tensor], dtype: str | None
) -> None:
    """Write a model as TokenFormer's own class of transformers, with its code.

    Raises:
        UserError: If the class does not have its parts, or transformers is not installed.
    """
    from lit_tokenformer.interop.transformers import save_transformers  # needs transformers

    model = Tokenformer(config).to(state["norm.weight"].dtype)
    model.load_state_dict(dict(state))
    save_transformers(model, folder, dtype)


def read_own(weights: Path, given: Mapping[str, Any]) -> ReadModel:
    """Load a folder of TokenFormer's own class; its copy of the code is not run.

    Raises:
        UserError: If the weights do not fit the config, or transformers is not installed.
    """
    from lit_tokenformer.interop.transformers import load_transformers

    model = load_transformers(weights, given)
    return ReadModel(model.config, model.state_dict())


SPECIAL_TOKENS = {
    "bos_token": ("<|begin_of_text|>", "<s>", "[CLS]", *USUAL_SEPARATORS),
    "eos_token": USUAL_SEPARATORS,
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ROLES["mask"],
}
"""Roles of special tokens in ``tokenizer_config.json``, with their usual names in order of preference."""


def write_tokenizer(folder: Path, text: str) -> None:
    """Write ``tokenizer.json`` and what ``AutoTokenizer`` and ``generate`` need: special tokens and their ids.

    Args:
        folder: Folder of an exported model.
        text: Content of the ``tokenizer.json``.
    """
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    vocabulary = from_text(text, "tokenizer.json").get_vocab(with_added_tokens=True)
    usual = {role: next((name for name in names if name in vocabulary), None) for role, names in SPECIAL_TOKENS.items()}
    special = {role: name for role, name in usual.items() if name is not None}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    ids = {f"{role}_id": vocabulary[special[role]] for role in ("bos_token", "eos_token") if role in special}
    write_json(folder / CONFIG_FILE, {**read_json(folder / CONFIG_FILE), **ids})


def write_image_data(folder: Path, image_data: Mapping[str, Any]) -> None:
    """Write the class names to ``config.json``, and the evaluation transform as the config of an image processor.

    Args:
        folder: Folder of an exported model.
        image_data: ``ImageDataModule.image_data``.
    """
    names = dict(enumerate(image_data["class_names"]))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    write_json(folder / CONFIG_FILE, {**read_json(folder / CONFIG_FILE), **labels})
    height, width = pair(image_data["image_size"])
    processor = {
        "image_processor_type": "CLIPImageProcessor",  # shorter side and center crop, which that of ViT does not have
        "do_convert_rgb": image_data["in_chans"] == 3,
        "do_resize": True,
        "size": {"shortest_edge": int(min(height, width) / (image_data["crop_pct"] or 1.0))},
        "resample": Image.Resampling.BICUBIC if image_data["interpolation"] == "bicubic" else Image.Resampling.BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image_data["mean"],
        "image_std": image_data["std"],
    }
    write_json(folder / "preprocessor_config.json", processor)


WEIGHT_FORMATS.register("transformers")(
    WeightFormat(
        find_weights,
        read_transformers,
        write_transformers,
        recognizes=lambda config: "model_type" in config,
        write_tokenizer=write_tokenizer,
        architectures=TRANSFORMERS_MODELS,
        write_image_data=write_image_data,
        write_card=write_card,
    )
)
