"""Options ``--growth.*``: arguments of the growth callback of a config."""

from __future__ import annotations

import inspect
from pydoc import locate
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from callbacks import ParameterGrowthCallback
from lit_tokenformer.errors import UserError

GROUP = "growth"


def add_growth_options(parser: LightningArgumentParser) -> None:
    """Add an option for each argument of the growth callback; it is null unless set.

    Args:
        parser: Parser of a command with a trainer.
    """
    described = ArgumentParser()
    described.add_class_arguments(ParameterGrowthCallback, GROUP)
    texts = {action.dest: action.help for action in described._actions}
    hints = get_type_hints(ParameterGrowthCallback.__init__)
    group = parser.add_argument_group("growth: arguments of the ParameterGrowthCallback of the config, or of a new one")
    for name in inspect.signature(ParameterGrowthCallback).parameters:
        option = f"{GROUP}.{name}"
        group.add_argument(f"--{option}", type=hints[name] | None, help=texts[option])


def apply_growth_options(config: Namespace) -> None:
    """Move the options to the growth callback of the trainer, or to a new one.

    Args:
        config: Settings of a command, changed in place.

    Raises:
        UserError: Without a growth callback and without a schedule.
    """
    options: Any = config.pop(GROUP, None)
    given = {name: value for name, value in vars(options).items() if value is not None} if options else {}
    if not given:
        return
    found: Any = config.get("trainer.callbacks") or []
    callbacks = found if isinstance(found, list) else [found]
    growing = [one for one in callbacks if _grows(one)]
    if growing:
        growing[-1].init_args.update(Namespace(given))
    elif "schedule" not in given:
        raise UserError(f"{GROUP}.schedule: expected a value, since trainer.callbacks has no ParameterGrowthCallback")
    else:
        new = Namespace(class_path="callbacks.ParameterGrowthCallback", init_args=Namespace(given))
        config["trainer.callbacks"] = [new, *callbacks]


def _grows(callback: Any) -> bool:
    kind = locate(callback.get("class_path", "")) if isinstance(callback, Namespace) else type(callback)
    return isinstance(kind, type) and issubclass(kind, ParameterGrowthCallback)
