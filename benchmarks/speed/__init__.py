"""Speed and memory, each compared with another library, a formula or the hardware; one command per module."""
