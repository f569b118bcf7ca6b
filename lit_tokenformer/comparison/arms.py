"""Arms of a comparison: the entries of ``presets``, and the plan of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.models import TokenformerConfig

Schedule = dict[float, Any]
"""Growth schedule: totals of parameter tokens by share of the steps."""


@dataclass(frozen=True)
class Arm:
    """Entry of ``presets``, one row of the comparison.

    Args:
        label: Name in table and plot.
        preset: Architecture.
        overrides: Fields of the architecture that replace the preset's.
        lr: Learning rate; ``None`` for that of the config, or the result of the search.
        grow: Growth schedule; ``True`` for that of the config, ``None`` for no growth.
    """

    label: str
    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    grow: Any = None


def parse_arm(entry: str | Mapping[str, Any]) -> Arm:
    """Read an entry of ``presets``.

    Args:
        entry: Name of a preset, or a mapping with ``preset`` and any of ``label``, ``overrides``, ``lr`` and ``grow``.

    Raises:
        UserError: If a key is unknown, or a value has the wrong type.

    Example:
        >>> parse_arm({"preset": "gpt2_small", "overrides": {"projection": "pattention"}, "lr": 1e-3}).label
        'gpt2_small projection=pattention'
    """
    given = {"preset": entry} if isinstance(entry, str) else dict(entry)
    known = [one.name for one in fields(Arm)]
    for name in given:
        if name not in known:
            raise unknown_name("presets", name, known)
    preset, overrides, rate, grow = (
        given.get("preset"),
        given.get("overrides") or {},
        given.get("lr"),
        given.get("grow"),
    )
    if not isinstance(preset, str) or not isinstance(overrides, Mapping):
        raise UserError(f"presets: expected a name or {{preset: NAME, overrides: {{...}}, ...}}, got {entry!r}")
    words = [preset, *(f"{name}={value}" for name, value in overrides.items()), *(["grow"] if grow else [])]
    label = str(given.get("label") or " ".join(words))
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0):
        raise UserError(f"presets: {label!r}: lr: expected a positive number, got {rate!r}")
    if grow is not None and not isinstance(grow, bool) and not (isinstance(grow, Mapping) and grow):
        raise UserError(f"presets: {label!r}: grow: expected true or {{share: tokens}}, got {grow!r}")
    return Arm(label, preset, dict(overrides), None if rate is None else float(rate), grow or None)


@contextmanager
def naming(arm: Arm) -> Iterator[None]:
    """Prefix the message of a ``ValueError`` with the arm."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"presets: {arm.label!r}: {error}") from None


def has_pattention(config: TokenformerConfig) -> bool:
    """Check if an architecture has Pattention layers."""
    return "pattention" in (config.projection, config.feed_forward)


@dataclass
class Planned:
    """Plan of an arm: its sizes, steps and learning rate on the data.

    Args:
        arm: The entry of ``presets``.
        config: Initial architecture.
        growths: Totals of parameter tokens by share of the steps.
        parameters: Trainable parameters at the end of the fit.
        blocks: Non-embedding parameters: those without embedding and head.
        differs: Relative difference to the reference in the matched quantity.
        steps: Optimizer steps; 0 if unknown.
        lr: Learning rate; ``None`` if unknown.
        notes: Footnotes on the choice of steps and learning rate.
    """

    arm: Arm
    config: TokenformerConfig
    growths: Schedule = field(default_factory=dict)
    parameters: int = 0
    blocks: int = 0
    differs: float = 0.0
    steps: int = 0
    lr: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def final_tokens(self) -> dict[str, int]:
        """Totals of parameter tokens at the end of the fit."""
        return list(self.growths.values())[-1] if self.growths else dict(self.config.tokens.items())

    def schedule(self, steps: int) -> dict[int, dict[str, int]]:
        """Growth schedule by step, in a run of ``steps`` steps."""
        found: dict[int, dict[str, int]] = {}
        for share, tokens in self.growths.items():
            found[max([1, round(share * steps), *(step + 1 for step in found)])] = tokens
        return found

    def stages(self, steps: int) -> list[tuple[int, dict[str, int]]]:
        """Number of steps and totals of parameter tokens of each stage."""
        schedule = {0: dict(self.config.tokens.items()), **self.schedule(steps)}
        ends = [*list(schedule)[1:], steps]
        return [
            (max(0, min(end, steps) - start), tokens)
            for (start, tokens), end in zip(schedule.items(), ends, strict=True)
        ]
