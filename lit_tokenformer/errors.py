"""What a user is told when a name in a config is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(setting: str, name: object, choices: Iterable[str]) -> ValueError:
    """The error for a name that no table holds, with the nearest right one.

    Args:
        setting: The setting that holds the name, as the user writes it (``data.dataset``).
        name: What was given.
        choices: What would have been right.

    Returns:
        A ``ValueError`` to raise; its message is one line.

    Example:
        >>> print(unknown_name("data.dataset", "digit", ["digits", "cifar10"]))
        data.dataset: unknown value 'digit', did you mean 'digits'? Known: cifar10, digits
    """
    known = sorted(choices)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return ValueError(f"{setting}: unknown value {name!r}{hint} Known: {', '.join(known)}")
