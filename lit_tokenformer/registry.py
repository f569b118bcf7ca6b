"""Registries: the parts, sources and methods that a name in a config stands for, and the plugins that add to them.

A plugin is any module that registers something when it is imported. Packages name theirs in the entry-point group
``lit_tokenformer.plugins``; ``--plugins my_module`` on the command line imports one by hand.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

from lit_tokenformer.errors import UserError, unknown_name

PLUGIN_GROUP = "lit_tokenformer.plugins"
"""Entry-point group of the plugins; each entry point is a module."""

T = TypeVar("T")
Entry = TypeVar("Entry")


class Registry(Generic[T]):
    """The entries that a setting can name.

    Args:
        setting: The setting, as errors name it.

    Example:
        >>> colors = Registry("color")
        >>> @colors.register("red")
        ... def red():
        ...     return "#f00"
        >>> colors["red"](), colors.names()
        ('#f00', ['red'])
        >>> colors["rad"]
        Traceback (most recent call last):
        ...
        lit_tokenformer.errors.UserError: color: unknown value 'rad', did you mean 'red'? Known: red
    """

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self.entries: dict[str, T] = {}
        self._needs: dict[str, dict[str, tuple[Any, ...]]] = {}

    def register(self, name: str, **needs: tuple[Any, ...]) -> Callable[[Entry], Entry]:
        """Decorate what the name stands for.

        Args:
            name: The name, as configs write it.
            needs: For a part of a model: fields of the architecture and the values of each that the part supports;
                fields that are left out may have any. Of two parts that exclude each other, the later one can name the
                other here, and they go together.

        Raises:
            UserError: For a name that is taken.
        """
        if name in self.entries:
            raise UserError(f"{self.setting}: {name!r} is registered already; choose another name")

        def decorate(entry: Entry) -> Entry:
            self.entries[name] = cast(T, entry)
            self._needs[name] = needs
            return entry

        return decorate

    def names(self) -> list[str]:
        """All names, those of plugins included, sorted."""
        load_plugins()
        return sorted(self.entries)

    def needs(self, name: str) -> dict[str, tuple[Any, ...]]:
        """Fields of the architecture that an entry restricts, and the values that it supports."""
        return self._needs.get(name, {})

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise unknown_name(self.setting, name, self.entries)
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if name not in self.entries:
            load_plugins()
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())


PRESETS: Registry[dict[str, Any]] = Registry("preset")
"""Architectures: fields of :class:`~lit_tokenformer.models.TokenformerConfig`."""
STEMS: Registry[Any] = Registry("stem")
"""Classes, ``(config)``: input -> (B, T, D); with ``num_positions(config)``, the length of the sequence."""
HEADS: Registry[Callable[..., Any]] = Registry("head")
"""``(config, stem) -> module``: (B, T, D) -> predictions."""
MIXERS: Registry[Callable[..., Any]] = Registry("mixer")
"""``(config, layer) -> module``; see :class:`~lit_tokenformer.models.mixers.Mixer`."""
FEED_FORWARDS: Registry[Callable[..., Any]] = Registry("feed_forward")
"""``(config, layer) -> module``; see :class:`~lit_tokenformer.models.feed_forward.FeedForward`."""
NORMS: Registry[Callable[..., Any]] = Registry("norm")
"""``(config, affine) -> module``: (..., D) -> (..., D)."""
POSITIONS: Registry[Any] = Registry("positions")
"""A :class:`~lit_tokenformer.models.positions.Positions`."""
PROJECTIONS: Registry[Callable[..., Any]] = Registry("projection")
"""``(config, kind, dim_in, dim_out, residual, bias, zero) -> module``: (..., dim_in) -> (..., dim_out)."""
ACTIVATIONS: Registry[Callable[..., Any]] = Registry("activation")
"""Tensor -> tensor of the same shape."""
INITS: Registry[Any] = Registry("init")
"""A :class:`~lit_tokenformer.models.projections.Init`."""
SCORE_NORMS: Registry[Any] = Registry("score_norm")
"""A :class:`~lit_tokenformer.models.pattention.ScoreNorm`."""
GROWTH_METHODS: Registry[Any] = Registry("method")
"""Initialization of new units; see :mod:`lit_tokenformer.growth`."""
TRIGGERS: Registry[Callable[..., Any]] = Registry("trigger")
"""``(patience, min_delta, threshold) -> Trigger``; see :mod:`callbacks.growth_triggers`."""
IMAGE_SOURCES: Registry[Any] = Registry("data.dataset")
"""An :class:`~lit_tokenformer.data.images.sources.ImageSource`."""
TEXT_SOURCES: Registry[Callable[..., Any]] = Registry("data.dataset")
"""``(settings) -> TextSplits``; see :mod:`lit_tokenformer.data.text.sources`."""
WEIGHT_FORMATS: Registry[Any] = Registry("project")
"""A :class:`~lit_tokenformer.interop.tokenformer.WeightFormat`."""
TASKS: Registry[type] = Registry("ckpt_path: task")
"""LightningModules by class name, which commands rebuild from a checkpoint."""

_loaded = False


def load_plugins() -> None:
    """Import the modules of the entry-point group, once; a broken one is reported in a warning and skipped."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for point in metadata.entry_points(group=PLUGIN_GROUP):
        try:
            point.load()
        except Exception as error:  # of somebody else's code, which must not stop the rest
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            warnings.warn(f"plugin {point.name!r} ({point.value}) is not loaded: {reason}", stacklevel=2)


def import_plugins(modules: Iterable[str]) -> None:
    """Import plugins that a user names.

    Args:
        modules: Dotted names of modules.

    Raises:
        UserError: For a module that does not exist. An error inside of one keeps its traceback.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UserError(f"--plugins: no module named {name!r} in the current folder or the environment") from None
