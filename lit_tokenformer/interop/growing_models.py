"""Our backbone as models of transformers: every architecture, parameter tokens as parameters, and growth.

The classes of ``modeling_tokenformer`` are self-contained, and their Pattention layers are two ``nn.Linear``. Those
here need this project and contain a :class:`~lit_tokenformer.models.Tokenformer`: ``grow(model, ...)`` enlarges them,
LoRA adapts the tokens by ``target_parameters``, and every stem, mixer, feed-forward and norm of this project works.
Heads, losses and outputs are those of ``modeling_tokenformer``; attention and caches are those of transformers.
Recurrent parts and ALiBi have no cache there, so ``generate`` recomputes the sequence for each token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from lit_tokenformer.errors import UserError
from lit_tokenformer.interop import modeling_tokenformer as modeling
from lit_tokenformer.interop.architectures import UNUSED_BY_STEM
from lit_tokenformer.models import Tokenformer, TokenformerConfig
from lit_tokenformer.models.block import Block
from lit_tokenformer.models.config import KINDS
from lit_tokenformer.models.heads import MaskedLanguageHead
from lit_tokenformer.registry import POSITIONS

FIELDS = {
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout",
    "attn_dropout": "attention_dropout",
    "causal": "is_causal",
    "tie_embeddings": "tie_word_embeddings",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "rotary_fraction": "rotary_pct",
    "rotary_base": "rope_theta",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "class_token": "class_token",
    "global_pool": "pooling",
    "num_classes": "num_labels",
}
"""Fields of the architecture by their names in transformers."""


def _names(stem: str) -> dict[str, str]:
    return {ours: theirs for ours, theirs in FIELDS.items() if ours not in UNUSED_BY_STEM.get(stem, ())}


def named_settings(architecture: TokenformerConfig) -> dict[str, Any]:
    """Settings of an architecture by their names in transformers, as far as they have one."""
    found = {theirs: getattr(architecture, ours) for ours, theirs in _names(architecture.stem).items()}
    tokens = {f"{kind}_tokens": total for kind, total in architecture.tokens.items()}
    return {**found, **tokens, "head_dim": architecture.head_width}


def named_fields(config: Any, stem: str) -> dict[str, Any]:
    """Fields of an architecture with ``stem``, as far as they have a name in transformers."""
    found = {ours: getattr(config, theirs) for ours, theirs in _names(stem).items()}
    return {**found, "param_tokens": {kind: getattr(config, f"{kind}_tokens") for kind in KINDS}}


class GrowingTokenformerConfig(modeling.TokenformerConfig):
    """Architecture of one of our models.

    Args:
        parts: Fields of :class:`~lit_tokenformer.models.TokenformerConfig` that have no name in transformers, such as
            ``mixer`` or ``mlp_ratio``. Default: those of ``tokenformer_lm_tiny``.
    """

    model_type = "growing_tokenformer"

    parts: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.parts is None:
            self.parts = {"stem": "token", "head": "language", "positions": "rotary"}

    @classmethod
    def of(cls, architecture: TokenformerConfig) -> GrowingTokenformerConfig:
        """Convert an architecture."""
        apart = {*_names(architecture.stem), "param_tokens", *UNUSED_BY_STEM.get(architecture.stem, ())}
        names = [field.name for field in dataclasses.fields(architecture) if field.name not in apart]
        return cls(**named_settings(architecture), parts={name: getattr(architecture, name) for name in names})

    def architecture(self) -> TokenformerConfig:
        """Convert back.

        Raises:
            UserError: If the fields are invalid.
        """
        parts = self.parts or {}
        try:
            return TokenformerConfig(**{**parts, **named_fields(self, parts["stem"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"parts: not those of an architecture ({error})") from None


def current_architecture(model: Tokenformer) -> TokenformerConfig:
    """Architecture of a model at its current size.

    Raises:
        UserError: If its attention depends on the initial number of heads.
    """
    grown = model.config.at_size(model.size)
    if POSITIONS[grown.positions].bias is not None and grown.num_heads != model.config.num_heads:
        raise UserError(f"heads: a model with positions {grown.positions!r} cannot be saved after their growth")
    return grown


class GrowingBlock(GradientCheckpointingLayer, Block):
    """Our block, with the activation checkpointing of transformers."""


class GrowingBackbone(Tokenformer):
    """Our model, without a head."""

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.head = nn.Identity()

    def new_block(self, number: int) -> Block:
        """Create a freshly initialized block for index ``number`` of the stack."""
        return GrowingBlock(self.config, number)


class AttentionInterface(nn.Module):
    """Attention function of transformers, chosen by ``config._attn_implementation``."""

    def __init__(self, config: GrowingTokenformerConfig, architecture: TokenformerConfig) -> None:
        super().__init__()
        self.config, self.is_causal = config, architecture.causal
        self.scaling = architecture.head_width**-0.5
        self.num_key_value_groups = architecture.num_heads // architecture.head_units[1]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Queries (B, H, T, d), keys and values (B, H', S, d) -> output (B, T, H, d), and weights (B, H, T, S)."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
        return attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **kwargs)


def _eager(module: AttentionInterface, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    key, value = (repeat_kv(one, module.num_key_value_groups) for one in (key, value))
    return modeling.eager_attention_forward(module, query, key, value, mask, **kwargs)


class _CachedLayer:
    """One layer of a cache of transformers, as the KV cache of our attention."""

    def __init__(self, cache: Cache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def append(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return self.cache.update(key, value, self.layer)


class _CachedState:
    """Cache of transformers, as our decoding state; positions and masks are given with each call."""

    start, padding, position_ids = 0, None, None

    def __init__(self, cache: Cache, depth: int) -> None:
        self.blocks = [(_CachedLayer(cache, layer), None) for layer in range(depth)]

    def check(self, more: int, positions: bool) -> None:
        """Caches of transformers have no limit of their own."""

    def advance(self, more: int) -> None:
        """Caches of transformers count their data tokens."""


class GrowingTokenformerPreTrainedModel(modeling.TokenformerPreTrainedModel):
    """Initialization, saving and loading of all models with our backbone."""

    config_class = GrowingTokenformerConfig
    config: GrowingTokenformerConfig
    _no_split_modules = ["GrowingBlock"]
    _can_record_outputs = {
        "hidden_states": GrowingBlock,
        "attentions": OutputRecorder(AttentionInterface, index=1),
    }

    def initialize_weights(self) -> None:
        """Initialize what a checkpoint lacks; the backbone as in a new model."""
        backbone = self.base_model.backbone
        if not getattr(backbone, "_is_hf_initialized", False):
            tensors = (*backbone.parameters(), *backbone.buffers())
            if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
                fresh = GrowingBackbone(backbone.config)
                for tensor, value in zip(tensors, (*fresh.parameters(), *fresh.buffers()), strict=True):
                    init.copy_(tensor, value)
            self.base_model.mark_initialized()
        super().initialize_weights()

    def get_input_embeddings(self) -> nn.Module:
        stem = self.base_model.backbone.stem
        return stem.embedding if self.main_input_name == "input_ids" else stem.patch_embed.proj

    def set_input_embeddings(self, value: nn.Module) -> None:
        backbone = self.base_model.backbone
        backbone.stem.embedding = value
        backbone.config = dataclasses.replace(backbone.config, vocab_size=value.num_embeddings)

    def update_config(self) -> None:
        """Write the current size of the backbone to the config; ``generate`` and ``save_pretrained`` call it."""
        grown = current_architecture(self.base_model.backbone)
        for name, value in vars(GrowingTokenformerConfig.of(grown)).items():
            if name == "parts" or name in FIELDS.values() or name.endswith("_tokens"):
                setattr(self.config, name, value)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self.update_config()
        super().save_pretrained(*args, **kwargs)


class GrowingTokenformerModel(GrowingTokenformerPreTrainedModel):
    """Our backbone over tokens, causal or bidirectional."""

    def __init__(self, config: GrowingTokenformerConfig) -> None:
        super().__init__(config)
        architecture = config.architecture()
        self.backbone = GrowingBackbone(architecture)
        self.attend = AttentionInterface(config, architecture)
        recurrent = not self.backbone.keeps_documents_apart
        self.uses_interface = not recurrent and POSITIONS[architecture.positions].bias is None
        config.use_cache = config.use_cache and self.uses_interface
        self.gradient_checkpointing = False
        if next(self.backbone.parameters()).device.type != "meta":
            self.mark_initialized()
        self.post_init()

    def mark_initialized(self) -> None:
        """Mark the modules of the backbone as initialized."""
        for module in self.backbone.modules():
            module._is_hf_initialized = True

    def _features(self, x: dict[str, Any], mask: Any, cache: Cache | None = None, **kwargs: Any) -> Tensor:
        """Run the backbone, by the attention of transformers where its parts allow it."""

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float) -> Tensor:
            return self.attend(query, key, value, mask, dropout, **kwargs)[0]

        if self.training and self.backbone.loss_names:
            names = ", ".join(self.backbone.loss_names)
            raise UserError(f"aux_losses: {names} not in the losses of transformers; train the model in this project")
        state: Any = None if cache is None else _CachedState(cache, len(self.backbone.blocks))
        return self.backbone.forward_features(
            **x, attention_mask=mask, state=state, attend=attend if self.uses_interface else None
        )

    @merge_with_config_defaults
    @capture_outputs
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids (B, T) or embeddings (B, T, D) -> features (B, T, D)."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        causal, positions = self.config.is_causal, POSITIONS[self.backbone.config.positions]
        if not self.uses_interface and (use_cache or cache is not None):
            raise UserError("use_cache: unsupported with recurrent parts and ALiBi in transformers (expected False)")
        if use_cache and cache is None and causal:
            cache = DynamicCache()
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            cache = None
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(embeds.shape[1], device=embeds.device) + past)[None]
        mask: Any = attention_mask
        if self.uses_interface:
            given = {"config": self.config, "inputs_embeds": embeds, "attention_mask": attention_mask}
            if causal:
                mask = create_causal_mask(**given, cache=cache, position_ids=position_ids)
            else:
                mask = create_bidirectional_mask(**given)
        x = {"inputs_embeds": embeds}
        if positions.learned or positions.rotary is not None:
            x["position_ids"] = position_ids
        return BaseModelOutputWithPast(last_hidden_state=self._features(x, mask, cache, **kwargs), cache=cache)


class GrowingTokenformerVisionModel(GrowingTokenformerModel):
    """Our backbone over image patches."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Images (B, C, height, width) -> features (B, 1 + patches, D)."""
        if pixel_values is None:
            raise ValueError("You must specify pixel_values")
        pixel_values = pixel_values.to(self.get_input_embeddings().weight.dtype)
        return BaseModelOutput(last_hidden_state=self._features({"x": pixel_values}, None, **kwargs))


class GrowingTokenformerForCausalLM(
    GrowingTokenformerPreTrainedModel, modeling.TokenformerForCausalLM, GenerationMixin
):
    """Our backbone for causal language modeling."""

    _tied_weights_keys = {"lm_head.weight": "model.backbone.stem.embedding.weight"}
    _model_class = GrowingTokenformerModel

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.update_config()
        if not self.model.uses_interface:
            kwargs.setdefault("use_cache", False)
        return super().generate(*args, **kwargs)


class GrowingTokenformerMaskedHead(nn.Module):
    """Our masked-language-model head, with the vocabulary projection as ``nn.Linear``."""

    def __init__(self, config: GrowingTokenformerConfig) -> None:
        super().__init__()
        self.transform = MaskedLanguageHead(config.architecture())
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.transform.weight = self.transform.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, V)."""
        return self.decoder(self.transform(x, pre_logits=True))


class GrowingTokenformerForMaskedLM(GrowingTokenformerPreTrainedModel, modeling.TokenformerForMaskedLM):
    """Our backbone for masked language modeling; ``config.is_causal`` is false."""

    _tied_weights_keys = {"head.decoder.weight": "model.backbone.stem.embedding.weight"}
    _model_class, _head_class = GrowingTokenformerModel, GrowingTokenformerMaskedHead


class GrowingTokenformerForImageClassification(
    GrowingTokenformerPreTrainedModel, modeling.TokenformerForImageClassification
):
    """Our backbone for image classification."""

    _model_class = GrowingTokenformerVisionModel


class GrowingTokenformerForSequenceClassification(GenericForSequenceClassification, GrowingTokenformerPreTrainedModel):
    """Our backbone for sequence classification."""


class GrowingTokenformerForTokenClassification(GenericForTokenClassification, GrowingTokenformerPreTrainedModel):
    """Our backbone for token classification."""


class GrowingTokenformerForQuestionAnswering(GenericForQuestionAnswering, GrowingTokenformerPreTrainedModel):
    """Our backbone for extractive question answering."""

    get_input_embeddings = GrowingTokenformerPreTrainedModel.get_input_embeddings
    set_input_embeddings = GrowingTokenformerPreTrainedModel.set_input_embeddings
