"""Errors in what a user gave, told from errors in somebody's code by where they were raised."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Iterable
from typing import TypeVar

from torch.multiprocessing import ProcessRaisedException

ErrorT = TypeVar("ErrorT", bound=BaseException)

_OURS = ("callbacks", "lit_tokenformer")
_CHECKED = frozenset(
    {*sys.stdlib_module_names, *_OURS}
    | {"jsonargparse", "lightning", "numpy", "omegaconf", "tensorboard", "timm", "torch", "torchmetrics", "yaml"}
)
"""Packages whose constructors check what they are given; an error out of any other keeps its traceback."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(ValueError):
    """An invalid setting or input, found by a check of this project.

    The command line reports it in one line and exits with status 2. Any other exception is a fault in somebody's
    code and keeps its traceback.

    Args:
        message: One line. Control characters, which a terminal would obey, are escaped: names in the message may come
            from a file.

    Example:
        >>> raise UserError("param_tokens: expected at least 1, got 0")
        Traceback (most recent call last):
        ...
        lit_tokenformer.errors.UserError: param_tokens: expected at least 1, got 0
    """

    def __init__(self, message: str) -> None:
        # A loader's worker hands its error over with the whole traceback as the message
        message = message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip()
        super().__init__(_CONTROL.sub(lambda found: repr(found[0])[1:-1], message))


def unknown_name(setting: str, name: object, choices: Iterable[str]) -> UserError:
    """Build the error for a name that is not registered, with the nearest registered one.

    Args:
        setting: The setting that holds the name, as the user writes it (``data.dataset``).
        name: The name given.
        choices: The registered names.

    Returns:
        An exception to raise; its message is one line.

    Example:
        >>> print(unknown_name("data.dataset", "digit", ["digits", "cifar10"]))
        data.dataset: unknown value 'digit', did you mean 'digits'? Known: cifar10, digits
    """
    known = sorted(choices)
    near = nearest_name(str(name), known)
    hint = f", did you mean {near!r}?" if near else "."
    return UserError(f"{setting}: unknown value {name!r}{hint} Known: {', '.join(known)}")


def nearest_name(name: str, choices: Iterable[str]) -> str | None:
    """Find the name that was probably meant.

    Args:
        name: A name that is not among the choices.
        choices: The names that exist.

    Returns:
        A choice that differs by a typo, else the shortest one that continues the name; None if nothing is near.

    Example:
        >>> nearest_name("epcohs", ["epochs", "steps"]), nearest_name("vit_smal", ["gpt2_small", "vit_small_patch16"])
        ('epochs', 'vit_small_patch16')
        >>> nearest_name("version", ["precision"]) is None
        True
    """
    known = sorted(set(choices), key=lambda one: (len(one), one))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)  # ckpt_path and drop_path have 0.67
    near += [one for one in known if len(one) == len(name) and sum(map(str.__ne__, one, name)) == 1]
    near += [one for one in known if len(name) >= 3 and one.lower().startswith(name.lower())]
    return near[0] if near else None


def unwrap(error: BaseException) -> BaseException:
    """Return what jsonargparse caught and reports with types and the whole configuration."""
    while error.__cause__ is not None and _packages(error)[-1:] == ["jsonargparse"]:
        error = error.__cause__
    return error


def from_process(error: ErrorT) -> ErrorT | UserError:
    """Return the ``UserError`` that another process raised, where it is all that ended that process.

    Processes that Lightning forks or spawns hand over the text of their traceback.
    """
    own = f"{UserError.__module__}.{UserError.__qualname__}: "
    if isinstance(error, ProcessRaisedException) and str(error).strip().splitlines()[-1].startswith(own):
        return UserError(str(error))
    return error


def raised_by_user_code(error: BaseException) -> bool:
    """Return whether code of neither this project nor a library whose constructors it calls took part."""
    return not _CHECKED.issuperset(_packages(error))


def is_user_code(value: object) -> bool:
    """Return whether the class of a value is defined by neither this project nor a library that it calls."""
    return type(value).__module__.partition(".")[0] not in _CHECKED


def raised_by_library(error: BaseException) -> bool:
    """Return whether a library raised the error, and nothing but libraries and this project took part."""
    packages = _packages(error)
    return not raised_by_user_code(error) and packages[-1:] != [] and packages[-1] not in _OURS


def _packages(error: BaseException) -> list[str]:
    """The top-level package of each frame, the raising one last."""
    return [
        frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
