"""timm's own model tests, over the Tokenformer vision transformers.

They need a checkout of timm (``tests/upstream/checkouts.sh FOLDER``), named by ``TIMM_CHECKOUT``:

    TIMM_CHECKOUT=FOLDER/timm pytest -n 2 tests/upstream/test_timm.py
"""

import os
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("TIMM_CHECKOUT")
if CHECKOUT is None:
    pytest.skip("no TIMM_CHECKOUT", allow_module_level=True)

import timm  # noqa: E402

import lit_tokenformer.interop.timm  # noqa: E402, F401

SCRIPT = "TorchScript is deprecated, and scripts neither NamedTuples nor tables of parts"
NOT_APPLICABLE = {
    "test_model_inference": "needs pretrained weights of timm's hub",
    "test_model_load_pretrained": "needs pretrained weights; there are none on the hub",
    "test_model_features_pretrained": "needs pretrained weights; there are none on the hub",
    "test_model_default_cfgs": "for convolutional models; vision transformers have test_model_default_cfgs_non_std",
    "test_model_forward_features": "for convolutional models; vision transformers have forward_intermediates",
    "test_model_forward_torchscript": SCRIPT,
    "test_model_forward_fx_torchscript": SCRIPT,
    "test_model_forward_torchscript_with_features_fx": "of one other model",
}
"""Upstream tests that cannot apply, with the reason."""


def only_ours(listing):
    """Restrict a listing of model names."""
    return lambda *args, **kwargs: [name for name in listing(*args, **kwargs) if name.startswith("tokenformer_")]


def upstream() -> dict[str, object]:
    """Execute timm's test module over our models, listed where it lists other vision transformers."""
    path = Path(CHECKOUT, "tests", "test_models.py")
    text = path.read_text(encoding="utf-8")
    for name, entry in (("FEAT_INTER_FILTERS", "timm"), ("NON_STD_FILTERS", "tokenformer_*")):
        assert f"{name} = [\n" in text
        text = text.replace(f"{name} = [\n", f"{name} = [\n    {entry!r},\n", 1)
    listings = timm.list_models, timm.list_pretrained
    timm.list_models, timm.list_pretrained = map(only_ours, listings)
    try:
        found: dict[str, object] = {"__name__": __name__, "__file__": str(path)}
        exec(compile(text, str(path), "exec"), found)
    finally:
        timm.list_models, timm.list_pretrained = listings
    return {name: test for name, test in found.items() if name.startswith("test_model_")}


for _name, _test in upstream().items():
    globals()[_name] = pytest.mark.skip(NOT_APPLICABLE[_name])(_test) if _name in NOT_APPLICABLE else _test
