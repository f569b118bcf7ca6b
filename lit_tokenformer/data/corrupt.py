"""Bound on unreadable samples."""

from __future__ import annotations

from lit_tokenformer.errors import UserError

ALLOWED_CORRUPT = 3
"""So many unreadable images never stop a run, however few images there are (unless the allowed share is 0)."""


class TooManyCorruptSamples(UserError):
    """More samples are unreadable than the setting ``data.max_corrupt_share`` allows."""


def check_share(corrupt: int, size: int, max_share: float, names: list[str], unit: str = "images") -> None:
    """Refuses too many unreadable samples.

    Args:
        corrupt: Unreadable samples.
        size: Samples they are a share of.
        max_share: The setting ``data.max_corrupt_share``.
        names: The first of them.
        unit: What the samples are.

    Raises:
        TooManyCorruptSamples: If they are more than that share, and more than ``ALLOWED_CORRUPT``.
    """
    allowed = max(ALLOWED_CORRUPT, max_share * size) if max_share > 0 else 0
    if corrupt > allowed:
        raise TooManyCorruptSamples(
            f"data.max_corrupt_share: {corrupt} of {size} {unit} cannot be read, a share of {max_share:g} is allowed; "
            f"the first: {', '.join(names)}"
        )
