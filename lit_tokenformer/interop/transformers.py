"""TokenFormer as models of transformers: registered with its Auto classes, and converted in both directions.

After ``import lit_tokenformer.interop.transformers``, ``AutoModelForCausalLM`` and the others load exported folders
without ``trust_remote_code``. transformers has no entry point for plugins, so the import is needed.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.interop.architectures import UNUSED_BY_STEM
from lit_tokenformer.interop.model_card import CARD_FILE, write_card
from lit_tokenformer.interop.transformers_format import read_transformers, write_transformers
from lit_tokenformer.interop.weight_format import cast, check_plain
from lit_tokenformer.models import Tokenformer, preset_config
from lit_tokenformer.models import TokenformerConfig as Architecture
from lit_tokenformer.tensor_files import TensorFiles

try:
    import transformers

    from lit_tokenformer.interop import growing_models
    from lit_tokenformer.interop import modeling_tokenformer as modeling
    from lit_tokenformer.interop.growing_models import (
        GrowingTokenformerConfig,
        GrowingTokenformerForCausalLM,
        GrowingTokenformerForImageClassification,
        GrowingTokenformerForMaskedLM,
        GrowingTokenformerPreTrainedModel,
        current_architecture,
        named_fields,
        named_settings,
    )
    from lit_tokenformer.interop.modeling_tokenformer import (
        TokenformerConfig,
        TokenformerForCausalLM,
        TokenformerForImageClassification,
        TokenformerForMaskedLM,
    )
except ImportError as error:
    raise UserError(f"transformers: required for this format (pip install 'lit-tokenformer[hf]'): {error}") from error

__all__ = [
    "GrowingTokenformerConfig",
    "GrowingTokenformerForCausalLM",
    "GrowingTokenformerForImageClassification",
    "GrowingTokenformerForMaskedLM",
    "TokenformerConfig",
    "TokenformerForCausalLM",
    "TokenformerForImageClassification",
    "TokenformerForMaskedLM",
    "from_transformers",
    "load_transformers",
    "read_transformers",
    "save_transformers",
    "to_transformers",
    "write_transformers",
]

MODELS = {
    "language": ("tokenformer_lm_tiny", TokenformerForCausalLM, "AutoModelForCausalLM"),
    "masked_language": ("tokenformer_mlm_tiny", TokenformerForMaskedLM, "AutoModelForMaskedLM"),
    "image": (
        "tokenformer_vit_tiny_patch16_224",
        TokenformerForImageClassification,
        "AutoModelForImageClassification",
    ),
}
"""By head: a preset of the architecture, the class of transformers, and its Auto class."""

TRAINING = {"init", "drop_path", "patch_drop_rate", "unpad", "low_precision_norm"}
"""Fields that do not change the function in evaluation."""

_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "proj": "o_proj"}

NAMES = (
    (r"^stem\.embedding\.", "model.embed_tokens."),
    (r"^stem\.patch_embed\.proj\.", "model.embeddings.projection."),
    (r"^stem\.cls_token$", "model.embeddings.cls_token"),
    (r"^stem\.pos_embed$", "model.embeddings.position_embeddings"),
    (r"^blocks\.(\d+)\.attn\.(query|key|value|proj)\.", lambda m: f"model.layers.{m[1]}.attn.{_PROJECTIONS[m[2]]}."),
    (r"^blocks\.(\d+)\.mlp\.", r"model.layers.\1.mlp."),
    (r"\.key_tokens$", ".keys.weight"),
    (r"\.value_tokens$", ".values.weight"),
    (r"^norm\.", "model.norm."),
    (r"^head\.bias$", "head.decoder.bias"),
    (r"^head\.fc\.", "classifier."),
)
"""Names of our tensors and of those of the self-contained classes, applied in order."""

GROWING_NAMES = (
    (r"^(stem|blocks|norm)\.", r"model.backbone.\1."),
    (r"^head\.(dense|norm)\.", r"head.transform.\1."),
    (r"^head\.bias$", "head.decoder.bias"),
    (r"^head\.fc\.", "classifier."),
)
"""Names of our tensors and of those of the classes with our backbone, applied in order."""

_HEAD = {"language": "lm_head.weight", "masked_language": "head.decoder.weight"}

for _config_class, _prefix, _source in (
    (TokenformerConfig, "Tokenformer", modeling),
    (GrowingTokenformerConfig, "GrowingTokenformer", growing_models),
):
    transformers.AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    for _kind in (
        *("Model", "ModelForCausalLM", "ModelForMaskedLM", "ModelForImageClassification"),
        *("ModelForSequenceClassification", "ModelForTokenClassification", "ModelForQuestionAnswering"),
    ):
        _class = getattr(_source, _prefix + (_kind.removeprefix("Model") or "Model"))
        getattr(transformers, f"Auto{_kind}").register(_config_class, _class, exist_ok=True)


def to_transformers(model: Tokenformer, growing: bool = False) -> Any:
    """Convert a model to its class in transformers.

    Args:
        model: Model of any size.
        growing: Convert to a class with our backbone (``GrowingTokenformerFor...``), which exists for every
            architecture and can grow, in place of the self-contained one (``TokenformerFor...``), in which each
            Pattention layer is two ``nn.Linear``.

    Returns:
        Model for causal or masked language modeling or image classification with copies of the weights, in evaluation
        mode.

    Raises:
        UserError: If the architecture has parts that the class does not have, or adapters.
    """
    check_plain(model.state_dict())
    architecture = current_architecture(model)
    if architecture.head not in MODELS:
        raise UserError(f"head: no model of transformers (got {architecture.head!r}, expected {', '.join(MODELS)})")
    config = GrowingTokenformerConfig.of(architecture) if growing else _config(architecture)
    twin: Any = _class_of(architecture.head, growing)(config)
    twin.to(next(model.parameters()).dtype)
    state = {theirs: tensor for _, theirs, tensor in _renamed(architecture, model.state_dict(), growing)}
    with torch.no_grad():
        for name, parameter in (*twin.named_parameters(remove_duplicate=False), *twin.named_buffers()):
            parameter.data = state.pop(name).detach().clone() if name.endswith("tau") else parameter.data
            if name in state:
                parameter.copy_(state.pop(name))
    return twin.eval()


def from_transformers(model: Any) -> Tokenformer:
    """Convert a model of transformers back.

    Args:
        model: A model that :func:`to_transformers` returns, or one trained from it.

    Returns:
        Model with copies of the weights, in evaluation mode.

    Raises:
        UserError: If the class is not one of TokenFormer's, or its layers differ in their parameter tokens.
    """
    heads = [head for head, (_, kind, _) in MODELS.items() if isinstance(model, kind)]
    if not heads:
        known = ", ".join(kind.__name__ for _, kind, _ in MODELS.values())
        raise UserError(f"model: no TokenFormer (got {type(model).__name__}, expected {known})")
    growing = isinstance(model, GrowingTokenformerPreTrainedModel)
    if growing:
        model.update_config()
    architecture = _architecture(heads[0], model.config)
    ours = Tokenformer(architecture).to(next(model.parameters()).dtype)
    theirs = model.state_dict(keep_vars=False)
    state = {}
    for name, other, tensor in _renamed(architecture, ours.state_dict(), growing):
        if other not in theirs or theirs[other].shape != tensor.shape:
            raise UserError(f"model: {other}: expected shape {tuple(tensor.shape)}")
        state[name] = theirs[other].T if name.endswith("value_tokens") and not growing else theirs[other]
    ours.load_state_dict(state)
    return ours.eval()


def save_transformers(model: Tokenformer, folder: str | os.PathLike[str], dtype: str | None = None) -> None:
    """Write a folder that the Auto classes of transformers load, with the code of the model next to the weights.

    A model card is written unless there is one.

    Args:
        model: Model of any size.
        folder: Output folder.
        dtype: Precision of the weights: float32, float16 or bfloat16; ``None`` keeps that of ``model``. ``tau`` stays
            in float32.

    Raises:
        UserError: See :func:`to_transformers`; for values that overflow ``dtype``.
    """
    twin = to_transformers(model)
    for name, parameter in twin.named_parameters():
        parameter.data = cast(parameter.data, name, dtype)
    twin.config.dtype = next(twin.parameters()).dtype
    source = Path(inspect.getfile(modeling))
    auto = MODELS[model.config.head][2]
    module = source.stem
    base = "TokenformerVisionModel" if model.config.head == "image" else "TokenformerModel"
    twin.config.auto_map = {
        "AutoConfig": f"{module}.TokenformerConfig",
        "AutoModel": f"{module}.{base}",
        auto: f"{module}.{type(twin).__name__}",
    }
    twin.save_pretrained(folder)
    Path(folder, source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    if not Path(folder, CARD_FILE).exists():
        write_card(Path(folder), model, {})


def load_transformers(weights: Path, settings: Mapping[str, Any]) -> Tokenformer:
    """Load a folder that :func:`save_transformers` or transformers wrote, without running its copy of the code.

    Args:
        weights: Weights file, or index of sharded weights.
        settings: Content of its ``config.json``.

    Raises:
        UserError: For another class, or if a tensor is missing, unexpected or misshapen.
    """
    growing = settings.get("model_type") == GrowingTokenformerConfig.model_type
    classes = {_class_of(head, growing).__name__: head for head in MODELS}
    name = next(iter(settings.get("architectures") or [None]))
    if name not in classes:
        raise UserError(f"architectures: unsupported (got {name!r}, expected {' or '.join(classes)})")
    head, kind = classes[name], _class_of(classes[name], growing)
    known = {key: value for key, value in settings.items() if key not in ("auto_map", "architectures")}
    try:
        architecture = _architecture(head, kind.config_class(**known))
        files = TensorFiles(weights, "source")
        ours = Tokenformer(architecture)
        twin = to_transformers(ours, growing)
        expected = {one: tuple(tensor.shape) for one, tensor in twin.state_dict().items()}
        for one in (kind._tied_weights_keys or {}).keys() - files.shapes.keys():
            expected.pop(one, None)
        for one in sorted(expected.keys() | files.shapes.keys()):
            if expected.get(one) != files.shapes.get(one):
                problem = f"{one} has shape {files.shapes.get(one)}, expected {expected.get(one)}"
                raise UserError(f"source: {weights}: {problem}")
        twin.load_state_dict({one: files[one] for one in files.shapes}, strict=False)
        twin.tie_weights()
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(str(error)) from None
    return from_transformers(twin)


def _class_of(head: str, growing: bool) -> Any:
    name = MODELS[head][1].__name__
    return getattr(growing_models, f"Growing{name}") if growing else MODELS[head][1]


def _config(architecture: Architecture) -> TokenformerConfig:
    if isinstance(architecture.image_size, tuple):
        raise UserError(f"image_size: not in TokenFormer's class in transformers (got {architecture.image_size})")
    config = TokenformerConfig(**named_settings(architecture))
    back = _architecture(architecture.head, config)
    free = TRAINING | {"param_tokens", "head_dim"} | UNUSED_BY_STEM.get(architecture.stem, set())
    for field in dataclasses.fields(Architecture):
        ours, theirs = getattr(architecture, field.name), getattr(back, field.name)
        if ours != theirs and field.name not in free:
            problem = "not in TokenFormer's class in transformers"
            raise UserError(f"{field.name}: {problem} (got {ours!r}, expected {theirs!r})")
    return config


def _architecture(head: str, config: Any) -> Architecture:
    if isinstance(config, GrowingTokenformerConfig):
        return dataclasses.replace(config.architecture(), head=head)
    preset = MODELS[head][0]
    return preset_config(preset, **named_fields(config, preset_config(preset).stem))


def _renamed(architecture: Architecture, state: Mapping[str, Tensor], growing: bool) -> list[tuple[str, str, Tensor]]:
    """List our name, the name in transformers, and the tensor in its form in transformers."""
    found = []
    for name, tensor in state.items():
        other = _HEAD.get(architecture.head, name) if name == "head.weight" else name
        for pattern, replacement in GROWING_NAMES if growing else NAMES:
            other = re.sub(pattern, replacement, other)
        found.append((name, other, tensor.T if name.endswith("value_tokens") and not growing else tensor))
    return found
