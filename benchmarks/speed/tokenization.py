"""Megabytes per second from text to tokens on disk, against the library alone and ``datasets.Dataset.map``.

    python -m benchmarks.speed.tokenization [--copies 4] [--tokenizers bytes bpe:4096]

The text is the source of Python's standard library. Ours is the token cache of ``TextDataModule``; theirs is the same
tokenizer in ``Dataset.map(num_proc=...)``, whose result is an Arrow file of lists that still has to be made one stream.
``library`` is the token cache with ``encode_batch`` of the ``tokenizers`` library on all cores, instead of the table of
words; the tokens are compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, ratio, take_turns
from lit_tokenformer.data import TextDataModule, Tokenizer
from lit_tokenformer.data.text.token_cache import TokenCache, open_or_build


def measure(args: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Tokenize in turn, each time into a new folder."""
    datasets.disable_progress_bars()
    lines, numbers = [], count()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.tokenizers:
            corpus = TextDataModule("python_stdlib", tokenizer=name, cache_dir=folder).corpus
            texts = list(islice(corpus.splits.train, args.documents)) * args.copies
            size = sum(len(text.encode()) for text in texts) / 1e6
            rows = datasets.Dataset.from_dict({"text": texts})
            library = Tokenizer.from_json(corpus.tokenizer.to_json(), corpus.tokenizer.separator)
            vars(library)["_words"] = None  # no table
            work: dict[str, partial[Any]] = {"ours": partial(ours, folder, numbers, texts, corpus.tokenizer)}
            if corpus.tokenizer._words is not None:
                work["library"] = partial(ours, folder, numbers, texts, library)
                assert len({cache.counts["train"].checksum for cache in (work["ours"](), work["library"]())}) == 1
            if not args.library_only:
                work["Dataset.map"] = partial(theirs, folder, numbers, rows, corpus.tokenizer)
            taken = take_turns(work, args.rounds, warmup=1)
            speeds = {who: [size / passed for passed in taken[who]] for who in work}
            for who in work:
                if who != "ours":
                    speed = median(speeds["ours"]), median(speeds[who]), "MB/s", ratio(speeds["ours"], speeds[who])
                    goal = ">= 4.0" if who == "library" else ">= 1.0"
                    lines.append(Line(f"{name}, {size:.1f} MB", who, *speed, goal))
    return lines, []


def ours(folder: str, numbers: Any, texts: list[str], tokenizer: Tokenizer) -> TokenCache:
    """Build a token cache."""
    if tokenizer._words is not None:
        vars(tokenizer).pop("_words")  # each round begins with an empty table
    return open_or_build(Path(folder), str(next(numbers)), lambda: (("train", text) for text in texts), tokenizer, None)


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
    parser.add_argument("--documents", type=int, help="only the first ones")
    parser.add_argument("--tokenizers", nargs="+", default=["bytes", "bpe:4096"])
    parser.add_argument("--library-only", action="store_true", help="without Dataset.map")
    main("tokenization", parser, measure)
