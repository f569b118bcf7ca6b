"""Distributed training: FSDP2, tensor parallelism and sharded checkpoints."""
