"""Megabytes per second from text to tokens on disk, against ``datasets.Dataset.map`` on all cores.

    python -m benchmarks.speed.tokenization [--copies 4] [--tokenizers bytes bpe:4096]

The text is the source of Python's standard library. Ours is the token cache of ``TextDataModule``; theirs is the same
tokenizer in ``Dataset.map(num_proc=...)``, whose result is an Arrow file of lists that still has to be made one stream.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import datasets

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, ratio, take_turns
from lit_tokenformer.data import TextDataModule, Tokenizer
from lit_tokenformer.data.text.token_cache import open_or_build


def measure(args: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Tokenize in turn, each time into a new folder."""
    datasets.disable_progress_bars()
    lines, numbers = [], count()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.tokenizers:
            corpus = TextDataModule("python_stdlib", tokenizer=name, cache_dir=folder).corpus
            texts = list(corpus.splits.train) * args.copies
            size = sum(len(text.encode()) for text in texts) / 1e6
            rows = datasets.Dataset.from_dict({"text": texts})
            work = {
                "ours": partial(ours, folder, numbers, texts, corpus.tokenizer),
                "theirs": partial(theirs, folder, numbers, rows, corpus.tokenizer),
            }
            taken = take_turns(work, args.rounds, warmup=1)
            fast, slow = ([size / passed for passed in taken[who]] for who in ("ours", "theirs"))
            speed = (median(fast), median(slow), "MB/s", ratio(fast, slow))
            lines.append(Line(f"{name}, {size:.1f} MB", "Dataset.map", *speed, ">= 1.0"))
    return lines, []


def ours(folder: str, numbers: Any, texts: list[str], tokenizer: Tokenizer) -> None:
    """Build a token cache."""
    open_or_build(Path(folder), str(next(numbers)), lambda: (("train", text) for text in texts), tokenizer, None)


def theirs(folder: str, numbers: Any, rows: datasets.Dataset, tokenizer: Tokenizer) -> None:
    """Write a tokenized data set."""
    rows.map(
        lambda batch: {"ids": tokenizer.encode_batch(batch["text"])},
        batched=True,
        batch_size=100,
        num_proc=len(os.sched_getaffinity(0)),
        remove_columns="text",
        cache_file_name=f"{folder}/{next(numbers)}.arrow",
        load_from_cache_file=False,
    )


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--tokenizers", nargs="+", default=["bytes", "bpe:4096"])
    main("tokenization", parser, measure)
