"""The command line: LightningCLI over the tasks, with our own commands beside its own."""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lit_tokenformer import models, tasks
from lit_tokenformer.checkpoint_io import WholeCheckpointIO, last_checkpoint
from lit_tokenformer.checkpoints import read_checkpoint
from lit_tokenformer.commands import (
    evaluate_checkpoint,
    export_weights,
    generate_text,
    grow_checkpoint,
    import_weights,
    split_checkpoint,
)
from lit_tokenformer.compute import Stage, model_cost, plan_stages
from lit_tokenformer.errors import unknown_name
from lit_tokenformer.tasks.multitask import joint_cost
from lit_tokenformer.trainer import CheckpointingTrainer

try:
    from callbacks import ErrorLog, ParameterGrowthCallback, PredictionWriter, PreemptionCheckpoint
except ImportError as error:
    raise ImportError(
        f"another package named 'callbacks' hides ours: {sys.modules.get('callbacks', 'none is installed')}; "
        "run from another folder or with `python -P`, or uninstall it"
    ) from error

from lit_tokenformer.beginning import (
    Beginning,
    check_data_fit,
    check_environment,
    check_optimizer,
    check_processes,
    check_trainer_settings,
    trainer_error,
)
from lit_tokenformer.parsing import Parser, check_config, one_line

COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate_text,
    "evaluate": evaluate_checkpoint,
    "grow": grow_checkpoint,
    "split": split_checkpoint,
    "import": import_weights,
    "export": export_weights,
}
"""Commands that take neither model nor data from a config."""

TEXTS = {
    "prompt": "A text to go on from; repeat the option for several at once. Without, a new document is written.",
    "stop": "A text that ends what is written where it appears; repeat the option for several.",
}
"""Options of commands that are taken as they are written, be it ``[x]`` or ``a: b``, and can be repeated."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Arguments after the program's name; ``None`` takes those of the process.

    Returns:
        0, 2 after an error in what the user gave, which is told in one line, or 143 after SIGTERM or SIGUSR1.
    """
    # torch warns Lightning, not whoever uses it
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    beginning = Beginning()
    try:
        arguments = [*_with_shipped_configs(sys.argv[1:] if args is None else list(args))]
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        TokenformerCLI(
            LightningModule,
            LightningDataModule,
            trainer_class=PlanningTrainer,
            trainer_defaults={"callbacks": [beginning, PreemptionCheckpoint(), ErrorLog()]},
            seed_everything_default=0,
            save_config_callback=_SaveConfig,
            parser_class=Parser,
            parser_kwargs={
                "prog": "lit-tokenformer",
                "description": "Trains models that grow while they train.",
                "parser_mode": "omegaconf",
                "default_env": True,
                "env_prefix": "LIT_TOKENFORMER",
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=arguments,
        )
    except SIGTERMException:
        return 128 + signal.SIGTERM  # as of a process that the signal ended; the checkpoint is written
    except (ValueError, OSError, MisconfigurationException) as error:
        if beginning.over or os.environ.get("LIT_TOKENFORMER_TRACEBACK"):
            raise
        beginning.take_back()
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    finally:
        beginning.show_messages()
    return 0


class _SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into a run's log folder; without a logger there is none, and nothing is written."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class PlanningTrainer(CheckpointingTrainer):
    """Lightning's trainer, which can also say what a fit would cost."""

    def plan(self, model: tasks.LitTask, datamodule: LightningDataModule | None = None) -> list[Stage]:
        """Shows what each stage of a fit costs, before it is run.

        Args:
            model: The task, at the size it is born with.
            datamodule: Its data; what is read of them is the number of training samples.

        Returns:
            The stages, which are printed too.

        Raises:
            ValueError: If the number of steps cannot be told.
        """
        from rich.console import Console
        from rich.table import Table

        samples = getattr(datamodule, "num_train_samples", None)
        batch = getattr(datamodule, "batch_size", 1)
        batches = {
            name: getattr(getattr(datamodule, name) if name else datamodule, "batch_size", 1)
            for name in model.backbones
        }
        per_step = {name: size * self.accumulate_grad_batches * self.world_size for name, size in batches.items()}
        per_epoch = (
            None if samples is None else -(-(samples // (batch * self.world_size)) // self.accumulate_grad_batches)
        )
        total = self.max_steps if self.max_steps >= 0 else 0
        if per_epoch is not None and (self.max_epochs or 0) > 0:
            by_epochs = per_epoch * (self.max_epochs or 0)
            total = min(total, by_epochs) if total else by_epochs
        if not total:
            raise ValueError("trainer.max_steps: the length of the fit is not known; set max_steps, or max_epochs")
        growths, born = [], models.param_tokens(model)
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ParameterGrowthCallback):
                if callback.unit == "epoch" and per_epoch is None:
                    raise ValueError("schedule: epochs of a stream have no known length; use unit: step")
                scale = per_epoch or 1 if callback.unit == "epoch" else 1
                growths += [(k, k * scale, tokens) for k, tokens in callback.stages(born)]
        backbones = model.backbones.items()
        planned = [plan_stages(backbone.config, growths, total, per_step[name]) for name, backbone in backbones]
        by_stage = [list(parts) for parts in zip(*planned, strict=True)]
        stages = [_together(model, by_stage[0], parts) for parts in by_stage]
        memory = [
            f"{_training_memory(stage, parts, batches.values()) / 2**30:.2f} GiB"
            for stage, parts in zip(stages, by_stage, strict=True)
        ]
        sum_flops = sum(stage.training_flops for stage in stages)
        scratch = sum(
            model_cost(backbone.config, stages[-1].tokens).training_flops * per_step[name] * total
            for name, backbone in backbones
        )

        told = " and ".join(f"{count} {name}".strip() for name, count in per_step.items())
        table = Table(title=f"{total} optimizer steps of {told} samples")
        for name in ("stage", "tokens", "steps", "epochs", "parameters", "FLOPs/sample", "memory", "FLOPs", "share"):
            table.add_column(name, justify="right")
        for number, stage in enumerate(stages):
            table.add_row(
                str(number),
                ", ".join(f"{kind} {n}" for kind, n in stage.tokens.items() if kind in born) or "-",
                f"{stage.steps}",
                "-" if per_epoch is None else f"{stage.steps / per_epoch:.3g}",
                f"{stage.cost.parameters:,}",
                f"{stage.cost.flops:.3g}",
                memory[number],
                f"{stage.training_flops:.3g}",
                f"{stage.training_flops / sum_flops:.1%}",
            )
        last = stages[-1].cost
        table.add_section()
        table.add_row(
            "all", "", str(total), "", "", "", "", f"{sum_flops:.3g}", f"{sum_flops / scratch:.1%} of scratch"
        )
        table.add_row(
            "scratch",
            "the final size from the start",
            str(total),
            "",
            f"{last.parameters:,}",
            f"{last.flops:.3g}",
            memory[-1],
            f"{scratch:.3g}",
            "",
        )
        Console(width=None if sys.stdout.isatty() else 150).print(table)
        return stages


def _together(model: tasks.LitTask, first: list[Stage], parts: list[Stage]) -> Stage:
    """One stage of all tasks of a model; its cost is of one sample of each, parameters that they share counted once.

    Args:
        model: The task at the size it is born with.
        first: Its first stage, for each task.
        parts: The stage, for each task.
    """
    born = sum(parameter.numel() for parameter in model.parameters())
    grown = parts[0].cost.parameters - first[0].cost.parameters
    cost = joint_cost((part.cost for part in parts), born + grown)
    return dataclasses.replace(parts[0], cost=cost, training_flops=sum(part.training_flops for part in parts))


def _training_memory(stage: Stage, parts: list[Stage], batches: Iterable[int]) -> int:
    """Bytes that a stage takes with a batch of this size for each task."""
    kept = [
        part.cost.training_memory(batch) - part.cost.training_memory(0)
        for part, batch in zip(parts, batches, strict=True)
    ]
    return stage.cost.training_memory(0) + sum(kept)


class TokenformerCLI(LightningCLI):
    """LightningCLI with sizes that reach the model from the data, and checkpoints that are looked at before work."""

    def __init__(self, *settings: Any, args: list[str], **more: Any) -> None:
        named = args[0] if args else None
        self._asked = named if named in {*self.subcommands(), *COMMANDS, "-h", "--help"} else None
        super().__init__(*settings, args=args, **more)  # type: ignore[misc]

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Only the command that is asked for gets its options; those of all take a second."""
        if self._asked in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only"},
            "predict": {"model", "dataloaders", "datamodule", "weights_only", "return_predictions"},
            "plan": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("num_classes", "image_size", "vocab_size", "context_length", "separator_id"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        self._subcommand_parsers["predict"].add_argument(
            "--output",
            type=str | None,
            help="CSV file for the predictions; by default predictions.csv in the log folder.",
        )
        for name, function in COMMANDS.items():
            own = Parser(description=(function.__doc__ or "").splitlines()[0])
            texts = TEXTS.keys() & inspect.signature(function).parameters
            own.add_function_arguments(function, skip={*texts})
            for text in sorted(texts):
                own.add_argument(f"--{text}", action="append", help=TEXTS[text])
            parser._subcommands_action.add_subcommand(name, own, help=own.description)  # type: ignore[union-attr]

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ValueError(f"seed_everything: {error}") from None

    def before_instantiate_classes(self) -> None:
        check_environment(os.environ)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        check_trainer_settings(config)
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
            raise trainer_error(error, config) from None
        check_processes(os.environ, trainer)
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        name = self.config["subcommand"]
        if name in COMMANDS:
            COMMANDS[name](**self.config[name].as_dict())
            sys.exit(0)

    def _parse_ckpt_path(self) -> None:
        """The config decides what the model is; a checkpoint only has to be whole and safe."""
        config = self.config[self.config["subcommand"]]
        path = config.get("ckpt_path")
        if path == "last" and (found := last_checkpoint(config["trainer"].get("default_root_dir"))):
            config["ckpt_path"] = path = str(found)
        if path == "best" or (path == "last" and self.config["subcommand"] != "fit"):
            folder = config["trainer"].get("default_root_dir") or "."
            raise ValueError(f"ckpt_path: there is no {path} checkpoint below {folder}; name a file")
        if path and path not in ("best", "last", "hpc") and not Path(path).is_dir():
            read_checkpoint(path, map_location="meta")

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        if self.subcommand == "plan":  # shapes are all it needs
            self.parser.add_instantiator(_without_weights, LightningModule, subclasses=True, prepend=True)

    def after_instantiate_classes(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Beginning):
                callback.remember_folders(self.trainer)
        check_data_fit(self.model, self.datamodule)
        if self.subcommand == "fit" and isinstance(self.model, tasks.LitTask):
            check_optimizer(self.model)
        if self.subcommand in ("fit", "predict"):
            _check_writable(self.trainer.default_root_dir)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else the user chose, or the strategy
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Beginning):
                callback.show_messages_soon(self.trainer)

    def before_predict(self) -> None:
        output = self.config[self.subcommand].get("output")
        self.trainer.callbacks.append(PredictionWriter(path=output))  # type: ignore[attr-defined]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand != "plan":
            kwargs["weights_only"] = True
        if subcommand == "predict":
            kwargs["return_predictions"] = False
        return kwargs


def _without_weights(kind: type, *args: Any, applied_instantiation_links: dict, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return kind(*args, **kwargs)


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    package = Path(__file__).parent
    folder = next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _with_shipped_configs(args: list[str]) -> list[str]:
    """The arguments, with the names of shipped configs replaced by their paths.

    Raises:
        ValueError: For a config that is neither a file nor the name of one that ships.
    """
    found = list(args)
    for i, arg in enumerate(args):
        option, _, value = arg.partition("=")
        if option not in ("--config", "-c"):
            continue
        at, value = (i, value) if value else (i + 1, args[i + 1] if i + 1 < len(args) else "")
        if not value:
            continue
        if os.path.exists(value):
            check_config(value)
            continue
        name = Path(value).stem if value.startswith("configs/") else value
        if name not in shipped_configs():
            raise unknown_name("--config", value, shipped_configs())
        path = str(shipped_configs()[name])
        found[at] = f"{option}={path}" if at == i else path
    return found


def _check_writable(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"trainer.default_root_dir: cannot write to {folder} ({error.strerror})") from None
