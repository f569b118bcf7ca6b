"""Architectures of other projects as tables: names of tensors and of settings, converted in both directions.

An :class:`Architecture` is data: a :class:`Field` per setting of its ``config.json`` and a :class:`Row` per tensor. A
setting in neither table is unsupported and named in an error, since it may change what the weights compute.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.models import Tokenformer, TokenformerConfig, preset_config
from lit_tokenformer.models.config import OF_EXPERTS
from lit_tokenformer.models.heads import make_head
from lit_tokenformer.tensor_files import TensorFiles

Settings = dict[str, Any]
"""Settings of a ``config.json``, with defaults filled in."""

REQUIRED: Any = object()
"""Default of a setting that must be given."""


class Transform(NamedTuple):
    """Conversion between tensors of another project and ours.

    Args:
        ours: ``(their tensors, settings) -> our tensors``.
        theirs: Its inverse; also runs on meta tensors, to compute the expected shapes.
    """

    ours: Callable[[list[Tensor], Settings], list[Tensor]]
    theirs: Callable[[list[Tensor], Settings], list[Tensor]]


SAME = Transform(lambda tensors, _: tensors, lambda tensors, _: tensors)
TRANSPOSED = Transform(lambda x, _: [one.t() for one in x], lambda x, _: [one.t() for one in x])


def fused(heads: Callable[[Settings], int] = lambda settings: 1, transposed: bool = False) -> Transform:
    """Convert query, key and value in one matrix, one after the other or within each head.

    Args:
        heads: Number of groups of query, key and value rows.
        transposed: Whether the matrix is stored as (in, out).
    """

    def ours(tensors: list[Tensor], settings: Settings) -> list[Tensor]:
        rows = tensors[0].t() if transposed else tensors[0]
        return [part.flatten(0, 1) for part in rows.unflatten(0, (heads(settings), 3, -1)).unbind(1)]

    def theirs(tensors: list[Tensor], settings: Settings) -> list[Tensor]:
        rows = torch.stack([part.unflatten(0, (heads(settings), -1)) for part in tensors], dim=1).flatten(0, 2)
        return [rows.t() if transposed else rows]

    return Transform(ours, theirs)


class Field(NamedTuple):
    """Setting of a ``config.json``.

    Args:
        theirs: Its key.
        ours: Field of :class:`TokenformerConfig`, or its ``mlp_hidden`` or ``head_width``.
        default: Value of an absent key; ``None`` for a value that other settings determine.
        read: ``(value, settings) -> value of ours``.
        write: ``(value of ours, settings written so far) -> value``.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    read: Callable[[Any, Settings], Any] = lambda value, settings: value
    write: Callable[[Any, Settings], Any] = lambda value, settings: value


def named(theirs: str, ours: str, default: Any, names: Mapping[Any, str]) -> Field:
    """Build the field of a setting whose values are names; the first of several equivalent names is written."""

    def read(value: Any, settings: Settings) -> str:
        if not isinstance(value, (str, bool)) or value not in names:
            raise UserError(f"{theirs}: unsupported (got {value!r}, expected {' or '.join(map(repr, names))})")
        return names[value]

    def write(value: Any, settings: Settings) -> str | None:
        return next((name for name, other in names.items() if other == value), None)

    return Field(theirs, ours, default, read, write)


class Row(NamedTuple):
    """Tensors of another project and the equivalent ones of ours.

    Args:
        theirs: Their names, with ``{i}`` for the block, and ``*`` for each of weight and bias.
        ours: Names in a :class:`Tokenformer`; rows whose tensors the model does not have are skipped.
        transform: Conversion between the two.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform = SAME


def row(theirs: str, ours: str, transform: Transform = SAME) -> Row:
    """Build a row from names separated by spaces."""
    return Row(tuple(theirs.split()), tuple(ours.split()), transform)


@dataclass(frozen=True)
class Architecture:
    """Architecture of another project.

    Args:
        preset: Preset with the parts of the architecture.
        fields: Settings with an equivalent field.
        rows: Tensors.
        parts: Fields that differ from the preset.
        classes: Names of classes in ``architectures``; the first is the one that is exported.
        bare: Names of classes without a head, whose head is newly initialized.
        prefix: Prefix of tensor names that a bare model omits.
        fixed: Settings that the model does not vary, with their supported values; the first is exported if true.
        ignored: Settings without effect on the outputs.
        buffers: Pattern of names of redundant tensors.
        unused: Pattern of names of tensors that contribute nothing to the outputs of our model, which are reported.
        spellings: Patterns of earlier tensor names, and their replacements.
        upgrade: Converts earlier or nested settings to flat ones.
        extras: Settings added to an exported config, from those written so far.
    """

    preset: str
    fields: tuple[Field, ...]
    rows: tuple[Row, ...]
    parts: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    prefix: str = ""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    buffers: str = r"(?!)"
    unused: str = r"(?!)"
    spellings: Mapping[str, str] = field(default_factory=dict)
    upgrade: Callable[[Settings], Settings] = dict
    extras: Callable[[Settings], Settings] = lambda settings: {}

    def read_settings(self, given: Mapping[str, Any]) -> tuple[TokenformerConfig, Settings]:
        """Convert the settings of a ``config.json``.

        Returns:
            Architecture, and the settings with defaults filled in.

        Raises:
            UserError: For a setting that is missing, unsupported, or contradicts another one.
        """
        classes = given.get("architectures") or []
        for name in classes if isinstance(classes, list) else [classes]:
            if self.classes and name not in (*self.classes, *self.bare):
                raise UserError(
                    f"architectures: unsupported (got {name!r}, expected {' or '.join((*self.classes, *self.bare))})"
                )
        settings = {key: value for key, value in self.upgrade(dict(given)).items() if value is not None}
        known = {one.theirs for one in self.fields}
        for key, value in settings.items():
            if key in self.fixed and value not in self.fixed[key]:
                raise UserError(f"{key}: unsupported (got {value!r}, expected {self.fixed[key][0]!r})")
            if key not in known and key not in self.fixed and key not in self.ignored:
                raise UserError(f"{key}: unsupported setting (got {_short(value)})")
        for one in self.fields:
            if one.default is REQUIRED and one.theirs not in settings:
                raise UserError(f"{one.theirs}: missing")
            settings.setdefault(one.theirs, None if one.default is REQUIRED else one.default)
        values: dict[str, Any] = {}
        for one in self.fields:
            value = one.read(_checked(one, settings[one.theirs]), settings)
            if one.ours in values and values[one.ours] != value:
                keys = [other.theirs for other in self.fields if other.ours == one.ours]
                raise UserError(
                    f"{one.theirs}: differs from {keys[0]} (got {settings[one.theirs]!r} and "
                    f"{settings[keys[0]]!r}, expected one value)"
                )
            values[one.ours] = value
        return preset_config(self.preset, **self.parts, **_sizes(values)), settings

    def write_settings(self, config: TokenformerConfig) -> Settings:
        """Convert an architecture to the settings of a ``config.json``.

        Args:
            config: Architecture, at its current size.

        Raises:
            UserError: For fields that the settings cannot express, which the error lists.
        """
        settings: Settings = {key: values[0] for key, values in self.fixed.items() if values[0]}
        for one in self.fields:
            settings[one.theirs] = one.write(_value(config, one.ours), settings)
        try:
            back, _ = self.read_settings({key: value for key, value in settings.items() if value is not None})
        except ValueError as error:
            raise UserError(f"has no {error}") from None
        check_lossless(config, back, "has no ")
        return settings | self.extras(settings)

    def distance(self, config: TokenformerConfig) -> int:
        """Count the parts of an architecture that differ from this one."""
        own = preset_config(self.preset, **self.parts)
        return sum(getattr(config, name) != getattr(own, name) for name in _PARTS)

    def expanded(self, config: TokenformerConfig, ours: Mapping[str, Tensor]) -> Iterator[Row]:
        """Expand the rows for a model of this size; a tied head has none."""
        for one in self.rows:
            text = " ".join(one.ours)
            for block in range(config.depth if "{i}" in text else 1):
                for kind in ("weight", "bias") if "*" in text else ("",):
                    names = [
                        tuple(name.replace("{i}", str(block)).replace("*", kind) for name in side)
                        for side in (one.theirs, one.ours)
                    ]
                    tied = config.tie_embeddings and names[1] == ("head.weight",)
                    if all(name in ours for name in names[1]) and not tied:
                        yield Row(names[0], names[1], one.transform)

    def read_tensors(
        self, files: TensorFiles, config: TokenformerConfig, settings: Settings
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Convert tensors one at a time.

        Returns:
            State dict of a :class:`Tokenformer` in the precision of the files, and notes on what has been left out or
            newly initialized.

        Raises:
            UserError: For a tensor that is missing, unexpected or misshapen, before any is loaded.
        """
        if config.depth > len(files.shapes):
            raise UserError(f"{config.depth} blocks, but only {len(files.shapes)} tensors")
        ours = _on_meta(config)
        rows = list(self.expanded(config, ours))
        expected: dict[str, tuple[int, ...]] = {}
        for one in rows:
            shapes = one.transform.theirs([ours[name] for name in one.ours], settings)
            expected |= {name: tuple(tensor.shape) for name, tensor in zip(one.theirs, shapes, strict=True)}
        sources, unused = self._sources(files, config, expected)
        fresh: set[str] = set()
        if set(settings.get("architectures") or self.bare) & set(self.bare):
            missing = [one for one in rows if not all(name in sources for name in one.theirs)]
            fresh = {one.ours[0] for one in missing if one.ours[0].startswith("head.")}
        rows = [one for one in rows if one.ours[0] not in fresh]
        for problem in _problems(rows, expected, sources, files):
            raise UserError(problem)
        state: dict[str, Tensor] = {}
        for one in rows:
            found = [self._read(files, sources[name]) for name in one.theirs]
            for name, tensor in zip(one.ours, one.transform.ours(found, settings), strict=True):
                kept = any(tensor is other for other in found)
                state[name] = tensor if kept else tensor.clone(memory_format=torch.contiguous_format)
        if config.tie_embeddings and "head.weight" in ours:
            state["head.weight"] = state["stem.embedding.weight"]
        if fresh:
            head = _fresh_head(config)
            state |= {name: head[name.removeprefix("head.")] for name in fresh}
        notes = [f"unused: {', '.join(unused)}"] if unused else []
        return state, notes + ([f"newly initialized: {', '.join(sorted(fresh))}"] if fresh else [])

    def _sources(
        self, files: TensorFiles, config: TokenformerConfig, expected: Mapping[str, Any]
    ) -> tuple[dict[str, list[str]], list[str]]:
        """Map each name of the table to its names in the files; two for tensors stored twice."""
        tied = {}
        if config.tie_embeddings:
            by_ours = {one.ours[0]: one.theirs[0] for one in self.rows}
            tied = {by_ours[name]: by_ours["stem.embedding.weight"] for name in ("head.weight",) if name in by_ours}
        sources: dict[str, list[str]] = {}
        unused = []
        for name in files.shapes:
            found = name
            for pattern, replacement in self.spellings.items():
                found = re.sub(pattern, replacement, found)
            found = tied.get(found, found)
            if found not in expected and self.prefix + found in expected:
                found = self.prefix + found
            if found not in expected and re.fullmatch(self.unused, found):
                unused.append(name)
            elif found in expected or not re.fullmatch(self.buffers, found):
                sources.setdefault(found, []).append(name)
        return sources, unused

    @staticmethod
    def _read(files: TensorFiles, names: list[str]) -> Tensor:
        first, *others = (files[name] for name in names)
        for name, other in zip(names[1:], others, strict=True):
            if not torch.equal(first, other):
                raise UserError(f"{name} differs from {names[0]}, to which config.json ties it")
        return first

    def write_tensors(
        self, config: TokenformerConfig, state: Mapping[str, Tensor], settings: Settings
    ) -> dict[str, Tensor]:
        """Convert a state dict.

        Args:
            config: Architecture, at its current size.
            state: State dict of a :class:`Tokenformer` of this size.
            settings: Result of :meth:`write_settings`.

        Raises:
            UserError: If a tensor is missing, unexpected or of another size than the others.
        """
        ours = _on_meta(config)
        rows = list(self.expanded(config, ours))
        tied = {"head.weight"} & ours.keys() if config.tie_embeddings else set()
        covered = {name for one in rows for name in one.ours} | tied
        for name in ours.keys() | state.keys() | covered:
            if name not in ours or name not in state or name not in covered:
                raise UserError(f"state: {name} has no equivalent")
            if ours[name].shape != state[name].shape:
                raise UserError(
                    f"state: {name} has shape {tuple(state[name].shape)}, expected {tuple(ours[name].shape)} as in the "
                    "other blocks"
                )
        found: dict[str, Tensor] = {}
        for one in rows:
            tensors = one.transform.theirs([state[name] for name in one.ours], settings)
            found |= dict(zip(one.theirs, tensors, strict=True))
        return found


def _on_meta(config: TokenformerConfig) -> dict[str, Tensor]:
    try:
        with torch.device("meta"):
            return Tokenformer(config).state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:  # such as sizes beyond 64 bits
        raise UserError(f"impossible sizes ({' '.join(str(error).split())[:200]})") from None


def _fresh_head(config: TokenformerConfig) -> dict[str, Tensor]:
    """Initialize a head, whatever the state of the random generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem: Any = SimpleNamespace(embedding=SimpleNamespace(weight=nn.Parameter(torch.empty(0, config.dim))))
        return make_head(config, stem).state_dict()


def _problems(
    rows: list[Row], expected: Mapping[str, tuple[int, ...]], sources: Mapping[str, list[str]], files: TensorFiles
) -> Iterator[str]:
    """Yield a line for each tensor that is missing, misshapen or unexpected."""
    wanted = {name: expected[name] for one in rows for name in one.theirs}
    for name, shape in wanted.items():
        if name not in sources:
            yield f"{name} is missing, expected shape {shape}"
        for found in sources.get(name, ()):
            if files.shapes[found] != shape:
                yield f"{found} has shape {files.shapes[found]}, expected {shape}"
    for name in sources:
        if name not in wanted:
            near = difflib.get_close_matches(name, wanted, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            yield f"{sources[name][0]} is not one of the {len(wanted)} tensors of this architecture{hint}"


_PARTS = (
    *("stem", "head", "mixer", "feed_forward", "positions", "projection"),
    *("norm", "norm_position", "bias", "activation"),
)
"""Fields that distinguish architectures."""

_INSTEAD = {"mlp_ratio": "mlp_hidden", "head_dim": "head_width", "num_kv_heads": "kv_heads"}
"""Fields of a config and the sizes that they determine."""

_FREE = {
    *("param_tokens", "score_norm"),  # of Pattention only
    *OF_EXPERTS,
    *("dropout", "attn_dropout", "drop_path", "patch_drop_rate", "init", "unpad", "low_precision_norm"),  # of training
}
UNUSED_BY_STEM = {
    "token": {"image_size", "patch_size", "in_chans", "num_classes", "global_pool", "class_token"},
    "patch": {"vocab_size", "context_length", "tie_embeddings"},
}
"""Fields without effect, by stem."""


def _compared(config: TokenformerConfig) -> Iterator[str]:
    """Yield the fields that determine the outputs of a model."""
    free = _FREE | UNUSED_BY_STEM.get(config.stem, set())
    if config.positions != "rotary":
        free = free | {"rotary_fraction", "rotary_base"}
    if all(config.parts_of(layer)[0] == "wkv" for layer in range(config.pattern_length)):
        free = free | {"num_heads", "head_dim", "num_kv_heads"}
    for one in dataclasses.fields(config):
        if one.name not in free:
            yield _INSTEAD.get(one.name, one.name)


def check_lossless(config: TokenformerConfig, back: TokenformerConfig, problem: str) -> None:
    """Reject an architecture that another project cannot express.

    Args:
        config: Architecture.
        back: The same after a round trip through the settings of the other project.
        problem: Start of the error, before the list of fields.

    Raises:
        UserError: If fields that determine the outputs differ.
    """
    lost = [name for name in _compared(config) if _value(config, name) != _value(back, name)]
    if lost:
        listed = ", ".join(f"{name} {_value(config, name)!r} (only {_value(back, name)!r})" for name in lost)
        raise UserError(f"{problem}{listed}")


def _value(config: TokenformerConfig, name: str) -> Any:
    return config.head_units[1] if name in ("kv_heads", "num_kv_heads") else getattr(config, name)


def _sizes(values: dict[str, Any]) -> dict[str, Any]:
    """Replace sizes by the fields that determine them."""
    dim, heads = values["dim"], values.get("num_heads", 1)
    if "mlp_hidden" in values:
        hidden = values.pop("mlp_hidden")
        values["mlp_ratio"] = 4.0 if hidden is None else hidden / dim
    width = values.pop("head_width", None)
    values["head_dim"] = width if width is not None and heads * width != dim else None
    if values.get("num_kv_heads") == heads:
        values["num_kv_heads"] = None
    return values


def _checked(one: Field, value: Any) -> Any:
    """Check the type of a setting: that of the field."""
    kind = type(getattr(TokenformerConfig, one.ours, 0))
    whole = kind is int or one.ours in ("num_kv_heads", "mlp_hidden", "head_width")
    if (value is None and one.default is None) or one.ours == "num_classes":
        return value
    if whole and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"{one.theirs}: expected a whole number of at least 1, got {_short(value)}")
    if kind is float and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise UserError(f"{one.theirs}: expected a number, got {_short(value)}")
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"{one.theirs}: expected true or false, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
