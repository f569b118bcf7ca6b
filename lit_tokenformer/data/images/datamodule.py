"""LightningDataModule for image classification.

Transforms, mixup and CutMix are timm's. Bitwise resuming is in ``data/resumable.py``, the data sets are in
``sources.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property, partial
from statistics import fmean
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_tokenformer.data.images.datasets import EvalImages, ImageReader, StreamImages, TrainImages, collate_readable
from lit_tokenformer.data.images.folders import find_images
from lit_tokenformer.data.images.hub import HubStream
from lit_tokenformer.data.images.samples import Samples, decode_hub_image
from lit_tokenformer.data.images.sources import SourceSettings, Splits, find_source, is_unlabeled
from lit_tokenformer.data.images.transforms import (
    Augmentation,
    ImageSize,
    describe,
    eval_transform,
    pair,
    train_transform,
)
from lit_tokenformer.data.resumable import (
    EpochSampler,
    ResumableDataModule,
    ResumableLoader,
    ResumableStreamLoader,
    no_test_split,
    seeded,
)
from lit_tokenformer.data.settings import (
    HubImageSettings,
    LoaderSettings,
    accept_flat_names,
    check_share,
    check_whole,
    flat_settings,
)
from lit_tokenformer.errors import UserError

_DATA_SET_DEFAULTS, _HUB = Augmentation(), HubImageSettings()


class EvalImageSampler(DistributedSampler):
    """Distributed evaluation sampler with every image exactly once and the same number of batches per process.

    Uneven batches are padded with the index N, the number of images. With a batch size of 1, processes with one image
    more have batches of two. Lightning keeps a ``DistributedSampler``; its own would repeat images.
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

    Images are normalized by the data set's mean and standard deviation; gray images are converted to RGB, and RGB to
    gray for one channel. With mixup, CutMix or label smoothing the labels of training batches are ``(B, C)`` float32.

    Every random choice is a function of the seed, the epoch and the sample. A resumed run sees the same batches as an
    uninterrupted one, bit for bit, with any number of workers (streams: with the same number). No loader uses the
    global random generators. An incomplete last training batch is dropped.

    An unreadable image is reported in a warning and skipped. In training it is replaced by the next readable one, in
    evaluation its batch is smaller, in prediction it is replaced by a black image with label -100.

    Args:
        dataset: Data set: digits (1,797 real 8x8 digits bundled with scikit-learn, no files needed), mnist, kmnist,
            fashion_mnist, cifar10, cifar100, imagefolder (ROOT/train/CLASS/IMAGE, also val and test, each under any
            name that Hugging Face knows; tar files in place of folders; WebDataset shards; labels in metadata.csv or
            metadata.jsonl) or huggingface. Names of timm's ``create_dataset`` too: torch/NAME, wds/NAME, tfds/NAME
            (array_record), hfds/NAME, hfids/NAME (a stream).
        root: Root folder or tar file of the data; the ``data_dir`` of ``load_dataset`` for huggingface.
        image_size: Input image size in pixels, height = width or ``[height, width]``. Default: 8 for digits, 28 for
            mnist, kmnist and fashion_mnist, 32 for cifar10 and cifar100, else 224.
        in_chans: Number of image channels: 3 (RGB) or 1 (gray).
        augmentation: Augmentation of training images, and resizing of all images.
        val_fraction: Fraction of the training images held out if the data set has no validation split; 0 validates on
            the test split. Independent of the seed.
        seed: Seed of the sample order and augmentation, >= 0. Default: that of ``seed_everything``, else 0.
        download: Whether to download a data set of torchvision or TensorFlow Datasets missing in ``root``.
        predict_root: Image, folder or tar file to predict, nested or flat. Default: the test split, else the validation
            split.
        max_corrupt_share: Tolerated share of unreadable images in a split, 0 to 1. Three are always tolerated, unless
            the share is 0. For a stream, the share is of the images read so far by each worker.
        follow_links: Whether links in a folder of images may lead out of ``root``; otherwise those are left out.
        loader: Batch sizes and worker processes. Each is also an argument of its own: ``batch_size=8``.
        hub: Hugging Face data set (dataset: huggingface), also as ``hf_name``, ``hf_config``, ``hf_train_split``,
            ``hf_val_split``, ``hf_image_column``, ``hf_label_column``, ``streaming`` and ``shuffle_buffer``.

    Raises:
        ValueError: If a setting is invalid (on creation) or the data are missing (at the first use of a property or
            loader); the message is one line and begins with the setting.

    Example:
        >>> data = ImageDataModule("digits")
        >>> data.num_classes, data.image_size, data.num_train_samples
        (10, 8, 1437)
    """

    @accept_flat_names
    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        augmentation: Augmentation = _DATA_SET_DEFAULTS,
        val_fraction: float = 0.1,
        seed: int | None = None,
        download: bool = False,
        predict_root: str | None = None,
        max_corrupt_share: float = 0.001,
        follow_links: bool = False,
        loader: LoaderSettings = ResumableDataModule.loader_defaults,
        hub: HubImageSettings = _HUB,
    ) -> None:
        super().__init__(seed, loader=loader)
        self.dataset = dataset
        self.source, name = find_source(dataset)
        self._needs_workers = not self.source.tiny
        self.settings = SourceSettings(
            name=name,
            root=root,
            follow_links=follow_links,
            download=download,
            val_fraction=val_fraction,
            **flat_settings(hub),
        )
        height, width = pair(self.source.image_size if image_size is None else image_size)
        self.image_size: ImageSize = height if height == width else (height, width)
        self.in_chans = in_chans
        self.augmentation = augmentation.completed(self.source.augmentation)
        self.predict_root = predict_root
        self.max_corrupt_share = max_corrupt_share
        self.hub = hub
        check_whole(image_size=(min(height, width), 1))
        check_share(val_fraction=val_fraction)
        check_share(below_one=False, max_corrupt_share=max_corrupt_share)
        if self.augmentation.mixes and self.batch_size % 2:
            even = "expected an even number for mixup and cutmix, which pair images"
            raise UserError(f"data.batch_size: {even}, got {self.batch_size}")
        if in_chans not in (1, 3):
            raise UserError(f"data.in_chans: expected 3 (RGB) or 1 (gray), got {in_chans}")
        look = (self.augmentation, self.image_size, self.mean, self.std)
        self._train_transform, self._eval_transform = train_transform(*look), eval_transform(*look)

    @property
    def data_settings(self) -> dict[str, Any]:
        own = {"dataset": self.dataset, "image_size": self.image_size, "in_chans": self.in_chans}
        return {**super().data_settings, **own, **asdict(self.settings)}

    @cached_property
    def splits(self) -> Splits:
        """Data set splits, opened at first use."""
        splits = self.source.open(self.settings)
        if len(splits.class_names) < 2:
            raise UserError(f"data.dataset: expected at least two classes, got {splits.class_names}")
        return splits

    @property
    def class_names(self) -> list[str]:
        """Class names, indexed by label."""
        return self.splits.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.splits.class_names)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel for normalization, in units of the full range (0 to 1)."""
        return self.source.mean if self.in_chans == 3 else (fmean(self.source.mean),)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel for normalization, in units of the full range (0 to 1)."""
        return self.source.std if self.in_chans == 3 else (fmean(self.source.std),)

    @property
    def num_train_samples(self) -> int | None:
        """Number of training images per epoch over all processes; None for a stream of unknown length."""
        return self.splits.num_train

    @property
    def image_data(self) -> dict[str, Any]:
        """Class names in order and the evaluation transform, as plain values for a checkpoint."""
        return {
            "class_names": list(self.class_names),
            "image_size": self.image_size if isinstance(self.image_size, int) else list(self.image_size),
            "in_chans": self.in_chans,
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.augmentation.crop_pct,
            "interpolation": self.augmentation.interpolation,
        }

    def setup(self, stage: str) -> None:
        """Open the data, so that missing files fail fast, and log the transforms."""
        self.splits  # noqa: B018
        setting = self.augmentation
        low, high, shown = setting.areas
        train, evaluation = describe(setting, self.image_size)
        rank_zero_info(
            f"Images of {self.dataset}: " + (f"train {train}; " if stage == "fit" else "") + f"eval {evaluation}"
        )
        if stage == "fit" and not low <= shown <= high:
            rank_zero_warn(
                f"data.augmentation.crop_pct: objects differ in scale: evaluation shows {shown:.0%} of an image, "
                f"training {low:.0%} to {high:.0%} (crop: {setting.crop}); crop_pct: null selects the scale of training"
            )
        if stage == "predict":
            self._predict_samples  # noqa: B018

    def train_dataloader(self) -> DataLoader:
        """Create the resumable training loader of this process."""
        samples, seed, (rank, replicas) = self.splits.train, self._seed, self._place
        if isinstance(samples, HubStream):
            stream = self._stream(samples, self.batch_size, seed)
            workers = min(self._workers, stream.stream.num_shards)
            loader = self._create_loader(
                ResumableStreamLoader, stream, drop_last=True, num_workers=workers, persistent_workers=False
            )
            buffer = self.hub.shuffle_buffer
            loader.set_place(rank, replicas, batch_size=self.batch_size, shuffle_buffer=buffer, seed=seed)
            return self._resumed(loader)
        images = TrainImages(ImageReader(samples, self.max_corrupt_share), self._train_transform, seed)
        sampler = EpochSampler(images, seed, num_replicas=replicas, rank=rank)
        self._check_batch_size(len(sampler), "images")
        return self._resumed(self._create_loader(ResumableLoader, images, sampler=sampler, drop_last=True))

    def val_dataloader(self) -> DataLoader:
        """Create the validation loader, in order."""
        return self._eval_loader(self.splits.val)

    def test_dataloader(self) -> DataLoader:
        """Create the test loader, in order; raise a ``UserError`` without a labeled test split."""
        if self.splits.test is self.splits.val:
            raise no_test_split()
        if is_unlabeled(self.splits.test):
            raise UserError("test: the test split has no labels; `predict` writes its classes")
        return self._eval_loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader:
        """Create the prediction loader, in order; labels are -1 if unknown and -100 for unreadable images."""
        return self._eval_loader(self._predict_samples, keep_places=True)

    def predict_name(self, index: int) -> str:
        """Return the path of an image, or its index without a file, by its index in the prediction order."""
        samples = self._predict_samples
        return str(index) if isinstance(samples, HubStream) else samples.name(index)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Apply mixup, CutMix and label smoothing to training batches on the device."""
        trainer = self.trainer
        if trainer is None or not trainer.training or self._train_loader is None:
            return batch
        # The loader's own count: Lightning's is not reset after some resumes of a stream at the end of an epoch.
        place = self._train_loader.state_dict()
        return self.mix(batch, epoch=place["epoch"], batch_idx=place["batches"])

    def mix(self, batch: tuple[Tensor, Tensor], epoch: int, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Apply mixup, CutMix and label smoothing to a training batch, seeded by its zero-based position in the run.

        Returns:
            ``(image (B, 3, H, W), label (B, C) float32)``, or the unchanged batch if all three are disabled.
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
        alphas = {"mixup_alpha": setting.mixup, "cutmix_alpha": setting.cutmix}
        return Mixup(**alphas, label_smoothing=setting.label_smoothing, num_classes=self.num_classes)

    @cached_property
    def _predict_samples(self) -> Samples | HubStream:
        return self.splits.test if self.predict_root is None else find_images(self.predict_root, "data.predict_root")

    def _stream(self, split: HubStream, batch_size: int, seed: int | None, labeled: bool = True) -> StreamImages:
        from datasets.distributed import split_dataset_by_node

        rank, replicas = self._place
        rows = split.rows if seed is None else split.rows.shuffle(seed=seed, buffer_size=self.hub.shuffle_buffer)
        rows = split_dataset_by_node(rows, rank=rank, world_size=replicas) if replicas > 1 else rows
        transform = self._eval_transform if seed is None else self._train_transform
        decode, share = partial(decode_hub_image, folders=split.folders), self.max_corrupt_share
        return StreamImages(rows, split.columns, decode, transform, share, batch_size, seed, rank, labeled)

    def _eval_loader(self, samples: Samples | HubStream, keep_places: bool = False) -> DataLoader:
        workers, (rank, replicas) = self._workers, self._place
        images: StreamImages | EvalImages
        sampler, batch_size = None, self.eval_batch_size
        if isinstance(samples, HubStream):
            strategy = self.trainer.strategy if self.trainer is not None else None
            if replicas > 1 and isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
                raise UserError(
                    "data.streaming: a sharded model requires the same number of evaluation batches on each process, "
                    "which a stream cannot guarantee; set data.streaming: false, or trainer.strategy: ddp"
                )
            images = self._stream(samples, self.eval_batch_size, seed=None, labeled=not keep_places)
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
        shape = {"sampler": sampler, "batch_size": batch_size, "num_workers": workers}
        return self._create_loader(DataLoader, images, collate_fn=collate_readable, **shape)
