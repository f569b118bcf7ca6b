"""Fits with two growths, for one process or several; ``test_ddp.py`` runs it, since starting processes costs seconds.

    torchrun --standalone --nproc_per_node 2 ddp_scenarios.py FOLDER

runs every scenario and saves what it found as ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from callbacks import GrowingEMA, NestedSizes, ParameterGrowthCallback, PatchDropSchedule
from lit_tokenformer.data import ImageDataModule, TextDataModule
from lit_tokenformer.data.images.datasets import StreamImages
from lit_tokenformer.data.resumable import ResumableStreamLoader
from lit_tokenformer.optim import MuonWithAuxAdam
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMultiTask, LitVisionLanguage, LRSchedule
from lit_tokenformer.tasks.base import LitTask
from lit_tokenformer.tasks.initialization import initialize_from

SIZES = {"dim": 16, "depth": 1, "num_heads": 2, "param_tokens": 8}
SAMPLES, BATCH, EPOCHS = 32, 8, 3
"""Four batches of eight samples of all processes in an epoch."""
optimizer = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.05)


class OneTaskAStep(LitMultiTask):
    """Trains on one of the tasks in each step, so that the other one's own parameters have no gradient."""

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> torch.Tensor:
        name = ("image", "text")[batch_idx % 2]
        return self.tasks[name].training_step(batch[name], batch_idx)


def image_task(num_classes: int = 10, **overrides: Any) -> LitTask:
    return LitImageClassifier(
        "tokenformer_vit_tiny_patch16_224",
        num_classes=num_classes,
        image_size=8,
        overrides={**SIZES, "patch_size": 4, **overrides},
        schedule=LRSchedule("constant"),
        optimizer=optimizer,
    )


def compiled_task() -> LitTask:
    task = image_task()
    task.backbone.compile(backend="eager", dynamic=False)
    return task


def muon_task() -> LitTask:
    task = image_task()
    task.make_optimizer = partial(MuonWithAuxAdam, lr=3e-3, weight_decay=0.05)
    return task


def several_tasks(kind: type[LitMultiTask] = OneTaskAStep) -> LitTask:
    return kind(
        "tokenformer_lm_tiny",
        num_classes=10,
        image_size=8,
        vocab_size=17,
        context_length=6,
        overrides=SIZES,
        image={"patch_size": 4},
        loss_weights={"image": 1.0, "text": 1.0},
        schedule=LRSchedule("constant"),
        optimizer=optimizer,
    )


def language_task() -> LitTask:
    return LitCausalLM(
        "tokenformer_lm_tiny", 17, 6, overrides=SIZES, schedule=LRSchedule("constant"), optimizer=optimizer
    )


def vision_language_task() -> LitTask:
    settings = {"schedule": LRSchedule("constant"), "optimizer": optimizer, "image_tokens": 8}
    sizes = {"vocab_size": 17, "context_length": 6, "image_size": 8}
    return LitVisionLanguage("tokenformer_lm_tiny", **sizes, overrides={**SIZES, "patch_size": 4}, **settings)


class Samples(Dataset):
    """Noise with labels, and random tokens, another number of them in each sample."""

    def __init__(self, task: LitTask) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
        self.labels = torch.randint(10, (SAMPLES,), generator=generator)
        tokens = torch.randint(17, (SAMPLES, 7), generator=generator)
        self.tokens = tokens.where(torch.arange(7) <= torch.randint(1, 7, (SAMPLES, 1), generator=generator), -100)
        self.task = task

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        image = self.images[index], self.labels[index]
        if isinstance(self.task, LitMultiTask):
            return {"image": image, "text": self.tokens[index]}
        if isinstance(self.task, LitVisionLanguage):
            tokens = self.tokens[index]
            return {"image": image[0], "tokens": tokens[:-1].clamp_min(0), "labels": tokens[1:]}
        return self.tokens[index] if isinstance(self.task, LitCausalLM) else image


class HookedDDP(DDPStrategy):
    """Lightning registers communication hooks on CUDA only."""

    def _register_ddp_hooks(self) -> None:
        _register_ddp_comm_hook(self.model, self._ddp_comm_state, self._ddp_comm_hook, self._ddp_comm_wrapper)


@dataclass(frozen=True)
class Scenario:
    """A fit that grows, and how it differs from the plainest one.

    Args:
        growth: Arguments of the growth callback.
        ddp: Settings of DDP.
        hook: A communication hook.
        state: Makes the hook's state.
        trainer: Arguments of the trainer.
        task: Makes the task.
        callbacks: Make the other callbacks.
        like: The scenario that must give one process the same weights; None where rounding differs too much.
        resumed: Whether it is also resumed from the end of its second epoch.
    """

    growth: dict[str, Any] = field(default_factory=lambda: {"schedule": {1: 16, 2: 32}})
    ddp: dict[str, Any] = field(default_factory=dict)
    hook: Callable[..., Any] | None = None
    state: Callable[[], Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    task: Callable[[], LitTask] = image_task
    callbacks: Sequence[Callable[[], Callback]] = ()
    like: str | None = None
    resumed: bool = False


AVERAGED = partial(GrowingEMA, decay=0.9)
BY_STEP = {"schedule": {2: 16, 5: 24}, "unit": "step", "method": "zero_keys"}
POWER_SGD = partial(powerSGD_hook.PowerSGDState, None, start_powerSGD_iter=2, min_compression_rate=0)
SCENARIOS = {
    "split": Scenario(like="split"),
    "zero_keys_accumulated": Scenario(
        {"schedule": {1: 16, 2: 20}, "method": "zero_keys"},
        trainer={"accumulate_grad_batches": 2},
        like="zero_keys_accumulated",
    ),
    "by_step_accumulated_clipped": Scenario(
        BY_STEP,
        ddp={"gradient_as_bucket_view": True},
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 4},
        like="by_step_accumulated_clipped",
    ),
    "ramped_averaged": Scenario(
        {**BY_STEP, "ramp_steps": 3, "rewarm_steps": 2, "tau_steps": 2, "freeze_old_steps": 1},
        ddp={"init_sync": False},  # new rows are equal by themselves
        callbacks=[AVERAGED],
        like="ramped_averaged",
    ),
    # not with accumulated gradients: https://github.com/pytorch/pytorch/issues/143580
    "static_graph": Scenario(ddp={"static_graph": True, "gradient_as_bucket_view": True}, like="split"),
    "unused": Scenario(
        task=several_tasks, ddp={"find_unused_parameters": True, "gradient_as_bucket_view": True}, like="unused"
    ),
    "ragged": Scenario(task=language_task, like="ragged", resumed=True),
    "ragged_accumulated": Scenario(
        task=language_task, trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, like="ragged_accumulated"
    ),
    "vision_language": Scenario(task=vision_language_task, like="vision_language", resumed=True),
    "several_tasks_accumulated": Scenario(
        task=partial(several_tasks, LitMultiTask),
        ddp={"gradient_as_bucket_view": True},
        trainer={"accumulate_grad_batches": 2},
        like="several_tasks_accumulated",
    ),
    "compiled": Scenario(task=compiled_task, like="split"),
    "power_sgd": Scenario(hook=powerSGD_hook.powerSGD_hook, state=partial(POWER_SGD, 64), like="split"),
    "power_sgd_lossy": Scenario(hook=powerSGD_hook.powerSGD_hook, state=partial(POWER_SGD, 2)),
    "bf16_mixed": Scenario(trainer={"precision": "bf16-mixed"}, callbacks=[AVERAGED], resumed=True),
    "triggered": Scenario(  # by a loss that differs between the processes; the second epoch ends within a window
        {"schedule": {2: 16, 5: 24}, "unit": "step", "trigger": "plateau"}
        | {"window": 3, "patience": 1, "min_delta": 0.05, "cooldown": 0},
        trainer={"max_epochs": 4},
        like="triggered",
        resumed=True,
    ),
    "deepened": Scenario(
        {"schedule": {1: {"depth": 3}, 2: {"depth": 5, "qkv": 16}}}, callbacks=[AVERAGED], like="deepened", resumed=True
    ),
    "axes": Scenario(
        {"schedule": {1: {"hidden": 128, "heads": 4}, 2: {"hidden": 150, "heads": 5}}, "ramp_steps": 3},
        task=partial(image_task, projection="linear", feed_forward="mlp", bias=True),
        callbacks=[AVERAGED],
        like="axes",
        resumed=True,
    ),
    "axes_of_tokens": Scenario(
        {"schedule": {1: {"qkv": 16, "heads": 4}, 2: {"ffn": 40, "hidden": 96}}, "freeze_old_steps": 1},
        task=partial(image_task, feed_forward="mlp"),
        like="axes_of_tokens",
    ),
    "muon": Scenario(
        task=muon_task, callbacks=[AVERAGED], trainer={"accumulate_grad_batches": 2}, like="muon", resumed=True
    ),
    "fewer_patches": Scenario(  # each process leaves out others
        task=partial(image_task, patch_drop_rate=0.5),
        callbacks=[partial(PatchDropSchedule, {1: 0.25, 2: 0.0})],
        resumed=True,
    ),
    "nested": Scenario(  # each process ranks the units by its own batch
        callbacks=[partial(NestedSizes, [0.25, 0.5], distill=0.5), AVERAGED], like="nested", resumed=True
    ),
    "nothing_averaged": Scenario(hook=noop_hook),
}


class Witness(Callback):
    """Compares weights and moments of the processes before each batch and after each growth."""

    def __init__(self) -> None:
        self.differences: list[float] = []
        self.steps: list[int] = []
        self.wrappers: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._compare(trainer, pl_module)
        if not self.wrappers or self.wrappers[-1]() is not trainer.strategy.model:
            self.wrappers.append(weakref.ref(trainer.strategy.model))

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        self._compare(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare(trainer, pl_module)

    def _compare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = [*pl_module.state_dict().values(), *(m for s in moments(trainer, pl_module).values() for m in s.values())]
        flat = torch.cat([tensor.detach().double().flatten() for tensor in own])
        others = [torch.empty_like(flat) for _ in range(trainer.world_size)]
        if trainer.world_size > 1:
            dist.all_gather(others, flat)
            self.differences.append(max(float((flat - other).abs().max()) for other in others))


def moments(trainer: Trainer, task: LightningModule) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's state by the parameters' names."""
    return {name: dict(trainer.optimizers[0].state[parameter]) for name, parameter in task.named_parameters()}


def run(name: str, folder: Path, devices: int, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Fits once.

    Args:
        name: Of the scenario.
        folder: Where checkpoints go.
        devices: Number of processes; this is one of them.
        ckpt_path: What to resume from.

    Returns:
        Weights, moments, growths, differences between the processes, and calls of the hook by epoch.
    """
    scenario, rank = SCENARIOS[name], int(os.environ.get("LOCAL_RANK", 0))
    seed_everything(rank)  # what one process draws differs from what another does
    torch._dynamo.reset()
    calls = [0] * EPOCHS

    def counted(state: Any, bucket: Any) -> Any:
        calls[trainer.current_epoch] += 1
        return scenario.hook(state, bucket) if scenario.hook is not None else None

    hook: dict[str, Any] = {}
    if scenario.hook is not None:
        hook["ddp_comm_hook"] = wraps(scenario.hook)(counted)  # DDP looks at its annotations
    if scenario.state is not None:
        hook["ddp_comm_state"] = scenario.state()
    strategy: Any = "auto"
    if devices > 1:
        strategy = HookedDDP(process_group_backend="gloo", **scenario.ddp, **hook)
    growth, witness = ParameterGrowthCallback(**scenario.growth), Witness()
    callbacks: list[Callback] = [witness, growth, *(make() for make in scenario.callbacks)]
    if scenario.resumed:
        callbacks.append(ModelCheckpoint(folder / name, "end{epoch}", save_top_k=-1, auto_insert_metric_name=False))
    settings = {"precision": "64-true", "max_epochs": EPOCHS, **scenario.trainer}
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_checkpointing=scenario.resumed,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **settings,
    )
    torch.manual_seed(0)
    task = scenario.task()
    if settings["precision"] == "64-true":
        task.double()  # Lightning does it later, and an average would stay as it was
    data = Samples(task)
    sampler: DistributedSampler = DistributedSampler(data, devices, rank if devices > 1 else 0, shuffle=False)
    trainer.fit(task, DataLoader(data, BATCH // devices, sampler=sampler), ckpt_path=ckpt_path, weights_only=True)
    return {
        "weights": dict(task.state_dict()),
        "moments": moments(trainer, task),
        "growths": [(event["epoch"], event["step"], event["after"]) for event in growth.events],
        "output_differences": [event["output_difference"] for event in growth.events],
        "differences": witness.differences,
        "old_wrappers_alive": sum(wrapper() is not None for wrapper in witness.wrappers[:-1]),
        "hook_calls": calls,
    }


class FirstWeights(Callback):
    """Keeps the weights with which a fit starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


def initialized(path: Path, devices: int) -> dict[str, torch.Tensor]:
    """The first weights of a fit that starts from a grown checkpoint and has another number of classes.

    Args:
        path: The checkpoint.
        devices: Number of processes; this is one of them.
    """
    seed_everything(int(os.environ.get("LOCAL_RANK", 0)))  # each process draws another head
    task, first = image_task(num_classes=12), FirstWeights()
    initialize_from(task, path)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[first],
    )
    trainer.fit(task, DataLoader(Samples(task), BATCH))
    return first.weights


def scores(folder: Path, devices: int) -> dict[str, float]:
    """Scores of text and images that two processes do not share evenly.

    Args:
        folder: Where this process keeps the data.
        devices: Number of processes; this is one of them.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / ("train", "val")[number > 1] / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "a.txt").write_text("An odd number of tokens, in blocks that two do not share evenly")
    text = TextDataModule("files", val_files=[f"{folder}/a.txt"], block_size=16, batch_size=2, cache_dir=str(folder))
    images = ImageDataModule("imagefolder", str(folder), image_size=8, batch_size=2, num_workers=0)
    torch.manual_seed(0)
    language = LitCausalLM("tokenformer_lm_tiny", vocab_size=257, context_length=16, overrides=SIZES)
    found: dict[str, float] = {}
    for task, data in ((language, text), (image_task(num_classes=2), images)):
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
            logger=False,
            enable_progress_bar=False,
        )
        (part,) = trainer.validate(task, datamodule=data, verbose=False)
        found |= {f"{type(data).__name__} {name}": score for name, score in part.items()}
    return found


def shards(sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Grey images, each of another shade."""
    for size in sizes:
        for number in range(size):
            yield {"image": size * 10 + number, "label": 0}


def stream(rank: int, devices: int) -> dict[str, Any]:
    """How many batches this process has of a stream whose shards differ in size, and whether it can go on in it."""
    rows = datasets.IterableDataset.from_generator(shards, gen_kwargs={"sizes": [6, 14]})
    rows = split_dataset_by_node(rows, rank=rank, world_size=devices)

    def loader() -> ResumableStreamLoader:
        transform = partial(torch.full, (1,))
        images = StreamImages(rows, ("image", "label"), lambda shade: shade, transform, 0, 2, seed=0, rank=rank)
        made = ResumableStreamLoader(images, batch_size=2, drop_last=True)
        made.rank, made.replicas = rank, devices
        return made

    whole, seen, states = loader(), [], []
    for image, _ in whole:
        seen.append(image.tolist())
        states.append(whole.state_dict())
    resumed = loader()
    resumed.load_state_dict(states[0])
    return {"batches": len(seen), "resumed": [image.tolist() for image, _ in resumed] == seen[1:]}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    devices, rank = int(os.environ["WORLD_SIZE"]), os.environ["LOCAL_RANK"]
    found = {name: run(name, folder, devices) for name in sys.argv[2:] or SCENARIOS}
    for name in [name for name in found if SCENARIOS[name].resumed]:
        found[f"{name}_resumed"] = run(name, folder / "again", devices, folder / name / "end1.ckpt")
    found["initialized"] = initialized(folder / "deepened" / "end1.ckpt", devices)
    found |= {"scores": scores(folder / rank, devices), "stream": stream(int(rank), devices)}
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
