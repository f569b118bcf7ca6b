"""TokenFormer for transformers: causal and masked language models, classifiers and vision transformers.

This file needs torch and transformers only, and is copied next to exported weights (``trust_remote_code=True``). Each
Pattention layer is two ``nn.Linear`` with the norm of the scores between them, so that LoRA, quantization and float8
training find them.

Source: Wang et al., "TokenFormer", arXiv 2410.23168, eq. 4-10.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    MaskedLMOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


class TokenformerConfig(PreTrainedConfig):
    """Architecture of a TokenFormer.

    Args:
        vocab_size: Vocabulary size, V.
        hidden_size: Width of the residual stream, D.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of attention heads.
        head_dim: Width of a head. Default: ``hidden_size / num_attention_heads``.
        qkv_tokens: Parameter tokens of each query, key and value projection.
        proj_tokens: Parameter tokens of the attention output projection.
        ffn_tokens: Parameter tokens of the feed-forward.
        max_position_embeddings: Context length in data tokens.
        rotary_pct: Share of each head that is rotated; 0 disables rotary positions.
        rope_theta: Base of the rotary angles.
        layer_norm_eps: Epsilon of the norms.
        hidden_dropout: Dropout rate of embeddings and residual branches.
        attention_dropout: Dropout rate of the attention weights.
        initializer_range: Standard deviation of initial weights.
        is_causal: Whether a data token attends to earlier ones only.
        image_size: Image size in pixels (vision).
        patch_size: Patch size in pixels (vision).
        num_channels: Number of image channels (vision).
        class_token: Whether images have a class token (vision).
        pooling: Pooling of the classifier, ``token`` or ``avg`` (vision).
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference = ["cache"]

    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int | None = None
    qkv_tokens: int = 768
    proj_tokens: int = 768
    ffn_tokens: int = 3072
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    is_causal: bool = True
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    class_token: bool = True
    pooling: str = "token"
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class TokenformerPattention(nn.Module):
    """Attention over parameter tokens, ``gelu(tau s / ||s||) V`` with ``s = x K^T`` (eq. 4).

    Args:
        size_in: Input dimension.
        size_out: Output dimension.
        tokens: Number of parameter tokens, N.
    """

    def __init__(self, size_in: int, size_out: int, tokens: int) -> None:
        super().__init__()
        self.keys = nn.Linear(size_in, tokens, bias=False)
        self.values = nn.Linear(tokens, size_out, bias=False)
        self.register_buffer("tau", torch.tensor(math.sqrt(tokens), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size_in) -> (..., size_out)."""
        scores = self.keys(x)
        wide = torch.promote_types(scores.dtype, torch.float32)
        norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=wide).clamp_min(1e-12)
        return self.values(F.gelu((scores * (self.tau.to(wide) / norm)).to(scores.dtype)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of each head, (B, H, T, d) -> (B, H, T, d)."""
    half = cos.shape[-1]
    left, right, kept = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([(left * cos - right * sin).to(x.dtype), (right * cos + left * sin).to(x.dtype), kept], dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend in plain operations; return the output (B, T, H, d) and the weights (B, H, T, S)."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class TokenformerAttention(nn.Module):
    """Multi-head attention whose projections are Pattention (eq. 6-8)."""

    def __init__(self, config: TokenformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, config.is_causal
        self.head_dim = config.head_dim
        size, inner = config.hidden_size, config.num_attention_heads * self.head_dim
        self.q_proj = TokenformerPattention(size, inner, config.qkv_tokens)
        self.k_proj = TokenformerPattention(size, inner, config.qkv_tokens)
        self.v_proj = TokenformerPattention(size, inner, config.qkv_tokens)
        self.o_proj = TokenformerPattention(inner, size, config.proj_tokens)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> output (B, T, D) and attention weights."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (layer(hidden_states).view(shape).transpose(1, 2) for layer in projections)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, dropout=dropout, **kwargs
        )
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class TokenformerLayer(GradientCheckpointingLayer):
    """Pre-norm block (eq. 5-10)."""

    def __init__(self, config: TokenformerConfig, layer_idx: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm1 = nn.LayerNorm(size, config.layer_norm_eps, elementwise_affine=False)
        self.attn = TokenformerAttention(config, layer_idx)
        self.norm2 = nn.LayerNorm(size, config.layer_norm_eps, elementwise_affine=False)
        self.mlp = TokenformerPattention(size, size, config.ffn_tokens)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        mixed, _ = self.attn(self.norm1(hidden_states), attention_mask, position_embeddings, cache, **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.norm2(hidden_states)))


class TokenformerPreTrainedModel(PreTrainedModel):
    """Initialization, saving and loading of all TokenFormer models."""

    config_class = TokenformerConfig
    config: TokenformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenformerLayer"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["tau"]
    _can_record_outputs = {"hidden_states": TokenformerLayer, "attentions": TokenformerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenformerPattention):
            deviation = 2 / (self.config.num_hidden_layers * math.sqrt(self.config.hidden_size))
            init.normal_(module.values.weight, std=deviation)
            init.constant_(module.tau, math.sqrt(module.keys.out_features))
        elif isinstance(module, TokenformerPatchEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=1e-6)


class TokenformerModel(TokenformerPreTrainedModel):
    """TokenFormer over tokens, causal or bidirectional."""

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(TokenformerLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def _position_embeddings(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute the cosines and sines of the rotary angles, (B, 1, T, r / 2) each."""
        rotated = int(self.config.head_dim * self.config.rotary_pct)
        if rotated == 0:
            return None
        wide = torch.promote_types(like.dtype, torch.float32)
        exponents = torch.arange(0, rotated, 2, device=position_ids.device, dtype=wide) / rotated
        angles = position_ids[:, None, :, None].to(wide) * self.config.rope_theta**-exponents
        return angles.cos(), angles.sin()

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
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        causal = self.config.is_causal
        if use_cache and cache is None and causal:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + past)[None]
        given = {"config": self.config, "inputs_embeds": hidden_states, "attention_mask": attention_mask}
        if causal:
            mask = create_causal_mask(**given, cache=cache, position_ids=position_ids)
        else:
            mask = create_bidirectional_mask(**given)
        positions = self._position_embeddings(position_ids, hidden_states)
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, positions, cache=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)


class TokenformerForCausalLM(TokenformerPreTrainedModel, GenerationMixin):
    """TokenFormer for causal language modeling."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _model_class = TokenformerModel

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.model = self._model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids (B, T) -> logits (B, T, V), and the mean cross-entropy in nats with ``labels``."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TokenformerMaskedHead(nn.Module):
    """BERT's head: dense layer, GELU, norm and vocabulary projection with a bias (arXiv 1810.04805, section 3.1)."""

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, V)."""
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class TokenformerForMaskedLM(TokenformerPreTrainedModel):
    """TokenFormer for masked language modeling; ``config.is_causal`` is false."""

    _tied_weights_keys = {"head.decoder.weight": "model.embed_tokens.weight"}
    _model_class, _head_class = TokenformerModel, TokenformerMaskedHead

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.model = self._model_class(config)
        self.head = self._head_class(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Token ids (B, T) -> logits (B, T, V), and the mean cross-entropy of labels other than -100 in nats."""
        outputs = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        logits = self.head(outputs.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TokenformerPatchEmbeddings(nn.Module):
    """Patches, class token and learned positions of an image."""

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.projection = nn.Conv2d(config.num_channels, size, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size)) if config.class_token else None
        length = (config.image_size // patch) ** 2 + int(config.class_token)
        self.position_embeddings = nn.Parameter(torch.zeros(1, length, size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, 1 + patches, D)."""
        x = self.projection(pixel_values).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.position_embeddings


class TokenformerVisionModel(TokenformerPreTrainedModel):
    """TokenFormer over image patches."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.embeddings = TokenformerPatchEmbeddings(config)
        self.layers = nn.ModuleList(TokenformerLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Images (B, C, height, width) -> features (B, 1 + patches, D)."""
        if pixel_values is None:
            raise ValueError("You must specify pixel_values")
        hidden_states = self.embeddings(pixel_values.to(self.embeddings.projection.weight.dtype))
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, None, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class TokenformerForImageClassification(TokenformerPreTrainedModel):
    """TokenFormer for image classification."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _model_class = TokenformerVisionModel

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.model = self._model_class(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Images (B, C, height, width) -> logits (B, num_labels), and the loss with ``labels``."""
        outputs = self.model(pixel_values, **kwargs)
        features = outputs.last_hidden_state
        if self.config.pooling == "token":
            features = features[:, 0]
        else:
            features = features[:, int(self.config.class_token) :].mean(dim=1)
        logits = self.classifier(features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TokenformerForSequenceClassification(GenericForSequenceClassification, TokenformerPreTrainedModel):
    """TokenFormer for sequence classification."""


class TokenformerForTokenClassification(GenericForTokenClassification, TokenformerPreTrainedModel):
    """TokenFormer for token classification."""


class TokenformerForQuestionAnswering(GenericForQuestionAnswering, TokenformerPreTrainedModel):
    """TokenFormer for extractive question answering."""


__all__ = [
    "TokenformerConfig",
    "TokenformerForCausalLM",
    "TokenformerForImageClassification",
    "TokenformerForMaskedLM",
    "TokenformerForQuestionAnswering",
    "TokenformerForSequenceClassification",
    "TokenformerForTokenClassification",
    "TokenformerModel",
    "TokenformerPreTrainedModel",
    "TokenformerVisionModel",
]
