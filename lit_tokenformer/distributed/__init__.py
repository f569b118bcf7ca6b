"""Models sharded over several processes: FSDP2, tensor parallelism, and their checkpoints."""
