"""Cross-entropy over a large vocabulary, without ever holding all logits.

The pieces are rows of the logits; the gradient of each is computed in the forward pass, while its logits are there
(the idea of Liger kernels, arXiv 2410.10989, section 3.2). torch 2.14 has ``F.linear_cross_entropy`` for this, which
under autocast rounds the loss itself to half precision, and which cannot give the z-loss its log-partition; our tests
compare with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 2**28
"""Bytes of logits that are held at once: many rows make the products with them fast."""
CACHED_ROWS = {"cpu": 16}
"""Rows whose gradient is made at once, by the kind of device: as few as stay in a processor's cache."""
ACCELERATOR_ROWS = 1024
"""The same for every other kind: what is wide in between takes less memory than the logits of all."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the loss over rows; gradients are made in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, z_loss: float, training: bool
    ) -> Tensor:
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        chunks = max(1, math.ceil(len(x) * len(weight) * dtype.itemsize / CHUNK_BYTES))
        needed = [training and one for one in ctx.needs_input_grad]  # which are the same without gradients
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
                    grad_weight.addmm_(grad.T, piece)  # without a product that takes as much memory again
                elif grad_weight is not None:
                    grad_weight += grad.T @ piece
                start += len(grad)
                del logits, grad
        ctx.gradients = grad_x, grad_weight, grad_bias
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were used already; compute the loss again")
        found, ctx.gradients = ctx.gradients, None  # scaled in place: the weight's is large
        grad_x, grad_weight, grad_bias = (None if one is None else one.mul_(grad.to(one.dtype)) for one in found)
        return grad_x, grad_weight, grad_bias, None, None, None


def _to_gradient(
    logits: Tensor, label: Tensor, bias: Tensor | None, z_loss: float, wanted: bool, grad_bias: Tensor | None
) -> Tensor:
    """The loss of some rows, (); the gradient takes the place of their logits, and the bias' is added to its own.

    Args:
        logits: Without the bias, (rows, V).
        label: Token ids, (rows, 1); negative ones do not count.
        bias: (V,).
        z_loss: Weight of the squared log-partition.
        wanted: Whether there is anything that needs the gradient.
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
    """Cross-entropy of ``softmax(x W^T + b)``, with the log-partition's square times ``z_loss`` added.

    Args:
        x: What the logits are made from, (..., D).
        weight: W, (V, D).
        target: Token ids (...); negative ones do not count.
        z_loss: Weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5; there 1e-4).
        bias: b, (V,); ``None`` for zeros.

    Returns:
        The sum over targets in nats, (), in float32 at least; and the number of targets, ().

    Example:
        >>> loss, count = linear_cross_entropy(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([3, -100]))
        >>> round(loss.item(), 4), count.item()  # ln 8
        (2.0794, 1)
    """
    total = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, bias, target.flatten(), z_loss, torch.is_grad_enabled())
    return total, (target >= 0).sum()
