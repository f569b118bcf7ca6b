"""Command ``generate``: prompts from the command line, files or the standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lit_tokenformer.adapters import read_adapter_config
from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.data.image_text.datamodule import to_tensor
from lit_tokenformer.data.images.samples import decode_image
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.inference.sampling import Sampling
from lit_tokenformer.inference.text import Completion, TextGenerator
from lit_tokenformer.models import Tokens


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
    prompt_file: str | None = None,
    prompts: str | None = None,
    output: str | None = None,
    batch_size: int = 8,
    quantize: str | None = None,
    adapter: str | list[str] | None = None,
    draft: str | None = None,
    draft_tokens: Tokens | float | None = None,
    draft_length: int = 4,
    image: str | list[str] | None = None,
    compile: bool = False,
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
        seed: Random seed of sampling; that of row i of "prompts" is SEED + i, from 0.
        format: Output format: "text" prints prompts and completions, "json" one JSON object per line and prompt; that
            of "prompts" is always "json".
        device: Device of the model, such as "cpu" or "cuda:0"; "auto" selects the accelerator if available.
        prompt_file: Text file that is one prompt, without the line break at its end; "-" for the standard input.
        prompts: JSON-lines file of prompts: objects with a text "prompt", whose other fields are copied to the output;
            "-" for the standard input.
        output: New file for the output, which appears once it is complete; defaults to the standard output.
        batch_size: Rows of "prompts" decoded at once: where a text ends, the next row begins, the longest first. The
            output is in the order of the rows, and the same for every batch size.
        quantize: Weight-only quantization of the blocks: "int8" or, on CPUs, "int4"; needs torchao.
        adapter: Adapters, NAME=FOLDER or FOLDER: one for all prompts, or one per prompt in their order. "none" is the
            model alone; "auto" picks that with the least loss on the prompt, or none, of those given with it.
        draft: Path to a checkpoint of a smaller model with the same tokenizer, for speculative decoding: it proposes
            tokens, which the model checks several at once. The text is a sample of the model alone.
        draft_tokens: Use the first units of the model itself as the draft: a size, as in "shrink".
        draft_length: Tokens that the draft proposes before each call of the model.
        image: Image files, for a checkpoint of LitVisionLanguage: one for all prompts, which are questions about it, or
            one per prompt in their order.
        compile: Compile the decoding step (Inductor on a CPU, CUDA graphs on a GPU), which takes up to minutes.

    Raises:
        UserError: If the checkpoint cannot be used, a setting is out of range, more than one of prompt, prompt_file and
            prompts is given, a file is invalid, or a prompt exceeds the context.
    """
    if format not in _FORMATS:
        raise unknown_name("format", format, _FORMATS)
    given = {"prompt": prompt, "prompt_file": prompt_file, "prompts": prompts}
    if len(names := [name for name, value in given.items() if value not in (None, "")]) > 1:
        raise UserError(f"{names[1]}: conflicts with {names[0]} (expected one of prompt, prompt_file and prompts)")
    if batch_size < 1:
        raise UserError(f"batch_size: expected a whole number of at least 1, got {batch_size}")
    if output is not None and Path(output).exists():
        raise UserError(f"output: {output} exists already")
    if draft is not None and draft_tokens is not None:
        raise UserError("draft_tokens: conflicts with draft (expected one of them)")
    if compile and (draft is not None or draft_tokens is not None):
        raise UserError("compile: conflicts with draft and draft_tokens")
    if draft_length < 1:
        raise UserError(f"draft_length: expected a whole number of at least 1, got {draft_length}")
    if image and prompts is not None:
        raise UserError("image: conflicts with prompts (expected prompt or prompt_file)")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    if prompt_file is not None:
        prompt = _read_prompt(prompt_file)
    adapters = AdapterChoice(adapter)
    if prompts is None:
        adapters.check(prompt)
    generator = TextGenerator.load(ckpt_path, device, quantize=quantize, adapters=adapters.folders)
    if compile:
        generator.compile()
    if draft is not None or draft_tokens is not None:
        smaller: Any = draft_tokens if draft is None else TextGenerator.load(draft, device)
        generator.use_draft(smaller, draft_length)
    if prompts is not None and not _is_pipe(prompts):
        for _ in _read_prompts(prompts, generator):  # an invalid row fails before the first completion
            pass
    with _writer(output) as write:
        if prompts is not None:
            settings = max_new_tokens, sampling, stop
            _continue_rows(generator, prompts, batch_size, settings, seed, write, adapters)
            _note_speculation(generator)
            return
        adapters.select(generator, prompt if isinstance(prompt, list) and prompt else [str(prompt or "")])
        asked = prompt or ""
        pixels = None if not image else _read_images(image, asked, generator)
        if pixels is not None and (isinstance(asked, str) or len(asked) == 1):
            asked = [asked if isinstance(asked, str) else asked[0]] * len(pixels)  # one question for several images
        between = " " if pixels is not None else ""
        number, printed = 0, 0  # the current prompt, and its characters printed so far
        for completions in generator.run(asked, max_new_tokens, sampling, stop, seed, pixels):
            while number < len(completions):
                shown = _FORMATS[format](completions[number], number, len(completions), seed, between)
                write(shown[printed:])
                printed = len(shown)
                if completions[number].stopped is None:
                    break
                number, printed = number + 1, 0
    for number, completion in enumerate(completions, start=1):
        if completion.stopped == "context":
            length = generator.backbone.config.context_length
            name = "" if len(completions) == 1 else f"prompt {number}: "
            print(f"note: {name}stopped at the context length of {length} tokens", file=sys.stderr)
    _note_speculation(generator)


def _note_speculation(generator: TextGenerator) -> None:
    if generator.speculation.calls:
        print(f"note: {generator.speculation}", file=sys.stderr)


class AdapterChoice:
    """Adapters of the command line, and which prompt uses which.

    Args:
        given: Values of ``--adapter``.

    Attributes:
        folders: Folders by name.

    Raises:
        UserError: If an adapter cannot be read, or two have the same name.
    """

    def __init__(self, given: str | list[str] | None) -> None:
        values = [given] if isinstance(given, str) else list(given or [])
        self.folders: dict[str, str] = {}
        self.names: list[str | None] = []
        self.auto = "auto" in values
        for value in [value for value in values if value != "auto"]:
            name, separator, folder = value.partition("=")
            if not separator and value != "none" and value not in self.folders:
                name, folder = read_adapter_config(value)["name"], value
            self.names.append(None if value == "none" else name)
            if folder and self.folders.setdefault(name, folder) != folder:
                raise UserError(f"adapter: two are named {name!r} ({self.folders[name]}, {folder}); use NAME=FOLDER")
        if self.auto and not self.folders:
            raise UserError("adapter: auto picks from adapters, expected at least one NAME=FOLDER with it")

    def check(self, prompt: str | list[str]) -> None:
        """Raise a ``UserError`` unless there is one adapter, or one per prompt."""
        count = 1 if isinstance(prompt, str) else len(prompt or [""])
        if not self.auto and len(self.names) not in (0, 1, count):
            raise UserError(f"adapter: expected one, or one for each of {count} prompts, got {len(self.names)}")

    def select(self, generator: TextGenerator, prompts: list[str]) -> None:
        """Select the adapters of a batch of prompts."""
        names = self.names_of(generator, prompts)
        if self.folders:
            generator.set_adapter(names)

    def names_of(self, generator: TextGenerator, prompts: list[str]) -> list[str | None]:
        """Adapter of each prompt; those picked by ``auto`` are reported."""
        if self.auto:
            names = generator.best_adapters(prompts)
            print(f"note: adapters picked: {', '.join(name or 'none' for name in names)}", file=sys.stderr)
        elif len(self.names) > 1:
            self.check(prompts)
            names = self.names
        else:
            names = (self.names or [None]) * len(prompts)
        return names


def _continue_rows(
    generator: TextGenerator,
    path: str,
    batch_size: int,
    settings: tuple[int, Sampling, str | list[str] | None],
    seed: int,
    write: Callable[[str], Any],
    adapters: AdapterChoice,
) -> None:
    """Continue the prompts of a JSON-lines file; each completion equals its prompt continued alone."""
    rows = _read_prompts(path, generator)
    size = batch_size * (1 if _is_pipe(path) else _SORTED)  # the other end of a pipe may wait for answers
    while window := list(islice(rows, size)):
        prompts = [row["prompt"] for row in window]
        names = adapters.names_of(generator, prompts) if adapters.folders else None
        for row, completion in zip(
            window, generator.complete(prompts, batch_size, *settings, seed, names), strict=True
        ):
            write(json.dumps(row | _results(completion, seed)) + "\n")
            seed += 1


@contextmanager
def _writer(output: str | None) -> Iterator[Callable[[str], Any]]:
    """Return a function that writes to the standard output at once, or to a new file that appears when complete."""
    if output is None:
        yield lambda text: print(text, end="", flush=True)
        return
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output, replace=False) as file:
            yield lambda text: file.write(text.encode())
    except OSError as error:
        raise UserError(f"output: cannot write {output} ({error.strerror or error})") from None


def _read_images(paths: str | list[str], prompt: str | list[str], generator: TextGenerator) -> Tensor:
    """Read an image for each prompt, (B, C, height, width); a single prompt or image is that of all.

    Raises:
        UserError: If one cannot be read, or their number is not that of the prompts.
    """
    names = [paths] if isinstance(paths, str) else paths
    count = len(prompt) if isinstance(prompt, list) and len(prompt) > 1 else len(names)
    if len(names) not in (1, count):
        raise UserError(f"image: expected one, or one for each of {count} prompts, got {len(names)}")
    config, found = generator.backbone.config, []
    for name in names:
        try:
            found.append(to_tensor(decode_image(name), config.image_size, config.in_chans))
        except Exception as error:  # damaged bytes raise any exception in a decoder
            raise UserError(f"image: cannot read {name} ({' '.join(str(error).split())})") from None
    return torch.stack(found * (count if len(names) == 1 else 1))


def _is_pipe(path: str) -> bool:
    return path == "-" or Path(path).is_fifo()


def _read_prompt(path: str) -> str:
    """Read a file as one prompt, without the line break at its end.

    Args:
        path: File in UTF-8; ``-`` for the standard input.

    Raises:
        UserError: If it cannot be read, is empty or is not UTF-8.
    """
    with _opened("prompt_file", path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"prompt_file: {path}:{line}: not UTF-8") from None
    if not text:
        raise UserError(f"prompt_file: {path} is empty")
    return text


def _read_prompts(path: str, generator: TextGenerator) -> Iterator[dict[str, Any]]:
    """Read a JSON-lines file of prompts, row by row.

    Args:
        path: File of objects with a text ``prompt`` and any other fields, in UTF-8; ``-`` for the standard input.
        generator: Generator that continues the prompts.

    Raises:
        UserError: If the file cannot be read or has no rows, or a row is invalid.
    """
    found, limit = False, generator.backbone.config.length_limit
    with _opened("prompts", path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else {"prompt": ""}
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                    raise UserError('expected an object with a text "prompt"')
                row["prompt"].encode()  # JSON may contain halves of characters
                if names := [name for name in row if name in _RESULTS]:
                    raise UserError(f"field {names[0]!r} is one of the output's ({', '.join(_RESULTS)})")
                length = len(generator.tokenizer.encode(row["prompt"]))
                if limit is not None and length > limit:
                    raise UserError(f"prompt of {length} tokens, the model's context_length is {limit}")
            except (ValueError, RecursionError) as error:
                kinds = ((UserError, ""), (UnicodeError, "not UTF-8: "), (Exception, "not JSON: "))
                kind = next(name for one, name in kinds if isinstance(error, one))
                raise UserError(f"prompts: {path}:{number}: {kind}{error}") from None
            if text.strip():
                found = True
                yield row
    if not found:
        raise UserError(f"prompts: {path} has no rows")


@contextmanager
def _opened(setting: str, path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{setting}: cannot read {path} ({error.strerror})") from None


def _as_text(completion: Completion, number: int, total: int, seed: int, between: str) -> str:
    header = f"==> {number + 1} of {total} <==\n" if total > 1 else ""
    return (
        header
        + completion.prompt
        + (between if completion.prompt else "")
        + completion.text
        + ("\n" if completion.stopped else "")
    )


def _as_json(completion: Completion, number: int, total: int, seed: int, between: str) -> str:
    if completion.stopped is None:
        return ""
    return json.dumps({"prompt": completion.prompt, **_results(completion, seed)}) + "\n"


def _results(completion: Completion, seed: int) -> dict[str, Any]:
    speed = round(completion.tokens / completion.seconds, 3) if completion.tokens else 0.0
    values = (completion.text, completion.tokens, completion.stopped, round(completion.seconds, 6), speed, seed)
    return dict(zip(_RESULTS, values, strict=True))


_RESULTS = ("completion", "tokens", "stopped", "seconds", "tokens_per_second", "seed")
"""Fields of a completion in JSON output."""

_SORTED = 64
"""Rows of "prompts" that are sorted by length together, as a multiple of the batch size."""

_FORMATS = {"text": _as_text, "json": _as_json}
