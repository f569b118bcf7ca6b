"""Commands that run without a trainer: grow, import, export and split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from callbacks.growth_steps import row_map
from lit_tokenformer import tasks
from lit_tokenformer.atomic_io import atomic_folder, atomic_write
from lit_tokenformer.checkpoints.load import read_checkpoint, state_errors, write_checkpoint
from lit_tokenformer.data.text.vocabulary import from_text
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth import grow, grow_with_optimizers
from lit_tokenformer.growth.axes import describe_sizes, grown_sizes
from lit_tokenformer.growth.optimizer import NEW_STATES
from lit_tokenformer.interop.tokenformer import WeightFormat
from lit_tokenformer.models import TokenformerConfig, Tokens, list_presets, preset_config
from lit_tokenformer.registry import WEIGHT_FORMATS
from lit_tokenformer.tasks.language import TOKENIZER_FILE, LitLanguageTask
from lit_tokenformer.tasks.rebuild import fresh_checkpoint, rebuild_task


def grow_checkpoint(
    ckpt_path: str,
    tokens: Tokens,
    output: str | None = None,
    method: str = "split",
    noise: float = 1.0,
    new_state: str = "mean",
    seed: int = 0,
) -> Path:
    """Grow a checkpoint between two runs, optimizer state and moving averages included.

    Args:
        ckpt_path: Path to a checkpoint of a fit.
        tokens: Total size after growth: a number n of parameter tokens (qkv n, proj n, ffn 4n), or totals by kind,
            {qkv: n, proj: n, ffn: m, hidden: h, heads: H, depth: L}.
        output: Path of the grown checkpoint; defaults to CKPT_PATH with "-grown" appended to its stem.
        method: Growth method: "split", "zero" or "random".
        noise: Noise scale between the copies of a split, in standard deviations of the weight initialization.
        new_state: Second moments of new units that are not copies: "mean" or "zeros"; "reset" drops the optimizer
            state.
        seed: Random seed for the new units.

    Returns:
        Path of the grown checkpoint.

    Raises:
        UserError: If the checkpoint cannot be read, the totals do not fit it, or the output already exists.
    """
    target = Path(output) if output else Path(ckpt_path).with_name(f"{Path(ckpt_path).stem}-grown.ckpt")
    if target.exists():
        raise UserError(f"output: {target} exists already")
    if new_state not in NEW_STATES:
        raise unknown_name("new_state", new_state, NEW_STATES)
    checkpoint = read_checkpoint(ckpt_path)
    task = rebuild_task(ckpt_path, checkpoint)
    settings: dict[str, Any] = {"method": method, "noise": noise, "seed": seed}
    before = grown_sizes(task, tokens)

    averaged = checkpoint.get("current_model_state") is not None  # then state_dict is the moving average
    if averaged:
        grow(task, tokens, **settings)
        checkpoint["state_dict"] = task.state_dict()
        task = rebuild_task(ckpt_path, checkpoint)
        task.load_state_dict(checkpoint["current_model_state"])
    optimizers = [task.build_optimizer() for _ in checkpoint.get("optimizer_states", [])]
    with state_errors(ckpt_path, "optimizer_states"):
        for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=True):
            optimizer.load_state_dict(state)
    rows: dict[str, list[int]] = {}
    with state_errors(ckpt_path, "optimizer_states"):
        for grown in grow_with_optimizers(task, tokens, optimizers, new_state=new_state, **settings):
            rows |= row_map(grown.name, grown.grown)
    checkpoint["current_model_state" if averaged else "state_dict"] = task.state_dict()
    if "optimizer_states" in checkpoint:  # else a weights-only checkpoint stays one
        checkpoint["optimizer_states"] = [optimizer.state_dict() for optimizer in optimizers]
    task.save_size(checkpoint)
    after = grown_sizes(task, tokens)
    event = {"step": checkpoint.get("global_step", 0), "epoch": checkpoint.get("epoch", 0), "before": before}
    event |= {**settings, "after": after, "rows": rows}
    with state_errors(ckpt_path, "callbacks"):
        for key, state in checkpoint.get("callbacks", {}).items():
            if key.startswith("ParameterGrowthCallback"):
                state["events"].append(event)
            elif key.startswith("TrainingMonitor"):
                state["growth"] = {name: event[name] for name in ("before", "after", "method", "rows")}

    write_checkpoint(checkpoint, target)
    pairs = {kind: f"{before[kind]} -> {now}" for kind, now in after.items()}
    print(f"{target}: {describe_sizes(pairs)}")
    return target


def import_weights(
    source: str,
    output: str | None = None,
    config_json: str | None = None,
    tokenizer: str | None = None,
    project: str = "tokenformer",
) -> Path:
    """Import published TokenFormer weights as a checkpoint to generate from, evaluate, grow or finetune.

    The checkpoint contains the tensors of the file unchanged, so an export is bit-identical. Loading converts the
    weights to float32. A fit from the checkpoint starts at epoch 0 with a fresh optimizer.

    Args:
        source: Path to a pytorch_model.bin, a .safetensors file, or a folder with one of them.
        output: Path of the checkpoint; defaults to SOURCE with the suffix .ckpt.
        config_json: Path to the architecture's config.json; defaults to the one next to the weights.
        tokenizer: Path to the tokenizer.json; defaults to the one next to the weights, if any.
        project: Weight format: "tokenformer", or one registered by a plugin.

    Returns:
        Path of the checkpoint; its tokenizer.json is written next to it.

    Raises:
        UserError: If a file cannot be read or contains pickled code, if a tensor is missing, unexpected or misshapen,
            if the tokenizer has more tokens than the embedding, or if the output already exists.
    """
    known: WeightFormat = WEIGHT_FORMATS[project]
    weights = known.find(source)
    target = Path(output) if output else weights.with_suffix(".ckpt")
    vocabulary = Path(tokenizer) if tokenizer else weights.with_name(TOKENIZER_FILE)
    text = _read_tokenizer(vocabulary) if tokenizer or vocabulary.is_file() else None
    copy = target.with_name(TOKENIZER_FILE)
    if target.exists():
        raise UserError(f"output: {target} exists already")
    if text is not None and copy.exists() and copy.read_text(encoding="utf-8") != text:
        raise UserError(f"output: {copy} exists already with another tokenizer")
    config, state = known.read(weights, config_json)
    size = 0 if text is None else max(from_text(text, vocabulary).get_vocab(with_added_tokens=True).values()) + 1
    if size > config.vocab_size:
        raise UserError(
            f"tokenizer: {vocabulary} has {size} tokens (expected at most {config.vocab_size}, the rows of the "
            f"embedding in {weights})"
        )
    preset, overrides = _preset_of(config)
    with torch.device("meta"):  # only shapes are needed
        task = tasks.LitCausalLM(preset, config.vocab_size, config.context_length, overrides=overrides)  # type: ignore
    task.backbone.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()})  # strict
    task.tokenizer_json = text
    write_checkpoint(fresh_checkpoint(task, {f"backbone.{name}": tensor for name, tensor in state.items()}), target)
    if text is not None and not copy.exists():
        with atomic_write(copy) as file:
            file.write(text.encode())
    numbers = sum(parameter.numel() for parameter in task.backbone.parameters())
    changes = "".join(f", {name} {value}" for name, value in overrides.items())
    print(f"{target}: {preset}{changes}, {numbers:,} parameters" + ("" if text else ", no tokenizer"))
    return target


def export_weights(
    ckpt_path: str,
    output: str,
    format: str = "safetensors",
    dtype: str | None = None,
    project: str = "tokenformer",
) -> Path:
    """Export a checkpoint to the published TokenFormer format.

    The weights are the moving average where the fit has one.

    Args:
        ckpt_path: Path to a checkpoint of a causal language model.
        output: New folder for the weights, config.json and, if the checkpoint has a tokenizer, tokenizer.json.
        format: File format: "safetensors" (model.safetensors) or "bin" (pytorch_model.bin).
        dtype: Data type of the weights: "float32", "float16" or "bfloat16"; defaults to that of the checkpoint.
        project: Weight format: "tokenformer", or one registered by a plugin.

    Returns:
        Path of the folder.

    Raises:
        UserError: If the checkpoint cannot be read, if the format does not support the architecture, if a tau is not
            the square root of its number of tokens, or if the output already exists.
    """
    known: WeightFormat = WEIGHT_FORMATS[project]
    with _new_folder(output) as folder:
        checkpoint = read_checkpoint(ckpt_path)
        task = rebuild_task(ckpt_path, checkpoint, device="meta")
        weights = checkpoint["state_dict"]
        state = {name.removeprefix("backbone."): weights[name] for name in weights if name.startswith("backbone.")}
        config = dataclasses.replace(task.backbone.config, depth=len(task.backbone.blocks))
        known.write(folder, config, state, dtype, format)
        _write_tokenizer(folder / TOKENIZER_FILE, checkpoint.get("tokenizer"))
    return Path(output)


def split_checkpoint(ckpt_path: str, output: str) -> Path:
    """Split a multi-task checkpoint into one checkpoint per task with the same outputs.

    The results serve as checkpoints of a fit of the single task, for example for predict, export and grow. A fit from
    one starts at epoch 0 with a fresh optimizer. The weights are the moving average where the fit has one.

    Args:
        ckpt_path: Path to a checkpoint of LitMultiTask.
        output: New folder for NAME.ckpt of each task and, if a task has a tokenizer, tokenizer.json
            (NAME.tokenizer.json if several tasks have one).

    Returns:
        Path of the folder.

    Raises:
        UserError: If the checkpoint cannot be read or is of a single task, or if the output already exists.
    """
    with _new_folder(output) as folder:
        checkpoint = read_checkpoint(ckpt_path)
        task = rebuild_task(ckpt_path, checkpoint, device="meta")
        if not isinstance(task, tasks.LitMultiTask):
            raise UserError(
                f"ckpt_path: expected a checkpoint of LitMultiTask, got {type(task).__name__} in {ckpt_path}"
            )
        weights = checkpoint["state_dict"]
        for name, part in task.tasks.items():
            state = {key.removeprefix(f"{name}."): weights[key] for key in weights if key.startswith(f"{name}.")}
            write_checkpoint(fresh_checkpoint(part, state), folder / f"{name}.ckpt")
            if isinstance(part, LitLanguageTask):
                _write_tokenizer(folder / part.tokenizer_file, part.tokenizer_json)
    return Path(output)


@contextmanager
def _new_folder(output: str) -> Iterator[Path]:
    """Create a folder atomically: rename it to ``output`` at the end of the block, and print its files.

    Raises:
        UserError: If the output already exists or cannot be written.
    """
    target = Path(output)
    if target.exists():
        raise UserError(f"output: {target} exists already")
    try:
        with atomic_folder(target) as folder:
            yield folder
    except OSError as error:
        raise UserError(f"output: cannot write {target} ({error.strerror or error})") from None
    print(f"{target}: {', '.join(sorted(path.name for path in target.iterdir()))}")


def _write_tokenizer(path: Path, text: str | None) -> None:
    if text is not None:
        path.write_text(text, encoding="utf-8")


def _read_tokenizer(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        from_text(text, path)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: cannot read {path} ({_first_line(error.__cause__ or error)})") from None
    return text


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _preset_of(config: TokenformerConfig) -> tuple[str, dict[str, Any]]:
    """Find the preset nearest to a config, and the fields that differ; sizes of the data are ignored."""
    found: dict[str, dict[str, Any]] = {}
    for name in list_presets():
        base = preset_config(name, vocab_size=config.vocab_size, context_length=config.context_length)
        found[name] = {key: value for key, value in vars(config).items() if value != getattr(base, key)}
    name = min(found, key=lambda name: (len(found[name]), not name.startswith("tokenformer_lm_")))
    return name, found[name]
