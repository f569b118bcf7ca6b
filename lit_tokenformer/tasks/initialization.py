"""Initialization of a new experiment from the weights of a checkpoint.

Only weights are loaded: optimizer, learning-rate schedule, epoch, step and callbacks start fresh. Sizes that growth
changes (parameter tokens, depth) come from the checkpoint. Heads, positions and vocabulary are adapted.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tokenizers import Tokenizer
from torch import Tensor, nn

from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import Tokenformer, model_size
from lit_tokenformer.models.experts import saved_experts
from lit_tokenformer.tasks.base import LitTask, resizable_dims, state_dict_problems
from lit_tokenformer.tasks.language import LitLanguageTask


def initialize_from(
    module: nn.Module,
    path: str | os.PathLike[str],
    datamodule: Any = None,
    ema: bool = False,
    resize_vocab: bool = False,
) -> None:
    """Load the weights of a checkpoint into a module, in place, as the start of a new experiment.

    The module adopts the checkpoint's parameter tokens and depth. Classes of an image head are matched by name, where
    both names are known; other classes, and a head for a different number of classes, keep their fresh weights.
    Position embeddings are resampled to the module's image size. One log line lists newly initialized tensors.

    Args:
        module: A task, or any module that contains backbones.
        path: A checkpoint file or a sharded folder: of a fit, with or without optimizer state, of ``import``, ``grow``
            or ``split``. Nothing in it is executed.
        datamodule: Data of the new experiment; its tokenizer is compared with the checkpoint's.
        ema: Load the moving average of the weights instead of the trained weights.
        resize_vocab: Accept another vocabulary: common tokens keep their embeddings, others are newly initialized.

    Raises:
        UserError: If the checkpoint cannot be read, has another architecture or vocabulary, or has no moving average.

    Example:
        >>> from lit_tokenformer.tasks import LitImageClassifier
        >>> task = LitImageClassifier("tokenformer_vit_tiny_patch16_224", num_classes=3, image_size=64)
        >>> initialize_from(task, "digits.ckpt")  # doctest: +SKIP
    """
    on_meta = any(parameter.is_meta for parameter in module.parameters())
    try:
        checkpoint = read_checkpoint(path, "meta" if on_meta else "cpu", optimizers=False)
    except UserError as error:
        raise UserError(f"init_from: {str(error).removeprefix('ckpt_path: ')}") from None
    wrong, changed = module.architecture_changes(checkpoint) if isinstance(module, LitTask) else ([], [])
    if wrong:
        raise UserError(
            f"init_from: {path} is of another architecture: {', '.join(wrong)}; set model.preset and model.overrides "
            f"as in the checkpoint{_origin(module, checkpoint)}"
        )
    weights = _weights(checkpoint, ema, path)
    backbones = _backbones(module)
    for prefix, model in backbones:
        start = f"{prefix}blocks."
        numbers = {name.removeprefix(start).split(".")[0] for name in weights if name.startswith(start)}
        if numbers and numbers == {str(number) for number in range(len(numbers))}:
            model.set_depth(len(numbers))
        experts = saved_experts(weights, prefix)
        if numbers and experts < model.config.experts:
            raise UserError(
                f"init_from: {path} has {experts} experts (expected {model.config.experts}, of model.overrides); add "
                f"them with `lit-tokenformer grow --tokens '{{experts: {model.config.experts}}}'`"
            )
        model.set_experts(max(experts, model.config.experts))
    own = module.state_dict()
    notes = [note for prefix, model in backbones for note in _resample_positions(prefix, model, own, weights, path)]
    notes += [
        note
        for prefix, model in backbones
        for vocabularies in [_vocabularies(*_of_task(prefix, checkpoint, datamodule), path)]
        for note in _map_vocabulary(prefix, model, own, weights, vocabularies, resize_vocab, path)
    ]
    notes += [
        note
        for prefix, model in backbones
        for note in _map_classes(f"{prefix}head.fc.", own, weights, *_of_task(prefix, checkpoint, datamodule))
    ]

    def is_open(name: str) -> bool:  # part of a head, or outside the backbones
        return all(not name.startswith(prefix) or name.startswith(f"{prefix}head.") for prefix, _ in backbones)

    resizable = resizable_dims(module)
    fits = {name for name in own if name in weights and (weights[name].shape == own[name].shape or name in resizable)}
    new = [name for name in own if name not in fits and is_open(name)]
    unused = [name for name in weights if name not in own and is_open(name)]
    if not fits:
        raise UserError(f"init_from: {path} has no weights of a {type(module).__name__}{_origin(module, checkpoint)}")
    loaded = {name: tensor for name, tensor in weights.items() if name not in unused}
    loaded.update({name: own[name] for name in new})
    for problem in itertools.chain(state_dict_problems(module, loaded), _untied(module, loaded)):
        raise UserError(f"init_from: {path} is of another architecture: {problem}{_origin(module, checkpoint)}")
    try:
        module.load_state_dict(loaded)
    except RuntimeError as error:  # such as keys and values with different numbers of rows
        raise UserError(f"init_from: {path} is damaged: {' '.join(str(error).split())}") from None
    for prefix, task in module.named_modules():
        saved, data = _of_task(prefix, checkpoint, datamodule)
        if isinstance(task, LitLanguageTask) and getattr(data, "tokenizer", None) is None and not resize_vocab:
            task.tokenizer_json = saved.get("tokenizer")
    sizes = [f"{name} {total}" for name, total in model_size(module).items()]
    parts = {"sizes": sizes, "changed": changed, "adapted": notes, "newly initialized": new, "unused": unused}
    summary = "".join(f"; {title}: {', '.join(names)}" for title, names in parts.items() if names)
    kind = "moving average" if ema else "trained weights"
    rank_zero_info(f"Initialized from {path}: {len(own) - len(new)} of {len(own)} tensors of the {kind}{summary}")


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add the options for initial weights of a new experiment to a parser."""
    parser.add_argument(
        "--init_from",
        type=str | None,
        help="Checkpoint with the initial weights of a new experiment, which starts at epoch 0 with a fresh optimizer "
        "and schedule. Parameter tokens and depth come from the checkpoint.",
    )
    parser.add_argument(
        "--init_ema",
        type=bool,
        default=False,
        help="Load the moving average of init_from, not the trained weights.",
    )
    parser.add_argument(
        "--init_resize_vocab",
        type=bool,
        default=False,
        help="Accept a vocabulary that differs from init_from's: common tokens keep their embeddings.",
    )


def check_settings(settings: Mapping[str, Any], resumes: bool) -> None:
    """Reject settings that contradict ``init_from``.

    Args:
        settings: The settings of a command.
        resumes: Whether the command resumes a fit from ``ckpt_path``.

    Raises:
        UserError: If two starting points are set, or a setting of ``init_from`` is set without it.
    """
    path, source = settings.get("ckpt_path"), settings.get("init_from")
    for name in ("init_ema", "init_resize_vocab"):
        if settings.get(name) and not source:
            raise UserError(f"{name}: needs init_from")
    if resumes and source and path not in (None, "last"):
        raise UserError(
            f"init_from: {source} starts a new experiment, ckpt_path: {path} resumes one; "
            "set one of them, or ckpt_path: last for a requeued job"
        )


def _backbones(module: nn.Module) -> list[tuple[str, Tokenformer]]:
    """Return the backbones with the prefixes of their names in a state dict."""
    found = module.named_modules(remove_duplicate=False)
    return [(f"{name}." if name else "", model) for name, model in found if isinstance(model, Tokenformer)]


def _weights(checkpoint: Mapping[str, Any], ema: bool, path: object) -> dict[str, Tensor]:
    """Return the trained weights, or their moving average."""
    trained = checkpoint.get("current_model_state")  # set where ``state_dict`` is the moving average
    if ema and trained is None:
        raise UserError(f"init_ema: {path} has no moving average of the weights")
    found = checkpoint["state_dict"] if ema or trained is None else trained
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"init_from: {path} is damaged: current_model_state is not a state dict")
    return dict(found)


def _origin(module: nn.Module, checkpoint: Mapping[str, Any]) -> str:
    """Name the checkpoint's task for an error, if it differs from the module's."""
    task = checkpoint.get("task")
    if not isinstance(task, str) or task == type(module).__name__:
        return ""
    several = "; split it with `lit-tokenformer split`" if task == "LitMultiTask" else ""
    return f" (got a checkpoint of {task!r}, expected {type(module).__name__}{several})"


def _of_task(name: str, checkpoint: Mapping[str, Any], datamodule: Any) -> tuple[Mapping[str, Any], Any]:
    """Return the parts of checkpoint and data that belong to a module's task; all of them for a single task."""
    task = name.partition(".")[0]
    return checkpoint.get("extras", {}).get(task, checkpoint), getattr(datamodule, "parts", {}).get(task, datamodule)


def _vocabularies(checkpoint: Mapping[str, Any], datamodule: Any, path: object) -> tuple[str, str] | None:
    """Return the tokenizers of the checkpoint and of the data, if both are known and differ."""
    saved, tokenizer = checkpoint.get("tokenizer"), getattr(datamodule, "tokenizer", None)
    if not isinstance(saved, str) or tokenizer is None:
        return None
    present = tokenizer.to_json()
    try:
        return None if json.loads(saved) == json.loads(present) else (saved, present)
    except (ValueError, RecursionError):
        raise UserError(f"init_from: the tokenizer in {path} is damaged") from None


def _resample_positions(
    prefix: str, model: Tokenformer, own: Mapping[str, Tensor], weights: dict[str, Tensor], path: object
) -> Iterator[str]:
    """Fit learned positions to a model, in place, and yield the changes."""
    name = f"{prefix}stem.pos_embed"
    if _resizes(name, own, weights, dim=1):
        before, now = weights[name].shape[1], own[name].shape[1]
        patches = before - model.num_prefix_tokens
        if patches < 1 or math.isqrt(patches) ** 2 != patches:
            raise UserError(f"init_from: {path}: {name} has {patches} positions, expected a square of patches")
        yield f"{name} resampled {before} -> {now}"  # by the stem on loading
    name = f"{prefix}stem.positions"
    if _resizes(name, own, weights):
        before, now = len(weights[name]), len(own[name])
        common = range(min(before, now))
        weights[name] = _moved_rows(own[name], weights[name], dict(zip(common, common, strict=True)))
        yield f"{name} {before} -> {now}" + (f", {now - before} newly initialized" if now > before else "")


def _map_classes(
    prefix: str, own: Mapping[str, Tensor], weights: dict[str, Tensor], checkpoint: Mapping[str, Any], datamodule: Any
) -> Iterator[str]:
    """Fit the classes of an image head to those of the data, in place, and yield the changes."""
    both = checkpoint.get("image_data"), getattr(datamodule, "image_data", None)
    saved, present = ((one or {}).get("class_names") for one in both)
    if not saved or not present or saved == present or len({*saved}) < len(saved):
        return
    places = {number: saved.index(name) for number, name in enumerate(present) if name in saved}
    for name in (f"{prefix}weight", f"{prefix}bias"):
        if name not in own or len(own[name]) != len(present) or len(weights.get(name, ())) != len(saved):
            continue
        if places:
            weights[name] = _moved_rows(own[name], weights[name], places)
            yield f"{name}: {len(places)} of {len(present)} classes by name"
        else:
            del weights[name]


def _map_vocabulary(
    prefix: str,
    model: Tokenformer,
    own: Mapping[str, Tensor],
    weights: dict[str, Tensor],
    vocabularies: tuple[str, str] | None,
    resize: bool,
    path: object,
) -> Iterator[str]:
    """Fit embedding and head of a language model to its vocabulary, in place, and yield the changes.

    Args:
        prefix: Prefix of the model's names.
        model: The model.
        own: State dict of the module.
        weights: State dict of the checkpoint.
        vocabularies: Tokenizers of the checkpoint and of the data, if they differ.
        resize: Whether another vocabulary is accepted.
        path: The checkpoint, for errors.

    Raises:
        UserError: For another vocabulary, unless it is accepted.
    """
    names = [f"{prefix}{name}" for name in ("stem.embedding.weight", "head.weight", "head.bias")]
    names = [name for name in names if _is_alike(name, own, weights)]
    if model.config.stem != "token" or not names or not (vocabularies or _resizes(names[0], own, weights)):
        return
    before, now = len(weights[names[0]]), len(own[names[0]])
    if not resize:
        sizes = f"{before} tokens, this model {now}" if before != now else f"{before} other tokens"
        raise UserError(
            f"init_from: {path} has another vocabulary ({sizes}); set data.tokenizer to the checkpoint's "
            f"tokenizer.json and model.overrides.vocab_size to {before}, or init_resize_vocab: true"
        )
    places = _common_tokens(vocabularies, before, now, path)
    for name in (name for name in names if len(weights[name]) == before):
        weights[name] = _moved_rows(own[name], weights[name], places)
    yield f"vocabulary {before} -> {now}, {now - len(places)} newly initialized"


def _resizes(name: str, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], dim: int = 0) -> bool:
    """Return whether a tensor differs from the checkpoint's in the size of one dimension only."""
    return _is_alike(name, own, weights, dim) and own[name].shape != weights[name].shape


def _is_alike(name: str, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], dim: int = 0) -> bool:
    """Return whether a tensor has the checkpoint's shape, up to the size of one dimension."""
    if name not in own or name not in weights or own[name].ndim != weights[name].ndim:
        return False
    pairs = zip(own[name].shape, weights[name].shape, strict=True)
    return all(ours == theirs for place, (ours, theirs) in enumerate(pairs) if place != dim)


def _moved_rows(own: Tensor, saved: Tensor, places: Mapping[int, int]) -> Tensor:
    """Copy ``own``, (N, ...), with rows of ``saved``; ``places`` maps row indices of ``own`` to ``saved``."""
    new = own.clone()
    if not new.is_meta:
        new[list(places)] = saved[list(places.values())].to(new)
    return new


def _common_tokens(vocabularies: tuple[str, str] | None, before: int, now: int, path: object) -> dict[int, int]:
    """Map ids in the data to ids in the checkpoint, for tokens in both vocabularies."""
    if vocabularies is None:  # same or unknown tokenizer: only the number of rows differs
        return {number: number for number in range(min(before, now))}
    try:
        saved, present = (Tokenizer.from_str(text).get_vocab(with_added_tokens=True) for text in vocabularies)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"init_from: the tokenizer in {path} is damaged ({error})") from None
    pairs = ((number, saved[token]) for token, number in present.items() if token in saved)
    return {number: source for number, source in pairs if number < now and source < before}


def _untied(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the weights that differ but share one parameter of the module, one line each."""
    shared: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        shared.setdefault(parameter, []).append(name)
    for first, *others in shared.values():
        for other in others:
            if not weights[first].is_meta and not torch.equal(weights[first], weights[other]):
                yield f"{first} and {other} differ, but share one parameter in this model (tie_embeddings)"
