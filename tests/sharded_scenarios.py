"""Fits of a model that is divided among processes, and the same fits on one process; run by test_sharded.py.

Usage: sharded_scenarios.py FOLDER; started with torchrun's environment for several processes, or alone after these.
"""

import errno
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, default_collate

from callbacks import ParameterGrowthCallback, PatchDropSchedule, TrainingMonitor
from lit_tokenformer.checkpoints.checkpoint_io import WholeCheckpointIO
from lit_tokenformer.cli.main import main as command_line
from lit_tokenformer.distributed.checkpoint import save_folder
from lit_tokenformer.distributed.sharding import reshard, shard
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow_one_by_one, shards
from lit_tokenformer.growth.optimizer import grow_optimizer
from lit_tokenformer.models import SCORE_NORMS, Pattention, Tokenformer, TokenformerConfig, param_tokens
from lit_tokenformer.optim import MuonWithAuxAdam
from lit_tokenformer.tasks import LitImageClassifier, LitMultiTask, LRSchedule

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "param_tokens": 8}
FITS = {
    "even": {"growth": {1: 16, 2: 32}},  # no row moves between two processes
    "uneven": {
        "growth": {1: {"qkv": 13, "proj": 11, "ffn": 47}, 2: {"qkv": 26, "proj": 35, "ffn": 50}},
        "steps": {"ramp_steps": 2, "freeze_old_steps": 1, "old_updates": 0.25, "tau_steps": 2},
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.05,
    },
    "axes": {
        "growth": {1: {"hidden": 256, "heads": 4}, 2: {"hidden": 300, "heads": 5}},
        "overrides": {"projection": "linear", "feed_forward": "mlp"},  # a bias of the keys has a gradient of rounding
        "steps": {"ramp_steps": 2, "freeze_old_steps": 1},
    },
    "token axes": {
        "growth": {1: {"qkv": 16, "heads": 4}, 2: {"ffn": 40, "hidden": 150, "heads": 5}},
        "overrides": {"feed_forward": "mlp"},
        "dtype": torch.float64,  # keys of a few heads divide by small norms
    },
    "muon": {
        "growth": {1: {"qkv": 13, "proj": 11, "ffn": 47}, 2: {"qkv": 26, "proj": 35, "ffn": 50}},
        "optimizer": partial(MuonWithAuxAdam, lr=3e-3),
        "dtype": torch.float64,  # Muon rounds to bfloat16, so rounding of float32 would show
    },
    "still": {"growth": {}, "max_epochs": 1},
    "dropout": {
        "growth": {1: 12},
        "patches": {1: 0.25},
        "overrides": {"drop_path": 0.3, "patch_drop_rate": 0.5},
        "max_epochs": 2,
    },
    "tasks": {"growth": {1: 12}, "max_epochs": 2},
}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Gathered(Callback):
    """Keeps all weights and moments at the end of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        reshard(pl_module)
        state = {name: whole(tensor) for name, tensor in pl_module.state_dict(keep_vars=True).items()}
        (optimizer,) = trainer.optimizers
        for name, parameter in pl_module.named_parameters():
            for key, value in optimizer.state[parameter].items():
                state[f"{name}.{key}"] = whole(value)
        self.epochs.append({**state, "lr": torch.tensor(optimizer.param_groups[0]["lr"])})


def both_tasks(samples):
    image, label = default_collate(samples)
    return {"digit": (image, label), "parity": (image, label % 2)}


def fit(folder, name, data=1, tokens=1, folders=None, ckpt_path=None):
    """A fit of 4 epochs of 6 global batches.

    Args:
        folder: Where its checkpoints go, one for each epoch.
        name: A key of FITS.
        data: Data-parallel processes.
        tokens: Tensor-parallel processes.
        folders: Whether checkpoints are folders; None: Lightning's strategy for one device.
        ckpt_path: What it resumes from.
    """
    seed_everything(0)
    settings = dict(FITS[name])
    dtype = settings.pop("dtype", torch.float32)
    torch.set_default_dtype(dtype)
    given = {"overrides": {**SIZES, **settings.pop("overrides", {})}, "schedule": LRSchedule("cosine", min_factor=0.1)}
    if "optimizer" in settings:
        given["optimizer"] = settings.pop("optimizer")
    make, collate = partial(LitImageClassifier, num_classes=10, image_size=8), default_collate
    if name == "tasks":
        make = partial(LitMultiTask, tasks={"digit": make, "parity": partial(make, num_classes=2)})
        collate = both_tasks
    task = make("tokenformer_vit_tiny_patch16_224", **given)
    generator = torch.Generator().manual_seed(1)
    images, labels = (
        torch.randn(96, 3, 8, 8, generator=generator, dtype=torch.float32),
        torch.randint(10, (96,), generator=generator),
    )
    torch.set_default_dtype(torch.float32)
    samples = TensorDataset(images.to(dtype), labels)
    sampler = DistributedSampler(samples, num_replicas=data, rank=RANK // tokens, shuffle=False)
    strategy = "auto"
    if folders is not None:
        strategy = ModelParallelStrategy(data, tokens, folders, process_group_backend="gloo")
    gathered, growth = Gathered(), ParameterGrowthCallback(settings.pop("growth"), **settings.pop("steps", {}))
    patches = [PatchDropSchedule(settings.pop("patches"))] if "patches" in settings else []
    keep = ModelCheckpoint(folder, "end{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    trainer = Trainer(
        **{"max_epochs": 4, **settings},
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy,
        plugins=[WholeCheckpointIO()],
        logger=CSVLogger(folder, name=None, version=""),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[growth, *patches, gathered, keep, TrainingMonitor(log_images=0)],
        use_distributed_sampler=False,
    )
    loader = DataLoader(samples, 16 // data, sampler=sampler, collate_fn=collate)
    trainer.fit(task, loader, ckpt_path=ckpt_path, weights_only=True)
    found = {"epochs": gathered.epochs, "events": len(growth.events), "step": trainer.global_step}
    if (
        folders is not None and ckpt_path is not None and name != "tasks"
    ):  # another trainer takes the model, divided as it is
        strategy = ModelParallelStrategy(data, tokens, folders, process_group_backend="gloo")
        other = Trainer(
            accelerator="cpu", devices=WORLD, strategy=strategy, logger=False, use_distributed_sampler=False
        )
        other.validate(task, loader, ckpt_path=ckpt_path, weights_only=True, verbose=False)
        found["sizes of the checkpoint"] = param_tokens(task)
    return found


def several(folders=None):
    """Weights of two tasks that share their blocks after 3 optimizer steps of 8 samples.

    Args:
        folders: As of :func:`fit`; divided, each process takes 2 samples at once, in 2 micro-batches.
    """
    seed_everything(0)
    task = LitMultiTask(
        "tokenformer_lm_tiny",
        **{"num_classes": 10, "image_size": 8, "vocab_size": 17, "context_length": 6},
        overrides={"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8, "rotary_fraction": 0.5},
        image={"patch_size": 4},
        schedule=LRSchedule("constant"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    )
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number in range(24):  # of texts, another number of tokens has a label in each
        tokens = torch.randint(17, (7,), generator=generator).where(torch.arange(7) <= 1 + number % 6, -100)
        image = torch.randn(3, 8, 8, generator=generator), torch.tensor(number % 10)
        samples.append({"image": image, "text": tokens})
    divided = folders is not None
    size = 2 if divided else 8
    batches = [[*range(start, start + size)] for start in range(size * RANK, 24, size * WORLD)]
    task.setup = lambda stage: None
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=ModelParallelStrategy(WORLD, 1, folders, process_group_backend="gloo") if divided else "auto",
        max_epochs=1,
        accumulate_grad_batches=2 if divided else 1,
        gradient_clip_val=0.3,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(task, DataLoader(samples, batch_sampler=batches))
    reshard(task)
    return {"step": trainer.global_step, "epochs": [{name: whole(one) for name, one in task.named_parameters()}]}


def unknown_torch(folder):
    """What a fit says, growing and not, under a torch that makes sharded parameters in another way."""
    made_of, shards._MADE_OF = shards._MADE_OF, (*shards._MADE_OF, "something_new")
    found = {}
    for name in ("still", "dropout"):
        try:
            found[name] = str(fit(folder / name, name, folders=True)["step"])
        except UserError as error:
            found[name] = str(error)
    shards._MADE_OF = made_of
    return found


def divided_tokens():
    """Worst difference of outputs and gradients of one Pattention layer, divided and not, and its collectives."""
    mesh, found = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data_parallel", "tensor_parallel")), {}
    for norm in SCORE_NORMS:
        torch.manual_seed(0)
        layer = Pattention(6, 5, num_tokens=7, score_norm=norm, key_std=1.0, value_std=1.0)
        series = Pattention(5, 6, num_tokens=9, score_norm=norm, series=1 if norm == "softmax" else 3)
        x, target = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
        plain = nn.Sequential(layer, series).double()
        states = []
        for divided in (False, True):
            model = plain
            if divided:
                model = nn.Sequential(
                    Pattention(6, 5, num_tokens=7, score_norm=norm),
                    Pattention(5, 6, num_tokens=9, score_norm=norm, series=series.series),
                ).double()
                model.load_state_dict({name: tensor.detach().clone() for name, tensor in plain.state_dict().items()})
                shard(model, mesh, ())
            given = x.clone().requires_grad_()
            with CommDebugMode() as counted, torch.no_grad():
                model(given)
            reshard(model)
            out = model(given)
            ((out - target) ** 2).sum().backward()
            gradients = [whole(parameter.grad) for parameter in model.parameters()]
            states.append([out.detach(), given.grad, *gradients])
        found[norm] = {
            "difference": max(float((a - b).abs().max()) for a, b in zip(*states, strict=True)),
            "all_reduces": sum(n for name, n in counted.get_comm_counts().items() if "all_reduce" in str(name)),
        }
    return found


def folders(place):
    """What became of folders that were saved over others, over links and on full disks."""

    def save(checkpoint, path):
        if RANK == 0:
            path.mkdir()
        torch.distributed.barrier()
        (path / str(RANK)).write_text(checkpoint["text"])
        if checkpoint.get("fails") == RANK:
            raise checkpoint["error"]

    io = WholeCheckpointIO()
    strategy = SimpleNamespace(
        broadcast=lambda path: path, is_global_zero=RANK == 0, world_size=WORLD, checkpoint_io=io
    )
    found, target = {}, place / "last.ckpt"
    if RANK == 0:
        place.mkdir()
        (place / "best.ckpt").mkdir()
        (place / "old.ckpt.part").mkdir()
        target.symlink_to("best.ckpt")
    torch.distributed.barrier()
    full, other = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError("no such luck")
    for number, more in enumerate([{}, {}, {"fails": 1, "error": full}, {"fails": 0, "error": other}]):
        told = ""
        try:
            save_folder(strategy, save, {"text": f"{number}", **more}, target)
        except OSError as error:
            told = str(error).replace(str(place), "")
        torch.distributed.barrier()
        files = sorted(path.name for path in place.iterdir())
        found[number] = [told, io.unsaved is not None, [(target / str(rank)).read_text() for rank in (0, 1)], files]
    return found


def growth_memory(method):
    """Peak resident bytes of this process beyond what it had without a model, and what it may have, in a growth."""

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    config = TokenformerConfig(
        dim=256, depth=4, num_heads=4, image_size=8, patch_size=4, param_tokens={"qkv": 64, "proj": 64, "ffn": 8192}
    )
    before = resident("VmRSS")
    model = Tokenformer(config)
    shard(model, mesh, ())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for one in grow_one_by_one(model, {"ffn": 16384}, method):
        grow_optimizer(optimizer, [one])
        del one
    peak = resident("VmHWM") - before
    local = sum(parameter.to_local().nbytes for parameter in model.parameters())
    layer = 2 * 16384 * config.dim * 4
    return {"peak": peak, "allowed": 3 * local + 2 * layer, "final": 3 * local, "layer": layer}


def fsdp2(folder, max_epochs, *more):
    """Status of a fit of two steps each epoch on the command line, which grows after the first."""
    folder.mkdir(exist_ok=True)
    config = folder / f"config{RANK}.yaml"
    growth = {"class_path": "callbacks.ParameterGrowthCallback", "init_args": {"schedule": {1: 16}}}
    last = {"filename": "last", "enable_version_counter": False}
    saves = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": last}
    trainer = {"strategy": "fsdp2", "accelerator": "cpu", "devices": WORLD, "max_epochs": max_epochs}
    trainer |= {"callbacks": [growth, saves], "enable_progress_bar": False, "default_root_dir": str(folder)}
    model = {"overrides": {**SIZES, "patch_size": 2}, "schedule": {"name": "constant"}}
    data = {"dataset": "digits", "batch_size": 8, "num_workers": 0}
    content = {
        "trainer": {**trainer, "limit_train_batches": 2, "limit_val_batches": 1},
        "model": {"class_path": "LitImageClassifier", "init_args": model},
        "data": {"class_path": "ImageDataModule", "init_args": data},
    }
    config.write_text(yaml.safe_dump(content))
    return command_line(["fit", "--config", str(config), *more])


def main(folder):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = {}
    if WORLD > 1:
        found["even"] = fit(folder / "even", "even", data=WORLD, folders=False)
        found["uneven"] = fit(folder / "uneven", "uneven", data=WORLD, folders=True)
        found["tokens"] = fit(folder / "tokens", "uneven", tokens=WORLD, folders=True)
        found["dropout"] = fit(folder / "dropout", "dropout", tokens=WORLD, folders=False)
        for name in ("axes", "tasks", "muon"):
            found[name] = fit(folder / name, name, data=WORLD, folders=True)
        found["token axes"] = fit(folder / "token axes", "token axes", tokens=WORLD, folders=True)
        for name in ("even/end1", "uneven/end1", "uneven/end0", "axes/end1", "axes/end0", "tasks/end0", "muon/end1"):
            name, path = name.split("/")[0], f"{name}.ckpt"
            found[f"{path} again"] = fit(folder / "more", name, WORLD, folders=True, ckpt_path=folder / path)
        path = folder / "tokens/end1.ckpt"
        found["tokens as data"] = fit(folder / "more", "uneven", WORLD, folders=False, ckpt_path=path)
        found["fsdp2"] = [
            fsdp2(folder / "fsdp2", 3),
            fsdp2(folder / "fsdp2-stopped", 2),
            fsdp2(folder / "fsdp2-stopped", 3, "--ckpt_path", "last"),
        ]
        found["several"] = several(folders=True)
        found["layers"] = divided_tokens()
        found["folders"] = folders(folder / "folders")
        found["memory"] = {method: growth_memory(method) for method in ("split", "zero_keys")}
    else:
        found["several"] = several()
        found["unknown torch"] = unknown_torch(folder / "unknown")
        found["dropout"] = fit(folder / "one-dropout", "dropout", folders=True)  # on a mesh, for it draws other numbers
        for name in ("axes", "token axes", "tasks", "muon"):
            found[name] = fit(folder / f"one-{name}", name)
        for name in ("even", "uneven"):
            found[name] = fit(folder / f"one-{name}", name)
            path = folder / name / "end1.ckpt"
            found[f"{name} from several"] = fit(folder / "more-one", name, ckpt_path=path)
            found[f"{name} on a mesh of one"] = fit(folder / "more-one", name, folders=True, ckpt_path=path)
    torch.save(found, folder / f"found-{WORLD}-{RANK}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
