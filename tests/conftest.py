"""What every test shares: no network, one thread (the sizes are tiny), one seed, an environment of its own."""

import functools
import os
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings

from lit_tokenformer.data.image_sources import SOURCES, SubsetSamples

torch.set_num_threads(1)

_read = AttributeDocstrings.get_attr_docs


@functools.cache
def _read_once(component):
    """Every command builds its parser anew, and for it reads the source of the same classes: much of what it costs."""
    return _read(AttributeDocstrings(), component)


AttributeDocstrings.get_attr_docs = lambda self, component: _read_once(component)


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
    if torch.distributed.is_initialized():  # by a strategy that was refused; processes of a later test would join it
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def text_cache(tmp_path_factory):
    """One folder for what is tokenised, which all processes of the tests share."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "text_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "lit_tokenformer"


@pytest.fixture(scope="module")
def few_digits():
    """A tenth of the digits: reading images is most of what a fit of a tiny model costs."""
    whole = SOURCES["digits"]

    def open_few(settings):
        splits = whole.open(settings)
        train, val = SubsetSamples(splits.train, np.arange(143)), SubsetSamples(splits.val, np.arange(36))
        return replace(splits, train=train, val=val, test=val, num_train=143)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "digits", replace(whole, open=open_few))
        yield
