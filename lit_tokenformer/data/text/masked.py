"""LightningDataModule for masked language modeling; examples and masks are in ``masking.py``."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np

from lit_tokenformer.data.text.datamodule import TextDataModule
from lit_tokenformer.data.text.files import EncodingErrors
from lit_tokenformer.data.text.masking import BlockSpans, MaskedBatch, MaskedExamples, MaskIds, SentenceSpans
from lit_tokenformer.data.text.sources import Split
from lit_tokenformer.data.text.tokenizer import Tokenizer, bpe_size
from lit_tokenformer.errors import UserError, unknown_name


class MaskedTextDataModule(TextDataModule):
    """Batches ``(tokens (B, T), labels (B, T), lengths (B,))``, all int64, for masked language modeling.

    ``labels`` are the original ids of the tokens to predict and -100 elsewhere. A token to predict is replaced by the
    mask, replaced by a random token, or kept. The first ``lengths`` tokens of a row are real, the rest is padding
    ([PAD], else the separator). Special tokens and padding are never masked.

    ``blocks`` have T tokens of the stream ``SEP document SEP document SEP ... document SEP``. In evaluation the last
    block ends at the end of the stream; its overlap with the previous one is not predicted twice.

    ``sentences`` end after a token with a line break, and after one that ends in ``.``, ``!`` or ``?`` before white
    space. Consecutive sentences of one document are packed into an example of up to T tokens, and a longer sentence is
    cut. An example is wrapped in [CLS] (or <s>) and [SEP] if the vocabulary has them, else it ends with the separator.

    In evaluation an example's mask is a function of the seed and its index only, independent of batch size, workers and
    processes; losses under different mask fractions are not comparable. In training each example occurs at most once
    per epoch; an incomplete global batch is dropped, with different examples in each epoch. Splits, cache and resuming
    are those of ``TextDataModule``.

    Args:
        dataset: Source of the documents: python_docs, python_stdlib, files or huggingface.
        files: File, folder or glob pattern, or a list of them (dataset: files; formats as in ``TextDataModule``);
            ``data_files`` of ``load_dataset`` for huggingface.
        val_files: The same for validation. Default: documents are held out by their hash.
        text_column: Name of the text in rows. Its value is text, or a list of chat messages.
        chat_template: Jinja template of chat messages, as text or file. Default: ChatML.
        encoding: Encoding of files other than Parquet (dataset: files), such as latin-1 or utf-16.
        encoding_errors: Handling of text in another encoding: strict raises an error, replace inserts U+FFFD.
        tokenizer: bytes; bpe:N, trained on the training documents; a tokenizer.json or its folder; else the name of a
            Hugging Face model. A mask token is appended to a vocabulary without [MASK] or <mask>.
        separator: Special token that ends a document. Default: the first of the usual ones in the vocabulary.
        pad_vocab_to: Round the vocabulary size up to a multiple of this; the additional ids are unused.
        examples: blocks (of block_size tokens) or sentences (of variable length).
        block_size: Maximum length T of an example in tokens, including [CLS] and [SEP].
        pad_to: Width of a batch of sentences: block (always T, a static shape for torch.compile) or longest (the
            longest example of the batch).
        mask_fraction: Fraction of tokens masked in training, above 0; 0.3 in MosaicBERT.
        eval_mask_fraction: Fraction of tokens masked in validation and test, above 0.
        masking: dynamic samples new masks in each epoch; static keeps the masks (and the boundaries of blocks) fixed.
        whole_words: Whole word masking. A word begins with a token that starts with white space or punctuation, and
            after one that ends in it; with ``##`` vocabularies, with every token without ``##``. Each token of a word
            is replaced independently. Block edges cut words.
        batch_size: Training batch size per process.
        eval_batch_size: Batch size of validation and test per process. Default: ``batch_size``.
        num_workers: Number of worker processes per training process. Default: 0, since tokens are read from a memory
            map.
        pin_memory: Whether to copy batches into page-locked memory. Default: true with CUDA.
        val_fraction: Fraction of the documents held out for validation if the source has no validation split; 0 trains
            without validation. Of a single document, the last part.
        test_fraction: Fraction of the documents held out for the test; 0 uses the Hugging Face data set's test split,
            else the validation documents.
        seed: Seed of sample order and masks, >= 0. Default: that of ``seed_everything``, else 0.
        cache_dir: Folder for tokens and trained vocabularies. Default: lit_tokenformer in $XDG_CACHE_HOME or ~/.cache.
        hf_name: Hugging Face data set, or a builder such as text, json and parquet (dataset: huggingface).
        hf_config: Configuration of the Hugging Face data set.
        hf_train_split: Training split.
        hf_val_split: Validation split. Default: validation, valid, val or dev, if present, else documents are held out
            by their hash.
        streaming: Not supported for masked text.

    Raises:
        ValueError: If a setting is invalid (on creation) or the text is missing (at the first use of a property or
            loader); the message is one line and begins with the setting.

    Example:
        >>> data = MaskedTextDataModule("python_docs", tokenizer="bytes")
        >>> data.vocab_size, data.context_length, data.mask_id
        (320, 128, 257)
    """

    masked = True

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
        pad_vocab_to: int = 64,
        examples: Literal["blocks", "sentences"] = "blocks",
        block_size: int = 128,
        pad_to: Literal["block", "longest"] = "block",
        mask_fraction: float = 0.15,
        eval_mask_fraction: float = 0.15,
        masking: Literal["dynamic", "static"] = "dynamic",
        whole_words: bool = False,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int | None = None,
        cache_dir: str | None = None,
        hf_name: str | None = None,
        hf_config: str | None = None,
        hf_train_split: str = "train",
        hf_val_split: str | None = None,
        streaming: bool = False,
    ) -> None:
        if streaming:
            raise UserError("data.streaming: expected false for masked text, which is read from stored tokens")
        super().__init__(
            dataset=dataset,
            files=files,
            val_files=val_files,
            text_column=text_column,
            chat_template=chat_template,
            encoding=encoding,
            encoding_errors=encoding_errors,
            tokenizer=tokenizer,
            separator=separator,
            block_size=block_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            cache_dir=cache_dir,
            hf_name=hf_name,
            hf_config=hf_config,
            hf_train_split=hf_train_split,
            hf_val_split=hf_val_split,
        )
        for name, value, choices in (
            ("examples", examples, ("blocks", "sentences")),
            ("pad_to", pad_to, ("block", "longest")),
            ("masking", masking, ("dynamic", "static")),
        ):
            if value not in choices:
                raise unknown_name(f"data.{name}", value, choices)
        for name, share in (("mask_fraction", mask_fraction), ("eval_mask_fraction", eval_mask_fraction)):
            if not 0 < share <= 1:
                raise UserError(f"data.{name}: expected a share above 0 and at most 1, got {share}")
        if pad_vocab_to < 1:
            raise UserError(f"data.pad_vocab_to: expected a whole number of 1 or more, got {pad_vocab_to}")
        self.pad_vocab_to = pad_vocab_to
        self.examples = examples
        self.pad_to = pad_to
        self.mask_fraction = mask_fraction
        self.eval_mask_fraction = eval_mask_fraction
        self.masking = masking
        self.whole_words = whole_words
        self._spans: dict[Split, SentenceSpans] = {}

    # --- Corpus ------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer with a mask token; ``bpe:N`` is trained at first use and cached in ``cache_dir``."""
        return self._masked_tokenizer

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return self._ids.mask

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V, rounded up to a multiple of ``pad_vocab_to``.

        It is the largest id + 1; for ``bpe:N`` it is N + 1, without training it.
        """
        name = self.corpus.tokenizer_name
        own = name == "bytes" or bpe_size(name) is not None
        size = self.corpus.vocab_size + 1 if own else self.tokenizer.size
        return -(-size // self.pad_vocab_to) * self.pad_vocab_to

    def corpus_summary(self) -> str:
        """Summarize the corpus in one line, with the number of training examples and the share of padding."""
        summary = super().corpus_summary()
        lengths = self._train_blocks.lengths
        if len(lengths) == 0:
            return summary
        widths: Any = self.block_size
        if self.pad_to == "longest":  # of an epoch's batches, in some order
            batches = np.random.default_rng(0).permutation(lengths)[: len(lengths) // self.batch_size * self.batch_size]
            widths = batches.reshape(-1, self.batch_size).max(axis=1) if len(batches) else lengths.max()
        padding = max(0.0, 1 - lengths.mean() / np.mean(widths))
        return (
            f"{summary}; {len(lengths)} training examples of {lengths.mean():.1f} tokens, "
            f"{padding:.1%} of a batch is padding"
        )

    def predict_dataloader(self) -> Any:
        """Raise a ``ValueError``: masked text is scored by ``validate``."""
        raise UserError("predict: not supported for masked text; use `validate` for scores")

    # --- Loaders -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _collate(batch: MaskedBatch) -> MaskedBatch:  # type: ignore[override]
        return batch  # collated by MaskedExamples

    @cached_property
    def _masked_tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer.with_mask()

    @cached_property
    def _ids(self) -> MaskIds:
        return MaskIds(self.tokenizer)

    @cached_property
    def _train_blocks(self) -> MaskedExamples:  # type: ignore[override]
        return self._masked("train")

    def _eval_blocks(self, split: Split) -> MaskedExamples:
        return self._masked(split, training=False)

    def _masked(self, split: Split, training: bool = True) -> MaskedExamples:
        tokens, dynamic = self.corpus.tokens.files[split], training and self.masking == "dynamic"
        spans: BlockSpans | SentenceSpans
        if self.examples == "blocks":
            spans = BlockSpans(tokens, self.block_size, self._seed, training, shifted=dynamic)
        else:
            if split not in self._spans:
                self._spans[split] = SentenceSpans(tokens, self.tokenizer, self.block_size - self._ids.wraps)
            spans = self._spans[split]
        return MaskedExamples(
            tokens,
            spans,
            self._ids,
            self.mask_fraction if training else self.eval_mask_fraction,
            whole_words=self.whole_words,
            wrapped=self.examples == "sentences",
            width=self.block_size if self.pad_to == "block" or self.examples == "blocks" else None,
            seed=self._seed,
            dynamic=dynamic,
        )

    def _check_length(self, split: Split, replicas: int = 1) -> None:
        if self.examples == "blocks":
            return super()._check_length(split, replicas)
        name = {"train": "training", "val": "validation", "test": "test"}[split]
        if self.block_size <= self._ids.wraps:
            raise UserError(
                f"data.block_size: expected {self._ids.wraps + 1} or more for sentences with special tokens, "
                f"got {self.block_size}"
            )
        examples = self._masked(split)
        if len(examples) == 0:
            raise UserError(f"data.files: no {name} documents")
        if split == "train" and len(examples) // replicas < self.batch_size:
            raise UserError(
                f"data.batch_size: expected at most {len(examples) // replicas} (the training examples of a process), "
                f"got {self.batch_size}; a smaller data.block_size gives more"
            )
