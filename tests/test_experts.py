"""Experts: routing against plain lines, growth without a change of the function, balance, and what is refused."""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from callbacks import GrowingEMA, ParameterGrowthCallback, RunSummary, TrainingMonitor
from lit_tokenformer.cli.commands import grow_checkpoint, shrink_checkpoint
from lit_tokenformer.cli.plan import plan
from lit_tokenformer.cli.weights import export_weights
from lit_tokenformer.cost import model_cost
from lit_tokenformer.growth import grow
from lit_tokenformer.interop.native import load_native, write_native
from lit_tokenformer.models import create_backbone, experts
from lit_tokenformer.models.experts import Experts, Router, expert_load, expert_metrics, finish_step
from lit_tokenformer.tasks import LitCausalLM, LRSchedule
from lit_tokenformer.tasks.initialization import initialize_from
from tests.test_depth_growth import SaveAt

SIZES = {"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8, "vocab_size": 11, "context_length": 32}
TOKENS = torch.arange(128).view(4, 32) * 7 % 11
FAMILIES = {  # feed-forward: one Pattention layer, MLP, GLU, MLP of Pattention layers
    "tokenformer_lm_tiny": {},
    "gpt2_tiny": {},
    "llama_tiny": {"mlp_ratio": 2.0},
    "transformer_tiny": {"projection": "pattention"},
}


def shaken(preset="tokenformer_lm_tiny", **overrides):
    torch.manual_seed(0)
    model = create_backbone(preset, **{**SIZES, **overrides}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def change(model, before):
    return ((model(TOKENS) - before).norm() / before.norm()).item()


def train_step(model, optimizer, tokens=TOKENS):
    model.train()
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    finish_step(model)
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_output_is_the_gated_sum_of_the_chosen_experts(top_k):
    layer = Experts([torch.nn.Linear(6, 6) for _ in range(3)], dim=6, top_k=top_k, shared=[torch.nn.Linear(6, 6)])
    layer.double().router.weight.data.normal_()
    layer.router.bias = torch.tensor([0.3, 0.0, -0.2], dtype=torch.float64)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    p = (x @ layer.router.weight.T).softmax(-1)
    chosen = (p + layer.router.bias).argsort(-1, descending=True)[..., :top_k]
    expected = layer.shared[0](x)
    for where in itertools.product(range(2), range(5)):
        every = p[where][chosen[where]].sum()
        for number in chosen[where].tolist():
            expected[where] += p[where][number] / every * layer.experts[number](x[where])
    torch.testing.assert_close(layer(x), expected)


def test_the_router_gets_the_gradient_of_log_p_even_of_one_expert():
    router, x = Router(4, experts=3, top_k=1), torch.randn(7, 4)
    chosen, gates = router(x)
    assert torch.equal(gates, torch.ones(7, 1))
    (gradient,) = torch.autograd.grad(gates.sum(), router.weight)
    log_p = (x @ router.weight.T).log_softmax(-1).gather(1, chosen)
    (expected,) = torch.autograd.grad(log_p.sum(), router.weight)
    torch.testing.assert_close(gradient, expected)
    far = torch.full((1, 4), 1e4)  # the probability of an expert that only its bias lets win is 0
    router.bias = torch.tensor([2.0, 0.0, 0.0])
    assert torch.equal(router(far)[1], torch.ones(1, 1))


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_grouped_products_equal_a_loop(preset, precision, monkeypatch):
    model = shaken(preset, **FAMILIES[preset], experts=4, experts_top_k=2)
    found = []
    for group in (True, False):
        assert group is False or experts.can_group([*model.blocks[0].mlp.experts], torch.zeros(64, 16))
        monkeypatch.setattr(experts, "can_group", experts.can_group if group else lambda *_: False)
        with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
            out = model(TOKENS)
        gradients = torch.autograd.grad(out.sum(), [*model.parameters()])  # a gradient with strides of 0
        found.append((out, *gradients))
    for one, other in zip(*found, strict=True):
        limit = 1e-5 if precision is None else 0.1
        assert (one - other).norm() <= limit * (other.norm() + 1)


def test_shards_share_one_norm_over_their_chosen_tokens():
    model = shaken(experts=3, expert_groups=4, depth=1)
    layer = model.blocks[0].mlp.double()
    layer.router.weight.data.normal_()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for where in itertools.product(range(2), range(5)):
        rows, keys, values = slice(0, 8), [], []
        for shard in range(4):
            p = (layer.router.weight[3 * shard : 3 * shard + 3] @ x[where]).softmax(-1)
            expert, rows = layer.experts[p.argmax()], slice(8 * shard, 8 * shard + 8)
            keys.append(expert.key_tokens[rows])
            values.append(expert.value_tokens[rows])
        scores = torch.cat(keys) @ x[where]
        expected[where] = F.gelu(32**0.5 * scores / scores.norm()) @ torch.cat(values)
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match=r"^method: zero keys change the output under .* expert_groups"):
        grow(model, {"ffn": 40})


@pytest.mark.parametrize(
    ("preset", "top_k", "shared", "groups"),
    [*((preset, *more, 1) for preset in FAMILIES for more in ((1, 0), (2, 1))), ("tokenformer_lm_tiny", 1, 1, 4)],
)
def test_growth_into_experts_preserves_the_function(preset, top_k, shared, groups):
    settings = {"experts_top_k": top_k, "shared_experts": shared, "expert_groups": groups}
    model = shaken(preset, **FAMILIES[preset], **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = train_step(model, optimizer)(TOKENS)
    kind = "ffn" if "ffn" in model.size else "hidden"
    for size in ({"experts": 2}, {"experts": 4}, {"depth": 3}, {kind: 2 * model.size[kind]}, {"experts": 8}):
        grow(model, size, optimizer=optimizer)
        assert change(model, before) <= 1e-6 and model.size.items() >= size.items()
        assert optimizer.param_groups[0]["params"] == [*model.parameters()]
        before = train_step(model, optimizer)(TOKENS)
    cost = model_cost(model.config, model.size)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    one = sum(parameter.numel() for parameter in model.blocks[0].mlp.experts[0].parameters())
    assert cost.parameters - cost.active_parameters == 3 * (8 - top_k) * one
    fresh = create_backbone(preset, **{**SIZES, **FAMILIES[preset]}, **settings).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(TOKENS), before) and fresh.size == model.size and fresh.grown


def test_one_growth_adds_experts_blocks_and_tokens():
    model = shaken()
    before, state = model(TOKENS), torch.get_rng_state()
    grow(model, {"experts": 4, "depth": 4, "ffn": 64})
    assert torch.equal(torch.get_rng_state(), state)  # it has a generator of its own
    assert change(model, before) <= 1e-6
    assert model.size == {"heads": 2, "qkv": 8, "proj": 8, "ffn": 64, "depth": 4, "experts": 4}
    assert all(len(expert.key_tokens) == 64 for block in model.blocks for expert in block.mlp.experts)


def test_optimizer_state_follows_the_share_of_the_data_tokens():
    model = shaken()
    optimizer, left = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())
    train_step(model, optimizer)
    old = {key: value.clone() for key, value in optimizer.state[model.blocks[0].mlp.key_tokens].items()}
    grow(model, {"experts": 4}, optimizer=optimizer)
    layer = model.blocks[0].mlp
    for expert in layer.experts:
        state = optimizer.state[expert.key_tokens]
        torch.testing.assert_close(state["exp_avg"], old["exp_avg"] / 4)
        torch.testing.assert_close(state["exp_avg_sq"], old["exp_avg_sq"] / 16)
        assert state["step"] == old["step"]
    assert layer.router.weight not in optimizer.state
    with pytest.raises(RuntimeError, match=r"AdamW: stale after a growth"):
        left.step()
    train_step(model, optimizer)
    grow(model, {"experts": 8}, optimizer=optimizer)
    moved = optimizer.state[model.blocks[0].mlp.router.weight]
    assert moved["exp_avg"].shape == (8, 16) and moved["exp_avg"].abs().sum() > 0


def test_copies_of_experts_join_by_balancing():
    model = shaken()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for size in (2, 4):
        grow(model, {"experts": size}, optimizer=optimizer)
        loads = []
        for _ in range(40):
            train_step(model, optimizer, torch.randint(11, (4, 32)))
            loads.append(torch.stack([*expert_load(model).values()]))
        assert size == 2 or not loads[0][:, 1::2].any()  # only originals at first
        assert torch.stack(loads[30:]).mean(dim=0).min() > 0.1 / size


def test_the_bias_moves_once_per_optimizer_step_by_all_loads_of_it():
    layer = Experts([torch.nn.Linear(4, 4) for _ in range(3)], dim=4, balance=0.25)
    x = torch.randn(2, 12, 4)
    chosen = torch.cat([layer.router(part)[0].flatten() for part in x])  # nothing is counted twice below
    layer.router.load = torch.empty(0)
    for part in x:  # two micro-batches
        layer(part[None]).sum().backward()
        assert not layer.router.bias.any()
    layer.eval()(x)  # is not counted
    finish_step(layer)
    load = torch.bincount(chosen, minlength=3).float()
    change = 0.25 / 3 * ((8 - load) / 8).clamp(-1, 1)
    torch.testing.assert_close(layer.router.bias, change - change.mean())
    assert torch.equal(layer.router.last_load, load / 24)
    p = (x.flatten(0, 1) @ layer.router.weight.T).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert expert_metrics(layer)["experts/router_entropy"] == pytest.approx(entropy)
    assert expert_metrics(layer)["experts/load_max"] == pytest.approx(load.max().item() / 8)
    finish_step(layer)  # without data tokens since
    assert torch.equal(layer.router.last_load, load / 24)


@pytest.mark.parametrize("grouped", [True, False])
def test_idle_experts_do_not_change(grouped, monkeypatch):
    if not grouped:
        monkeypatch.setattr(experts, "can_group", lambda *_: False)
    model = shaken(experts=4)
    for block in model.blocks:
        block.mlp.router.bias[2] = -5.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    model.train()
    model(TOKENS).logsumexp(-1).sum().backward()
    idle = model.blocks[1].mlp.experts[2]
    assert all(one.grad is not None and not one.grad.any() for one in idle.parameters())  # for DDP and FSDP2
    finish_step(model)
    optimizer.step()
    unused = [f"{name}.experts.{n}." for name, load in expert_load(model).items() for n in range(4) if not load[n]]
    assert {f"blocks.{number}.mlp.experts.2." for number in range(2)} <= {*unused}
    for name, one in model.named_parameters():
        assert torch.equal(one, before[name]) is name.startswith((*unused,)), name


@pytest.mark.parametrize(
    "settings", [{"experts": 4, "experts_top_k": 2, "shared_experts": 1}, {"experts": 4, "expert_groups": 4}]
)
def test_experts_decode_token_by_token_and_in_batches_of_one(settings):
    model = shaken(**settings)
    state = model.new_state(32)
    steps = torch.cat([model(one, state=state) for one in TOKENS.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, model(TOKENS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(TOKENS[:1]), model(TOKENS)[:1], rtol=1e-4, atol=1e-5)


def make_task(**overrides):
    torch.manual_seed(1)
    return LitCausalLM(
        "tokenformer_lm_tiny",
        vocab_size=11,
        context_length=8,
        overrides={**SIZES, "context_length": 8, "vocab_size": 11, **overrides},
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        schedule=LRSchedule("wsd", warmup=2, decay=4, unit="step"),
    )


def fit(task, folder, *callbacks, ckpt_path=None, **settings):
    data = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0)).repeat(24, 1)
    given = {"logger": False, "enable_checkpointing": False, "max_steps": 12}
    trainer = Trainer(
        **{**given, **settings},
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(task, DataLoader(data, batch_size=4), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


SCHEDULE = {4: {"experts": 2, "qkv": 16}, 8: {"experts": 4, "depth": 3}}


def growth():
    return ParameterGrowthCallback(copy.deepcopy(SCHEDULE), unit="step")


@pytest.mark.parametrize("step", [3, 6, 10])
def test_a_fit_grows_into_experts_and_resumes_bit_for_bit(tmp_path, step):
    def callbacks():
        return growth(), GrowingEMA(decay=0.9)

    path = tmp_path / "middle.ckpt"
    whole, (first, *others) = make_task(dropout=0.1), callbacks()
    fit(whole, tmp_path, first, *others, SaveAt(step, path))
    assert [event["after"]["experts"] for event in first.events] == [2, 4]
    assert all(event["output_difference"] < 1e-6 for event in first.events)
    resumed = make_task(dropout=0.1)
    fit(resumed, tmp_path, *callbacks(), ckpt_path=path)
    expected = whole.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    assert any(tensor.any() for name, tensor in expected.items() if name.endswith("router.bias"))
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    loaded = LitCausalLM.load_from_checkpoint(path, weights_only=True)
    assert loaded.backbone.size.get("experts", 1) == {3: 1, 6: 2, 10: 4}[step]


def test_one_expert_is_the_model_of_before():
    dense, one = (make_task(**given) for given in ({}, {"experts": 1, "experts_top_k": 2, "shared_experts": 1}))
    assert dense.state_dict().keys() == one.state_dict().keys()
    assert all(torch.equal(tensor, one.state_dict()[name]) for name, tensor in dense.state_dict().items())
    assert not any("expert" in name or "router" in name for name in dense.state_dict())


def test_logs_and_the_summary_have_loads_and_active_parameters(tmp_path, capsys):
    monitor, summary = TrainingMonitor(log_images=0), RunSummary()
    logger = CSVLogger(tmp_path, name=None, version="")
    task = make_task()
    fit(task, tmp_path, growth(), monitor, summary, logger=logger, log_every_n_steps=1)
    text = (tmp_path / "metrics.csv").read_text()
    for name in ("experts/load_max", "experts/router_entropy", "experts/load/backbone.blocks.1.mlp/3"):
        assert name in text.splitlines()[0], name
    cost = task.cost()
    assert cost.active_parameters < cost.parameters == sum(one.numel() for one in task.parameters())
    assert summary.stages[-1]["active_parameters"] == cost.active_parameters
    assert "active)" in capsys.readouterr().out
    assert "active_parameters" not in summary.stages[0]
    assert json.loads((tmp_path / "summary.json").read_text())["stages"][-1]["units"]["experts"] == 4


@pytest.mark.parametrize("family", ["gpt2_tiny", "llama_tiny", "tokenformer_lm_tiny"])
def test_native_files_have_experts_and_other_formats_refuse_them(tmp_path, family):
    from lit_tokenformer.interop.tokenformer import write_published
    from lit_tokenformer.interop.transformers import save_transformers

    model = shaken(family, **FAMILIES[family])
    grow(model, {"experts": 4})
    write_native(tmp_path, model.config, model.state_dict())
    again = load_native(tmp_path)
    assert torch.equal(again(TOKENS), model(TOKENS)) and again.size == model.size
    model.save_pretrained(tmp_path / "hub")
    assert torch.equal(type(model).from_pretrained(tmp_path / "hub")(TOKENS), model(TOKENS))
    with pytest.raises(ValueError, match=r"^state: the format has no experts \(got 4\); format 'lit_tokenformer' has"):
        write_published(tmp_path, model.config, model.state_dict())
    with pytest.raises(ValueError, match="experts"):
        save_transformers(model, tmp_path / "other")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"experts": 0}, r"^experts: expected a whole number of at least 1, got 0$"),
        ({"experts": 2, "experts_top_k": 3}, r"^experts_top_k: expected at most experts 2, got 3$"),
        ({"experts": 2, "shared_experts": -1}, r"^shared_experts: expected a whole number of at least 0, got -1$"),
        ({"experts": 2, "experts_balance": 0.0}, r"^experts_balance: expected a positive number, got 0.0$"),
        ({"experts": 2, "expert_groups": 2}, r"^expert_groups: 2 shards of no tokens of MLP"),
        ({"experts": 2, "expert_groups": 3, "feed_forward": "pattention"}, r"^expert_groups: 3 shards of 32 tokens of"),
        (
            {"expert_groups": 2, "experts_top_k": 2, "experts": 4},
            r"^expert_groups: 2 needs experts_top_k: 1 and series: 1",
        ),
        ({"router": "expert_choice"}, r"^router: 'expert_choice' lets a data token depend on later ones"),
        ({"router": "top_p"}, r"^router: unknown value 'top_p', did you mean 'top_k'"),
        ({"feed_forward": "channel_mix", "experts": 2}, r"^experts: ChannelMix has no experts \(expected a pointwise"),
    ],
)
def test_bad_settings_are_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as raised:
        create_backbone("transformer_tiny", **{**SIZES, **overrides})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ({}, {"experts": 0}, r"experts would shrink from 1 to 0; experts can only be appended"),
        ({"experts": 4}, {"experts": 2}, r"experts would shrink from 4 to 2"),
        ({"experts": 4}, {"experts": 6}, r"^experts: expected a multiple of 4, the present number, got 6"),
        ({"experts_top_k": 3}, {"experts": 2}, r"^experts: expected at least experts_top_k 3, got 2"),
        ({"feed_forward": "channel_mix"}, {"experts": 2}, r"^experts: ChannelMix has no experts"),
    ],
)
def test_bad_growths_are_one_line_and_change_nothing(model, size, message):
    model = create_backbone("transformer_tiny", **{**SIZES, **model})
    before = [*model.state_dict()]
    with pytest.raises(ValueError, match=message) as raised:
        grow(model, {**size, "depth": 4})
    assert "\n" not in str(raised.value) and [*model.state_dict()] == before


def test_a_schedule_is_checked_before_the_fit(tmp_path):
    for schedule, message in (
        (
            {2: {"experts": 2}, 4: {"experts": 3}},
            r"^schedule: experts: expected a multiple of 2, the stage before",
        ),
        ({2: {"experts": 2.5}}, r"^schedule: step 2: experts: expected a whole number of experts, got 2.5"),
        ({2: {"expert": 2}}, r"^schedule: step 2: unknown value 'expert', did you mean 'experts'"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(make_task(), tmp_path, ParameterGrowthCallback(schedule, unit="step"))
    with pytest.raises(ValueError, match=r"^schedule: experts: expected at least experts_top_k 3, got 2"):
        fit(make_task(experts_top_k=3), tmp_path, ParameterGrowthCallback({2: {"experts": 2}}, unit="step"))


def test_commands_grow_a_checkpoint_and_start_from_it(tmp_path, capsys):
    path = tmp_path / "base.ckpt"
    task = make_task()
    fit(task, tmp_path, GrowingEMA(decay=0.9), max_steps=3).save_checkpoint(path)
    grown = grow_checkpoint(str(path), {"experts": 4, "ffn": 64})
    assert "1 -> 4 experts" in capsys.readouterr().out
    loaded = LitCausalLM.load_from_checkpoint(grown, weights_only=True).eval()
    tokens = TOKENS[:, :8]
    torch.testing.assert_close(loaded(tokens), task.eval()(tokens), rtol=1e-5, atol=1e-6)  # the average in both
    fit(resumed := make_task(), tmp_path, GrowingEMA(decay=0.9), ckpt_path=grown, max_steps=5)
    assert resumed.backbone.size["experts"] == 4
    initialize_from(started := make_task(), grown)
    assert started.backbone.size["experts"] == 4
    with pytest.raises(ValueError, match=r"^init_from: .* has 1 experts \(expected 4, of model.overrides\); add"):
        initialize_from(make_task(experts=4), path)
    with pytest.raises(ValueError, match=r"^format: a graph has no experts"):
        export_weights(str(grown), str(tmp_path / "onnx"), format="onnx")
    with pytest.raises(ValueError, match="experts cannot shrink"):
        shrink_checkpoint(str(grown), {"experts": 2})


def test_a_plan_has_active_parameters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    task = make_task(experts_top_k=2)
    trainer = Trainer(max_steps=12, callbacks=[growth()], logger=False, enable_checkpointing=False, accelerator="cpu")
    stages = plan(trainer, task)
    assert [stage.tokens["experts"] for stage in stages] == [1, 2, 4]
    assert stages[-1].cost.active_parameters < stages[-1].cost.parameters and not stages[0].cost.inactive
    assert f"({stages[-1].cost.active_parameters / 1e3:,.1f} k active)" in " ".join(capsys.readouterr().out.split())


def test_a_load_of_half_a_step_is_saved_and_restored():
    task, other = make_task(experts=4), make_task(experts=4)
    assert not any(value is not None for value in task.pending_state().values())
    task.backbone(TOKENS[:, :8])
    other.load_pending_state({name: one for name, one in task.pending_state().items() if one is not None})
    loads = [[block.mlp.router.load for block in one.backbone.blocks] for one in (task, other)]
    torch.testing.assert_close(*loads, rtol=0, atol=0)
    assert all(load.sum() == 32 for load in loads[0])


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"experts_top_k": 2}, {"expert_groups": 2}], ids=["top_k", "shards"])
def test_a_compiled_model_with_experts_equals_itself(config):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model = shaken(experts=4, **config)
    before = model(TOKENS)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(TOKENS), before, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    plain = copy.deepcopy(model)
    again = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    counts = []
    for _ in range(4):  # another routing in each step
        train_step(compiled, optimizer)
        train_step(plain, again)
        counts.append(len(graphs))
    assert counts[1:] == counts[1:2] * 3  # the first step creates the counts of the routers
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(expert_load(model), expert_load(plain))


@pytest.mark.slow
def test_several_processes_train_experts_as_one_does(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).parent / "expert_scenarios.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for processes, names in (([], ["ddp", "ddp_grown"]), (launcher, ["ddp", "ddp_grown", "fsdp", "tensor_parallel"])):
        command = [sys.executable, *processes, script, str(tmp_path), *names]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("ddp", "ddp_grown", "fsdp", "tensor_parallel"):
        one = torch.load(tmp_path / f"{'ddp_grown' if 'grown' in name else 'ddp'}-1-0.pt", weights_only=True)
        states = [torch.load(tmp_path / f"{name}-2-{rank}.pt", weights_only=True) for rank in (0, 1)]
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
        torch.testing.assert_close(states[0], one, rtol=0, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert any(tensor.any() for key, tensor in one.items() if key.endswith("router.bias"))
