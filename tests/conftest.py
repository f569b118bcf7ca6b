"""What every test shares: no network, one thread (the sizes are tiny), one seed, an environment of its own."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_environment():
    """Lightning writes MASTER_PORT and ranks into it; processes of a later test would meet on a port taken since."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
