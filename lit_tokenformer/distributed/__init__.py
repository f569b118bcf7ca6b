"""Models sharded over several processes: FSDP2, tensor parallelism, and their checkpoints."""

from lit_tokenformer.distributed.strategy import GrowingModelParallelStrategy

__all__ = ["GrowingModelParallelStrategy"]
