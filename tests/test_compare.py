"""The ``compare`` command: entries are planned as written, and trained as planned."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lit_tokenformer.cli.main import main
from lit_tokenformer.comparison.arms import Arm, parse_arm
from lit_tokenformer.comparison.fits import SERVER, Runner
from lit_tokenformer.comparison.plan import plan_arms, set_steps, training_flops
from lit_tokenformer.comparison.results import markdown, row, sort_rows
from lit_tokenformer.comparison.setting import Setting
from lit_tokenformer.cost import match_tokens, model_cost
from lit_tokenformer.models import preset_config

SIZES = {"vocab_size": 257, "context_length": 16}
GROWS = {"preset": "tokenformer_lm_tiny", "grow": True}
GROWN = {"preset": "tokenformer_lm_tiny", "label": "grown", "lr": 1e-2, "grow": {0.5: "matched"}}
TINY = {"dim": 32, "depth": 2, "num_heads": 2}


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


def planned(config, *entries, match=None, reference=None, **common):
    setting = Setting(config, common, 2)
    return setting, plan_arms(setting, [parse_arm(entry) for entry in entries], match, reference)


def run(config, folder, presets, *options):
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(config))
    command = ["compare", "--config", str(file), "--output", str(folder / "out"), f"--presets={presets}", *options]
    try:
        return main(command)
    except SystemExit as error:
        return error.code


def test_entries_are_read_as_written():
    given = {"preset": "gpt2_tiny", "overrides": {"dropout": 0.1}, "lr": 1e-3, "grow": {0.3: 16, 12: {"ffn": 64}}}
    label = "gpt2_tiny dropout=0.1 grow"
    assert parse_arm(given) == Arm(label, "gpt2_tiny", {"dropout": 0.1}, 1e-3, {0.3: 16, 12: {"ffn": 64}})
    assert parse_arm({"preset": "gpt2_tiny", "label": "a b", "grow": True}) == Arm("a b", "gpt2_tiny", grow=True)
    assert parse_arm("gpt2_tiny") == Arm("gpt2_tiny", "gpt2_tiny")


def test_configs_are_merged_and_presets_read_from_a_file(config, tmp_path, capsys):
    changes, presets = tmp_path / "changes.yaml", tmp_path / "presets.yaml"
    changes.write_text("data: {init_args: {block_size: 8}}\ntrainer: {max_steps: 10}\n")
    presets.write_text("- gpt2_tiny\n- {preset: tokenformer_lm_tiny, label: grown, lr: 1e-3, grow: {0.5: matched}}\n")
    assert run(config, tmp_path, presets, "--config", str(changes), "--plan_only=true", "--overrides.dim=16") == 0
    lines = capsys.readouterr().out.splitlines()
    given = {**TINY, "dim": 16, "vocab_size": 257, "context_length": 8}
    numbers = model_cost(preset_config("gpt2_tiny", **given)).parameters
    assert lines[0].startswith(f"gpt2_tiny: {numbers:,} parameters") and ", 10 steps, " in lines[0]
    assert lines[1].startswith("grown: ") and "tokens qkv/proj/ffn 8/8/32 -> " in lines[1]
    assert not (tmp_path / "out").exists()


def test_every_growing_size_is_in_the_plan(config, tmp_path, capsys):
    linear = {"preset": "gpt2_tiny", "label": "linear", "grow": {0.3: {"depth": 3}, 0.6: {"hidden": 160}}}
    blocks = {"preset": "tokenformer_lm_tiny", "label": "blocks", "grow": {0.5: {"depth": 4, "ffn": 64}}}
    presets = tmp_path / "presets.yaml"
    presets.write_text(yaml.safe_dump([linear, blocks]))
    assert run(config, tmp_path, presets, "--match=null", "--plan_only=true") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "hidden 128 -> 160, depth 2 -> 3, " in lines[0] and "tokens" not in lines[0]
    assert "tokens qkv/proj/ffn 8/8/32 -> 8/8/64, depth 2 -> 4, " in lines[1]


def test_pattention_arms_are_matched_and_the_others_are_not(config):
    with_pattention = {"preset": "gpt2_tiny", "overrides": {"projection": "pattention"}}
    small = {"preset": "tokenformer_lm_tiny", "overrides": {"param_tokens": 5}}
    arms = ["transformer_tiny", "tokenformer_lm_tiny", with_pattention, "pythia_tiny", small]
    _, found = planned(config, *arms, match="parameters")
    reference = preset_config("transformer_tiny", **TINY, **SIZES)
    for one in found[1:3]:
        own = preset_config(one.arm.preset, **{**TINY, **SIZES, **one.arm.overrides})
        assert dict(one.final.tokens.items()) == match_tokens(own, reference)
        assert abs(one.differs) < 0.01
    assert found[4].config.param_tokens == 5 and found[4].differs < -0.5
    assert found[0].parameters == model_cost(reference).parameters
    assert found[0].blocks == 2 * 12 * 32**2


def test_steps_budget_is_the_same_for_all_and_schedules_keep_their_shares(config, tmp_path):
    setting, found = planned(config, "transformer_tiny", GROWS)
    with Runner(tmp_path, 1, True) as runner:
        set_steps(setting, found, "steps=40", None, runner)
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


def test_an_arm_has_its_own_optimizer_schedule_growth_and_callbacks(config):
    muon = {"class_path": "lit_tokenformer.optim.MuonWithAuxAdam", "init_args": {"weight_decay": 0.2}}
    nested = {"class_path": "callbacks.NestedSizes", "init_args": {"sizes": [0.5]}}
    other = {"optimizer": muon, "schedule": {"name": "wsd", "decay": 0.65}, "callbacks": [nested]}
    deeper = {"grow": {0.25: {"depth": 4}}, "growth": {"new_state": "reset_copies"}}
    setting, found = planned(config, "tokenformer_lm_tiny", {**GROWN, **other, **deeper, "lr": None})
    plain, given = (setting.fit_config(one, 40, 0, one.arm.lr) for one in found)
    assert given["model"]["init_args"]["optimizer"] == {**muon, "init_args": {"weight_decay": 0.2, "lr": 1e-3}}
    assert given["model"]["init_args"]["schedule"] == {"name": "wsd", "warmup": 0.25, "decay": 0.65, "unit": "share"}
    assert plain["model"]["init_args"]["optimizer"] == config["model"]["init_args"]["optimizer"]
    assert given["trainer"]["callbacks"][0] == nested and nested not in plain["trainer"]["callbacks"]
    growth = given["trainer"]["callbacks"][1]["init_args"]
    assert growth["new_state"] == "reset_copies" and growth["schedule"][10]["depth"] == 4
    assert found[1].final.depth == 4 and found[1].blocks == 2 * found[0].blocks
    assert found[1].parameters == model_cost(found[1].final).parameters
    each = [training_flops(setting, one, 40) / 40 for one in found]
    deep = model_cost(found[1].final).training_flops * setting.samples_per_step
    assert each[1] == pytest.approx(0.25 * each[0] + 0.75 * deep)
    width = {"preset": "transformer_tiny", "grow": {0.5: {"hidden": 256}}}
    assert planned(config, width)[1][0].final.mlp_hidden == 256


def test_dropped_patches_are_counted_and_keep_their_share(config):
    config["model"] = {"class_path": "LitImageClassifier", "init_args": {"overrides": TINY}}
    config["data"] = {"class_path": "lit_tokenformer.data.ImageDataModule"}
    config["trainer"] = {"max_steps": 80}
    schedule = {"class_path": "callbacks.PatchDropSchedule", "init_args": {"schedule": {60: 0.0}, "unit": "step"}}
    config["trainer"]["callbacks"] = [schedule]
    preset = "tokenformer_vit_tiny_patch16_224"
    own = {"preset": preset, "label": "own", "patch_drop": {0.5: 0.25, 0.9: 0.0}}
    none = {"preset": preset, "label": "none", "patch_drop": {}, "overrides": {"patch_drop_rate": 0.0}}
    setting, found = planned(config, preset, own, none, patch_size=2, patch_drop_rate=0.75)
    schedules = []
    for one in found:
        callbacks = setting.fit_config(one, 40, 0, None)["trainer"]["callbacks"]
        schedules += [[each["init_args"] for each in callbacks if "PatchDrop" in each["class_path"]]]
    of_config, of_own = {30: 0.0}, {20: 0.25, 36: 0.0}
    assert schedules == [[{"schedule": of_config, "unit": "step"}], [{"schedule": of_own, "unit": "step"}], []]
    rates = [[config.patch_drop_rate for _, config in one.stages(40)] for one in found]
    assert rates == [[0.75, 0.0], [0.75, 0.25, 0.0], [0.0]]
    few, whole = (model_cost(one).training_flops for _, one in found[0].stages(40))
    assert training_flops(setting, found[0], 40) == (30 * few + 10 * whole) * setting.samples_per_step
    assert few < 0.4 * whole


def test_flops_budget_is_filled_and_not_exceeded(config, tmp_path):
    arms = ["transformer_tiny", {"preset": "gpt2_tiny", "overrides": {"depth": 4}}, GROWN]
    config["trainer"]["max_steps"] = 500
    setting, found = planned(config, *arms, match="flops")
    with Runner(tmp_path, 1, True) as runner:
        set_steps(setting, found, "flops", None, runner)
        total = training_flops(setting, found[0], 500)
        assert found[0].steps == 500 and found[1].steps < 400 and found[2].steps > 500
        for one in found:
            assert 0.99 * total < training_flops(setting, one, one.steps) <= total
        set_steps(setting, found, "flops=1e9", None, runner)
    assert all(0.9e9 < training_flops(setting, one, one.steps) <= 1e9 for one in found)


def outcomes(*losses, growths=()):
    curve = {"steps": [1, 2], "tflops": [1.0, 2.0], "growths": list(growths)}
    same = {"failed": None, "score": 2.0, "score_name": "bits per byte", "step_seconds": 0.1, "seconds": 3.0}
    return {
        seed: {**same, "peak_bytes": 5e6, "loss": loss, "curve": {**curve, "losses": [2 * loss, loss]}}
        for seed, loss in enumerate(losses)
    }


def test_table_is_sorted_and_tells_ties_mismatch_and_failures(config, tmp_path):
    arms = [
        "transformer_tiny",
        "gpt2_tiny",
        "pythia_tiny",
        "rwkv4_tiny",
        {"preset": "pangu_pi_tiny", "overrides": {"depth": 3}},
    ]
    setting, found = planned(config, *arms)
    labels = [one.arm.label for one in found]
    results = [outcomes(3.0, 3.2), outcomes(2.9, 3.1), outcomes(4.0, 4.1), outcomes(5.0), {0: {"failed": "killed"}}]
    for one in found:
        one.steps = 20
    rows = sort_rows([row(setting, *pair) for pair in zip(found, results, strict=True)])
    assert [one["label"] for one in rows] == ["gpt2_tiny", "transformer_tiny", *labels[2:]]
    assert rows[0]["loss"] == pytest.approx(3.0) and rows[0]["loss_std"] == pytest.approx(0.1 * 2**0.5)
    assert [one["ties"] for one in rows] == [False, True, False, False, False]
    assert rows[0]["seen"] == 20 * 4 * 16 and rows[0]["throughput"] == pytest.approx(640)
    table = markdown(rows, "tokens", "transformer_tiny", "parameters", 1)
    assert "| 3.0000 ± 0.1414 |" in table and "| 3.1000 ± 0.1414 ≈ |" in table
    assert "pangu_pi_tiny depth=3: seed 0 failed: killed" in table
    assert "† non-embedding parameters differ by more than 5 %" in table and "pangu_pi_tiny depth=3 +5" in table
    curves = {label: [one["curve"] for one in outcomes(3.0, 3.2, growths=[1.5]).values()] for label in labels * 2}
    pytest.importorskip("lit_tokenformer.comparison.picture").draw(curves, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def entry(preset, **settings):
    return json.dumps([{"preset": preset, **settings}])


@pytest.mark.parametrize(
    ("presets", "options", "error"),
    [
        ("[gpt2_tony]", [], "'gpt2_tony': preset: unknown value 'gpt2_tony', did you mean 'gpt2_tiny'?"),
        ("gpt2_tony", [], "'gpt2_tony': preset: unknown value 'gpt2_tony', did you mean 'gpt2_tiny'?"),
        ("[]", [], "presets: expected a list of at least one, got []"),
        ("[{name: gpt2_tiny}]", [], "presets: unknown value 'name'"),
        ("[gpt2_tiny, bert_tiny]", [], "presets: 'bert_tiny': preset: expected one for LitCausalLM, got head"),
        (entry("gpt2_tiny", overrides={"vocab_size": 300}), [], "overrides.vocab_size: expected 257 as in the data"),
        (entry("gpt2_tiny", overrides={"hidden": 3}), [], "'gpt2_tiny hidden=3': overrides: unknown value 'hidden'"),
        ("[gpt2_tiny, gpt2_tiny]", [], "presets: 'gpt2_tiny': more than one entry with this label"),
        (entry("gpt2_tiny", grow=True), [], "'gpt2_tiny grow': grow: no Pattention layer to grow"),
        ("[{preset: tokenformer_lm_tiny, grow: {0.5: 2}}]", [], "qkv would shrink from 8 to 2"),
        ("[{preset: tokenformer_lm_tiny, grow: {0.5: matched}}]", [], "grow: 'matched' requires match"),
        ("[gpt2_tiny]", ["--match=size"], "match: expected 'parameters', 'flops' or null, got 'size'"),
        ("[gpt2_tiny]", ["--budget=wall"], "budget: wall requires seconds"),
        ("[gpt2_tiny]", ["--budget=hours=2"], "budget: expected steps[=N], flops[=F] or wall=SECONDS"),
        ("[gpt2_tiny]", ["--budget=flops=10"], "budget: 10 FLOPs are less than two steps of 'gpt2_tiny'"),
        ("[{preset: gpt2_tiny, patch_drop: {0.5: 0.0}}]", [], "'gpt2_tiny': patch_drop: no image stem (stem: patch)"),
        (entry("gpt2_tiny", patch_drop=0.5), [], "'gpt2_tiny': patch_drop: expected settings by their names, got 0.5"),
        (entry("gpt2_tiny", optimizer={"lr": 1}), [], "'gpt2_tiny': expected a class_path, got {'lr': 1}"),
        (
            entry("gpt2_tiny", callbacks=["NestedSizes"]),
            [],
            "callbacks: expected a list of mappings, got ['NestedSizes']",
        ),
        (
            entry("gpt2_tiny", callbacks=[{"class_path": "EarlyStopping"}]),
            [],
            "callbacks: EarlyStopping cannot be added",
        ),
        (entry("gpt2_tiny", schedule={"unit": "step"}), [], "schedule: unit: expected lengths as shares of the steps"),
        (entry("tokenformer_lm_tiny", grow=True, growth={"method": "cut"}), [], "'tokenformer_lm_tiny grow': grow: "),
        (entry("gpt2_tiny", lr="fast"), [], "lr: expected a positive number, got 'fast'"),
        ("[gpt2_tiny]", ["--seeds=0"], "seeds: expected at least 1, got 0"),
        ("[gpt2_tiny]", ["--lrs=[-1]"], "lrs: expected positive numbers, got [-1.0]"),
        ("[gpt2_tiny]", ["--config=nowhere"], "--config: unknown value 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(config, tmp_path, capsys, presets, options, error):
    assert run(config, tmp_path, presets, *options) == 2
    found = capsys.readouterr().err
    assert error in found and found.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_broken_files_are_one_line(config, tmp_path, capsys):
    (output := tmp_path / "out").write_text("a file")
    (broken := tmp_path / "broken.yaml").write_text("[gpt2_tiny")
    for given, changed, error in (
        ("gpt2_tiny", {}, f"output: cannot write to {output}: {output} is not a writable folder"),
        (broken, {}, f"presets: cannot read {broken}: while parsing"),
        ("gpt2_tiny", {"trainer": 5}, "config: trainer: expected settings by their names, got 5"),
        ("gpt2_tiny", {"trainer": {"max_steps": "many"}}, "config: trainer.max_steps: expected a whole number, got"),
        ("gpt2_tiny", {"model": {"class_path": "Other"}}, "config: model.class_path: expected LitImageClassifier or"),
    ):
        assert run({**config, **changed}, tmp_path, given) == 2
        found = capsys.readouterr().err
        assert error in found and found.count("\n") == 1
        output.unlink(missing_ok=True)  # only the first case is about it


def test_images_and_masked_text_are_planned(config):
    config["model"] = {
        "class_path": "LitImageClassifier",
        "init_args": {"overrides": {"dim": 32, "depth": 2, "num_heads": 2}},
    }
    config["data"] = {"class_path": "lit_tokenformer.data.ImageDataModule"}
    config["trainer"] = {"max_epochs": 2}
    arms = ["vit_tiny_patch16_224", "tokenformer_vit_tiny_patch16_224"]
    setting, found = planned(config, *arms, match="flops", patch_size=4)
    assert setting.sizes == {"num_classes": 10, "image_size": 8} and setting.steps == 2 * (1437 // 32)
    assert found[0].config.num_data_tokens == 5 and abs(found[1].differs) < 0.02
    config["model"]["class_path"] = "lit_tokenformer.tasks.LitMaskedLM"
    config["data"] = {"class_path": "lit_tokenformer.data.MaskedTextDataModule", "init_args": {"block_size": 16}}
    config["trainer"] = {"max_steps": 2}
    _, found = planned(config, "bert_tiny", "tokenformer_mlm_tiny", match="parameters")
    assert abs(found[1].differs) < 0.02


def test_the_stored_comparison_is_planned_as_it_was_trained(capsys):
    folder = Path(__file__).parents[1] / "benchmarks" / "results"
    command = ["compare", "--config", "causal_lm_small", "--config", str(folder / "compare_language_data.yaml")]
    command += [f"--presets={folder / 'compare_language.yaml'}", "--reference=Transformer", "--budget=steps=1000"]
    command += ["--overrides={dim: 64, num_heads: 4}", "--output=nowhere", "--plan_only=true"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    planned = capsys.readouterr().out.splitlines()
    arms = json.loads((folder / "compare_language.json").read_text())["arms"]
    assert len(planned) == len(arms) == 8
    for arm in arms:
        (line,) = (one for one in planned if one.startswith(f"{arm['label']}: "))
        assert f"{arm['parameters']:,} parameters ({arm['non_embedding']:,} non-embedding" in line
        assert line.endswith(f"{arm['steps']} steps, {arm['training_flops']:.3g} FLOPs")


@pytest.mark.slow
def test_presets_are_trained_resumed_and_written(config, tmp_path, capfd):
    broken = {"preset": "gpt2_tiny", "label": "broken", "lr": 1e30}
    presets = tmp_path / "presets.yaml"
    presets.write_text(yaml.safe_dump(["transformer_tiny", GROWN, broken]))
    options = ["--seeds=2", "--evaluations=3", "--lrs=[1e-3, 1e-2]", "--search_steps=6"]
    assert run(config, tmp_path, presets, *options) == 0
    folder = tmp_path / "out"
    found = json.loads((folder / "comparison.json").read_text())
    rows = {one["label"]: one for one in found["arms"]}
    assert rows["broken"]["failed"] == [0, 1] and rows["broken"]["loss"] is None
    for label in ("transformer_tiny", "grown"):
        one = rows[label]
        assert one["lr"] == 1e-2 and one["seeds"] == [0, 1] and one["loss_std"] > 0
        for curve in (one["runs"][seed]["curve"] for seed in "01"):
            assert curve["steps"][-1] in (19, 20) and len(curve["losses"]) == 3
            assert curve["tflops"][-1] == pytest.approx(one["training_flops"] / 1e12, rel=1e-6)
            assert len(curve["growths"]) == (label == "grown")
        assert one["runs"]["0"]["samples"] == 80 and one["peak_memory_mb"] > 0 and one["throughput"] > 0
        assert one["runs"]["0"]["parameters"] == one["parameters"]
    assert found["settings"]["seeds"] == 2 and found["settings"]["match"] == "parameters"
    assert "python_docs: 79 documents" in found["data"] and found["environments"][0]["threads"] >= 1
    with (folder / "comparison.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    assert (folder / "comparison.md").read_text() in capfd.readouterr().out
    assert (folder / "comparison.png").exists() == ("matplotlib" in sys.modules)

    half_done = Path(rows["grown"]["runs"]["1"]["folder"])
    (half_done / "measured.json").unlink()
    assert run(config, tmp_path, presets, *options) == 0
    assert "[1/1] grown, seed 1" in capfd.readouterr().out
    again = {one["label"]: one["loss"] for one in json.loads((folder / "comparison.json").read_text())["arms"]}
    assert again == {label: one["loss"] for label, one in rows.items()}


@pytest.mark.slow
def test_wall_budget_measures_speed_first(config, tmp_path):
    assert run(config, tmp_path, "[transformer_tiny]", "--budget=wall=0.3", "--evaluations=1") == 0
    (one,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["arms"]
    steps, seconds = re.match(r"(\d+) steps of ([\d.]+) s measured over 12 steps", one["notes"][0]).groups()
    assert one["steps"] == int(steps) and (one["steps"] + 1) * (float(seconds) + 0.0005) > 0.3  # rounded in the note
    assert one["steps"] == 2 or one["steps"] * (float(seconds) - 0.0005) <= 0.3


def test_every_fit_that_fails_is_an_error(config, tmp_path, capsys):
    assert run(config, tmp_path, "[gpt2_tiny]", "--draw_only=true") == 2
    assert "presets: every fit failed" in capsys.readouterr().err
    assert "seed 0 failed: not run" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fit_ends_with_a_command_that_is_killed(config, tmp_path):
    config["trainer"] |= {"max_steps": 10**6, "limit_val_batches": 0}
    config["model"]["init_args"]["schedule"] = {"name": "constant"}
    folder = tmp_path / "fit"
    folder.mkdir()
    (folder / "given.yaml").write_text(yaml.safe_dump(config))
    code = (
        "import subprocess, sys\n"
        "server = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE, text=True)\n"
        "print(server.pid, flush=True)\n"
        "server.stdin.write(sys.argv[2] + '\\n')\n"
        "server.stdin.flush()\n"
        "server.wait()\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code, SERVER, str(folder)], stdout=subprocess.PIPE, text=True)
    server = int(command.stdout.readline())
    wait_until((folder / "output.txt").exists)
    (fit,) = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    command.kill()
    command.wait()
    wait_until(lambda: not running(server) and not running(fit))


def running(pid):
    """Whether a process exists and is no zombie."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
