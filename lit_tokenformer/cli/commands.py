"""Commands that run without a trainer: predict --images, grow, import, export, split, generate and evaluate."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from callbacks.growth_steps import row_map
from callbacks.prediction_writer import TOP, free_path, prediction_header, prediction_row
from lit_tokenformer import tasks
from lit_tokenformer.atomic_io import atomic_folder, atomic_write
from lit_tokenformer.checkpoints.load import read_checkpoint, state_errors, write_checkpoint
from lit_tokenformer.data.text.tokenizer import checked_backend
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth import grow, grow_with_optimizers
from lit_tokenformer.growth.axes import describe_sizes, grown_sizes
from lit_tokenformer.growth.optimizer import NEW_STATES
from lit_tokenformer.inference.sampling import Sampling
from lit_tokenformer.inference.text import Completion, TextGenerator, find_device
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
    size = 0 if text is None else max(checked_backend(text).get_vocab(with_added_tokens=True).values()) + 1
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
        checked_backend(text)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: cannot read {path} ({_first_line(error)})") from None
    return text


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _preset_of(config: TokenformerConfig) -> tuple[str, dict[str, Any]]:
    """Find the preset nearest to a config, and the fields that differ; sizes of the data are ignored."""
    found: dict[str, dict[str, Any]] = {}
    for name in list_presets():
        base = preset_config(name, vocab_size=config.vocab_size, context_length=config.context_length)
        found[name] = {key: value for key, value in vars(config).items() if value != getattr(base, key)}
    name = min(found, key=lambda name: (len(found[name]), not name.startswith("tokenformer_lm_")))
    return name, found[name]


def predict_images(
    ckpt_path: str,
    images: str | list[str],
    output: str | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "auto",
) -> Path:
    """Classify images with a checkpoint; neither a config nor the training data are needed.

    Args:
        ckpt_path: Path to a checkpoint of an image classifier.
        images: Image, folder (all images below) or tar file; or a list of them.
        output: CSV file for the predictions; defaults to predictions.csv in the current folder.
        batch_size: Images per batch.
        num_workers: Number of worker processes that read images.
        device: Device of the model, such as "cpu" or "cuda:0"; "auto" selects the accelerator if available.

    Returns:
        Path of the CSV file, with the five most probable classes of each image; empty cells for an unreadable image.

    Raises:
        UserError: If the checkpoint is not of an image classifier or has no class names, if a path contains no image,
            or if the output already exists.
    """
    target = Path(output) if output else free_path(Path("predictions.csv"))
    if target.exists():
        raise UserError(f"output: {target} exists already")
    task = rebuild_task(ckpt_path, read_checkpoint(ckpt_path, "meta", optimizers=False))
    found = [one for one in task.modules() if isinstance(one, tasks.LitImageClassifier)]
    if len(found) != 1:
        raise UserError(f"ckpt_path: expected one LitImageClassifier in {ckpt_path}, got {len(found)}; see `split`")
    found[0].to(find_device(device))
    predictions = found[0].predict_images(images, batch_size, num_workers, TOP)
    columns = max(len(one.probabilities) for one in predictions)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(prediction_header(columns))
    for image, probabilities in predictions:
        row = prediction_row(image, probabilities.items())
        writer.writerow(row + [""] * (1 + 2 * columns - len(row)))
    with atomic_write(target) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    print(f"{target}: predictions for {len(predictions)} images")
    return target


def generate_text(
    ckpt_path: str,
    prompt: str | list[str] = "",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | list[str] | None = None,
    seed: int = 0,
    format: str = "text",
    device: str = "auto",
) -> None:
    """Generate text with a language model and stream it to the standard output.

    Args:
        ckpt_path: Path to a checkpoint of a fit.
        prompt: Prompts to continue, decoded as one batch; an empty prompt starts a new document.
        max_new_tokens: Maximum number of tokens to generate per prompt.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_k: Sample from the k most probable tokens only.
        top_p: Nucleus sampling: sample from the smallest set of tokens with at least this total probability.
        repetition_penalty: Penalty on tokens that occurred before; values above 1 reduce repetition.
        stop: Strings that end a completion; the document separator ends it too.
        seed: Random seed of sampling.
        format: Output format: "text" prints prompts and completions, "json" one JSON object per line and prompt.
        device: Device of the model, such as "cpu" or "cuda:0"; "auto" selects the accelerator if available.

    Raises:
        UserError: If the checkpoint cannot be used, a setting is out of range, or a prompt exceeds the context.
    """
    if format not in _FORMATS:
        raise unknown_name("format", format, _FORMATS)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    generator = TextGenerator.load(ckpt_path, device)
    number, printed = 0, 0  # the current prompt, and its characters printed so far
    for completions in generator.run(prompt or "", max_new_tokens, sampling, stop, seed):
        while number < len(completions):
            shown = _FORMATS[format](completions[number], number, len(completions), seed)
            print(shown[printed:], end="", flush=True)
            printed = len(shown)
            if completions[number].stopped is None:
                break
            number, printed = number + 1, 0
    for number, completion in enumerate(completions, start=1):
        if completion.stopped == "context":
            length = generator.backbone.config.context_length
            name = "" if len(completions) == 1 else f"prompt {number}: "
            print(f"note: {name}stopped at the context length of {length} tokens", file=sys.stderr)


def evaluate_checkpoint(
    ckpt_path: str,
    tasks: list[str],
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    include_path: str | None = None,
    output: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate a language model on tasks of EleutherAI's lm-evaluation-harness.

    Args:
        ckpt_path: Path to a checkpoint of a fit.
        tasks: Tasks of the harness, such as lambada_openai, hellaswag, piqa, arc_easy and winogrande.
        num_fewshot: Number of few-shot examples; defaults to that of the task.
        limit: Maximum number of examples per task, or a fraction of them if below 1.
        batch_size: Sequences per forward pass.
        include_path: Folder with custom task definitions.
        output: Path of a JSON file for the results.
        device: Device of the model, such as "cpu" or "cuda:0"; "auto" selects the accelerator if available.

    Returns:
        Results in the harness's format.

    Raises:
        UserError: If the harness is not installed, the checkpoint cannot be used, a task is unknown, or the output
            already exists.
    """
    if output is not None and Path(output).exists():
        raise UserError(f"output: {output} exists already")
    if not tasks:
        raise UserError("tasks: expected at least one")
    if batch_size < 1:
        raise UserError(f"batch_size: expected a whole number of at least 1, got {batch_size}")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot: expected a whole number of at least 0, got {num_fewshot}")
    if limit is not None and not limit > 0:
        raise UserError(f"limit: expected a number above 0, got {limit}")
    from lit_tokenformer.inference.lm_eval import as_table, evaluate  # the harness takes seconds to import

    generator = TextGenerator.load(ckpt_path, device)
    try:
        results = evaluate(generator, tasks, num_fewshot, limit, batch_size, include_path)
    except OSError as error:  # a task that is not cached, and cannot be downloaded
        raise UserError(f"tasks: {error}") from None
    print(as_table(results))
    if output is not None:
        with atomic_write(output) as file:
            file.write((json.dumps(results, indent=2, default=str) + "\n").encode())
    return results


def _as_text(completion: Completion, number: int, total: int, seed: int) -> str:
    header = f"==> {number + 1} of {total} <==\n" if total > 1 else ""
    return header + completion.prompt + completion.text + ("\n" if completion.stopped else "")


def _as_json(completion: Completion, number: int, total: int, seed: int) -> str:
    if completion.stopped is None:
        return ""
    fields = {
        "prompt": completion.prompt,
        "completion": completion.text,
        "tokens": completion.tokens,
        "stopped": completion.stopped,
        "seconds": round(completion.seconds, 6),
        "tokens_per_second": round(completion.tokens / completion.seconds, 3) if completion.tokens else 0.0,
        "seed": seed,
    }
    return json.dumps(fields) + "\n"


_FORMATS = {"text": _as_text, "json": _as_json}
