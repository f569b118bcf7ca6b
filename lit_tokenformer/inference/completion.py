"""Completions: text from token ids as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.errors import UserError
from lit_tokenformer.inference.sampling import ENDED


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


class Text:
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
