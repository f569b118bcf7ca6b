"""Brief ``--help``: one line or two for each common option; ``--help-all`` lists the rest, types and variables."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from lit_tokenformer import data, tasks


def _classes(package: Any) -> str:
    return ", ".join(name for name in package.__all__ if re.match("Lit(?!Task)|.*DataModule", name))


COMMON = {
    "config": "YAML file or name of a shipped config (repeatable, later ones override). `list configs` lists them.",
    "print_config": "Print the settings and exit.",
    "seed_everything": "Random seed.",
    "model": f"Task: {_classes(tasks)}, or your own.",
    "model.help": "List the options of a task, such as LitCausalLM.",
    "data": f"Data module: {_classes(data)}, or your own.",
    "data.help": "List the options of a data module.",
    "trainer.max_epochs": "Number of epochs.",
    "trainer.max_steps": "Number of optimizer steps.",
    "trainer.accelerator": "cpu, gpu, mps or auto.",
    "trainer.devices": "Number of devices, or auto.",
    "trainer.num_nodes": "Number of machines.",
    "trainer.strategy": "auto, ddp, fsdp2 (sharded), or a class.",
    "trainer.precision": "32-true, bf16-mixed, 16-mixed or bf16-true.",
    "trainer.accumulate_grad_batches": "Batches per optimizer step.",
    "trainer.gradient_clip_val": "Maximum norm of the gradient.",
    "trainer.val_check_interval": "Training batches between validations (int), or share of an epoch (float).",
    "trainer.limit_train_batches": "Batches per epoch (int), or share (float).",
    "trainer.limit_val_batches": "The same for validation.",
    "trainer.log_every_n_steps": "Steps between two records of the loggers.",
    "trainer.logger": "TensorBoardLogger (default), CSVLogger, WandbLogger, MLFlowLogger, or false.",
    "trainer.callbacks": "Callbacks; += appends one.",
    "trainer.default_root_dir": "Folder of logs and checkpoints.",
    "growth.schedule": "When to grow to which size, '{8: 192, 14: 384}'; replaces that of the config.",
    "growth.unit": "Unit of the schedule: epoch or step.",
    "growth.method": "split, zero or random.",
    "growth.trigger": "schedule, plateau or slope.",
    "ckpt_path": "Checkpoint to resume or evaluate; last is the newest one of this run.",
}
"""Options of commands with a trainer that the brief help lists, with their texts."""

_HIDDEN = re.compile(r"(trainer|growth|model|data)(\.|$)")
"""Options that the brief help omits unless they are common."""

_GROUPS = [{"trainer"}, {"model"}, {"data"}, {"growth"}]
"""Options in groups of their own."""

_ALWAYS = {"config", "print_config"}
"""Options of any command whose texts are replaced."""


class BriefFormatter(DefaultHelpFormatter):
    """Formatter without metavars, types and environment variables."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "max_help_position": 28})

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action) if isinstance(action, argparse._HelpAction) else action.help or ""
        if not action.option_strings:
            return text
        notes = ["required"] if action.required else []
        choices = re.search(r"Literal\[([^]]*)\]", self._get_type_str(action) or "")
        if choices and text not in COMMON.values():
            notes.append(f"choices: {choices[1]}")
        if action.default not in (None, argparse.SUPPRESS):
            notes.append("default: %(default)s")
        return f"{text} ({', '.join(notes)})" if notes else text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if not name.endswith("+")]
        return ", ".join(names) if names else super()._format_action_invocation(action)


class HelpAll(argparse._HelpAction):
    """Option that prints the complete help."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.brief = False
        parser.print_help()
        parser.exit()


class BriefHelpParser(ArgumentParser):
    """Parser whose ``--help`` can be brief."""

    brief = False

    def make_brief(self) -> None:
        """Make ``--help`` brief, and add ``--help-all``."""
        self.brief = True
        self.add_argument("--help-all", action=HelpAll, help="Show all options, types and environment variables.")

    def format_help(self, *args: Any) -> str:
        """Format the help, the brief one if there are two."""
        if not self.brief:
            return super().format_help(*args)
        with self._brief_settings():
            return super().format_help(*args)

    @contextmanager
    def _brief_settings(self) -> Iterator[None]:
        command = self.prog.replace(" [options]", "")
        settings: dict[str, Any] = {
            "default_env": False,
            "usage": f"{command} COMMAND [options]" if self._subcommands_action else f"{command} [options]",
            "formatter_class": BriefFormatter,
        }
        trains = any(action.dest == "trainer.max_epochs" for action in self._actions)
        changed: list[tuple[Any, str, Any]] = [(self, name, value) for name, value in settings.items()]
        for group in self._action_groups:
            names = {action.dest.partition(".")[0] for action in group._group_actions}
            if group not in self._action_groups[:2] and self._subcommands_action not in group._group_actions:
                changed.append((group, "title", names.pop() if names in _GROUPS else "arguments"))
            for action in group._group_actions:
                option = (action.option_strings or [action.dest])[-1].removesuffix("+").removeprefix("--")
                if option in COMMON and (trains or option in _ALWAYS):
                    changed.append((action, "help", COMMON[option]))
                elif trains and (_HIDDEN.match(option) or "-->" in option):
                    changed.append((action, "help", argparse.SUPPRESS))
        kept = [(thing, name, getattr(thing, name)) for thing, name, _ in changed]
        try:
            for thing, name, value in changed:
                setattr(thing, name, value)
            yield
        finally:
            for thing, name, value in kept:
                setattr(thing, name, value)
