"""What every test shares: no network, one thread (the sizes are tiny), one seed, an environment of its own."""

import functools
import os
import signal
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings
from lightning.fabric.plugins.environments import LightningEnvironment

from lit_tokenformer.data.images.sources import SubsetSamples
from lit_tokenformer.registry import IMAGE_SOURCES

torch.set_num_threads(1)
# in the background of a shell, or under nohup, they are ignored, and every process that a test starts inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

collect_ignore = ["data"]  # plugins there register their names when they are imported

_read = AttributeDocstrings.get_attr_docs


@functools.cache
def _read_once(component):
    """Every command builds its parser anew, and for it reads the source of the same classes: much of what it costs."""
    return _read(AttributeDocstrings(), component)


AttributeDocstrings.get_attr_docs = lambda self, component: _read_once(component)


UPSTREAM = (  # markers by which the suites of timm and transformers sort their tests, see tests/upstream
    *("base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout", "generate", "order", "asyncio"),
    *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test"),
    *("is_pipeline_test", "is_tensor_parallel_test", "is_training_test", "is_expert_parallel_test", "is_fsdp_test"),
    *("is_agent_test", "is_staging_test", "torch_export_test"),
)


def pytest_configure(config):
    for name in UPSTREAM:
        config.addinivalue_line("markers", f"{name}: of an upstream suite")


def pytest_runtest_setup(item):
    """Skip what needs a CUDA device where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers on one thread and compiles anew, whichever ran before it.

    Lightning's launchers set another number of threads for the whole process, and a process that forks after it used
    several hangs in the child's first convolution.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Lightning writes MASTER_PORT and ranks into it; processes of a later test would meet on a port taken since.

    It also asks for a free port and gives it back before its processes bind it, so that another test can take it. Here
    they are clients of a store of this process, as under torchrun.
    """
    before, stores, main_port = dict(os.environ), [], LightningEnvironment.main_port

    def port_of_a_store(environment: LightningEnvironment) -> int:
        if environment._main_port == -1 and "LOCAL_RANK" not in os.environ:
            stores.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            os.environ |= {"MASTER_PORT": str(stores[-1].port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        return main_port.fget(environment)

    monkeypatch.setattr(LightningEnvironment, "main_port", property(port_of_a_store))
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


_DIGITS = IMAGE_SOURCES["digits"]


def _open_few(settings):
    splits = _DIGITS.open(settings)
    train, val = SubsetSamples(splits.train, np.arange(143)), SubsetSamples(splits.val, np.arange(36))
    return replace(splits, train=train, val=val, test=val, num_train=143)


@pytest.fixture(scope="module")
def few_digits():
    """A tenth of the digits: reading images is most of what a fit of a tiny model costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMAGE_SOURCES.entries, "digits", replace(_DIGITS, open=_open_few))
        yield
