"""Architecture config: sizes and names of parts, validated at construction.

A config describes the initial model. The *current* number of parameter tokens is read from the layers
(:attr:`Tokenformer.param_tokens`), because growth changes the layers and never the config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.registry import (
    ACTIVATIONS,
    FEED_FORWARDS,
    HEADS,
    INITS,
    MIXERS,
    NORMS,
    POSITIONS,
    PROJECTIONS,
    SCORE_NORMS,
    STEMS,
    Registry,
)

Tokens = int | dict[str, int]
"""Parameter tokens as users write them: one number, or totals by kind of projection."""


@dataclass(frozen=True)
class ParamTokens:
    """Parameter tokens by kind of projection.

    Args:
        qkv: Parameter tokens of each query, key and value projection.
        proj: Parameter tokens of the attention output projection.
        ffn: Parameter tokens of the feed-forward.
    """

    qkv: int
    proj: int
    ffn: int

    def __post_init__(self) -> None:
        for kind, total in self.items():
            if isinstance(total, bool) or not isinstance(total, int) or total < 1:
                raise UserError(f"param_tokens.{kind}: expected a whole number of at least 1, got {total!r}")

    def items(self) -> list[tuple[str, int]]:
        """Pairs ``(kind, total)`` in a fixed order."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]

    @classmethod
    def parse(cls, tokens: Tokens, base: ParamTokens | None = None) -> ParamTokens:
        """Parse user input into totals by kind.

        Args:
            tokens: A single n is ``qkv=n, proj=n, ffn=4n`` (the published proportion); a mapping gives totals by kind.
            base: Defaults for kinds missing from the mapping.

        Returns:
            Totals of every kind.

        Raises:
            UserError: If a kind is unknown or has no total, or a total is not an integer >= 1.

        Example:
            >>> ParamTokens.parse(96)
            ParamTokens(qkv=96, proj=96, ffn=384)
            >>> ParamTokens.parse({"ffn": 512}, base=ParamTokens(96, 96, 384))
            ParamTokens(qkv=96, proj=96, ffn=512)
        """
        if isinstance(tokens, int) and not isinstance(tokens, bool):
            return cls(qkv=tokens, proj=tokens, ffn=4 * tokens)
        if not isinstance(tokens, Mapping):
            raise UserError(f"param_tokens: expected a whole number or totals for each kind, got {tokens!r}")
        kinds = [field.name for field in fields(cls)]
        for kind in tokens:
            if kind not in kinds:
                raise unknown_name("param_tokens", kind, kinds)
        if base is None:
            missing = [kind for kind in kinds if kind not in tokens]
            if missing:
                raise UserError(f"param_tokens: missing totals: {', '.join(missing)}")
            return cls(**tokens)
        return replace(base, **tokens)


KINDS = tuple(field.name for field in fields(ParamTokens))
"""Kinds of projection that a growth schedule can name."""
OTHER = "other"
"""Kind of all other Pattention layers, as in a user's own model."""


_PARTS: dict[str, Registry[Any]] = {
    "stem": STEMS,
    "head": HEADS,
    "mixer": MIXERS,
    "positions": POSITIONS,
    "projection": PROJECTIONS,
    "feed_forward": FEED_FORWARDS,
    "activation": ACTIVATIONS,
    "score_norm": SCORE_NORMS,
    "norm": NORMS,
    "init": INITS,
}
"""Fields that name a part, with the registry of each."""

_CHOICES = {"norm_position": ("pre", "post", "parallel"), "global_pool": ("token", "avg")}
"""Fields with a fixed set of values."""


MAY_CHANGE = {
    *("param_tokens", "depth", "mlp_ratio", "experts", "experts_balance"),
    *("image_size", "num_classes", "global_pool", "vocab_size", "context_length"),
    *("dropout", "attn_dropout", "drop_path", "patch_drop_rate", "init", "rotary_base"),
    *("tie_embeddings", "unpad", "low_precision_norm"),
}
"""Fields that may differ when weights are loaded; all others change what the same weights compute."""


OF_EXPERTS = ("experts_top_k", "shared_experts", "expert_groups", "experts_balance", "router")
"""Fields without effect in a model with a single expert."""


@dataclass(frozen=True)
class TokenformerConfig:
    """One architecture: sizes and names of parts.

    Args:
        dim: Width of the residual stream, D.
        depth: Number of blocks, L.
        num_heads: Number of attention heads, H; must divide ``dim`` unless ``head_dim`` is set.
        head_dim: Width of each attention head, d; ``None`` for ``dim / num_heads``.
        num_kv_heads: Number of key and value heads in ``attention``; must divide ``num_heads``. Below ``num_heads``,
            several query heads share one (grouped-query attention), and growth counts ``kv_heads`` with their queries
            in place of ``heads``. ``None`` for one each.
        param_tokens: Initial parameter tokens: n (qkv n, proj n, ffn 4n) or ``{qkv: n, proj: n, ffn: m}``.
        projection: Layer type of query, key, value and output projections: ``pattention`` or ``linear``.
        mixer: Token mixer: softmax ``attention``, or RWKV-4's ``wkv`` with a token shift.
        feed_forward: Feed-forward type: ``pattention`` (one layer, as published), ``mlp`` (two projections and an
            activation), ``glu`` (gated) or RWKV-4's ``channel_mix``.
        score_norm: Score normalization of Pattention: ``l2_gelu`` (published), ``gelu_l2``, ``softmax`` or ``gelu``.
        mlp_ratio: Ratio of hidden units to ``dim`` in ``mlp``, ``glu`` and ``channel_mix``.
        activation: Activation of ``mlp`` and ``glu``: ``gelu``, ``gelu_tanh`` (tanh approximation), ``silu`` or
            ``relu``.
        series: Terms of the activation in ``mlp``, ``glu`` and ``pattention`` feed-forwards; above 1, PanGu-pi's series
            informed activation.
        shortcut_reduction: Ratio of ``dim`` to the width of PanGu-pi's augmented shortcut around the mixer; 0 disables
            it.
        bias: Enable bias for linear projections; Pattention and the input projections of ``glu`` have none.
        norm: Normalization layer: ``layer_norm`` or ``rms_norm``.
        norm_position: ``pre``, ``post`` (after each residual sum, without a final norm) or ``parallel`` (mixer and
            feed-forward read the same input, each through its own norm).
        norm_affine: Enable weight and bias of the norms inside the blocks; all other norms have them.
        norm_eps: Epsilon of every norm.
        low_precision_norm: Compute layer norms in autocast's precision instead of float32.
        stem_norm: Normalize the embedding.
        init: Weight initialization: ``trunc_normal`` (ViT), ``normal`` (BERT), ``gpt2``, ``neox`` or ``rwkv``;
            Pattention always uses the published one.
        dropout: Dropout rate after the embedding, the mixer and the feed-forward (in a ``glu``, before its output
            projection).
        attn_dropout: Attention dropout rate.
        drop_path: Stochastic depth rate of the last block; it rises linearly from 0 at the first block.
        patch_drop_rate: Share of patches dropped at random in training (timm's ``PatchDropout``).
        causal: Use causal attention.
        positions: Position encoding: ``learned`` (added by the stem), ``rotary`` (RoPE), ``alibi`` or ``none``.
        rotary_fraction: Share of each head's dimensions rotated by ``rotary``, starting from the first.
        rotary_base: Base of the rotary frequencies.
        stem: Input embedding: ``patch`` (images) or ``token`` (token ids).
        head: Output head: ``image`` (class logits), ``language`` (vocabulary logits) or ``masked_language``
            (vocabulary logits after a dense layer).
        image_size: Input image size in pixels: height = width, or ``(height, width)``.
        patch_size: Patch size in pixels (square); must divide ``image_size``.
        in_chans: Number of image input channels.
        num_classes: Number of classes of the head; 0 removes the linear layer.
        global_pool: Type of global pooling: ``token`` (class token) or ``avg`` (mean of the patch tokens).
        class_token: Prepend a class token to the patches.
        vocab_size: Vocabulary size, V.
        context_length: Maximum sequence length in tokens, T.
        tie_embeddings: Share the weights of the token embedding with the language head.
        unpad: Remove padding before all per-token layers; only attention sees it.
        experts: Feed-forwards of each block, E, of which a router chooses ``experts_top_k`` for each data token; 1 for
            a single feed-forward without a router.
        experts_top_k: Experts of each data token, k.
        shared_experts: Further feed-forwards that every data token uses, with ``experts`` above 1.
        expert_groups: Shards of the feed-forward's parameter tokens, for each of which an expert is chosen; 1 chooses
            whole feed-forwards.
        experts_balance: Largest change of an expert's routing bias per optimizer step, which balances the load,
            relative to the mean probability 1 / E.
        router: Routing: ``top_k``, the experts of each data token.
        layers: Repeating pattern of blocks: names of mixers, or ``mixer+feed_forward`` to set the feed-forward too, as
            in ``[wkv, wkv, attention+mlp]``; ``None`` uses ``mixer`` in every block.
    """

    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    head_dim: int | None = None
    num_kv_heads: int | None = None
    param_tokens: Tokens = 384
    projection: str = "pattention"
    mixer: str = "attention"
    feed_forward: str = "pattention"
    score_norm: str = "l2_gelu"
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    series: int = 1
    shortcut_reduction: int = 0
    bias: bool = False
    norm: str = "layer_norm"
    norm_position: str = "pre"
    norm_affine: bool = False
    norm_eps: float = 1e-5
    low_precision_norm: bool = False
    stem_norm: bool = False
    init: str = "trunc_normal"
    dropout: float = 0.0
    attn_dropout: float = 0.0
    drop_path: float = 0.0
    patch_drop_rate: float = 0.0
    causal: bool = False
    positions: str = "learned"
    rotary_fraction: float = 0.25
    rotary_base: float = 10000.0
    stem: str = "patch"
    head: str = "image"
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    class_token: bool = True
    vocab_size: int = 50304
    context_length: int = 1024
    tie_embeddings: bool = True
    unpad: bool = False
    experts: int = 1
    experts_top_k: int = 1
    shared_experts: int = 0
    expert_groups: int = 1
    experts_balance: float = 0.1
    router: str = "top_k"
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        ParamTokens.parse(self.param_tokens)
        for names, least in (
            ("dim depth num_heads patch_size in_chans vocab_size context_length series", 1),
            ("experts experts_top_k expert_groups", 1),
            ("num_classes shortcut_reduction shared_experts", 0),
        ):
            for name in names.split():
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise UserError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        for name in ("head_dim", "num_kv_heads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise UserError(f"num_kv_heads: not a divisor of num_heads {self.num_heads} (got {self.num_kv_heads})")
        if self.head_dim is None and self.dim % self.num_heads:
            raise UserError(f"num_heads: not a divisor of dim {self.dim} (got {self.num_heads})")
        sides = self.image_size if isinstance(self.image_size, (list, tuple)) else (self.image_size,) * 2
        if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
            raise UserError(f"image_size: expected one or two whole numbers of at least 1, got {self.image_size!r}")
        object.__setattr__(self, "image_size", sides[0] if sides[0] == sides[1] else tuple(sides))
        if any(side % self.patch_size for side in sides):
            raise UserError(f"image_size: not divisible by patch_size {self.patch_size} (got {self.image_size})")
        for name in ("drop_path", "dropout", "attn_dropout", "patch_drop_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name}: expected a rate in [0, 1), got {getattr(self, name)}")
        if self.mlp_ratio <= 0 or self.mlp_hidden < 1:
            raise UserError(f"mlp_ratio: expected at least 1 / dim, got {self.mlp_ratio}")
        if not self.norm_eps > 0:
            raise UserError(f"norm_eps: expected a positive number, got {self.norm_eps}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown_name(name, getattr(self, name), choices)
        if self.global_pool == "token" and not self.class_token:
            raise UserError("global_pool: 'token' needs class_token: true; use 'avg' without a class token")
        if isinstance(self.layers, list):  # from YAML
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.layers is not None and not (self.layers and all(isinstance(one, str) for one in self.layers)):
            raise UserError(f"layers: expected names of mixers, or mixer+feed_forward, got {self.layers!r}")
        for parts in self._block_parts():
            for field, name in parts.items():
                _PARTS[field][name]  # raises for an unknown name
            for field, name in parts.items():
                self._check_needs(field, name, parts)
        if self.shortcut_reduction > self.dim:
            raise UserError(f"shortcut_reduction: expected at most dim {self.dim}, got {self.shortcut_reduction}")
        softmax = self.score_norm == "softmax" and any(names[1] == "pattention" for names in self._pattern)
        if self.series > 1 and softmax:
            raise UserError(
                f"series: feed_forward 'pattention' with score_norm 'softmax' has no activation "
                f"(got {self.series}, expected 1)"
            )
        self._check_experts()
        if self.unpad and self.drop_path > 0:
            raise UserError(f"unpad: true needs drop_path: 0, got {self.drop_path}")
        if not 0 < self.rotary_fraction <= 1 or self.rotary_base <= 0:
            raise UserError(
                f"rotary_fraction: expected a share in (0, 1] and a positive base, "
                f"got {self.rotary_fraction} and {self.rotary_base}"
            )
        if POSITIONS[self.positions].rotary is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise UserError(
                f"rotary_fraction: invalid number of rotary dimensions (got {self.rotary_dim} = "
                f"{self.rotary_fraction} of {self.head_width}, expected an even number of at least 2)"
            )

    def _check_experts(self) -> None:
        if self.router == "expert_choice":
            raise UserError(
                "router: 'expert_choice' lets a data token depend on later ones, since experts choose among all of a "
                "sequence (expected 'top_k')"
            )
        if self.router != "top_k":
            raise unknown_name("router", self.router, ("top_k",))
        if 1 < self.experts < self.experts_top_k:
            raise UserError(f"experts_top_k: expected at most experts {self.experts}, got {self.experts_top_k}")
        if self.expert_groups > 1 and (self.experts_top_k > 1 or self.series > 1):
            raise UserError(
                f"expert_groups: {self.expert_groups} needs experts_top_k: 1 and series: 1, got {self.experts_top_k} "
                f"and {self.series}"
            )
        if not 0 < self.experts_balance < math.inf:
            raise UserError(f"experts_balance: expected a positive number, got {self.experts_balance}")

    @property
    def tokens(self) -> ParamTokens:
        """Initial parameter tokens by kind."""
        return ParamTokens.parse(self.param_tokens)

    @property
    def _pattern(self) -> list[tuple[str, str]]:
        """Repeating pattern of mixer and feed-forward names."""
        if self.layers is None:
            return [(self.mixer, self.feed_forward)]
        pairs = [layer.partition("+") for layer in self.layers]
        return [(mixer, feed_forward or self.feed_forward) for mixer, _, feed_forward in pairs]

    @property
    def pattern_length(self) -> int:
        """Number of blocks in one repeat of the pattern."""
        return 1 if self.layers is None else len(self.layers)

    def parts_of(self, layer: int) -> tuple[str, str]:
        """Mixer and feed-forward names of block ``layer``.

        Example:
            >>> config = TokenformerConfig(layers=("attention", "attention+mlp"), feed_forward="glu")
            >>> config.parts_of(0), config.parts_of(3)
            (('attention', 'glu'), ('attention', 'mlp'))
        """
        return self._pattern[layer % len(self._pattern)]

    def _block_parts(self) -> Iterator[dict[str, str]]:
        """Yield the part names of each block of the pattern."""
        for mixer, feed_forward in self._pattern:
            yield {name: getattr(self, name) for name in _PARTS} | {"mixer": mixer, "feed_forward": feed_forward}

    def _check_needs(self, part: str, name: str, names: Mapping[str, str]) -> None:
        """Reject unsupported combinations; it is enough that one of two parts declares support for the other."""
        for field, supported in _PARTS[part].needs(name).items():
            value = names.get(field, getattr(self, field))
            declared = _PARTS[field].needs(value).get(part, ()) if field in _PARTS else ()
            if value not in supported and name not in declared:
                known = " or ".join(map(_word, supported))
                raise UserError(f"{part}: unsupported combination: {name!r} needs {field}: {known}, got {_word(value)}")

    @property
    def num_prefix_tokens(self) -> int:
        """Number of prefix tokens before the patches."""
        return int(self.class_token)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_positions(self) -> int:
        """Sequence length, T, of an image of ``image_size`` or a text of ``context_length``."""
        return STEMS[self.stem].num_positions(self)

    @property
    def num_data_tokens(self) -> int:
        """Sequence length in training: ``num_positions`` without dropped patches."""
        if not self.patch_drop_rate:
            return self.num_positions
        patches = self.num_positions - self.num_prefix_tokens
        return self.num_prefix_tokens + max(1, int(patches * (1.0 - self.patch_drop_rate)))  # as timm counts them

    @property
    def length_limit(self) -> int | None:
        """Maximum sequence length in data tokens; ``None`` without a limit."""
        stem = STEMS[self.stem]
        limit = getattr(stem, "length_limit", stem.num_positions)  # an image is not part of the text
        return limit(self) if POSITIONS[self.positions].limited else None

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of each head."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def head_width(self) -> int:
        """Width of each attention head, d."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def head_units(self) -> tuple[str, int]:
        """Kind and number of the units in which attention grows: ``heads``, or ``kv_heads`` with their queries."""
        return ("heads", self.num_heads) if self.num_kv_heads is None else ("kv_heads", self.num_kv_heads)

    @property
    def mlp_hidden(self) -> int:
        """Hidden units of the feed-forward."""
        return round(self.dim * self.mlp_ratio)

    @property
    def size(self) -> dict[str, int]:
        """Initial size of all growable axes and the depth, by kind."""
        heads, units = self.head_units
        tokens = dict(self.tokens.items())
        return {**tokens, "hidden": self.mlp_hidden, heads: units, "depth": self.depth, "experts": self.experts}

    def at_size(self, size: Mapping[str, int]) -> TokenformerConfig:
        """Resize the architecture, as growth does.

        Args:
            size: Totals by kind: parameter tokens (``qkv``, ``proj``, ``ffn``), ``hidden`` units of the feed-forward,
                ``heads`` or ``kv_heads``, ``depth`` (blocks) and ``experts``. Missing kinds are unchanged.

        Example:
            >>> TokenformerConfig(dim=384, num_heads=6).at_size({"depth": 24, "heads": 8}).head_width
            64
        """
        tokens = {kind: total for kind, total in size.items() if kind in KINDS}
        kind, units = self.head_units
        heads = self.num_heads // units * size.get(kind, units)
        return replace(
            self,
            param_tokens={**dict(self.tokens.items()), **tokens},
            depth=size.get("depth", self.depth),
            experts=size.get("experts", self.experts),
            mlp_ratio=size["hidden"] / self.dim if "hidden" in size else self.mlp_ratio,
            num_heads=heads,
            num_kv_heads=None if self.num_kv_heads is None else size.get(kind, units),
            head_dim=self.head_dim if heads == self.num_heads else self.head_width,
        )

    @property
    def shortcut_dim(self) -> int:
        """Width of the augmented shortcut; 0 without one."""
        return self.dim // self.shortcut_reduction if self.shortcut_reduction else 0


def config_changes(saved: TokenformerConfig, present: TokenformerConfig) -> dict[str, tuple[Any, Any]]:
    """Compare two architectures: differing fields with both values, stem and head first."""
    names = sorted((field.name for field in fields(saved)), key=lambda name: name not in ("stem", "head"))
    pairs = {name: (getattr(saved, name), getattr(present, name)) for name in names}
    biased = POSITIONS[present.positions].bias is not None  # by slopes, which depend on the initial number of heads
    grouped = [one.num_heads // one.head_units[1] for one in (saved, present)]  # query heads per unit of growth
    if saved.head_width == present.head_width and grouped[0] == grouped[1] and not biased:
        del pairs["num_heads"], pairs["head_dim"], pairs["num_kv_heads"]  # another number of heads is another size
    if saved.num_positions == present.num_positions:  # otherwise positions are resampled
        pairs["patch_grid"] = saved.patch_grid, present.patch_grid
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _word(name: Any) -> str:
    return str(name).lower() if isinstance(name, bool) else str(name)
