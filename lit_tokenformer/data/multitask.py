"""Several tasks in the same training batch, each as its own data module gives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lit_tokenformer.data.images.datamodule import ImageDataModule
from lit_tokenformer.data.resumable import ResumableDataModule
from lit_tokenformer.data.text.datamodule import TextDataModule
from lit_tokenformer.errors import UserError, unknown_name


class MultiTaskDataModule(LightningDataModule):
    """Training batches ``{task name: that task's batch}``; for evaluation one loader for each task.

    An epoch is one of the task that ``epoch`` names. The other tasks' loaders start over as often as that needs, in
    another order each time, and at the end of the epoch wherever they are. Validation and test are each task's own,
    whole and once. A run that was stopped anywhere and resumed sees the same batches as one that was not, bit for bit.

    Args:
        image: Data of a task ``image``; with ``text``, in place of ``tasks``.
        text: Data of a task ``text``.
        epoch: Task whose end is the end of an epoch, or ``longest`` (the task with most batches). Without a task
            ``image``, the default is the first.
        tasks: Data modules by the names of the model's tasks.

    Raises:
        ValueError: If a task is missing or ``epoch`` is not known (when created), if the longest of streams is asked
            for, or if the model has not these tasks.

    Example:
        >>> prose, digits = TextDataModule("python_docs"), ImageDataModule("digits")
        >>> data = MultiTaskDataModule(tasks={"digits": digits, "prose": prose})
        >>> data.sizes["digits"], data.batch_size
        ({'num_classes': 10, 'image_size': 8}, 32)
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
                raise UserError(f"data.{name}: set it in data.tasks, which replaces it")
        for name, part in given.items():
            where = "" if tasks is None else "tasks."
            if part is None:
                raise UserError(f"data.{where}{name}: expected a data module; several tasks need data for each")
            if name in dir(self) or not name.isidentifier():
                raise UserError(f"data.{where}{name}: {name!r} cannot be the name of a task")
        if not given:
            raise UserError("data.tasks: expected at least one task")
        self.parts: dict[str, Any] = dict(given)
        """The data modules by the name of their task."""
        self.epoch = next(iter(given)) if epoch == "image" and epoch not in given else epoch
        if self.epoch not in (*given, "longest"):
            raise unknown_name("data.epoch", epoch, (*given, "longest"))

    @property
    def ends(self) -> Any:
        """The data whose end is the end of an epoch."""
        if self.epoch != "longest":
            return self.parts[self.epoch]
        samples = {name: part.num_train_samples for name, part in self.parts.items()}
        for name, count in samples.items():
            if count is None:
                raise UserError(f"data.epoch: the length of data.{name}, a stream, is not known; name a task")
        return max(self.parts.values(), key=lambda part: (part.num_train_samples or 0) // part.batch_size)

    # --- What is known of the data -----------------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, dict[str, Any]]:
        """Sizes that each task's model takes over from its data, by task name."""
        known = ("num_classes", "image_size", "vocab_size", "context_length", "separator_id")
        return {
            task: {name: getattr(part, name) for name in known if hasattr(part, name)}
            for task, part in self.parts.items()
        }

    @property
    def num_train_samples(self) -> int | None:
        """Samples in an epoch of the task that ends it, over all processes; None for a stream."""
        return self.ends.num_train_samples

    @property
    def batch_size(self) -> int:
        """Samples of the task that ends an epoch in a batch, per process."""
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
        """The data module of a task by its name, or what the data of a single task know (``num_classes``)."""
        parts = self.__dict__.get("parts", {})
        if name in parts:
            return parts[name]
        found = [part for part in parts.values() if not name.startswith("_") and hasattr(part, name)]
        if len(found) == 1:
            return getattr(found[0], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # --- Lightning --------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Does what is done once for each machine."""
        for part in self.parts.values():
            part.prepare_data()

    def setup(self, stage: str) -> None:
        """Finds the data, so that what is missing is said before any work.

        Args:
            stage: fit, validate or test.
        """
        model: Any = None if self.trainer is None else self.trainer.lightning_module
        wanted = self.parts if model is None else getattr(model, "tasks", {})
        if not wanted:
            raise UserError(f"data: MultiTaskDataModule is for LitMultiTask, the model is a {type(model).__name__}")
        if {*wanted} != {*self.parts}:
            raise UserError(f"data.tasks: expected data for {', '.join(wanted)}, got {', '.join(self.parts)}")
        self.parts = {name: self.parts[name] for name in wanted}  # loaders in the order of the model's tasks
        for part in self.parts.values():
            part.trainer = self.trainer
            part.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        """The training loaders of this process, one for each task."""
        if getattr(self.trainer, "overfit_batches", 0):
            raise UserError("trainer.overfit_batches: not with several tasks; use trainer.limit_train_batches")
        last = self.ends.train_dataloader()
        loaders = {
            name: last if part is self.ends else Cycle(part.train_dataloader(), last)
            for name, part in self.parts.items()
        }
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> dict[str, DataLoader]:
        """Each task's validation data, in order."""
        return {name: part.val_dataloader() for name, part in self.parts.items()}

    def test_dataloader(self) -> dict[str, DataLoader]:
        """Each task's test data, in order."""
        return {name: part.test_dataloader() for name, part in self.parts.items()}

    def predict_dataloader(self) -> DataLoader:
        """Refused with a ``ValueError``: a task predicts by itself."""
        raise UserError("predict: take the tasks apart with `lit-tokenformer split`, and predict with one of them")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """What each task's data do with a training batch on the device."""
        if not isinstance(batch, Mapping):
            return batch
        return {name: self.parts[name].on_after_batch_transfer(one, dataloader_idx) for name, one in batch.items()}

    def train_samples(self, batch: int) -> dict[str, list[int] | None]:
        """As :meth:`ResumableDataModule.train_samples`, for each task."""
        return {name: part.train_samples(batch) for name, part in self.parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Where the training loaders stand."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next training loaders go on where others stood."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])


class Cycle:
    """A training loader that begins anew until another one ends the epoch.

    Args:
        loader: The loader; it knows by itself which pass it is in, and where in it a resumed run goes on.
        last: The loader that ends the epoch.
    """

    def __init__(self, loader: Any, last: DataLoader) -> None:
        self.loader = loader
        self.last = last

    @property
    def sampler(self) -> Any:
        """The loader's sampler, which Lightning tells the epoch."""
        return self.loader.sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def __len__(self) -> int:
        return len(self.last)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands."""
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the loader go on from a state."""
        self.loader.load_state_dict(state_dict)
