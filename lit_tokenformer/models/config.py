"""The numbers and part names that make up one architecture, checked when they are put together.

A config describes a model at birth. How many parameter tokens a model holds *now* is read off its layers
(:attr:`Tokenformer.param_tokens`), because growth changes the layers and never the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from lit_tokenformer.errors import unknown_name

Tokens = int | dict[str, int]
"""How a user writes parameter tokens: one number, or totals for each kind of projection."""


@dataclass(frozen=True)
class ParamTokens:
    """Totals of parameter tokens for each kind of projection.

    Args:
        qkv: Tokens of each of the query, key and value projections.
        proj: Tokens of the attention's output projection.
        ffn: Tokens of the feed-forward layer.
    """

    qkv: int
    proj: int
    ffn: int

    def __post_init__(self) -> None:
        for kind, total in self.items():
            if isinstance(total, bool) or not isinstance(total, int) or total < 1:
                raise ValueError(f"param_tokens.{kind}: expected a whole number of at least 1, got {total!r}")

    def items(self) -> list[tuple[str, int]]:
        """The pairs ``(kind, total)`` in a fixed order."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]

    @classmethod
    def parse(cls, tokens: Tokens, base: ParamTokens | None = None) -> ParamTokens:
        """Totals from what a user writes.

        Args:
            tokens: A bare n means ``qkv=n, proj=n, ffn=4n`` (the published proportion); a mapping names totals.
            base: Where the kinds that a mapping leaves out take their totals from.

        Returns:
            The totals for every kind.

        Raises:
            ValueError: For an unknown kind, a kind without a total, or something that is not a whole number >= 1.

        Example:
            >>> ParamTokens.parse(96)
            ParamTokens(qkv=96, proj=96, ffn=384)
            >>> ParamTokens.parse({"ffn": 512}, base=ParamTokens(96, 96, 384))
            ParamTokens(qkv=96, proj=96, ffn=512)
        """
        if isinstance(tokens, int) and not isinstance(tokens, bool):
            return cls(qkv=tokens, proj=tokens, ffn=4 * tokens)
        if not isinstance(tokens, Mapping):
            raise ValueError(f"param_tokens: expected a whole number or totals for each kind, got {tokens!r}")
        kinds = [field.name for field in fields(cls)]
        for kind in tokens:
            if kind not in kinds:
                raise unknown_name("param_tokens", kind, kinds)
        if base is None:
            missing = [kind for kind in kinds if kind not in tokens]
            if missing:
                raise ValueError(f"param_tokens: no total given for {', '.join(missing)}")
            return cls(**tokens)
        return replace(base, **tokens)


KINDS = tuple(field.name for field in fields(ParamTokens))
"""The kinds of projection that a growth schedule can name."""


_MODALITIES: list[dict[str, str]] = [
    {"stem": "patch", "head": "image", "positions": "learned"},
    {"stem": "token", "head": "language", "positions": "rotary"},
]
"""The ways in which input, output and positions go together."""


@dataclass(frozen=True)
class TokenformerConfig:
    """One architecture: sizes and names of parts.

    Args:
        dim: Width of the residual stream, D.
        depth: Number of blocks, L.
        num_heads: Attention heads, H; must divide ``dim``.
        param_tokens: Parameter tokens at birth: a number n (qkv n, proj n, ffn 4n) or ``{qkv: n, proj: n, ffn: m}``.
        projection: What projects queries, keys, values and outputs: ``pattention`` or ``linear``.
        feed_forward: ``pattention`` (one layer, as published) or ``mlp`` (two projections with a GELU between).
        score_norm: How Pattention normalises its scores: ``l2_gelu`` (published), ``gelu_l2``, ``softmax``, ``gelu``.
        mlp_ratio: Hidden width of ``feed_forward: mlp`` in multiples of ``dim``.
        bias: Whether linear projections have a bias; Pattention never has one.
        norm_affine: Whether the norms inside the blocks have weights and biases; the final norm always has.
        norm_eps: Epsilon of every layer norm.
        drop_path: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
        causal: Whether a data token attends only to those before it and to itself.
        positions: ``learned`` (added by the stem) or ``rotary`` (queries and keys are turned).
        rotary_fraction: Share of each head's dimensions that ``rotary`` turns, the first ones.
        rotary_base: Base of the rotary frequencies.
        stem: What the input is: ``patch`` (images) or ``token`` (token ids).
        head: What comes out: ``image`` (logits of classes) or ``language`` (logits over the vocabulary).
        image_size: Side of the square input images in pixels.
        patch_size: Side of the square patches in pixels; must divide ``image_size``.
        in_chans: Channels of the input images.
        num_classes: Outputs of the head; 0 leaves the head out.
        global_pool: ``token`` (the class token) or ``avg`` (the mean of the patch tokens).
        class_token: Whether a class token is prepended to the patches.
        vocab_size: Token ids that can be read and written, V.
        context_length: Longest sequence of token ids, T.
        tie_embeddings: Whether the language head shares the weights of the token embedding.
    """

    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    param_tokens: Tokens = 384
    projection: str = "pattention"
    feed_forward: str = "pattention"
    score_norm: str = "l2_gelu"
    mlp_ratio: float = 4.0
    bias: bool = False
    norm_affine: bool = False
    norm_eps: float = 1e-5
    drop_path: float = 0.0
    causal: bool = False
    positions: str = "learned"
    rotary_fraction: float = 0.25
    rotary_base: float = 10000.0
    stem: str = "patch"
    head: str = "image"
    image_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    class_token: bool = True
    vocab_size: int = 50304
    context_length: int = 1024
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        ParamTokens.parse(self.param_tokens)
        sizes = ("dim", "depth", "num_heads", "image_size", "patch_size", "in_chans", "vocab_size", "context_length")
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} heads do not divide dim {self.dim}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: {self.image_size} is not divisible by patch_size {self.patch_size}")
        if isinstance(self.num_classes, bool) or not isinstance(self.num_classes, int) or self.num_classes < 0:
            raise ValueError(f"num_classes: expected a whole number of at least 0, got {self.num_classes!r}")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path: expected a rate in [0, 1), got {self.drop_path}")
        if self.mlp_ratio <= 0 or self.mlp_hidden < 1:
            raise ValueError(f"mlp_ratio: expected at least 1 / dim, got {self.mlp_ratio}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps: expected a positive number, got {self.norm_eps}")
        for name, choices in (
            ("projection", ("pattention", "linear")),
            ("feed_forward", ("pattention", "mlp")),
            ("score_norm", ("l2_gelu", "gelu_l2", "softmax", "gelu")),
            ("positions", ("learned", "rotary")),
            ("stem", ("patch", "token")),
            ("head", ("image", "language")),
            ("global_pool", ("token", "avg")),
        ):
            if getattr(self, name) not in choices:
                raise unknown_name(name, getattr(self, name), choices)
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool: 'token' needs class_token: true; use 'avg' without a class token")
        parts = {"stem": self.stem, "head": self.head, "positions": self.positions}
        if parts not in _MODALITIES:
            known = "; ".join(", ".join(f"{part}: {name}" for part, name in one.items()) for one in _MODALITIES)
            told = ", ".join(f"{part}: {name}" for part, name in parts.items())
            raise ValueError(f"stem: no model is put together from {told}; there are: {known}")
        if not 0 < self.rotary_fraction <= 1 or self.rotary_base <= 0:
            raise ValueError(
                f"rotary_fraction: expected a share in (0, 1] and a positive base, "
                f"got {self.rotary_fraction} and {self.rotary_base}"
            )
        if self.positions == "rotary" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(
                f"rotary_fraction: {self.rotary_fraction} of {self.dim // self.num_heads} dimensions in a head are "
                f"{self.rotary_dim}; expected an even number of at least 2"
            )

    @property
    def tokens(self) -> ParamTokens:
        """Parameter tokens at birth, as totals for each kind."""
        return ParamTokens.parse(self.param_tokens)

    @property
    def num_prefix_tokens(self) -> int:
        """Data tokens that stand before the patches."""
        return int(self.class_token)

    @property
    def num_data_tokens(self) -> int:
        """Length of the sequence, T, for an image of ``image_size`` or a text of ``context_length``."""
        patches = (self.image_size // self.patch_size) ** 2
        return {"patch": patches + self.num_prefix_tokens, "token": self.context_length}[self.stem]

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that rotary positions turn."""
        return int(self.dim // self.num_heads * self.rotary_fraction)

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of ``feed_forward: mlp``."""
        return int(self.dim * self.mlp_ratio)
