"""Inspection of parameter tokens: recorded weights, importance, removal, origins, the report, and pruning."""

import copy
import csv
import html
import json
import re
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import spearmanr

from callbacks import GrowingEMA, ParameterGrowthCallback, RunSummary
from lit_tokenformer.adapters import add_adapter, save_adapter
from lit_tokenformer.checkpoints.load import read_checkpoint, write_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.data import ImageDataModule, TextDataModule, Tokenizer
from lit_tokenformer.growth import grow_with_optimizers
from lit_tokenformer.inspection import find_dead, prune, record, token_report, without
from lit_tokenformer.inspection.ablation import Ablation
from lit_tokenformer.inspection.origins import movement, trace
from lit_tokenformer.inspection.record import token_layers
from lit_tokenformer.inspection.report import Source, render
from lit_tokenformer.inspection.statistics import collect, mean_loss, place
from lit_tokenformer.models import Pattention, create_backbone
from lit_tokenformer.models.linear_form import as_linear
from lit_tokenformer.models.token_groups import NamedGate, add_group
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMaskedLM, LitMultiTask
from lit_tokenformer.tasks.optimization import LRSchedule
from lit_tokenformer.tasks.rebuild import fresh_checkpoint, rebuild_task

TINY = {"dim": 16, "depth": 3, "num_heads": 2, "param_tokens": 8, "rotary_fraction": 0.5}
OLD = Path(__file__).parent / "data" / "checkpoints"
adamw = partial(torch.optim.AdamW, lr=3e-3)


def text_task(**more):
    task = LitCausalLM("tokenformer_lm_tiny", 257, 16, overrides={**TINY, **more}, optimizer=adamw)
    task.tokenizer_json = Tokenizer.bytes().to_json()
    with torch.no_grad():
        for layer in token_layers(task).values():  # weights of a trained model: every token matters
            layer.value_tokens.mul_(4)
    return task


def texts(count=3, batch=4):
    return list(torch.randint(0, 256, (count * batch, 17)).split(batch))


def run(*args):
    """Runs a command in this process; returns its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"score_norm": "softmax"}, {"score_norm": "gelu_l2"}, {"series": 2}])
@pytest.mark.parametrize("form", ["tokens", "linear"])
def test_contributions_sum_to_the_output_of_each_layer(settings, form):
    model = create_backbone("tokenformer_lm_tiny", vocab_size=32, **TINY, **settings)
    add_group(model.blocks[0].mlp, "docs", 4, gate := NamedGate()).value_tokens.data.normal_()
    gate.select("docs", torch.device("cpu"))
    layers = token_layers(as_linear(model) if form == "linear" else model)
    outputs = {}
    for name, layer in layers.items():
        attend = layer.attend
        layer.attend = lambda x, name=name, attend=attend: outputs.setdefault(name, attend(x))
    with record(model) as weights:
        model(torch.arange(24).view(2, 12))
    assert weights.keys() == outputs.keys() == layers.keys() and "blocks.0.mlp.groups.docs" in weights
    for name, layer in layers.items():
        each = weights[name][..., None] * layer.value_tokens  # (B, T, N, D): the contribution of each token
        assert (each.sum(dim=-2) - outputs[name]).norm() <= 1e-5 * outputs[name].norm(), name


def test_recording_leaves_the_model_as_it_was():
    model = create_backbone("tokenformer_lm_tiny", vocab_size=32, **TINY)
    before, attributes = model(torch.arange(8)[None]), set(model.blocks[0].mlp.__dict__)
    with pytest.raises(RuntimeError), record(model):
        assert torch.equal(model(torch.arange(8)[None]), before)
        raise RuntimeError
    assert set(model.blocks[0].mlp.__dict__) == attributes and torch.equal(model(torch.arange(8)[None]), before)
    with pytest.raises(ValueError, match="model: no parameter tokens to inspect"), record(torch.nn.Linear(2, 2)):
        pass


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_equal_the_plain_formulas():
    task, batches = text_task(), texts()
    batches[1][2, 5:] = -100  # ignored
    found, loss, data_tokens = collect(task, batches, top=5)
    layer, name = task.backbone.blocks[1].attn.query, "backbone.blocks.1.attn.query"
    seen, inputs = [], []
    layer.register_forward_hook(lambda _, given, out: inputs.append(given[0]))
    total = sum(F.cross_entropy(task(b[:, :-1].clamp_min(0)).flatten(0, 1), b[:, 1:].flatten(), reduction="sum")
                for b in batches)  # fmt: skip
    count = sum(int((b[:, 1:] >= 0).sum()) for b in batches)
    for batch, x in zip(batches, inputs, strict=True):
        scores = x @ layer.key_tokens.T
        z = layer.tau * scores / scores.norm(dim=-1, keepdim=True)
        seen.append((F.gelu(z)[batch[:, :-1] >= 0], (z / layer.tau).square()[batch[:, :-1] >= 0]))
    weights, energy = (torch.cat(parts) for parts in zip(*seen, strict=True))
    one = found[name]
    assert data_tokens == one.data_tokens == len(weights) and loss == pytest.approx(total.item() / count)
    for value, expected in ((one.use, weights.abs().mean(0)), (one.active, (weights > 0.1).float().mean(0)),
                            (one.largest, weights.amax(0)), (one.energy, energy.mean(0))):  # fmt: skip
        torch.testing.assert_close(value.float(), expected.detach(), rtol=1e-4, atol=1e-6)
    (slope,) = torch.autograd.grad(total / count, layer.value_tokens)
    first = -(slope * layer.value_tokens).sum(dim=1)
    torch.testing.assert_close(one.first_order.float(), first.detach(), rtol=1e-3, atol=1e-8)
    assert (one.influence >= one.first_order.abs() - 1e-12).all()
    torch.testing.assert_close(one.weights, weights.topk(5, dim=0).values)
    number, index = place(int(one.places[0, 3]))
    given = F.gelu(layer.tau * F.normalize(inputs[number] @ layer.key_tokens.T, dim=-1))
    torch.testing.assert_close(given.flatten(0, 1)[index, 3], one.weights[0, 3])
    assert all(parameter.requires_grad for parameter in task.parameters()) and task.training


def test_importance_adds_half_of_the_squared_change_of_each_item():
    """For a classifier an item is an image: gradients of one image at a time, squared."""
    task = LitImageClassifier("tokenformer_vit_tiny_patch16_224", 3, 8, overrides={**TINY, "patch_size": 4})
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 2, 2, 0, 1, 0])
    one = collect(task, [(images[:4], labels[:4]), (images[4:], labels[4:])])[0]["backbone.blocks.1.attn.proj"]
    values = task.eval().backbone.blocks[1].attn.proj.value_tokens
    losses = [F.cross_entropy(task(images[i : i + 1]), labels[i : i + 1]) for i in range(6)]
    each = torch.stack([-(torch.autograd.grad(loss, values)[0] * values).sum(dim=1) for loss in losses])
    expected = each.mean(dim=0) + each.square().mean(dim=0) / 2
    torch.testing.assert_close(one.first_order.float(), each.mean(dim=0).detach(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(one.importance.float(), expected.detach(), rtol=1e-3, atol=1e-7)


def test_memory_does_not_grow_with_the_data():
    """Statistics keep sums and the largest weights; neither a batch nor its activations stay alive."""
    alive, kept = [], []

    def batches(count):
        for _ in range(count):
            kept.append(sum(one() is not None for one in alive))
            batch = torch.randint(0, 256, (2, 17))
            alive.append(weakref.ref(batch))
            yield batch

    sizes = []
    for count in (1, 6):
        found, _, _ = collect(text_task(depth=1), batches(count), top=4)
        values = [value for one in found.values() for value in vars(one).values()]
        sizes.append(sum(value.nbytes for value in values if isinstance(value, torch.Tensor)))
    assert sizes[0] == sizes[1] and max(kept) <= 1


def test_padding_is_not_counted_and_packed_places_are_found():
    """A MosaicBERT computes packed batches without padding; its places must be those of the padded ones."""
    both = []
    for unpad in (False, True):
        given = {"dim": 16, "depth": 1, "num_heads": 2, "projection": "pattention", "param_tokens": 8, "unpad": unpad}
        torch.manual_seed(0)
        task = LitMaskedLM("mosaic_bert_tiny", 300, 16, overrides=given)
        tokens = torch.arange(3 * 12).view(3, 12)
        labels = torch.where(tokens % 4 == 1, tokens, -100)
        lengths = torch.tensor([12, 5, 8])
        labels[torch.arange(12) >= lengths[:, None]] = -100
        found, _, data_tokens = collect(task, [(tokens, labels, lengths)], top=3)
        assert data_tokens == 25
        one = next(iter(found.values()))
        rows, columns = one.places.div(12, rounding_mode="floor"), one.places % 12
        assert (columns < lengths[rows]).all()
        both.append(one)
    torch.testing.assert_close(both[0].use, both[1].use)
    assert torch.equal(both[0].places, both[1].places)


def test_uses_by_class_are_means_over_the_images_of_the_class():
    task = LitImageClassifier("tokenformer_vit_tiny_patch16_224", 3, 8, overrides={**TINY, "patch_size": 4})
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 2, 2, 0, 2, 0])
    found, _, _ = collect(task, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    name = "backbone.blocks.2.mlp"
    with record(task) as weights:
        task.eval()(images)
    for label in (0, 2):
        expected = weights[name][labels == label].abs().mean(dim=(0, 1))
        torch.testing.assert_close(found[name].by_class[label].float(), expected, rtol=1e-4, atol=1e-6)
    assert not found[name].by_class[1].any()


# --- removal ----------------------------------------------------------------------------------------------------------


def test_removal_skips_the_blocks_before_the_layer():
    task, batches = text_task(dropout=0.1), texts()
    task.eval()
    energy = {name: one.energy for name, one in collect(task, batches)[0].items()}
    ablation = Ablation(task, batches, energy)
    for name in ("backbone.blocks.0.mlp", "backbone.blocks.2.attn.value", "backbone.blocks.1.attn.proj"):
        other = copy.deepcopy(task)
        prune(other, {name: [3]}, energy)
        expected = mean_loss(other, batches) - mean_loss(task, batches)
        assert ablation.change(name, 3) == pytest.approx(expected, abs=2e-6) and abs(expected) > 1e-6


@pytest.mark.parametrize("score_norm", ["l2_gelu", "gelu_l2", "gelu"])
@pytest.mark.parametrize("form", ["tokens", "linear"])
def test_pruning_tokens_with_zero_keys_is_exact(score_norm, form):
    layer, x = Pattention(8, 6, num_tokens=9, score_norm=score_norm).double(), torch.randn(5, 8).double()
    layer.key_tokens.data[[1, 4]] = 0
    before, tau = layer(x), layer.tau.clone()
    keys, values = layer.key_tokens.detach().clone(), layer.value_tokens.detach().clone()
    assert prune(as_linear(layer) if form == "linear" else layer, {"": [1, 4]}) == 2 * (8 + 6)
    assert layer.num_tokens == 7 and torch.equal(layer.tau, tau)
    torch.testing.assert_close(layer(x), before, rtol=1e-13, atol=1e-14)
    rest = [0, 2, 3, 5, 6, 7, 8]
    assert torch.equal(layer.key_tokens, keys[rest]) and torch.equal(layer.value_tokens, values[rest])


def test_tau_keeps_the_mean_scale_of_the_other_tokens():
    layer, x = Pattention(8, 6, num_tokens=16), torch.randn(400, 8)
    scores = x @ layer.key_tokens.T
    shares = (scores.square() / scores.square().sum(dim=1, keepdim=True)).mean(dim=0)
    prune(layer, {"": [2, 3, 5]}, {"": shares})
    assert layer.tau.item() == pytest.approx(4 * (1 - shares[[2, 3, 5]].sum().item()) ** 0.5)


@pytest.mark.parametrize("optimizer", [partial(torch.optim.AdamW, lr=0.01), partial(torch.optim.Adafactor, lr=0.01)])
def test_pruned_and_whole_model_take_the_same_steps(optimizer):
    """A token with zero key and value has no gradient: without it, weights and moments of the others are the same."""
    whole = text_task(score_norm="gelu").double()
    name, dead = "backbone.blocks.1.mlp", [0, 9, 31]
    layer = whole.backbone.blocks[1].mlp
    layer.key_tokens.data[dead] = layer.value_tokens.data[dead] = 0
    steps, models = texts(4), [whole, None]
    optimizers = [optimizer(whole.parameters(), weight_decay=0.0), None]
    one_step(whole, optimizers[0], steps[0])
    models[1] = copy.deepcopy(whole)
    optimizers[1] = optimizer(models[1].parameters(), weight_decay=0.0)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    before = copy.deepcopy(optimizers[1].state_dict()["state"])
    removed = prune(models[1], {name: dead}, optimizers=optimizers[1:])
    assert removed == 3 * 32 and models[1].backbone.blocks[1].mlp.num_tokens == 29
    kept = [i for i in range(32) if i not in dead]
    parameters = [key for key, _ in whole.named_parameters()]
    for number, state in optimizers[1].state_dict()["state"].items():
        for key, value in state.items():
            was = before[number][key]
            if parameters[number].startswith(name) and was.ndim == 2 and len(was) == 32:
                was = was[kept]
            assert torch.equal(value, was), (parameters[number], key)
    if optimizer.func is torch.optim.Adafactor:
        return  # its factors are means over all rows
    for batch in steps[1:]:
        losses = [one_step(model, one, batch) for model, one in zip(models, optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    torch.testing.assert_close(models[1].backbone.blocks[1].mlp.value_tokens, layer.value_tokens[kept])


def one_step(task, optimizer, batch):
    loss, _ = task.feature_loss(*task.batch_features(batch))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_dead_tokens_are_dead():
    """Each token listed as dead changes the loss by less than 1e-4 when removed, and so do all found together."""
    task, batches = text_task(depth=2), texts(2)
    for layer in list(token_layers(task).values())[::2]:
        layer.value_tokens.data[2:6] *= 1e-3
    report = token_report(task, batches, top=0, ablate=14)
    dead = [(layer.name, token) for layer in report.layers for token in layer.dead]
    assert len(dead) >= 8
    task.eval()
    whole = mean_loss(task, batches)
    energy = {layer.name: layer.statistics.energy for layer in report.layers}
    for name, token in dead:
        smaller = copy.deepcopy(task)
        prune(smaller, {name: [token]}, energy)
        assert abs(mean_loss(smaller, batches) - whole) < 1e-4, (name, token)
    found = find_dead(task, batches)
    with without(task, found.tokens, found.energy):
        assert mean_loss(task, batches) - whole == pytest.approx(found.change, abs=1e-7)
    assert abs(found.change) < 1e-4 and len(found) >= 8 and found.loss == pytest.approx(whole)
    prune(task, found.tokens, found.energy)
    assert mean_loss(task, batches) - whole == pytest.approx(found.change, abs=1e-7)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ({"blocks.9": [0]}, "tokens: unknown layer 'blocks.9'"),
        ({"backbone.blocks.0.mlp": [32]}, "tokens: backbone.blocks.0.mlp has 32 tokens, got index 32"),
        ({"backbone.blocks.0.mlp": range(32)}, "tokens: no token of backbone.blocks.0.mlp would remain"),
    ],
)
def test_impossible_removals_are_one_line(tokens, problem):
    with pytest.raises(ValueError, match=problem):
        prune(text_task(), tokens)


# --- origins ----------------------------------------------------------------------------------------------------------


def test_origins_follow_growth_by_rows_and_depth_and_removal():
    """Rows carry their history as a number, through real growths."""
    task = text_task(depth=2)
    name, events, after = "backbone.blocks.{}.attn.query", [], None
    mark = {number: task.backbone.blocks[number].attn.query.key_tokens for number in (0, 1)}
    for number, keys in mark.items():
        keys.data[:, 0] = 100 * number + torch.arange(8)  # survives copying
    for tokens, method in (({"qkv": 24}, "split"), ({"depth": 4}, "split"), ({"qkv": 30}, "zero")):
        before = task.backbone.size
        rows = {one.name: [one.grown.rows.before, one.grown.rows.after, one.grown.rows.copies, 0, 1]
                for one in grow_with_optimizers(task, tokens, [], method)}  # fmt: skip
        events.append({"before": before, "after": task.backbone.size, "rows": rows})
    for block, source in enumerate((0, 0, 1, 1)):
        keys = task.backbone.blocks[block].attn.query.key_tokens.detach()
        found = trace(events, name.format(block), 30)
        old = torch.arange(24)
        assert found.layer == name.format(source) and found.source[24:].tolist() == [-1] * 6
        assert torch.equal(keys[:24, 0], 100.0 * source + found.source[:24])
        expected = torch.where(old % 3 == 0, 0, 1) if block % 2 == 0 else torch.where(old % 3 == 0, 2, 1)
        expected = expected if block % 2 == 0 else torch.full((24,), 2)  # an inserted block is new as a whole
        assert found.growth.tolist() == [*expected.tolist(), *[3] * 6]
        if block % 2 == 0:
            assert found.original[:24].tolist() == [-1 if i % 3 == 0 else i // 3 * 3 for i in range(24)]
    first = task.backbone.blocks[0].attn.query
    kept = [i for i in range(30) if i not in (0, 4, 25)]
    prune(task, {name.format(0): [0, 4, 25]})
    events[-1]["kept"] = {f"{name.format(0)}.key_tokens": kept}
    after = trace(events, name.format(0), 27)
    assert torch.equal(first.key_tokens[:22, 0], after.source[:22].float())
    assert after.original[:3].tolist() == [-1, -1, -1] and after.growth[:3].tolist() == [1, 1, 0]
    assert trace(events[:1], name.format(0), 99).growth.eq(-1).all()  # unknown size: no claim


def test_movement_is_the_relative_distance_from_the_original():
    then = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    now = torch.tensor([[3.0, 4.0], [3.0, 5.0], [0.0, 0.0], [7.0, 7.0]])
    found = movement(now, then, torch.tensor([0, 0, 1, -1]))
    assert found[:3].tolist() == pytest.approx([0, 0.2, 1]) and found[3].isnan()


# --- the report -------------------------------------------------------------------------------------------------------


def planted():
    """A model whose last feed-forward has a token with the embedding of Q as key and the logit of z as value."""
    task = text_task(param_tokens=16, dim=64)
    with torch.no_grad():
        for layer in token_layers(task).values():
            layer.value_tokens.mul_(0.001)
        for weight in {task.backbone.stem.embedding.weight, task.backbone.head.weight}:
            weight.mul_(20)
        layer = task.backbone.blocks[-1].mlp
        layer.key_tokens.mul_(15)  # the norm of all scores is about 20, and the planted one is 4 at a Q, else 0.5
        state = task.backbone.stem(torch.tensor([[ord("Q")]]))[0, 0]
        layer.key_tokens[5] = F.normalize(state, dim=0) / 2
        direction = task.backbone.head.weight[ord("z")]
        layer.value_tokens[5] = 2 * F.normalize(direction - direction.mean(), dim=0)
    batches = texts(4)
    for batch in batches:
        batch[:, 6], batch[:, 7] = ord("Q"), ord("z")
    return task, batches


@pytest.mark.filterwarnings("error::FutureWarning")  # of torch, at the first derivative of a process
def test_a_planted_token_is_found():
    task, batches = planted()
    report = token_report(task, batches, top=3, ablate=4)
    (layer,) = [one for one in report.layers if one.name == "backbone.blocks.2.mlp"]
    assert layer.important[0] == 5
    assert {context.fired for context in layer.contexts[5]} == {"Q"}
    assert all(context.after.startswith("z") for context in layer.contexts[5])
    assert layer.written[5].raised[0][0] == "z"
    assert max(report.measured, key=lambda one: one[3])[:2] == ("backbone.blocks.2.mlp", 5)
    assert not report.layers[0].written, "the lens is for layers that write to the residual stream of the last blocks"
    rows = {(row["layer"], row["token"]): row for row in csv.DictReader(report.to_csv().splitlines())}
    row = rows[layer.name, "5"]
    assert json.loads(row["raises"])[0] == "z"
    assert float(row["importance"]) == pytest.approx(float(layer.statistics.importance[5]), rel=1e-4)


def test_text_of_the_data_is_escaped_and_the_page_loads_nothing():
    task = text_task()
    text = "<script>alert(1)</script>"[:17].encode(), b"</style><img src=x onerror=1>"[:17]
    batches = [torch.tensor([list(one) for one in text])]
    report = token_report(task, batches, top=8, ablate=2)
    page = render(report, Source('"><script>alert(2)</script>.ckpt'), 8)
    assert "<script>alert" not in page and "onerror" not in page.replace("&lt;/style&gt;&lt;img src=x onerror", "")
    visible = html.unescape(re.sub(r"</?(mark|span)[^>]*>", "", page))
    assert "<script>alert(" in visible and "</style><img src" in visible
    assert page.count("<script>") == 2 and page.count("</script>") == 2  # its own
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and 'id="theme"' in page


def test_reports_need_sensible_numbers_and_batches():
    for given, problem in (({"top": -1}, "top: "), ({"ablate": -2}, "ablate: "), ({"contexts": -1}, "contexts: ")):
        with pytest.raises(ValueError, match=problem):
            token_report(text_task(), texts(1), **given)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        token_report(text_task(), [])
    assert token_report(text_task(depth=1), texts(1), top=0, ablate=0, contexts=0).measured == []


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("text_cache")
@pytest.mark.parametrize("name", ["image", "text", "masked_text"])
def test_checkpoints_of_an_earlier_release_are_inspected(name, tmp_path, capsys):
    data = {"image": "digits"}.get(name, "python_docs")
    given = ["--ckpt_path", OLD / name / "last.ckpt", "--top", 2, "--ablate", 2, "--batches", 1, "--data.dataset", data]
    assert run("inspect", *given, "--output", tmp_path / "report") == 0, capsys.readouterr().err
    page = (tmp_path / "report" / "index.html").read_text()
    rows = list(csv.DictReader((tmp_path / "report" / "tokens.csv").read_text().splitlines()))
    assert {row["kind"] for row in rows} == {"qkv", "proj", "ffn"} and {row["growth"] for row in rows} >= {"0", "1"}
    assert "growth 1" in page and ('class="im p' if name == "image" else "<mark>") in page
    assert f"{len(rows):,} parameter tokens" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert run("inspect", *given, "--output", tmp_path / "report") == 2
    assert "error: output: " in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "report").iterdir()}


def small_fit(folder, *more, steps=12, **settings):
    data = TextDataModule("python_docs", block_size=16, batch_size=4, num_workers=0)
    task = text_task(depth=2)
    saved = [ModelCheckpoint(folder, monitor="val/loss", filename="{step}"), ModelCheckpoint(folder, filename="last")]
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=4,
        limit_val_batches=1,
        default_root_dir=folder,
        callbacks=[*more, RunSummary(), *saved],
        **settings,
    )
    trainer.fit(task, data)
    return task, trainer, folder / "last.ckpt"


@pytest.fixture(scope="module")
def grown(text_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    torch.manual_seed(0)
    *_, path = small_fit(folder, ParameterGrowthCallback({6: 16}, unit="step"), GrowingEMA(0.9))
    return path


def test_a_fit_names_the_command_and_the_report_knows_its_data_and_growth(grown, tmp_path, capsys):
    assert run("inspect", "--ckpt_path", grown, "--output", tmp_path, "--top", 2, "--ablate", 4) == 0
    rows = list(csv.DictReader((tmp_path / "tokens.csv").read_text().splitlines()))
    copies = [row for row in rows if row["growth"] == "1"]
    assert len(copies) == len(rows) / 2 and {row["step"] for row in copies} == {"6"}
    assert all(int(row["original"]) == int(row["token"]) - 1 for row in copies)
    assert all(float(row["moved"]) >= 0 for row in rows), "movement since the best checkpoint before the growth"
    page = (tmp_path / "index.html").read_text()
    assert "Movement of keys is measured from" in page and "qkv 8 → 16" in page and "copies of a split" in page


@pytest.mark.usefixtures("text_cache")
def test_the_run_summary_names_the_command(tmp_path, capsys):
    small_fit(tmp_path, steps=4)
    assert f"lit-tokenformer inspect --ckpt_path {tmp_path / 'last.ckpt'} --output report" in capsys.readouterr().out


def test_prune_removes_dead_rows_of_weights_average_and_optimizer(grown, tmp_path, capsys):
    given = "prune", "--ckpt_path", grown, "--output", tmp_path / "pruned.ckpt", "--batches", 2, "--tolerance", 0.002
    assert run(*given) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    before, after = (torch.load(path, weights_only=True) for path in (grown, tmp_path / "pruned.ckpt"))
    (growth,) = [state for key, state in after["callbacks"].items() if key.startswith("ParameterGrowth")]
    kept = growth["events"][-1]["kept"]
    assert kept and "parameter tokens removed" in out and "optimizer" not in out
    for store in ("state_dict", "current_model_state"):
        for name, tensor in before[store].items():
            rows = kept.get(name.replace("value_tokens", "key_tokens"), slice(None))
            if not name.endswith(".tau"):
                assert torch.equal(after[store][name], tensor[rows] if tensor.ndim else tensor), name
    task = rebuild_task(grown, read_checkpoint(grown))
    names = {parameter: name for name, parameter in task.named_parameters()}
    order = [names[one] for group in task.build_optimizer().param_groups for one in group["params"]]
    old, new = (one["optimizer_states"][0]["state"] for one in (before, after))
    for number, state in new.items():
        rows = kept.get(order[number].replace("value_tokens", "key_tokens"), slice(None))
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[moment], old[number][moment][rows]), order[number]
    assert run(*given) == 2 and "error: output: " in capsys.readouterr().err
    assert run("inspect", "--ckpt_path", tmp_path / "pruned.ckpt", "--output", tmp_path / "again", "--ablate", 0) == 0
    rows = list(csv.DictReader((tmp_path / "again" / "tokens.csv").read_text().splitlines()))
    assert {row["growth"] for row in rows} == {"0", "1"}


@pytest.mark.usefixtures("text_cache")
def test_a_pruned_fit_resumes(grown, tmp_path):
    """Without a schedule the layers keep their sizes; with the schedule of the fit they grow back to its total."""
    path = tmp_path / "pruned.ckpt"
    assert run("prune", "--ckpt_path", grown, "--output", path, "--batches", 1, "--tolerance", 0.01) == 0
    data = TextDataModule("python_docs", block_size=16, batch_size=4, num_workers=0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    for growth, total in (([], None), ([ParameterGrowthCallback({6: 16}, unit="step")], 16)):
        task = text_task(depth=2)
        trainer = Trainer(
            max_steps=14,
            callbacks=[GrowingEMA(0.9), *growth],
            enable_checkpointing=False,
            limit_val_batches=0,
            **quiet,
        )
        trainer.fit(task, data, ckpt_path=path, weights_only=True)
        sizes = {layer.num_tokens for layer in token_layers(task).values() if layer.kind == "qkv"}
        assert trainer.global_step == 14 and trainer.callback_metrics["train/loss"].isfinite()
        assert min(sizes) < 16 if total is None else sizes == {total}


@pytest.mark.usefixtures("text_cache")
@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("--top", "-1"), "error: top: expected a whole number of at least 0, got -1"),
        (("--ablate", "x"), "error: ablate: expected int, got 'x'"),
        (("--ablate", "-1"), "error: ablate: expected a whole number of at least 0, got -1"),
        (("--batches", "0"), "error: batches: expected a whole number of at least 1, got 0"),
        (("--data.dataset", "nothing"), "error: data.dataset: unknown value 'nothing'"),
        (("--data.blok_size", "8"), "error: data: unknown value 'blok_size', did you mean 'block_size'"),
        (("--earlier", "none.ckpt"), "error: earlier: none.ckpt is not a file"),
    ],
)
def test_bad_values_are_one_line(grown, given, problem, tmp_path, capsys):
    assert run("inspect", "--ckpt_path", grown, "--output", tmp_path / "report", *given) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1 and not (tmp_path / "report").exists()


def test_models_without_parameter_tokens_and_of_several_tasks_are_one_line(tmp_path, capsys):
    linear = LitCausalLM("gpt2_tiny", 257, 16, overrides={"dim": 16, "depth": 1, "num_heads": 2})
    prose = partial(LitCausalLM, vocab_size=257, context_length=16)
    several = LitMultiTask("tokenformer_lm_tiny", tasks={"a": prose, "b": prose}, overrides=TINY)
    expected = {"no parameter tokens to inspect": linear, "`lit-tokenformer split` writes one": several}
    for number, (problem, task) in enumerate(expected.items()):
        path = tmp_path / f"{number}.ckpt"
        write_checkpoint(fresh_checkpoint(task, task.state_dict()), path)
        for command in ("inspect", "prune"):
            assert run(command, "--ckpt_path", path, "--output", tmp_path / "out") == 2
            error = capsys.readouterr().err
            assert problem in error and error.count("\n") == 1
    path = tmp_path / "2.ckpt"
    write_checkpoint(fresh_checkpoint(text_task(), text_task().state_dict()), path)
    assert run("inspect", "--ckpt_path", path, "--output", tmp_path / "out") == 2
    assert "the checkpoint records no data set (expected --data.dataset NAME)" in capsys.readouterr().err


def test_groups_of_an_adapter_are_reported_apart(grown, tmp_path, capsys):
    task = rebuild_task(grown, read_checkpoint(grown))
    add_adapter(task.backbone, "docs", {"ffn": 4})
    for name, layer in token_layers(task).items():
        if ".groups." in name:
            layer.value_tokens.data.normal_(std=0.1)
    save_adapter(task.backbone, tmp_path / "docs", "docs")
    given = "--ckpt_path", grown, "--top", 2, "--ablate", 4, "--batches", 1
    assert run("inspect", *given, "--output", tmp_path / "report", "--adapter", tmp_path / "docs") == 0
    rows = list(csv.DictReader((tmp_path / "report" / "tokens.csv").read_text().splitlines()))
    own = [row for row in rows if row["group"] == "docs"]
    assert len(own) == 2 * 4 and {row["kind"] for row in own} == {"ffn"} and float(own[0]["use"]) > 0
    assert "ffn of <b>docs</b>" in (tmp_path / "report" / "index.html").read_text()


# --- both embedded tasks ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("text_cache")
@pytest.mark.parametrize("kind", ["digits", "text"])
def test_importance_ranks_like_measured_removal(kind):
    """Spearman's correlation over 32 tokens, evenly spaced over the ranking of all of them, on held-out data."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    seed_everything(0)
    if kind == "digits":
        given = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 32, "patch_size": 4}
        data = ImageDataModule("digits", batch_size=32, eval_batch_size=64, num_workers=0)
        task = LitImageClassifier("tokenformer_vit_tiny_patch16_224", 10, 8, given, adamw)
        trainer = Trainer(max_steps=150, limit_val_batches=0, enable_checkpointing=False, **quiet)
    else:  # a model that has learned little has another curvature
        given = {"dim": 64, "depth": 3, "num_heads": 2, "param_tokens": 32}
        loader = {"batch_size": 16, "eval_batch_size": 16, "num_workers": 0}
        data = TextDataModule("python_docs", tokenizer="bpe:1024", block_size=64, **loader)
        task = LitCausalLM(
            "tokenformer_lm_tiny",
            1024,
            64,
            overrides=given,
            optimizer=partial(torch.optim.AdamW, lr=4e-3, weight_decay=0.1, betas=(0.9, 0.95)),
            schedule=LRSchedule(name="cosine", warmup=40, min_factor=0.1, unit="step"),
        )
        growth = ParameterGrowthCallback({300: 64}, unit="step")
        saved = {"limit_val_batches": 0, "enable_checkpointing": False, "gradient_clip_val": 1.0}
        trainer = Trainer(max_steps=700, callbacks=[growth], **saved, **quiet)
    trainer.fit(task, data)
    batches = [batch for batch, _ in zip(data.val_dataloader(), range(2), strict=False)]
    task.eval()
    found, _, _ = collect(task, batches)
    ranked = sorted((float(v), name, i) for name, one in found.items() for i, v in enumerate(one.importance))
    picked = [ranked[round(share * (len(ranked) - 1) / 31)] for share in range(32)]
    ablation = Ablation(task, batches, {name: one.energy for name, one in found.items()})
    measured = [ablation.change(name, token) for _, name, token in picked]
    correlation = spearmanr([one for one, *_ in picked], measured).statistic
    print(f"{kind}: rank correlation {correlation:.3f}")
    assert correlation >= 0.8
