"""A model that grows in depth: the function stays, the optimizer goes on, checkpoints of any depth fit."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks import GrowingEMA, ParameterGrowthCallback, TrainingMonitor
from lit_tokenformer.cost import model_cost
from lit_tokenformer.growth import grow
from lit_tokenformer.growth.depth import deepen, insert_parameters
from lit_tokenformer.models import create_backbone, model_size
from lit_tokenformer.tasks import LitCausalLM, LRSchedule

SIZES = {"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 4, "vocab_size": 11, "context_length": 8}
TOKENS = torch.arange(16).view(2, 8) % 11


def shaken(preset, **overrides):
    torch.manual_seed(0)
    model = create_backbone(preset, **{**SIZES, **overrides}).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", ["tokenformer_lm", "transformer", "gpt2", "pythia", "rwkv4"])
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_every_architecture_grows_in_depth_without_changing_its_function(family, depth):
    model = shaken(f"{family}_tiny")
    blocks, before = list(model.blocks), model(TOKENS)
    inserted = deepen(model, depth)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-12, atol=1e-12)
    assert [block for block in model.blocks if block in blocks] == blocks and model.blocks[0] is blocks[0]
    assert model.size["depth"] == depth
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert model_cost(model.config, model.size).parameters == whole
    model(TOKENS).logsumexp(dim=-1).sum().backward()
    zeros = [one.parameter for one in inserted if one.zero]
    assert zeros and all(parameter.grad.abs().sum() > 0 for parameter in zeros if parameter.ndim > 1)


def test_pangu_pi_with_its_shortcut_keeps_its_function():
    model = shaken("pangu_pi_tiny", rotary_fraction=1.0, shortcut_reduction=4)
    before = model(TOKENS)
    deepen(model, 4)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-12, atol=1e-12)


def test_new_blocks_are_in_the_mode_of_the_model():
    model = shaken("transformer_tiny", drop_path=0.5, dropout=0.5)
    before = model(TOKENS)
    grow(model, {"depth": 4})
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-12, atol=1e-12)
    loaded = shaken("transformer_tiny", drop_path=0.5, dropout=0.5)
    loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded(TOKENS), before, rtol=1e-12, atol=1e-12)
    grow(loaded.train(), {"depth": 5})
    assert all(module.training for module in loaded.modules())


def test_blocks_that_differ_grow_by_whole_repeats_of_their_pattern():
    model = shaken("hybrid_tiny", depth=3)
    before, kinds = model(TOKENS), [type(block.attn) for block in model.blocks]
    deepen(model, 6)
    assert [type(block.attn) for block in model.blocks] == 2 * kinds
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-12, atol=1e-12)
    state = model.new_state(8)
    steps = torch.cat([model(token, state=state) for token in TOKENS.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, before, rtol=1e-10, atol=1e-10)
    for depth in (9, 12):  # a fresh model takes the blocks of a checkpoint of any depth
        deepen(model, depth)
        fresh = shaken("hybrid_tiny", depth=3)
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(fresh(TOKENS), before, rtol=1e-12, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"^depth: not a whole number of repeats of the pattern of 3 blocks \(got 12 -> 14\)"
    ):
        deepen(model, 14)
    assert len(model.blocks) == 12


def test_what_cannot_grow_is_refused_and_left_alone():
    model = shaken("tokenformer_lm_tiny", norm_position="post")
    with pytest.raises(ValueError, match=r"^depth: blocks with norm_position 'post' cannot be inserted as identities"):
        deepen(model, 4)
    with pytest.raises(ValueError, match="would shrink from 2 to 1"):
        deepen(shaken("tokenformer_lm_tiny"), 1)
    assert len(model.blocks) == 2


def test_the_optimizer_holds_new_parameters_where_a_new_one_would_and_copies_go_on():
    model = shaken("gpt2_tiny")
    optimizer = torch.optim.AdamW(
        [
            {"params": [one for one in model.parameters() if one.ndim > 1]},
            {"params": [one for one in model.parameters() if one.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    model(TOKENS).logsumexp(dim=-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    inserted = deepen(model, 3)
    insert_parameters(optimizer, model, inserted)
    wanted = [[one for one in model.parameters() if (one.ndim > 1) is large] for large in (True, False)]
    for group, own in zip(optimizer.param_groups, wanted, strict=True):
        assert [id(one) for one in group["params"]] == [id(one) for one in own]
    for one in inserted:
        if one.zero:
            assert one.parameter not in optimizer.state
        else:
            new, old = optimizer.state[one.parameter], optimizer.state[one.origin]
            assert all(torch.equal(new[key], old[key]) and new[key] is not old[key] for key in old)
    fresh = shaken("gpt2_tiny", depth=3)
    again = torch.optim.AdamW(
        [{"params": [one for one in fresh.parameters() if (one.ndim > 1) is large]} for large in (True, False)]
    )
    again.load_state_dict(optimizer.state_dict())
    for parameter, other in zip(model.parameters(), fresh.parameters(), strict=True):
        if parameter in optimizer.state:
            torch.testing.assert_close(again.state[other]["exp_avg"], optimizer.state[parameter]["exp_avg"])


@pytest.mark.parametrize("new_state", ["reset", "reset_copies"])
def test_inserted_blocks_start_without_state_after_a_reset(new_state):
    model = shaken("gpt2_tiny", depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(TOKENS).logsumexp(dim=-1).sum().backward()
    optimizer.step()
    before = {parameter: state["exp_avg"].clone() for parameter, state in optimizer.state.items()}
    grow(model, {"depth": 4}, optimizer=optimizer, new_state=new_state)
    assert len(optimizer.param_groups[0]["params"]) > len(before)
    assert optimizer.state.keys() == before.keys()
    assert all(torch.equal(optimizer.state[parameter]["exp_avg"], moment) for parameter, moment in before.items())


def make_task():
    torch.manual_seed(1)
    return LitCausalLM(
        "tokenformer_lm_tiny",
        vocab_size=11,
        context_length=8,
        overrides={**SIZES, "dropout": 0.1, "drop_path": 0.1},
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        schedule=LRSchedule("wsd", warmup=2, decay=4, unit="step"),
    )


def fit(task, tmp_path, *callbacks, ckpt_path=None, **settings):
    batch = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    data = batch.repeat(12, 1)  # every batch is the same, wherever a run resumes
    trainer = Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(task, DataLoader(data, batch_size=4), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


SCHEDULE = {4: {"depth": 3, "qkv": 8}, 8: {"depth": 6}}


def growth():
    return ParameterGrowthCallback(copy.deepcopy(SCHEDULE), unit="step")


def test_depth_and_tokens_grow_by_one_schedule_in_a_running_fit(tmp_path):
    task, callback, monitor = make_task(), growth(), TrainingMonitor(log_images=0)
    fit(task, tmp_path, callback, monitor)
    assert model_size(task) == {"heads": 2, "qkv": 8, "proj": 4, "ffn": 16, "depth": 6}
    assert [event["after"]["depth"] for event in callback.events] == [3, 6]
    assert all(event["output_difference"] < 1e-5 for event in callback.events)
    config, samples = task.backbone.config, 4
    spent = [
        model_cost(config, size).training_flops
        for size in (callback.events[0]["before"], *(e["after"] for e in callback.events))
    ]
    assert monitor.training_flops == sum(4 * samples * one for one in spent)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in task.backbone.blocks]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("step", [3, 6, 10])
@pytest.mark.parametrize("average", [False, True])
def test_a_run_resumes_bit_for_bit_from_any_depth(tmp_path, step, average):
    def callbacks():
        return [growth(), *([GrowingEMA(decay=0.9)] if average else [])]

    path = tmp_path / "middle.ckpt"
    whole = make_task()
    fit(whole, tmp_path, *callbacks(), SaveAt(step, path))
    resumed = make_task()
    fit(resumed, tmp_path, *callbacks(), ckpt_path=path)
    expected = whole.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    loaded = LitCausalLM.load_from_checkpoint(path, weights_only=True)
    assert len(loaded.backbone.blocks) == {3: 2, 6: 3, 10: 6}[step]


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({4: {"depth": 1}}, r"schedule: step 4: depth would shrink from 2 to 1; blocks can only be inserted"),
        ({4: {"depth": 2.5}}, r"schedule: step 4: depth: expected a whole number of blocks, got 2.5"),
        ({4: {"depth": 4}, 8: {"depth": 3}}, r"schedule: step 8: depth would shrink from 4 to 3"),
    ],
)
def test_bad_depths_are_told_in_one_line(tmp_path, schedule, told):
    with pytest.raises(ValueError, match=told):
        fit(make_task(), tmp_path, ParameterGrowthCallback(schedule, unit="step"))


def test_a_checkpoint_of_another_depth_that_was_not_grown_is_refused(tmp_path):
    path = tmp_path / "other.ckpt"
    task = make_task()
    trainer = fit(task, tmp_path)
    trainer.save_checkpoint(path)
    other = LitCausalLM("tokenformer_lm_tiny", 11, 8, overrides={**SIZES, "depth": 1})
    with pytest.raises(ValueError, match="another architecture: blocks|another architecture: backbone.blocks.1"):
        other.on_load_checkpoint(torch.load(path, weights_only=True))


def test_public_grow_inserts_blocks_and_hands_them_to_the_optimizer():
    model = shaken("tokenformer_lm_tiny")
    optimizer, left = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())
    before = model(TOKENS)
    grow(model, {"depth": 4, "qkv": 8}, optimizer=optimizer)
    assert model.size == {"heads": 2, "qkv": 8, "proj": 4, "ffn": 16, "depth": 4}
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-12, atol=1e-12)
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == [id(one) for one in model.parameters()]
    model(TOKENS).logsumexp(dim=-1).sum().backward()
    optimizer.step()
    with pytest.raises(
        RuntimeError,
        match=r"AdamW: stale after a growth \(got \d+ replaced parameters, \d+ inserted parameters missing\)",
    ):
        left.step()
    with pytest.raises(ValueError, match="tokens: unknown value 'depth'"):
        grow(torch.nn.Linear(2, 2), {"depth": 4})


def test_a_backbone_takes_the_depth_of_the_weights_it_loads():
    model, grown = shaken("tokenformer_lm_tiny"), shaken("tokenformer_lm_tiny")
    early = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    deepen(grown, 5)
    model.load_state_dict(grown.state_dict())
    assert len(model.blocks) == 5 and torch.equal(model(TOKENS), grown(TOKENS))
    model.load_state_dict(early)
    assert len(model.blocks) == 2
    for missing in ("blocks.1.", "blocks.3."):  # neither a stage of this architecture nor one that growth leads to
        part = {name: tensor for name, tensor in grown.state_dict().items() if not name.startswith(missing)}
        with pytest.raises(RuntimeError, match=r"blocks\.\d"):
            model.load_state_dict(part)
    less = {name: tensor for name, tensor in early.items() if not name.startswith("blocks.1.")}
    with pytest.raises(RuntimeError, match="blocks.1"):
        shaken("tokenformer_lm_tiny").load_state_dict(less)


def test_a_part_that_declares_no_output_layer_is_refused_before_anything_changes():
    class Mixer(torch.nn.Linear):
        pass

    models = torch.nn.ModuleList([shaken("tokenformer_lm_tiny"), shaken("tokenformer_lm_tiny")])
    models[1].blocks[1].attn = Mixer(2, 2)
    with pytest.raises(ValueError, match=r"^depth: Mixer declares no output_layer"):
        deepen(models, 4)
    assert [len(model.blocks) for model in models] == [2, 2]


def test_more_blocks_than_memory_are_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"^depth: not enough memory for the new parameters alone \(got [\d,]+\.\d GiB"
    ):
        deepen(shaken("tokenformer_lm_tiny"), 10**9)


class OwnModule(LightningModule):
    """A user's module around a backbone, without any hook of ours."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.model = create_backbone("tokenformer_lm_tiny", **SIZES)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.model(batch[:, :-1]).mT, batch[:, 1:])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("step", [6, 10])
@pytest.mark.parametrize("average", [False, True])
def test_a_users_module_resumes_and_loads_at_any_depth(tmp_path, step, average):
    def callbacks():
        return [growth(), *([GrowingEMA(decay=0.9)] if average else [])]

    path = tmp_path / "middle.ckpt"
    whole, resumed = OwnModule(), OwnModule()
    fit(whole, tmp_path, *callbacks(), SaveAt(step, path))
    fit(resumed, tmp_path, *callbacks(), ckpt_path=path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert len(OwnModule.load_from_checkpoint(path, weights_only=True).model.blocks) == {6: 3, 10: 6}[step]


def test_a_checkpoint_from_before_a_growth_loads_into_the_grown_task(tmp_path):
    path, task = tmp_path / "early.ckpt", make_task()
    trainer = fit(task, tmp_path, growth(), SaveAt(2, path))
    assert len(task.backbone.blocks) == 6
    trainer.validate(task, DataLoader(torch.zeros(4, 9, dtype=torch.long), 4), path, verbose=False, weights_only=True)
    assert len(task.backbone.blocks) == 2
