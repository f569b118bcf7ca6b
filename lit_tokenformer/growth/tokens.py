"""Growth of Pattention layers by parameter tokens: new rows of their parameters and buffers.

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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.shards import ShardedParameters, gather, local, moves_no_rows, owned_rows
from lit_tokenformer.models import SCORE_NORMS, SERIES_STD, ParamTokens, Pattention, Tokens, param_tokens
from lit_tokenformer.models.config import KINDS, OTHER

METHODS = ("split", "zero_keys", "random")

Fill = Callable[[Tensor, Tensor, Tensor, slice], None]
"""Writes the rows of a tensor that grew: given are the empty copies (n, copies, ...), the empty rows that are no copies
(m, ...), the old rows (n, ...), and which of all old rows these are. m is 0 unless they are all."""


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

    def new(self, device: torch.device | None = None) -> Tensor:
        """Mask of the rows that were not there before, (after,) bool; the first of each set of copies was."""
        index = torch.arange(self.after, device=device)
        return (index % self.copies != 0) | (index >= self.copies * self.before)


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
        tokens: A bare n (qkv n, proj n, ffn 4n and other n, as far as the model has them) or totals by kind; ``depth``
            among them is a total of blocks.
        current: The totals now, from :func:`~lit_tokenformer.models.param_tokens`; with ``depth`` where it may grow.
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
    wanted = dict(current)
    if isinstance(tokens, Mapping):
        for kind, what in ((OTHER, "tokens"), ("depth", "blocks")):
            if kind in tokens:
                wanted[kind] = total = tokens[kind]
                if isinstance(total, bool) or not isinstance(total, int):
                    raise UserError(f"{setting}: {kind}: expected a whole number of {what}, got {total!r}")
        tokens = {kind: total for kind, total in tokens.items() if kind in KINDS}
    else:
        wanted[OTHER] = tokens
    kinds = {kind: current.get(kind, 1) for kind in KINDS}
    try:
        wanted |= ParamTokens.parse(tokens, base=ParamTokens(**kinds)).items()
    except ValueError as error:
        raise UserError(f"{setting}: {str(error).removeprefix('param_tokens: ')}") from None
    for kind, now in current.items():
        if wanted[kind] < now:
            what = "blocks can only be inserted" if kind == "depth" else "tokens can only be appended"
            raise UserError(f"{setting}: {kind} would shrink from {now} to {wanted[kind]}; {what}")
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
        raise UserError(f"tokens: layer {name!r} would shrink from {before} to {after}; tokens can only be appended")
    copies = after // before if method == "split" else 1
    if method != "random" and after > copies * before and not SCORE_NORMS[score_norm].zero_keys_exact:
        raise UserError(
            f"method: zero keys change the output under score_norm {score_norm!r}; layer {name!r} can go from "
            f"{before} tokens to a multiple of it by 'split', not to {after}"
        )
    return Rows(before, after, copies)


def grow_one_by_one(
    module: nn.Module,
    tokens: Tokens,
    method: str = "split",
    generator: torch.Generator | None = None,
    noise: float = 1.0,
    seed: int = 0,
) -> Iterator[GrownParameter]:
    """Append parameter tokens as :func:`~lit_tokenformer.growth.grow` does, one parameter for each item.

    An optimizer can let go of it before the next is made, so no more than one stands twice in memory. Of a model that
    is divided among processes, every process makes the rows that it holds: without asking the others where copies stay
    beside their originals, else with the old parameter brought together, one at a time.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if not 0 <= noise < math.inf:
        raise UserError(f"noise: expected a number of at least 0, got {noise}")
    targets = target_tokens(tokens, param_tokens(module))
    plan = []
    for name, layer in module.named_modules():  # a layer that stands in two places is named once
        if not isinstance(layer, Pattention):
            continue
        rows = _plan_rows(name, layer, targets[layer.kind], method)
        if rows.after > rows.before:
            plan.append((name, layer, rows))
    _check_ties(module, plan)
    for device in {layer.tau.device for _, layer, _ in plan}:
        needed = sum(added_bytes(layer, rows.after) for _, layer, rows in plan if layer.tau.device == device)
        check_memory(needed, device, "tokens")

    def new_rows(layer: Pattention, part: str, rows: Rows, draw: torch.Generator) -> Tensor:
        fill = getattr(_NewRows(layer, rows, method, noise, draw), part)
        return regrown(getattr(layer, part), rows, fill)

    def replace() -> Iterator[GrownParameter]:
        sharded = ShardedParameters(module)
        uses = Counter(getattr(layer, part) for _, layer, _ in plan for part in _parts(layer))
        tied = {parameter for parameter, count in uses.items() if count > 1}
        del uses  # it would keep every old parameter alive
        done: dict[nn.Parameter, nn.Parameter] = {}  # of those that are tied
        for name, layer, rows in plan:
            draw = generator or _layer_generator(seed, name, rows.after)
            for part in _parts(layer):
                old = getattr(layer, part)
                if old in done:
                    setattr(layer, part, done[old])
                elif not any(old is new for new in done.values()):  # else it was replaced in both places at once
                    new = sharded.replace(layer, part, new_rows(layer, part, rows, draw), rows.after)
                    if old in tied:
                        done[old] = new
                    scale = 1.0 if part == "value_tokens" else 1 / rows.copies
                    yield GrownParameter(f"{name}.{part}".lstrip("."), old, new, rows, scale)
                del old
            with torch.no_grad():  # somebody may have made it a parameter
                if method == "random":
                    layer.tau.fill_(math.sqrt(rows.after))
                else:
                    layer.tau.copy_(layer.tau.double() * math.sqrt(rows.copies))

    return replace()


def _plan_rows(name: str, layer: Pattention, total: int, method: str) -> Rows:
    rows = plan_rows(layer.num_tokens, total, method, layer.score_norm, name)
    if total == rows.before:
        return rows
    if method != "random" and total > rows.copies * rows.before and layer.value_std == 0:
        raise UserError(f"method: new keys and new values of layer {name!r} would both be zero, and never train")
    for part in _parts(layer):
        parameter, layer_part = layer._parameters.get(part), f"{name}.{part}".lstrip(".")
        if parametrize.is_parametrized(layer, part) or parameter is None:
            raise UserError(f"tokens: {layer_part} is parametrized; remove the parametrization before a growth")
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UserError(f"tokens: {layer_part} carries hooks that a growth would lose; remove them first")
    return rows


def _check_ties(module: nn.Module, plan: Iterable[tuple[str, Pattention, Rows]]) -> None:
    """Raises a ``ValueError`` if a parameter that grows also stands where it would not grow in the same way."""
    rows_of = {layer: rows for _, layer, rows in plan}
    ways = {getattr(layer, part): (part, rows) for layer, rows in rows_of.items() for part in _parts(layer)}
    for name, owner in module.named_modules():
        for part, parameter in owner._parameters.items():
            if parameter in ways and ways[parameter] != (part, rows_of.get(owner)):  # type: ignore[call-overload]
                raise UserError(
                    f"tokens: {f'{name}.{part}'.lstrip('.')} is tied to parameter tokens that would grow in another way"
                )


def added_bytes(layer: Pattention, total: int) -> int:
    """Bytes by which the parameters of a layer grow on this process when it grows to ``total`` tokens."""
    held = sum(local(getattr(layer, part)).nbytes for part in _parts(layer))
    return held * (total - layer.num_tokens) // layer.num_tokens


def check_memory(needed: int, device: torch.device, setting: str) -> None:
    """Reject a growth whose new parameters alone need more memory than there is.

    Args:
        needed: Bytes.
        device: Where they will be.
        setting: What the user calls the growth, for the message.

    Raises:
        UserError: If the device has less available.
    """
    available = _available_memory(device)
    if available is not None and needed > available:
        raise UserError(
            f"{setting}: the new parameters alone need {needed / 2**30:,.1f} GiB, "
            f"and {available / 2**30:,.1f} GiB of memory are available on {device}"
        )


def _available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; ``None`` where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.is_file():
        return None
    fields = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def _parts(layer: Pattention) -> list[str]:
    """The tensors of a layer that grow."""
    return [part for part in layer.PARTS if getattr(layer, part) is not None]


def _layer_generator(seed: int, name: str, total: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{total}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@torch.no_grad()
def regrown(old: Tensor, rows: Rows, fill: Fill) -> Tensor:
    """What this process holds of a tensor that grows by rows; of one that is not divided, all.

    Args:
        old: The tensor, whole or divided, (N, ...).
        rows: Where the new rows come from.
        fill: Writes the new rows.
    """
    stays = moves_no_rows(old, rows.before, rows.copies) and rows.after == rows.copies * rows.before
    if stays:
        own = owned_rows(old, rows.before)
        here, place = local(old), slice(own.start, own.stop)
    else:
        here, place = gather(old), slice(0, rows.before)
    copied = rows.copies * len(here)
    new = here.new_empty((copied + rows.after - rows.copies * rows.before, *here.shape[1:]))
    fill(new[:copied].view(len(here), rows.copies, *here.shape[1:]), new[copied:], here, place)
    if stays or not isinstance(old, DTensor):
        return new
    own = owned_rows(old, rows.after)
    return new[own.start : own.stop].clone()


def _normal(
    shape: tuple[int, ...], place: slice, beside: Tensor, std: float, generator: torch.Generator
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of N(0, std) in float32 at least, block by block, each with its place among the rows that are wanted.

    They are drawn on the generator's device in float32, and all of them, so that every process draws the same.

    Args:
        shape: Of the whole.
        place: The rows that are wanted.
        beside: A tensor on the device and in the precision that are wanted.
        std: Standard deviation.
        generator: What draws.
    """
    wide = torch.promote_types(beside.dtype, torch.float32)
    height = 16 * max(1, _DRAWN_AT_ONCE // (16 * math.prod(shape[1:])))  # by 16 a CPU draws what it draws all at once
    for start in range(0, shape[0], height):
        drawn = torch.randn(
            (min(height, shape[0] - start), *shape[1:]),
            generator=generator,
            dtype=torch.float32,
            device=generator.device,
        )
        first, last = max(start, place.start), min(start + len(drawn), place.stop)
        if first < last:
            block = drawn[first - start : last - start].to(device=beside.device, dtype=wide).mul_(std)
            yield slice(first - place.start, last - place.start), block


_DRAWN_AT_ONCE = 2**18
"""Numbers; 1 MB, which stays in a CPU's cache."""


def _fill_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    for part, drawn in _normal(tuple(tensor.shape), slice(0, len(tensor)), tensor, std, generator):
        tensor[part] = drawn


@dataclass(frozen=True)
class _NewRows:
    """Writes the new rows of a layer's tensors, one method for each; see ``Fill``."""

    layer: Pattention
    rows: Rows
    method: str
    noise: float
    generator: torch.Generator

    def key_tokens(self, copies: Tensor, appended: Tensor, old: Tensor, place: slice) -> None:
        copies.copy_(old[:, None])
        if self.method == "random":
            _fill_normal(appended, self.layer.key_std, self.generator)
        else:
            appended.zero_()

    def value_tokens(self, copies: Tensor, appended: Tensor, old: Tensor, place: slice) -> None:
        count = self.rows.copies
        if count > 1:
            shape, std = (self.rows.before, *copies.shape[1:]), self.noise * self.layer.value_std
            for part, spread in _normal(shape, place, old, std, self.generator):
                spread.sub_(spread.mean(dim=1, keepdim=True)).mul_(math.sqrt(count / (count - 1)))
                whole, parts = old[part].to(spread.dtype), copies[part]
                parts.copy_(spread.add_(whole[:, None] / count))
                parts[:, -1] = whole - parts[:, :-1].to(spread.dtype).sum(dim=1)  # rounding must not change the sum
        else:
            copies.copy_(old[:, None])
        _fill_normal(appended, self.layer.value_std, self.generator)

    def scale_tokens(self, copies: Tensor, appended: Tensor, old: Tensor, place: slice) -> None:
        """A series as at birth for tokens that are no copies: one plain term, the others small."""
        copies.copy_(old[:, None])
        _fill_normal(appended, SERIES_STD, self.generator)
        appended[:, 0] = 1.0

    def shift_tokens(self, copies: Tensor, appended: Tensor, old: Tensor, place: slice) -> None:
        """No shift for tokens that are no copies, so that a score of zero has a weight of zero."""
        copies.copy_(old[:, None])
        appended.zero_()
