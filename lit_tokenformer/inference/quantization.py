"""Weight-only quantization for inference: int8 of torchao, int4 of torch's kernels.

Requires the extra ``quantize`` (``pip install 'lit-tokenformer[quantize]'``).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.axes import quantized_parameters
from lit_tokenformer.models import Tokenformer, as_linear

SCHEMES = ("int8", "int4")
"""Quantization schemes."""


def quantize(model: Tokenformer, scheme: str = "int8") -> Tokenformer:
    """Quantize the weights of all blocks, in place: parameter tokens and linear layers.

    Parameter tokens take their linear form, see :func:`~lit_tokenformer.models.as_linear`. Embeddings, norms, ``tau``
    and the head keep their precision. The model can neither be trained nor grown afterwards.

    Args:
        model: Model of any size.
        scheme: ``int8``: symmetric int8 with one scale per row of a weight, so per key token and per output of the
            values, with products in the precision of the activations. ``int4``, on CPUs: 16 values per weight, with a
            scale and a zero point per 64 inputs (32, if 64 do not divide them) and products in bfloat16; matrices whose
            sizes the kernel does not support are int8.

    Returns:
        ``model``, in evaluation mode and without trainable parameters.

    Raises:
        UserError: If ``scheme`` is unknown or not available on the device, torchao is not installed, or the model is
            quantized already.
    """
    if scheme not in SCHEMES:
        raise unknown_name("quantize", scheme, SCHEMES)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        from lit_tokenformer.inference.packed import GROUPS, Int4Tensor, Int8Linear
    except ImportError as error:
        raise UserError(
            f"quantize: torchao is not installed ({error}); pip install 'lit-tokenformer[quantize]'"
        ) from None
    if any(quantized_parameters(model)):
        raise UserError("quantize: the model is quantized already")
    device = next(model.parameters()).device.type
    if scheme == "int4" and device != "cpu":
        raise UserError(f"quantize: int4 is for CPUs (got {device}); use int8")
    as_linear(model).eval().requires_grad_(False)
    layers: list[Any] = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    for layer in (layer for layer in layers if layer.in_features > 1):
        layer.weight.data = layer.weight.data.contiguous()  # the values are a transposed view
        group = next((size for size in GROUPS if layer.in_features % size == 0), None)
        if scheme == "int4" and group is not None and layer.out_features % 16 == 0:
            layer.weight = nn.Parameter(Int4Tensor.of(layer.weight.data, group), requires_grad=False)
        else:
            quantize_(layer, Int8WeightOnlyConfig())
            layer.__class__ = Int8Linear
    return model
