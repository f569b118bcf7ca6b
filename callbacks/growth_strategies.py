"""Context of a growth under each Lightning strategy, and strategies that do not support growth."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)

from lit_tokenformer.distributed.sharding import reshard
from lit_tokenformer.errors import UserError


@contextmanager
def _rewrap_ddp(trainer: Trainer) -> Iterator[None]:
    """Unwrap the model from DDP and wrap it again: a reducer of replaced parameters would not average gradients."""
    strategy = trainer.strategy
    assert isinstance(strategy, DDPStrategy)
    wrapped: Any = strategy.model
    if hasattr(wrapped, "_remove_autograd_hooks"):
        wrapped._remove_autograd_hooks()
    del wrapped
    strategy.model = trainer.lightning_module
    gc.collect()
    yield
    _forget_buckets(strategy._ddp_comm_state)
    strategy._pl_static_graph_delay_done = False
    strategy.configure_ddp()


def _forget_buckets(state: Any) -> None:
    """Clear PowerSGD's state per gradient bucket.

    Like a new state, it runs vanilla all-reduce for two steps first, because DDP rebuilds the buckets after the first.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState  # not in every build of torch

    if isinstance(state, PowerSGDState):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()
        state.iter = min(state.iter, max(0, state.start_powerSGD_iter - 2))


@contextmanager
def _between_gathers(trainer: Trainer) -> Iterator[None]:
    """Reshard the modules before a growth, so that they hold the same parameters as the optimizer."""
    reshard(trainer.lightning_module)
    yield


_STRATEGIES: dict[type, Callable[[Trainer], AbstractContextManager[None]] | None] = {
    SingleDeviceStrategy: lambda trainer: nullcontext(),
    DDPStrategy: _rewrap_ddp,
    ModelParallelStrategy: _between_gathers,
    DeepSpeedStrategy: None,  # a DDPStrategy, but its engine owns flat copies of the parameters
    SingleDeviceXLAStrategy: None,
    XLAStrategy: None,
}
"""Context of a growth by strategy; the first class in a strategy's MRO applies, ``None`` rejects."""


def refuse_strategy(kind: type) -> None:
    """Reject a strategy that does not support growth.

    Args:
        kind: Class of the strategy.

    Raises:
        ValueError: If it does not support growth.
    """
    if _around_growth(kind) is None:
        raise UserError(
            f"trainer.strategy: a model cannot grow under {kind.__name__}; use 'auto', 'ddp' "
            "or ModelParallelStrategy, or grow a checkpoint between two runs with `lit-tokenformer grow`"
        )


def growth_context(trainer: Trainer) -> AbstractContextManager[None]:
    """Return the context manager of a growth under the trainer's strategy.

    Raises:
        ValueError: If the strategy does not support growth.
    """
    refuse_strategy(type(trainer.strategy))
    context = _around_growth(type(trainer.strategy))
    return nullcontext() if context is None else context(trainer)


def _around_growth(kind: type) -> Callable[[Trainer], AbstractContextManager[None]] | None:
    return next((_STRATEGIES[base] for base in kind.__mro__ if base in _STRATEGIES), None)
