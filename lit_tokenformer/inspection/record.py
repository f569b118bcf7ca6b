"""Weights of parameter tokens in a forward pass: ``y = sum_k w_k V_k``, for every token k of every Pattention layer.

A parameter token is a neuron whose key detects a pattern and whose value is added to the output (arXiv 2012.14913).
The fused kernels keep no weights, so they are computed again from the input of each layer.

Shapes: N parameter tokens. ``...`` is any number of leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.pattention import Pattention
from lit_tokenformer.registry import SCORE_NORMS

Observer = Callable[[str, Pattention, Tensor, Tensor], None]
"""Function ``(name, layer, x, y)`` of the input (..., D_in) and the output (..., D_out) of a layer's own tokens."""


def token_layers(model: nn.Module) -> dict[str, Pattention]:
    """Find the Pattention layers of a module by name; further groups of tokens are layers of their own.

    Raises:
        UserError: If there is none, or if tokens are sharded.
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, Pattention)}
    if not found:
        raise UserError("model: no parameter tokens to inspect (expected projection: pattention)")
    for name, layer in found.items():
        if isinstance(layer.key_tokens, DTensor):
            raise UserError(f"model: {name} is sharded among processes (expected a whole model)")
    return found


def scores(layer: Pattention, x: Tensor) -> Tensor:
    """Compute the scores of a layer's own tokens, (..., D_in) -> (..., N)."""
    return F.linear(x, layer.key_tokens.to(x.dtype))


def token_weights(layer: Pattention, x: Tensor) -> Tensor:
    """Compute the weights w of a layer's own tokens, (..., D_in) -> (..., N); its output is ``w @ layer.value_tokens``.

    Example:
        >>> layer, x = Pattention(8, 6, num_tokens=4), torch.randn(3, 8)
        >>> torch.allclose(token_weights(layer, x) @ layer.value_tokens, layer(x), atol=1e-6)
        True
    """
    return weights_of(layer, scores(layer, x))


def weights_of(layer: Pattention, given: Tensor) -> Tensor:
    """Compute the weights from the scores, (..., N) each."""
    return SCORE_NORMS[layer.score_norm].function(given, layer.tau, layer.activation)


@contextmanager
def observe(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call a function with the input and the output of every Pattention layer within the block.

    A compiled model runs in eager mode. The output belongs to the autograd graph of the forward pass.

    Args:
        model: Module with Pattention layers, unsharded.
        observer: The function; called once per layer and forward pass, also for each further group of tokens.

    Raises:
        UserError: See :func:`token_layers`.
    """
    layers: dict[str, Any] = token_layers(model)

    def observed(name: str, layer: Any, attend: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def attend_and_report(x: Tensor) -> Tensor:
            y = attend(x)
            observer(name, layer, x, y)
            return y

        return attend_and_report

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in layers.items():
            layer.attend = observed(name, layer, layer.attend)  # below the gate of groups, unlike a forward hook
            stack.callback(layer.__dict__.pop, "attend")
        yield


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the weights of all parameter tokens in the last forward pass within the block.

    Args:
        model: Module with Pattention layers, unsharded.

    Yields:
        Weights by layer name, (..., N) without gradient, filled by each forward pass. A further group of tokens has the
        name of its own layer, such as ``blocks.0.mlp.groups.docs``.

    Raises:
        UserError: If the module has no Pattention layer, or if tokens are sharded.

    Example:
        >>> from lit_tokenformer.models import create_backbone
        >>> model = create_backbone("tokenformer_lm_tiny", vocab_size=32, depth=1, param_tokens=8)
        >>> with record(model) as weights:
        ...     _ = model(torch.zeros(2, 5, dtype=torch.long))
        >>> weights["blocks.0.mlp"].shape
        torch.Size([2, 5, 32])
    """
    found: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep(name: str, layer: Pattention, x: Tensor, y: Tensor) -> None:
        found[name] = token_weights(layer, x)

    with observe(model, keep):
        yield found
