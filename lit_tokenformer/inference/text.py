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
from dataclasses import dataclass
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
from lit_tokenformer.inference.quantization import quantize as quantize_weights
from lit_tokenformer.inference.sampling import ENDED, Sampling, check_causal_lm, generate_tokens
from lit_tokenformer.inference.speculative import Speculation, check_draft, speculate_tokens
from lit_tokenformer.models import Tokenformer
from lit_tokenformer.tasks.language import TOKENIZER_FILE
from lit_tokenformer.tasks.rebuild import rebuild_task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Supported dtypes of the weights, by name."""


@dataclass
class Completion:
    """Completion of one prompt, possibly unfinished.

    Args:
        prompt: Prompt as passed.
        text: Generated text, without stop strings and separator.
        tokens: Number of new tokens, including the one that ended the text.
        stopped: Reason of the end: ``stop`` (the separator or a stop string), ``length`` (``max_new_tokens``) or
            ``context`` (prompt and new tokens fill the model's context); ``None`` while unfinished.
        seconds: Time from the start to the last token, including prefill, in seconds.
    """

    prompt: str
    text: str = ""
    tokens: int = 0
    stopped: str | None = None
    seconds: float = 0.0


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
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        if "" in stops:
            raise UserError("stop: expected texts of at least one character, got ''")
        texts = [prompts] if isinstance(prompts, str) else prompts
        rows = [_Row(self.tokenizer, text, stops) for text in texts]
        if images is not None:
            if self._draft is not None:
                raise UserError("draft: cannot read images (expected none)")
            for row, text in zip(rows, texts, strict=True):
                row.ids = [*(row.ids if len(text) else []), self.tokenizer.separator_id]
        stop_ids, size = [self.tokenizer.separator_id], self.tokenizer.size
        given: Any = ([row.ids for row in rows], max_new_tokens, sampling, stop_ids, size, seed)
        if self._draft is None:
            own: Any = {"images": images}
            steps = generate_tokens(self.backbone, *given, **own)
        else:
            draft, length = self._draft
            more: Any = {"draft_length": length, "counts": self.speculation}
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


class _Row:
    """Decoding state of one completion: streamed text and stop strings.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Prompt to continue, as text or token ids.
        stops: Stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str | Sequence[int], stops: list[str]) -> None:
        text = prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt))
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt: {text!r} is not valid Unicode") from None
        self.completion = Completion(text)
        self.ids = (tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)) or [tokenizer.separator_id]
        self.separator_id = tokenizer.separator_id
        self.stops = stops
        self.held = ""  # a possible prefix of a stop string
        self.streamer = tokenizer.stream()
        # Some vocabularies drop the space before the first word of a text, so the stream starts with the prompt.
        shown = "".join(self.streamer.step(token) for token in self.ids)
        self.hidden = len(tokenizer.decode(self.ids)) - len(shown)  # characters of the prompt that are still to come

    def add(self, token: int, seconds: float) -> None:
        """Append the next token."""
        if token == ENDED:
            self.end("context")
            return
        self.completion.tokens += 1
        self.completion.seconds = seconds
        if token == self.separator_id:
            self.end("stop")
        else:
            self._write(self.streamer.step(token))

    def end(self, reason: str) -> None:
        """Flush the held text and set the stop reason, unless the text has ended."""
        if self.completion.stopped is None:
            self._write(self.streamer.finish())
        if self.completion.stopped is None:
            self.completion.text += self.held
            self.completion.stopped = reason

    def _write(self, piece: str) -> None:
        self.held += piece[self.hidden :]
        self.hidden = max(0, self.hidden - len(piece))
        found = [place for place in (self.held.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.completion.text += self.held[: min(found)]
            self.completion.stopped = "stop"
            return
        begun = (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n]))
        certain = len(self.held) - max(begun, default=0)
        self.completion.text += self.held[:certain]
        self.held = self.held[certain:]


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
