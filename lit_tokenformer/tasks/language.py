"""Base class of text tasks: sizes that match the data, and the data's tokenizer in the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lit_tokenformer.checkpoints.run_folder import write_new
from lit_tokenformer.errors import UserError
from lit_tokenformer.tasks.base import LitTask

TOKENIZER_FILE = "tokenizer.json"
"""File name of the tokenizer in the checkpoint folder."""


class LitLanguageTask(LitTask):
    """Task on text, which saves the tokenizer of the data in its checkpoints and as ``tokenizer.json`` in their folder.

    Attributes:
        tokenizer_json: Tokenizer of the training data, as the content of a ``tokenizer.json``.
    """

    tokenizer_json: str | None = None
    masked: bool | None = False
    """Whether batches contain masked tokens; ``None`` for batches of another kind."""
    data_module = "TextDataModule"
    """Name of the data module of such batches."""

    @property
    def tokenizer_file(self) -> str:
        """File name of the tokenizer in the checkpoint folder, with the task's name if several tasks have one."""
        whole = self._within[0] if self._within is not None else self
        several = sum(isinstance(task, LitLanguageTask) for task in whole.modules()) > 1
        return f"{self._within[1]}.{TOKENIZER_FILE}" if several and self._within is not None else TOKENIZER_FILE

    def setup(self, stage: str) -> None:
        data = self.task_data
        if getattr(data, "masked", self.masked) != self.masked:
            raise UserError(f"data: {type(self).__name__} needs {self.data_module}, got {type(data).__name__}")
        config = self.backbone.config
        size = getattr(data, "vocab_size", config.vocab_size)
        if size > config.vocab_size:
            raise UserError(
                f"data.tokenizer: too many tokens for the model (got {size}, expected at most vocab_size "
                f"{config.vocab_size}); use the model's tokenizer, or set model.overrides.vocab_size"
            )
        length = getattr(data, "context_length", config.context_length)
        if config.length_limit is not None and length > config.length_limit:
            raise UserError(
                f"data.block_size: expected at most the model's context_length {config.context_length}, got {length}"
            )

    def save_extras(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokenizer"] = self._tokenizer_of_data()

    def load_extras(self, checkpoint: dict[str, Any]) -> None:
        self._check_tokenizer(checkpoint, self._tokenizer_of_data())
        self.tokenizer_json = checkpoint.get("tokenizer")

    def check_data(self, checkpoint: Mapping[str, Any], data: Any) -> None:
        """Raise a ``UserError`` if the data have another tokenizer than a checkpoint."""
        tokenizer = getattr(data, "tokenizer", None)
        self._check_tokenizer(checkpoint, None if tokenizer is None else tokenizer.to_json())

    def _check_tokenizer(self, checkpoint: Mapping[str, Any], present: str | None) -> None:
        saved = checkpoint.get("tokenizer")
        if saved is not None and present is not None and json.loads(saved) != json.loads(present):
            raise UserError(
                "data.tokenizer: does not match the checkpoint's tokenizer; "
                f"set it to the {self.tokenizer_file} in the checkpoint's folder"
            )

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
