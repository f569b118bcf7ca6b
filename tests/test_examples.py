"""The examples run end to end at a size of seconds; figures are committed, and come from the whole runs."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from test_configs import fashion_mnist

from examples import own_module, plain_loop, timm_model, transformers_model

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


@pytest.mark.slow
def test_a_module_of_the_user_grows_with_the_callback():
    assert own_module.main(epochs=6) > 0.6


@pytest.mark.slow
def test_a_plain_loop_grows_and_reloads_the_grown_model():
    assert plain_loop.main(steps=90) > 0.6


@pytest.mark.slow
def test_a_model_of_timm_is_given_back_at_its_grown_size(tmp_path):
    assert timm_model.main(str(tmp_path)) < 1e-5


@pytest.mark.slow
def test_a_model_of_transformers_is_grown_in_a_fit_and_given_back(tmp_path, text_cache):
    before, after = transformers_model.main(str(tmp_path), steps=4)
    assert after > 1.5 * before


@pytest.mark.slow
def test_the_slurm_script_starts_and_resumes(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(folder / f"imagenet-{split}-0000.tar", "w") as tar:
            for number in range(8):
                image = io.BytesIO()
                Image.new("RGB", (16, 16), (255 * (number % 2), 128, 0)).save(image, "JPEG")
                for ending, content in (("jpg", image.getvalue()), ("cls", str(number % 2).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    sizes = "{dim: 16, depth: 2, num_heads: 2, patch_size: 8, param_tokens: 8}"
    given = [f"--model.overrides={sizes}", "--model.compile=false", "--model.schedule.warmup=1"]
    given += ["--data.image_size=16", "--data.loader.num_workers=0", "--data.loader.batch_size=4"]
    given += ["--trainer.callbacks+=ParameterGrowthCallback", "--trainer.callbacks.schedule={1: 16}"]
    given += ["--trainer.callbacks+=PatchDropSchedule", "--trainer.callbacks.schedule={1: 0.0}"]
    given += ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    environment = {**os.environ, "DATA": str(folder), "OUTPUT": str(tmp_path / "runs"), "LAUNCH": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for epochs in (2, 3):
        command = [str(ROOT / "examples" / "imagenet_slurm" / "job.sh"), *given, f"--trainer.max_epochs={epochs}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        printed = done.stdout + done.stderr
        assert ("qkv 8 -> 16" in printed) == (epochs == 2)  # the second start resumes after the growth
