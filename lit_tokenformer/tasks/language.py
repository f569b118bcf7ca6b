"""What tasks on text share: sizes that fit the data, and the data's tokenizer in the checkpoint."""

from __future__ import annotations

import json
from typing import Any

from lit_tokenformer.checkpoints.run_folder import write_new
from lit_tokenformer.errors import UserError
from lit_tokenformer.tasks.base import LitTask

TOKENIZER_FILE = "tokenizer.json"
"""Name of the tokenizer's file beside the checkpoints."""


class LitLanguageTask(LitTask):
    """A task on text. Its checkpoints hold the tokenizer of the data, and their folder gets a ``tokenizer.json``.

    Attributes:
        tokenizer_json: The tokenizer of the data that the model was trained on, as the text of a ``tokenizer.json``.
    """

    tokenizer_json: str | None = None
    masked = False
    """Whether its batches hold masked tokens."""

    @property
    def tokenizer_file(self) -> str:
        """Name of the tokenizer's file beside the checkpoints; with the task's name where several tasks have one."""
        whole = self._within[0] if self._within is not None else self
        several = sum(isinstance(task, LitLanguageTask) for task in whole.modules()) > 1
        return f"{self._within[1]}.{TOKENIZER_FILE}" if several and self._within is not None else TOKENIZER_FILE

    def setup(self, stage: str) -> None:
        data = self.task_data
        if getattr(data, "masked", self.masked) != self.masked:
            wanted = "MaskedTextDataModule" if self.masked else "TextDataModule"
            raise UserError(f"data: {type(self).__name__} needs {wanted}, got {type(data).__name__}")
        config = self.backbone.config
        size = getattr(data, "vocab_size", config.vocab_size)
        if size > config.vocab_size:
            raise UserError(
                f"data.tokenizer: it has {size} tokens, the model's vocab_size is {config.vocab_size}; "
                "use the tokenizer that the model was trained with, or set model.overrides.vocab_size"
            )
        length = getattr(data, "context_length", config.context_length)
        if config.length_limit is not None and length > config.length_limit:
            raise UserError(f"data.block_size: {length} tokens, the model's context_length is {config.context_length}")

    def save_extras(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokenizer"] = self._tokenizer_of_data()

    def load_extras(self, checkpoint: dict[str, Any]) -> None:
        saved, present = checkpoint.get("tokenizer"), self._tokenizer_of_data()
        if saved is not None and present is not None and json.loads(saved) != json.loads(present):
            raise UserError(
                "data.tokenizer: it is not the one that the checkpoint's model was trained with; "
                f"set it to the {self.tokenizer_file} beside the checkpoint"
            )
        self.tokenizer_json = saved

    def on_train_start(self) -> None:
        super().on_train_start()
        text = self._tokenizer_of_data()
        if text is None or not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for callback in self.trainer.checkpoint_callbacks:
            folder = getattr(callback, "dirpath", None)
            if folder is not None:
                write_new(str(folder), self.tokenizer_file, text)

    def _tokenizer_of_data(self) -> str | None:
        tokenizer = getattr(self.task_data, "tokenizer", None)
        return self.tokenizer_json if tokenizer is None else tokenizer.to_json()
