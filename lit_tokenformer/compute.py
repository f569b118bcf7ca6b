"""Parameters and floating-point operations of a model in closed form, and what a growth schedule costs.

A multiply-add counts as two operations, and only matrix products and convolutions count, as in
``torch.utils.flop_counter``. The formulas agree with arXiv 2410.23168, Table 3 (camera-ready).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_tokenformer.models import TokenformerConfig

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


def _linear(config: TokenformerConfig, num_tokens: int, dim_in: int, dim_out: int) -> Cost:
    return Cost(dim_in * dim_out + config.bias * dim_out, 2 * dim_in * dim_out, dim_in)


def _pattention(config: TokenformerConfig, num_tokens: int, dim_in: int, dim_out: int) -> Cost:
    size = num_tokens * (dim_in + dim_out)
    return Cost(size, 2 * size, dim_in + 3 * num_tokens)  # scores, normalised scores, weights


_PROJECTIONS = {"linear": _linear, "pattention": _pattention}


def _mlp(config: TokenformerConfig, tokens: Totals) -> Cost:
    project, hidden = _PROJECTIONS[config.projection], config.mlp_hidden
    up = project(config, tokens.get("ffn", 0), config.dim, hidden)
    return up + project(config, tokens.get("ffn", 0), hidden, config.dim) + Cost(0, 0, hidden)


def _pattention_ffn(config: TokenformerConfig, tokens: Totals) -> Cost:
    return _pattention(config, tokens["ffn"], config.dim, config.dim)


_FEED_FORWARDS = {"mlp": _mlp, "pattention": _pattention_ffn}


def _block(config: TokenformerConfig, tokens: Totals) -> Cost:
    dim, length = config.dim, config.num_data_tokens
    project = _PROJECTIONS[config.projection]
    qkv = project(config, tokens.get("qkv", 0), dim, dim)
    attention = Cost(0, 4 * length * dim, 4 * dim)  # scores and mixing; queries, keys, values and outputs are kept
    norms = Cost(4 * dim if config.norm_affine else 0, 0, 2 * dim)
    proj = project(config, tokens.get("proj", 0), dim, dim)
    return qkv + qkv + qkv + attention + proj + norms + _FEED_FORWARDS[config.feed_forward](config, tokens)


def _recomputed(config: TokenformerConfig, tokens: Totals) -> int:
    """Operations, for each data token, of the second forward pass through all blocks under checkpointing.

    It ends where everything that the backward pass needs is there again. The last product of a block is not needed, but
    where stochastic depth multiplies it (every block but the first, whose rate is 0).
    """
    linear = config.feed_forward == "mlp" and config.projection == "linear"
    last = 2 * config.dim * (config.mlp_hidden if linear else tokens["ffn"])
    spared = 1 if config.drop_path > 0 else config.depth
    return config.depth * _block(config, tokens).flops - spared * last


def _patch_stem(config: TokenformerConfig) -> Cost:
    dim, length = config.dim, config.num_data_tokens
    pixels = config.in_chans * config.patch_size**2
    patches = length - config.num_prefix_tokens
    parameters = pixels * dim + dim + length * dim + config.num_prefix_tokens * dim
    return Cost(parameters, 2 * patches * pixels * dim, length * dim)


def _token_stem(config: TokenformerConfig) -> Cost:
    return Cost(config.vocab_size * config.dim, 0, config.num_data_tokens * config.dim)


def _image_head(config: TokenformerConfig) -> Cost:
    size = config.dim * config.num_classes
    return Cost(size + config.num_classes, 2 * size, config.num_data_tokens * config.dim)


def _language_head(config: TokenformerConfig) -> Cost:
    size, length = config.dim * config.vocab_size, config.num_data_tokens
    return Cost(0 if config.tie_embeddings else size, 2 * size * length, length * config.dim)


_STEMS = {"patch": _patch_stem, "token": _token_stem}
"""What stems cost: parameters, and operations and kept numbers for each sample."""
_HEADS = {"image": _image_head, "language": _language_head}
"""What heads cost: parameters, and operations and kept numbers for each sample."""


@dataclass(frozen=True)
class ModelCost:
    """What a whole model costs; a sample is an image, or a text of ``context_length``.

    Args:
        parameters: Numbers that are learned.
        data_tokens: Data tokens of each sample, T.
        flops: Operations of one forward pass, for each sample.
        training_flops: Operations of one forward and backward pass, for each sample.
        kept: Numbers kept for the backward pass, for each sample (an estimate).
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
        tokens: Parameter tokens of each kind; ``None`` takes those at birth.
        checkpointing: Whether blocks are computed again in the backward pass.

    Example:
        >>> from lit_tokenformer.models import preset_config
        >>> model_cost(preset_config("tokenformer_vit_base_matched_patch16_224")).parameters
        86447848
    """
    totals = dict(config.tokens.items()) if tokens is None else tokens
    dim, depth, length = config.dim, config.depth, config.num_data_tokens
    block, stem, head = _block(config, totals), _STEMS[config.stem](config), _HEADS[config.head](config)
    again = _recomputed(config, totals) * length if checkpointing else 0
    return ModelCost(
        parameters=stem.parameters + depth * block.parameters + 2 * dim + head.parameters,
        data_tokens=length,
        flops=stem.flops + depth * block.flops * length + head.flops,
        # the stem's input needs no gradient, so its backward pass is one product instead of two
        training_flops=2 * stem.flops + 3 * depth * block.flops * length + again + 3 * head.flops,
        kept=stem.kept + head.kept + length * (depth * dim + block.kept if checkpointing else depth * block.kept),
    )


@dataclass(frozen=True)
class Stage:
    """The part of a training run between two growths.

    Args:
        start: The epoch or step at which it begins.
        steps: Optimizer steps in it.
        tokens: Parameter tokens of each kind.
        cost: What the model costs at this size.
        training_flops: Operations of all its steps together.
    """

    start: int
    steps: int
    tokens: dict[str, int]
    cost: ModelCost
    training_flops: int


def plan_stages(
    config: TokenformerConfig,
    growths: Sequence[tuple[int, int, dict[str, int]]],
    total_steps: int,
    samples_per_step: int,
) -> list[Stage]:
    """The stages of a run.

    Args:
        config: The architecture at birth.
        growths: For each growth in order: its key in the schedule, the step at which it is due, the totals.
        total_steps: Optimizer steps of the whole run.
        samples_per_step: Samples in one optimizer step, over all processes.

    Returns:
        One stage more than there are growths; the last one's size is the final one.
    """
    starts = [(0, 0, dict(config.tokens.items())), *growths]
    ends = [min(step, total_steps) for _, step, _ in growths] + [total_steps]
    stages = []
    for (key, first, tokens), end in zip(starts, ends, strict=True):
        cost, steps = model_cost(config, tokens), max(0, end - first)
        stages.append(Stage(key, steps, tokens, cost, cost.training_flops * samples_per_step * steps))
    return stages
