"""Cross-entropy over a large vocabulary in chunks, without materializing all logits.

A chunk is a block of logit rows. Its gradient is computed in the forward pass, while its logits are in memory (the idea
of Liger kernels, arXiv 2410.10989, section 3.2). torch 2.14 provides ``F.linear_cross_entropy``, but under autocast it
rounds the loss to half precision, and it does not return the log-partition for the z-loss. The tests compare with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 2**28
"""Maximum size of a chunk of logits in bytes; larger chunks speed up matrix products."""
CACHED_ROWS = {"cpu": 16}
"""Rows per gradient computation, by device type: few enough to fit in a CPU cache."""
ACCELERATOR_ROWS = 1024
"""Rows per gradient computation on other devices; limits the memory of float32 intermediates."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the loss over rows, with gradients computed in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, z_loss: float, training: bool
    ) -> Tensor:
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        chunks = max(1, math.ceil(len(x) * len(weight) * dtype.itemsize / CHUNK_BYTES))
        needed = [training and one for one in ctx.needs_input_grad]  # needs_input_grad is unchanged under no_grad
        grad_x = torch.empty_like(x) if needed[0] else None
        grad_weight = None
        grad_bias = torch.zeros_like(bias) if bias is not None and needed[2] else None
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        with torch.autocast(device, enabled=False):
            kernel, start = weight.to(dtype), 0
            for rows, labels in zip(x.chunk(chunks), target.chunk(chunks), strict=True):
                piece = rows.to(dtype)
                logits = piece @ kernel.T  # (rows, V)
                few = CACHED_ROWS.get(device, ACCELERATOR_ROWS)
                for part, label in zip(logits.split(few), labels[:, None].split(few), strict=True):
                    total += _to_gradient(part, label, bias, z_loss, any(needed), grad_bias)
                grad = logits
                if grad_x is not None:
                    grad_x[start : start + len(grad)] = grad @ kernel
                if needed[1] and grad_weight is None:
                    grad_weight = (grad.T @ piece).to(weight.dtype)
                elif grad_weight is not None and grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad.T, piece)  # in place, without a temporary of the same size
                elif grad_weight is not None:
                    grad_weight += grad.T @ piece
                start += len(grad)
                del logits, grad
        ctx.gradients = grad_x, grad_weight, grad_bias
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("backward: the gradients of this loss were already consumed; recompute the loss")
        found, ctx.gradients = ctx.gradients, None  # scaled in place: the weight gradient is large
        grad_x, grad_weight, grad_bias = (None if one is None else one.mul_(grad.to(one.dtype)) for one in found)
        return grad_x, grad_weight, grad_bias, None, None, None


def _to_gradient(
    logits: Tensor, label: Tensor, bias: Tensor | None, z_loss: float, wanted: bool, grad_bias: Tensor | None
) -> Tensor:
    """Compute the loss of some rows, (), replace their logits by the gradient, and accumulate the bias gradient.

    Args:
        logits: Logits without the bias, (rows, V); overwritten.
        label: Token ids, (rows, 1); negative ones are ignored.
        bias: (V,).
        z_loss: Weight of the squared log-partition.
        wanted: Whether any input needs a gradient.
        grad_bias: (V,).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        wide += bias
    kept, known = (label >= 0).to(wide.dtype), label.clamp_min(0)
    scores = wide.log_softmax(dim=1)  # (rows, V)
    score = scores.gather(1, known)
    partition = wide.gather(1, known) - score  # (rows, 1)
    loss = (z_loss * partition.square() - score) * kept
    if wanted:
        grad = scores.exp_().mul_(kept * (1 + 2 * z_loss * partition)).scatter_add_(1, known, -kept)
        if grad_bias is not None:
            grad_bias += grad.sum(dim=0)
        logits.copy_(grad)
    return loss.sum()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, z_loss: float = 0.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of ``softmax(x W^T + b)``, plus ``z_loss`` times the squared log-partition.

    Args:
        x: Input of the output projection, (..., D).
        weight: W, (V, D).
        target: Token ids (...); negative ones are ignored.
        z_loss: Weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5; 1e-4 there).
        bias: b, (V,); ``None`` for zeros.

    Returns:
        The sum over targets in nats, (), in at least float32; and the number of targets, ().

    Example:
        >>> loss, count = linear_cross_entropy(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([3, -100]))
        >>> round(loss.item(), 4), count.item()  # ln 8
        (2.0794, 1)
    """
    total = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, bias, target.flatten(), z_loss, torch.is_grad_enabled())
    return total, (target >= 0).sum()
