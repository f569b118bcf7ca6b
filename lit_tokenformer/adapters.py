"""Adapters: groups of parameter tokens that are trained on a frozen model, saved alone and switched per sample.

An adapter adds a group of tokens (:mod:`~lit_tokenformer.models.token_groups`) to the layers of a model. The base is
frozen, so an adapter can be removed without a trace, and several fit into one batch. Its files have the names of
peft's: ``adapter_model.safetensors`` and ``adapter_config.json``.

For models without parameter tokens, :mod:`lit_tokenformer.lora` offers peft's LoRA behind the same functions.

Example:
    >>> from lit_tokenformer.models import create_backbone
    >>> sizes = {"dim": 8, "depth": 1, "num_heads": 1, "param_tokens": 4, "vocab_size": 5}
    >>> model, text = create_backbone("tokenformer_lm_tiny", **sizes), torch.tensor([[1, 2], [3, 4]])
    >>> before = model(text)
    >>> add_adapter(model, "docs", {"ffn": 2})
    >>> list_adapters(model), torch.equal(model(text), before)
    ({'docs': {'ffn': 2}}, True)
    >>> set_adapter(model, ["docs", None])  # a name per sample
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lit_tokenformer import lora as peft_lora
from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth import target_sizes
from lit_tokenformer.growth.shards import gather
from lit_tokenformer.models import Pattention, Tokenformer, Tokens
from lit_tokenformer.models.axes import refresh
from lit_tokenformer.models.token_groups import (
    NamedGate,
    add_group,
    check_group_name,
    group_layers,
    group_sizes,
    is_of_group,
    remove_group,
)
from lit_tokenformer.tensor_files import read_tensors

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
"""Files of an adapter."""

TOKENS_TYPE, LORA_TYPE = "PARAM_TOKENS", "LORA"
"""Values of ``peft_type`` in ``adapter_config.json``."""

RESERVED = ("none", "auto")
"""Names that select the base, or the adapter with the least loss, on the command line."""

_STATE = "_adapters"
"""Attribute of a model with the selected adapter, and the parts that adapters replace. The module does not own them."""


def add_adapter(
    module: nn.Module,
    name: str,
    tokens: Tokens | None = None,
    also_train: Sequence[str] = (),
    lora: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> None:
    """Add an adapter with zero output, select it, and freeze all other parameters of the module.

    Args:
        module: A model, or a module that contains one.
        name: Name of the adapter: letters, digits, ``_`` and ``-``.
        tokens: Tokens to append: n (qkv n, proj n, ffn 4n) or a number by kind, ``{qkv: n, proj: n, ffn: m}``; kinds
            that are missing get none.
        also_train: Parts of the model that the adapter replaces by trained copies, such as ``head``.
        lora: Settings of peft's ``LoraConfig``, such as ``{r: 8}``, in place of ``tokens``.
        seed: Seed of the random keys, which together with the name determines them.

    Raises:
        UserError: If the name is invalid or taken, if the model has no layer for the tokens, or no such part.
    """
    model = adapted_model(module)
    check_adapter_name(name)
    if name in list_adapters(model):
        raise UserError(f"name: the model has an adapter {name!r} already")
    if (tokens is None) == (lora is None):
        raise UserError("tokens: expected either tokens or lora")
    sizes = {} if tokens is None else _adapter_sizes(model, tokens)
    parts = {path: _part(model, path) for path in also_train}
    layers = {layer_name: layer for layer_name, layer in group_layers(model) if layer.kind in sizes}
    _check_gates(layers, "tokens")
    gate, digest = NamedGate(), hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):  # the same tokens in all processes
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        if lora is not None:
            peft_lora.add(model, name, lora)
        for layer in layers.values():
            add_group(layer, name, sizes[layer.kind], layer.gate or gate)
    _add_parts(model, name, parts)
    train_adapter(module, name)


def train_adapter(module: nn.Module, name: str) -> None:
    """Select an adapter, and freeze all other parameters of the module.

    Raises:
        UserError: If the adapter does not exist.
    """
    model = adapted_model(module)
    set_adapter(model, name)
    also_train = _parts_of(model).get(name, ())
    module.requires_grad_(False)
    for tensor_name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_of_adapter(tensor_name, name, also_train))


def set_adapter(module: nn.Module, names: str | Sequence[str | None] | None) -> None:
    """Select the adapter of the following batches.

    Args:
        module: A model, or a module that contains one.
        names: Name of an adapter, ``None`` for the base alone, or one of them for each sample of the batch.

    Raises:
        UserError: If the adapter does not exist, or if adapters with parts of their own, or LoRA, are mixed in a batch.
    """
    model = adapted_model(module)
    wanted = [names] if names is None or isinstance(names, str) else list(names)
    if not wanted:
        raise UserError("adapter: expected at least one name, got []")
    known = list_adapters(model)
    for name in wanted:
        if name is not None and name not in known:
            raise unknown_name("adapter", name, [*known, "none"])
    parts, loras = _parts_of(model), peft_lora.names(model)
    alike = len({*wanted}) == 1
    for name in () if alike else wanted:
        if name and (parts.get(name) or name in loras):
            kind = "is a LoRA" if name in loras else f"replaces {', '.join(parts[name])}"
            raise UserError(f"adapter: {name!r} {kind}, and cannot share a batch with other adapters")
    model.__dict__[_STATE]["selected"] = chosen = wanted[0] if alike else wanted
    _put_parts(model, wanted[0] if alike else None)
    device = next(model.parameters()).device
    for gate in {id(layer.gate): layer.gate for _, layer in group_layers(model)}.values():
        if isinstance(gate, NamedGate):
            gate.select(chosen, device)
    peft_lora.select(model, wanted[0] if alike else None)


def list_adapters(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the adapters of a model by name, with their tokens by kind, or the rank ``r`` of a LoRA."""
    model = adapted_model(module)
    gated = {
        name for _, layer in group_layers(model) if isinstance(layer.gate, NamedGate) for name in layer.groups or ()
    }
    found = {name: sizes for name, sizes in group_sizes(model).items() if name in gated}
    return {**found, **peft_lora.names(model)}


def delete_adapter(module: nn.Module, name: str) -> None:
    """Remove an adapter; the model is as if it had never been added.

    Raises:
        UserError: If the adapter does not exist.
    """
    model = adapted_model(module)
    set_adapter(model, name)  # raises if it is unknown
    set_adapter(model, None)
    for _, layer in list(group_layers(model)):
        remove_group(layer, name)
    peft_lora.delete(model, name)
    _parts_of(model).pop(name, None)
    if not list_adapters(model):
        del model.__dict__[_STATE]


def save_adapter(
    module: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    hash_of_base: str | None = None,
    write: bool = True,
) -> None:
    """Write an adapter to a folder.

    Args:
        module: A model with the adapter, or a module that contains one; if it is sharded, on all processes.
        folder: Folder to write to, created if it does not exist.
        name: Name of the adapter; may be omitted if there is only one.
        base: Path of the base's checkpoint, for the reader.
        tokenizer: Tokenizer of the base, as the content of a ``tokenizer.json``; its hash is saved.
        hash_of_base: Result of :func:`base_hash` before training; computed if ``None``.
        write: Whether this process writes; the others only take part in gathering the tensors.

    Raises:
        UserError: If the adapter does not exist, or the files cannot be written.
    """
    model = adapted_model(module)
    known = list_adapters(model)
    if name is None and len(known) == 1:
        name = next(iter(known))
    if name not in known:
        raise unknown_name("adapter", name, known)
    also_train = sorted(_parts_of(model).get(name, ()))
    is_lora = name in peft_lora.names(model)
    tensors = {key: gather(tensor.detach()).cpu() for key, tensor in _adapter_tensors(model, name).items()}
    if not write:
        return
    config = {
        **(peft_lora.settings(model, name) if is_lora else {"tokens": known[name]}),
        "peft_type": LORA_TYPE if is_lora else TOKENS_TYPE,
        "name": name,
        "also_train": also_train,
        "base_model_name_or_path": base,
        "base_hash": hash_of_base or base_hash(model, also_train),
        "tokenizer_hash": None if tokenizer is None else tokenizer_hash(tokenizer),
    }
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with atomic_write(target / WEIGHTS_FILE) as file:
            file.write(safetensors.torch.save({key: one.contiguous() for key, one in tensors.items()}))
        with atomic_write(target / CONFIG_FILE) as file:
            file.write(f"{json.dumps(config, indent=2)}\n".encode())
    except OSError as error:
        raise UserError(f"adapter: cannot write {target} ({error.strerror or error})") from None


def load_adapter(
    module: nn.Module, folder: str | os.PathLike[str], name: str | None = None, tokenizer: str | None = None
) -> str:
    """Load an adapter from its folder, frozen and not selected.

    Args:
        module: The base, or a module that contains it.
        folder: Folder written by :func:`save_adapter`.
        name: Name of the adapter in the model; its own by default.
        tokenizer: Tokenizer of the base, as the content of a ``tokenizer.json``, to compare with the adapter's.

    Returns:
        Name of the adapter.

    Raises:
        UserError: If the files cannot be read, or the adapter is of another base, width or tokenizer.
    """
    model = adapted_model(module)
    config = read_adapter_config(folder)
    name = config["name"] if name is None else name
    check_adapter_name(name, "adapter")
    if name in list_adapters(model):
        raise UserError(f"adapter: the model has an adapter {name!r} already")
    tensors = read_tensors(Path(folder) / WEIGHTS_FILE, "adapter")
    also_train = config["also_train"]
    if config["peft_type"] == TOKENS_TYPE:
        sizes, taus = _checked_tokens(model, tensors, also_train, folder)
        layers = {layer_name: layer for layer_name, layer in group_layers(model) if layer_name in sizes}
        _check_gates(layers, f"adapter: {folder}")
    for path in also_train:
        _part(model, path, f"adapter: {folder}")
    if config["base_hash"] != base_hash(model, also_train):
        raise UserError(
            f"adapter: {folder} is of another base (expected {config['base_model_name_or_path'] or 'its own base'})"
        )
    hashed = None if tokenizer is None else tokenizer_hash(tokenizer)
    if None not in (hashed, config["tokenizer_hash"]) and config["tokenizer_hash"] != hashed:
        raise UserError(f"adapter: {folder} was trained with another tokenizer")
    parts = {path: _with_tensors(_part(model, path), tensors, path, folder) for path in also_train}
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if config["peft_type"] == LORA_TYPE:
        own = {key: one for key, one in tensors.items() if not _is_below(key, also_train)}
        peft_lora.load(model, name, config, own, folder)
    else:
        gate = NamedGate()
        for layer_name, layer in layers.items():
            group = add_group(layer, name, sizes[layer_name], layer.gate or gate)
            own = {key: tensors[f"{layer_name}.{key}".lstrip(".")] for key in group.state_dict() if key != "tau"}
            group.load_state_dict({**own, "tau": taus[layer_name]})
    _add_parts(model, name, parts)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trainable)
    for part in _parts_of(model).get(name, {}).values():
        part.requires_grad_(False)
    set_adapter(model, model.__dict__[_STATE]["selected"])
    return name


def adapter_names(module: nn.Module, name: str) -> set[str]:
    """Return the names in the state dict of a module that belong to the selected adapter ``name``."""
    model = adapted_model(module)
    also_train = _parts_of(model).get(name, ())
    found = {key for key in model.state_dict(keep_vars=True) if _is_of_adapter(key, name, also_train)}
    paths = [path for path, one in module.named_modules(remove_duplicate=False) if one is model]
    return {f"{path}.{key}".lstrip(".") for path in paths for key in found}


def base_hash(module: nn.Module, without: Sequence[str] = ()) -> str:
    """Compute the SHA-256 of a model's weights without its adapters.

    Args:
        module: A model, or a module that contains one.
        without: Parts of the model to leave out: those that an adapter replaces.
    """
    model = adapted_model(module)
    digest, selected = hashlib.sha256(), model.__dict__.get(_STATE, {}).get("selected")
    _put_parts(model, None)
    for key, tensor in sorted(model.state_dict().items()):
        if not (is_of_group(key) or peft_lora.is_lora(key) or _is_below(key, without)):
            whole = gather(tensor).detach().cpu().contiguous()
            digest.update(f"{key.replace('.base_layer', '')} {whole.dtype} {tuple(whole.shape)}".encode())
            digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    _put_parts(model, selected if isinstance(selected, str) else None)
    return digest.hexdigest()


def tokenizer_hash(text: str) -> str:
    """Compute the SHA-256 of a tokenizer, given as the content of a ``tokenizer.json``."""
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()


def adapted_model(module: nn.Module) -> nn.Module:
    """Return the model that names of tensors refer to: the only Tokenformer of a module, else the module itself."""
    found = [one for one in module.modules() if isinstance(one, Tokenformer)]
    return found[0] if len(found) == 1 else module


def read_adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Load the ``adapter_config.json`` of a folder.

    Raises:
        UserError: If it cannot be read, or is not of an adapter that this project can use.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"adapter: cannot read {path} ({getattr(error, 'strerror', None) or error})") from None
    kinds = {"name": str, "base_hash": str, "also_train": list}
    if not isinstance(config, dict) or config.get("peft_type") not in (TOKENS_TYPE, LORA_TYPE):
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"adapter: {path}: peft_type: expected {TOKENS_TYPE} or {LORA_TYPE}, got {kind!r}")
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise UserError(f"adapter: {path}: {key}: expected type {kind.__name__}, got {config.get(key)!r}")
    if not all(isinstance(part, str) for part in config["also_train"]):
        raise UserError(f"adapter: {path}: also_train: expected names of parts, got {config['also_train']!r}")
    texts = {key: config.get(key) for key in ("base_model_name_or_path", "tokenizer_hash")}
    return {**config, **{key: text if isinstance(text, str) else None for key, text in texts.items()}}


def check_adapter_name(name: str, setting: str = "name") -> None:
    """Raise a ``UserError`` for a name that cannot name a folder, or is reserved."""
    check_group_name(name, setting)
    if name in RESERVED:
        raise UserError(f"{setting}: {name!r} is reserved; choose another name")


def _adapter_sizes(model: nn.Module, tokens: Tokens) -> dict[str, int]:
    """Resolve the number of tokens by kind of layer."""
    kinds = {layer.kind: 1 for _, layer in group_layers(model)}
    if not kinds:
        raise UserError("tokens: the model has no parameter tokens (projection: linear); set lora, such as {r: 8}")
    sizes = target_sizes(tokens, kinds)
    return {kind: sizes[kind] for kind in (tokens if isinstance(tokens, Mapping) else sizes)}


def _check_gates(layers: Mapping[str, Pattention], setting: str) -> None:
    """Raise a ``UserError`` if the groups of a layer are not adapters."""
    for name, layer in layers.items():
        if not isinstance(layer.gate, NamedGate | None):
            raise UserError(f"{setting}: {name} has a {type(layer.gate).__name__}, which no adapter can extend")


def _is_of_adapter(key: str, name: str, also_train: Iterator[str] | Any) -> bool:
    return f".groups.{name}." in f".{key}" or peft_lora.is_lora(key, name) or _is_below(key, also_train)


def _is_below(key: str, paths: Any) -> bool:
    return any(key.startswith(f"{path}.") for path in paths)


def _adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Collect the tensors of an adapter by their names in its file; tau of all layers is one, in module order."""
    parts = _parts_of(model).get(name, {})
    found = {f"{path}.{key}": one for path, part in parts.items() for key, one in part.state_dict().items()}
    if name in peft_lora.names(model):
        return {**peft_lora.tensors(model, name), **found}
    taus = []
    for layer_name, layer in group_layers(model):
        if layer.groups is not None and name in layer.groups:
            state = layer.groups[name].state_dict()
            taus.append(state.pop("tau"))
            found |= {f"{layer_name}.{key}".lstrip("."): tensor for key, tensor in state.items()}
    return {**found, "tau": torch.stack(taus)}


def _checked_tokens(
    model: nn.Module, tensors: Mapping[str, Tensor], also_train: Sequence[str], folder: Any
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return the number of tokens and tau by layer.

    Raises:
        UserError: If the tensors do not fit the layers of the model.
    """
    layers = dict(group_layers(model))
    expected = {
        f"{name}.{part}".lstrip("."): getattr(layer, part).shape[1]
        for name, layer in layers.items()
        for part in layer.PARTS
        if getattr(layer, part) is not None
    }
    own = {key: tensor for key, tensor in tensors.items() if key != "tau" and not _is_below(key, also_train)}
    for key, tensor in own.items():
        if key not in expected:
            raise UserError(f"adapter: {folder}: {key} is not a tensor of the model's layers of parameter tokens")
        if tensor.ndim != 2 or tensor.shape[1] != expected[key]:
            raise UserError(
                f"adapter: {folder} is of another width: {key} has shape {tuple(tensor.shape)}, expected (any, "
                f"{expected[key]})"
            )
    found: dict[str, int] = {}
    for name in layers:
        parts = [key for key in expected if key.rpartition(".")[0] == name]
        rows = {len(own[key]) if key in own else 0 for key in parts}
        if rows != {0} and (len(rows) > 1 or 0 in rows):
            raise UserError(f"adapter: {folder} is damaged: keys and values of {name} do not match")
        if rows != {0}:
            found[name] = rows.pop()
    tau = tensors.get("tau", torch.zeros(0))
    if tau.shape != (len(found),) or not found:
        raise UserError(f"adapter: {folder} is damaged: tau has shape {tuple(tau.shape)}, expected ({len(found)},)")
    return found, dict(zip(found, tau, strict=True))


def _parts_of(model: nn.Module) -> dict[str | None, dict[str, nn.Module]]:
    """Return the replaced parts by adapter, those of the base under ``None``; the selected ones are in the model."""
    return model.__dict__.setdefault(_STATE, {"selected": None, "parts": {}})["parts"]


def _part(model: nn.Module, path: str, setting: str = "also_train") -> nn.Module:
    """Return the base's part of this name."""
    base = _parts_of(model).get(None, {}).get(path)
    if base is not None:
        return base
    try:
        part = model.get_submodule(path)
    except AttributeError:
        part = model
    if part is model or not path:
        raise unknown_name(
            setting, path, (child for child, one in model.named_children() if any(True for _ in one.parameters()))
        )
    if any(True for _ in group_layers(part)):
        raise UserError(f"{setting}: {path} has parameter tokens; extend them with tokens")
    inner = {*part.parameters()}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in inner and not key.startswith(f"{path}."):
            raise UserError(f"{setting}: {path} shares {key} (tie_embeddings), and cannot be trained alone")
    return part


def _add_parts(model: nn.Module, name: str, parts: Mapping[str, nn.Module]) -> None:
    if not parts:
        return
    known = _parts_of(model)
    for path, part in parts.items():
        known.setdefault(None, {}).setdefault(path, _part(model, path))
        known.setdefault(name, {})[path] = copy.deepcopy(part)


def _put_parts(model: nn.Module, name: str | None) -> None:
    """Put the parts of an adapter into the model, those of the base where it has none."""
    if _STATE not in model.__dict__:
        return
    state = model.__dict__[_STATE]
    for path, base in state["parts"].get(None, {}).items():
        present = model.get_submodule(path)
        part = state["parts"].get(name, {}).get(path, base)
        if part is not present:
            like = next(present.parameters())
            model.set_submodule(path, part.to(like.device, like.dtype).train(present.training))


def _with_tensors(part: nn.Module, tensors: Mapping[str, Tensor], path: str, folder: Any) -> nn.Module:
    """Copy a part with other tensors, which may have another first dimension, such as a head of other classes."""
    new = copy.deepcopy(part)
    for key, tensor in new.state_dict(keep_vars=True).items():
        given = tensors.get(f"{path}.{key}")
        if given is None or given.shape[1:] != tensor.shape[1:] or given.ndim != tensor.ndim:
            found = "no tensor" if given is None else f"shape {tuple(given.shape)}"
            raise UserError(
                f"adapter: {folder} does not fit the base: {path}.{key}: got {found}, expected {tuple(tensor.shape)}"
            )
        tensor.data = given.to(tensor.device, tensor.dtype)
    for owner in new.modules():
        refresh(owner)
    return new
