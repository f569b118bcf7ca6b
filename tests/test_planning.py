"""A schedule for a budget: it spends what is given, and what it tells can be used."""

import re
from dataclasses import replace

import pytest
import yaml

from lit_tokenformer.cli.main import main
from lit_tokenformer.cost import model_cost
from lit_tokenformer.models import Tokenformer, preset_config
from lit_tokenformer.planning import GrowthRule, plan_stages, propose

CONFIG = preset_config("tokenformer_lm_tiny", vocab_size=257, context_length=64)
BATCH = 8


def flops(size, patch_drop=0.0):
    return model_cost(CONFIG, size).training_flops * BATCH


def parameters(size):
    return model_cost(CONFIG, {**size, "depth": 2 * size["depth"]}).parameters - model_cost(CONFIG, size).parameters


def proposal(budget, deepens=True, **birth):
    size = {"qkv": 128, "proj": 128, "ffn": 512, "depth": CONFIG.depth, **birth}
    return propose(size, deepens, budget, flops, CONFIG.num_data_tokens * BATCH, parameters)


@pytest.mark.parametrize("deepens", [True, False])
@pytest.mark.parametrize("budget", [1e13, 3e14, 1e17])
def test_a_proposal_spends_the_budget_on_the_largest_size_that_is_fed(budget, deepens):
    found, rule = proposal(budget, deepens), GrowthRule()
    ends = [*found.starts, found.steps]
    lengths = [end - start for start, end in zip([0, *found.starts], ends, strict=True)]
    spent = sum(length * flops(size) for length, size in zip(lengths, found.sizes, strict=True))
    assert 0.98 * budget < spent < 1.005 * budget
    needed = rule.data_tokens_per_parameter * parameters(found.sizes[-1])
    assert needed <= found.steps * BATCH * CONFIG.num_data_tokens < 2.5 * needed  # a much larger one would starve
    last = found.sizes[-1]
    assert last["qkv"] == last["proj"] == last["ffn"] / 4 and last["depth"] == CONFIG.depth
    if deepens:
        assert found.sizes[0] == {**last, "depth": max(1, round(CONFIG.depth / 3))}
    else:
        assert [size["qkv"] / last["qkv"] for size in found.sizes] == list(rule.tokens)


def test_a_larger_budget_never_gives_a_smaller_model_and_proportions_stay():
    sizes = [proposal(budget, qkv=2, proj=2, ffn=3).sizes[-1] for budget in (1e13, 1e14, 1e15, 1e16)]
    assert [one["qkv"] for one in sizes] == sorted({one["qkv"] for one in sizes})
    assert all(one["qkv"] / 2 == one["ffn"] / 3 for one in sizes)


def test_a_model_of_one_block_grows_in_tokens():
    assert len({size["qkv"] for size in proposal(1e14, depth=1).sizes}) == 3


@pytest.mark.parametrize("budget", [0, -1.0, float("inf"), float("nan"), 1e6])
def test_a_budget_that_is_none_or_too_small_is_refused_in_one_line(budget):
    with pytest.raises(ValueError, match=r"^budget: .*") as refused:
        proposal(budget)
    assert "\n" not in str(refused.value)


def test_images_drop_patches_instead_of_growing():
    config = preset_config("tokenformer_vit_tiny_patch16_224", num_classes=10)

    def cost(size, patch_drop):
        return model_cost(replace(config, patch_drop_rate=patch_drop), size).training_flops * BATCH

    size, rule = {"qkv": 128, "proj": 128, "ffn": 512, "depth": config.depth}, GrowthRule()
    found = propose(size, True, 1e17, cost, config.num_data_tokens * BATCH, parameters, images=True)
    (whole,) = found.starts
    assert found.rates == [rule.patch_drop, 0.0] and whole == round(rule.patches_at * found.steps)
    assert found.sizes[0] == found.sizes[1] and not found.growths and found.drops == {whole: 0.0}
    spent = whole * cost(found.sizes[0], rule.patch_drop) + (found.steps - whole) * cost(found.sizes[0], 0.0)
    assert 0.98e17 < spent < 1.005e17
    told = yaml.safe_load(found.settings(rule))
    (dropping,) = told["trainer"]["callbacks"]
    assert dropping == {
        "class_path": "callbacks.PatchDropSchedule",
        "init_args": {"unit": "step", "schedule": {whole: 0.0}},
    }
    assert told["model"]["init_args"]["overrides"]["patch_drop_rate"] == rule.patch_drop


def test_a_proposal_reads_the_data_only_so_often():
    free = proposal(1e15)
    size = {"qkv": 128, "proj": 128, "ffn": 512, "depth": CONFIG.depth}
    data_tokens = CONFIG.num_data_tokens * BATCH
    bound = propose(size, True, 1e15, flops, data_tokens, parameters, max_steps=free.steps // 4)
    assert bound.steps == free.steps // 4 and bound.sizes[-1]["qkv"] < free.sizes[-1]["qkv"]
    with pytest.raises(ValueError, match="steps limited by the data.*add data"):
        propose(size, True, 1e15, flops, data_tokens, parameters, max_steps=10)


def test_activation_checkpointing_counts_in_every_stage():
    growths = [(1, 10, {"qkv": 64, "proj": 64, "ffn": 256})]
    plain, again = (plan_stages(CONFIG, growths, 20, 4, checkpointing=on) for on in (False, True))
    for stage, other in zip(plain, again, strict=True):
        assert other.cost == model_cost(CONFIG, stage.tokens, checkpointing=True)
        assert other.training_flops > 1.2 * stage.training_flops and other.cost.kept < stage.cost.kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"callbacks": [{"schedule": {9: 64}, "unit": "step"}]}, "schedule: step 9 is beyond the end of the fit"),
        ({"callbacks": [{"schedule": {3: 64}}]}, "schedule: epoch 3 is beyond the end of the fit"),
        ({"strategy": "fsdp", "callbacks": [{"schedule": {1: 64}}]}, "trainer.strategy: a model cannot grow under"),
        ({"model": "lightning.pytorch.demos.boring_classes.BoringModel"}, "model: no cost model for BoringModel"),
    ],
)
def test_plan_refuses_what_a_fit_refuses_and_modules_without_a_cost(change, message, tmp_path, capsys):
    growth = [
        {"class_path": "callbacks.ParameterGrowthCallback", "init_args": given} for given in change.get("callbacks", ())
    ]
    trainer = {"accelerator": "cpu", "max_epochs": 3, "limit_train_batches": 3, "callbacks": growth}
    model = {"class_path": "LitImageClassifier", "init_args": {"overrides": {"patch_size": 4, "param_tokens": 8}}}
    if "model" in change:
        model = {"class_path": change["model"]}
    config = {
        "trainer": {**trainer, "strategy": change.get("strategy", "auto"), "default_root_dir": str(tmp_path)},
        "model": model,
        "data": {"class_path": "ImageDataModule", "init_args": {"dataset": "digits", "batch_size": 128}},
    }
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    assert main(["plan", "--config", str(tmp_path / "one.yaml")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_plan_tells_settings_that_a_fit_takes(tmp_path, capsys, text_cache):
    base = tmp_path / "base.yaml"
    overrides = {"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8}
    model = {"preset": "tokenformer_lm_tiny", "overrides": overrides}
    data = {"block_size": 16, "batch_size": 4, "cache_dir": str(text_cache)}
    content = {
        "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path)},
        "model": {"class_path": "lit_tokenformer.tasks.LitCausalLM", "init_args": model},
        "data": {"class_path": "lit_tokenformer.data.TextDataModule", "init_args": data},
    }
    base.write_text(yaml.safe_dump(content))
    assert main(["plan", "--config", str(base), "--budget", "2e11"]) == 0
    shown = capsys.readouterr().out
    (told,) = re.findall(r"\n# .*\n(trainer:\n.*)", shown, flags=re.DOTALL)
    (steps,) = re.findall(r"(\d+) optimizer steps", shown)
    settings = tmp_path / "proposal.yaml"
    settings.write_text(told)
    assert main(["plan", "--config", str(base), "--config", str(settings)]) == 0
    again = capsys.readouterr().out
    assert f"{steps} optimizer steps" in again
    assert "rule measured at 0.0492 M non-embedding parameters, 2.87 M data tokens, 0.3 epochs: at equal" in shown
    read = int(steps) * 4 * 16 / 1e6
    assert re.search(rf"settings for the config: \S+ M non-embedding parameters, {read:.3g} M data tokens, ", shown)
    assert main(["plan", "--config", str(base), "--budget", "1e17", "--epochs", "0.5"]) == 0
    limited = capsys.readouterr()
    assert "note: 0.5 epochs (limit: 0.5, set by --epochs; the rule was measured on 0.3) use" in limited.err
    for wrong, told in (
        (["--epochs", "2"], "error: epochs: needs budget"),
        (["--budget", "1e11", "--epochs", "0"], "error: epochs: expected a positive number, got 0"),
    ):
        assert main(["plan", "--config", str(base), *wrong]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(told)
    shares = [re.findall(r"([\d.]+)% of scratch", one) for one in (shown, again)]
    assert shares[0] == shares[1] and 50 < float(shares[0][0]) < 100
    assert main(["plan", "--config", str(base), "--budget", "1e3"]) == 2
    assert capsys.readouterr().err.startswith("error: budget: 1e+03 FLOPs are")
    assert (
        main(
            [
                "plan",
                "--config",
                str(base),
                "--budget",
                "1e11",
                "--model.overrides.projection",
                "linear",
                "--model.overrides.feed_forward",
                "mlp",
            ]
        )
        == 2
    )
    assert "no Pattention layer" in capsys.readouterr().err


def test_plan_of_hidden_units_and_heads_equals_the_models_they_lead_to(tmp_path, capsys, text_cache, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    schedule = {2: {"hidden": 64, "heads": 4}, 4: {"hidden": 96, "depth": 3}}
    growth = {"class_path": "ParameterGrowthCallback", "init_args": {"unit": "step", "schedule": schedule}}
    overrides = {"dim": 16, "depth": 2, "num_heads": 2}
    content = {
        "trainer": {"max_steps": 6, "accelerator": "cpu", "callbacks": [growth], "default_root_dir": str(tmp_path)},
        "model": {"class_path": "LitCausalLM", "init_args": {"preset": "gpt2_tiny", "overrides": overrides}},
        "data": {
            "class_path": "TextDataModule",
            "init_args": {"block_size": 16, "batch_size": 4, "cache_dir": str(text_cache)},
        },
    }
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(content))
    assert main(["plan", "--config", str(tmp_path / "one.yaml")]) == 0
    shown = capsys.readouterr().out
    sizes = [{"hidden": 64, "heads": 2}, schedule[2], {**schedule[2], **schedule[4]}]
    for size in sizes:
        config = preset_config("gpt2_tiny", **overrides, vocab_size=257, context_length=16).at_size(size)
        assert f"hidden {size['hidden']}" in shown and f"heads {size['heads']}" in shown
        assert f"{sum(one.numel() for one in Tokenformer(config).parameters()) / 1e3:,.1f} k" in shown
