"""Text for masked language models: some tokens of an example are hidden, and predicted from all the others.

How examples are cut and tokens are hidden is in ``masking.py``.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np

from lit_tokenformer.data.text.datamodule import TextDataModule
from lit_tokenformer.data.text.masking import BlockSpans, MaskedBatch, MaskedExamples, MaskIds, SentenceSpans
from lit_tokenformer.data.text.sources import EncodingErrors, Split
from lit_tokenformer.data.text.tokenizer import Tokenizer, bpe_size
from lit_tokenformer.errors import UserError, unknown_name


class MaskedTextDataModule(TextDataModule):
    """Batches ``(tokens (B, T), labels (B, T), lengths (B,))``, all int64, for masked language modelling.

    ``labels`` are -100 but where a token is to be predicted; there they hold its id, and ``tokens`` the mask's, another
    or the same. The first ``lengths`` tokens of a row are real, the rest is padding ([PAD], else the separator).
    Special tokens and padding are never hidden.

    ``blocks`` are T tokens each of the stream ``SEP document SEP document SEP ... document SEP``. In evaluation the
    last one ends where the stream ends; what it shares with the one before is not predicted twice.

    ``sentences`` end after a token with a line break, and after one that ends in ``.``, ``!`` or ``?`` where white
    space comes next. As many in a row as fit are one example of up to T tokens, all of one document, between [CLS] (or
    <s>) and [SEP] where the vocabulary has them, else with the separator at its end; a longer sentence is cut.

    In evaluation an example's mask follows from the seed and its number alone, whatever the batch size, the workers and
    the processes; losses under different fractions cannot be compared. In training each example comes at most once in
    an epoch; what fills no batch of all processes is left out, other examples in each epoch. Splits, cache and resuming
    are those of ``TextDataModule``.

    Args:
        dataset: Where the documents come from: python_docs, python_stdlib, files or huggingface.
        files: Files, folders or patterns of .txt, .md, .jsonl and .parquet (dataset: files); with huggingface the
            ``data_files`` of ``load_dataset``.
        val_files: The same for validation. None: documents are held out by their hash.
        text_column: Name of the text in .jsonl, .parquet and Hugging Face data sets.
        encoding_errors: What happens with text that is not UTF-8: strict stops, replace puts U+FFFD in its place.
        tokenizer: bytes; bpe:N, trained on the training documents; a tokenizer.json or its folder; else the name of a
            Hugging Face model. One without [MASK] or <mask> gets an id for it after its last one.
        separator: Special token that ends a document. None: the first of the usual ones that the vocabulary knows.
        pad_vocab_to: The vocabulary's size is rounded up to a multiple of this; the ids above are never seen.
        examples: blocks (each of block_size tokens) or sentences (of different lengths).
        block_size: Tokens T of an example, at most, with [CLS] and [SEP].
        pad_to: Width of a batch of sentences: block (always T: one shape, so nothing is compiled twice) or longest
            (the batch's longest example).
        mask_fraction: Share of the tokens that is hidden in training, above 0; 0.3 in MosaicBERT.
        eval_mask_fraction: The same in validation and test.
        masking: dynamic draws the hidden tokens anew in each epoch; static hides the same ones of the same examples
            (blocks then have the same boundaries in each epoch).
        whole_words: Whether all tokens of a word are hidden together. A word begins with a token whose text begins with
            white space or punctuation, and after one that ends so; in vocabularies with ``##`` with every token without
            it. Each is still replaced for itself. The block's edges cut words.
        batch_size: Training examples in a batch, per process.
        eval_batch_size: Examples in a batch of validation and test, per process. None: as in training.
        num_workers: Loading processes for each training process. None: 0, since tokens are read from a memory map.
        pin_memory: Whether batches are put into page-locked memory. None: where there is CUDA.
        val_fraction: Share of the documents that is held out for validation where there is no split for it.
        test_fraction: Share of the documents that is held out for the test; 0 takes the Hugging Face data set's test
            split, else the validation documents.
        seed: Seed of order and masks, 0 or more. None: that of ``seed_everything``, else 0.
        cache_dir: Folder for tokens and trained vocabularies. None: lit_tokenformer in $XDG_CACHE_HOME or ~/.cache.
        hf_name: Hugging Face data set, or one of its readers such as text, json and parquet (dataset: huggingface).
        hf_config: Its configuration, where it has several.
        hf_train_split: Its split to train on.
        hf_val_split: Its split to validate on. None: validation, valid, val or dev, if there is one, else documents are
            held out by their hash.
        streaming: Not for masked text; the data set is stored.

    Raises:
        ValueError: If a setting is wrong (when created) or the text is not there (at the first use of a property or
            loader); the message is one line and names the setting.

    Example:
        >>> data = MaskedTextDataModule("python_docs", tokenizer="bytes")
        >>> data.vocab_size, data.context_length, data.mask_id
        (320, 128, 257)
    """

    masked = True

    def __init__(
        self,
        dataset: str = "python_docs",
        files: list[str] | None = None,
        val_files: list[str] | None = None,
        text_column: str = "text",
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

    # --- What is known of the text -----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with a mask token; ``bpe:N`` is trained at first use and kept in ``cache_dir``."""
        return self._masked_tokenizer

    @property
    def mask_id(self) -> int:
        """Id of the token that hides another."""
        return self._ids.mask

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary V that a model needs: the largest id + 1, rounded up to a multiple of
        ``pad_vocab_to``; N + 1, rounded up, for ``bpe:N``, which needs no training to tell."""
        name = self.corpus.tokenizer_name
        own = name == "bytes" or bpe_size(name) is not None
        size = self.corpus.vocab_size + 1 if own else self.tokenizer.size
        return -(-size // self.pad_vocab_to) * self.pad_vocab_to

    def corpus_summary(self) -> str:
        """One line that says what was read, the number of training examples, and how much of a batch is padding."""
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
        """Refused with a ``ValueError``: masked text is scored by ``validate``."""
        raise UserError("predict: masked text is scored by `validate`")

    # --- Loaders -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _collate(batch: MaskedBatch) -> MaskedBatch:  # type: ignore[override]
        return batch  # made whole by MaskedExamples

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
                f"data.block_size: expected {self._ids.wraps + 1} or more for sentences with the tokens around them, "
                f"got {self.block_size}"
            )
        examples = self._masked(split)
        if len(examples) == 0:
            raise UserError(f"data.files: there are no {name} documents")
        if split == "train" and len(examples) // replicas < self.batch_size:
            raise UserError(
                f"data.batch_size: expected at most {len(examples) // replicas} (the training examples of a process), "
                f"got {self.batch_size}; a smaller data.block_size gives more"
            )
