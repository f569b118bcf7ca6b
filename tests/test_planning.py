"""A schedule for a budget: it spends what is given, and what it tells can be used."""

import re

import pytest
import yaml

from lit_tokenformer.cli import main
from lit_tokenformer.compute import model_cost
from lit_tokenformer.models import preset_config
from lit_tokenformer.planning import GrowthRule, propose

CONFIG = preset_config("tokenformer_lm_tiny", vocab_size=257, context_length=64)
BATCH = 8


def proposal(budget, birth=None, rule=GrowthRule()):  # noqa: B008
    def parameters(tokens):
        return model_cost(CONFIG, tokens).parameters - model_cost(CONFIG, dict.fromkeys(tokens, 0)).parameters

    def flops(tokens):
        return model_cost(CONFIG, tokens).training_flops * BATCH

    birth = birth or {"qkv": 128, "proj": 128, "ffn": 512}
    return propose(birth, budget, flops, CONFIG.num_data_tokens * BATCH, parameters, rule), flops, parameters


@pytest.mark.parametrize("budget", [1e13, 3e14, 1e17])
def test_a_proposal_spends_the_budget_on_the_largest_size_that_is_fed(budget):
    found, flops, parameters = proposal(budget)
    ends = [*found.starts, found.steps]
    lengths = [end - start for start, end in zip([0, *found.starts], ends, strict=True)]
    spent = sum(length * flops(tokens) for length, tokens in zip(lengths, found.tokens, strict=True))
    assert 0.98 * budget < spent < 1.005 * budget
    seen = found.steps * BATCH * CONFIG.num_data_tokens
    rule = GrowthRule()
    assert seen >= rule.data_tokens_per_parameter * parameters(found.tokens[-1])
    assert seen < 2.5 * rule.data_tokens_per_parameter * parameters(found.tokens[-1])  # a much larger one would starve
    for tokens, share in zip(found.tokens, rule.sizes, strict=True):
        assert tokens["qkv"] == tokens["proj"] == tokens["ffn"] / 4 == share * found.tokens[-1]["qkv"]


def test_a_larger_budget_never_gives_a_smaller_model_and_proportions_stay():
    sizes = [proposal(budget, {"qkv": 2, "proj": 2, "ffn": 3})[0].tokens[-1] for budget in (1e13, 1e14, 1e15, 1e16)]
    assert [one["qkv"] for one in sizes] == sorted({one["qkv"] for one in sizes})
    assert all(one["qkv"] / 2 == one["ffn"] / 3 for one in sizes)


@pytest.mark.parametrize("budget", [0, -1.0, float("inf"), float("nan"), 1e6])
def test_a_budget_that_is_none_or_too_small_is_refused_in_one_line(budget):
    with pytest.raises(ValueError, match=r"^budget: .*") as refused:
        proposal(budget)
    assert "\n" not in str(refused.value)


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
    shares = [re.findall(r"([\d.]+)% of scratch", one) for one in (shown, again)]
    assert shares[0] == shares[1] and 50 < float(shares[0][0]) < 100
    assert main(["plan", "--config", str(base), "--budget", "1e3"]) == 2
    assert capsys.readouterr().err.startswith("error: budget: 1e+03 operations are")
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
    assert "cannot grow" in capsys.readouterr().err
