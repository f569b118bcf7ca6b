"""Arms of a comparison: the entries of ``presets``, and the plan of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.models import TokenformerConfig

Schedule = dict[float, Any]
"""Growth schedule: totals by kind at shares of the steps."""
RESIZED = ("param_tokens", "depth", "experts", "mlp_ratio", "num_heads", "num_kv_heads", "head_dim")
"""Fields of an architecture that growth changes."""


@dataclass(frozen=True)
class Arm:
    """Entry of ``presets``, one row of the comparison.

    Args:
        label: Name in table and plot.
        preset: Architecture.
        overrides: Fields of the architecture that replace the preset's.
        lr: Learning rate; ``None`` for that of the config, or the result of the search.
        grow: Growth schedule; ``True`` for that of the config, ``None`` for no growth.
        growth: Settings of the growth callback that replace the config's, such as ``method``.
        patch_drop: Patch drop rates by share of the steps; ``None`` for those of the config, ``{}`` for none.
        optimizer: Optimizer in place of the config's: ``class_path`` and ``init_args``; the learning rate is ``lr``.
        schedule: Settings of the learning-rate schedule that replace the config's; lengths are shares of the steps.
        callbacks: Configs of callbacks in addition to the config's.
    """

    label: str
    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    grow: Any = None
    growth: dict[str, Any] = field(default_factory=dict)
    patch_drop: dict[float, float] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    callbacks: list[dict[str, Any]] = field(default_factory=list)


def parse_arm(entry: str | Mapping[str, Any]) -> Arm:
    """Read an entry of ``presets``.

    Args:
        entry: Name of a preset, or a mapping with ``preset`` and any other field of :class:`Arm`.

    Raises:
        UserError: If a key is unknown, or a value has the wrong type.

    Example:
        >>> parse_arm({"preset": "gpt2_small", "overrides": {"projection": "pattention"}, "lr": 1e-3}).label
        'gpt2_small projection=pattention'
    """
    written = {"preset": entry} if isinstance(entry, str) else entry
    known = [one.name for one in fields(Arm)]
    for name in written:
        if name not in known:
            raise unknown_name("presets", name, known)
    given: dict[str, Any] = {name: value for name, value in written.items() if value is not None}
    preset, rate, grow = (given.get(name) for name in ("preset", "lr", "grow"))
    overrides = given.get("overrides", {})
    if not isinstance(preset, str) or not isinstance(overrides, Mapping):
        raise UserError(f"presets: expected a name or {{preset: NAME, overrides: {{...}}, ...}}, got {entry!r}")
    words = [preset, *(f"{name}={value}" for name, value in overrides.items()), *(["grow"] if grow else [])]
    label = str(given.get("label") or " ".join(words))
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0):
        raise UserError(f"presets: {label!r}: lr: expected a positive number, got {rate!r}")
    if grow is not None and not isinstance(grow, bool) and not (isinstance(grow, Mapping) and grow):
        raise UserError(f"presets: {label!r}: grow: expected true or {{share: tokens}}, got {grow!r}")
    for name in ("growth", "patch_drop", "optimizer", "schedule"):
        if not isinstance(given.get(name, {}), Mapping):
            raise UserError(f"presets: {label!r}: {name}: expected settings by their names, got {given[name]!r}")
    callbacks = given.get("callbacks", [])
    if not isinstance(callbacks, list) or not all(isinstance(one, Mapping) for one in callbacks):
        raise UserError(f"presets: {label!r}: callbacks: expected a list of mappings, got {callbacks!r}")
    for one in (*callbacks, *([given["optimizer"]] if given.get("optimizer") else [])):
        if "class_path" not in one:
            raise UserError(f"presets: {label!r}: expected a class_path, got {one!r}")
    if given.get("schedule", {}).get("unit", "share") != "share":
        raise UserError(f"presets: {label!r}: schedule: unit: expected lengths as shares of the steps (unit: share)")
    return Arm(**{**given, "label": label, "lr": None if rate is None else float(rate), "grow": grow or None})


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
        growths: Totals by kind at shares of the steps.
        drops: Patch drop rates at shares of the steps.
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
    drops: dict[float, float] = field(default_factory=dict)
    parameters: int = 0
    blocks: int = 0
    differs: float = 0.0
    steps: int = 0
    lr: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def final(self) -> TokenformerConfig:
        """Architecture at the end of the fit."""
        return self.config.at_size(list(self.growths.values())[-1]) if self.growths else self.config

    def schedule(self, steps: int) -> dict[int, dict[str, int]]:
        """Growth schedule by step, in a run of ``steps`` steps."""
        return by_step(self.growths, steps)

    def stages(self, steps: int) -> list[tuple[int, TokenformerConfig]]:
        """Number of steps at each architecture."""
        growths, drops = by_step(self.growths, steps), by_step(self.drops, steps)
        config, start = self.config, 0
        found = []
        for end in [*sorted({one for one in (*growths, *drops) if one < steps}), steps]:
            found.append((end - start, config))
            config = config.at_size(growths[end]) if end in growths else config
            config = replace(config, patch_drop_rate=drops.get(end, config.patch_drop_rate))
            start = end
        return found


def by_step(schedule: Mapping[float, Any], steps: int) -> dict[int, Any]:
    """Convert shares of a run to different steps of at least 1."""
    found: dict[int, Any] = {}
    for share, value in schedule.items():
        found[max([1, round(share * steps), *(step + 1 for step in found)])] = value
    return found


def resized(config: TokenformerConfig, other: TokenformerConfig) -> dict[str, Any]:
    """Return the fields of the first architecture that growth and patch dropping change, where they differ."""
    found = {name: getattr(config, name) for name in (*RESIZED, "patch_drop_rate")}
    return {name: value for name, value in found.items() if value != getattr(other, name)}
