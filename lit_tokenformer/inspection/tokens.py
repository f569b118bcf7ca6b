"""Report on the parameter tokens of a model: use, importance, removal, origin, contexts and written outputs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.inspection.ablation import Ablation, rank_correlation
from lit_tokenformer.inspection.meaning import (
    Contexts,
    ImageContext,
    Lens,
    TextContext,
    Written,
    find_backbone,
    writing_layers,
)
from lit_tokenformer.inspection.origins import Event, Origins, movement, trace
from lit_tokenformer.inspection.prune import TOLERANCE, by_influence
from lit_tokenformer.inspection.record import token_layers
from lit_tokenformer.inspection.statistics import TokenStatistics, collect, evaluated
from lit_tokenformer.models.pattention import Pattention

RARE = 1e-3
"""Share of data tokens below which a token is rarely active."""

ALIKE = 0.99
"""Cosine similarity of two keys above which they are alike."""

COLUMNS = (
    *("layer", "kind", "group", "token", "use", "active", "largest_weight", "importance", "first_order"),
    *(
        "influence",
        "removal",
        "dead",
        "rare",
        "growth",
        "step",
        "original",
        "moved",
        "nearest",
        "similarity",
        "top_class",
        "raises",
    ),
)
"""Columns of ``tokens.csv``."""


@dataclass
class LayerReport:
    """Report on the tokens of one layer, or of a further group of a layer.

    Args:
        name: Name of the layer.
        kind: Kind of tokens, such as ``ffn``.
        group: Name of the group, such as an adapter's; empty for the layer's own tokens.
        statistics: Statistics by token.
        origins: Origins by token.
        moved: Relative movement of each key since the earlier checkpoint, (N,); NaN where unknown.
        nearest: Index of the token with the most similar key, (N,) int64.
        similarity: Cosine similarity of the two keys, (N,).
        removals: Measured changes of the mean loss by the removal of single tokens, in nats.
        contexts: Contexts of the largest weights of the most important tokens.
        written: Written outputs of the most important tokens, for layers of the last blocks.
    """

    name: str
    kind: str
    group: str
    statistics: TokenStatistics
    origins: Origins
    moved: Tensor
    nearest: Tensor
    similarity: Tensor
    removals: dict[int, float] = field(default_factory=dict)
    contexts: dict[int, list[TextContext | ImageContext]] = field(default_factory=dict)
    written: Mapping[int, Written] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.nearest)

    @property
    def rare(self) -> Tensor:
        """Mask of the tokens that are rarely active, (N,) bool."""
        return self.statistics.active < RARE

    @property
    def dead(self) -> list[int]:
        """Tokens whose measured removal changes the mean loss by less than :data:`~.prune.TOLERANCE`."""
        return sorted(token for token, change in self.removals.items() if abs(change) < TOLERANCE)

    @property
    def important(self) -> list[int]:
        """All tokens, the most important first."""
        return self.statistics.importance.argsort(descending=True).tolist()

    @property
    def alike(self) -> list[tuple[int, int, float, bool]]:
        """Pairs of tokens with keys alike: two indices, similarity, and whether one is a copy of the other."""
        found = {}
        for token, other in enumerate(self.nearest.tolist()):
            pair = min(token, other), max(token, other)
            if self.similarity[token] >= ALIKE and token != other:
                original = self.origins.original
                copies = int(original[token]) == other or int(original[other]) == token
                found[pair] = (*pair, float(self.similarity[token]), copies)
        return sorted(found.values(), key=lambda pair: -pair[2])


@dataclass
class TokenReport:
    """Report on all parameter tokens of a model.

    Args:
        layers: Layers in the order of the model.
        loss: Mean loss over the batches.
        data_tokens: Data tokens of the batches.
        events: Growths of the model.
        measured: Importance and measured removal of the most important tokens, as (layer, token, both).
        images: PNG images of the contexts in base64, by key.
        class_names: Names of the classes; empty for text.
    """

    layers: list[LayerReport]
    loss: float
    data_tokens: int
    events: Sequence[Event] = ()
    measured: list[tuple[str, int, float, float]] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)

    @property
    def correlation(self) -> float:
        """Rank correlation of importance with measured removal, over all tokens that were measured."""
        pairs = [
            (float(layer.statistics.importance[token]), change)
            for layer in self.layers
            for token, change in layer.removals.items()
        ]
        return rank_correlation([one for one, _ in pairs], [other for _, other in pairs])

    def rows(self) -> Iterator[list[Any]]:
        """Yield one row of :data:`COLUMNS` for each parameter token."""
        for layer in self.layers:
            one, origins = layer.statistics, layer.origins
            dead, rare = {*layer.dead}, layer.rare.tolist()
            for token in range(len(layer)):
                growth, original, moved = int(origins.growth[token]), int(origins.original[token]), layer.moved[token]
                removal = layer.removals.get(token)
                written = layer.written.get(token)
                numbers = (one.use, one.active, one.largest, one.importance, one.first_order, one.influence)
                yield [
                    *(layer.name, layer.kind, layer.group, token),
                    *(f"{float(values[token]):.6g}" for values in numbers),
                    "" if removal is None else f"{removal:.3g}",
                    "" if removal is None else int(token in dead),
                    int(rare[token]),
                    "" if growth < 0 else growth,
                    self.events[growth - 1].get("step", "") if growth > 0 else "",
                    "" if original < 0 else original,
                    "" if moved.isnan() else f"{float(moved):.4g}",
                    int(layer.nearest[token]),
                    f"{float(layer.similarity[token]):.4f}",
                    self._top_class(one, token),
                    "" if written is None else json.dumps([name for name, _ in written.raised], ensure_ascii=False),
                ]

    def _top_class(self, statistics: TokenStatistics, token: int) -> str:
        if statistics.by_class is None:
            return ""
        number = int(statistics.by_class[:, token].argmax())
        # a cell that begins with = is a formula to a spreadsheet
        return json.dumps(self.class_names[number] if number < len(self.class_names) else str(number))

    def to_csv(self) -> str:
        """Return the report as CSV, one line per token."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(self.rows())
        return text.getvalue()


def token_report(
    model: Any,
    batches: Iterable[Any],
    top: int = 20,
    ablate: int = 32,
    contexts: int = 6,
    events: Sequence[Event] = (),
    earlier: Mapping[str, Tensor] | None = None,
    earlier_growths: int = 0,
) -> TokenReport:
    """Report on the parameter tokens of a model.

    Args:
        model: A task (:class:`~lit_tokenformer.tasks.LitTask`) of a single backbone, with its weights.
        batches: Batches of the task; they are kept for the contexts.
        top: Number of tokens per layer, the most important ones, with contexts and written outputs.
        ablate: Number of the most important tokens, and of the least influential ones, whose removal is measured.
        contexts: Contexts per token.
        events: Growths of the model, the oldest first, as recorded by :class:`~callbacks.ParameterGrowthCallback`.
        earlier: State dict of an earlier checkpoint of the fit, to measure movement from.
        earlier_growths: Number of the growths before that checkpoint.

    Raises:
        UserError: If the model has no Pattention layer or several backbones, for negative numbers, and without batches.

    Example:
        ::

            task = LitCausalLM.load_from_checkpoint("last.ckpt")
            report = token_report(task, batches)
            print(report.layers[0].important[:5])
    """
    for setting, number in (("top", top), ("ablate", ablate), ("contexts", contexts)):
        if number < 0:
            raise UserError(f"{setting}: expected a whole number of at least 0, got {number}")
    layers, backbone = token_layers(model), find_backbone(model)
    if backbone is None:
        raise UserError("model: expected a single backbone; `lit-tokenformer split` writes one checkpoint per task")
    batches = list(batches)
    found, loss, data_tokens = collect(model, batches, contexts)
    unit = backbone.config.pattern_length
    report = TokenReport([], loss, data_tokens, events)
    for name, layer in layers.items():
        origins = trace(events, name, layer.num_tokens, unit, layer.kind)
        source = trace(events[earlier_growths:], name, layer.num_tokens, unit, layer.kind)
        then = (earlier or {}).get(f"{source.layer}.key_tokens")
        keys = layer.key_tokens.detach().cpu()
        nearest, similarity = _nearest(keys)
        kind, _, group = layer.kind.partition(":")
        moved = movement(keys, then, source.source)
        report.layers.append(LayerReport(name, kind, group, found[name], origins, moved, nearest, similarity))
    with evaluated(model):
        _measure(report, model, batches, ablate)
        _describe(report, model, layers, batches, top)
    return report


def _measure(report: TokenReport, model: Any, batches: Sequence[Any], count: int) -> None:
    """Measure the removal of the most important tokens, and of the least influential ones."""
    by_name = {layer.name: layer for layer in report.layers}
    removable = {name: layer.statistics for name, layer in by_name.items() if len(layer) > 1}
    ranked = [(float(value), name, i) for name, one in removable.items() for i, value in enumerate(one.importance)]
    highest = [(name, token) for _, name, token in sorted(ranked, reverse=True)[:count]]
    lowest = by_influence(removable)[:count]
    if not highest:
        return
    ablation = Ablation(model, batches, {name: one.energy for name, one in removable.items()})
    for name, token in dict.fromkeys([*highest, *lowest]):
        by_name[name].removals[token] = ablation.change(name, token)
    report.measured = [
        (name, token, float(removable[name].importance[token]), by_name[name].removals[token])
        for name, token in highest
    ]


def _describe(
    report: TokenReport, model: Any, layers: Mapping[str, Pattention], batches: Sequence[Any], top: int
) -> None:
    """Add contexts and written outputs of the most important tokens of each layer."""
    contexts, writers = Contexts(model, batches), writing_layers(model)
    lens = Lens(model, batches[0]) if writers and top else None
    for layer in report.layers:
        tokens, one = layer.important[:top], layer.statistics
        layer.contexts = {token: contexts.of(one.weights[:, token], one.places[:, token]) for token in tokens}
        if lens is not None and layer.name in writers:
            layer.written = lens.written(layers[layer.name], tokens, contexts)
    report.images = contexts.images
    if any(layer.statistics.by_class is not None for layer in report.layers):
        report.class_names = [contexts.name(number) for number in range(len(contexts.outputs))]


def _nearest(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Find the most similar other key of each, (N, D) -> index and cosine similarity, (N,) each."""
    unit = F.normalize(keys.float(), dim=1)
    if len(unit) < 2:
        return torch.zeros(len(unit), dtype=torch.int64), torch.zeros(len(unit))
    best: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(unit), 1024):
        block = unit[start : start + 1024] @ unit.T
        block[torch.arange(len(block)), torch.arange(start, start + len(block))] = -2
        best.append(tuple(block.max(dim=1)))  # type: ignore[arg-type]
    values, index = (torch.cat(parts) for parts in zip(*best, strict=True))
    return index, values
