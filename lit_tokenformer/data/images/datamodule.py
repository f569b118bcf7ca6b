"""Images and labels for training, evaluation and prediction, as one LightningDataModule over a table of data sets.

Transforms, mixup and CutMix are timm's; the way a run is resumed bit for bit is in ``loading.py``, the data sets in
``image_sources.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_tokenformer.data.images.datasets import (
    EvalImages,
    ImageReader,
    Samples,
    StreamImages,
    TrainImages,
    collate_readable,
)
from lit_tokenformer.data.images.sources import (
    HubStream,
    SourceSettings,
    Splits,
    decode_hub_image,
    find_images,
)
from lit_tokenformer.data.images.transforms import Augmentation, eval_transform, train_transform
from lit_tokenformer.data.resumable import (
    EpochSampler,
    ResumableDataModule,
    ResumableLoader,
    ResumableStreamLoader,
    no_test_split,
    seeded,
)
from lit_tokenformer.errors import UserError
from lit_tokenformer.registry import IMAGE_SOURCES

_DATA_SET_DEFAULTS = Augmentation()


class EvalImageSampler(DistributedSampler):
    """Every n-th image for each of n processes, none twice, and as many batches for each of them.

    Where an image is missing to that, the index behind the last one stands in a batch. Being a ``DistributedSampler``,
    Lightning leaves it alone; its own would count some images twice.

    Args:
        dataset: The images, at least one for each process; it takes the index behind the last one.
        batch_size: Images in a batch; with 1, and one image more in some processes, a batch of these has two.
        num_replicas: Processes that see different data.
        rank: This process among them.
    """

    def __init__(self, dataset: Dataset, batch_size: int, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        total: int = len(dataset)  # type: ignore[arg-type]
        self.indices = range(rank, total, num_replicas)
        self.batches = min(-(-self.num_samples // batch_size), total // num_replicas)
        self.batch_size = -(-self.num_samples // self.batches)

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        nothing = len(self.dataset)  # type: ignore[arg-type]
        share, more = divmod(len(self.indices), self.batches)
        start = 0
        for batch in range(self.batches):
            size = share + (batch < more)
            yield from self.indices[start : start + size]
            yield from [nothing] * (self.batch_size - size)
            start += size

    def __len__(self) -> int:
        return self.batches * self.batch_size


class ImageDataModule(ResumableDataModule):
    """Batches ``(image (B, 3, H, W) float32, label (B,) int64)`` for training, evaluation and prediction.

    Images are normalised by the data set's mean and standard deviation; grey ones become RGB. With mixup, CutMix or
    label smoothing the labels of training batches are ``(B, C)`` float32 instead.

    Every random choice follows from the seed, the epoch and the sample, so a run that was stopped anywhere and resumed
    sees the same batches as one that was not, bit for bit, with any number of workers (streams: with the same number).
    No loader draws from the global random generators. An incomplete last training batch is left out.

    An unreadable image is named in a warning and left out: in training the next readable one stands in for it, in
    evaluation its batch gets smaller, in prediction a black image with the label -100 keeps its place.

    Args:
        dataset: Name of the data set: digits (1,797 real 8x8 digits that come with scikit-learn; needs no files),
            fashion_mnist, cifar10, cifar100, imagefolder (ROOT/train/CLASS/IMAGE, ROOT/val/CLASS/IMAGE, if wanted
            ROOT/test/CLASS/IMAGE) or huggingface.
        root: Folder that holds the data. With huggingface it is the ``data_dir`` of ``load_dataset``.
        image_size: Height and width of the images in a batch, in pixels. None: 8 for digits, 28 for fashion_mnist, 32
            for cifar10 and cifar100, else 224.
        batch_size: Training images in a batch, per process.
        eval_batch_size: Images in a batch of validation, test and prediction, per process. None: as in training.
        num_workers: Loading processes for each training process. None: the cores of this process shared among the
            training processes of this machine, at most 8; 0 for digits or where there is only one core.
        pin_memory: Whether batches are put into page-locked memory. None: where there is CUDA.
        augmentation: Augmentation of the training images, and the resize of all.
        val_fraction: Share of the training images that is held out where the data set has no validation split; 0 takes
            the test split. The same images for every seed.
        seed: Seed of order and augmentation, 0 or more. None: that of ``seed_everything``, else 0.
        download: Whether torchvision may fetch a data set that is not in ``root``.
        predict_root: Folder of images to predict, nested or flat. None: the test split, else the validation split.
        max_corrupt_share: Share of a split's images that may be unreadable before the run stops, 0 to 1. Three are
            always allowed, unless the share is 0. A stream is measured by what each worker has read so far.
        hf_name: Hugging Face data set (dataset: huggingface).
        hf_config: Its configuration, where it has several.
        hf_image_column: Its column of images. None: the first one of that kind.
        hf_label_column: Its column of class labels. None: the first one of that kind.
        hf_train_split: Its split to train on.
        hf_val_split: Its split to validate on. None: validation, valid, val or dev, if there is one.
        streaming: Whether the Hugging Face data set is read as a stream, without being stored.
        shuffle_buffer: Samples from which a stream draws the next one.

    Raises:
        ValueError: If a setting is wrong (when created) or the data are not there (at the first use of a property or
            loader); the message is one line and names the setting.

    Example:
        >>> data = ImageDataModule("digits")
        >>> data.num_classes, data.image_size, data.num_train_samples
        (10, 8, 1437)
    """

    in_chans = 3
    """Channels of an image."""

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        image_size: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        augmentation: Augmentation = _DATA_SET_DEFAULTS,
        val_fraction: float = 0.1,
        seed: int | None = None,
        download: bool = False,
        predict_root: str | None = None,
        max_corrupt_share: float = 0.001,
        hf_name: str | None = None,
        hf_config: str | None = None,
        hf_image_column: str | None = None,
        hf_label_column: str | None = None,
        hf_train_split: str = "train",
        hf_val_split: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__(seed, num_workers)
        self.dataset = dataset
        self.source = IMAGE_SOURCES[dataset]
        self.settings = SourceSettings(
            root=root,
            download=download,
            val_fraction=val_fraction,
            hf_name=hf_name,
            hf_config=hf_config,
            hf_image_column=hf_image_column,
            hf_label_column=hf_label_column,
            hf_train_split=hf_train_split,
            hf_val_split=hf_val_split,
            streaming=streaming,
        )
        self.image_size = self.source.image_size if image_size is None else image_size
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.augmentation = augmentation.completed(self.source.augmentation)
        self.predict_root = predict_root
        self.max_corrupt_share = max_corrupt_share
        self.shuffle_buffer = shuffle_buffer

        for name, value, low in (
            ("image_size", self.image_size, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("num_workers", num_workers or 0, 0),
            ("seed", seed or 0, 0),
            ("shuffle_buffer", shuffle_buffer, 1),
        ):
            if value < low:
                raise UserError(f"data.{name}: expected a whole number of {low} or more, got {value}")
        if not 0 <= val_fraction < 1:
            raise UserError(f"data.val_fraction: expected a share from 0 to below 1, got {val_fraction}")
        if not 0 <= max_corrupt_share <= 1:
            raise UserError(f"data.max_corrupt_share: expected a share from 0 to 1, got {max_corrupt_share}")
        if self.augmentation.mixes and batch_size % 2:
            raise UserError(
                f"data.batch_size: expected an even number, since mixup and cutmix pair images, got {batch_size}"
            )
        look = (self.augmentation, self.image_size, self.source.mean, self.source.std)
        self._train_transform, self._eval_transform = train_transform(*look), eval_transform(*look)

    @property
    def data_settings(self) -> dict[str, Any]:
        own = {"dataset": self.dataset, "image_size": self.image_size, **asdict(self.settings)}
        return {**super().data_settings, **own}

    @cached_property
    def splits(self) -> Splits:
        """The data set's splits, found at first use."""
        splits = self.source.open(self.settings)
        if len(splits.class_names) < 2:
            raise UserError(f"data.dataset: expected at least two classes, found only {splits.class_names}")
        return splits

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; a label is an index into it."""
        return self.splits.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.splits.class_names)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that was subtracted, as a share of the full range."""
        return self.source.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel that was divided by, as a share of the full range."""
        return self.source.std

    @property
    def num_train_samples(self) -> int | None:
        """Training images in an epoch, over all processes; None for a stream that does not know its length."""
        return self.splits.num_train

    def setup(self, stage: str) -> None:
        """Finds the data, so that what is missing is said before any work.

        Args:
            stage: fit, validate, test or predict.
        """
        self.splits  # noqa: B018
        if stage == "predict":
            self._predict_samples  # noqa: B018

    def train_dataloader(self) -> DataLoader:
        """The resumable training loader of this process."""
        samples, seed, (rank, replicas) = self.splits.train, self._seed, self._place
        loader: ResumableLoader | ResumableStreamLoader
        if isinstance(samples, HubStream):
            stream = self._stream(samples, self.batch_size, seed)
            loader = ResumableStreamLoader(
                stream,
                batch_size=self.batch_size,
                drop_last=True,
                num_workers=min(self._workers, stream.stream.num_shards),
                pin_memory=self.pin_memory,
                generator=torch.Generator(),  # of its own: a loader draws a seed for its workers
            )
            loader.rank, loader.replicas = rank, replicas
            loader.made_with = {
                "data.num_workers": loader.num_workers,
                "trainer.devices (processes in all)": replicas,
                "data.batch_size": self.batch_size,
                "data.shuffle_buffer": self.shuffle_buffer,
                "data.seed": seed,
            }
        else:
            images = TrainImages(ImageReader(samples, self.max_corrupt_share), self._train_transform, seed)
            sampler = EpochSampler(images, seed, num_replicas=replicas, rank=rank)
            if len(sampler) < self.batch_size:
                most = f"expected at most {len(sampler)} (the training images of a process)"
                raise UserError(f"data.batch_size: {most}, got {self.batch_size}")
            loader = ResumableLoader(
                images,
                sampler=sampler,
                batch_size=self.batch_size,
                drop_last=True,
                num_workers=self._workers,
                persistent_workers=self._workers > 0,
                pin_memory=self.pin_memory,
                generator=torch.Generator(),
            )
        return self._resumed(loader)

    def val_dataloader(self) -> DataLoader:
        """Validation images, in order."""
        return self._eval_loader(self.splits.val)

    def test_dataloader(self) -> DataLoader:
        """Test images, in order.

        Raises:
            UserError: If the data set has no test split.
        """
        if self.splits.test is self.splits.val:
            raise no_test_split()
        return self._eval_loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader:
        """Images to predict, in order; the label is -1 where it is not known and -100 where the image is unreadable."""
        return self._eval_loader(self._predict_samples, keep_places=True)

    def predict_name(self, index: int) -> str:
        """What the image at a place of the prediction order is called.

        Args:
            index: Zero-based place in the order of ``predict_dataloader`` (over all processes).

        Returns:
            The file's path, or the index as text where there is no file.
        """
        samples = self._predict_samples
        return str(index) if isinstance(samples, HubStream) else samples.name(index)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mixes training batches on the device."""
        trainer = self.trainer
        if trainer is None or not trainer.training or self._train_loader is None:
            return batch
        # The loader's own count: Lightning goes on counting after some resumes of a stream where an epoch has ended.
        place = self._train_loader.state_dict()
        return self.mix(batch, epoch=place["epoch"], batch_idx=place["batches"])

    def mix(self, batch: tuple[Tensor, Tensor], epoch: int, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Mixup, CutMix and label smoothing of a training batch, seeded by its place in the run.

        Args:
            batch: ``(image (B, 3, H, W), label (B,))``.
            epoch: Zero-based epoch.
            batch_idx: Zero-based batch of the epoch.

        Returns:
            ``(image (B, 3, H, W), label (B, C) float32)``, or the batch as it is where nothing of it is asked for.
        """
        image, label = batch
        setting = self.augmentation
        if setting.mixes:
            with seeded(self._seed, epoch, batch_idx, self._place[0], 1):
                return self._mixup(image, label)
        if setting.label_smoothing > 0:
            return image, mixup_target(label, self.num_classes, smoothing=setting.label_smoothing)
        return batch

    @cached_property
    def _mixup(self) -> Mixup:
        setting = self.augmentation
        return Mixup(
            mixup_alpha=setting.mixup,
            cutmix_alpha=setting.cutmix,
            label_smoothing=setting.label_smoothing,
            num_classes=self.num_classes,
        )

    @cached_property
    def _predict_samples(self) -> Samples | HubStream:
        return self.splits.test if self.predict_root is None else find_images(self.predict_root)

    @property
    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return 0 if self.source.tiny else self._spare_workers

    def _stream(self, split: HubStream, batch_size: int, seed: int | None) -> StreamImages:
        from datasets.distributed import split_dataset_by_node

        rank, replicas = self._place
        rows = split.rows if seed is None else split.rows.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        rows = split_dataset_by_node(rows, rank=rank, world_size=replicas) if replicas > 1 else rows
        transform = self._eval_transform if seed is None else self._train_transform
        return StreamImages(
            rows,
            split.columns,
            partial(decode_hub_image, folders=split.folders),
            transform,
            self.max_corrupt_share,
            batch_size,
            seed,
            rank,
        )

    def _eval_loader(self, samples: Samples | HubStream, keep_places: bool = False) -> DataLoader:
        workers, (rank, replicas) = self._workers, self._place
        images: StreamImages | EvalImages
        sampler, batch_size = None, self.eval_batch_size
        if isinstance(samples, HubStream):
            strategy = self.trainer.strategy if self.trainer is not None else None
            if replicas > 1 and isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
                raise UserError(
                    "data.streaming: processes that share a model need as many evaluation batches each, which a stream "
                    "does not have; set data.streaming: false, or trainer.strategy: ddp"
                )
            images = self._stream(samples, self.eval_batch_size, seed=None)
            workers = min(workers, images.stream.num_shards)
        else:
            images = EvalImages(ImageReader(samples, self.max_corrupt_share), self._eval_transform, keep_places)
            if len(images) < replicas:
                raise UserError(
                    f"trainer.devices: {replicas} processes cannot share {len(images)} images for evaluation"
                )
            if replicas > 1 and not keep_places:
                sampler = EvalImageSampler(images, batch_size, num_replicas=replicas, rank=rank)
                batch_size = sampler.batch_size
        return DataLoader(
            images,
            sampler=sampler,
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.pin_memory,
            collate_fn=collate_readable,
            generator=torch.Generator(),
        )
