"""Loading of streams that can be resumed: a stream has no indices, so a place in it depends on who reads what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from lit_tokenformer.data.loading import CountingLoader
from lit_tokenformer.errors import UserError


class ResumableStreamLoader(CountingLoader):
    """A loader over ``StreamImages`` that goes on where its state says.

    Skipped samples are read, but neither decoded nor augmented. An exact resume needs the number of workers and of
    processes the state was saved with: they decide who reads which shard. Without ``progress`` every iteration is the
    next epoch.
    """

    rank = 0
    """This process among those that see different data."""
    replicas = 1
    """Their number."""
    made_with: dict[str, Any] = {}
    """The settings a place depends on, by name."""

    _finished = False
    _group: Any = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.progress is not None:
            epoch = self.progress.epoch
        elif self._epoch is None or (self._restored and not self._finished):
            epoch = self._epoch or 0
        else:
            epoch = self._epoch + 1
        skip = 0
        if self._restored and epoch == self._epoch:
            epoch, skip = (epoch + 1, 0) if self._finished else (epoch, self._batches)
        self._enter(epoch, skip)
        self._finished = False
        for batch in self._read(epoch, skip):
            self._batches += 1
            yield batch
        self._finished = True

    def _read(self, epoch: int, skip: int) -> Iterator[Any]:
        """The batches of an epoch that come after the first ``skip``."""
        stream: Any = self.dataset
        # Workers take turns, so the first skip // workers batches of each lie before the point to go on from, whatever
        # the shards' sizes.
        stream.epoch, stream.skip_batches = epoch, skip // max(1, self.num_workers)
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                if not self._all_have_a_batch(True):
                    break
                yield batch
        else:
            self._all_have_a_batch(False)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches of it that were trained on, whether the epoch is over, and what the place depends
        on."""
        state = super().state_dict()
        finished = self._finished and state["batches"] == self._batches
        return state | {"finished": finished, "made_with": self.made_with}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state at the next iteration, if Lightning's epoch is still the state's by then.

        Raises:
            ValueError: If the state is of the middle of an epoch, and was saved with other settings.
        """
        if state_dict["batches"] and not state_dict["finished"]:
            made_with = state_dict.get("made_with", {})
            for name, value in self.made_with.items():
                if (saved := made_with.get(name, value)) != value:
                    raise UserError(
                        f"{name}: the stream's place was saved with {saved}, and can be found with it only; got {value}"
                    )
        super().load_state_dict(state_dict)
        self._finished = state_dict["finished"]

    def _all_have_a_batch(self, here: bool) -> bool:
        """A process whose shards are at their end ends the epoch of all, or the others would wait for it forever."""
        if self.replicas == 1 or not dist.is_initialized():
            return here
        flag = torch.tensor([int(here)])
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._processes())
        return bool(flag)

    def _processes(self) -> Any:
        """All processes, connected on the CPU: no step waits for the accelerator because of this."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group
