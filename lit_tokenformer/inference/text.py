"""Text from a checkpoint of a language model.

Example:
    ::

        from lit_tokenformer.inference.text import TextGenerator
        generator = TextGenerator.load("last.ckpt")
        print(generator.generate("The import statement", max_new_tokens=50))
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.inference.sampling import ENDED, Sampling, check_writes_text, generate_tokens
from lit_tokenformer.models import Tokenformer
from lit_tokenformer.tasks.language import TOKENIZER_FILE
from lit_tokenformer.tasks.rebuild import rebuild_task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of the weights that text can be generated in, by name."""


@dataclass
class Completion:
    """What has been written after one prompt so far.

    Args:
        prompt: As it was given.
        text: What came after it, without stop texts and separator.
        tokens: New tokens, with the one that ended the text.
        stopped: Why it ended: ``stop`` (the separator or a stop text), ``length`` (``max_new_tokens``) or ``context``
            (prompt and new tokens fill the model's context); ``None`` while it goes on.
        seconds: From the start to the last token, the reading of the prompt included.
    """

    prompt: str
    text: str = ""
    tokens: int = 0
    stopped: str | None = None
    seconds: float = 0.0


class TextGenerator:
    """Writes text with a language model.

    A prompt is read as it stands, with no separator in front: it may come from the middle of a document. An empty
    prompt is read as the separator, so that a new document is written. The separator always ends a text.

    Args:
        backbone: A causal language model.
        tokenizer: The tokenizer that it was trained with.

    Raises:
        ValueError: If the model cannot write text, or the tokenizer has more tokens than the model.

    Example:
        >>> from lit_tokenformer.models import create_backbone
        >>> model = create_backbone("tokenformer_lm_tiny", vocab_size=257, context_length=16)
        >>> generator = TextGenerator(model, Tokenizer.bytes())
        >>> generator.generate(["Once", "Twice"], max_new_tokens=2)[1].startswith("Twice")
        True
    """

    def __init__(self, backbone: Tokenformer, tokenizer: Tokenizer) -> None:
        check_writes_text(backbone)
        if tokenizer.size > backbone.config.vocab_size:
            raise UserError(
                f"tokenizer: it has {tokenizer.size} tokens, the model's vocab_size is {backbone.config.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        self.backbone = backbone
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        ckpt_path: str | os.PathLike[str],
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
    ) -> TextGenerator:
        """A generator from a checkpoint of a fit, at whatever size it had grown to.

        The tokenizer is the one in the checkpoint, else the ``tokenizer.json`` beside it; where the fit kept a moving
        average of the weights, it is the average that writes.

        Args:
            ckpt_path: The file.
            device: Where the model runs; ``auto`` takes the accelerator, if there is one.
            dtype: Type of the weights, by torch's name or as torch has it; ``None`` keeps that of the checkpoint.

        Raises:
            ValueError: If the checkpoint cannot be read, is not of a language model or has no tokenizer, or there is
                no such device or type.
        """
        where = _device(device)
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise unknown_name("dtype", dtype, DTYPES)
            dtype = DTYPES[dtype]
        checkpoint = read_checkpoint(ckpt_path, map_location="meta")
        task = rebuild_task(ckpt_path, checkpoint)
        try:
            check_writes_text(task.backbone)
        except ValueError as error:
            raise UserError(f"ckpt_path: {ckpt_path} is of a {type(task).__name__}: {error}") from None
        tokenizer = _tokenizer(Path(ckpt_path), checkpoint.get("tokenizer"), getattr(task, "separator_id", None))
        return cls(task.backbone.eval().requires_grad_(False).to(where, dtype), tokenizer)

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
        """Goes on from one prompt, or from several at once.

        Args:
            prompts: One text, or a list of texts; each is written as if it were alone with its place in the list.
            max_new_tokens: Tokens that are written for each at most.
            temperature: How freely the next token is chosen; 0 always takes the most probable.
            top_k: Only the k most probable tokens are chosen from; ``None`` for all.
            top_p: Only the most probable tokens that together have this probability; ``None`` for all.
            repetition_penalty: Makes tokens that occurred before, the prompt's too, less probable if above 1.
            stop: Texts that end the text where they appear, and are no part of it; the separator ends it too.
            seed: The same seed gives the same text; ``None`` draws one from torch's global generator.
            return_full_text: Whether the text begins with its prompt, as Hugging Face's pipelines have it.

        Returns:
            A text for a text, a list for a list.

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
        """The text of :meth:`generate` for one prompt, in pieces, as it is produced.

        Args:
            prompt: A text.
            max_new_tokens: As in :meth:`generate`, like all that follow.
            temperature: How freely the next token is chosen.
            top_k: How many tokens are chosen from.
            top_p: How much probability is chosen from.
            repetition_penalty: How much tokens that occurred before lose.
            stop: Texts that end the text.
            seed: Of the draws.
            return_full_text: Whether the first piece is the prompt.

        Yields:
            Whole characters, and nothing that may turn out to be a stop text.

        Raises:
            ValueError: At the first piece, as :meth:`generate`.
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
    ) -> Iterator[list[Completion]]:
        """What :meth:`generate` and :meth:`stream` are made of: all completions, as far as they are.

        Args:
            prompts: The texts to go on from, at least one, each as it is or as token ids; or a single text.
            max_new_tokens: Tokens that are written for each at most.
            sampling: How the next token is chosen.
            stop: Texts that end a text.
            seed: Of the draws; one for each prompt gives each what it gets alone with its seed.

        Yields:
            The same list before the first and after each token, its completions longer each time.

        Raises:
            ValueError: As :meth:`generate`, before anything is yielded.
        """
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        if "" in stops:
            raise UserError("stop: expected texts of at least one character, got ''")
        texts = [prompts] if isinstance(prompts, str) else prompts
        rows = [_Row(self.tokenizer, text, stops) for text in texts]
        steps = generate_tokens(
            self.backbone,
            [row.ids for row in rows],
            max_new_tokens,
            sampling,
            stop=[self.tokenizer.separator_id],
            vocab_size=self.tokenizer.size,
            seed=seed,
        )
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
    """One text while it is written.

    Args:
        tokenizer: Makes tokens of text, and text of tokens.
        prompt: What the text goes on from, or its token ids.
        stops: Texts that end it.
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
        self.held = ""  # the beginning of a stop text, perhaps
        self.streamer = tokenizer.stream()
        # Some vocabularies drop the space before the first word of a text, so it has to begin with the prompt.
        shown = "".join(self.streamer.step(token) for token in self.ids)
        self.hidden = len(tokenizer.decode(self.ids)) - len(shown)  # characters of the prompt that are still to come

    def add(self, token: int, seconds: float) -> None:
        """Takes the next token."""
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
        """Writes what was held back, unless the text has ended."""
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


def _device(name: str | torch.device) -> torch.device:
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
    """The tokenizer in a checkpoint, else the one beside it, with the separator that the model was trained with."""
    source = f"the tokenizer in {ckpt_path}"
    if text is None:
        beside = ckpt_path.with_name(TOKENIZER_FILE)
        if not beside.is_file():
            raise UserError(f"ckpt_path: {ckpt_path} has no tokenizer, and there is no {TOKENIZER_FILE} beside it")
        text, source = beside.read_text(encoding="utf-8"), str(beside)
    try:
        added = [token["content"] for token in json.loads(text)["added_tokens"] if token["id"] == separator_id]
    except (ValueError, KeyError, TypeError):
        added = []  # damaged, or of another make: the tokenizer itself will tell
    return Tokenizer.from_json(text, added[-1] if added else None, source=source)
