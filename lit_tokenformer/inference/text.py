"""Text generation from a checkpoint of a language model.

Example:
    ::

        from lit_tokenformer.inference.text import TextGenerator
        generator = TextGenerator.load("last.ckpt")
        print(generator.generate("The import statement", max_new_tokens=50))
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lit_tokenformer.adapters import list_adapters, load_adapter, set_adapter
from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.data.text.vocabulary import read_text
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth import shrink
from lit_tokenformer.growth.shrink import Prefix
from lit_tokenformer.inference.batching import SlotDecoder
from lit_tokenformer.inference.completion import Completion, Text
from lit_tokenformer.inference.quantization import quantize as quantize_weights
from lit_tokenformer.inference.readers import Step, compile_step
from lit_tokenformer.inference.sampling import Sampling, check_causal_lm, evaluation_mode, generate_tokens
from lit_tokenformer.inference.speculative import Speculation, check_draft, speculate_tokens
from lit_tokenformer.models import Tokenformer
from lit_tokenformer.models.slots import has_slots
from lit_tokenformer.tasks.language import TOKENIZER_FILE
from lit_tokenformer.tasks.rebuild import rebuild_task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Supported dtypes of the weights, by name."""


class TextGenerator:
    """Text generator over a causal language model and its tokenizer.

    A prompt is encoded without a leading separator: it may come from the middle of a document. An empty prompt is
    replaced by the separator, which starts a new document. The separator always ends a text.

    Args:
        backbone: Causal language model.
        tokenizer: Tokenizer that the model was trained with.

    Raises:
        ValueError: If the model is not a causal language model, or the tokenizer has more tokens than the model.

    Example:
        >>> from lit_tokenformer.models import create_backbone
        >>> model = create_backbone("tokenformer_lm_tiny", vocab_size=257, context_length=16)
        >>> generator = TextGenerator(model, Tokenizer.bytes())
        >>> generator.generate(["Once", "Twice"], max_new_tokens=2)[1].startswith("Twice")
        True
    """

    def __init__(self, backbone: Tokenformer, tokenizer: Tokenizer) -> None:
        check_causal_lm(backbone)
        if tokenizer.size > backbone.config.vocab_size:
            raise UserError(
                f"tokenizer: it has {tokenizer.size} tokens, the model's vocab_size is {backbone.config.vocab_size}; "
                "use the tokenizer of the training run"
            )
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.speculation = Speculation()
        """Counts of speculative decoding so far."""
        self._draft: tuple[Tokenformer, int] | None = None
        self._step: Step | None = None

    def use_draft(self, draft: TextGenerator | Prefix, length: int = 4) -> None:
        """Decode with a smaller model that proposes tokens; see :mod:`~lit_tokenformer.inference.speculative`.

        Args:
            draft: Generator with the same tokenizer; or a size of this model, as in
                :func:`~lit_tokenformer.growth.shrink`, whose first units are the draft.
            length: Tokens that the draft proposes before each forward pass of the model.

        Raises:
            ValueError: If the draft has another tokenizer, or does not match the model.
        """
        if not isinstance(draft, TextGenerator):
            smaller = copy.deepcopy(self.backbone)
            shrink(smaller, draft, "draft_tokens")
            draft = TextGenerator(smaller, self.tokenizer)
        ours, theirs = self.tokenizer, draft.tokenizer
        if ours.separator_id != theirs.separator_id or json.loads(ours.to_json()) != json.loads(theirs.to_json()):
            raise UserError("draft: its tokenizer differs from the model's (expected the same vocabulary)")
        check_draft(self.backbone, draft.backbone, self.tokenizer.size)
        self._draft = draft.backbone, length

    def compile(self) -> None:
        """Compile the decoding step; the text stays the same, except where rounding decides a tie.

        See :func:`~lit_tokenformer.inference.readers.compile_step`. The first token of each batch size compiles.

        Raises:
            ValueError: If there is a draft, if a part of the model has a decoding state without slots, or if torch
                cannot compile here.
        """
        if self._draft is not None:
            raise UserError("compile: unsupported with a draft")
        self._step = compile_step(self.backbone)

    @classmethod
    def load(
        cls,
        ckpt_path: str | os.PathLike[str],
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> TextGenerator:
        """Load a generator from a checkpoint of a fit, at its grown size.

        The tokenizer is the one in the checkpoint, else the ``tokenizer.json`` next to it. The moving average of the
        weights is used where the fit kept one.

        Args:
            ckpt_path: Checkpoint to load.
            device: Device of the model; ``auto`` selects the accelerator, if available.
            dtype: Dtype of the weights, or its name; ``None`` keeps that of the checkpoint.
            quantize: Scheme of :func:`~lit_tokenformer.inference.quantization.quantize`; ``None`` for none.
            adapters: Folders of adapters of this model by name; see :meth:`set_adapter`.

        Raises:
            ValueError: If the checkpoint cannot be read, is not of a language model or has no tokenizer, or the device,
                dtype or quantization is not available; if an adapter is of another model or tokenizer.
        """
        where = find_device(device)
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise unknown_name("dtype", dtype, DTYPES)
            dtype = DTYPES[dtype]
        checkpoint = read_checkpoint(ckpt_path, map_location="meta")
        task = rebuild_task(ckpt_path, checkpoint)
        try:
            check_causal_lm(task.backbone)
        except ValueError as error:
            raise UserError(f"ckpt_path: {ckpt_path} is of a {type(task).__name__}: {error}") from None
        tokenizer = _tokenizer(Path(ckpt_path), checkpoint.get("tokenizer"), getattr(task, "separator_id", None))
        for name, folder in (adapters or {}).items():
            load_adapter(task.backbone, folder, name, tokenizer.to_json())
        model = task.backbone.eval().requires_grad_(False).to(where, dtype)
        return cls(model if quantize is None else quantize_weights(model, quantize), tokenizer)

    def set_adapter(self, names: str | Sequence[str | None] | None) -> None:
        """Select the adapter of the following prompts; see :func:`~lit_tokenformer.adapters.set_adapter`.

        Args:
            names: Name of an adapter, ``None`` for the model alone, or one of them per prompt.
        """
        set_adapter(self.backbone, names)

    @torch.inference_mode()
    def best_adapters(self, prompts: Sequence[str]) -> list[str | None]:
        """Find the adapter with the least loss on each prompt; ``None`` for the model alone, also in a tie.

        It costs a forward pass per prompt and adapter. A prompt of less than two tokens has no loss.

        Args:
            prompts: Prompts; those longer than the context are cut.
        """
        choices = [None, *list_adapters(self.backbone)]
        found: list[str | None] = []
        for prompt in prompts:
            tokens = torch.tensor(self.tokenizer.encode(prompt), device=next(self.backbone.parameters()).device)
            tokens = tokens[: self.backbone.config.length_limit]
            losses = []
            for name in choices if len(tokens) > 1 else ():
                self.set_adapter(name)
                logits = self.backbone.forward_head(self.backbone.forward_features(tokens[None, :-1]))
                losses.append(F.cross_entropy(logits[0].float(), tokens[1:]).item())
            found.append(choices[losses.index(min(losses))] if losses else None)
        return found

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = 0,
        return_full_text: bool = True,
    ) -> Any:
        """Continue one prompt or a batch of prompts.

        Args:
            prompts: Prompt or list of prompts to continue; a completion depends on its prompt and its index only.
            max_new_tokens: Maximum number of new tokens per prompt.
            temperature: Sampling temperature; 0 is greedy decoding.
            top_k: Sample from the k most probable tokens; ``None`` for all.
            top_p: Sample from the smallest set of most probable tokens with this total probability; ``None`` for all.
            repetition_penalty: Penalty on tokens that occurred before, including the prompt's; 1 disables it.
            stop: Stop strings, excluded from the text; the separator ends it too.
            seed: Sampling seed; ``None`` draws one from torch's global generator.
            return_full_text: Whether to prepend the prompt, as in Hugging Face's pipelines.

        Returns:
            Text for a single prompt, list of texts for a list.

        Raises:
            ValueError: If a setting is out of range, or a prompt is longer than the model's context.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        *_, completions = self.run(prompts, max_new_tokens, sampling, stop, seed)
        written = [(one.prompt if return_full_text else "") + one.text for one in completions]
        return written[0] if isinstance(prompts, str) else written

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = 0,
        return_full_text: bool = True,
    ) -> Iterator[str]:
        """Stream the text of :meth:`generate` for one prompt.

        Args:
            prompt: Prompt to continue.
            max_new_tokens: Maximum number of new tokens.
            temperature: Sampling temperature; 0 is greedy decoding.
            top_k: Number of candidate tokens; ``None`` for all.
            top_p: Total probability of the candidate tokens; ``None`` for all.
            repetition_penalty: Penalty on tokens that occurred before; 1 disables it.
            stop: Stop strings.
            seed: Sampling seed.
            return_full_text: Whether the first chunk is the prompt.

        Yields:
            Text chunks of complete characters; a possible prefix of a stop string is held back.

        Raises:
            ValueError: At the first chunk, as :meth:`generate`.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        if return_full_text and prompt:
            yield prompt
        done = 0
        for (completion,) in self.run(prompt, max_new_tokens, sampling, stop, seed):
            if len(completion.text) > done:
                yield completion.text[done:]
                done = len(completion.text)

    def run(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        max_new_tokens: int = 200,
        sampling: Sampling = Sampling(temperature=0.8),  # noqa: B008  (frozen)
        stop: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = 0,
        images: torch.Tensor | None = None,
    ) -> Iterator[list[Completion]]:
        """Generate completions step by step; the base of :meth:`generate` and :meth:`stream`.

        Args:
            prompts: At least one prompt to continue, as text or token ids; or a single text.
            max_new_tokens: Maximum number of new tokens per prompt.
            sampling: Sampling settings.
            stop: Stop strings.
            seed: Sampling seed. With one seed per prompt, each completion equals its prompt continued alone.
            images: Image before each prompt, (B, C, height, width) in [-1, 1]; the prompts are questions, and the
                completions their answers.

        Yields:
            The same list of completions before the first and after each token, updated in place.

        Raises:
            ValueError: As :meth:`generate`, before the first yield.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        rows = self._texts(texts, stop)
        if images is not None:
            if self._draft is not None:
                raise UserError("draft: cannot read images (expected none)")
            if self._step is not None:
                raise UserError("compile: cannot read images (expected none)")
            for row, text in zip(rows, texts, strict=True):
                row.ids = [*(row.ids if len(text) else []), self.tokenizer.separator_id]
        stop_ids, size = [self.tokenizer.separator_id], self.tokenizer.size
        given: Any = ([row.ids for row in rows], max_new_tokens, sampling, stop_ids, size, seed)
        if self._draft is None:
            more: Any = {"step": self._step, "images": images}
            steps = generate_tokens(self.backbone, *given, **more)
        else:
            draft, length = self._draft
            more = {"draft_length": length, "counts": self.speculation}
            steps = speculate_tokens(self.backbone, draft, *given, **more)
        completions = [row.completion for row in rows]
        yield completions
        start = time.perf_counter()
        with closing(steps):
            for tokens in steps:
                seconds = time.perf_counter() - start
                for row, token in zip(rows, tokens.tolist(), strict=True):
                    if row.completion.stopped is None:
                        row.add(token, seconds)
                        if row.completion.tokens == max_new_tokens:
                            row.end("length")
                if all(one.stopped for one in completions):
                    break
                yield completions
        for row in rows:
            row.end("context")
        yield completions

    def complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        batch_size: int = 32,
        max_new_tokens: int = 200,
        sampling: Sampling = Sampling(temperature=0.8),  # noqa: B008  (frozen)
        stop: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        adapters: Sequence[str | None] | None = None,
    ) -> Iterator[Completion]:
        """Continue many prompts, a fixed number of them at once: where a text ends, the next prompt begins.

        The longest prompts come first. A draft, and parts of plugins whose decoding state has no form with slots, are
        decoded batch by batch instead.

        Args:
            prompts: Prompts to continue, as text or token ids.
            batch_size: Number of prompts decoded at once.
            max_new_tokens: Maximum number of new tokens per prompt.
            sampling: Sampling settings.
            stop: Stop strings.
            seed: Sampling seed of each prompt; with a single seed, prompt i uses ``seed + i``. A completion
                equals its prompt continued alone with its seed.
            adapters: Adapter of each prompt, by name; ``None`` for the one selected for all. Prompts with the same
                adapter are decoded together.

        Yields:
            Completions in the order of the prompts, as soon as all before them have ended.

        Raises:
            ValueError: As :meth:`generate`, before the first completion.
        """
        if batch_size < 1:
            raise UserError(f"batch_size: expected a whole number of at least 1, got {batch_size}")
        seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
        groups: dict[str | None, list[int]] = {}
        for number, name in enumerate(adapters or [None] * len(prompts)):
            groups.setdefault(name, []).append(number)
        found: dict[int, Completion] = {}
        number = 0
        with evaluation_mode(self.backbone):
            for name, numbers in groups.items():
                if adapters is not None:
                    self.set_adapter(name)
                given = [prompts[n] for n in numbers], batch_size, max_new_tokens, sampling, stop
                for place, completion in self._complete(*given, [seeds[n] for n in numbers]):
                    found[numbers[place]] = completion
                    while number in found:
                        yield found.pop(number)
                        number += 1

    def _complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        batch_size: int,
        max_new_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str] | None,
        seeds: Sequence[int],
    ) -> Iterator[tuple[int, Completion]]:
        """Continue prompts with the same adapter, and yield their indices and completions as they end."""
        if self._draft is not None or not has_slots(self.backbone):
            for first in range(0, len(prompts), batch_size):
                some = slice(first, first + batch_size)
                *_, completions = self.run(prompts[some], max_new_tokens, sampling, stop, seeds[some])
                yield from enumerate(completions, start=first)
            return
        rows = self._texts(prompts, stop)
        ids, stop_ids = [row.ids for row in rows], [self.tokenizer.separator_id]
        given: Any = (max_new_tokens, sampling, stop_ids, self.tokenizer.size, seeds, self._step)
        decoder = SlotDecoder(self.backbone, ids, batch_size, *given)
        starts = [time.perf_counter()] * len(rows)
        before = time.perf_counter()
        for tokens in decoder:
            now = time.perf_counter()
            for number, token in tokens:
                row = rows[number]
                if row.completion.tokens == 0:
                    starts[number] = before
                row.add(token, now - starts[number])
                if row.completion.tokens == max_new_tokens:
                    row.end("length")
                elif len(row.ids) + row.completion.tokens == self.backbone.config.length_limit:
                    row.end("context")
                if row.completion.stopped is not None:
                    decoder.end(number)
                    yield number, row.completion
            before = now
        for number, row in enumerate(rows):
            if row.completion.tokens == 0:  # the prompt fills the context
                row.end("context")
                yield number, row.completion

    def _texts(self, prompts: Sequence[str | Sequence[int]], stop: str | Sequence[str] | None) -> list[Text]:
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        if "" in stops:
            raise UserError("stop: expected texts of at least one character, got ''")
        return [Text(self.tokenizer, prompt, stops) for prompt in prompts]


def find_device(name: str | torch.device) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device: {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _tokenizer(ckpt_path: Path, text: str | None, separator_id: int | None) -> Tokenizer:
    """Load the tokenizer in a checkpoint, else the one next to it, with the separator of the training run."""
    source = f"the tokenizer in {ckpt_path}"
    if text is None:
        file = ckpt_path.with_name(TOKENIZER_FILE)
        if not file.is_file():
            raise UserError(
                f"ckpt_path: no tokenizer in {ckpt_path} (expected it there, or {TOKENIZER_FILE} next to it)"
            )
        text, source = read_text(file), str(file)
    return Tokenizer.from_json(text, separator_id, source=source)
