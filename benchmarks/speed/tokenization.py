"""Speed of tokenization, and of the second start, which reads the cache.

python -m benchmarks.speed.tokenization [--dataset python_stdlib] [--tokenizer bpe:4096]
"""

from __future__ import annotations

import argparse
import tempfile
import time

from lit_tokenformer.data import TextDataModule


def main(dataset: str, tokenizer: str) -> None:
    """Print seconds and megabytes per second."""
    with tempfile.TemporaryDirectory() as cache:

        def module() -> TextDataModule:
            return TextDataModule(dataset, tokenizer=tokenizer, cache_dir=cache)

        start = time.perf_counter()
        data = module()
        data.tokenizer  # noqa: B018  (trained at first use)
        trained = time.perf_counter()
        data.prepare_data()
        tokenized = time.perf_counter()
        again = module()
        again.prepare_data()
        again.setup("fit")
        read = time.perf_counter()
        size, seconds = again.corpus.tokens.total.bytes / 1e6, tokenized - trained
        print(
            f"{again.corpus_summary()}; {tokenizer}: vocabulary {trained - start:.1f} s, tokenized {size:.2f} MB in "
            f"{seconds:.1f} s, {size / seconds:.2f} MB/s; second start {read - tokenized:.2f} s"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="python_stdlib")
    parser.add_argument("--tokenizer", default="bpe:4096")
    main(**vars(parser.parse_args()))
