"""Registries of named parts, data sources and growth methods, and the plugins that extend them.

A plugin is a module that registers entries on import. Packages declare plugins in the entry-point group
``lit_tokenformer.plugins``; ``--plugins my_module`` on the command line imports one explicitly.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

from lit_tokenformer.errors import UserError, unknown_name

PLUGIN_GROUP = "lit_tokenformer.plugins"
"""Entry-point group of plugins; each entry point is a module."""

T = TypeVar("T")
Entry = TypeVar("Entry")


class Registry(Generic[T]):
    """Mapping of the names that a setting accepts to entries.

    Args:
        setting: Name of the setting in errors.

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
        """Register the decorated object under a name.

        Args:
            name: Name in configs.
            needs: Fields of the architecture with the values that a part supports; other fields are unrestricted. It is
                enough that one of two parts declares support for the other.

        Raises:
            UserError: If the name is taken.
        """
        if name in self.entries:
            raise UserError(f"{self.setting}: {name!r} is already registered; choose another name")

        def decorate(entry: Entry) -> Entry:
            self.entries[name] = cast(T, entry)
            self._needs[name] = needs
            return entry

        return decorate

    def names(self) -> list[str]:
        """Sorted names, including those of plugins."""
        load_plugins()
        return sorted(self.entries)

    def needs(self, name: str) -> dict[str, tuple[Any, ...]]:
        """Fields of the architecture that an entry restricts, with the supported values."""
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
"""Fields of :class:`~lit_tokenformer.models.TokenformerConfig`."""
STEMS: Registry[Any] = Registry("stem")
"""``(config) -> module``: input -> (B, T, D); a class with ``num_positions(config)``, the sequence length."""
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
IMAGE_TEXT_SOURCES: Registry[Any] = Registry("data.dataset")
"""An :class:`~lit_tokenformer.data.image_text.sources.ImageTextSource`."""
TEXT_SOURCES: Registry[Callable[..., Any]] = Registry("data.dataset")
"""``(settings) -> TextSplits``; see :mod:`lit_tokenformer.data.text.sources`."""
WEIGHT_FORMATS: Registry[Any] = Registry("project")
"""A :class:`~lit_tokenformer.interop.weight_format.WeightFormat`."""
ENGINES: Registry[Any] = Registry("format")
"""An :class:`~lit_tokenformer.interop.engines.Engine`."""
TRANSFORMERS_MODELS: Registry[Any] = Registry("config_json: model_type")
"""An :class:`~lit_tokenformer.interop.architectures.Architecture` of transformers, by ``model_type``."""
TASKS: Registry[type] = Registry("ckpt_path: task")
"""LightningModules by class name, rebuilt from a checkpoint by the commands."""

_loaded = False


def load_plugins() -> None:
    """Import the plugins of the entry-point group, once; skip a broken one with a warning."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for point in metadata.entry_points(group=PLUGIN_GROUP):
        try:
            point.load()
        except Exception as error:  # third-party code must not break the rest
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            warnings.warn(f"plugin {point.name!r} ({point.value}) skipped: {reason}", stacklevel=2)


def import_plugins(modules: Iterable[str]) -> None:
    """Import plugins by module name.

    Args:
        modules: Dotted module names.

    Raises:
        UserError: If a module does not exist; errors inside a module keep their traceback.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UserError(f"--plugins: no module named {name!r} in the current folder or the environment") from None
