"""Experts: several feed-forwards behind a router, each data token uses a few of them.

Each data token is routed to the ``top_k`` of E experts with the largest scores ``p + bias``, with the router's
probabilities ``p = softmax(W x)``. The output is ``sum_e g_e f_e(x)`` with gates ``g = p / sum(p)`` over the chosen
experts, where the sum has no gradient. Gates therefore sum to 1, and equal experts compute the function of one of them,
while the router receives the gradient of ``log p`` for one expert as well. Sources: sparse upcycling (arXiv
2212.05055), top-k routing (arXiv 1701.06538, 2401.04088), shared experts (arXiv 2401.06066).

The load is balanced without an auxiliary loss (arXiv 2408.15664): ``bias`` takes part in the choice alone, and moves
once per optimizer step, up for experts with fewer data tokens than the mean and down for the others. The change is
proportional to the relative deviation, and limited, where the paper takes its sign. No data token is dropped.

Shapes: M data tokens, D width, E experts, k experts of each data token, G groups (1 unless tokens are divided).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.part_cost import Cost, count_parameters, part_cost
from lit_tokenformer.models.pattention import Pattention
from lit_tokenformer.registry import SCORE_NORMS

ROUTER_STD = 0.02
"""Initial standard deviation of a router's weights."""

Dispatch = Callable[["ExpertList", Tensor, "Grouped"], Tensor]
"""Function that applies experts to rows by expert, (M, D) -> (M, D), wherever these experts are."""

FEW = 8
"""Data tokens per expert below which experts are computed one by one; a product of all experts reads every weight."""


class Router(nn.Module):
    """Choose experts for data tokens, in float32 or wider.

    With several groups, experts are chosen in each of them: number ``g E + e`` is expert e of group g.

    Args:
        dim: Width, D.
        experts: Number of experts, E.
        top_k: Experts of each data token, k, in each group.
        balance: Largest change of an expert's bias per optimizer step, relative to the mean of p, 1 / E.
        groups: Number of groups, G.

    Attributes:
        weight: Weights, (G E, D).
        bias: Bias of the choice, (G E,) float32 or wider; equal on all processes.
        load: Data tokens of each expert since the last optimizer step, (G E,), in training.
        entropy: Sum of the entropies of ``p`` over these data tokens in nats, ().
        last_load: Share of each expert in the last optimizer step, over all processes, (G E,); the sum is 1.
        last_entropy: Mean entropy in the last optimizer step, over all processes, ().

    Example:
        >>> chosen, gates = Router(4, experts=3, top_k=1)(torch.randn(2, 4))
        >>> chosen.shape, gates.tolist()
        (torch.Size([2, 1]), [[1.0], [1.0]])
    """

    bias: Tensor

    def __init__(self, dim: int, experts: int, top_k: int = 1, balance: float = 0.1, groups: int = 1) -> None:
        super().__init__()
        self.top_k = top_k
        self.balance = balance
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * experts, dim))
        nn.init.normal_(self.weight, std=ROUTER_STD)
        self.register_buffer("bias", torch.zeros(groups * experts, dtype=_wide(self.weight)))
        # not buffers: DDP would overwrite those of other processes within a global step
        self.load = self.entropy = torch.empty(0)
        self.last_load = self.last_entropy = torch.empty(0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route data tokens (M, D).

        Returns:
            Chosen experts (M, G k) int64, and their gates (M, G k).
        """
        dtype = _wide(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
        log_p = logits.unflatten(-1, (self.groups, -1)).log_softmax(dim=-1)  # (M, G, E)
        bias = self.bias.view(self.groups, -1)
        chosen = (log_p.detach().exp() + bias).topk(self.top_k, dim=-1).indices  # (M, G, k)
        of_chosen = log_p.gather(-1, chosen)
        gates = (of_chosen - of_chosen.detach().logsumexp(dim=-1, keepdim=True)).exp()
        first = torch.arange(0, self.bias.numel(), bias.shape[1], device=x.device)
        chosen = (chosen + first[:, None]).flatten(1)
        if self.training and torch.is_grad_enabled():
            self._count(chosen, log_p.detach())
        return chosen, gates.flatten(1)

    @torch.no_grad()
    def _count(self, chosen: Tensor, log_p: Tensor) -> None:
        if self.load.shape != self.bias.shape or self.load.device != chosen.device:
            self.load = torch.zeros_like(self.bias)
            self.entropy = self.bias.new_zeros(())
        self.load.add_((chosen.flatten()[:, None] == torch.arange(len(self.bias), device=chosen.device)).sum(dim=0))
        self.entropy.sub_((log_p.exp() * log_p).sum())

    @torch.no_grad()
    def step(self, load: Tensor, entropy: Tensor) -> None:
        """Balance the experts after an optimizer step's last backward pass, and reset its counts.

        Args:
            load: Data tokens of each expert, over all processes, (E,).
            entropy: Sum of the entropies over all data tokens, ().
        """
        by_group = load.view(self.groups, -1)
        change = self.balance / by_group.shape[1] * (1 - by_group / by_group.mean()).clamp_min(-1)
        self.bias.add_((change - change.mean(dim=1, keepdim=True)).flatten())
        self.last_load = load / load.sum()
        self.last_entropy = entropy * self.top_k / load.sum()
        self.load.zero_()
        self.entropy.zero_()

    def extra_repr(self) -> str:
        shape = f"{self.weight.shape[1]}, experts={self.weight.shape[0] // self.groups}, top_k={self.top_k}"
        return f"{shape}, balance={self.balance:g}, groups={self.groups}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        before = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype.itemsize < 4:  # small changes would be lost in half precision
            self.bias = before.to(self.bias.device)
        return self


class ExpertList(nn.ModuleList):
    """Feed-forwards of equal shape, each for its own rows, (M, D) -> (M, D)."""

    def forward(self, rows: Tensor, groups: Grouped, first: int = 0) -> Tensor:
        """Apply each expert to its rows: all at once, or one by one.

        Args:
            rows: Rows by expert, (M, D).
            groups: Numbers of rows; of fewer experts than there are, for consecutive ones.
            first: Number of the first of these experts.
        """
        experts: Any = list(self)[first : first + len(groups.sizes)]
        if len(rows) >= FEW * len(experts) and can_group(experts, rows):
            return experts[0].grouped(experts, rows, groups)
        # an expert without rows gets a gradient of zero, since all processes reduce the same gradients
        every = torch.is_grad_enabled() or not len(rows)
        parts = zip(experts, rows.split(groups.sizes.tolist()), strict=True)
        return torch.cat([expert(part[None])[0] for expert, part in parts if every or len(part)])


class Experts(nn.Module):
    """Feed-forwards behind a router, (B, T, D) -> (B, T, D).

    With several groups, the tokens of Pattention feed-forwards are divided into as many shards, and an expert is chosen
    for each shard ("virtual groups", arXiv 2410.07524). Scores are normalized over the chosen ones of all shards, so
    equal experts compute the function of one of them as well.

    Args:
        experts: Pointwise feed-forwards of equal shape, E.
        dim: Width, D.
        top_k: Experts of each data token.
        shared: Further feed-forwards, which every data token uses.
        balance: Largest change of a routing bias per optimizer step; see :class:`Router`.
        groups: Shards of the parameter tokens, G.

    Attributes:
        dispatch: Sends rows to the processes of their experts; ``None`` if this process has all experts.

    Example:
        >>> layer = Experts([nn.Linear(4, 4) for _ in range(3)], dim=4)
        >>> layer(torch.randn(2, 5, 4)).shape
        torch.Size([2, 5, 4])
    """

    pointwise = True
    aux_losses: tuple[str, ...] = ()

    def __init__(
        self,
        experts: Iterable[nn.Module],
        dim: int,
        top_k: int = 1,
        shared: Iterable[nn.Module] = (),
        balance: float = 0.1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.experts = ExpertList(experts)
        self.dispatch: Dispatch | None = None
        self.shared = nn.ModuleList(shared)
        self.router = Router(dim, len(self.experts), top_k, balance, groups)
        for expert in self.experts if groups > 1 else ():
            expert.appendable = False  # type: ignore[assignment]  # tokens would move to another shard

    def new_state(self, length: int) -> None:
        """Create a decoding state; ``None``, since a pointwise layer needs none."""
        return None

    @property
    def output_layer(self) -> nn.Module:
        """Layer that writes to the residual stream: the layer itself."""
        return self

    def outputs(self) -> list[nn.Parameter]:
        """Parameters that scale the output; with all of them zero, the output is zero."""
        return [one for expert in (*self.experts, *self.shared) for one in output_parameters(expert)]

    def cost(self, length: int) -> Cost:
        """Cost per data token: that of its experts, and of the router."""
        one, chosen, (scores, dim) = part_cost(self.experts[0], length), self.router.top_k, self.router.weight.shape
        used = chosen + len(self.shared)
        rows = chosen * self.router.groups
        return Cost(
            count_parameters(self),
            used * one.flops + 2 * scores * dim,
            dim + scores + used * one.kept + rows * dim,  # the rows of each expert, and its outputs for the gates
            inactive=(len(self.experts) - chosen) * one.parameters,
        )

    def forward(self, x: Tensor, context: Any = None, state: None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        rows = x.flatten(0, -2)  # (M, D)
        chosen, gates = self.router(rows)  # (M, G k)
        order = chosen.flatten().argsort(stable=True)  # (M G k), by expert
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        numbers = torch.arange(len(self.router.bias), device=x.device)
        groups = Grouped((chosen.flatten()[:, None] == numbers).sum(dim=0))
        by_expert = rows.index_select(0, order // gates.shape[1])
        if self.router.groups == 1:
            out = self._by_expert(by_expert, groups).index_select(0, place).unflatten(0, gates.shape)  # (M, k, D)
            total = (out * gates[..., None]).sum(dim=1).to(out.dtype)
        else:
            total = self._by_shard(by_expert, gates, order, place, groups)
        total = total.view(*x.shape[:-1], -1)
        for expert in self.shared:
            total = total + expert(x)
        return total

    @torch.compiler.disable  # shapes follow the routing: a graph for each would exceed the recompile limit
    def _by_expert(self, rows: Tensor, groups: Grouped) -> Tensor:
        """Apply each expert to its rows, wherever it is."""
        return self.experts(rows, groups) if self.dispatch is None else self.dispatch(self.experts, rows, groups)

    @torch.compiler.disable
    def _by_shard(self, rows: Tensor, gates: Tensor, order: Tensor, place: Tensor, groups: Grouped) -> Tensor:
        """Attend from each data token to the chosen shards, under one norm: rows (M G, D) by expert -> (M, D)."""
        experts: Any = list(self.experts)
        first, shards = experts[0], self.router.groups
        if any(expert.groups is not None for expert in experts):
            raise UserError("expert_groups: adapters of the feed-forward are not supported (expected other tokens)")

        def shard(name: str) -> Tensor:  # (G E, N / G, D)
            every = torch.stack([getattr(expert, name) for expert in experts])
            return every.unflatten(1, (shards, -1)).transpose(0, 1).flatten(0, 1)

        scores = groups.product(rows, shard("key_tokens").mT).index_select(0, place)  # (M G, N / G)
        norm = SCORE_NORMS[first.score_norm].function
        weights = norm(scores.unflatten(0, gates.shape).flatten(1), first.tau, first.activation)  # (M, N)
        weights = (weights.unflatten(1, (shards, -1)) * gates[..., None]).to(weights.dtype).flatten(0, 1)
        out = groups.product(weights.index_select(0, order), shard("value_tokens")).index_select(0, place)
        return first.dropout(out.unflatten(0, gates.shape).sum(dim=1))


class Grouped:
    """Products of consecutive groups of rows with a weight each.

    Args:
        sizes: Rows of each group, (E,) int64.
    """

    def __init__(self, sizes: Tensor) -> None:
        self.sizes = sizes
        self.ends = sizes.cumsum(0, dtype=torch.int32)

    def project(self, layers: Sequence[Any], x: Tensor) -> Tensor:
        """Apply a projection to each group of rows, (M, D_in) -> (M, D_out).

        Args:
            layers: Linear or Pattention layers, one per group; see :func:`can_group`.
            x: Rows, (M, D_in).
        """
        if isinstance(layers[0], Pattention):
            first = layers[0]
            scores = self.product(x, torch.stack([layer.key_tokens for layer in layers]).mT)  # (M, N)
            tau = self._each(torch.stack([layer.tau for layer in layers]), len(x))[:, None]
            values, norm = torch.stack([layer.value_tokens for layer in layers]), SCORE_NORMS[first.score_norm]

            def output(scores: Tensor, tau: Tensor, values: Tensor) -> Tensor:
                return self.product(norm.function(scores, tau, first.activation), values)

            if norm.whole is None:
                return output(scores, tau, values)
            # keep the scores alone for the backward pass, as Pattention does by itself
            return checkpoint(output, scores, tau, values, use_reentrant=False, preserve_rng_state=False)
        out = self.product(x, torch.stack([layer.weight for layer in layers]).mT)
        if layers[0].bias is None:
            return out
        return out + self._each(torch.stack([layer.bias for layer in layers]).to(out.dtype), len(x))

    def _each(self, values: Tensor, rows: int) -> Tensor:
        """Repeat the value of each group for its rows, (E, ...) -> (M, ...)."""
        return values.repeat_interleave(self.sizes, dim=0, output_size=rows)

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """Multiply each group of rows (M, D_in) by its weights, (E, D_in, D_out)."""
        dtype = _compute_dtype(x)
        x, weights = x.to(dtype), weights.to(dtype)
        if _has_product(dtype) and all(size % _step(dtype) == 0 for size in weights.shape[1:]):
            return F.grouped_mm(x, weights, offs=self.ends)
        parts = zip(x.split(self.sizes.tolist()), weights.unbind(), strict=True)
        return torch.cat([part @ weight for part, weight in parts])


def can_group(experts: Sequence[nn.Module], rows: Tensor) -> bool:
    """Check whether products of all experts at once apply: plain layers of suitable shapes, and a recent torch."""
    dtype = _compute_dtype(rows)
    if not _has_product(dtype) or not hasattr(experts[0], "grouped"):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    step = _step(dtype)
    return all(_is_plain(module, step) for expert in experts for module in expert.modules())


def _is_plain(module: nn.Module, step: int) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return False
    own = [one for one in module._parameters.values() if one is not None]
    known = type(module) is nn.Linear or (
        isinstance(module, Pattention) and module.groups is None and module.series == 1
    )
    plain = all(type(one) is nn.Parameter and not isinstance(one, DTensor) for one in own)
    return plain and (not own or (known and all(size % step == 0 for one in own for size in one.shape)))


def output_parameters(part: Any) -> Iterable[nn.Parameter]:
    """Parameters of the layer of ``part`` that writes to the residual stream."""
    layer = part.output_layer
    return layer.outputs() if hasattr(layer, "outputs") else layer.parameters()


def num_experts(feed_forward: nn.Module) -> int:
    """Return the number of experts of a feed-forward; 1 without a router."""
    return len(feed_forward.experts) if isinstance(feed_forward, Experts) else 1


def saved_experts(names: Iterable[str], prefix: str = "") -> int:
    """Return the number of experts of a model with these names in its state dict, 1 without a router."""
    pattern = re.compile(re.escape(prefix) + r"blocks\.\d+\.mlp\.experts\.(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))}) or 1


def routers(module: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Yield the layers with experts, with their names."""
    for name, layer in module.named_modules():
        if isinstance(layer, Experts):
            yield name, layer


@torch.no_grad()
def finish_step(module: nn.Module) -> None:
    """Balance all experts, once per optimizer step: after its last backward pass, before the optimizer's step.

    Loads are summed over all processes. The gradients of experts without data tokens are set to ``None``, so that the
    optimizer skips them: neither weight decay nor momentum changes an idle expert. Tasks call this; call it in a
    training loop of your own.

    Args:
        module: Model, or any module that contains models.

    Example:
        >>> from lit_tokenformer.models import create_backbone
        >>> sizes = {"dim": 8, "depth": 1, "num_heads": 1, "param_tokens": 4, "vocab_size": 5}
        >>> model = create_backbone("tokenformer_lm_tiny", experts=2, **sizes)
        >>> model(torch.tensor([[1, 2, 3]])).sum().backward()
        >>> finish_step(model)
        >>> round(sum(expert_load(model)["blocks.0.mlp"].tolist()), 3)
        1.0
    """
    layers = [layer for _, layer in routers(module) if len(layer.router.load)]
    if not layers:
        return
    counts = torch.cat([part for one in layers for part in (one.router.load, one.router.entropy[None])])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    sizes = [len(one.router.load) + 1 for one in layers]
    # one transfer to the host for all layers
    for layer, own, on_host in zip(layers, counts.split(sizes), counts.cpu().split(sizes), strict=True):
        used = on_host[:-1].view(layer.router.groups, -1).sum(dim=0).tolist()
        if not any(used):
            continue
        layer.router.step(own[:-1], own[-1])
        for expert in (expert for expert, tokens in zip(layer.experts, used, strict=True) if not tokens):
            for parameter in expert.parameters():
                parameter.grad = None


def pending_load(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the loads of an incomplete optimizer step, by name."""
    return {
        f"{name}.{key}": getattr(layer.router, key) if len(layer.router.load) else None
        for name, layer in routers(module)
        for key in ("load", "entropy")
    }


def restore_load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore the result of :func:`pending_load`, on any device."""
    for name, layer in routers(module):
        for key in ("load", "entropy") if f"{name}.load" in state else ():
            setattr(layer.router, key, state[f"{name}.{key}"].to(layer.router.bias))


def expert_load(module: nn.Module) -> dict[str, Tensor]:
    """Return the share of each expert in the data tokens of the last optimizer step, (G E,), by name of the layer."""
    return {name: layer.router.last_load for name, layer in routers(module) if len(layer.router.last_load)}


def expert_metrics(module: nn.Module) -> dict[str, float]:
    """Summarize the routing of the last optimizer step.

    Returns:
        ``experts/load_max``, the largest load relative to the mean; ``experts/router_entropy``, the mean entropy of
        the routers in nats; and ``experts/load/LAYER/EXPERT``, the share of each expert. Empty without experts.
    """
    loads = expert_load(module)
    if not loads:
        return {}
    entropies = [layer.router.last_entropy for name, layer in routers(module) if name in loads]
    found = {
        "experts/load_max": max((load.max() * len(load)).item() for load in loads.values()),
        "experts/router_entropy": torch.stack(entropies).mean().item(),
    }
    for name, load in loads.items():
        found |= {f"experts/load/{name}/{number}": share for number, share in enumerate(load.tolist())}
    return found


def _step(dtype: torch.dtype) -> int:
    """Return the divisor of all sizes that grouped_mm needs, which takes strides of multiples of 16 bytes."""
    return 16 // dtype.itemsize


def _has_product(dtype: torch.dtype) -> bool:
    """Check whether this torch has grouped_mm, and for a dtype."""
    return hasattr(F, "grouped_mm") and dtype in (torch.float32, torch.bfloat16, torch.float16)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
