"""FSDP2 for models that grow: checkpoints are written atomically, and load at any number of parameter tokens."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.constants import default_pg_timeout

from lit_tokenformer.distributed.checkpoint import NON_FINITE, load_into, save_folder
from lit_tokenformer.distributed.expert_parallel import SETTING
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.shards import is_elsewhere


class GrowingModelParallelStrategy(ModelParallelStrategy):
    """Shard a task with FSDP2, and its parameter tokens over a tensor-parallel group, while it grows.

    Registered as ``fsdp2`` when ``lit_tokenformer.tasks`` or ``callbacks`` is imported. Checkpoints of other
    LightningModules than the tasks of this project load as in Lightning.

    Args:
        data_parallel_size: Processes of a data-parallel group; ``auto`` takes all that ``tensor_parallel_size`` leaves.
        tensor_parallel_size: Processes that share the parameter tokens of each layer; ``auto`` takes those of a node.
        expert_parallel_size: Data-parallel processes among which the experts of each layer are divided; data tokens
            travel to their experts. 1 divides none.
        save_distributed_checkpoint: Whether each process saves its shard, into a folder, instead of one file.
        process_group_backend: Backend of ``torch.distributed``; ``None`` chooses by the device.
        timeout: Timeout of collectives.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy="fsdp2", accelerator="cpu", devices=2, logger=False)
        >>> type(trainer.strategy).__name__
        'GrowingModelParallelStrategy'
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        expert_parallel_size: int = 1,
    ) -> None:
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self.expert_parallel_size = expert_parallel_size
        if expert_parallel_size == 1:
            return
        if expert_parallel_size < 1:
            raise UserError(f"{SETTING}: expected a number of at least 1, got {expert_parallel_size}")
        if not save_distributed_checkpoint:
            raise UserError(f"{SETTING}: each process saves its experts (expected save_distributed_checkpoint: true)")

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto" and self._tensor_parallel_size != "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes // self._tensor_parallel_size
        data = self.num_nodes if self._data_parallel_size == "auto" else self._data_parallel_size
        if data % self.expert_parallel_size:
            raise UserError(
                f"{SETTING}: expected a divisor of data_parallel_size {data}, got {self.expert_parallel_size}"
            )
        super().setup_environment()

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        for parameter in self.lightning_module.parameters() if self.lightning_module is not None else ():
            if is_elsewhere(parameter):  # in the same parameter group as with one process, and never updated
                parameter.requires_grad_(False)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save a folder so that it exists in full or not at all; files are the ``CheckpointIO``'s concern.

        Args:
            checkpoint: The state that Lightning collected.
            filepath: The file or folder.
            storage_options: Not supported, as in Lightning's own.
        """
        if NON_FINITE in checkpoint:
            self.checkpoint_io.reject_non_finite(checkpoint, filepath)  # type: ignore[attr-defined]
        elif self._save_distributed_checkpoint and storage_options is None:
            save_folder(self, super().save_checkpoint, checkpoint, filepath)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a file or a folder into the sharded task, which takes the checkpoint's number of parameter tokens.

        Args:
            checkpoint_path: The file or folder.
            weights_only: Ignored for a task: pickled code is never executed.

        Raises:
            ValueError: If it cannot be read, or is of another architecture.
        """
        task: Any = self.lightning_module
        if not hasattr(task, "check_weights"):
            return super().load_checkpoint(checkpoint_path, weights_only)
        path = self.broadcast(checkpoint_path)
        return load_into(task, self.optimizers, path, task.take_trained_weights, task.check_weights)


def make_growing(strategy: ModelParallelStrategy) -> None:
    """Turn a plain ``ModelParallelStrategy``, or a user's subclass of it, into one for tasks that grow, in place.

    Args:
        strategy: The trainer's; sizes of groups stay as they are.
    """
    if not isinstance(strategy, GrowingModelParallelStrategy):
        kind = type(strategy)
        strategy.__class__ = type(f"Growing{kind.__name__}", (GrowingModelParallelStrategy, kind), {})


StrategyRegistry.register("fsdp2", GrowingModelParallelStrategy, description="FSDP2 for models that grow")
