"""Triton kernels of ``GELU(tau s / ||s||)`` for rows of scores s, and of its backward pass.

Each reads and writes every element once, where the formula in torch's operations takes five and fourteen passes over
memory. A program computes one row in registers, in float32. The operators are differentiable, and visible to
``torch.compile``, ``torch.export`` and fake tensors. With ``TRITON_INTERPRET=1`` in the environment they run on a CPU.

Shapes: T data tokens, N parameter tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_EPS = tl.constexpr(1e-12)  # NORM_EPS of pattention_kernels
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_PDF_AT_0 = tl.constexpr(0.3989422804014327)


@triton.jit
def _forward_row(scores, tau, weights, scale, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    s = tl.load(scores + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(s * s, axis=0))
    factor = tl.where(norm > _EPS, tl.load(tau).to(tl.float32) / tl.maximum(norm, _EPS), 0.0)
    z = s * factor
    tl.store(weights + row * size + columns, 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF)), mask=inside)
    tl.store(scale + row, factor)


@triton.jit
def _backward_row(  # type: ignore[no-untyped-def]
    grad, scores, scale, tau, weights, dots, size, BLOCK: tl.constexpr, WEIGHTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    places = row * size + columns
    factor = tl.load(scale + row)
    norm = tl.load(tau).to(tl.float32)  # of the normalized scores
    z = tl.load(scores + places, mask=inside, other=0.0).to(tl.float32) * factor
    cdf = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
    slope = cdf + z * _PDF_AT_0 * tl.exp(-0.5 * z * z)
    dz = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32) * slope
    dot = tl.sum(dz * z, axis=0)
    tl.store(grad + places, (dz - z * (dot / (norm * norm))) * factor, mask=inside)
    tl.store(dots + row, dot)
    if WEIGHTS:
        tl.store(weights + places, z * cdf, mask=inside)


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()  # traced, `contiguous` alone is a copy


def _launch(kernel: Any, rows: int, size: int, *tensors: Tensor, **options: Any) -> None:
    block = triton.next_power_of_2(size)
    warps = min(max(block // 512, 1), 32)  # 16 elements a thread
    if rows:
        kernel[(rows,)](*tensors, size, BLOCK=block, num_warps=warps, **options)


@triton_op("lit_tokenformer::l2_gelu", mutates_args=())
def l2_gelu_rows(scores: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Compute GELU(tau s / ||s||) of each row, 0 for a row of zeros.

    Args:
        scores: Scores s, (T, N), in float32, bfloat16 or float16.
        tau: Norm of the normalized scores, ().

    Returns:
        Weights (T, N), and the scale tau / ||s|| of each row, (T,) in float32.
    """
    scores = _contiguous(scores)
    weights, scale = torch.empty_like(scores), scores.new_empty(len(scores), dtype=torch.float32)
    _launch(wrap_triton(_forward_row), len(scores), int(scores.shape[1]), scores, tau, weights, scale)
    return weights, scale


@triton_op("lit_tokenformer::l2_gelu_", mutates_args=("scores",))
def l2_gelu_rows_(scores: Tensor, tau: Tensor) -> None:
    """Replace contiguous scores (T, N) by their weights, see :func:`l2_gelu_rows`."""
    scale = scores.new_empty(len(scores), dtype=torch.float32)
    _launch(wrap_triton(_forward_row), len(scores), int(scores.shape[1]), scores, tau, scores, scale)


@triton_op("lit_tokenformer::l2_gelu_backward_", mutates_args=("grad",))
def l2_gelu_rows_backward_(
    grad: Tensor, scores: Tensor, scale: Tensor, tau: Tensor, with_weights: bool
) -> tuple[Tensor, Tensor]:
    """Replace the gradient of the weights by that of the scores, (T, N), and recompute the weights.

    Args:
        grad: Gradient of the weights, (T, N), contiguous; overwritten.
        scores: Scores s, (T, N).
        scale: Scale of each row, (T,).
        tau: Norm of the normalized scores, ().
        with_weights: Whether the weights are returned.

    Returns:
        Weights (T, N), or an empty tensor, and the product of each row of z with its gradient, (T,) in float32.
    """
    scores = _contiguous(scores)
    weights = torch.empty_like(scores) if with_weights else scores.new_empty(0)
    dots, size = torch.empty_like(scale), int(scores.shape[1])
    kernel = wrap_triton(_backward_row)
    _launch(kernel, len(scores), size, grad, scores, scale, tau, weights, dots, WEIGHTS=with_weights)
    return weights, dots


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
    scores, tau, scale = ctx.saved_tensors
    grad = grad.clone(memory_format=torch.contiguous_format)
    _, dots = l2_gelu_rows_backward_(grad, scores, scale, tau, False)
    tau_grad = dots.sum(dtype=tau.dtype) / tau if ctx.needs_input_grad[1] else None
    return grad if ctx.needs_input_grad[0] else None, tau_grad


l2_gelu_rows.register_autograd(_backward, setup_context=_save)
