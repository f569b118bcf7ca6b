"""Commands that exchange weights with other projects: import and export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_tokenformer import tasks
from lit_tokenformer.atomic_io import atomic_folder, atomic_write
from lit_tokenformer.checkpoints.load import read_checkpoint, write_checkpoint
from lit_tokenformer.data.text.vocabulary import find_vocabulary, from_text, read_vocabulary
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.interop.architectures import UNUSED_BY_STEM
from lit_tokenformer.interop.engines import export_engine
from lit_tokenformer.interop.native import NATIVE, write_image_data
from lit_tokenformer.interop.transformers_format import write_tokenizer
from lit_tokenformer.interop.weight_format import WEIGHTS, WeightFormat, local_source, recognize
from lit_tokenformer.models import TokenformerConfig, list_presets, preset_config
from lit_tokenformer.registry import ENGINES, WEIGHT_FORMATS
from lit_tokenformer.tasks.language import TOKENIZER_FILE, LitLanguageTask
from lit_tokenformer.tasks.rebuild import fresh_checkpoint, rebuild_task


def import_weights(
    source: str,
    output: str | None = None,
    config_json: str | None = None,
    tokenizer: str | None = None,
    project: str | None = None,
) -> Path:
    """Import weights of TokenFormer, transformers or timm as a checkpoint to generate from, evaluate, grow or finetune.

    The architecture comes from the source's config.json; a setting that is unsupported here is an error. Tensors are
    loaded one at a time and keep their precision; loading the checkpoint converts the weights to float32. A fit from
    the checkpoint starts at epoch 0 with a fresh optimizer. Nothing in the source is executed.

    Args:
        source: Path to a weights file (.safetensors, pytorch_model.bin, or the index.json of sharded weights), path to
            a folder with one, or a Hugging Face repository such as openai-community/gpt2, with an optional @REVISION.
        output: Path of the checkpoint; defaults to SOURCE with the suffix .ckpt.
        config_json: Path to the architecture's config.json; defaults to the one next to the weights.
        tokenizer: Path to the tokenizer.json, vocab.json (with merges.txt), vocab.txt or sentencepiece model, or to
            their folder; defaults to the one next to the weights, if any.
        project: Weight format: "tokenformer", "transformers", "timm", "lit_tokenformer", or one registered by a plugin;
            determined from the config.json by default.

    Returns:
        Path of the checkpoint. Its tokenizer.json is written next to it, and with the suffix .yaml the model's
        settings, for fit --config.

    Raises:
        UserError: If a file cannot be read or contains pickled code, if a setting is unsupported, if a tensor is
            missing, unexpected or misshapen, if the tokenizer has more tokens than the embedding, or if the output
            already exists.
    """
    if output and Path(output).exists():
        raise UserError(f"output: {output} exists already")
    place = local_source(source)
    known: WeightFormat = WEIGHT_FORMATS[project or recognize(place, config_json)]
    weights = known.find(place)
    target = Path(output) if output else weights.with_suffix(".ckpt")
    if not output and place != source:  # a repository, whose files are in a cache
        target = Path(f"{source.partition('@')[0].rpartition('/')[2]}.ckpt")
    vocabulary = Path(tokenizer) if tokenizer else find_vocabulary(weights.parent)
    text = None if vocabulary is None else _read_tokenizer(vocabulary)
    copy, settings = target.with_name(TOKENIZER_FILE), target.with_suffix(".yaml")
    for path in (target, settings):
        if path.exists():
            raise UserError(f"output: {path} exists already")
    if text is not None and copy.exists() and not _is_tokenizer(copy, text):
        raise UserError(f"output: {copy} exists already with another tokenizer")
    config, state, *more = known.read(weights, config_json)
    size = 0 if text is None else max(from_text(text, vocabulary).get_vocab(with_added_tokens=True).values()) + 1
    if size > config.vocab_size:
        raise UserError(
            f"tokenizer: {vocabulary} has {size} tokens (expected at most {config.vocab_size}, the rows of the "
            f"embedding in {weights})"
        )
    kind, sizes = _TASKS[config.head]
    given = {name: getattr(config, name) for name in sizes}
    preset, overrides = _preset_of(config, given)
    if not any(name.endswith(".key_tokens") for name in state):  # no Pattention
        overrides.pop("param_tokens", None)
    with torch.device("meta"):  # only shapes are needed
        task: Any = kind(preset, **given, overrides=overrides)
    task.backbone.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()})  # strict
    if isinstance(task, LitLanguageTask):
        task.tokenizer_json = text
    if isinstance(task, tasks.LitImageClassifier):
        task.image_data = known.read_image_data(weights, config_json)
    write_checkpoint(fresh_checkpoint(task, {f"backbone.{name}": tensor for name, tensor in state.items()}), target)
    if text is not None and not copy.exists():
        with atomic_write(copy) as file:
            file.write(text.encode())
    _write_settings(settings, kind, preset, config)
    numbers = sum(parameter.numel() for parameter in task.backbone.parameters())
    changes = "".join(f", {name} {value}" for name, value in overrides.items())
    text_note = "" if text or not isinstance(task, LitLanguageTask) else ", no tokenizer"
    notes = "".join(f"; {note}" for note in (more[0] if more else ()))
    print(f"{target}: {preset}{changes}, {numbers:,} parameters{text_note}{notes}")
    return target


_TASKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "language": (tasks.LitCausalLM, ("vocab_size", "context_length")),
    "masked_language": (tasks.LitMaskedLM, ("vocab_size", "context_length")),
    "image": (tasks.LitImageClassifier, ("num_classes", "image_size")),
}
"""Task of each head, and the fields of the architecture that are arguments of the task."""


_FREE = {"param_tokens", "drop_path", "patch_drop_rate", "init", "unpad", "low_precision_norm"}
"""Fields of an architecture that a fit may choose; the weights determine the number of parameter tokens."""


def _write_settings(path: Path, kind: type, preset: str, config: TokenformerConfig) -> None:
    """Write the model section of a config for ``fit``, with all fields that an earlier config may have set."""
    resized = {"image_size", "num_classes"} if config.stem == "patch" else set()  # to the data
    free = _FREE | resized | UNUSED_BY_STEM.get(config.stem, set())
    fields = {name: value for name, value in vars(config).items() if name not in free}
    fields["layers"] = config.layers and list(config.layers)
    arguments = {"preset": preset, "overrides": fields}
    content = {"model": {"class_path": f"lit_tokenformer.tasks.{kind.__name__}", "init_args": arguments}}
    with atomic_write(path) as file:
        file.write(yaml.safe_dump(content, sort_keys=False).encode())


def export_weights(
    ckpt_path: str,
    output: str,
    format: str | None = None,
    dtype: str | None = None,
    project: str | None = None,
    architecture: str | None = None,
    cache: bool | None = None,
) -> Path:
    """Export a checkpoint at its grown size: as weights, or as a graph for an inference engine.

    The weights are the moving average where the fit has one. A graph has a dynamic batch size and length; after the
    export, its outputs are compared with the model's.

    Args:
        ckpt_path: Path to a checkpoint of a single task.
        output: New folder for the weights or the graph, config.json and, if the checkpoint has a tokenizer, its files.
        format: Weights as safetensors: "transformers", "timm", or "lit_tokenformer" for any model; a graph: "onnx",
            "torch_export" (model.pt2) or "aoti" (model.pt2, compiled by AOTInductor); or the file format of PROJECT:
            "safetensors" (model.safetensors, the default) or "bin" (pytorch_model.bin).
        dtype: Data type of the weights: "float32", "float16" or "bfloat16"; defaults to that of the checkpoint, for a
            graph to "float32".
        project: Weight format: "tokenformer", "transformers", "timm", "lit_tokenformer", or one registered by a plugin;
            defaults to "tokenformer". With format "safetensors", a model that it cannot express is written as
            "lit_tokenformer".
        architecture: Architecture of "transformers", such as "roberta"; defaults to the first that can express the
            model.
        cache: Whether the graph of a language model takes and returns its KV caches or recurrent states, to generate
            text; defaults to true.

    Returns:
        Path of the folder.

    Raises:
        UserError: If the checkpoint cannot be read, if the format cannot express the architecture or its size, if a tau
            is not the square root of its number of tokens, if the outputs of a graph differ, or if the output already
            exists.
    """
    if format is not None and format not in (*WEIGHTS, *WEIGHT_FORMATS, *ENGINES):
        raise unknown_name("format", format, (*WEIGHTS, *WEIGHT_FORMATS, *ENGINES))
    given = {"project": project, "architecture": architecture, "cache": cache}
    unused = ("project", "architecture") if format in ENGINES else ("cache",)
    for name in unused:
        if given[name] is not None:
            raise UserError(f"{name}: unused with format {format or 'safetensors'!r} (got {given[name]!r})")
    WEIGHT_FORMATS[project or "tokenformer"]  # raises for an unknown name
    with new_folder(output) as folder:
        checkpoint = read_checkpoint(ckpt_path)
        if format is not None and format in ENGINES:
            _write_graph(folder, ckpt_path, checkpoint, format, dtype, cache)
        else:
            _write_weights(folder, ckpt_path, checkpoint, format, dtype, project, architecture)
    return Path(output)


def _write_graph(
    folder: Path, ckpt_path: str, checkpoint: dict[str, Any], format: str, dtype: str | None, cache: bool | None
) -> None:
    task: Any = rebuild_task(ckpt_path, checkpoint)
    difference = export_engine(folder, task.backbone, format, dtype, cache)
    if checkpoint.get("image_data") is not None:
        write_image_data(folder, checkpoint["image_data"])
    if checkpoint.get("tokenizer") is not None:
        write_tokenizer(folder, checkpoint["tokenizer"])
    print(f"{format}: outputs equal the model's to {difference:.1e} of the largest value")


def _write_weights(
    folder: Path,
    ckpt_path: str,
    checkpoint: dict[str, Any],
    format: str | None,
    dtype: str | None,
    project: str | None,
    architecture: str | None,
) -> None:
    if format in WEIGHT_FORMATS:
        project, format = format, "safetensors"
    projects = [project or "tokenformer"]
    if project is None and format == "safetensors":
        projects.append(NATIVE)
    task: Any = rebuild_task(ckpt_path, checkpoint, device="meta")
    weights = checkpoint["state_dict"]
    state = {name.removeprefix("backbone."): weights[name] for name in weights if name.startswith("backbone.")}
    initial = task.backbone.config
    chosen = {} if architecture is None else {"architecture": architecture}
    for name in projects:
        known: WeightFormat = WEIGHT_FORMATS[name]
        if chosen and known.architectures is None:
            raise UserError(f"architecture: the weight format {name!r} has only one (got {architecture!r})")
        config = initial if known.adopts_sizes else initial.at_size(task.backbone.size)
        try:
            known.write(folder, config, state, dtype, format or "safetensors", **chosen)
            break
        except UserError as error:
            if name == projects[-1]:
                raise
            print(f"project: {projects[-1]} ({error})")
    if checkpoint.get("tokenizer") is not None:
        known.write_tokenizer(folder, checkpoint["tokenizer"])
    if checkpoint.get("image_data") is not None and known.write_image_data is not None:
        known.write_image_data(folder, checkpoint["image_data"])
    if known.write_card is not None:
        known.write_card(folder, task.backbone, checkpoint)


@contextmanager
def new_folder(output: str) -> Iterator[Path]:
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


def _read_tokenizer(path: Path) -> str:
    """Load a vocabulary as a ``tokenizer.json`` without padding and truncation, which the data modules ignore too."""
    try:
        backend, _ = read_vocabulary(path)
        backend.no_truncation()
        plain = backend.to_str()
        text = path.read_text(encoding="utf-8") if path.suffix == ".json" else plain
        return text if json.loads(text) == json.loads(plain) else plain
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: cannot read {path} ({_first_line(error.__cause__ or error)})") from None


def _is_tokenizer(path: Path, text: str) -> bool:
    try:
        return _read_tokenizer(path) == text
    except UserError:
        return False


def _preset_of(config: TokenformerConfig, sizes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Find the preset nearest to a config, and the fields that differ, apart from the sizes of the data."""
    found: dict[str, dict[str, Any]] = {}
    for name in list_presets():
        base = {**vars(preset_config(name)), **sizes}  # together they may be invalid, as patch size and image size
        found[name] = {key: value for key, value in vars(config).items() if value != base[key]}
    name = min(found, key=lambda name: (len(found[name]), not name.startswith("tokenformer_lm_")))
    return name, found[name]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
