"""The comparison of architectures: what is written is what is planned, and what is planned is what is trained."""

import csv
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lit_tokenformer.cost import match_tokens, model_cost
from lit_tokenformer.models import preset_config

pytest.importorskip("matplotlib")
FOLDER = Path(__file__).parent.parent / "benchmarks"
SIZES = {"vocab_size": 257, "context_length": 16}
TINY = {"dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def compare():
    """The script and the modules that it is made of, as one."""
    names = ["compare", *(file.stem for file in FOLDER.glob("comparison_*.py"))]
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(
        **{key: value for name in names for key, value in vars(importlib.import_module(name)).items()}
    )
    sys.path.remove(str(FOLDER))
    for name in names:
        del sys.modules[name]


@pytest.fixture
def config(text_cache):
    """A language model's config, on the embedded text."""
    return {
        "trainer": {
            "max_steps": 20,
            "accelerator": "cpu",
            "limit_val_batches": 1,
            "callbacks": [
                {
                    "class_path": "callbacks.ParameterGrowthCallback",
                    "init_args": {"unit": "step", "schedule": {10: 16}},
                },
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"},
            ],
        },
        "model": {
            "class_path": "lit_tokenformer.tasks.LitCausalLM",
            "init_args": {
                "preset": "tokenformer_lm_tiny",
                "overrides": {**TINY, "param_tokens": 8},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
                "schedule": {"name": "cosine", "warmup": 5, "unit": "step"},
            },
        },
        "data": {
            "class_path": "lit_tokenformer.data.TextDataModule",
            "init_args": {"block_size": 16, "batch_size": 4, "cache_dir": str(text_cache)},
        },
    }


def planned(compare, config, *arms, match=None, to=None, **common):
    setting = compare.Setting(config, common, 2)
    return setting, compare.plan_arms(setting, [compare.parse_arm(arm) for arm in arms], match, to)


def run(compare, config, folder, *words):
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(config))
    return compare.main([str(file), str(folder / "out"), "--logs", str(folder / "logs"), *words])


def test_arm_is_read_as_written(compare):
    arm = compare.parse_arm(
        "gpt2_tiny projection=pattention dropout=0.1 lr=1e-3 label='a b' grow={0.3:16, 12: {ffn:64}}"
    )
    assert arm == compare.Arm(
        "a b", "gpt2_tiny", {"projection": "pattention", "dropout": 0.1}, 1e-3, {0.3: 16, 12: {"ffn": 64}}
    )
    assert compare.parse_arm("gpt2_tiny grow") == compare.Arm("gpt2_tiny grow", "gpt2_tiny", grow=True)


def test_pattention_arms_are_matched_and_the_others_are_not(compare, config):
    arms = ["transformer_tiny", "tokenformer_lm_tiny", "gpt2_tiny projection=pattention", "pythia_tiny"]
    _, found = planned(compare, config, *arms, "tokenformer_lm_tiny param_tokens=5", match="parameters")
    reference = preset_config("transformer_tiny", **TINY, **SIZES)
    for one in found[1:3]:
        own = preset_config(one.arm.preset, **{**TINY, **SIZES, **one.arm.overrides})
        assert one.final_tokens == match_tokens(own, reference)
        assert abs(one.differs) < 0.01
    assert found[4].config.param_tokens == 5 and found[4].differs < -0.5
    assert found[0].parameters == model_cost(reference).parameters
    assert found[0].blocks == 2 * 12 * 32**2


def test_steps_budget_is_the_same_for_all_and_schedules_keep_their_shares(compare, config, tmp_path):
    setting, found = planned(compare, config, "transformer_tiny", "tokenformer_lm_tiny grow")
    with compare.Runner(tmp_path, 1, True) as runner:
        compare.set_steps(setting, found, "steps=40", None, runner)
    assert [one.steps for one in found] == [40, 40]
    given = setting.fit_config(found[1], 40, 7, 2e-3)
    growth = next(one for one in given["trainer"]["callbacks"] if "Growth" in one["class_path"])["init_args"]
    assert growth["schedule"] == {20: {"qkv": 16, "proj": 16, "ffn": 64}} and growth["unit"] == "step"
    assert given["model"]["init_args"]["schedule"]["warmup"] == 0.25
    assert given["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 2e-3
    assert given["seed_everything"] == 7 and not given["trainer"]["enable_checkpointing"]
    names = [
        one["class_path"].split(".")[-1] for one in setting.fit_config(found[0], 40, 7, None)["trainer"]["callbacks"]
    ]
    assert names == ["TrainingMonitor", "Meter"]


def test_flops_budget_is_filled_and_not_exceeded(compare, config, tmp_path):
    arms = ["transformer_tiny", "gpt2_tiny depth=4", "tokenformer_lm_tiny label=grown grow={0.5:matched}"]
    config["trainer"]["max_steps"] = 500
    setting, found = planned(compare, config, *arms, match="flops")
    with compare.Runner(tmp_path, 1, True) as runner:
        compare.set_steps(setting, found, "flops", None, runner)
        total = compare.training_flops(setting, found[0], 500)
        assert found[0].steps == 500 and found[1].steps < 400 and found[2].steps > 500
        for one in found:
            assert 0.99 * total < compare.training_flops(setting, one, one.steps) <= total
        compare.set_steps(setting, found, "flops=1e9", None, runner)
    assert all(0.9e9 < compare.training_flops(setting, one, one.steps) <= 1e9 for one in found)


def outcomes(*losses, growths=()):
    curve = {"steps": [1, 2], "tflops": [1.0, 2.0], "growths": list(growths)}
    same = {"failed": None, "score": 2.0, "score_name": "bits per byte", "step_seconds": 0.1, "seconds": 3.0}
    return {
        seed: {**same, "peak_bytes": 5e6, "loss": loss, "curve": {**curve, "losses": [2 * loss, loss]}}
        for seed, loss in enumerate(losses)
    }


def test_table_is_sorted_and_tells_ties_mismatch_and_failures(compare, config, tmp_path):
    arms = ["transformer_tiny", "gpt2_tiny", "pythia_tiny", "rwkv4_tiny", "pangu_pi_tiny depth=3"]
    setting, found = planned(compare, config, *arms)
    results = [outcomes(3.0, 3.2), outcomes(2.9, 3.1), outcomes(4.0, 4.1), outcomes(5.0), {0: {"failed": "killed"}}]
    for one in found:
        one.steps = 20
    rows = compare.sort_rows([compare.row(setting, *pair) for pair in zip(found, results, strict=True)])
    assert [one["label"] for one in rows] == ["gpt2_tiny", "transformer_tiny", *arms[2:]]
    assert rows[0]["loss"] == pytest.approx(3.0) and rows[0]["loss_std"] == pytest.approx(0.1 * 2**0.5)
    assert [one["ties"] for one in rows] == [False, True, False, False, False]
    assert rows[0]["seen"] == 20 * 4 * 16 and rows[0]["throughput"] == pytest.approx(640)
    table = compare.markdown(rows, "tokens", "transformer_tiny", "parameters", 1)
    assert "| 3.0000 ± 0.1414 |" in table and "| 3.1000 ± 0.1414 ≈ |" in table
    assert "pangu_pi_tiny depth=3: seed 0 failed: killed" in table
    assert "† non-embedding parameters differ by more than 5 %" in table and "pangu_pi_tiny depth=3 +5" in table
    curves = {label: [one["curve"] for one in outcomes(3.0, 3.2, growths=[1.5]).values()] for label in arms * 2}
    compare.draw(curves, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--arms", "gpt2_tony"], "'gpt2_tony': preset: unknown value 'gpt2_tony', did you mean 'gpt2_tiny'?"),
        (["--arms", "gpt2_tiny", "bert_tiny"], "arm 'bert_tiny': it does not fit LitCausalLM; its head is"),
        (["--arms", "gpt2_tiny vocab_size=300"], "vocab_size: 300, the data have 257"),
        (["--arms", "gpt2_tiny hidden=3"], "arm 'gpt2_tiny hidden=3': overrides: unknown value 'hidden'"),
        (["--arms", "gpt2_tiny", "gpt2_tiny"], "arm 'gpt2_tiny': there are two of this label"),
        (["--arms", "gpt2_tiny grow"], "arm 'gpt2_tiny grow': grow: it has no Pattention layer"),
        (["--arms", "tokenformer_lm_tiny grow={0.5:2}"], "qkv would shrink from 8 to 2"),
        (["--arms", "tokenformer_lm_tiny grow={0.5:matched}"], "grow: 'matched' needs --match"),
        (["--arms", "gpt2_tiny", "pythia_tiny", "--match", "flops"], "--match: none of 'pythia_tiny' has a Pattention"),
        (["--arms", "gpt2_tiny", "--budget", "wall"], "--budget: wall needs seconds"),
        (["--arms", "gpt2_tiny", "--budget", "hours=2"], "--budget: expected steps[=N], flops[=F] or wall=SECONDS"),
        (["--arms", "gpt2_tiny", "--budget", "flops=10"], "arm 'gpt2_tiny': 10 FLOPs are less than two of its steps"),
        (["--arms", "gpt2_tiny lr=fast"], "lr: expected a positive number, got 'fast'"),
        (["--arms", "gpt2_tiny", "--set", "dim"], "--set: expected KEY=VALUE, got 'dim'"),
    ],
)
def test_refused_before_anything_is_trained(compare, config, tmp_path, capsys, words, told):
    assert run(compare, config, tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "logs").exists()


def test_images_and_masked_text_are_planned(compare, config):
    config["model"] = {
        "class_path": "LitImageClassifier",
        "init_args": {"overrides": {"dim": 32, "depth": 2, "num_heads": 2}},
    }
    config["data"] = {"class_path": "lit_tokenformer.data.ImageDataModule"}
    config["trainer"] = {"max_epochs": 2}
    arms = ["vit_tiny_patch16_224", "tokenformer_vit_tiny_patch16_224"]
    setting, found = planned(compare, config, *arms, match="flops", patch_size=4)
    assert setting.sizes == {"num_classes": 10, "image_size": 8} and setting.steps == 2 * (1437 // 32)
    assert found[0].config.num_data_tokens == 5 and abs(found[1].differs) < 0.02
    config["model"]["class_path"] = "lit_tokenformer.tasks.LitMaskedLM"
    config["data"] = {"class_path": "lit_tokenformer.data.MaskedTextDataModule", "init_args": {"block_size": 16}}
    config["trainer"] = {"max_steps": 2}
    _, found = planned(compare, config, "bert_tiny", "tokenformer_mlm_tiny", match="parameters")
    assert abs(found[1].differs) < 0.02


@pytest.mark.slow
def test_two_arms_are_trained_resumed_and_written(compare, config, tmp_path, capsys):
    grown = "tokenformer_lm_tiny label=grown lr=1e-2 grow={0.5:matched}"  # one search is enough
    words = ["--arms", "transformer_tiny", grown, "gpt2_tiny lr=1e30"]
    words += ["--match", "parameters", "--seeds", "0", "1", "--evaluations", "3", "--lrs", "1e-3", "1e-2"]
    words += ["--search-steps", "6"]
    assert run(compare, config, tmp_path, *words) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    rows = {one["label"]: one for one in found["arms"]}
    assert rows["gpt2_tiny lr=1e30"]["failed"] == [0, 1] and rows["gpt2_tiny lr=1e30"]["loss"] is None
    for label in ("transformer_tiny", "grown"):
        one = rows[label]
        assert one["lr"] == 1e-2 and one["seeds"] == [0, 1] and one["loss_std"] > 0
        for curve in (one["runs"][seed]["curve"] for seed in "01"):
            assert curve["steps"][-1] in (19, 20) and len(curve["losses"]) == 3
            assert curve["tflops"][-1] == pytest.approx(one["training_flops"] / 1e12, rel=1e-6)
            assert len(curve["growths"]) == (label == "grown")
        assert one["runs"]["0"]["samples"] == 80 and one["peak_memory_mb"] > 0 and one["throughput"] > 0
        assert one["runs"]["0"]["parameters"] == one["parameters"]
    assert "python_docs: 79 documents" in found["data"] and found["environments"][0]["threads"] >= 1
    assert len(list(csv.DictReader((tmp_path / "out.csv").open()))) == 3 and (tmp_path / "out.png").exists()

    half_done = Path(rows["grown"]["runs"]["1"]["folder"])
    (half_done / "measured.json").unlink()
    capsys.readouterr()
    assert run(compare, config, tmp_path, *words) == 0
    told = capsys.readouterr().out
    assert "[1/1] grown, seed 1" in told
    again = {one["label"]: one["loss"] for one in json.loads((tmp_path / "out.json").read_text())["arms"]}
    assert again == {label: one["loss"] for label, one in rows.items()}


@pytest.mark.slow
def test_wall_budget_measures_first(compare, config, tmp_path):
    assert (
        run(compare, config, tmp_path, "--arms", "transformer_tiny", "--budget", "wall=0.3", "--evaluations", "1") == 0
    )
    (one,) = json.loads((tmp_path / "out.json").read_text())["arms"]
    assert one["steps"] > 2 and "by a measurement of 12 steps" in one["notes"][0]
