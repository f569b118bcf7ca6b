"""Choice between operations of torch and a Triton kernel, by measured time on first use."""

from __future__ import annotations

import importlib.util
import logging
import os
import statistics
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lit_tokenformer.errors import UserError, unknown_name

SETTING = "LIT_TOKENFORMER_KERNELS"
"""Environment variable: ``auto`` measures, ``plain`` and ``triton`` force one form."""

form = os.environ.get(SETTING, "auto")
"""Value of the setting, read at import."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs kernels on a CPU."""

MARGIN = 0.97
"""Largest ratio of kernel's time to torch's at which the kernel is taken."""

_FORMS = ("auto", "plain", "triton")
_ROUNDS, _CALLS = 5, 3

_log = logging.getLogger(__name__)
_installed = importlib.util.find_spec("triton") is not None
_kernel_is_faster: dict[Hashable, bool] = {}


def fixed_choice() -> bool | None:
    """Decide whether a kernel is taken by the setting and the state of torch; ``None`` leaves it to measured time.

    Operations of torch are taken under ``torch.compile`` and ``torch.export``, where a compiler fuses them, and with
    ``torch.use_deterministic_algorithms``. The setting overrides both.

    Raises:
        UserError: If the setting is unknown, or forces Triton where it is not installed.
    """
    if form == "auto":
        fixed = torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled() or not _installed
        return False if fixed else None
    if form not in _FORMS:
        raise unknown_name(SETTING, form, _FORMS)
    if form == "triton" and not _installed:
        raise UserError(f"{SETTING}: 'triton' requires the package triton (expected auto or plain without it)")
    return form == "triton"


def is_faster(key: Hashable, x: Tensor, plain: Callable[[], object], kernel: Callable[[], object]) -> bool:
    """Check whether a kernel is faster than operations of torch; the first call with ``key`` times both.

    Operations of torch are taken, and no decision is kept, where nothing can be timed: while a CUDA graph is captured,
    with fake tensors or a dispatch mode, and on another device than the current one.

    Args:
        key: Identifies operation, sizes, dtype and device.
        x: Input on the device.
        plain: Runs the operations of torch once.
        kernel: Runs the kernel once, with what both share.
    """
    if key not in _kernel_is_faster:
        if not _measurable(x):
            return False
        _kernel_is_faster[key] = _measure(key, plain, kernel)
    return _kernel_is_faster[key]


def _measurable(x: Tensor) -> bool:
    """Check that time can be measured: real tensors on the current CUDA device, outside of a graph capture."""
    plain = type(x) is Tensor and _get_current_dispatch_mode() is None and x.device.type == "cuda"
    return plain and x.device.index == torch.cuda.current_device() and not torch.cuda.is_current_stream_capturing()


def _measure(key: Hashable, plain: Callable[[], object], kernel: Callable[[], object]) -> bool:
    """Time both forms in turn; the kernel loses if it does not compile or run."""
    try:
        with torch.no_grad():
            kernel()  # compiles
            plain()
            ratio = statistics.median(_milliseconds(kernel) / _milliseconds(plain) for _ in range(_ROUNDS))
    except Exception as error:
        _log.warning("Triton kernel of %s failed, operations of torch take its place: %s", key, error)
        return False
    _log.info("Triton kernel of %s: %.2f of the time of torch's operations", key, ratio)
    return ratio <= MARGIN


def _milliseconds(function: Callable[[], object]) -> float:
    """Time of one call on the current CUDA device, or its host time where that is longer."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_CALLS):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _CALLS
