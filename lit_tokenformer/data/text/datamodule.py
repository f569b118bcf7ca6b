"""LightningDataModule for causal language modeling.

Documents are in ``sources.py``, splits and tokenizer in ``corpus.py``, tokens on disk and blocks in
``token_cache.py``, streams in ``streaming.py``, bitwise resuming in ``data/resumable.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from lit_tokenformer.data.resumable import EpochSampler, ResumableDataModule, ResumableLoader, no_test_split
from lit_tokenformer.data.settings import (
    HubSettings,
    LoaderSettings,
    accept_flat_names,
    check_share,
    check_whole,
    flat_settings,
)
from lit_tokenformer.data.text.corpus import TextCorpus
from lit_tokenformer.data.text.files import EncodingErrors, load_template
from lit_tokenformer.data.text.sources import SPLIT_NAMES, Split, TextSettings
from lit_tokenformer.data.text.streaming import (
    EvalStream,
    EvalStreamLoader,
    TrainStream,
    eval_stream_loader,
    train_stream_loader,
)
from lit_tokenformer.data.text.token_cache import EvalBlocks, EvalSampler, TrainBlocks
from lit_tokenformer.data.text.tokenizer import Tokenizer, check_name
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.registry import TEXT_SOURCES

SMALLER_BLOCKS = "; a smaller data.block_size gives more"
_LOADER, _HUB = LoaderSettings(batch_size=16), HubSettings()


class TextDataModule(ResumableDataModule):
    """Batches ``tokens (B, T + 1) int64`` for causal language modeling: ``tokens[:, :-1]`` predict ``tokens[:, 1:]``.

    A split is the stream ``SEP document SEP document SEP ... document SEP``, cut into blocks that overlap by one token.
    In evaluation every token but the very first is a target exactly once. The last block is padded with -100, which is
    neither input nor target; with several processes a block may be all -100. In training the incomplete last block is
    dropped, blocks are shuffled, and their boundaries shift between epochs.

    A corpus is tokenized once and cached in ``cache_dir``. Documents are assigned to splits by a hash of their text, so
    splits are stable when the corpus grows; empty documents are ignored. Every random choice is a function of the seed,
    the epoch and the block. A resumed run sees the same batches as an uninterrupted one, bit for bit. A stream resumes
    at its current document without reading the previous ones.

    Args:
        dataset: Source of the documents: python_docs (79 topics of Python's documentation, 466 kB, no files needed),
            python_stdlib (source of the standard library, 9.7 MB, no files needed), files or huggingface.
        files: File, folder or glob pattern, or a list of them (dataset: files). A .txt or .md file is one document;
            each row of a .jsonl, .json (list of objects), .csv or .parquet file is one. Compressed files (.gz, .bz2,
            .xz, .zst) are read too. With huggingface: ``data_files`` of ``load_dataset``.
        val_files: The same for validation; files also matched by ``files`` are held out. Default: documents are held
            out by their hash; a single document is cut by position. Without ``files``, the model can be evaluated only.
        text_column: Name of the text in rows. Its value is text, or a list of chat messages.
        chat_template: Jinja template of chat messages, as text or file. Default: ChatML.
        encoding: Encoding of files other than Parquet (dataset: files), such as latin-1 or utf-16.
        encoding_errors: Handling of text in another encoding: strict raises an error, replace inserts U+FFFD.
        tokenizer: bytes; bpe:N, a byte-level BPE with a vocabulary of N trained on the training documents (at most the
            first 200 MB, or 20,000 documents of a stream); a tokenizer.json, vocab.json with merges.txt, vocab.txt or
            sentencepiece .model, or its folder; else the name of a Hugging Face model.
        separator: Special token that ends a document. Default: the eos_token of the folder's tokenizer_config.json,
            else the first one in the vocabulary of <|endoftext|>, </s>, <eos>, <|end_of_text|> and [SEP].
        block_size: Context length T in tokens.
        val_fraction: Fraction of the documents held out for validation if the source has no validation split; 0 trains
            without validation. Of a single document, the last part.
        test_fraction: Fraction of the documents held out for the test; 0 uses the Hugging Face data set's test split,
            else the validation documents.
        seed: Seed of the block order, >= 0. Default: that of ``seed_everything``, else 0.
        cache_dir: Folder for tokens and trained vocabularies. Default: lit_tokenformer in $XDG_CACHE_HOME or ~/.cache.
        max_corrupt_share: Tolerated share of unreadable rows of a stream, which are reported in a warning and
            skipped. Three are always tolerated, unless the share is 0.
        loader: Batch sizes and worker processes. Each is also an argument of its own: ``batch_size=8``.
        hub: Hugging Face data set (dataset: huggingface), also as ``hf_name``, ``hf_config``, ``hf_train_split``,
            ``hf_val_split``, ``streaming`` and ``shuffle_buffer``. A stream is tokenized on the fly; it uses at most
            one worker per shard, and at most one in evaluation. Without a validation split, documents are held out by
            their hash, and validation of a stream reads all of it (limit_val_batches).

    Raises:
        ValueError: If a setting is invalid (on creation) or the text is missing (at the first use of a property or
            loader); the message is one line and begins with the setting.

    Example:
        >>> data = TextDataModule("python_docs", tokenizer="bpe:512")
        >>> data.vocab_size, data.context_length
        (512, 256)
    """

    _collate: Callable[[Any], Any] | None = None
    """Collate function of the blocks; None stacks them."""

    loader_defaults = _LOADER

    masked = False
    """Whether batches contain masked tokens."""

    _saved_vocab_size: int | None = None

    @accept_flat_names
    def __init__(
        self,
        dataset: str = "python_docs",
        files: list[str] | str | None = None,
        val_files: list[str] | str | None = None,
        text_column: str = "text",
        chat_template: str | None = None,
        encoding: str = "utf-8",
        encoding_errors: EncodingErrors = "strict",
        tokenizer: str = "bytes",
        separator: str | None = None,
        block_size: int = 256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int | None = None,
        cache_dir: str | None = None,
        max_corrupt_share: float = 0.001,
        loader: LoaderSettings = _LOADER,
        hub: HubSettings = _HUB,
    ) -> None:
        super().__init__(seed, loader=loader)
        TEXT_SOURCES[dataset]  # raises for an unknown name
        if encoding_errors not in ("strict", "replace"):
            raise unknown_name("data.encoding_errors", encoding_errors, ("strict", "replace"))
        try:
            " ".encode(encoding)
        except LookupError:
            raise UserError(f"data.encoding: expected a text encoding such as latin-1, got {encoding!r}") from None
        check_name(tokenizer)
        self.block_size = block_size
        self._needs_workers = self.streaming = hub.streaming
        self.shuffle_buffer = hub.shuffle_buffer
        settings = TextSettings(
            files=_names(files),
            val_files=_names(val_files),
            text_column=text_column,
            chat_template=load_template(chat_template),
            encoding=encoding,
            encoding_errors=encoding_errors,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            max_corrupt_share=max_corrupt_share,
            cache_dir=Path(cache_dir).expanduser() if cache_dir else _default_cache_dir(),
            **flat_settings(hub),
        )
        self.corpus = TextCorpus(dataset, settings, tokenizer, separator)
        self._eval_streams: dict[str, EvalStreamLoader] = {}

        check_whole(block_size=(block_size, 1))
        check_share(val_fraction=val_fraction, test_fraction=test_fraction)
        check_share(below_one=False, max_corrupt_share=max_corrupt_share)
        if val_fraction + test_fraction >= 1:
            raise UserError(
                f"data.val_fraction: expected less than 1 with data.test_fraction, got {val_fraction} + {test_fraction}"
            )
        if dataset in ("python_docs", "python_stdlib") and (settings.files or settings.val_files):
            raise UserError(f"data.files: expected data.dataset: files or huggingface, got {dataset}")
        if hub.streaming and dataset not in ("huggingface", "files"):
            raise UserError(f"data.streaming: expected data.dataset: files or huggingface, got {dataset}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_eval_streams": {}}

    @property
    def data_settings(self) -> dict[str, Any]:
        corpus = self.corpus
        own = {"dataset": corpus.dataset, "tokenizer": corpus.tokenizer_name, "block_size": self.block_size}
        return {**super().data_settings, **own, **asdict(corpus.settings)}

    # --- Corpus ------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer; ``bpe:N`` is trained at first use and cached in ``cache_dir``."""
        return self.corpus.tokenizer

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V, the largest id + 1; N for ``bpe:N``, without training it."""
        return self._saved_vocab_size or self.corpus.vocab_size

    def use_tokenizer(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        """Replace the tokenizer by that of a checkpoint, before it is first used, with its model's vocabulary size."""
        self.corpus.tokenizer = tokenizer
        self._saved_vocab_size = vocab_size or tokenizer.size

    @property
    def separator_id(self) -> int:
        """Id of the token that ends a document."""
        return self.tokenizer.separator_id

    @property
    def context_length(self) -> int:
        """Context length T in tokens: ``block_size``."""
        return self.block_size

    @property
    def num_train_samples(self) -> int | None:
        """Number of training blocks per epoch over all processes; None for a stream."""
        return None if self.streaming else len(self._train_blocks)

    def bytes_per_token(self, stage: str) -> float:
        """Compute the UTF-8 bytes per target of val or test; ``loss / ln 2 / bytes_per_token`` is bits per byte.

        Returns:
            Bytes of all documents divided by the number of targets; for a stream, of the documents read so far.
        """
        if stage not in ("val", "test"):
            raise unknown_name("stage", stage, ("val", "test"))
        if not self.streaming:
            count = self.corpus.tokens.counts[self.corpus.split_of(stage)]
            return count.bytes / count.targets
        loader = self._eval_streams.get(stage)
        if loader is not None and loader.tokens_read:
            return loader.bytes_read / loader.tokens_read
        texts = self.corpus.head(self.corpus.split_of(stage))  # the stream has not been read yet
        num_tokens = sum(map(len, self.tokenizer.encode_batch(texts))) + len(texts)
        return sum(len(text.encode()) for text in texts) / num_tokens

    def corpus_summary(self) -> str:
        """Summarize the corpus in one line: documents, bytes, tokens and a hash of the texts."""
        corpus = self.corpus
        if self.streaming:
            return f"{corpus.settings.hf_name or corpus.dataset}: streaming"
        total = corpus.tokens.total
        note = f", {corpus.splits.note}" if corpus.splits.note else ""
        return (
            f"{corpus.dataset}: {total.documents} documents, {total.bytes} bytes, {total.tokens} tokens, "
            f"sha256 {corpus.tokens.sha256[:12]}{note}"
        )

    # --- Lightning ---------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Train the vocabulary and tokenize the corpus, unless cached."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            self._check_val(self.trainer.state.fn)
        self.tokenizer  # noqa: B018
        if not self.streaming:
            self.corpus.tokens  # noqa: B018

    def setup(self, stage: str) -> None:
        """Open the tokens, so that missing data fail fast."""
        self.tokenizer  # noqa: B018
        self._check_val(stage)
        if self.streaming:
            self.corpus.check_stream()
            return
        if self.corpus.has_val:
            self._check_length("val")
        if self.corpus.split_of("test") == "test":
            self._check_length("test")
        if stage == "fit":
            self._check_length("train", replicas=self._place[1])
            rank_zero_info(self.corpus_summary())

    def train_dataloader(self) -> DataLoader:
        """Create the resumable training loader of this process."""
        rank, replicas = self._place
        if self.streaming:
            numbers = self.block_size, self.shuffle_buffer, self._seed, rank
            stream = TrainStream(self.corpus.stream("train"), self.tokenizer, *numbers)
            loader = {"batch_size": self.batch_size, "num_workers": self._workers, "pin_memory": self.pin_memory}
            return self._resumed(train_stream_loader(stream, replicas, **loader))
        self._check_length("train", replicas)
        blocks = self._train_blocks
        sampler = EpochSampler(blocks, self._seed, num_replicas=replicas, rank=rank)
        settings = {"sampler": sampler, "collate_fn": self._collate, "drop_last": True}
        return self._resumed(self._create_loader(ResumableLoader, blocks, **settings))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Create the validation loader, in order; an empty list, which Lightning skips, without validation data."""
        return self._eval_loader("val") if self.corpus.has_val else []

    def test_dataloader(self) -> DataLoader:
        """Create the test loader, in order; raise a ``UserError`` without a test split."""
        if self.corpus.split_of("test") != "test":
            raise no_test_split()
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Raise a ``ValueError``: text is generated by ``generate`` and scored by ``validate``."""
        raise UserError("predict: not supported for text; use `lit-tokenformer generate`, or `validate` for scores")

    # --- Loaders -----------------------------------------------------------------------------------------------------

    @cached_property
    def _train_blocks(self) -> TrainBlocks:
        return TrainBlocks(self.corpus.tokens.files["train"], self.block_size, self._seed)

    def _eval_blocks(self, split: Split) -> Dataset:
        return EvalBlocks(self.corpus.tokens.files[split], self.block_size)

    def _check_val(self, stage: str) -> None:
        """Reject whatever needs a validation split, if there is none."""
        if self.corpus.has_val:
            return
        if stage == "validate":
            raise UserError("data.val_fraction: 0 leaves no validation data; use a fraction, or data.val_files")
        trainer: Any = self.trainer
        if trainer is None or stage != "fit":
            return
        if trainer.datamodule is not self:
            raise UserError("data.val_fraction: expected above 0 with several tasks, got 0")
        for part in (*trainer.callbacks, getattr(trainer.lightning_module, "lr_scheduler_config", None)):
            if (getattr(part, "monitor", None) or "").startswith("val/"):
                raise UserError(
                    f"data.val_fraction: 0 leaves no validation data for {type(part).__name__} "
                    f"(monitor={part.monitor!r}); monitor train/loss, or set a fraction"
                )

    def _check_length(self, split: Split, replicas: int = 1) -> None:
        name = SPLIT_NAMES[split]
        tokens, least = len(self.corpus.tokens.files[split]), self.block_size + 1
        if tokens == 0:
            raise UserError(f"data.files: no {name} documents")
        if split == "train":  # an epoch's grid of blocks is shifted by up to T - 1 tokens
            blocks = len(self._train_blocks) // replicas
            if blocks:
                self._check_batch_size(blocks, "blocks", SMALLER_BLOCKS)
            least = 2 * self.block_size * replicas
        if tokens < least:
            raise UserError(
                f"data.block_size: too few tokens in the {name} split for blocks of {self.block_size} "
                f"(got {tokens}, expected at least {least})"
            )

    def _eval_loader(self, stage: str) -> DataLoader:
        split, (rank, replicas) = self.corpus.split_of(stage), self._place
        settings: dict[str, Any] = {"batch_size": self.eval_batch_size}
        if self.streaming:
            stream = EvalStream(self.corpus.stream(split), self.tokenizer, self.block_size, rank, replicas)
            settings |= {"num_workers": min(1, self._workers), "pin_memory": self.pin_memory}
            self._eval_streams[stage] = loader = eval_stream_loader(stream, **settings)
            return loader
        self._check_length(split)
        blocks = self._eval_blocks(split)
        sampler = EvalSampler(blocks, num_replicas=replicas, rank=rank)
        return self._create_loader(DataLoader, blocks, sampler=sampler, collate_fn=self._collate, **settings)


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit_tokenformer"


def _names(names: Sequence[str] | str | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
