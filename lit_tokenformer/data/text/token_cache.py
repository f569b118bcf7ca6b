"""Token cache on disk, read through memory maps, and blocks of tokens.

A split is the stream ``SEP document SEP document SEP ... document SEP``, so that every token of a document and every
separator after it has a context.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from tqdm.auto import tqdm

from lit_tokenformer.atomic_io import atomic_folder
from lit_tokenformer.data.text.files import file_digest
from lit_tokenformer.data.text.sources import Split
from lit_tokenformer.data.text.tokenizer import Tokenizer, batches
from lit_tokenformer.errors import UserError

FORMAT = 3
"""Version of the file format. Other versions are ignored."""

PADDING = -100
"""Padding token id, ignored as input and target."""

Built = TypeVar("Built")
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_THREADS = 2  # of calls: one uses all cores while the tokens of another are converted, which is serial


@dataclass
class TokenFile:
    """Token ids in a memory-mapped file, whose pages are shared by worker processes."""

    path: Path
    dtype: str
    """uint16 or uint32."""
    length: int
    _map: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a pickled map would copy all tokens

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        """Return the tokens at ``places``, int64; fewer for a slice beyond the end of the file."""
        return self._tokens[places].astype(np.int64)

    @property
    def _tokens(self) -> np.ndarray:
        if self._map is None:
            self._map = np.asarray(np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.length,)))
        return self._map


@dataclass
class SplitCount:
    """Document, byte and token counts of a split."""

    documents: int = 0
    bytes: int = 0
    """Number of UTF-8 bytes of the documents."""
    tokens: int = 0
    """Number of tokens of the stream, including separators."""
    checksum: str = ""

    @property
    def targets(self) -> int:
        """Number of predicted tokens: all but the first separator."""
        return max(0, self.tokens - 1)


@dataclass
class TokenCache:
    """Tokenized splits of a corpus."""

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
    """Open the cache of one corpus; None if it is missing or invalid."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        counts = {split: SplitCount(**meta["splits"][split]) for split in SPLITS}
        cache = TokenCache(folder, meta["dtype"], counts, meta["sha256"])
        width = np.dtype(meta["dtype"]).itemsize
        for split, count in counts.items():
            path = cache.files[split].path
            if path.stat().st_size != count.tokens * width or file_digest(path) != count.checksum:
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
    """Open the cache of a corpus, and build it first if it is missing or invalid. Only one process builds it.

    ``key`` is a hash of everything that determines the tokens, ``size`` the approximate size of the documents in bytes,
    for the progress bar.

    Raises:
        ValueError: If the disk is full or the folder cannot be written.
    """
    folder = cache_dir / "tokens" / key

    def build() -> TokenCache:
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_folder(folder) as part:
            _build(cache_dir, part, documents(), tokenizer, size)
        if (cache := open_cache(folder)) is None:
            raise UserError(f"data.cache_dir: the files written to {folder} cannot be read back")
        total = f"{cache.total.bytes} bytes, {cache.total.tokens} tokens"
        rank_zero_info(f"Tokenized {cache.total.documents} documents: {total}, in {folder}")
        return cache

    return built_once(cache_dir, folder, partial(open_cache, folder), build)


def built_once(cache_dir: Path, target: Path, read: Callable[[], Built | None], build: Callable[[], Built]) -> Built:
    """Read a file or folder under ``cache_dir``, and build it if it reads as None. Only one process builds it."""
    if (found := read()) is not None:
        return found
    with disk_errors(cache_dir):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            rank_zero_warn(f"Waiting for another process that builds {target}")
            lock.acquire()
    try:
        found = read()  # of the process that held the lock
        return build() if found is None else found
    finally:
        lock.release()


@contextmanager
def disk_errors(cache_dir: Path) -> Iterator[None]:
    """Convert disk errors under ``cache_dir`` to a one-line error."""
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
    separator = np.array([tokenizer.separator_id], dtype)
    counts = {split: SplitCount() for split in SPLITS}
    digest = hashlib.sha256()
    off = None if getattr(rank_zero_only, "rank", 0) == 0 else True  # None: no bar if the output is a file

    def counted() -> Iterator[tuple[Split, str]]:
        for split, text in documents:
            data = text.encode()
            digest.update(hashlib.sha256(data).digest())
            counts[split].documents += 1
            counts[split].bytes += len(data)
            bar.update(len(data))
            yield split, text

    plain = tokenizer.fingerprint == Tokenizer.bytes(tokenizer.separator).fingerprint  # 15 times faster without it

    def encode(batch: list[tuple[Split, str, bool]]) -> list[tuple[Split, np.ndarray]]:
        texts = [text for _, text, _ in batch]
        ids: list[Any] = (
            [np.frombuffer(text.encode(), np.uint8) for text in texts] if plain else tokenizer.encode_arrays(texts)
        )
        parts = [np.append(one, separator) if ends else one for one, (_, _, ends) in zip(ids, batch, strict=True)]
        return [(split, np.asarray(part, dtype)) for part, (split, _, _) in zip(parts, batch, strict=True)]

    files = {}
    bar = tqdm(total=size, desc="Tokenizing", unit="B", unit_scale=True, disable=off)
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        try:
            for split in SPLITS:
                with disk_errors(cache_dir):
                    files[split] = (folder / f"{split}.bin").open("wb", buffering=1 << 20)
            for encoded in _ahead(pool, encode, batches(counted())):
                with disk_errors(cache_dir):
                    for split, ids in encoded:
                        if counts[split].tokens == 0:
                            ids = np.append(separator, ids)
                        _write(files[split], ids)
                        counts[split].tokens += len(ids)
        finally:
            with disk_errors(cache_dir):  # closing flushes the buffers
                for file in files.values():
                    file.close()
    with disk_errors(cache_dir):
        for split, count in counts.items():
            count.checksum = file_digest(folder / f"{split}.bin")
        splits = {split: asdict(count) for split, count in counts.items()}
        meta = {"format": FORMAT, "dtype": dtype.name, "sha256": digest.hexdigest(), "splits": splits}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _ahead(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Apply a function to items in threads, in order, at most ``_THREADS`` items ahead."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > _THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write(file: Any, ids: np.ndarray) -> None:
    file.write(ids.tobytes())


@dataclass(eq=False)
class TrainBlocks(Dataset):
    """Blocks of T + 1 tokens under keys ``(epoch, pass, index)``; the last token of a block is the first of the next.

    The grid of blocks is shifted by 0 to T - 1 tokens, sampled from (seed, epoch, pass), so that boundaries differ
    between epochs. The number of blocks is the same for every shift.
    """

    tokens: TokenFile
    block_size: int
    seed: int
    _shift: tuple[tuple[int, int], int] = ((0, -1), 0)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - self.block_size) // self.block_size)

    def shift(self, epoch: int, repeat: int) -> int:
        """Return the number of tokens dropped at the beginning."""
        if self._shift[0] != (epoch, repeat):
            word = np.random.SeedSequence((self.seed, epoch, repeat, 1)).generate_state(1)[0]
            self._shift = (epoch, repeat), int(word) % self.block_size
        return self._shift[1]

    def __getitem__(self, key: tuple[int, int, int] | int) -> Tensor:
        # A bare index comes from Lightning's own sampler (overfit_batches).
        epoch, repeat, index = key if isinstance(key, tuple) else (0, 0, key)
        start = self.shift(epoch, repeat) + index * self.block_size
        return torch.from_numpy(self.tokens[start : start + self.block_size + 1])  # (T + 1,)


@dataclass(eq=False)
class EvalBlocks(Dataset):
    """Blocks of T + 1 tokens in order: every token but the very first is a target exactly once.

    The last block is padded with -100; the block at an index beyond it is all padding.
    """

    tokens: TokenFile
    block_size: int

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.block_size)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.block_size
        block = torch.full((self.block_size + 1,), PADDING)
        if index < len(self):
            ids = self.tokens[start : start + self.block_size + 1]
            block[: len(ids)] = torch.from_numpy(ids)
        return block  # (T + 1,)


class EvalSampler(DistributedSampler):
    """Distributed evaluation sampler with every block exactly once, padded with indices beyond the last block.

    Lightning keeps a ``DistributedSampler``; its own would repeat blocks.
    """

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return iter(range(self.rank, self.total_size, self.num_replicas))
