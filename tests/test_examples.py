"""The examples run end to end at a size of seconds; their figures are committed, and come from the whole runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_configs import fashion_mnist

ROOT = Path(__file__).parents[1]
ARMS = {"base", "grown", "continued", "scratch, same FLOPs", "scratch, FLOPs of base and growth"}


def smoke(name, output, *more):
    """Runs an example with one seed; returns the scores of each arm."""
    command = [sys.executable, "-m", f"examples.grow_pretrained.{name}", str(output), "--smoke", "--seeds", "1", *more]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    arms = json.loads((output / f"{name}.json").read_text())["arms"]
    assert arms.keys() == ARMS
    return {name: runs[0] for name, runs in arms.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_a_model_of_another_library_is_grown_and_given_back(name, tmp_path):
    more = [] if name == "gpt2" else fashion_mnist(tmp_path / "data", None)[1:]
    found = smoke(name, tmp_path / "fits", *(["--root", *more] if more else []))
    base, grown = found["base"], found["grown"]
    assert grown["loss"] < base["loss"] + 0.1  # it continues the base model; the images of the test carry no signal
    assert 1.9 < grown["block_parameters"] / base["block_parameters"] < 2.1
    for arm in ("continued", "scratch, same FLOPs"):
        assert abs(found[arm]["flops"] / grown["flops"] - 1) < 0.5  # whole steps, of which there are few
    assert found["scratch, FLOPs of base and growth"]["flops"] > 2 * grown["flops"]
    assert found["continued"]["parameters"] == base["parameters"]
    assert found["scratch, same FLOPs"]["parameters"] == grown["parameters"]


@pytest.mark.parametrize("name", ["gpt2", "gpt2_long", "vit", "vit_long"])
def test_committed_results_have_three_seeds_and_equal_flops(name):
    path = ROOT / "examples" / "grow_pretrained" / "results" / f"{name}.json"
    arms = json.loads(path.read_text())["arms"]
    assert arms.keys() == ARMS and all(len(runs) == 3 for runs in arms.values())
    spent = {arm: runs[0]["flops"] for arm, runs in arms.items()}
    assert spent["continued"] == pytest.approx(spent["grown"], rel=0.01)
    assert spent["scratch, same FLOPs"] == pytest.approx(spent["grown"], rel=0.01)
    assert spent["scratch, FLOPs of base and growth"] == pytest.approx(spent["base"] + spent["grown"], rel=0.01)
    sizes = {arm: {run["block_parameters"] for run in runs} for arm, runs in arms.items()}
    assert sizes["grown"] == sizes["scratch, same FLOPs"] and sizes["continued"] == sizes["base"]
