"""Growth under DDP, on two processes of this machine; the fits are in ``ddp_scenarios.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_scenarios import SCENARIOS, run, scores  # beside this file
from filelock import FileLock

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
EQUAL = [name for name, scenario in SCENARIOS.items() if scenario.like is not None]
AVERAGED = [name for name in SCENARIOS if name != "nothing_averaged"]


def run_two(folder: Path) -> None:
    """Runs all scenarios in two processes, which meet at torchrun's store: no port is chosen before it is bound."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(ROOT / "tests" / "ddp_scenarios.py"), str(folder)]
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    assert done.returncode == 0, (folder / "log.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes found; where tests run in several processes, the first to come here starts them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ddp"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run_two(folder)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same fits in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: run(name, folder, devices=1) for name in EQUAL if SCENARIOS[name].like == name}


def assert_states_equal(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """Weights and the optimizer's state, old rows and new ones."""
    pairs = [(weight, theirs["weights"][name]) for name, weight in ours["weights"].items()]
    print(f"largest difference of weights: {max(float((a - b).abs().max()) for a, b in pairs):.2g}")
    for name, weight in ours["weights"].items():
        torch.testing.assert_close(weight, theirs["weights"][name], rtol=tolerance, atol=tolerance)
    assert ours["moments"].keys() == theirs["moments"].keys()
    for name, state in ours["moments"].items():
        assert state.keys() == theirs["moments"][name].keys(), name
        for part, value in state.items():
            torch.testing.assert_close(value, theirs["moments"][name][part], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", AVERAGED)
def test_processes_are_bit_equal_at_every_batch_and_growth(two: list[dict[str, Any]], name: str):
    first, second = (found[name] for found in two)
    assert first["growths"] == second["growths"]
    # when a trigger fires depends on rounding, which differs between releases of torch
    assert len(first["growths"]) in ((1, 2) if name == "triggered" else (2,))
    assert len(first["differences"]) > 12 and max(first["differences"] + second["differences"]) == 0
    assert_states_equal(first, second, tolerance=0)
    assert max(first["output_differences"]) < (1e-5 if name == "bf16_mixed" else 1e-12)
    assert first["old_wrappers_alive"] == second["old_wrappers_alive"] == 0


def test_the_comparison_sees_gradients_that_are_not_averaged(two: list[dict[str, Any]]):
    assert max(two[0]["nothing_averaged"]["differences"]) > 1e-3


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_equal_one(two: list[dict[str, Any]], alone: dict[str, dict[str, Any]], name: str):
    ours, theirs = two[0][name], alone[SCENARIOS[name].like]
    assert ours["growths"] == theirs["growths"]
    assert_states_equal(ours, theirs, tolerance=1e-9)  # the order of summation differs


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.hook is not None])
def test_communication_hook_is_called_after_each_growth(two: list[dict[str, Any]], name: str):
    assert two[0][name]["hook_calls"] == two[1][name]["hook_calls"] == [4, 4, 4]  # by epoch; the last two are grown


def test_compressed_gradients_are_compressed_after_each_growth(two: list[dict[str, Any]], alone: dict[str, Any]):
    """Else the comparison of PowerSGD of full rank with plain averages would show nothing."""
    lossy, whole = two[0]["power_sgd_lossy"]["weights"], alone["split"]["weights"]
    assert any((lossy[name] - whole[name]).abs().max() > 1e-4 for name in whole)


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.resumed])
def test_run_of_two_processes_resumes_bit_for_bit(two: list[dict[str, Any]], name: str):
    for found in two:
        assert found[f"{name}_resumed"]["growths"] == found[name]["growths"]
        assert_states_equal(found[f"{name}_resumed"], found[name], tolerance=0)


def test_two_processes_score_as_one_does(two: list[dict[str, Any]], tmp_path: Path):
    """Blocks and images that two processes do not share evenly."""
    expected = scores(tmp_path, devices=1)
    assert {"TextDataModule val/bits_per_byte", "ImageDataModule val/loss", "ImageDataModule val/acc1"} <= {*expected}
    for found in two:
        assert found["scores"] == pytest.approx(expected, rel=1e-6)


def test_processes_end_a_stream_of_images_together(two: list[dict[str, Any]]):
    """One process has three batches in its shards, the other one seven."""
    assert [found["stream"] for found in two] == [{"batches": 3, "resumed": True}] * 2


def test_processes_start_from_equal_weights_of_a_checkpoint(two: list[dict[str, Any]], folder: Path):
    first, second = (found["initialized"] for found in two)
    saved = torch.load(folder / "deepened" / "end1.ckpt", weights_only=True)["current_model_state"]
    assert len(first["backbone.head.fc.bias"]) == 12 and first.keys() == second.keys() == saved.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert ".head." in name or torch.equal(tensor, saved[name].to(tensor.dtype)), name
