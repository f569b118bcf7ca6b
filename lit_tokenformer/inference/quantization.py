"""Weight-only quantization by torchao, for inference.

Requires the extra ``quantize`` (``pip install 'lit-tokenformer[quantize]'``).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.axes import quantized_parameters
from lit_tokenformer.models import Tokenformer, as_linear

SCHEMES = {"int8": "Int8WeightOnlyConfig"}
"""Quantization schemes, by the name of their config in ``torchao.quantization``."""


def quantize(model: Tokenformer, scheme: str = "int8") -> Tokenformer:
    """Quantize the weights of all blocks, in place: parameter tokens and linear layers.

    Parameter tokens take their linear form, see :func:`~lit_tokenformer.models.as_linear`. Embeddings, norms, ``tau``
    and the head keep their precision. The model can neither be trained nor grown afterwards.

    Args:
        model: Model of any size.
        scheme: ``int8``: symmetric int8 with one scale per row of a weight, so per key token and per output of the
            values. Products are computed in the precision of the activations.

    Returns:
        ``model``, in evaluation mode and without trainable parameters.

    Raises:
        UserError: If ``scheme`` is unknown, torchao is not installed, or the model is quantized already.
    """
    if scheme not in SCHEMES:
        raise unknown_name("quantize", scheme, SCHEMES)
    try:
        from torchao import quantization
    except ImportError as error:
        raise UserError(
            f"quantize: torchao is not installed ({error}); pip install 'lit-tokenformer[quantize]'"
        ) from None
    if any(quantized_parameters(model)):
        raise UserError("quantize: the model is quantized already")
    as_linear(model).eval().requires_grad_(False)

    def is_matrix(layer: nn.Module, name: str) -> bool:
        if not isinstance(layer, nn.Linear) or layer.in_features == 1:
            return False
        layer.weight.data = layer.weight.data.contiguous()  # the values are a transposed view
        return True

    config: Any = getattr(quantization, SCHEMES[scheme])()
    quantization.quantize_(model.blocks, config, is_matrix)
    return model
