"""What an optimizer holds follows its parameters through a growth."""

import copy
import math
import warnings

import pytest
import timm.optim
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_tokenformer.growth import grow, grow_one_by_one
from lit_tokenformer.growth.optimizer import check_optimizer_state, grow_optimizer
from lit_tokenformer.models import Pattention
from lit_tokenformer.optim import MuonWithAuxAdam

NORMS = ["l2_gelu", "gelu_l2", "softmax", "gelu"]
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "timm-Lion": lambda p: timm.optim.Lion(p, lr=1e-3),
    "timm-Muon": lambda p: timm.optim.Muon(p, lr=1e-2),
    "MuonWithAuxAdam": lambda p: MuonWithAuxAdam(p, lr=1e-2),
    "timm-Lamb": lambda p: timm.optim.Lamb(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
RESET = {  # optimizers with state that cannot be carried over, and what of it
    "timm-Adafactor": (lambda p: timm.optim.Adafactor(p, lr=1e-3), "exp_avg_sq_col, exp_avg_sq_row"),
    "timm-NovoGrad": (lambda p: timm.optim.NvNovoGrad(p, lr=1e-3), "exp_avg_sq"),
    "timm-MADGRAD": (lambda p: timm.optim.MADGRAD(p, lr=1e-3), "grad_sum_sq, s"),
}
WIDTH = 24


def build(score_norm="l2_gelu", dtype=torch.float32, num_tokens=16):
    model = nn.Sequential(Pattention(WIDTH, WIDTH, num_tokens, score_norm), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))
    nn.init.normal_(model[0].key_tokens, std=0.3)
    nn.init.normal_(model[0].value_tokens, std=0.3)
    return model.to(dtype)


def groups(model):
    """Two parameter groups, the parameter tokens in the middle of the first."""
    decayed = [model[2].weight, model[0].key_tokens, model[0].value_tokens, model[1].weight]
    return [{"params": decayed, "weight_decay": 0.1, "lr": 2e-3}, {"params": [model[1].bias, model[2].bias]}]


def step(model, optimizer, batch=0):
    generator = torch.Generator().manual_seed(batch)
    dtype = model[2].weight.dtype
    x = torch.randn(8, WIDTH, generator=generator).to(dtype)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
    optimizer.step()


def trained(make, steps=3, **settings):
    model = build(**settings)
    optimizer = make(groups(model))
    for batch in range(steps):
        step(model, optimizer, batch)
    return model, optimizer


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("tokens", [32, 40])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_new_parameters_stand_in_the_old_places_and_training_goes_on(make, tokens, no_warning):
    model, optimizer = trained(make)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
    options = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    before = [list(group["params"]) for group in optimizer.param_groups]
    states = {id(p): dict(optimizer.state[p]) for group in before for p in group if p in optimizer.state}

    grown = grow(model, tokens)
    grow_optimizer(optimizer, grown)

    new = {one.old: one.new for one in grown}
    after = [list(group["params"]) for group in optimizer.param_groups]
    assert [len(group) for group in after] == [len(group) for group in before]
    for old_group, new_group in zip(before, after, strict=True):
        assert all(there is new.get(was, was) for was, there in zip(old_group, new_group, strict=True))
    assert options == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert not any(one.old in optimizer.state for one in grown)
    for group in before:
        for old in group:
            was, now = states.get(id(old), {}), optimizer.state.get(new.get(old, old), {})
            assert was.keys() == now.keys()
            for key in was:
                if key == "step" or old not in new:
                    assert now[key] is was[key]
                elif isinstance(now[key], torch.Tensor) and now[key].shape != was[key].shape:
                    assert now[key].shape[0] == tokens and now[key].dtype == was[key].dtype
    check_optimizer_state(optimizer)

    weights = [one.new.detach().clone() for one in grown]
    for batch in range(3, 6):
        step(model, optimizer, batch)
        scheduler.step()
    for one, was in zip(grown, weights, strict=True):
        assert one.new.isfinite().all() and (one.new != was).any(dim=1).all()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(options[0]["lr"] * 0.9**3)

    saved = copy.deepcopy(optimizer.state_dict())  # and it can be saved and loaded
    other = make(groups(model))
    other.register_load_state_dict_post_hook(check_optimizer_state)
    other.load_state_dict(saved)
    step(model, other, 6)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("score_norm", NORMS)
def test_gradients_of_copies_are_what_the_state_is_scaled_by(score_norm, noise):
    """Without noise: of keys 1/r of the old gradient, of values the old gradient; with noise still so in their sum."""
    model = build(score_norm, torch.float64)
    x, factor = torch.randn(5, WIDTH, dtype=torch.float64), 3

    def gradients():
        model.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(5) % 3).backward()
        return model[0].key_tokens.grad.clone(), model[0].value_tokens.grad.clone()

    keys, values = gradients()
    grown = grow(model, 16 * factor, noise=noise)
    new_keys, new_values = (g.unflatten(0, (16, factor)) for g in gradients())
    assert grown[0].gradient_scale == 1 / factor and grown[1].gradient_scale == 1
    torch.testing.assert_close(new_values, values[:, None].expand_as(new_values), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(new_keys.sum(dim=1), keys, rtol=1e-10, atol=1e-14)
    if noise == 0:
        torch.testing.assert_close(new_keys, keys[:, None].expand_as(new_keys) / factor, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_split_divides_the_moments_of_keys_and_copies_those_of_values(amsgrad):
    model, optimizer = trained(lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=amsgrad))
    layer = model[0]
    keys, values = (copy.deepcopy(optimizer.state[p]) for p in (layer.key_tokens, layer.value_tokens))
    grow_optimizer(optimizer, grow(model, 48))
    now_keys, now_values = optimizer.state[layer.key_tokens], optimizer.state[layer.value_tokens]
    for name in ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad:
        degree = 1 if name == "exp_avg" else 2
        torch.testing.assert_close(now_keys[name], keys[name].repeat_interleave(3, dim=0) / 3**degree)
        assert torch.equal(now_values[name], values[name].repeat_interleave(3, dim=0))


@pytest.mark.parametrize("score_norm", NORMS)
def test_adam_moves_copies_of_keys_as_it_would_have_moved_the_original(score_norm):
    """Adam's update does not see the scale of gradients, so with rightly scaled moments r copies move as one did."""

    def make(p):
        return torch.optim.Adam(p, lr=1e-2, eps=1e-30)

    model, optimizer = trained(make, score_norm=score_norm, dtype=torch.float64)
    grown_model, grown_optimizer = copy.deepcopy(model), make(groups(model))
    grown_optimizer = make(groups(grown_model))
    grown_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    grow_optimizer(grown_optimizer, grow(grown_model, 32, noise=0))
    values = model[0].value_tokens.detach().clone()
    grown_values = grown_model[0].value_tokens.detach().clone()
    for group in optimizer.param_groups + grown_optimizer.param_groups:
        group["weight_decay"] = 0
    step(model, optimizer, 3)
    step(grown_model, grown_optimizer, 3)
    expected = model[0].key_tokens.repeat_interleave(2, dim=0)
    torch.testing.assert_close(grown_model[0].key_tokens, expected, rtol=0, atol=1e-11)
    moved = (model[0].value_tokens - values).repeat_interleave(2, dim=0)
    torch.testing.assert_close(grown_model[0].value_tokens - grown_values, moved, rtol=0, atol=1e-11)


def test_factored_moments_follow_the_split():
    """torch's Adafactor: row and column means of squared gradients, whose copies are 1/r^2 for keys."""
    model, optimizer = trained(lambda p: torch.optim.Adafactor(p, lr=1e-2))
    layer = model[0]
    keys, values = (copy.deepcopy(optimizer.state[p]) for p in (layer.key_tokens, layer.value_tokens))
    grow_optimizer(optimizer, grow(model, 32))
    now_keys, now_values = optimizer.state[layer.key_tokens], optimizer.state[layer.value_tokens]
    torch.testing.assert_close(now_keys["row_var"], keys["row_var"].repeat_interleave(2, dim=0) / 4)
    torch.testing.assert_close(now_keys["col_var"], keys["col_var"] / 4)
    torch.testing.assert_close(now_values["row_var"], values["row_var"].repeat_interleave(2, dim=0))
    assert torch.equal(now_values["col_var"], values["col_var"])


@pytest.mark.parametrize("new_state", ["mean", "zeros"])
def test_zero_keys_keep_old_moments_and_begin_new_ones(new_state):
    model, optimizer = trained(lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True))
    old = [copy.deepcopy(optimizer.state[p]) for p in (model[0].key_tokens, model[0].value_tokens)]
    grow_optimizer(optimizer, grow(model, 21, "zero_keys"), new_state)
    for was, parameter in zip(old, (model[0].key_tokens, model[0].value_tokens), strict=True):
        now = optimizer.state[parameter]
        assert torch.equal(now["step"], was["step"])
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(now[name][:16], was[name])
        assert not now["exp_avg"][16:].any()
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            mean = was[name].mean(dim=0, keepdim=True).expand(5, -1)
            torch.testing.assert_close(now[name][16:], mean if new_state == "mean" else torch.zeros_like(mean))
            now[name][16] += 1  # rows have storage of their own
            assert not torch.equal(now[name][16], now[name][17])


def test_mixed_growth_fills_what_is_neither_old_nor_copied():
    model, optimizer = trained(lambda p: torch.optim.AdamW(p, lr=1e-2))
    was = copy.deepcopy(optimizer.state[model[0].key_tokens])
    grow_optimizer(optimizer, grow(model, 40))
    now = optimizer.state[model[0].key_tokens]
    torch.testing.assert_close(now["exp_avg"][:32], was["exp_avg"].repeat_interleave(2, dim=0) / 2)
    assert not now["exp_avg"][32:].any()
    torch.testing.assert_close(now["exp_avg_sq"][32:], now["exp_avg_sq"][:32].mean(dim=0, keepdim=True).expand(8, -1))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_reset_drops_the_state_of_grown_parameters_only(make, no_warning):
    model, optimizer = trained(make)
    others = {p: dict(state) for p, state in optimizer.state.items() if p.shape[0] == 3 or p.ndim == 1}
    grown = grow(model, 40)
    grow_optimizer(optimizer, grown, "reset")
    fresh = make([one.new for one in grown]).state  # Adagrad has one before its first step
    assert not any(one.old in optimizer.state for one in grown)
    assert optimizer.state.keys() == others.keys() | fresh.keys()
    for parameter, state in fresh.items():
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())
    assert all(optimizer.state[p][key] is state[key] for p, state in others.items() for key in state)
    step(model, optimizer, 3)


@pytest.mark.parametrize("make", [OPTIMIZERS["AdamW"], OPTIMIZERS["MuonWithAuxAdam"]], ids=["AdamW", "Muon"])
def test_reset_copies_keeps_the_state_of_originals_alone(make):
    model, optimizer = trained(make)
    layer = model[0]
    old = [copy.deepcopy(optimizer.state[p]) for p in (layer.key_tokens, layer.value_tokens)]
    grow_optimizer(optimizer, grow(model, 40), "reset_copies")  # 16 originals, 16 copies, 8 zero keys
    for was, parameter, scale in zip(old, (layer.key_tokens, layer.value_tokens), (0.5, 1.0), strict=True):
        now = optimizer.state[parameter]
        for name in was.keys() - {"step"}:
            kept = was[name] * scale ** (2 if name == "exp_avg_sq" else 1)
            torch.testing.assert_close(now[name][:32:2], kept)
            assert not now[name][1:32:2].any() and not now[name][32:].any()
    step(model, optimizer, 3)


@pytest.mark.parametrize(("make", "state"), RESET.values(), ids=RESET)
def test_state_that_cannot_be_carried_over_is_reset_and_named(make, state):
    model, optimizer = trained(make, num_tokens=20)  # timm's Adafactor factors what has more than 16 rows
    kept = optimizer.state[model[2].weight]
    grown = grow(model, 40)
    with pytest.warns(UserWarning, match=f"keeps {state}.*, which cannot be carried over") as caught:
        grow_optimizer(optimizer, grown)
    assert len(caught) == 1
    assert not any(one.new in optimizer.state for one in grown)
    assert optimizer.state[model[2].weight] is kept and kept
    step(model, optimizer, 3)
    assert all(one.new.isfinite().all() for one in grown)


@pytest.mark.xfail(strict=True, raises=KeyError, reason="the optimizer asks for another kind of state by size")
def test_growth_across_the_size_at_which_timms_adafactor_begins_to_factor():
    model, optimizer = trained(lambda p: timm.optim.Adafactor(p, lr=1e-3), num_tokens=16)
    grow_optimizer(optimizer, grow(model, 32))
    step(model, optimizer, 3)


def test_state_that_is_a_list_is_not_carried_over():
    """Preconditioners have the shape of the old parameter, wherever they are kept."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].key_tokens] = {"step": 2, "Q": [torch.eye(16), torch.eye(WIDTH)]}
    optimizer.state[model[0].value_tokens] = {"momentum_buffer": None, "use_muon": True, "name": "v", "lr": 0.1}
    grown = grow(model, 32)
    with pytest.warns(UserWarning, match="SGD keeps Q, which cannot be carried over"):
        grow_optimizer(optimizer, grown)
    assert grown[0].new not in optimizer.state
    assert optimizer.state[grown[1].new] == {"momentum_buffer": None, "use_muon": True, "name": "v", "lr": 0.1}


def test_parameters_that_the_optimizer_does_not_hold_are_left_alone(no_warning):
    model = build()
    optimizer = torch.optim.AdamW([model[0].value_tokens, model[2].weight], lr=1e-2)
    step(model, optimizer)
    grown = grow(model, 32)
    grow_optimizer(optimizer, grown)
    assert optimizer.param_groups[0]["params"][0] is model[0].value_tokens is grown[1].new
    assert len(optimizer.param_groups[0]["params"]) == len(optimizer.state) == 2
    assert grown[0].new not in optimizer.state


def test_growth_before_the_first_step_needs_no_state(no_warning):
    model = build()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    grow_optimizer(optimizer, grow(model, 32))
    assert not optimizer.state
    step(model, optimizer)


def test_frozen_parameters_stay_in_their_group_without_state(no_warning):
    model = build()
    model[0].key_tokens.requires_grad_(False)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    step(model, optimizer)
    grow_optimizer(optimizer, grow(model, 32))
    assert optimizer.param_groups[0]["params"][1] is model[0].key_tokens
    step(model, optimizer, 1)
    assert model[0].key_tokens not in optimizer.state


def test_mean_bounds_the_first_updates_of_new_rows():
    """With zeros and an old step count the first update is sqrt(1000) (1 - 0.9) = 3.2 times the learning rate."""
    sizes = {}
    for new_state in ("mean", "zeros"):
        torch.manual_seed(0)
        model, optimizer = trained(lambda p: torch.optim.Adam(p, lr=1e-4), steps=10)
        for state in optimizer.state.values():
            state["step"].fill_(100_000.0)
        for group in optimizer.param_groups:
            group.update(lr=1e-3, weight_decay=0)
        grow_optimizer(optimizer, grow(model, 24, "zero_keys"), new_state)
        step(model, optimizer, 10)
        sizes[new_state] = model[0].key_tokens[16:].abs().max().item() / 1e-3
    assert sizes["zeros"] == pytest.approx(math.sqrt(1000) * 0.1, rel=0.01)
    assert sizes["mean"] < 2.5


def test_unknown_new_state_raises():
    with pytest.raises(ValueError, match="new_state: unknown value 'zero', did you mean 'zeros'"):
        grow_optimizer(torch.optim.SGD(build().parameters()), [], "zero")


@pytest.mark.parametrize("name", ["AdamW", "AdamW-amsgrad", "SGD-momentum", "Adafactor", "timm-Lion", "timm-Muon"])
def test_state_of_another_size_is_refused_when_it_is_loaded(name):
    make = OPTIMIZERS[name]
    model, optimizer = trained(make)
    grow_optimizer(optimizer, grow(model, 32))
    saved = copy.deepcopy(optimizer.state_dict())

    right = make(groups(model))
    right.register_load_state_dict_post_hook(check_optimizer_state)
    right.load_state_dict(saved)

    wrong = make(groups(build()))
    wrong.register_load_state_dict_post_hook(check_optimizer_state)
    with pytest.raises(
        ValueError, match=r"optimizer state: \w+ of parameter 1 in group 0 has the wrong shape \(got \(32, "
    ) as error:
        wrong.load_state_dict(saved)
    assert "\n" not in str(error.value)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at a time: of those given, and of what operations make."""

    def __init__(self, tensors):
        super().__init__()
        self.live, self.peak = {}, 0
        self.count(tensors)

    def count(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (one, size) for key, (one, size) in self.live.items() if not one.expired()}
        self.peak = max(self.peak, self.now())

    def now(self):
        return sum(size for one, size in self.live.values() if not one.expired())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.count(one for one in tree_leaves(made) if isinstance(one, torch.Tensor))
        return made


@pytest.mark.parametrize("method", ["split", "zero_keys", "random"])
def test_growing_one_by_one_holds_one_old_tensor_and_one_old_moment(method):
    """More than weights and moments at the end stand at a time only an old tensor, a moment of it, and small blocks."""
    model = nn.Sequential(Pattention(128, 128, 8192), Pattention(128, 128, 8192))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    del parameter
    old = model[0].key_tokens.nbytes

    def held():
        moments = [one for state in optimizer.state.values() for one in state.values()]
        return [*model.parameters(), *model.buffers(), *moments]

    live = LiveBytes(held())
    with live:
        for grown in grow_one_by_one(model, 16384, method):
            grow_optimizer(optimizer, [grown])
            del grown
    final = sum(one.nbytes for one in held())
    assert live.now() == final
    assert live.peak <= final + 2 * old + 2**16
