"""Published form of Pattention, ``y = GELU(tau s / ||s||) V`` with ``s = x K^T``, with a hand-written backward pass.

Source: arXiv 2410.23168, eq. 4 and appendix A, eq. 16. Autograd saves the scores, the normalized scores and their GELU.
This implementation saves only ``z = tau s / ||s||`` and one scalar per data token, and recomputes the GELU. Operations
between the matrix products run in place where possible. On CUDA, Triton kernels compute them where they are faster;
these save the scores instead of z.

With ``w = GELU(z)`` and the output gradient ``dy``: ``dV = w^T dy``, ``dw = dy V^T``, ``dz = dw * GELU'(z)``,
``ds = (dz - z (dz . z) / tau^2) tau / ||s||``, ``dK = ds^T x`` and ``dx = ds K``.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_tokenformer.models import kernel_choice

NORM_EPS = 1e-12
"""Smallest norm of a row of scores; rows below it are treated as zeros."""

_BLOCK = 2**24
"""Bytes of scores processed at once by blockwise kernels."""

_LARGEST_ROW = 2**14
"""Largest N whose rows fit into the registers of a Triton program."""


def l2_scale(scores: Tensor, tau: Tensor) -> Tensor:
    """Compute tau / ||scores||_2 of each row, (..., 1) in float32 or wider; 0 for a row of zeros."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=dtype).clamp_min(NORM_EPS)
    return torch.where(norm > NORM_EPS, tau / norm, 0.0)  # with sharded tokens, one all-reduce


def _plain(x: Tensor, key_tokens: Tensor, value_tokens: Tensor, tau: Tensor) -> Tensor:
    """Compute Pattention by the formula, in differentiable operations out of place; all that follows equals it."""
    scores = F.linear(x, key_tokens)  # (..., N)
    return F.gelu((scores * l2_scale(scores, tau)).to(scores.dtype)) @ value_tokens  # (..., D_out)


def l2_gelu(x: Tensor, key_tokens: Tensor, value_tokens: Tensor, tau: Tensor) -> Tensor:
    """Compute Pattention (..., D_in) -> (..., D_out), in autocast's precision if enabled.

    Args:
        x: Data tokens, (..., D_in).
        key_tokens: Key parameter tokens K, (N, D_in).
        value_tokens: Value parameter tokens V, (N, D_out).
        tau: Norm of the normalized scores, ().
    """
    device = x.device.type
    if torch._C._are_functorch_transforms_active():  # vmap, jvp and others need operations without side effects
        return _plain(x, key_tokens, value_tokens, tau)
    if is_one_row(x):
        return _one_row(x.reshape(-1), key_tokens, value_tokens, tau).view(*x.shape[:-1], -1)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, key_tokens, value_tokens = x.to(dtype), key_tokens.to(dtype), value_tokens.to(dtype)
    with _without_autocast(device):
        rows = x.reshape(-1, x.shape[-1])
        fused = (device == "cuda" or kernel_choice.INTERPRETED) and _takes_triton(rows, key_tokens, value_tokens, tau)
        if torch.is_grad_enabled():
            out = _L2GELU.apply(rows, key_tokens, value_tokens, tau, fused)
        else:
            out = _weigh_(F.linear(rows, key_tokens), tau, fused) @ value_tokens
    return out.view(*x.shape[:-1], value_tokens.shape[1])


class _L2GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key_tokens: Tensor, value_tokens: Tensor, tau: Tensor, fused: bool) -> Tensor:
        weights, kept, scale = _weigh(F.linear(x, key_tokens), tau, fused)
        ctx.save_for_backward(x, key_tokens, value_tokens, tau, kept, scale)
        return weights @ value_tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, key_tokens, value_tokens, tau, kept, scale = ctx.saved_tensors
        for_x, for_keys, for_values, for_tau, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # double backward
            return *_differentiable_gradients(ctx, grad), None
        x_grad = keys_grad = values_grad = tau_grad = None
        with _without_autocast(grad.device.type):
            if scale.dim() == 1:  # of the Triton kernel; the scores are kept
                scores_grad = grad @ value_tokens.T
                weights, dots = _triton().l2_gelu_rows_backward_(scores_grad, kept, scale, tau, for_values)
                values_grad = weights.T @ grad if for_values else None
                tau_grad = dots.sum(dtype=tau.dtype) / tau if for_tau else None
            else:
                if for_values:
                    values_grad = F.gelu(kept).T @ grad
                if for_x or for_keys or for_tau:
                    scores_grad = _before_gelu(grad @ value_tokens.T, kept)
                    if for_tau:
                        tau_grad = (scores_grad * kept).sum(dtype=tau.dtype) / tau
                    scores_grad = _before_norm(scores_grad, kept, scale, tau)
            keys_grad = scores_grad.T @ x if for_keys else None
            x_grad = scores_grad @ key_tokens if for_x else None
        return x_grad, keys_grad, values_grad, tau_grad, None


def _differentiable_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients through autograd, for double backward."""
    inputs = ctx.saved_tensors[:4]
    x, key_tokens, value_tokens, tau = inputs
    with _without_autocast(grad.device.type):
        out = _plain(x, key_tokens, value_tokens, tau)
        wanted = [one for one, needed in zip(inputs, ctx.needs_input_grad[:4], strict=True) if needed]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:4])


def _triton() -> Any:
    """Import the module of Triton kernels."""
    from lit_tokenformer.models import triton_l2_gelu

    return triton_l2_gelu


def _takes_triton(x: Tensor, key_tokens: Tensor, value_tokens: Tensor, tau: Tensor) -> bool:
    """Decide whether Triton kernels compute what is between the products of ``x`` (T, D_in)."""
    size = len(key_tokens)
    if size > _LARGEST_ROW or x.numel() == 0 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    fixed = kernel_choice.fixed_choice()
    if fixed is not None:
        return fixed
    training = torch.is_grad_enabled()

    def run(fused: bool) -> None:
        if training:
            held = _Held()
            _L2GELU.backward(held, _L2GELU.forward(held, x, key_tokens, value_tokens, tau, fused))
        else:
            _weigh_(F.linear(x, key_tokens), tau, fused) @ value_tokens

    key = ("l2_gelu", len(x).bit_length(), *key_tokens.shape, value_tokens.shape[1], x.dtype, x.device, training)
    return kernel_choice.is_faster(key, x, partial(run, False), partial(run, True))


class _Held:
    """Context of the autograd function outside of autograd."""

    needs_input_grad = (True, True, True, False, False)
    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


def _weigh(scores: Tensor, tau: Tensor, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute weights (T, N), what is kept for the backward pass (T, N), and the scale of each row.

    Torch's operations keep z, in place of the scores, and the scale (T, 1); the Triton kernel the scores and (T,).
    """
    if fused:
        weights, scale = _triton().l2_gelu_rows(scores, tau)
        return weights, scores, scale
    normalized, scale = _normalized(scores, tau)
    return F.gelu(normalized), normalized, scale


def _weigh_(scores: Tensor, tau: Tensor, fused: bool) -> Tensor:
    """Compute weights (T, N) in place of the scores."""
    if fused:
        _triton().l2_gelu_rows_(scores, tau)
        return scores
    return torch.ops.aten.gelu_(_normalized(scores, tau)[0])


def _on_cpu(x: Tensor) -> bool:
    """Check whether CPU kernels apply: they divide by the size, and a compiler fuses the plain formula better."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() > 0


def _normalized(scores: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Normalize scores (T, N) in place; return them and their scale, (T, 1) in float32 or wider."""
    if _on_cpu(scores) and scores.dtype == torch.bfloat16:  # mixed precision would copy the scores to float32
        one = scores.new_ones(len(scores), 1)
        scores, norm = torch.ops.aten._weight_norm_interface(scores, one, 0)
        if (norm <= NORM_EPS).any():
            scores.masked_fill_(norm <= NORM_EPS, 0.0)
        return scores.mul_(tau.item()), torch.where(norm > NORM_EPS, tau / norm, 0.0)
    scale = l2_scale(scores, tau)
    return scores.mul_(scale), scale


def is_one_row(x: Tensor) -> bool:
    """Check for a single data token on a CPU, without gradients and autocast."""
    alone = not torch.is_grad_enabled() and _on_cpu(x) and x.numel() == x.shape[-1]
    return alone and not (torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active())


def one_row_weights(scores: Tensor, tau: Tensor) -> Tensor:
    """Compute ``GELU(tau s / ||s||)`` of the scores of a single data token, in float32 or wider inside."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide).item()
    wide = wide.mul_(tau.item() / norm if norm > NORM_EPS else 0.0)
    return wide.mul_(torch.special.ndtr(wide)).to(scores.dtype)  # GELU without oneDNN's set-up on each call


def _one_row(x: Tensor, key_tokens: Tensor, value_tokens: Tensor, tau: Tensor) -> Tensor:
    """Compute a single data token, (D_in,) -> (D_out,), on a CPU; K and V are read once."""
    weights = one_row_weights(torch.mv(key_tokens, x), tau)  # (N,)
    if value_tokens.dtype.itemsize > 2:
        return weights @ value_tokens
    # a half-precision product would reorder V first, at twice the time
    size, threads = len(weights), torch.get_num_threads()
    bags = torch.arange(0, size, -(-size // threads))
    numbers = torch.arange(size)
    return F.embedding_bag(numbers, value_tokens, bags, mode="sum", per_sample_weights=weights).sum(dim=0)


def _before_gelu(grad: Tensor, normalized: Tensor) -> Tensor:
    """Backward of the GELU: gradient of the weights (T, N) -> gradient of z, in place."""
    if torch.compiler.is_compiling():
        return torch.ops.aten.gelu_backward(grad, normalized)
    return torch.ops.aten.gelu_backward.grad_input(grad, normalized, grad_input=grad)


def _before_norm(grad: Tensor, normalized: Tensor, scale: Tensor, tau: Tensor) -> Tensor:
    """Backward of the normalization: gradient of z (T, N) -> gradient of the scores (T, N)."""
    if _on_cpu(grad) and grad.dtype != torch.float16:  # fused kernel of weight normalization
        given = grad, normalized, (scale * tau).to(grad.dtype), tau.to(scale.dtype).expand(scale.shape).contiguous()
        if grad.nbytes <= _BLOCK:
            return torch.ops.aten._weight_norm_interface_backward(*given, 0)[0]
        rows = max(1, _BLOCK // (grad.shape[1] * grad.element_size()))
        for block in zip(*(one.split(rows) for one in given), strict=True):
            block[0].copy_(torch.ops.aten._weight_norm_interface_backward(*block, 0)[0])
        return grad
    along = (grad * normalized).sum(dim=-1, keepdim=True, dtype=scale.dtype) / -tau.square()
    return grad.addcmul_(normalized, along.to(grad.dtype)).mul_(scale)
