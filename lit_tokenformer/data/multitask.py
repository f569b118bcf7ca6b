"""Images and text in the same training batch, each as its own data module gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lit_tokenformer.data.images.datamodule import ImageDataModule
from lit_tokenformer.data.text.datamodule import TextDataModule
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.errors import UserError, unknown_name


class MultiTaskDataModule(LightningDataModule):
    """Training batches ``{"image": (image, label), "text": tokens}``; for evaluation one loader for each task.

    An epoch is one of the task that ``epoch`` names. The other task's loader begins anew as often as that needs, in
    another order each time, and at the end of the epoch wherever it stands. Validation and test are each task's own,
    whole and once. A run that was stopped anywhere and resumed sees the same batches as one that was not, bit for bit.

    Args:
        image: The images.
        text: The text.
        epoch: Whose end is the end of an epoch: ``image``, ``text``, or ``longest`` (the task with more batches).

    Raises:
        ValueError: If a task is missing or ``epoch`` is not known (when created), if the longest of streams is asked
            for, or if the model has not these tasks.

    Example:
        >>> data = MultiTaskDataModule(ImageDataModule("digits"), TextDataModule("python_docs"))
        >>> data.num_classes, data.vocab_size, data.batch_size
        (10, 257, 32)
    """

    def __init__(
        self, image: ImageDataModule | None = None, text: TextDataModule | None = None, epoch: str = "image"
    ) -> None:
        super().__init__()
        if image is None or text is None:
            missing = "image" if image is None else "text"
            raise UserError(f"data.{missing}: expected a data module; several tasks need data for each")
        if epoch not in ("image", "text", "longest"):
            raise unknown_name("data.epoch", epoch, ("image", "text", "longest"))
        self.image = image
        self.text = text
        self.epoch = epoch

    @property
    def parts(self) -> dict[str, ImageDataModule | TextDataModule]:
        """The data modules by the name of their task."""
        return {"image": self.image, "text": self.text}

    @property
    def ends(self) -> ImageDataModule | TextDataModule:
        """The data whose end is the end of an epoch."""
        if self.epoch != "longest":
            return self.parts[self.epoch]
        samples = {name: part.num_train_samples for name, part in self.parts.items()}
        for name, count in samples.items():
            if count is None:
                raise UserError(f"data.epoch: the length of data.{name}, a stream, is not known; use image or text")
        return max(self.parts.values(), key=lambda part: (part.num_train_samples or 0) // part.batch_size)

    # --- What is known of the data: of an epoch, of the images, of the text -----------------------------------------

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
        """Settings of both data modules, by ``image.NAME`` and ``text.NAME``."""
        return {
            f"{kind}.{name}": value for kind, part in self.parts.items() for name, value in part.data_settings.items()
        }

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return self.image.num_classes

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.image.image_size

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; a label is an index into it."""
        return self.image.class_names

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that was subtracted, as a share of the full range."""
        return self.image.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel that was divided by, as a share of the full range."""
        return self.image.std

    @property
    def masked(self) -> bool:
        """Whether batches of the text hold masked tokens, which no task here is for."""
        return self.text.masked

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text."""
        return self.text.tokenizer

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary V."""
        return self.text.vocab_size

    @property
    def separator_id(self) -> int:
        """Id of the token that ends a document."""
        return self.text.separator_id

    @property
    def context_length(self) -> int:
        """Tokens T the model sees at once."""
        return self.text.context_length

    def bytes_per_token(self, stage: str) -> float:
        """As :meth:`TextDataModule.bytes_per_token`."""
        return self.text.bytes_per_token(stage)

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
        if model is not None and {*getattr(model, "tasks", {})} != {*self.parts}:
            raise UserError(f"data: MultiTaskDataModule is for LitMultiTask, the model is a {type(model).__name__}")
        for part in self.parts.values():
            part.trainer = self.trainer
            part.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        """Both training loaders of this process."""
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
