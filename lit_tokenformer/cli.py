"""The command line: LightningCLI over the tasks, with our own commands beside its own."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lit_tokenformer import tasks
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
from lit_tokenformer.errors import UserError, unknown_name

try:
    from callbacks import ErrorLog, PredictionWriter, PreemptionCheckpoint
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
    replace_repeated,
    trainer_error,
)
from lit_tokenformer.parsing import Parser, check_config, one_line, with_environment
from lit_tokenformer.planning import PlanningTrainer

COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate_text,
    "evaluate": evaluate_checkpoint,
    "grow": grow_checkpoint,
    "split": split_checkpoint,
    "import": import_weights,
    "export": export_weights,
}
"""Commands that take neither model nor data from a config."""

_ENV_PREFIX = "LIT_TOKENFORMER"
"""What the names of environment variables that set options begin with."""

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
        arguments = _with_shipped_configs(sys.argv[1:] if args is None else list(args))
        if arguments and arguments[0] in TokenformerCLI.subcommands():
            arguments = with_environment(arguments, os.environ, _ENV_PREFIX)
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
                "env_prefix": _ENV_PREFIX,
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
        self._subcommand_parsers["plan"].add_argument(
            "--ckpt_path", type=str | None, help="Ignored, so that the config.yaml of a run can be planned."
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
            raise UserError(f"seed_everything: {error}") from None

    def before_instantiate_classes(self) -> None:
        check_environment(os.environ)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        config["callbacks"] = replace_repeated(config.get("callbacks"))
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
            raise UserError(f"ckpt_path: there is no {path} checkpoint below {folder}; name a file")
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

    def before_test(self) -> None:
        if not getattr(self.datamodule, "has_test_split", True):
            raise UserError("test: the data have no test split, so scores would be those of `validate`; use that")

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
        raise UserError(f"trainer.default_root_dir: cannot write to {folder} ({error.strerror})") from None
