"""LoRA (arXiv 2106.09685) through peft, for the linear projections of a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lit_tokenformer.errors import UserError


def add(model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
    """Add a LoRA with zero output to a model, in place.

    Args:
        model: Model to extend.
        name: Name of the adapter.
        settings: Arguments of peft's ``LoraConfig``; ``target_modules`` are all linear layers of the blocks by default.

    Raises:
        UserError: If peft is not installed, rejects the settings, or the model has no linear layer.
    """
    peft = _peft()
    given = dict(settings)
    if not {"target_modules", "target_parameters"} & given.keys():
        given["target_modules"] = [
            key for key, one in model.named_modules() if isinstance(one, nn.Linear) and key.startswith("blocks.")
        ]
        if not given["target_modules"]:
            raise UserError("lora: the model's blocks have no linear layers; set tokens, such as {qkv: 8, ffn: 32}")
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**given), model, adapter_name=name)
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {' '.join(str(error).split())}") from None


def select(model: nn.Module, name: str | None) -> None:
    """Enable the LoRA of this name, and disable all others."""
    for layer in _layers(model):
        layer.enable_adapters(name in layer.r)
        if name in layer.r:
            layer.set_adapter(name)


def names(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return the LoRAs of a model by name, with their rank."""
    return {name: {"r": rank} for layer in _layers(model) for name, rank in layer.r.items()}


def delete(model: nn.Module, name: str) -> None:
    """Remove a LoRA; the last one is removed with peft's wrappers."""
    for path, layer in [(path, one) for path, one in model.named_modules() if one in set(_layers(model))]:
        layer.delete_adapter(name)
        if not layer.r:
            model.set_submodule(path, layer.get_base_layer())
    if not names(model) and hasattr(model, "peft_config"):
        del model.peft_config


def settings(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the settings of a LoRA as plain values."""
    config: Any = model.peft_config[name]  # type: ignore[index]
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return {key: value for key, value in plain.items() if value is not None}


def tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA by their names in peft's files."""
    return _peft().get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def load(model: nn.Module, name: str, config: Mapping[str, Any], state: dict[str, Tensor], folder: Any) -> None:
    """Add a LoRA with the settings and tensors of its files.

    Raises:
        UserError: If they do not fit the model.
    """
    peft = _peft()
    known = peft.LoraConfig.__dataclass_fields__
    add(model, name, {key: value for key, value in config.items() if key in known and key != "peft_type"})
    expected = tensors(model, name)
    if {key: one.shape for key, one in expected.items()} != {key: one.shape for key, one in state.items()}:
        delete(model, name)
        raise UserError(f"adapter: {folder} does not fit the base: other LoRA layers or widths")
    peft.set_peft_model_state_dict(model, state, adapter_name=name)


def is_lora(key: str, name: str | None = None) -> bool:
    """Return whether a name in a state dict is of a LoRA, or of the LoRA ``name``."""
    return ".lora_" in key and (name is None or f".{name}." in f"{key}.")


def _layers(model: nn.Module) -> Iterator[Any]:
    if "peft" in sys.modules:  # otherwise the model has none
        from peft.tuners.lora import LoraLayer

        yield from (one for one in model.modules() if isinstance(one, LoraLayer))


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError('lora: needs peft; install it with `pip install "lit-tokenformer[hf]"`') from None
    return peft
