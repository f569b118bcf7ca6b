"""Distributed training: FSDP2, tensor parallelism and sharded checkpoints."""

from lit_tokenformer.distributed.strategy import GrowingModelParallelStrategy

__all__ = ["GrowingModelParallelStrategy"]
