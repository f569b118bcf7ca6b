"""Command-line interface: LightningCLI over the tasks, and commands that run without a trainer."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

try:
    from callbacks import ErrorLog, ParameterGrowthCallback, PredictionWriter, PreemptionCheckpoint, TrainingMonitor
except ImportError as error:
    raise ImportError(
        f"callbacks: shadowed by another package (got {sys.modules.get('callbacks', 'none')}, expected that of "
        "lit-tokenformer); run from another folder or with `python -P`, or uninstall it"
    ) from error

from lit_tokenformer import tasks
from lit_tokenformer.checkpoints.checkpoint_io import WholeCheckpointIO, clear_unfinished, read_shapes
from lit_tokenformer.checkpoints.load import ADAPTER
from lit_tokenformer.checkpoints.run_folder import (
    claim_log_folder,
    keep_logging,
    run_folder,
    unversioned_loggers,
    write_new,
)
from lit_tokenformer.cli.adapter_base import base_of, use_as_base
from lit_tokenformer.cli.adopted import adopt_architecture, adopt_tokenizer, adopts
from lit_tokenformer.cli.arguments import TEXTS, repeatable, with_shipped_configs, with_texts, without_plugins
from lit_tokenformer.cli.commands import (
    export_weights,
    grow_checkpoint,
    import_weights,
    shrink_checkpoint,
    split_checkpoint,
)
from lit_tokenformer.cli.compare import compare_presets
from lit_tokenformer.cli.evaluate import evaluate_checkpoint
from lit_tokenformer.cli.generate import generate_text
from lit_tokenformer.cli.growth_options import add_growth_options, apply_growth_options
from lit_tokenformer.cli.inspect import inspect_checkpoint, prune_checkpoint
from lit_tokenformer.cli.listing import list_names
from lit_tokenformer.cli.merge import merge_checkpoints
from lit_tokenformer.cli.parser import MODE, Parser, with_environment
from lit_tokenformer.cli.plan import plan
from lit_tokenformer.cli.predict import predict_images
from lit_tokenformer.cli.preflight import (
    WarmupCheck,
    check_data_fit,
    check_end,
    check_environment,
    check_monitors,
    check_optimizer,
    check_processes,
    check_trainer_settings,
    check_writable,
    replace_repeated,
    use_saved_tokenizer,
)
from lit_tokenformer.cli.restored_state import check_restored_state
from lit_tokenformer.cli.run_identity import RunIdentity, defining_settings
from lit_tokenformer.cli.terminal import add_displays, hide_advertisements, shorten_warnings
from lit_tokenformer.distributed.checkpoint import is_sharded
from lit_tokenformer.errors import UserError, from_process, raised_by_library, unwrap
from lit_tokenformer.registry import import_plugins
from lit_tokenformer.tasks.initialization import add_arguments, check_settings, initialize_from
from lit_tokenformer.version import __version__

COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate_text,
    "evaluate": evaluate_checkpoint,
    "compare": compare_presets,
    "grow": grow_checkpoint,
    "shrink": shrink_checkpoint,
    "split": split_checkpoint,
    "merge": merge_checkpoints,
    "import": import_weights,
    "export": export_weights,
    "inspect": inspect_checkpoint,
    "prune": prune_checkpoint,
    "list": list_names,
}
"""Commands that build neither model nor data from the options of ``fit``."""

TRAINING = {
    "fit": "Train a model, which grows on a schedule.",
    "validate": "Evaluate a checkpoint on the validation data.",
    "test": "Evaluate a checkpoint on the test data.",
    "predict": "Write predictions of a checkpoint to a CSV file.",
}
"""Descriptions of the commands of Lightning."""

_ENV_PREFIX = "LIT_TOKENFORMER"
"""Prefix of the environment variables that set options."""

_HARDWARE = ("accelerator", "devices", "num_nodes", "strategy", "precision")
"""Settings that Lightning checks against the machine, often without their names in the error."""

PREDICT = {
    "output": "CSV file for the predictions; defaults to predictions.csv in the log folder.",
    "images": "Image, folder or tar file to classify with the class names and the transform in --ckpt_path, instead of "
    "all other options; `predict --images X --help` lists the options of this form.",
}
"""Options of ``predict`` in addition to those of the trainer."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command-line interface.

    Args:
        args: Arguments after the program's name; ``None`` reads those of the process.

    Returns:
        Exit status: 0 on success; 2 for an invalid setting or input, reported in one line; 1 for any other error, with
        its traceback; 130, 129 or 143 for a fit ended by Ctrl-C, SIGHUP or another signal; 141 for a closed output.
    """
    hide_advertisements()
    shorten_warnings()
    # addressed to Lightning and torch, not to their users
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    log, preemption = ErrorLog(), PreemptionCheckpoint()
    try:
        _run(sys.argv[1:] if args is None else list(args), log, preemption)
        sys.stdout.flush()
    except SIGTERMException:
        return preemption.status  # that of a process ended by the signal; the checkpoint is written
    except Exception as error:
        if os.environ.get("LIT_TOKENFORMER_TRACEBACK"):
            raise
        status, error = 1, from_process(error)
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails to flush at exit
            status = 128 + signal.SIGPIPE
        elif isinstance(error, UserError) or (isinstance(error, MisconfigurationException) and not log.trained):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            status = 2
        else:
            traceback.print_exc()
        if log.path is not None:
            print(f"error log: {log.path}", file=sys.stderr)
        return status
    return 0


def _run(args: list[str], log: ErrorLog, preemption: PreemptionCheckpoint) -> None:
    """Run a command; fits get an error log, and a checkpoint on preemption."""
    plugins, args = without_plugins(args)
    if plugins:
        sys.path.append(os.getcwd())  # may contain a module of the user; the console script does not add it
        import_plugins(plugins)
    arguments = with_texts(with_shipped_configs(args), COMMANDS.get(args[0]) if args else None)
    if arguments and arguments[0] in {*TokenformerCLI.subcommands(), "plan"}:
        arguments = with_environment(arguments, os.environ, _ENV_PREFIX)
    brief = not {"-h", "--help"}.isdisjoint(arguments)  # its texts are those of COMMON and of Args sections
    set_parsing_settings(docstring_parse_attribute_docstrings=not brief)
    TokenformerCLI(
        LightningModule,
        LightningDataModule,
        trainer_class=Trainer,
        trainer_defaults={"callbacks": [WarmupCheck(), preemption, log]},
        seed_everything_default=0,
        save_config_callback=_SaveConfig,
        parser_class=Parser,
        parser_kwargs={
            "prog": "lit-tokenformer",
            "description": "Train models that grow during training.",
            "epilog": "--plugins MODULE, before or after any command, imports a module that registers custom parts, "
            "data or tasks (repeatable).",
            "version": __version__,
            "parser_mode": MODE,
            "default_env": True,
            "env_prefix": _ENV_PREFIX,
        },
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        args=arguments,
    )


def _output_is_closed() -> bool:
    """Check if the reader of the output, such as ``head``, has ended."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class _SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the log folder of a run; skip runs without a logger."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.loggers:
            return
        folder = run_folder(trainer)  # collective over all processes
        if trainer.is_global_zero:
            write_new(folder, self.config_filename, self.parser.dump(self.config, skip_none=False))


class TokenformerCLI(LightningCLI):
    """LightningCLI that links sizes of the data to the model and checks checkpoints before training."""

    def __init__(self, *settings: Any, args: list[str], **more: Any) -> None:
        named = args[0] if args else None
        self._asked = named if named in {*self.subcommands(), "plan", *COMMANDS, "-h", "--help", "--version"} else None
        self._asks_tokenizer = any(re.match(r"--data\.(.*\.)?tokenizer(=|$)", arg) for arg in args)
        self._images = named == "predict" and any(arg.partition("=")[0] == "--images" for arg in args)
        super().__init__(*settings, args=args, **more)  # type: ignore[misc]

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser: Any = super().init_parser(**kwargs)
        parser.make_brief()
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Add options to the requested command only; those of all commands take a second."""
        if self._images and subcommand == "predict":
            parser = Parser(description=(predict_images.__doc__ or "").splitlines()[0])
            parser.make_brief()
            self._subcommand_method_arguments[subcommand] = parser.add_function_arguments(predict_images)
            return parser
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
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("num_classes", "image_size", "in_chans", "vocab_size", "context_length", "separator_id"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        # linked from ``data`` itself: jsonargparse would open every loader to describe ``data.sizes``
        parser.link_arguments("data", "model.init_args.sizes", _task_sizes, apply_on="instantiate")
        add_growth_options(parser)
        add_arguments(parser)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for choice in parser._subcommands_action._choices_actions:  # type: ignore[union-attr]
            self._subcommand_parsers[choice.dest].description = choice.help = TRAINING[choice.dest]
        planning = self._subcommand_parsers["plan"] = self.init_parser()
        planning.description = (plan.__doc__ or "").splitlines()[0]
        if self._asked in (None, "plan"):
            self._add_arguments(planning)
            given_by_config: set[str | int] = {"trainer", "model", "datamodule"}
            self._subcommand_method_arguments["plan"] = planning.add_function_arguments(plan, skip=given_by_config)
        parser._subcommands_action.add_subcommand("plan", planning, help=planning.description)  # type: ignore[union-attr]
        if not self._images:
            for option, text in PREDICT.items():
                self._subcommand_parsers["predict"].add_argument(f"--{option}", type=str | None, help=text)
        for name in ("fit", "validate", "test", "predict")[: 3 if self._images else 4]:
            self._subcommand_parsers[name].add_argument(
                "--run_name",
                type=str | None,
                help="Name of the run. 'ckpt_path: last' resumes the newest checkpoint with this name; without a "
                "name, the newest one with the same result-changing settings.",
            )
        for name in ("ckpt_path", "run_name"):
            planning.add_argument(
                f"--{name}",
                type=str | None,
                help="Accepted so that the config.yaml of a run can be planned; preset: checkpoint reads ckpt_path.",
            )
        for name, function in COMMANDS.items():
            own = Parser(description=(function.__doc__ or "").splitlines()[0])
            texts = repeatable(function)
            own.make_brief()
            if self._asked in (None, name):
                own.add_function_arguments(function, skip={*texts}, as_positional=function is list_names)
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

    def instantiate_classes(self) -> None:
        """Report a value rejected by a library in one line; errors in the user's own code keep their traceback."""
        try:
            super().instantiate_classes()
        except Exception as error:
            cause = unwrap(error)
            if isinstance(cause, MisconfigurationException) or raised_by_library(cause):
                raise UserError(" ".join(str(cause).split())) from None
            raise cause from cause.__cause__

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        config["callbacks"] = replace_repeated(config.get("callbacks"))
        check_trainer_settings(config)
        add_displays(config)
        if self._identity is not None:
            callbacks = [*callbacks, self._identity]
        given = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        if self.subcommand == "fit" and not any(isinstance(one, TrainingMonitor) for one in given):
            callbacks = [*callbacks, TrainingMonitor(log_images=0, row_norms=False, log_text=0)]
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except Exception as error:
            if not isinstance(error, MisconfigurationException) and not raised_by_library(error):
                raise
            message = " ".join(str(error).split())
            if not any(name in message for name in config):  # no setting is named
                message += f" ({', '.join(f'trainer.{name}: {config[name]}' for name in _HARDWARE)})"
            raise UserError(f"trainer: {message}") from None
        check_processes(os.environ, trainer)
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        name = self.config["subcommand"]
        if self._images or name in COMMANDS:
            (predict_images if self._images else COMMANDS[name])(**self.config[name].as_dict())
            sys.stdout.flush()
            sys.exit(0)
        apply_growth_options(self.config[name])
        if self.config[name].get("images"):
            raise UserError("images: expected on the command line, got it from a config")
        check_settings(self.config[name], resumes=name == "fit")

    def _parse_ckpt_path(self) -> None:
        """Check that the checkpoint is intact and safe; hyper-parameters are those of the config, or it adopts them."""
        config = self.config[self.config["subcommand"]]
        if self.config["subcommand"] in self.subcommands():
            use_as_base(config, fits=self.config["subcommand"] == "fit")
        path = config.get("ckpt_path")
        self._identity: RunIdentity | None = None
        self._shapes: dict[str, Any] = {}
        self._adopted: dict[str, Any] = {}
        if adopts(config):
            base = config.get("init_from") or base_of(config) or (path if path not in ("best", "last", "hpc") else None)
            self._adopted = read_shapes(base) if base else {}
            adopt_architecture(config, self._adopted, base)
        if "ckpt_path" in config:
            self._identity = RunIdentity(defining_settings(config), config.get("run_name"), path)
        if path == "best":
            folder = config["trainer"].get("default_root_dir") or "."
            raise UserError(f"ckpt_path: no {path} checkpoint below {folder} (expected a path, got {path!r})")
        if path and path not in ("last", "hpc") and not Path(path).is_dir():
            found = read_shapes(path)
            self._shapes = found if isinstance(found, dict) else {}

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        if self.subcommand == "plan":  # only shapes are needed
            self.parser.add_instantiator(_without_weights, LightningModule, subclasses=True, prepend=True)
        if self.subcommand in ("validate", "test") or self._adopted or base_of(self.config[self.subcommand]):
            self.parser.add_instantiator(self._with_tokenizer, LightningDataModule, subclasses=True, prepend=True)

    def _with_tokenizer(self, kind: type, *args: Any, applied_instantiation_links: dict, **kwargs: Any) -> Any:
        config, data = self.config[self.subcommand], kind(*args, **kwargs)
        if self._adopted:
            adopt_tokenizer(data, self._adopted, self._asks_tokenizer)
            return data
        path = base_of(config) or config["ckpt_path"]
        saved = read_shapes(path) if path and (is_sharded(path) or path != config["ckpt_path"]) else self._shapes
        use_saved_tokenizer(data, saved, self._asks_tokenizer)
        return data

    def after_instantiate_classes(self) -> None:
        unversioned = unversioned_loggers(self.trainer)
        check_data_fit(self.model, self.datamodule)
        start = self.config[self.subcommand]
        base, resumes = start["init_from"], start.get("ckpt_path") == "last"
        if base and resumes and self._identity is not None and not os.path.exists(base):
            self._identity.needed = f"init_from: {base} does not exist"  # needed to start fresh, not to resume
        elif base and (resumes or start.get("ckpt_path") is None):
            options = {"ema": start["init_ema"], "resize_vocab": start["init_resize_vocab"]}
            initialize_from(self.model, base, self.datamodule, **options)
        if resumes and self._identity is not None and self.subcommand in ("validate", "test", "predict"):
            path = self._identity.last(self.trainer, self.model)
            self._shapes = read_shapes(path) if path is not None and not Path(path).is_dir() else {}
        saved = self._shapes if isinstance(self.model, tasks.LitTask) and self.subcommand != "plan" else {}
        if saved and self.subcommand != "predict":
            self.model.check_data(saved, self.datamodule)
        late = {"tokenizer", "grown_depth", ADAPTER}  # checked once data, depth and adapter are known
        if saved and not late & saved.keys():
            self.model.check_architecture(saved)
        if self.subcommand == "fit" and isinstance(self.model, tasks.LitTask):
            check_optimizer(self.model)
            check_end(self.model, self.trainer)
        if self.subcommand == "fit":
            check_monitors(self.trainer, self.model, self.datamodule)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, ParameterGrowthCallback):
                    callback.setup(self.trainer, self.model, "fit")  # only checks its schedule
        if self.subcommand == "predict":
            self._check_output()
        if self.subcommand in ("fit", "predict"):
            logs = {one.save_dir for one in self.trainer.loggers if isinstance(one, (CSVLogger, TensorBoardLogger))}
            check_writable("trainer.default_root_dir", self.trainer.default_root_dir)
            for folder in filter(None, logs):
                check_writable("trainer.logger: save_dir", folder)
            if self.subcommand == "fit" and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                places = {getattr(one, "dirpath", None) for one in self.trainer.checkpoint_callbacks}
                clear_unfinished(self.trainer.default_root_dir, *filter(None, logs | places))
            claim_log_folder(self.trainer, unversioned)
        check_restored_state(self.trainer)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else chosen by the user or the strategy
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        if getattr(self.trainer.strategy.checkpoint_io, "on_full_disk", None) == "warn":
            keep_logging(self.trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "plan":
            plan(self.trainer, **self._prepare_subcommand_kwargs(subcommand))
        else:
            super()._run_subcommand(subcommand)

    def _check_output(self) -> None:
        output = self.config[self.subcommand].get("output")
        if output and Path(output).exists():
            raise UserError(f"output: {output} exists already")

    def before_predict(self) -> None:
        output = self.config[self.subcommand].get("output")
        self.trainer.callbacks.append(PredictionWriter(path=output))  # type: ignore[attr-defined]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand != "plan":
            kwargs["weights_only"] = True
        if kwargs.get("ckpt_path") == "last":
            kwargs["ckpt_path"] = None  # chosen by RunIdentity after all processes have started
        if subcommand == "predict":
            kwargs["return_predictions"] = False
        return kwargs


def _task_sizes(datamodule: LightningDataModule) -> dict[str, dict[str, Any]] | None:
    return getattr(datamodule, "sizes", None)


def _without_weights(kind: type, *args: Any, applied_instantiation_links: dict, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return kind(*args, **kwargs)
