"""LightningDataModule for masked language modeling; examples and masks are in ``masking.py``."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np

from lit_tokenformer.data.resumable import ResumableDataModule
from lit_tokenformer.data.settings import LoaderSettings, accept_flat_names, check_whole
from lit_tokenformer.data.text.datamodule import SMALLER_BLOCKS, TextDataModule
from lit_tokenformer.data.text.masking import BlockSpans, MaskedBatch, MaskedExamples, MaskIds, SentenceSpans
from lit_tokenformer.data.text.sources import SPLIT_NAMES, Split
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
        loader: Batch sizes and worker processes.
        settings: All other settings of ``TextDataModule``. A mask token is appended to a vocabulary without [MASK] or
            <mask>; a stream is not supported.

    Raises:
        ValueError: If a setting is invalid (on creation) or the text is missing (at the first use of a property or
            loader); the message is one line and begins with the setting.

    Example:
        >>> data = MaskedTextDataModule("python_docs", tokenizer="bytes")
        >>> data.vocab_size, data.context_length, data.mask_id
        (320, 128, 257)
    """

    masked = True
    loader_defaults = ResumableDataModule.loader_defaults

    @accept_flat_names
    def __init__(
        self,
        dataset: str = "python_docs",
        pad_vocab_to: int = 64,
        examples: Literal["blocks", "sentences"] = "blocks",
        block_size: int = 128,
        pad_to: Literal["block", "longest"] = "block",
        mask_fraction: float = 0.15,
        eval_mask_fraction: float = 0.15,
        masking: Literal["dynamic", "static"] = "dynamic",
        whole_words: bool = False,
        loader: LoaderSettings = ResumableDataModule.loader_defaults,
        **settings: Any,
    ) -> None:
        if settings.get("streaming") or getattr(settings.get("hub"), "streaming", False):
            raise UserError("data.streaming: expected false for masked text, which is read from stored tokens")
        super().__init__(dataset=dataset, block_size=block_size, loader=loader, **settings)
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
        check_whole(pad_vocab_to=(pad_vocab_to, 1))
        self.pad_vocab_to = pad_vocab_to
        self.examples = examples
        self.pad_to = pad_to
        self.mask_fraction = mask_fraction
        self.eval_mask_fraction = eval_mask_fraction
        self.masking = masking
        self.whole_words = whole_words
        self._spans: dict[Split, SentenceSpans] = {}

    # --- Corpus ------------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        """Tokenizer with a mask token; ``bpe:N`` is trained at first use and cached in ``cache_dir``."""
        return self.corpus.tokenizer.with_mask()

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return self._ids.mask

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, for ``bpe:N`` N + 1 without training it, rounded up to a multiple of ``pad_vocab_to``."""
        if self._saved_vocab_size is not None:
            return self._saved_vocab_size
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
        if self.block_size <= self._ids.wraps:
            raise UserError(
                f"data.block_size: expected {self._ids.wraps + 1} or more for sentences with special tokens, "
                f"got {self.block_size}"
            )
        count = len(self._masked(split))
        if count == 0:
            raise UserError(f"data.files: no {SPLIT_NAMES[split]} documents")
        if split == "train":
            self._check_batch_size(count // replicas, "examples", SMALLER_BLOCKS)
