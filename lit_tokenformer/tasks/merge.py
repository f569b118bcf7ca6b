"""Merge an image model and a text model into one for both, with groups of parameter tokens by modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.models import TokenformerConfig
from lit_tokenformer.models.config import KINDS
from lit_tokenformer.models.modalities import IMAGE
from lit_tokenformer.tasks.causal_lm import LitCausalLM
from lit_tokenformer.tasks.image_classification import LitImageClassifier
from lit_tokenformer.tasks.vision_language import LitVisionLanguage

_OF_IMAGE = ("image_size", "patch_size", "in_chans", "class_token", "global_pool")
_EQUAL = ("dim", "depth", "num_heads", "head_width", "num_kv_heads", "norm", "norm_eps", "score_norm", "activation")
"""What both models need alike: the shape of attention and of the residual stream."""


def merge_tasks(image: LitImageClassifier, text: LitCausalLM) -> LitVisionLanguage:
    """Merge an image classifier and a language model, exactly.

    The text model's parameter tokens are the layers' own, the image model's are groups for the patches. The text alone
    has the logits of ``text``, the image alone, by :meth:`LitVisionLanguage.classify`, those of ``image``; pixels are
    in [-1, 1], so the image model's normalization is folded into its patch embedding.

    Args:
        image: Image classifier with Pattention projections.
        text: Causal language model with Pattention projections and rotary positions.

    Raises:
        UserError: If width, depth, heads or norms differ, or the blocks have other parameters than parameter tokens.
    """
    ours, theirs = _current(text), _current(image)
    for name in _EQUAL:
        if getattr(ours, name) != getattr(theirs, name):
            got = f"{getattr(theirs, name)} in image, {getattr(ours, name)} in text"
            raise UserError(f"merge: expected models of equal {name}, got {got}")
    for name, config, stem in (("image", theirs, "patch"), ("text", ours, "token")):
        if config.stem != stem or (name == "text" and not config.causal):
            raise UserError(f"{name}: expected a model with stem {stem!r}, got {config.stem!r}, causal {config.causal}")
    initial = text.backbone.config
    overrides: Any = {**text.plain(text.hparams["overrides"]), "depth": ours.depth}
    overrides |= {"class_token": theirs.class_token, "global_pool": theirs.global_pool, "patch_size": theirs.patch_size}
    merged = LitVisionLanguage(
        text.hparams["preset"],
        vocab_size=initial.vocab_size,
        context_length=initial.context_length,
        image_size=theirs.image_size,
        in_chans=theirs.in_chans,
        separator_id=text.separator_id,
        overrides=overrides,
        image_tokens={kind: image.backbone.size[kind] for kind in KINDS},
        image_classes=image.backbone.num_classes,
    )
    state = {**_text_state(text.backbone.state_dict()), **_image_state(image.backbone.state_dict(), image.image_data)}
    merged.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    merged.tokenizer_json = text.tokenizer_json
    return merged


def _current(task: Any) -> TokenformerConfig:
    """Architecture of a task at its current size."""
    size = {kind: total for kind, total in task.backbone.size.items() if ":" not in kind}
    return task.backbone.config.at_size(size)


def _text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a language model."""
    return {
        f"backbone.{name.replace('norm.', 'norm.text.', 1) if name.startswith('norm.') else name}": one
        for name, one in state.items()
    }


def _image_state(state: Mapping[str, Tensor], image_data: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Rename the tensors of an image model, and fold its normalization into the patch embedding."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "blocks":
            layer, _, last = name.rpartition(".")
            found[f"backbone.{layer}.groups.{IMAGE}.{last}"] = tensor
        else:
            found[
                {"stem": "backbone.stem.image.", "norm": "backbone.norm.image.", "head": "classifier."}[part] + rest
            ] = tensor
    if image_data is not None:
        weight, bias = (f"backbone.stem.image.patch_embed.proj.{name}" for name in ("weight", "bias"))
        mean, std = (torch.tensor(image_data[name]).to(found[weight])[None, :, None, None] for name in ("mean", "std"))
        found[bias] = found[bias] + (found[weight] * ((0.5 - mean) / std)).sum(dim=(1, 2, 3))
        found[weight] = found[weight] / (2 * std)
    return found
