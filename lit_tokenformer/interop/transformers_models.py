"""Architectures of transformers: GPT-2, GPT-NeoX, Llama, BERT, RoBERTa, RWKV-4 and ViT.

The names are those that ``save_pretrained`` of transformers 5 writes; earlier spellings are understood. Segment
embeddings of a single segment are a constant, which is added to the position embeddings; an export has one segment of
zeros.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.interop.architectures import (
    TRANSPOSED,
    Architecture,
    Field,
    Settings,
    Transform,
    fused,
    named,
    row,
)
from lit_tokenformer.registry import TRANSFORMERS_MODELS

ACTIVATIONS = {
    **{"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    **{"silu": "silu", "swish": "silu", "relu": "relu"},
}

_NAMES = (
    "_name_or_path architectures model_type transformers_version torch_dtype dtype use_cache initializer_range "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix "
    "gradient_checkpointing output_attentions output_hidden_states output_scores return_dict return_dict_in_generate "
    "torchscript use_bfloat16 tf_legacy_loss id2label label2id num_labels problem_type finetuning_task "
    "task_specific_params classifier_dropout chunk_size_feed_forward attn_implementation _attn_implementation "
    "_attn_implementation_autoset max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "_num_labels output_past transformers.js_config"
)
HARMLESS = frozenset(_NAMES.split())
"""Settings of every config that do not affect the outputs: of training, of generation, of the library."""

FIXED: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("is_decoder", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), (False,)
) | {"pruned_heads": ({},)}
"""Settings of every config with one supported value."""

_ROPE = ("rope_theta", "partial_rotary_factor")


def _flat_rope(settings: Settings) -> Settings:
    """Replace the settings of rotary positions, nested since transformers 5, by flat ones."""
    for key in ("rope_parameters", "rope_scaling"):
        nested = settings.pop(key, None) or {}
        if not isinstance(nested, dict):
            raise UserError(f"{key}: expected keys and values, got {nested!r}")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            raise UserError(f"{key}: unsupported rope_type (got {kind!r}, expected 'default')")
        more = {name: value for name, value in nested.items() if name not in (*_ROPE, "rope_type", "type")}
        settings |= {f"{key}.{name}": value for name, value in more.items()}
        settings |= {name: nested[name] for name in _ROPE if name in nested}
    for theirs, name in {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}.items():
        if theirs in settings:
            settings.setdefault(name, settings.pop(theirs))
    return settings


def _nested_rope(settings: Settings) -> Settings:
    return {"rope_parameters": {"rope_type": "default", **{name: settings[name] for name in _ROPE}}}


def _llama_extras(settings: Settings) -> Settings:
    dim, heads = settings["hidden_size"], settings["num_attention_heads"]
    if dim % heads:
        raise UserError(f"needs a number of heads that divides dim {dim} (got {heads})")
    return _nested_rope(settings)


def _with_segment(offset: int) -> Transform:
    """Add the embedding of the first segment to the positions, without those before the first."""

    def ours(tensors: list[Tensor], settings: Settings) -> list[Tensor]:
        return [tensors[0][offset:].double() + tensors[1][0].double()]

    def theirs(tensors: list[Tensor], settings: Settings) -> list[Tensor]:
        dim, segments = tensors[0].shape[1], settings.get("type_vocab_size", 2)
        if isinstance(segments, bool) or not isinstance(segments, int) or segments < 1:
            raise UserError(f"type_vocab_size: expected a whole number of at least 1, got {segments!r}")
        return [torch.cat([tensors[0].new_zeros(offset, dim), tensors[0]]), tensors[0].new_zeros(segments, dim)]

    return Transform(ours, theirs)


_LAST = Transform(lambda x, _: [one.flatten() for one in x], lambda x, _: [one.view(1, 1, -1) for one in x])
"""Vectors that RWKV stores as (1, 1, D)."""

TRANSFORMERS_MODELS.register("gpt2")(
    Architecture(
        preset="gpt2_tiny",
        classes=("GPT2LMHeadModel",),
        bare=("GPT2Model",),
        prefix="transformer.",
        fields=(
            Field("n_embd", "dim"),
            Field("n_layer", "depth"),
            Field("n_head", "num_heads"),
            Field("n_inner", "mlp_hidden", None),
            Field("n_positions", "context_length"),
            Field("vocab_size", "vocab_size"),
            named("activation_function", "activation", "gelu_new", ACTIVATIONS),
            Field("layer_norm_epsilon", "norm_eps", 1e-5),
            Field("resid_pdrop", "dropout", 0.1),
            Field("embd_pdrop", "dropout", 0.1),
            Field("attn_pdrop", "attn_dropout", 0.1),
            Field("tie_word_embeddings", "tie_embeddings", True),
        ),
        fixed={**FIXED, "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        ignored=HARMLESS
        | {"n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn"}
        | {"summary_activation", "summary_first_dropout"}
        | {"summary_proj_to_labels", "summary_type", "summary_use_proj"},
        buffers=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
        rows=(
            row("transformer.wte.weight", "stem.embedding.weight"),
            row("transformer.wpe.weight", "stem.positions"),
            row("transformer.h.{i}.ln_1.*", "blocks.{i}.norm1.*"),
            row("transformer.h.{i}.ln_2.*", "blocks.{i}.norm2.*"),
            row(
                "transformer.h.{i}.attn.c_attn.*",
                "blocks.{i}.attn.query.* blocks.{i}.attn.key.* blocks.{i}.attn.value.*",
                fused(transposed=True),
            ),
            row("transformer.h.{i}.attn.c_proj.*", "blocks.{i}.attn.proj.*", TRANSPOSED),
            row("transformer.h.{i}.mlp.c_fc.*", "blocks.{i}.mlp.fc1.*", TRANSPOSED),
            row("transformer.h.{i}.mlp.c_proj.*", "blocks.{i}.mlp.fc2.*", TRANSPOSED),
            row("transformer.ln_f.*", "norm.*"),
            row("lm_head.weight", "head.weight"),
        ),
    )
)

_BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")

TRANSFORMERS_MODELS.register("gpt_neox")(
    Architecture(
        preset="pythia_tiny",
        classes=("GPTNeoXForCausalLM",),
        bare=("GPTNeoXModel",),
        prefix="gpt_neox.",
        fields=(
            Field("hidden_size", "dim"),
            Field("num_hidden_layers", "depth"),
            Field("num_attention_heads", "num_heads"),
            Field("intermediate_size", "mlp_hidden"),
            Field("max_position_embeddings", "context_length"),
            Field("vocab_size", "vocab_size"),
            named("hidden_act", "activation", "gelu", ACTIVATIONS),
            named("use_parallel_residual", "norm_position", True, {True: "parallel", False: "pre"}),  # type: ignore
            Field("layer_norm_eps", "norm_eps", 1e-5),
            Field("hidden_dropout", "dropout", 0.0),
            Field("attention_dropout", "attn_dropout", 0.0),
            Field("rope_theta", "rotary_base", 10000.0),
            Field("partial_rotary_factor", "rotary_fraction", 0.25),
            Field("tie_word_embeddings", "tie_embeddings", False),
        ),
        fixed={**FIXED, "attention_bias": (True,), **dict.fromkeys(_BERT_DROPOUTS, (0,))},
        ignored=HARMLESS,
        upgrade=_flat_rope,
        extras=lambda settings: {
            **_nested_rope(settings),
            **{"rotary_emb_base": settings["rope_theta"], "rotary_pct": settings["partial_rotary_factor"]},
        },
        buffers=r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
        rows=(
            row("gpt_neox.embed_in.weight", "stem.embedding.weight"),
            row("gpt_neox.layers.{i}.input_layernorm.*", "blocks.{i}.norm1.*"),
            row("gpt_neox.layers.{i}.post_attention_layernorm.*", "blocks.{i}.norm2.*"),
            row(
                "gpt_neox.layers.{i}.attention.query_key_value.*",
                "blocks.{i}.attn.query.* blocks.{i}.attn.key.* blocks.{i}.attn.value.*",
                fused(heads=lambda settings: settings["num_attention_heads"]),
            ),
            row("gpt_neox.layers.{i}.attention.dense.*", "blocks.{i}.attn.proj.*"),
            row("gpt_neox.layers.{i}.mlp.dense_h_to_4h.*", "blocks.{i}.mlp.fc1.*"),
            row("gpt_neox.layers.{i}.mlp.dense_4h_to_h.*", "blocks.{i}.mlp.fc2.*"),
            row("gpt_neox.final_layer_norm.*", "norm.*"),
            row("embed_out.weight", "head.weight"),
        ),
    )
)

TRANSFORMERS_MODELS.register("llama")(
    Architecture(
        preset="llama_tiny",
        classes=("LlamaForCausalLM",),
        bare=("LlamaModel",),
        prefix="model.",
        fields=(
            Field("hidden_size", "dim"),
            Field("num_hidden_layers", "depth"),
            Field("num_attention_heads", "num_heads"),
            Field("num_key_value_heads", "num_kv_heads", None),
            Field("head_dim", "head_width", None),
            Field("intermediate_size", "mlp_hidden"),
            Field("max_position_embeddings", "context_length"),
            Field("vocab_size", "vocab_size"),
            named("hidden_act", "activation", "silu", ACTIVATIONS),
            Field("rms_norm_eps", "norm_eps", 1e-6),
            Field("attention_dropout", "attn_dropout", 0.0),
            Field("rope_theta", "rotary_base", 10000.0),
            Field("partial_rotary_factor", "rotary_fraction", 1.0),
            Field("tie_word_embeddings", "tie_embeddings", False),
        ),
        fixed={**FIXED, **dict.fromkeys(("attention_bias", "mlp_bias", "rope_interleaved"), (False,))},
        ignored=HARMLESS | {"pretraining_tp", "is_llama_config"},
        upgrade=_flat_rope,
        extras=_llama_extras,
        buffers=r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        rows=(
            row("model.embed_tokens.weight", "stem.embedding.weight"),
            row("model.layers.{i}.input_layernorm.*", "blocks.{i}.norm1.*"),
            row("model.layers.{i}.post_attention_layernorm.*", "blocks.{i}.norm2.*"),
            row("model.layers.{i}.self_attn.q_proj.*", "blocks.{i}.attn.query.*"),
            row("model.layers.{i}.self_attn.k_proj.*", "blocks.{i}.attn.key.*"),
            row("model.layers.{i}.self_attn.v_proj.*", "blocks.{i}.attn.value.*"),
            row("model.layers.{i}.self_attn.o_proj.*", "blocks.{i}.attn.proj.*"),
            row("model.layers.{i}.mlp.gate_proj.*", "blocks.{i}.mlp.gate.*"),
            row("model.layers.{i}.mlp.up_proj.*", "blocks.{i}.mlp.up.*"),
            row("model.layers.{i}.mlp.down_proj.*", "blocks.{i}.mlp.down.*"),
            row("model.norm.*", "norm.*"),
            row("lm_head.weight", "head.weight"),
        ),
    )
)


def _bert(name: str, prefix: str, head: tuple[str, str, str], offset: int, **more: Any) -> Architecture:
    """Build BERT's architecture, shared by RoBERTa.

    Args:
        name: Preset.
        prefix: Prefix of the encoder's tensors.
        head: Prefixes of the head's bias and vocabulary projection, dense layer and norm.
        offset: Unused positions before the first.
        more: Further arguments of the architecture.
    """
    layer = prefix + "encoder.layer.{i}."
    return Architecture(
        preset=name,
        prefix=prefix,
        fields=(
            Field("hidden_size", "dim"),
            Field("num_hidden_layers", "depth"),
            Field("num_attention_heads", "num_heads"),
            Field("intermediate_size", "mlp_hidden"),
            Field(
                "max_position_embeddings",
                "context_length",
                read=lambda value, settings: value - offset,
                write=lambda value, settings: value + offset,
            ),
            Field("vocab_size", "vocab_size"),
            named("hidden_act", "activation", "gelu", ACTIVATIONS),
            Field("layer_norm_eps", "norm_eps", 1e-12),
            Field("hidden_dropout_prob", "dropout", 0.1),
            Field("attention_probs_dropout_prob", "attn_dropout", 0.1),
            Field("tie_word_embeddings", "tie_embeddings", True),
        ),
        buffers=rf"({re.escape(prefix)})?embeddings\.(position|token_type)_ids",
        ignored=HARMLESS
        | {"type_vocab_size", "directionality", "pooler_fc_size", "pooler_num_attention_heads"}
        | {"pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"},
        extras=lambda settings: {"type_vocab_size": 1},
        rows=(
            row(f"{prefix}embeddings.word_embeddings.weight", "stem.embedding.weight"),
            row(
                f"{prefix}embeddings.position_embeddings.weight {prefix}embeddings.token_type_embeddings.weight",
                "stem.positions",
                _with_segment(offset),
            ),
            row(f"{prefix}embeddings.LayerNorm.*", "stem.norm.*"),
            row(f"{layer}attention.self.query.*", "blocks.{i}.attn.query.*"),
            row(f"{layer}attention.self.key.*", "blocks.{i}.attn.key.*"),
            row(f"{layer}attention.self.value.*", "blocks.{i}.attn.value.*"),
            row(f"{layer}attention.output.dense.*", "blocks.{i}.attn.proj.*"),
            row(f"{layer}attention.output.LayerNorm.*", "blocks.{i}.norm1.*"),
            row(f"{layer}intermediate.dense.*", "blocks.{i}.mlp.fc1.*"),
            row(f"{layer}output.dense.*", "blocks.{i}.mlp.fc2.*"),
            row(f"{layer}output.LayerNorm.*", "blocks.{i}.norm2.*"),
            row(f"{head[0]}.bias", "head.bias"),
            row(f"{head[1]}.*", "head.dense.*"),
            row(f"{head[2]}.*", "head.norm.*"),
            row(f"{head[0]}.decoder.weight", "head.weight"),
        ),
        spellings={
            r"\.LayerNorm\.gamma$": ".LayerNorm.weight",
            r"\.LayerNorm\.beta$": ".LayerNorm.bias",
            r"\.decoder\.bias$": ".bias",  # the same parameter
        },
        **more,
    )


TRANSFORMERS_MODELS.register("bert")(
    _bert(
        "bert_tiny",
        "bert.",
        ("cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        offset=0,
        classes=("BertForMaskedLM", "BertForPreTraining"),
        bare=("BertModel",),
        fixed={**FIXED, "position_embedding_type": ("absolute",)},
        unused=r"(bert\.)?pooler\.dense\.\w+|cls\.seq_relationship\.\w+",
    )
)

TRANSFORMERS_MODELS.register("roberta")(
    _bert(
        "roberta_tiny",
        "roberta.",
        ("lm_head", "lm_head.dense", "lm_head.layer_norm"),
        offset=2,  # positions count from the id of the padding
        classes=("RobertaForMaskedLM",),
        bare=("RobertaModel",),
        fixed={**FIXED, "position_embedding_type": ("absolute",), "pad_token_id": (1,)},
        unused=r"(roberta\.)?pooler\.dense\.\w+",
    )
)

TRANSFORMERS_MODELS.register("rwkv")(
    Architecture(
        preset="rwkv4_tiny",
        parts={"num_heads": 1},
        classes=("RwkvForCausalLM",),
        bare=("RwkvModel",),
        prefix="rwkv.",
        fields=(
            Field("hidden_size", "dim"),
            Field(
                "attention_hidden_size",
                "dim",
                None,
                read=lambda value, settings: settings["hidden_size"] if value is None else value,
            ),
            Field("num_hidden_layers", "depth"),
            Field("intermediate_size", "mlp_hidden", None),
            Field("context_length", "context_length", 1024),
            Field("vocab_size", "vocab_size"),
            Field("layer_norm_epsilon", "norm_eps", 1e-5),
            Field("tie_word_embeddings", "tie_embeddings", False),
        ),
        fixed=FIXED,
        ignored=HARMLESS | {"rescale_every"},
        extras=lambda settings: {"rescale_every": 0},
        rows=(
            row("rwkv.embeddings.weight", "stem.embedding.weight"),
            row("rwkv.blocks.0.pre_ln.*", "stem.norm.*"),
            row("rwkv.blocks.{i}.ln1.*", "blocks.{i}.norm1.*"),
            row("rwkv.blocks.{i}.ln2.*", "blocks.{i}.norm2.*"),
            row("rwkv.blocks.{i}.attention.time_decay", "blocks.{i}.attn.time_decay"),
            row("rwkv.blocks.{i}.attention.time_first", "blocks.{i}.attn.time_first"),
            row("rwkv.blocks.{i}.attention.time_mix_key", "blocks.{i}.attn.mix_key", _LAST),
            row("rwkv.blocks.{i}.attention.time_mix_value", "blocks.{i}.attn.mix_value", _LAST),
            row("rwkv.blocks.{i}.attention.time_mix_receptance", "blocks.{i}.attn.mix_receptance", _LAST),
            row("rwkv.blocks.{i}.attention.key.*", "blocks.{i}.attn.key.*"),
            row("rwkv.blocks.{i}.attention.value.*", "blocks.{i}.attn.value.*"),
            row("rwkv.blocks.{i}.attention.receptance.*", "blocks.{i}.attn.receptance.*"),
            row("rwkv.blocks.{i}.attention.output.*", "blocks.{i}.attn.proj.*"),
            row("rwkv.blocks.{i}.feed_forward.time_mix_key", "blocks.{i}.mlp.mix_key", _LAST),
            row("rwkv.blocks.{i}.feed_forward.time_mix_receptance", "blocks.{i}.mlp.mix_receptance", _LAST),
            row("rwkv.blocks.{i}.feed_forward.key.*", "blocks.{i}.mlp.key.*"),
            row("rwkv.blocks.{i}.feed_forward.value.*", "blocks.{i}.mlp.value.*"),
            row("rwkv.blocks.{i}.feed_forward.receptance.*", "blocks.{i}.mlp.receptance.*"),
            row("rwkv.ln_out.*", "norm.*"),
            row("head.weight", "head.weight"),
        ),
    )
)

TRANSFORMERS_MODELS.register("vit")(
    Architecture(
        preset="vit_tiny_patch16_224",
        classes=("ViTForImageClassification",),
        bare=("ViTModel",),
        prefix="vit.",
        fields=(
            Field("hidden_size", "dim"),
            Field("num_hidden_layers", "depth"),
            Field("num_attention_heads", "num_heads"),
            Field("intermediate_size", "mlp_hidden"),
            Field("image_size", "image_size", 224),
            Field("patch_size", "patch_size", 16),
            Field("num_channels", "in_chans", 3),
            Field(
                "id2label",
                "num_classes",
                None,
                read=lambda value, settings: len(value) if isinstance(value, dict) else settings.get("num_labels", 2),
                write=lambda value, settings: {str(label): f"LABEL_{label}" for label in range(value)},
            ),
            named("hidden_act", "activation", "gelu", ACTIVATIONS),
            Field("layer_norm_eps", "norm_eps", 1e-12),
            Field("hidden_dropout_prob", "dropout", 0.0),
            Field("attention_probs_dropout_prob", "attn_dropout", 0.0),
        ),
        fixed={**FIXED, "qkv_bias": (True,)},
        ignored=HARMLESS | {"encoder_stride", "pooler_act", "pooler_output_size"},
        unused=r"(vit\.)?(pooler\.dense\.\w+|embeddings\.mask_token)",
        rows=(
            row("vit.embeddings.cls_token", "stem.cls_token"),
            row("vit.embeddings.position_embeddings", "stem.pos_embed"),
            row("vit.embeddings.patch_embeddings.projection.*", "stem.patch_embed.proj.*"),
            row("vit.encoder.layer.{i}.layernorm_before.*", "blocks.{i}.norm1.*"),
            row("vit.encoder.layer.{i}.layernorm_after.*", "blocks.{i}.norm2.*"),
            row("vit.encoder.layer.{i}.attention.attention.query.*", "blocks.{i}.attn.query.*"),
            row("vit.encoder.layer.{i}.attention.attention.key.*", "blocks.{i}.attn.key.*"),
            row("vit.encoder.layer.{i}.attention.attention.value.*", "blocks.{i}.attn.value.*"),
            row("vit.encoder.layer.{i}.attention.output.dense.*", "blocks.{i}.attn.proj.*"),
            row("vit.encoder.layer.{i}.intermediate.dense.*", "blocks.{i}.mlp.fc1.*"),
            row("vit.encoder.layer.{i}.output.dense.*", "blocks.{i}.mlp.fc2.*"),
            row("vit.layernorm.*", "norm.*"),
            row("classifier.*", "head.fc.*"),
        ),
    )
)
