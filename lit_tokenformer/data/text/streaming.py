"""Resumable text streams, tokenized and packed into blocks on the fly.

A training stream is read in windows of documents. Within a window documents are shuffled and packed, and the blocks are
shuffled again; the remaining tokens are carried over to the next window. The position in a stream consists of the
library's own state at the start of the window, the tokens carried over to it, and the number of blocks yielded. A
resume reads one window again and nothing else.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lit_tokenformer.data.resumable import ResumableStreamLoader
from lit_tokenformer.data.text.sources import HubStream
from lit_tokenformer.data.text.token_cache import PADDING
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.errors import UserError


@dataclass(frozen=True)
class Place:
    """Position of a worker after a block, in plain types for a checkpoint."""

    worker: int
    state: dict[str, Any]


@dataclass(eq=False)
class TrainStream(IterableDataset):
    """Training blocks ``(tokens (T + 1,) int64, Place)`` of a stream, sharded over ranks and workers."""

    stream: HubStream
    """Documents of this process."""
    tokenizer: Tokenizer
    block_size: int
    shuffle_buffer: int
    """Number of documents per window."""
    seed: int
    rank: int = 0
    """Rank of this process among the data-parallel ones."""
    epoch: int = 0
    start: dict[int, dict[str, Any]] = field(default_factory=dict)
    """State to resume from by worker; a missing one starts at the beginning of the epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Place]]:
        info = get_worker_info()
        worker = info.id if info is not None else 0
        rows, size = self.stream.rows, self.block_size
        fresh: dict[str, Any] = {"rows": None, "window": 0, "rest": [self.tokenizer.separator_id], "blocks": 0}
        state = self.start.get(worker) or fresh
        rows.set_epoch(self.epoch)
        rows.load_state_dict(state["rows"])
        here, window, rest, done = (state[name] for name in ("rows", "window", "rest", "blocks"))
        documents = iter(self.stream)
        while texts := list(islice(documents, self.shuffle_buffer)):
            after = rows.state_dict()
            random = np.random.default_rng(np.random.SeedSequence((self.seed, self.epoch, self.rank, worker, window)))
            tokens = self._packed(rest, [texts[place] for place in random.permutation(len(texts))])
            count = (len(tokens) - 1) // size
            order = random.permutation(count).tolist()
            for number in range(done, count):
                start = order[number] * size
                block = torch.from_numpy(tokens[start : start + size + 1].copy())
                yield block, Place(worker, {"rows": here, "window": window, "rest": rest, "blocks": number + 1})
            here, window, rest, done = after, window + 1, tokens[count * size :].tolist(), 0

    def _packed(self, rest: list[int], texts: list[str]) -> np.ndarray:
        """Pack texts to ``rest document SEP document SEP ...``, (n,) int64."""
        separator = np.array([self.tokenizer.separator_id])
        parts = [np.array(rest, dtype=np.int64)]
        for ids, ends in self.tokenizer.encode_documents(texts):
            parts += [ids, separator] if ends else [ids]
        return np.concatenate(parts, dtype=np.int64, casting="unsafe")


@dataclass(eq=False)
class EvalStream(IterableDataset):
    """Evaluation blocks of a stream in order, ``(tokens (T + 1,) int64, bytes, tokens)`` with cumulative counts.

    Every process reads the whole stream and yields every n-th block, so that all have the same number of blocks and
    none is repeated. An uneven number is padded with blocks that are all -100.
    """

    stream: HubStream
    tokenizer: Tokenizer
    block_size: int
    rank: int = 0
    """Rank of this process among the ``replicas`` data-parallel ones."""
    replicas: int = 1

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        number = 0
        block, num_bytes, num_tokens = torch.full((self.block_size + 1,), PADDING), 0, 0
        for number, (block, num_bytes, num_tokens) in enumerate(self._blocks(), start=1):
            if (number - 1) % self.replicas == self.rank:
                yield block, num_bytes, num_tokens
        if 0 < number % self.replicas <= self.rank:
            yield torch.full_like(block, PADDING), num_bytes, num_tokens

    def _blocks(self) -> Iterator[tuple[Tensor, int, int]]:
        size, separator = self.block_size, np.array([self.tokenizer.separator_id])
        sizes: deque[int] = deque()  # of the documents being tokenized
        num_bytes, num_tokens = 0, 0

        def texts() -> Iterator[str]:
            for text in self.stream:
                sizes.append(len(text.encode()))
                yield text

        rest = separator
        piece_tokens = 0  # of an unfinished document
        for ids, ends in self.tokenizer.encode_documents(texts()):
            rest = np.concatenate([rest, ids, separator] if ends else [rest, ids], dtype=np.int64, casting="unsafe")
            piece_tokens += len(ids)
            if ends:
                num_bytes, num_tokens, piece_tokens = num_bytes + sizes.popleft(), num_tokens + piece_tokens + 1, 0
            count = (len(rest) - 1) // size
            for start in range(0, count * size, size):
                yield torch.from_numpy(rest[start : start + size + 1].copy()), num_bytes, num_tokens
            rest = rest[count * size :]
        if len(rest) > 1:
            block = torch.full((size + 1,), PADDING)
            block[: len(rest)] = torch.from_numpy(rest)
            yield block, num_bytes, num_tokens


class TextStreamLoader(ResumableStreamLoader):
    """Resumable loader over ``TrainStream``; a resume reads one window of documents again.

    The state contains the positions of all processes, so all of them must request it (as Lightning does). A resume
    requires the same number of workers and processes, which determine the assignment of shards.

    Workers take turns. A state is taken between two rounds, with the number of batches of the next round that were
    already trained on: these are produced again and discarded.
    """

    def _read(self, epoch: int, skip: int) -> Iterator[Tensor]:
        stream: Any = self.dataset
        own: dict[str, Any] = self._loaded["ranks"][self.rank] if skip and self._loaded else {"workers": [], "again": 0}
        self._rounds: dict[int, dict[str, Any]] = dict(enumerate(own["workers"]))  # the positions between two rounds
        self._since: deque[Place] = deque()  # the position after each batch yielded since then
        again, number = own["again"], 0
        stream.epoch, stream.start = epoch, dict(self._rounds)
        for number, (tokens, place) in enumerate(DataLoader.__iter__(self), start=1):
            if number > again and not self._all_have_a_batch(True):
                break
            self._settle()
            self._since.append(place)
            if number > again:
                yield tokens
        else:
            self._all_have_a_batch(False)
        if number == 0 and skip == 0:
            least = f"{self.batch_size} blocks of {stream.block_size} + 1 tokens"
            raise UserError(f"data.batch_size: the stream (or a worker's shard of it) has less than {least}")

    def _settle(self) -> int:
        """Drop completed rounds of batches trained on, and return the number of batches trained on after them."""
        trained = len(self._since) - (self._batches - self._batches_trained())
        places = list(self._since)
        whole = 0
        for end in range(1, trained + 1):
            next_round = end < len(places) and places[end].worker <= places[end - 1].worker
            if self.num_workers <= 1 or next_round:
                whole = end
        for _ in range(whole):
            place = self._since.popleft()
            self._rounds[place.worker] = place.state
        return trained - whole

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, its number of batches trained on, and the positions of all processes and workers."""
        state = super().state_dict()
        if self._restored:
            return state | {"ranks": self._loaded["ranks"]}
        own: dict[str, Any] = {"workers": [], "again": 0}
        if self._epoch is not None:
            again = self._settle()
            own = {"workers": [self._rounds.get(worker) for worker in range(max(1, self.num_workers))], "again": again}
        ranks = [own]
        if self.replicas > 1 and dist.is_initialized():
            ranks = [{}] * dist.get_world_size()
            dist.all_gather_object(ranks, own, group=self._processes)
            ranks = ranks[:: len(ranks) // self.replicas]
        return state | {"ranks": ranks}


class EvalStreamLoader(DataLoader):
    """Loader over ``EvalStream`` that counts bytes and tokens."""

    bytes_read = 0
    """UTF-8 bytes of the documents read in the last pass."""
    tokens_read = 0
    """Tokens of these documents, with one separator each."""

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        for tokens, self.bytes_read, self.tokens_read in super().__iter__():
            yield tokens


def train_stream_loader(
    stream: TrainStream, replicas: int = 1, num_workers: int = 0, **loader: Any
) -> TextStreamLoader:
    """Create the resumable training loader of this process, with batches ``tokens (B, T + 1) int64``.

    Each of ``replicas`` data-parallel processes has its own shards, and at most one worker per shard.
    """
    from datasets.distributed import split_dataset_by_node

    rows = copy.deepcopy(stream.stream.rows)  # a copy has its own position
    if replicas > 1:
        rows = split_dataset_by_node(rows, rank=stream.rank, world_size=replicas)
    own = replace(stream, stream=replace(stream.stream, rows=rows))
    # with a generator: a loader draws a seed for its workers, else from the global one
    loader |= {"num_workers": min(num_workers, rows.num_shards), "generator": torch.Generator()}
    found = TextStreamLoader(own, drop_last=True, collate_fn=_stack_train, **loader)
    sizes = {"block_size": stream.block_size, "shuffle_buffer": stream.shuffle_buffer}
    found.set_place(stream.rank, replicas, **sizes, seed=stream.seed)
    return found


def eval_stream_loader(stream: EvalStream, **loader: Any) -> EvalStreamLoader:
    """Create the evaluation loader of this process, with the arguments of a DataLoader."""
    own = replace(stream, stream=replace(stream.stream, rows=copy.deepcopy(stream.stream.rows)))
    return EvalStreamLoader(own, collate_fn=_stack_eval, generator=torch.Generator(), **loader)


def _stack_train(blocks: list[tuple[Tensor, Place]]) -> tuple[Tensor, Place]:
    return torch.stack([tokens for tokens, _ in blocks]), blocks[-1][1]


def _stack_eval(blocks: list[tuple[Tensor, int, int]]) -> tuple[Tensor, int, int]:
    return torch.stack([tokens for tokens, _, _ in blocks]), *blocks[-1][1:]
