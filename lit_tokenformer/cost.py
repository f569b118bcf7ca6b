"""Parameters and floating-point operations of a model in closed form.

A multiply-add counts as two operations, and only matrix products and convolutions count, as in
``torch.utils.flop_counter``. The formulas agree with arXiv 2410.23168, Table 3 (camera-ready).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.models import SCORE_NORMS, TokenformerConfig

Totals = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """What one map of the model costs: parameters, operations for each data token, and activations kept for backward.

    Args:
        parameters: Numbers that are learned.
        flops: Operations of the forward pass for each data token.
        kept: Numbers kept for the backward pass for each data token.
    """

    parameters: int
    flops: int
    kept: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.flops + other.flops, self.kept + other.kept)


NOTHING = Cost(0, 0, 0)

Parts = dict[str, Cost]
"""Costs of the projections of each kind, and of what is not a projection (``rest``)."""


def _linear(config: TokenformerConfig, num_tokens: int, dim_in: int, dim_out: int, bias: bool) -> Cost:
    return Cost(dim_in * dim_out + bias * dim_out, 2 * dim_in * dim_out, dim_in)


def _pattention(config: TokenformerConfig, num_tokens: int, dim_in: int, dim_out: int, bias: bool) -> Cost:
    size = num_tokens * (dim_in + dim_out)
    kept = num_tokens + 1 if _by_hand(config) else 3 * num_tokens  # scores, normalised scores, weights
    return Cost(size, 2 * size, dim_in + kept)


def _by_hand(config: TokenformerConfig, series: int = 1) -> bool:
    """Whether a Pattention has a backward pass by hand."""
    return SCORE_NORMS[config.score_norm].whole is not None and series == 1


_PROJECTIONS = {"linear": _linear, "pattention": _pattention}


def _project(
    config: TokenformerConfig, num_tokens: int, dim_in: int, dim_out: int, count: int = 1, bias: bool | None = None
) -> Cost:
    """``count`` projections (..., dim_in) -> (..., dim_out) of one input, which is kept once."""
    wanted = config.bias if bias is None else bias
    one = _PROJECTIONS[config.projection](config, num_tokens, dim_in, dim_out, wanted)
    return Cost(count * one.parameters, count * one.flops, dim_in + count * (one.kept - dim_in))


def _attention(config: TokenformerConfig, tokens: Totals) -> Parts:
    dim, length = config.dim, config.num_data_tokens
    return {
        "qkv": _project(config, tokens.get("qkv", 0), dim, dim, count=3),
        "proj": _project(config, tokens.get("proj", 0), dim, dim),
        "rest": Cost(0, 4 * length * dim, 4 * dim),  # scores and mixing; queries, keys, values and outputs are kept
    }


def _wkv(config: TokenformerConfig, tokens: Totals) -> Parts:
    dim = config.dim
    return {
        "qkv": _project(config, tokens.get("qkv", 0), dim, dim, count=3),
        "proj": _project(config, tokens.get("proj", 0), dim, dim),
        # inputs of their own (two more), key, value, the sums (two), gate, what it is made from, and what it gates
        "rest": Cost(5 * dim, 0, 9 * dim),
    }


_MIXERS = {"attention": _attention, "wkv": _wkv}


def _activation(config: TokenformerConfig) -> Cost:
    width = config.mlp_hidden
    return Cost(2 * width * config.series if config.series > 1 else 0, 0, width * config.series)


def _mlp(config: TokenformerConfig, tokens: Totals) -> Parts:
    dim, hidden, total = config.dim, config.mlp_hidden, tokens.get("ffn", 0)
    up, down = _project(config, total, dim, hidden), _project(config, total, hidden, dim)
    return {"ffn": up + down, "rest": _activation(config)}


def _glu(config: TokenformerConfig, tokens: Totals) -> Parts:
    dim, hidden, total = config.dim, config.mlp_hidden, tokens.get("ffn", 0)
    into, down = _project(config, total, dim, hidden, count=2, bias=False), _project(config, total, hidden, dim)
    return {"ffn": into + down, "rest": _activation(config) + Cost(0, 0, 2 * hidden)}


def _channel_mix(config: TokenformerConfig, tokens: Totals) -> Parts:
    dim, hidden, total = config.dim, config.mlp_hidden, tokens.get("ffn", 0)
    key, value = _project(config, total, dim, hidden), _project(config, total, hidden, dim)
    gate = _project(config, total, dim, dim)
    return {"ffn": key + value + gate, "rest": Cost(2 * dim, 0, 2 * dim + hidden)}


def _pattention_ffn(config: TokenformerConfig, tokens: Totals) -> Parts:
    one = _pattention(config, tokens["ffn"], config.dim, config.dim, False)
    if config.series == 1:
        return {"ffn": one, "rest": NOTHING}
    wide = config.series * tokens["ffn"]
    kept = config.dim + tokens["ffn"] * 2 + wide - one.kept  # scores, normalised scores, terms
    return {"ffn": one + Cost(2 * wide, 0, kept), "rest": NOTHING}


_FEED_FORWARDS = {"mlp": _mlp, "glu": _glu, "channel_mix": _channel_mix, "pattention": _pattention_ffn}


def _norm(config: TokenformerConfig, affine: bool = True) -> Cost:
    parameters = {"layer_norm": 2, "rms_norm": 1}[config.norm] * config.dim
    return Cost(parameters if affine else 0, 0, config.dim)


def _block(config: TokenformerConfig, tokens: Totals) -> Parts:
    """What a block costs, by the kind of its projections."""
    mixer, feed_forward = _MIXERS[config.mixer](config, tokens), _FEED_FORWARDS[config.feed_forward](config, tokens)
    shortcut, norm = 2 * config.dim * config.shortcut_dim, _norm(config, config.norm_affine)
    beside = Cost(shortcut, 2 * shortcut, 2 * config.shortcut_dim)
    rest = mixer["rest"] + feed_forward["rest"] + norm + norm + beside
    return {"qkv": mixer["qkv"], "proj": mixer["proj"], "ffn": feed_forward["ffn"], "rest": rest}


def _sum(parts: Parts) -> Cost:
    return sum(parts.values(), start=NOTHING)


def _recomputed(config: TokenformerConfig, tokens: Totals) -> int:
    """Operations, for each data token, of the second forward pass through all blocks under checkpointing.

    It ends where everything that the backward pass needs is there again. The last product of a block is not needed, but
    where something multiplies or normalises it: channel mix, dropout, a norm after it, or stochastic depth (every
    block but the first, whose rate is 0). A Pattention with a backward pass by hand is computed as a whole.
    """
    dropped = config.dropout > 0 and config.feed_forward != "glu"
    linear = config.feed_forward != "pattention" and config.projection == "linear"
    whole = not linear and _by_hand(config, config.series if config.feed_forward == "pattention" else 1)
    if config.feed_forward == "channel_mix" or config.norm_position == "post" or dropped or whole:
        spared = 0
    else:
        spared = 1 if config.drop_path > 0 else config.depth
    last = 2 * config.dim * (config.mlp_hidden if linear else tokens.get("ffn", 0))
    return config.depth * _sum(_block(config, tokens)).flops - spared * last


def _patch_stem(config: TokenformerConfig) -> Cost:
    dim, length = config.dim, config.num_positions  # patches are left out after the stem
    pixels = config.in_chans * config.patch_size**2
    patches = length - config.num_prefix_tokens
    parameters = pixels * dim + dim + length * dim + config.num_prefix_tokens * dim
    return Cost(parameters, 2 * patches * pixels * dim, length * dim)


def _token_stem(config: TokenformerConfig) -> Cost:
    rows = config.vocab_size + (config.context_length if config.positions == "learned" else 0)
    norm = _norm(config).parameters if config.stem_norm else 0
    return Cost(rows * config.dim + norm, 0, config.num_data_tokens * config.dim)


def _image_head(config: TokenformerConfig) -> Cost:
    size = config.dim * config.num_classes
    return Cost(size + config.num_classes, 2 * size, config.num_data_tokens * config.dim)


def _language_head(config: TokenformerConfig) -> Cost:
    size, length = config.dim * config.vocab_size, config.num_data_tokens
    return Cost(0 if config.tie_embeddings else size, 2 * size * length, length * config.dim)


def _masked_language_head(config: TokenformerConfig) -> Cost:
    logits, dense, length = _language_head(config), config.dim**2, config.num_data_tokens
    parameters = config.vocab_size + dense + config.dim + _norm(config).parameters
    return logits + Cost(parameters, 2 * dense * length, 2 * length * config.dim)


_STEMS = {"patch": _patch_stem, "token": _token_stem}
"""What stems cost: parameters, and operations and kept numbers for each sample."""
_HEADS = {"image": _image_head, "language": _language_head, "masked_language": _masked_language_head}
"""What heads cost: parameters, and operations and kept numbers for each sample."""


@dataclass(frozen=True)
class ModelCost:
    """What a whole model costs; a sample is an image, or a text of ``context_length``.

    Args:
        parameters: Numbers that are learned.
        data_tokens: Data tokens of each training sample, T.
        flops: Operations of one forward pass, for each sample.
        training_flops: Operations of one forward and backward pass, for each sample.
        kept: Numbers kept for the backward pass, for each sample (an estimate, without masks of dropout).
    """

    parameters: int
    data_tokens: int
    flops: int
    training_flops: int
    kept: int

    def training_memory(self, batch_size: int, bytes_per_number: int = 4, states: int = 2) -> int:
        """Bytes that training takes: weights, gradients, optimizer states and what is kept for backward (an estimate).

        Args:
            batch_size: Samples in one forward pass.
            bytes_per_number: 4 in float32, 2 in half precision.
            states: Numbers that the optimizer keeps for each parameter; 2 for Adam.
        """
        return bytes_per_number * (self.parameters * (2 + states) + self.kept * batch_size)


def model_cost(config: TokenformerConfig, tokens: Totals | None = None, checkpointing: bool = False) -> ModelCost:
    """Parameters and operations of a model.

    Args:
        config: The architecture.
        tokens: Parameter tokens of each kind, and ``depth`` where it is another than at birth; ``None`` takes those at
            birth.
        checkpointing: Whether blocks are computed again in the backward pass.

    Example:
        >>> from lit_tokenformer.models import preset_config
        >>> model_cost(preset_config("tokenformer_vit_base_matched_patch16_224")).parameters
        86447848
    """
    totals = dict(config.tokens.items()) if tokens is None else tokens
    config = replace(config, depth=totals.get("depth", config.depth))
    dim, depth, length = config.dim, config.depth, config.num_data_tokens
    norm = NOTHING if config.norm_position == "post" else _norm(config)
    block, stem, head = _sum(_block(config, totals)), _STEMS[config.stem](config), _HEADS[config.head](config)
    again = _recomputed(config, totals) * length if checkpointing else 0
    every = replace(config, patch_drop_rate=0.0)  # out of training nothing is left out
    forward = depth * _sum(_block(every, totals)).flops * every.num_data_tokens
    return ModelCost(
        parameters=stem.parameters + depth * block.parameters + norm.parameters + head.parameters,
        data_tokens=length,
        flops=stem.flops + forward + head.flops,
        # the stem's input needs no gradient, so its backward pass is one product instead of two
        training_flops=2 * stem.flops + 3 * depth * block.flops * length + again + 3 * head.flops,
        kept=stem.kept + head.kept + length * (depth * dim + block.kept if checkpointing else depth * block.kept),
    )


def match_tokens(config: TokenformerConfig, reference: TokenformerConfig, by: str = "parameters") -> dict[str, int]:
    """Parameter tokens at which a model's blocks cost what those of another model cost.

    The projections of each kind are matched to those of the same kind, and the feed-forward takes up what remains.
    Embedding and head do not count.

    Args:
        config: The architecture that tokens are wanted for.
        reference: The architecture to be matched, at birth.
        by: ``parameters``, or ``flops`` (operations for each data token).

    Returns:
        A total for each kind; kinds without a Pattention layer keep theirs.

    Raises:
        ValueError: If no projection is a Pattention layer, if the rest of the model alone costs more than the
            reference, or for another ``by``.

    Example:
        >>> from lit_tokenformer.models import preset_config
        >>> match_tokens(preset_config("tokenformer_150m"), preset_config("transformer_124m"))
        {'qkv': 384, 'proj': 384, 'ffn': 3072}
    """
    if by not in ("parameters", "flops"):
        raise unknown_name("match", by, ("parameters", "flops"))

    def cost(config: TokenformerConfig, tokens: Totals) -> dict[str, int]:
        return {kind: config.depth * getattr(part, by) for kind, part in _block(config, tokens).items()}

    wanted = cost(reference, dict(reference.tokens.items()))
    tokens = dict(config.tokens.items())
    ones, twos = (dict.fromkeys(tokens, n) for n in (1, 2))
    step = {kind: cost(config, twos)[kind] - cost(config, ones)[kind] for kind in tokens}
    if not step["ffn"]:
        raise UserError("match: the feed-forward has no Pattention layer whose tokens could be chosen")
    for kind in ("qkv", "proj"):
        if step[kind]:
            tokens[kind] = max(1, round(wanted[kind] / step[kind]))
    left = sum(wanted.values()) - sum(cost(config, {**tokens, "ffn": 1}).values())
    tokens["ffn"] = 1 + round(left / step["ffn"])
    if tokens["ffn"] < 1:
        raise UserError(f"match: all but the feed-forward has more {by} than the model to be matched")
    return tokens
