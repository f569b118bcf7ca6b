"""Tokens on disk: a corpus is tokenised once and read from memory maps ever after; and the blocks a model trains on.

A split is the stream ``SEP document SEP document SEP ... document SEP``: every token of a document and every separator
has something it is predicted from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from tqdm.auto import tqdm

from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.data.text.sources import Split
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.errors import UserError

FORMAT = 2
"""Version of the files. Others are not read."""

PADDING = -100
"""In the place of tokens that are not there."""

SPLITS: tuple[Split, ...] = ("train", "val", "test")

_FULL_CHECKSUM = 1 << 26  # bytes of a file up to which all of it is checked: 64 MB take 50 ms
_SAMPLES, _SAMPLE = 64, 1 << 20  # of a larger one: so many pieces of so many bytes


class TokenFile:
    """Token ids in a file, read through a memory map; worker processes share its pages.

    Args:
        path: The file.
        dtype: uint16 or uint32.
        length: Tokens in it.
    """

    def __init__(self, path: Path, dtype: str, length: int) -> None:
        self.path = path
        self.dtype = dtype
        self.length = length
        self._map: np.ndarray | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a pickled map is a copy of all tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from ``start`` to before ``stop``, (n,) int64; fewer where the file ends."""
        return self._tokens[start:stop].astype(np.int64)

    def take(self, places: np.ndarray) -> np.ndarray:
        """The tokens at some places, int64 in the shape of ``places``."""
        return self._tokens[places].astype(np.int64)

    @property
    def _tokens(self) -> np.ndarray:
        if self._map is None:
            self._map = np.asarray(np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.length,)))
        return self._map


@dataclass
class SplitCount:
    """What a split holds."""

    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the documents' text."""
    tokens: int = 0
    """Tokens of the stream, with all separators."""
    checksum: str = ""

    @property
    def targets(self) -> int:
        """Tokens that are predicted: all but the first separator."""
        return max(0, self.tokens - 1)


@dataclass
class TokenCache:
    """The tokenised splits of a corpus."""

    folder: Path
    dtype: str
    counts: dict[Split, SplitCount]
    sha256: str
    """Hash of the documents' texts, in order."""
    files: dict[Split, TokenFile] = field(init=False)

    def __post_init__(self) -> None:
        self.files = {
            split: TokenFile(self.folder / f"{split}.bin", self.dtype, count.tokens)
            for split, count in self.counts.items()
        }

    @property
    def total(self) -> SplitCount:
        """Documents, bytes and tokens of all splits."""
        counts = self.counts.values()
        return SplitCount(*(sum(getattr(count, name) for count in counts) for name in ("documents", "bytes", "tokens")))


def open_cache(folder: Path) -> TokenCache | None:
    """The cache in a folder, or None if there is none or anything is wrong with it.

    Args:
        folder: The folder of one corpus.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        counts = {split: SplitCount(**meta["splits"][split]) for split in SPLITS}
        cache = TokenCache(folder, meta["dtype"], counts, meta["sha256"])
        width = np.dtype(meta["dtype"]).itemsize
        for split, count in counts.items():
            path = cache.files[split].path
            if path.stat().st_size != count.tokens * width or _checksum(path) != count.checksum:
                return None
        return cache if meta["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_or_build(
    cache_dir: Path,
    key: str,
    documents: Callable[[], Iterable[tuple[Split, str]]],
    tokenizer: Tokenizer,
    size: int | None,
) -> TokenCache:
    """The cache of a corpus; made where there is none or where it is broken. Of several processes one makes it.

    Args:
        cache_dir: The setting ``data.cache_dir``.
        key: A hash of all that determines the tokens.
        documents: Gives the documents, each with its split.
        tokenizer: What makes them tokens.
        size: About how many bytes the documents have, for the progress bar.

    Raises:
        ValueError: If the disk is full or the folder cannot be written.
    """
    folder = cache_dir / "tokens" / key
    if (cache := open_cache(folder)) is not None:
        return cache
    with locked(cache_dir, folder):
        if (cache := open_cache(folder)) is not None:  # made by the process that held the lock
            return cache
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _build(cache_dir, folder, documents(), tokenizer, size)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        cache = open_cache(folder)
    if cache is None:
        raise UserError(f"data.cache_dir: what was written to {folder} cannot be read back")
    total = cache.total
    rank_zero_info(f"Tokenised {total.documents} documents: {total.bytes} bytes, {total.tokens} tokens, in {folder}")
    return cache


@contextmanager
def locked(cache_dir: Path, target: Path) -> Iterator[None]:
    """Keeps other processes from making the same thing meanwhile.

    Args:
        cache_dir: The setting ``data.cache_dir``.
        target: What is made.

    Raises:
        ValueError: If the folder cannot be written.
    """
    with disk_errors(cache_dir):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            rank_zero_warn(f"Another process makes {target}: waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors(cache_dir: Path) -> Iterator[None]:
    """Says in one line what is wrong with the disk under ``cache_dir``."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "no space left" if full else f"cannot write ({error.strerror or error})"
        raise UserError(f"data.cache_dir: {problem} in {cache_dir}; name a folder on another disk") from error


def _build(
    cache_dir: Path, folder: Path, documents: Iterable[tuple[Split, str]], tokenizer: Tokenizer, size: int | None
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)
    separator = np.array([tokenizer.separator_id], dtype=np.uint32)
    counts = {split: SplitCount() for split in SPLITS}
    on_their_way: deque[Split] = deque()  # the splits of the documents that are being tokenised
    digest = hashlib.sha256()
    rank_zero = getattr(rank_zero_only, "rank", 0) == 0
    # No bar where the output is a file, nor on another rank than the first.
    bar = tqdm(total=size, desc="Tokenising", unit="B", unit_scale=True, disable=None if rank_zero else True)

    def texts() -> Iterator[str]:
        for split, text in documents:
            data = text.encode()
            digest.update(hashlib.sha256(data).digest())
            counts[split].documents += 1
            counts[split].bytes += len(data)
            on_their_way.append(split)
            bar.update(len(data))
            yield text

    with bar:
        with disk_errors(cache_dir):
            folder.mkdir(parents=True, exist_ok=True)
        files = {}
        try:
            for split in SPLITS:
                with disk_errors(cache_dir):
                    files[split] = (folder / f"{split}.bin").open("wb", buffering=1 << 20)

            def add(split: Split, ids: np.ndarray) -> None:
                with disk_errors(cache_dir):
                    _write(files[split], ids.astype(dtype))
                counts[split].tokens += len(ids)

            for ids, ends in tokenizer.encode_documents(texts()):
                split = on_their_way[0]
                if counts[split].tokens == 0:
                    add(split, separator)
                add(split, ids)
                if ends:
                    add(split, separator)
                    on_their_way.popleft()
        finally:
            with disk_errors(cache_dir):  # what is still in the buffers is written here
                for file in files.values():
                    file.close()
    with disk_errors(cache_dir):
        for split, count in counts.items():
            count.checksum = _checksum(folder / f"{split}.bin")
        splits = {split: asdict(count) for split, count in counts.items()}
        meta = {"format": FORMAT, "dtype": dtype.name, "sha256": digest.hexdigest(), "splits": splits}
        with atomic_write(folder / "meta.json") as file:
            file.write(json.dumps(meta, indent=1).encode())


def _write(file: Any, ids: np.ndarray) -> None:
    file.write(ids.tobytes())


def _checksum(path: Path) -> str:
    """SHA-256 of a file, or of 64 pieces of it and its size where it is large."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _FULL_CHECKSUM:
            while data := file.read(_SAMPLE):
                digest.update(data)
        else:
            for place in np.linspace(0, size - _SAMPLE, _SAMPLES).astype(np.int64).tolist():
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


class TrainBlocks(Dataset):
    """Blocks of T + 1 tokens under keys ``(epoch, pass, index)``; the last token of a block is the first of the next.

    The grid of blocks is shifted by 0 to T - 1 tokens, drawn from (seed, epoch, pass), so that boundaries fall
    elsewhere in each epoch. The number of blocks is the same for every shift.

    Args:
        tokens: The training stream.
        block_size: T.
        seed: The run's seed, >= 0.
    """

    def __init__(self, tokens: TokenFile, block_size: int, seed: int) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.seed = seed
        self._shift: tuple[tuple[int, int], int] = ((0, -1), 0)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - self.block_size) // self.block_size)

    def shift(self, epoch: int, repeat: int) -> int:
        """Tokens that are left out at the beginning."""
        if self._shift[0] != (epoch, repeat):
            word = np.random.SeedSequence((self.seed, epoch, repeat, 1)).generate_state(1)[0]
            self._shift = (epoch, repeat), int(word) % self.block_size
        return self._shift[1]

    def __getitem__(self, key: tuple[int, int, int] | int) -> Tensor:
        # A bare index comes from Lightning's own sampler (overfit_batches).
        epoch, repeat, index = key if isinstance(key, tuple) else (0, 0, key)
        start = self.shift(epoch, repeat) + index * self.block_size
        return torch.from_numpy(self.tokens.read(start, start + self.block_size + 1))  # (T + 1,)


class EvalBlocks(Dataset):
    """Blocks of T + 1 tokens, in order: every token but the very first is a target exactly once.

    The last block is filled up with -100; an index behind it gives a block of nothing else.

    Args:
        tokens: The stream of a split.
        block_size: T.
    """

    def __init__(self, tokens: TokenFile, block_size: int) -> None:
        self.tokens = tokens
        self.block_size = block_size

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.block_size)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.block_size
        block = torch.full((self.block_size + 1,), PADDING)
        if index < len(self):
            ids = self.tokens.read(start, start + self.block_size + 1)
            block[: len(ids)] = torch.from_numpy(ids)
        return block  # (T + 1,)


class EvalSampler(DistributedSampler):
    """Every n-th block for each of n processes; where they do not come out even, an index behind the last block.

    Being a ``DistributedSampler``, Lightning leaves it alone; its own would count blocks twice.

    Args:
        dataset: The blocks; it takes an index behind the last one.
        num_replicas: Processes that see different data.
        rank: This process among them.
    """

    def __init__(self, dataset: Dataset, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return iter(range(self.rank, self.total_size, self.num_replicas))
