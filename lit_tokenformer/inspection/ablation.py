"""Measured removal of single parameter tokens: the change of the mean loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_tokenformer.inspection.prune import Energy, without
from lit_tokenformer.inspection.statistics import Loss, mean_loss, task_loss
from lit_tokenformer.models import Tokenformer


class Ablation:
    """Measurement of removals over fixed batches, in the mode of the model.

    The inputs of all blocks are kept, so a removal computes the block of its layer and those after it. Memory: depth x
    data tokens x width.

    Args:
        model: Task, or any module with ``loss``.
        batches: Batches of the task.
        energy: Mean share of each token in the squared norm of the scores, by layer.
        loss: Loss of the module for a batch.

    Attributes:
        loss: Mean loss of the whole model.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], energy: Energy, loss: Loss = task_loss) -> None:
        self._model, self._batches, self._energy, self._compute = model, batches, energy, loss
        models = [(name, part) for name, part in model.named_modules() if isinstance(part, Tokenformer)]
        self._blocks: list[Any] = list(models[0][1].blocks) if len(models) == 1 else []
        self._prefix = f"{models[0][0]}.blocks.".lstrip(".") if models else ""
        self._inputs: list[list[Tensor]] = [[] for _ in self._blocks]  # by block and batch
        with ExitStack() as hooks:
            for block, inputs in zip(self._blocks, self._inputs, strict=True):
                hook = block.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0]))
                hooks.callback(hook.remove)
            self.loss = mean_loss(model, batches, loss)

    def change(self, layer: str, token: int) -> float:
        """Compute the change of the mean loss when one token of a layer is removed, in nats."""
        number = layer.removeprefix(self._prefix).partition(".")[0]
        first = int(number) if layer.startswith(self._prefix) and number.isdigit() else 0
        with without(self._model, {layer: [token]}, self._energy), self._from_block(first):
            return mean_loss(self._model, self._batches, self._compute) - self.loss

    @contextmanager
    def _from_block(self, first: int) -> Iterator[None]:
        """Skip the blocks before ``first``, whose input is the kept one."""
        if not 0 < first < len(self._blocks):
            yield
            return
        inputs = iter(self._inputs[first])

        def skip(x: Tensor, context: Any, *rest: Any) -> Any:
            return x if context.aux_losses is None else (x, {})

        with ExitStack() as stack:
            for block in self._blocks[:first]:
                block.forward = skip
                stack.callback(block.__dict__.pop, "forward")
            hook = self._blocks[first].register_forward_pre_hook(lambda _, given: (next(inputs), *given[1:]))
            stack.callback(hook.remove)
            yield


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Compute Spearman's rank correlation; NaN for fewer than two pairs.

    Example:
        >>> round(rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]), 2)
        0.5
    """
    from torchmetrics.functional import spearman_corrcoef

    if len(one) < 2:
        return float("nan")
    return float(spearman_corrcoef(torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)))
