"""WKV, the linear-time attention of RWKV-4: an average of values with exponentially decaying weights.

Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048v2, section 3.1.2, eq. 16.
:func:`wkv_recurrent` is the numerically stable recurrence of appendix D, as in the published CUDA kernel. Per channel,
with w = exp(time_decay) and u = time_first::

    y_t = (sum_{i<t} e^{-(t-1-i)w + k_i} v_i + e^{u + k_t} v_t) / (the same sums without v)

Difference from the published kernel: training uses a two-level scan instead of one step per data token. Its state is
the mean of the values and the logarithm of the sum of their weights, neither of which can overflow; two states combine
by a sigmoid and a logaddexp. The backward pass is the same scan from the right.

Shapes: B batch, T data tokens, D channels; P payloads that share weights, L data tokens per chunk, n chunks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_tokenformer.errors import UserError

EMPTY = -1e38
"""Logarithm of a zero weight; also the key of a masked data token."""


class WKVState(NamedTuple):
    """Recurrent state of WKV: weighted sum of the values and sum of the weights.

    The sums are ``numerator * e^log_scale`` and ``denominator * e^log_scale``; the representation is not unique.

    Attributes:
        numerator: Weighted sum of the values, (B, D), float32, or float64 if the inputs are.
        denominator: Sum of the weights, (B, D).
        log_scale: Logarithm of the common scale, (B, D), in nats.
    """

    numerator: Tensor
    denominator: Tensor
    log_scale: Tensor


def initial_state(
    batch: int, dim: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> WKVState:
    """Create the state before the first data token.

    Args:
        batch: Batch size, B.
        dim: Number of channels, D.
        device: Device of the state.
        dtype: float32 or float64; half precision is too coarse for a decay close to 1.

    Returns:
        Empty sums, (B, D) each.
    """
    zeros = torch.zeros(batch, dim, device=device, dtype=dtype)
    return WKVState(zeros, zeros.clone(), torch.full_like(zeros, EMPTY))


def wkv_recurrent(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """Compute WKV one data token at a time, as the published CUDA kernel; autograd also flows through the state.

    Args:
        time_decay: Logarithm of the decay rate per data token, (D,).
        time_first: Bonus u added to the key of the current data token, (D,), in nats.
        key: Logarithms of the weights, (B, T, D).
        value: Values, (B, T, D).
        state: State before the first data token; ``None`` for an empty one.

    Returns:
        Output, (B, T, D) in the dtype of ``value``, and the state after the last data token.
    """
    dtype = _exact_dtype(time_decay, time_first, key, value)
    if state is None:
        state = initial_state(key.shape[0], key.shape[2], key.device, dtype)
    with _without_autocast(key.device):
        log_decay, first = -time_decay.to(dtype).exp(), time_first.to(dtype)
        a, b, p = (tensor.to(dtype) for tensor in state)
        outputs = []
        for k, v in zip(_log_weights(key, dtype).unbind(1), value.to(dtype).unbind(1), strict=True):  # (B, D)
            q = torch.maximum(p, first + k).detach()  # a scale cancels out, so it needs no gradient
            past, own = torch.exp(p - q), torch.exp(first + k - q)
            outputs.append((past * a + own * v) / (past * b + own))
            q = torch.maximum(p + log_decay, k).detach()
            past, own = torch.exp(p + log_decay - q), torch.exp(k - q)
            a, b, p = past * a + own * v, past * b + own, q
        return torch.stack(outputs, dim=1).to(value.dtype), WKVState(a, b, p)


def wkv(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """Compute WKV of whole sequences in about 2 sqrt(T) steps; decoding (T = 1 without gradients) is recurrent.

    Computation is in float32, also under autocast, or in float64 if an input is. A key of -1e38 or less with a value of
    0 masks a data token: it has no weight and no gradient, and its output is 0 if nothing precedes it. A masked data
    token still counts for the decay, so only left padding has no effect on the rest.

    Args:
        time_decay: Logarithm of the decay rate, (D,): a weight shrinks by e^-exp(time_decay) per data token.
        time_first: Bonus u added to the key of the current data token, (D,), in nats.
        key: Logarithms of the weights, (B, T, D), T >= 1.
        value: Values, (B, T, D).
        state: State before the first data token, (B, D) each, without gradients; ``None`` for an empty one.

    Returns:
        Output, (B, T, D) in the dtype of ``value``, once differentiable in the four inputs, and the detached state
        after the last data token.

    Raises:
        UserError: If ``state`` requires a gradient.
        RuntimeError: In the backward pass, under double backward (``create_graph=True``).

    Example:
        >>> key, value = torch.zeros(1, 3, 1), torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> output, state = wkv(torch.full((1,), -30.0), torch.zeros(1), key, value)  # almost no decay: running means
        >>> output.flatten().tolist()
        [1.0, 2.0, 4.0]
    """
    if state is not None and any(tensor.requires_grad for tensor in state):
        raise UserError("state: requires a gradient, which wkv does not propagate (got requires_grad=True); detach it")
    if key.shape[1] == 1 and not torch.is_grad_enabled():
        return wkv_recurrent(time_decay, time_first, key, value, state)
    return _parallel(time_decay, time_first, key, value, state)


@torch.compiler.disable  # the unrolled scans take a minute to compile, per block
def _parallel(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: WKVState | None
) -> tuple[Tensor, WKVState]:
    dtype = _exact_dtype(time_decay, time_first, key, value)
    if state is None:
        state = initial_state(key.shape[0], key.shape[2], key.device, dtype)
    a, b, p = (tensor.to(dtype) for tensor in state)
    empty = b == 0
    mean = torch.where(empty, 0.0, a / b.masked_fill(empty, 1.0))
    log_sum = torch.where(empty, EMPTY, p + b.masked_fill(empty, 1.0).log())
    output, mean, log_sum = _WKV.apply(time_decay, time_first, key, value, mean, log_sum)
    return output, WKVState(mean, torch.ones_like(mean), log_sum)


class _WKV(torch.autograd.Function):
    """Output (B, T, D), with the mean and the log-sum (B, D) after it.

    Saved for backward: ``key``, ``value``, and mean and log-sum before each data token; 4 D elements per data token.
    Output and denominator are recomputed from them in one step.
    """

    @staticmethod
    def forward(
        ctx: Any, time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, mean: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = log_sum.dtype
        with _without_autocast(key.device):
            log_decay, k, v = -time_decay.to(dtype).exp(), _log_weights(key, dtype), value.to(dtype)
            means, log_sums = _scan(log_decay, k, v[None], mean[None], log_sum)
            before = means[0], log_sums
            output, _ = _add(*before, v, k + time_first.to(dtype))
            after = _add(before[0][:, -1], before[1][:, -1] + log_decay, v[:, -1], k[:, -1])
        ctx.save_for_backward(time_decay, time_first, key, value, *before)
        ctx.mark_non_differentiable(*after)
        return output.to(value.dtype), *after

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # `once_differentiable` would silently drop terms after a linear loss
            raise RuntimeError("wkv: double backward is not supported (got create_graph=True)")
        time_decay, time_first, key, value, mean, log_sum = ctx.saved_tensors
        dtype = log_sum.dtype
        with _without_autocast(key.device):
            log_decay, first = -time_decay.to(dtype).exp(), time_first.to(dtype)
            k, v, g = _log_weights(key, dtype), value.to(dtype), grad_output.to(dtype)
            y, log_denominator = _add(mean, log_sum, v, k + first)
            # before the first data token 1 / denominator is set to 0 instead of infinity, so all gradients are 0
            log_denominator = log_denominator.masked_fill_(log_denominator < EMPTY / 2, -EMPTY)
            # gradients of numerators and denominators: g and -g y, weighted by 1 / denominator, from the right
            payload = torch.stack((g, -g * y))
            nothing = torch.zeros_like(payload[:, :, 0]), torch.full_like(log_sum[:, 0], EMPTY)
            (to_numerator, to_denominator), reach = _scan(log_decay, -log_denominator, payload, *nothing, reverse=True)
            own = torch.exp(k + first - log_denominator) * g
            later = torch.exp(k + reach)
            grad_first = own * (v - y)
            grad_key = grad_first + later * (to_numerator * v + to_denominator)
            grad_value = own + later * to_numerator
            # gradient paths that cross a data token, from earlier inputs to later outputs, carry its decay
            grad_decay = torch.exp(log_sum + reach + log_decay) * (to_numerator * mean + to_denominator) * log_decay
        return (
            grad_decay.sum((0, 1)).to(time_decay.dtype),
            grad_first.sum((0, 1)).to(time_first.dtype),
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            None,
            None,
        )


def _scan(
    log_decay: Tensor, log_weight: Tensor, payload: Tensor, mean: Tensor, log_sum: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Scan for the state before each data token: within all chunks in parallel, then across chunks.

    Args:
        log_decay: Logarithm of the decay per data token, (D,).
        log_weight: Logarithms of the weights, (B, T, D).
        payload: Values to average, (P, B, T, D).
        mean: Mean before the sequence, (P, B, D).
        log_sum: Log-sum before the sequence, (B, D).
        reverse: Scan from the right, for the state after each data token.

    Returns:
        Means (P, B, T, D) and log-sums (B, T, D).
    """
    length = log_weight.shape[1]
    chunk = 1 << (length.bit_length() // 2)  # L: a power of two next to sqrt(T), which divides the usual T
    if extra := -length % chunk:
        log_weight, payload = F.pad(log_weight, (0, 0, 0, extra), value=EMPTY), F.pad(payload, (0, 0, 0, extra))
    log_weight, payload = log_weight.unflatten(1, (-1, chunk)), payload.unflatten(2, (-1, chunk))  # (.., n, L, D)

    means, log_sums = torch.empty_like(payload), torch.empty_like(log_weight)
    local = torch.zeros_like(payload[..., 0, :]), torch.full_like(log_weight[..., 0, :], EMPTY)  # (.., n, D)
    steps = range(chunk)
    for j in reversed(steps) if reverse else steps:
        means[..., j, :], log_sums[..., j, :] = local
        local = _add(local[0], local[1] + log_decay, payload[..., j, :], log_weight[..., j, :])

    entering = torch.empty_like(local[0]), torch.empty_like(local[1])  # (.., n, D)
    steps = range(local[1].shape[1])
    for c in reversed(steps) if reverse else steps:
        entering[0][..., c, :], entering[1][..., c, :] = mean, log_sum
        mean, log_sum = _add(mean, log_sum + chunk * log_decay, local[0][..., c, :], local[1][..., c, :])

    distance = torch.arange(chunk, device=log_decay.device)
    decays = (distance.flip(0) if reverse else distance)[:, None] * log_decay  # (L, D)
    means, log_sums = _add(means, log_sums, entering[0].unsqueeze(-2), entering[1].unsqueeze(-2) + decays)
    return means.flatten(2, 3)[:, :, :length], log_sums.flatten(1, 2)[:, :length]


def _add(mean: Tensor, log_sum: Tensor, other_mean: Tensor, other_log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two states; either may be empty."""
    share = torch.sigmoid(other_log_sum - log_sum)
    return torch.lerp(mean, other_mean, share), torch.logaddexp(log_sum, other_log_sum)


def _exact_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _log_weights(key: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamp keys so that all masked data tokens have the same one, whatever their half-precision rounding."""
    return key.to(dtype).clamp_min(EMPTY)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    available = torch.amp.is_autocast_available(device.type)  # not for "meta"
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
