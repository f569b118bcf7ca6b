"""Statistics of parameter tokens over batches, in one pass and in bounded memory.

Importance estimates the increase of the mean loss when a token is removed. To first order it is ``-sum_t c_t`` with
``c_t = w_t (V . dL/dy_t)`` over data tokens t (arXiv 1611.06440, eq. 7). The second order is ``sum c_t^2 / 2``, the
diagonal of the empirical Fisher matrix over the items of the loss (arXiv 1906.10771, eq. 8): data tokens of a language
model, samples of a classifier. The sum ranks tokens like measured removal; the size of their contributions does not.

Shapes: B batch, T data tokens of a sequence, R data tokens of a batch, N parameter tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.inspection.record import observe, scores, token_layers, weights_of
from lit_tokenformer.models import Tokenformer
from lit_tokenformer.models.pattention import Pattention

Loss = Callable[[Any, Any], tuple[Tensor, Tensor | int]]
"""Function ``(model, batch)`` to the mean loss, (), and its number of items."""

ACTIVE = 0.1
"""Weight above which a token is active."""

_BATCH = 2**32
"""Data tokens per batch in the number of a place."""


@dataclass
class TokenStatistics:
    """Statistics of the tokens of one layer, by token (N,).

    Args:
        use: Mean of \\|w\\| over data tokens.
        active: Share of data tokens with w above :data:`ACTIVE`.
        largest: Maximum of w.
        first_order: First-order increase of the mean loss when the token is removed.
        importance: Increase of the mean loss to second order.
        influence: Sum of the absolute first-order changes at each data token, an upper bound of \\|first_order\\|.
        energy: Mean share of the squared norm of all scores.
        weights: Largest weights, (K, N) in descending order.
        places: Places of the largest weights, (K, N) int64: the number of the batch times 2^32, plus the flat index of
            the data token in the batch; -1 where unknown.
        by_class: Mean of \\|w\\| by class of the sample, (C, N); ``None`` for data without classes.
        data_tokens: Data tokens seen by the layer.
        samples: Samples of each class, (C,).
    """

    use: Tensor
    active: Tensor
    largest: Tensor
    first_order: Tensor
    importance: Tensor
    influence: Tensor
    energy: Tensor
    weights: Tensor
    places: Tensor
    by_class: Tensor | None = None
    data_tokens: int = 0
    samples: Tensor | None = None

    @staticmethod
    def empty(layer: Pattention, top: int, classes: int) -> TokenStatistics:
        """Create the statistics of a layer over no data."""
        count, device = layer.num_tokens, layer.key_tokens.device
        sums: Any = [torch.zeros(count, dtype=torch.float64) for _ in range(7)]
        sums[2].fill_(-torch.inf)
        places = torch.full((top, count), -1, dtype=torch.int64, device=device)
        rows: Any = [torch.full((top, count), -torch.inf, device=device), places]
        found = TokenStatistics(*sums, *rows)
        if classes:
            found.by_class = torch.zeros(classes, count, dtype=torch.float64)
            found.samples = torch.zeros(classes, dtype=torch.float64)
        return found

    @property
    def effective(self) -> float:
        """Effective number of tokens: exp of the entropy of their shares of the use."""
        share = self.use / self.use.sum().clamp_min(1e-30)
        return float(torch.special.entr(share).sum().exp())

    @torch.no_grad()
    def add(
        self,
        layer: Pattention,
        x: Tensor,
        grad: Tensor | None,
        rows: Rows,
        number: int,
        items: int,
        labels: Tensor | None,
    ) -> None:
        """Add the data tokens of a batch.

        Args:
            layer: The layer.
            x: Its input, (..., D_in).
            grad: Gradient of the summed loss with respect to its output, (..., D_out); ``None`` for no effect.
            rows: Data tokens to count.
            number: Number of the batch.
            items: Number of items of the loss.
            labels: Class of each sample, (B,).
        """
        given = scores(layer, x)
        weights = weights_of(layer, given).flatten(0, -2).float()  # (R, N)
        if grad is not None:
            change = weights * (grad.flatten(0, -2).float() @ layer.value_tokens.T.float())
            first = change.sum(dim=0).double().cpu()
            of_items = change.unflatten(0, x.shape[:-1]).flatten(1, -2).sum(dim=1) if items == len(x) else change
            self.first_order -= first
            self.importance += of_items.square().sum(dim=0).double().cpu() / 2 - first
            self.influence += change.abs().sum(dim=0).double().cpu()
        squared = given.flatten(0, -2).float().square()
        shares = squared / squared.sum(dim=1, keepdim=True).clamp_min(1e-30)
        if labels is not None and self.by_class is not None and self.samples is not None and x.ndim == 3:
            of_samples = weights.abs().unflatten(0, x.shape[:2]).mean(dim=1).double().cpu()  # (B, N)
            self.by_class.index_add_(0, labels, of_samples)
            self.samples += torch.bincount(labels, minlength=len(self.samples))
        places = rows.of(x)
        if places is None:
            places = torch.full((len(weights),), -1, device=x.device)
        elif rows.counted is not None:
            kept = rows.counted.flatten()[places]
            weights, shares, places = weights[kept], shares[kept], places[kept]
        self.data_tokens += len(weights)
        if not len(weights):
            return
        self.use += weights.abs().sum(dim=0).double().cpu()
        self.active += weights.gt(ACTIVE).sum(dim=0).double().cpu()
        self.largest = self.largest.maximum(weights.amax(dim=0).double().cpu())
        self.energy += shares.sum(dim=0).double().cpu()
        best, index = weights.topk(min(len(self.weights), len(weights)), dim=0)
        numbered = torch.where(places[index] < 0, -1, places[index] + number * _BATCH)
        merged, order = torch.cat([self.weights, best]).topk(len(self.weights), dim=0)
        self.weights, self.places = merged, torch.cat([self.places, numbered]).gather(0, order)

    def finish(self, items: float) -> None:
        """Turn sums into means, over the data tokens and over the items of the loss."""
        for name in ("use", "active", "energy"):
            getattr(self, name).div_(max(self.data_tokens, 1))
        for name in ("first_order", "importance", "influence"):
            getattr(self, name).div_(max(items, 1))
        if self.by_class is not None and self.samples is not None:
            self.by_class /= self.samples.clamp_min(1)[:, None]
        self.weights, self.places = self.weights.cpu(), self.places.cpu()


@dataclass(frozen=True)
class Rows:
    """Data tokens of a batch.

    Args:
        counted: Mask of the data tokens that are not padding, (B, T) bool; ``None`` without padding.
    """

    counted: Tensor | None = None

    def of(self, x: Tensor) -> Tensor | None:
        """Find the flat index of each data token of an input (..., D) in the batch, (R,) int64; ``None`` if unknown."""
        total = x.shape[:-1].numel()
        if self.counted is None or total == self.counted.numel():
            return torch.arange(total, device=x.device) if x.ndim == 3 else None
        packed = self.counted.flatten().nonzero()[:, 0]
        return packed if total == len(packed) else None  # a group that computes some of the data tokens


def place(number: int) -> tuple[int, int]:
    """Split the number of a place into batch and flat index of the data token."""
    return number // _BATCH, number % _BATCH


def task_loss(task: Any, batch: Any) -> tuple[Tensor, Tensor | int]:
    """Compute the evaluation loss of a :class:`~lit_tokenformer.tasks.LitTask`, and its number of items."""
    return task.feature_loss(*task.batch_features(batch))


def batch_rows(batch: Any) -> tuple[Rows, Tensor | None]:
    """Find the data tokens of a batch of text, masked text or images, and the class of each sample, (B,)."""
    if isinstance(batch, Tensor):  # (B, T + 1), negative where ignored
        return Rows(batch[:, :-1] >= 0), None
    if len(batch) == 3:
        tokens, _, lengths = batch
        return Rows(torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]), None
    labels = batch[1] if batch[1].ndim == 1 else batch[1].argmax(dim=1)
    return Rows(), labels.cpu()


def collect(
    model: nn.Module, batches: Iterable[Any], top: int = 8, loss: Loss = task_loss
) -> tuple[dict[str, TokenStatistics], float, int]:
    """Collect the statistics of all Pattention layers; the memory is that of a training step, plus the top places.

    Args:
        model: Task, or any module with ``loss``.
        batches: Batches of the task.
        top: Number of places of the largest weights to keep per token.
        loss: Loss of the module for a batch.

    Returns:
        Statistics by layer, the mean loss, and the data tokens of the batches.

    Raises:
        UserError: Without batches; see also :func:`~lit_tokenformer.inspection.record.observe`.
    """
    layers = token_layers(model)
    found: dict[str, TokenStatistics] = {}
    total, items = 0.0, 0.0
    with evaluated(model), torch.enable_grad():
        for number, batch in enumerate(batches):
            rows, labels = batch_rows(batch)
            if not found:
                classes = 0 if labels is None else _classes(model, labels)
                found = {name: TokenStatistics.empty(layer, top, classes) for name, layer in layers.items()}
            calls: list[tuple[str, Pattention, Tensor, Tensor]] = []
            with observe(model, partial(_keep, calls)):
                mean, count = loss(model, batch)
            total, items = total + float(mean.detach()) * float(count), items + float(count)
            grads = torch.autograd.grad(mean * count, [y for *_, y in calls], allow_unused=True)
            for (name, layer, x, _), grad in zip(calls, grads, strict=True):
                found[name].add(layer, x, grad, rows, number, int(count), labels)
            del calls, grads, mean, x, batch
    if not found:
        raise UserError("batches: expected at least one")
    for one in found.values():
        one.finish(items)
    return found, total / max(items, 1), max(one.data_tokens for one in found.values())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss = task_loss) -> float:
    """Compute the mean loss over batches, weighted by their numbers of items."""
    total = items = 0.0
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            mean, count = loss(model, batch)
            total, items = total + float(mean) * float(count), items + float(count)
    return total / max(items, 1)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode within the block, with trainable values and without checkpointing."""
    training = {part: part.training for part in model.modules()}
    checkpointed = [part for part in model.modules() if isinstance(part, Tokenformer) and part.grad_checkpointing]
    frozen = [one for one in model.parameters() if not one.requires_grad]
    try:
        model.eval()
        for part in checkpointed:
            part.set_grad_checkpointing(False)
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for part in checkpointed:
            part.set_grad_checkpointing(True)
        for parameter in frozen:
            parameter.requires_grad_(False)


def _keep(calls: list[Any], *call: Any) -> None:
    calls.append(call)


def _classes(model: Any, labels: Tensor) -> int:
    backbone = next((part for part in model.modules() if isinstance(part, Tokenformer)), None)
    return int(labels.max()) + 1 if backbone is None else max(backbone.num_classes, int(labels.max()) + 1)
