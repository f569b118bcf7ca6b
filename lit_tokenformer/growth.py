"""How a model grows: parameters, buffers and optimizer state. Knows no trainer and no schedule.

Three ways to make the new parameter tokens of a Pattention layer (N tokens become r N, or any larger number):

``split``
    Every key is copied r times, each value becomes V/r + E_j with random E_j that sum to zero, tau becomes sqrt(r) tau.
    Scores repeat and their norm grows as tau does, so the output stays the same number for every score normalisation,
    and the copies get different gradients from the first step. Relatives: Net2WiderNet (arXiv 1511.05641), LEMON
    (arXiv 2310.07999). The copies lie beside their originals. What a whole factor leaves over become zero keys.
``zero_keys``
    New keys are zero, new values random, tau is kept (arXiv 2410.23168, section 3.3 with tau fixed). Exact for every
    normalisation but softmax. New keys move at the first optimizer step, new values at the second.
``random``
    New tokens as at birth, tau by the new number: what the published code does. It changes the function.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lit_tokenformer.errors import unknown_name
from lit_tokenformer.models import SCORE_NORMS, SERIES_STD, ParamTokens, Pattention, Tokens, param_tokens

METHODS = ("split", "zero_keys", "random")
NEW_STATES = ("mean", "zeros", "reset")

_MOMENTS = {
    "exp_avg": 1,
    "momentum_buffer": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "row_var": 2,
    "col_var": 2,
    "variance": 2,
}
"""Optimizer state that can be carried over, and its degree in the gradient (2: an average of squared gradients)."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of a grown tensor come from.

    Args:
        before: Rows before the growth, N.
        after: Rows after it.
        copies: How often each old row stands in the new tensor, side by side; 1 unless it was split.
    """

    before: int
    after: int
    copies: int = 1

    def new(self) -> Tensor:
        """Mask of the rows that were not there before, (after,) bool; the first of each set of copies was."""
        index = torch.arange(self.after)
        return (index % self.copies != 0) | (index >= self.copies * self.before)

    def repeat(self, old: Tensor) -> Tensor:
        """Each row of ``old`` (before, ...) as often as it has copies, (copies * before, ...)."""
        return old.repeat_interleave(self.copies, dim=0)


@dataclass(frozen=True)
class GrownParameter:
    """A parameter that was replaced, and what its optimizer needs to know of it.

    Args:
        name: Its name in the module that was grown.
        old: The parameter that was there; no longer part of the module.
        new: The parameter that stands in its place.
        rows: Where the rows of ``new`` come from.
        gradient_scale: What the gradient of an old row became by the growth: 1/r for keys that were split, else 1.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter
    rows: Rows
    gradient_scale: float


def target_tokens(tokens: Tokens, current: Mapping[str, int], setting: str = "tokens") -> dict[str, int]:
    """Totals for each kind of projection that a model has.

    Args:
        tokens: A bare n (qkv n, proj n, ffn 4n, as far as the model has them) or totals by kind.
        current: The totals now, from :func:`~lit_tokenformer.models.param_tokens`.
        setting: What the user calls this, for the message.

    Returns:
        A total for each kind in ``current``; kinds that ``tokens`` leaves out keep theirs.

    Raises:
        ValueError: For a kind that the model has not, a total that is not a whole number >= 1, or one that shrinks.

    Example:
        >>> target_tokens(192, {"qkv": 96, "proj": 96, "ffn": 384})
        {'qkv': 192, 'proj': 192, 'ffn': 768}
    """
    if isinstance(tokens, Mapping):
        for kind in tokens:
            if kind not in current:
                raise unknown_name(setting, kind, current)
    try:
        wanted = dict(ParamTokens.parse(tokens, base=ParamTokens(**{"qkv": 1, "proj": 1, "ffn": 1, **current})).items())
    except ValueError as error:
        raise ValueError(f"{setting}: {str(error).removeprefix('param_tokens: ')}") from None
    for kind, now in current.items():
        if wanted[kind] < now:
            raise ValueError(
                f"{setting}: {kind} would shrink from {now} to {wanted[kind]}; tokens can only be appended"
            )
    return {kind: wanted[kind] for kind in current}


def plan_rows(before: int, after: int, method: str, score_norm: str, name: str = "") -> Rows:
    """Where the rows of a layer come from that grows from ``before`` to ``after`` tokens.

    Raises:
        ValueError: If it would shrink, or if the method cannot keep its function under its score normalisation.

    Example:
        >>> plan_rows(8, 20, "split", "l2_gelu")
        Rows(before=8, after=20, copies=2)
    """
    if after < before:
        raise ValueError(f"tokens: layer {name!r} would shrink from {before} to {after}; tokens can only be appended")
    copies = after // before if method == "split" else 1
    if method != "random" and after > copies * before and not SCORE_NORMS[score_norm].zero_keys_exact:
        raise ValueError(
            f"method: zero keys change the output under score_norm {score_norm!r}; layer {name!r} can go from "
            f"{before} tokens to a multiple of it by 'split', not to {after}"
        )
    return Rows(before, after, copies)


def grow(
    module: nn.Module,
    tokens: Tokens,
    method: str = "split",
    generator: torch.Generator | None = None,
    noise: float = 1.0,
    seed: int = 0,
) -> list[GrownParameter]:
    """Appends parameter tokens to every Pattention layer of a module, in place.

    Args:
        module: Anything that holds Pattention layers.
        tokens: Totals, never increments: a number n (qkv n, proj n, ffn 4n) or ``{kind: n}``. Layers without a kind
            take a bare number as it is.
        method: ``split``, ``zero_keys`` or ``random``; see the head of this module.
        generator: Draws all new rows, layer after layer. Without it each layer has a generator of its own, seeded by
            ``seed``, its name and its new size, so that nothing else decides what is drawn.
        noise: Size of the differences between the copies of a split, in standard deviations of values at birth.
        seed: See ``generator``.

    Returns:
        What was replaced, for :func:`grow_optimizer`. Empty if every layer already had its size.

    Raises:
        ValueError: If the totals do not fit the module, if the method cannot keep the function of a layer, if a
            parameter carries hooks or parametrizations that would be lost, or if it is tied to one that does not grow
            in the same way. The module is unchanged then.

    Example:
        >>> layer = Pattention(8, 8, num_tokens=4)
        >>> x = torch.randn(2, 8)
        >>> before = layer(x)
        >>> grown = grow(layer, 8)
        >>> layer.num_tokens, torch.allclose(layer(x), before, atol=1e-6)
        (8, True)
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise: expected a number of at least 0, got {noise}")
    targets = target_tokens(tokens, param_tokens(module))
    plan = []
    for name, layer in module.named_modules():  # a layer that stands in two places is named once
        if not isinstance(layer, Pattention):
            continue
        if layer.kind is None and not isinstance(tokens, int):
            raise ValueError(f"tokens: layer {name!r} has no kind, so it takes a number, got {tokens!r}")
        total = targets[layer.kind] if layer.kind is not None else tokens
        assert isinstance(total, int)
        rows = _plan_rows(name, layer, total, method)
        if rows.after > rows.before:
            plan.append((name, layer, rows))
    _check_ties(module, plan)

    replaced: dict[nn.Parameter, GrownParameter] = {}
    for name, layer, rows in plan:
        draw = generator or _layer_generator(seed, name, rows.after)
        for part in _parts(layer):
            old = getattr(layer, part)
            if old not in replaced:  # tied to a parameter that has grown already
                new = nn.Parameter(_NEW_ROWS[part](layer, rows, method, noise, draw), requires_grad=old.requires_grad)
                scale = 1.0 if part == "value_tokens" else 1 / rows.copies
                replaced[old] = GrownParameter(f"{name}.{part}".lstrip("."), old, new, rows, scale)
            setattr(layer, part, replaced[old].new)
        if method == "random":
            layer.tau.fill_(math.sqrt(rows.after))
        else:
            layer.tau.copy_(layer.tau.double() * math.sqrt(rows.copies))
    return list(replaced.values())


def grow_optimizer(optimizer: torch.optim.Optimizer, grown: Iterable[GrownParameter], new_state: str = "mean") -> None:
    """Puts grown parameters in the places of the old ones, and carries their optimizer state over.

    Rows that were split inherit the state of their original (for keys the first moment divided by r, the second by
    r^2, as their gradients are). Other new rows start with a first moment of zero.

    Args:
        optimizer: Any optimizer; parameters it does not hold are left alone.
        grown: What :func:`grow` returned.
        new_state: Second moment of the other new rows: ``mean`` (that of the old rows; with zeros and an old step count
            their first updates would be 3 to 6 times the learning rate at beta2 = 0.999) or ``zeros``. ``reset`` drops
            the whole state of each grown parameter, as the published code does.

    Warns:
        UserWarning: If an optimizer keeps state that cannot be carried over; that of the parameter is reset then.
    """
    if new_state not in NEW_STATES:
        raise unknown_name("new_state", new_state, NEW_STATES)
    places = {
        parameter: (group["params"], index)
        for group in optimizer.param_groups
        for index, parameter in enumerate(group["params"])
    }
    not_carried: set[str] = set()
    for one in grown:
        if one.old not in places:
            continue
        parameters, index = places[one.old]
        parameters[index] = one.new
        state = optimizer.state.pop(one.old, None)
        if not state or new_state == "reset":
            continue
        unknown = {key for key, value in state.items() if not _can_carry(key, value, one)}
        if unknown:
            not_carried |= unknown
        else:
            optimizer.state[one.new] = {key: _grow_state(key, value, one, new_state) for key, value in state.items()}
    if not_carried:
        warnings.warn(
            f"{type(optimizer).__name__} keeps {', '.join(sorted(not_carried))}, which cannot be carried over a "
            "growth: the optimizer state of the grown parameters was reset.",
            stacklevel=2,
        )


def check_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Raises a ``ValueError`` if any state of the optimizer has not the shape of its parameter.

    ``Optimizer.load_state_dict`` compares counts only, and a wrong shape would be found at the first step.
    """
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                if key not in _MOMENTS or not isinstance(value, Tensor) or value.ndim != parameter.ndim:
                    continue
                pairs = zip(value.shape, parameter.shape, strict=True)
                if any(have not in (want, 1) for have, want in pairs):
                    raise ValueError(
                        f"optimizer state: {key} of parameter {index} in group {number} has shape "
                        f"{tuple(value.shape)}, its parameter {tuple(parameter.shape)}; "
                        "the checkpoint's weights and optimizer state do not belong together"
                    )


def _plan_rows(name: str, layer: Pattention, total: int, method: str) -> Rows:
    rows = plan_rows(layer.num_tokens, total, method, layer.score_norm, name)
    if total == rows.before:
        return rows
    if method != "random" and total > rows.copies * rows.before and layer.value_std == 0:
        raise ValueError(f"method: new keys and new values of layer {name!r} would both be zero, and never train")
    for part in _parts(layer):
        parameter, layer_part = layer._parameters.get(part), f"{name}.{part}".lstrip(".")
        if parametrize.is_parametrized(layer, part) or parameter is None:
            raise ValueError(f"tokens: {layer_part} is parametrized; remove the parametrization before a growth")
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(f"tokens: {layer_part} carries hooks that a growth would lose; remove them first")
    return rows


def _check_ties(module: nn.Module, plan: Iterable[tuple[str, Pattention, Rows]]) -> None:
    """Raises a ``ValueError`` if a parameter that grows also stands where it would not grow in the same way."""
    rows_of = {layer: rows for _, layer, rows in plan}
    ways = {getattr(layer, part): (part, rows) for layer, rows in rows_of.items() for part in _parts(layer)}
    for name, owner in module.named_modules():
        for part, parameter in owner._parameters.items():
            if parameter in ways and ways[parameter] != (part, rows_of.get(owner)):  # type: ignore[call-overload]
                raise ValueError(
                    f"tokens: {f'{name}.{part}'.lstrip('.')} is tied to parameter tokens that would grow in another way"
                )


def _parts(layer: Pattention) -> list[str]:
    """The tensors of a layer that grow."""
    return [part for part in layer.PARTS if getattr(layer, part) is not None]


def _layer_generator(seed: int, name: str, total: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{total}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _draw(shape: tuple[int, ...], like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """N(0, std) in float32 at least; drawn on the generator's device in float32, so that all draw the same numbers."""
    wide = torch.promote_types(like.dtype, torch.float32)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
    return drawn.to(device=like.device, dtype=wide).mul_(std)


@torch.no_grad()
def _new_keys(layer: Pattention, rows: Rows, method: str, noise: float, generator: torch.Generator) -> Tensor:
    old = layer.key_tokens
    rest = (rows.after - rows.copies * rows.before, old.shape[1])
    appended = _draw(rest, old, layer.key_std, generator) if method == "random" else old.new_zeros(rest)
    return torch.cat([rows.repeat(old), appended.to(old.dtype)])


@torch.no_grad()
def _new_values(layer: Pattention, rows: Rows, method: str, noise: float, generator: torch.Generator) -> Tensor:
    old = layer.value_tokens
    copies, width = rows.copies, old.shape[1]
    kept = old.detach()
    if copies > 1:
        spread = _draw((rows.before, copies, width), old, noise * layer.value_std, generator)
        spread = (spread - spread.mean(dim=1, keepdim=True)) * math.sqrt(copies / (copies - 1))
        whole = old.to(spread.dtype)
        parts = (whole[:, None] / copies + spread).to(old.dtype)  # (before, copies, D_out)
        parts[:, -1] = whole - parts[:, :-1].to(spread.dtype).sum(dim=1)  # rounding must not change the sum
        kept = parts.flatten(0, 1)
    appended = _draw((rows.after - copies * rows.before, width), old, layer.value_std, generator)
    return torch.cat([kept, appended.to(old.dtype)])


@torch.no_grad()
def _new_scales(layer: Pattention, rows: Rows, method: str, noise: float, generator: torch.Generator) -> Tensor:
    """A series as at birth for tokens that are no copies: one plain term, the others small."""
    old = layer.scale_tokens
    assert old is not None
    appended = _draw((rows.after - rows.copies * rows.before, old.shape[1]), old, SERIES_STD, generator)
    appended[:, 0] = 1.0
    return torch.cat([rows.repeat(old), appended.to(old.dtype)])


@torch.no_grad()
def _new_shifts(layer: Pattention, rows: Rows, method: str, noise: float, generator: torch.Generator) -> Tensor:
    """No shift for tokens that are no copies, so that a score of zero has a weight of zero."""
    old = layer.shift_tokens
    assert old is not None
    return torch.cat([rows.repeat(old), old.new_zeros(rows.after - rows.copies * rows.before, old.shape[1])])


_NEW_ROWS = {
    "key_tokens": _new_keys,
    "value_tokens": _new_values,
    "scale_tokens": _new_scales,
    "shift_tokens": _new_shifts,
}


def _can_carry(key: str, value: Any, grown: GrownParameter) -> bool:
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, (int, float, str))  # a step count or a flag
    if value.numel() == 1 and key not in _MOMENTS:
        return True
    return key in _MOMENTS and value.ndim == grown.old.ndim and value.shape[0] in (1, grown.rows.before)


@torch.no_grad()
def _grow_state(key: str, value: Any, grown: GrownParameter, new_state: str) -> Any:
    if not isinstance(value, Tensor) or (value.numel() == 1 and key not in _MOMENTS):
        return value
    degree = _MOMENTS[key]
    scaled = value * grown.gradient_scale**degree
    if value.shape[0] != grown.rows.before:
        return scaled  # a factor without rows
    rest = (grown.rows.after - grown.rows.copies * grown.rows.before, *value.shape[1:])
    filled = scaled.mean(dim=0).expand(rest) if degree == 2 and new_state == "mean" else scaled.new_zeros(rest)
    return torch.cat([grown.rows.repeat(scaled), filled])
