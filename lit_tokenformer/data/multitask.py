"""Joint training batches of several tasks, each from its own data module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lit_tokenformer.data.images.datamodule import ImageDataModule
from lit_tokenformer.data.resumable import ResumableDataModule
from lit_tokenformer.data.text.datamodule import TextDataModule
from lit_tokenformer.errors import UserError, unknown_name


class MultiTaskDataModule(LightningDataModule):
    """Training batches ``{task name: batch of that task}``, and one evaluation loader per task.

    The task named by ``epoch`` determines the length of an epoch. The other loaders restart as often as needed,
    reshuffled each time, and stop at any position when the epoch ends. Each task's validation and test data are
    evaluated completely, once. A run interrupted at any point and resumed yields bit-identical batches.

    Args:
        image: Data of a task ``image``; with ``text``, an alternative to ``tasks``.
        text: Data of a task ``text``.
        epoch: Task that determines the length of an epoch, or ``longest`` (the task with most batches). The
            default is the first task if none is named ``image``.
        tasks: Data modules by task name of the model.

    Raises:
        ValueError: For a missing task or an unknown ``epoch`` (on creation), for ``longest`` with a stream, and if the
            model has other tasks.

    Example:
        >>> prose, digits = TextDataModule("python_docs"), ImageDataModule("digits")
        >>> data = MultiTaskDataModule(tasks={"digits": digits, "prose": prose})
        >>> data.sizes["digits"], data.batch_size
        ({'num_classes': 10, 'image_size': 8, 'in_chans': 3}, 32)
    """

    def __init__(
        self,
        image: ImageDataModule | None = None,
        text: TextDataModule | None = None,
        epoch: str = "image",
        tasks: dict[str, ResumableDataModule] | None = None,
    ) -> None:
        super().__init__()
        pair: dict[str, Any] = {"image": image, "text": text}
        given = pair if tasks is None else tasks
        for name in pair if tasks is not None else ():
            if pair[name] is not None:
                raise UserError(f"data.{name}: conflicts with data.tasks; set it there")
        for name, part in given.items():
            where = "" if tasks is None else "tasks."
            if part is None:
                raise UserError(f"data.{where}{name}: expected a data module for each task, got none")
            if name in dir(self) or not name.isidentifier():
                raise UserError(f"data.{where}{name}: invalid task name {name!r}")
        if not given:
            raise UserError("data.tasks: expected at least one task")
        self.parts: dict[str, Any] = dict(given)
        """Data modules by task name."""
        self.epoch = next(iter(given)) if epoch == "image" and epoch not in given else epoch
        if self.epoch not in (*given, "longest"):
            raise unknown_name("data.epoch", epoch, (*given, "longest"))

    @property
    def ends(self) -> Any:
        """Data module that determines the length of an epoch."""
        if self.epoch != "longest":
            return self.parts[self.epoch]
        samples = {name: part.num_train_samples for name, part in self.parts.items()}
        for name, count in samples.items():
            if count is None:
                raise UserError(f"data.epoch: unknown length of data.{name}, a stream; set a task name")
        return max(self.parts.values(), key=lambda part: (part.num_train_samples or 0) // part.batch_size)

    # --- Properties of the data --------------------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, dict[str, Any]]:
        """Model sizes determined by the data, by task name."""
        known = ("num_classes", "image_size", "in_chans", "vocab_size", "context_length", "separator_id")
        return {
            task: {name: getattr(part, name) for name in known if hasattr(part, name)}
            for task, part in self.parts.items()
        }

    @property
    def num_train_samples(self) -> int | None:
        """Number of samples per epoch of the task that ends it, over all processes; None for a stream."""
        return self.ends.num_train_samples

    @property
    def batch_size(self) -> int:
        """Batch size per process of the task that ends an epoch."""
        return self.ends.batch_size

    @property
    def data_settings(self) -> dict[str, Any]:
        """Settings of all data modules, by ``TASK.NAME``."""
        return {
            f"{task}.{name}": value for task, part in self.parts.items() for name, value in part.data_settings.items()
        }

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.parts)})"  # Lightning's opens all loaders

    def __getattr__(self, name: str) -> Any:
        """Return a task's data module by name, or an attribute found in exactly one of them (``num_classes``)."""
        parts = self.__dict__.get("parts", {})
        if name in parts:
            return parts[name]
        found = [part for part in parts.values() if not name.startswith("_") and hasattr(part, name)]
        if len(found) == 1:
            return getattr(found[0], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # --- Lightning --------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Prepare the data of all tasks, once per machine."""
        for part in self.parts.values():
            part.prepare_data()

    def setup(self, stage: str) -> None:
        """Locate the data of all tasks, so that missing data fail before training."""
        model: Any = None if self.trainer is None else self.trainer.lightning_module
        wanted = self.parts if model is None else getattr(model, "tasks", {})
        if not wanted:
            raise UserError(f"data: MultiTaskDataModule needs LitMultiTask, got {type(model).__name__}")
        if {*wanted} != {*self.parts}:
            raise UserError(f"data.tasks: expected data for {', '.join(wanted)}, got {', '.join(self.parts)}")
        self.parts = {name: self.parts[name] for name in wanted}  # in the order of the model's tasks
        for part in self.parts.values():
            part.trainer = self.trainer
            part.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        """Return the training loaders of this process, one per task."""
        if getattr(self.trainer, "overfit_batches", 0):
            raise UserError("trainer.overfit_batches: unsupported with several tasks; use trainer.limit_train_batches")
        last = self.ends.train_dataloader()
        loaders = {
            name: last if part is self.ends else Cycle(part.train_dataloader(), last)
            for name, part in self.parts.items()
        }
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> dict[str, DataLoader]:
        """Return the validation loaders by task, in order."""
        return {name: part.val_dataloader() for name, part in self.parts.items()}

    def test_dataloader(self) -> dict[str, DataLoader]:
        """Return the test loaders by task, in order."""
        return {name: part.test_dataloader() for name, part in self.parts.items()}

    def predict_dataloader(self) -> DataLoader:
        """Raise a ``ValueError``: prediction requires a single task."""
        raise UserError("predict: expected a single task; split the checkpoint with `lit-tokenformer split`")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Apply each task's batch transforms on the device."""
        if not isinstance(batch, Mapping) or {*batch} != {*self.parts}:  # of one task, in evaluation
            return batch
        return {name: self.parts[name].on_after_batch_transfer(one, dataloader_idx) for name, one in batch.items()}

    def train_samples(self, batch: int) -> dict[str, list[int] | None]:
        """Return :meth:`ResumableDataModule.train_samples` of each task."""
        return {name: part.train_samples(batch) for name, part in self.parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of the training loaders."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the positions of the next training loaders."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])


@dataclass(eq=False)
class Cycle:
    """Training loader, which tracks its own pass and position, that repeats until another loader ends the epoch."""

    loader: Any
    last: DataLoader
    """The loader that ends the epoch."""

    @property
    def sampler(self) -> Any:
        """Sampler of the loader, whose epoch Lightning sets."""
        return self.loader.sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def __len__(self) -> int:
        return len(self.last)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the loader."""
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position of the loader."""
        self.loader.load_state_dict(state_dict)
