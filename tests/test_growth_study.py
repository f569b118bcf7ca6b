"""The study of whether growing pays: its growths keep what they should, its arms cost what they should, its sums are
right."""

import csv
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_images import write_fashion_mnist
from torchvision.datasets import FashionMNIST

from lit_tokenformer.comparison.fits import Runner
from lit_tokenformer.cost import model_cost
from lit_tokenformer.data import ImageDataModule
from lit_tokenformer.models import Tokenformer, create_backbone
from lit_tokenformer.models.backbone import growable_size

pytest.importorskip("matplotlib")
from benchmarks import baselines, family, late_growth
from benchmarks.growth_study import __main__ as study
from benchmarks.growth_study import arms, kept_images, model_growth, outcome


def model(preset="tokenformer_lm_tiny", **overrides):
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8, "vocab_size": 31, "context_length": 12}
    backbone = create_backbone(preset, **{**sizes, **overrides}).double()
    for parameter in backbone.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return backbone


TEXT = torch.arange(24).view(2, 12) % 31


def test_a_widened_twin_gives_the_same_and_its_copies_differ():
    twin = model("transformer_tiny")
    before = twin(TEXT)
    model_growth.widen(twin, 32)
    twin.double()
    torch.testing.assert_close(twin(TEXT), before, rtol=1e-6, atol=1e-6)
    query = (
        twin.blocks[0].attn.query.weight if hasattr(twin.blocks[0].attn, "query") else next(twin.blocks[0].parameters())
    )
    assert not torch.allclose(query[:, :16], query[:, 16:])
    assert twin.config.dim == 32 and twin.blocks[0].norm1.normalized_shape == (32,)


@pytest.mark.parametrize("way", ["insert_copies", "stack"])
def test_blocks_are_added_and_change_the_function(way):
    backbone = model()
    before, first = backbone(TEXT), backbone.blocks[0]
    origins = model_growth.WAYS[way][1](backbone, 4)
    assert len(backbone.blocks) == backbone.config.depth == 4 and backbone.blocks[0] is first
    assert len({id(block) for block in backbone.blocks}) == 4
    assert not torch.allclose(backbone(TEXT), before)
    assert all(torch.equal(new, old) for new, old in origins.items())
    backbone(TEXT).sum().backward()
    assert all(block.mlp.value_tokens.grad.abs().sum() > 0 for block in backbone.blocks)


def test_stacking_puts_the_model_above_itself_and_copies_stand_beside_their_originals():
    for way, order in (("stack", [0, 1, 0, 1]), ("insert_copies", [0, 0, 1, 1])):
        backbone = model()
        keys = [block.mlp.key_tokens.clone() for block in backbone.blocks]
        model_growth.WAYS[way][1](backbone, 4)
        found = [block.mlp.key_tokens for block in backbone.blocks]
        assert all(torch.equal(one, keys[number]) for one, number in zip(found, order, strict=True))


@pytest.mark.parametrize("name", ["text", "images"])
def test_every_arm_costs_its_share_of_the_budget(name):
    domain = arms.DOMAINS[name]
    groups = arms.load_arms(domain)
    short = []
    if name == "images":
        (inserted,) = (arm for arm in groups["depth"] if arm.name == "grown: blocks inserted")
        for arm in (arms.controls(domain)[0], inserted):
            short.append(arms.few_patches(arm))
    for arm in [*short, *(arm for group in groups.values() for arm in group)]:
        steps, starts = arm.steps(domain), arm.starts(domain)
        ends = [*starts, steps]
        lengths = [end - start for start, end in zip([0, *starts], ends, strict=True)]
        costs = [model_cost(config).training_flops * domain.batch_size for config in arm.configs(domain)]
        spent = sum(length * cost for length, cost in zip(lengths, costs, strict=True))
        assert spent == pytest.approx(arm.share * domain.budget, rel=2e-3), arm.name
        assert all(length > 0 for length in lengths)


def test_twins_have_the_parameters_of_the_final_size():
    for domain in arms.DOMAINS.values():
        final, *_ = arms.controls(domain)
        twin = next(arm for arm in arms.controls(domain) if arm.name.startswith("transformer twin"))
        blocks = []
        for arm in (final, twin):
            (config,) = arm.configs(domain)
            whole, half = (model_cost(replace(config, depth=n * config.depth)).parameters for n in (2, 1))
            blocks.append(whole - half)
        assert blocks[1] == pytest.approx(blocks[0], rel=0.03)


def test_the_compute_for_a_loss_is_that_of_the_line_in_its_logarithm():
    curve = [(1.0, 3.0), (math.e, 2.0), (math.e**3, 1.0)]
    assert outcome.compute_for(curve, 2.5) == pytest.approx(math.e**0.5)
    assert outcome.compute_for(curve, 1.5) == pytest.approx(math.e**2)
    assert outcome.compute_for(curve, 0.5) == pytest.approx(math.e**4)  # the last piece goes on
    assert outcome.compute_for([(1.0, 2.0), (2.0, 2.5)], 2.2) is None
    assert outcome.loss_at(curve, math.e**2) == pytest.approx(1.5)


def test_a_loss_that_the_longest_runs_do_not_reach_has_no_cost():
    def runs(*losses):
        return [SimpleNamespace(seed=seed, loss=loss) for seed, loss in enumerate(losses)]

    by_cost = {0.5: runs(3.0, 3.0), 1.0: runs(2.0, 2.5)}  # the means fall by 0.75; the seeds lie 0.125 beside them
    mean, low, high = (0.5 * 2 ** ((3.0 - 2.4 + offset) / 0.75) for offset in (0, -0.125, 0.125))
    assert outcome.cost_of_loss(by_cost, 2.4) == f"{mean:.2f} ± {(high - low) / math.sqrt(2):.2f}"
    assert outcome.cost_of_loss(by_cost, 2.2) == "more than 1"


def test_the_cheapest_schedule_changes_size_where_the_larger_one_is_cheaper_for_the_same_loss():
    small = [(1.0, 4.0), (10.0, 3.0), (100.0, 2.5)]
    large = [(4.0, 4.0), (20.0, 3.0), (80.0, 2.0)]
    found = outcome.cheapest_schedule([small, large], 2.0)
    by_hand = min(  # change at one of many losses
        outcome.compute_for(small, loss) + 80 - outcome.compute_for(large, loss)
        for loss in [4.0 - 0.001 * number for number in range(1500)]
    )
    assert found == pytest.approx(min(by_hand, 80), rel=1e-3)
    assert found < 80


def test_kept_images_are_those_of_the_data_module_and_each_comes_once(tmp_path):
    write_fashion_mnist(tmp_path)
    kept = kept_images.KeptImages(str(tmp_path), 8, 4)
    whole = ImageDataModule("fashion_mnist", str(tmp_path), eval_batch_size=4, val_fraction=0.0, num_workers=0)
    for own, other in zip(kept.val_dataloader(), whole.val_dataloader(), strict=True):
        assert torch.equal(own[0].expand(-1, 3, -1, -1), other[0]) and torch.equal(own[1], other[1])
    loader = kept.train_dataloader()
    epochs = [torch.cat([image for image, _ in loader]) for _ in range(2)]
    assert epochs[0].shape == (40, 1, 28, 28) and not torch.equal(*epochs)
    assert torch.equal(*(epoch.flatten(1).sum(1).sort().values for epoch in epochs))
    assert torch.equal(epochs[0][:8], next(iter(kept.train_dataloader()))[0])
    files = FashionMNIST(str(tmp_path)), FashionMNIST(str(tmp_path), train=False)
    plain = b"".join(bytes(part.flatten().tolist()) for one in files for part in (one.data, one.targets))
    counts = f"{len(files[0])} and {len(files[1])} images"
    told = f"fashion_mnist: {counts}, sha256 {hashlib.sha256(plain).hexdigest()[:12]}"
    assert kept_images.summary(str(tmp_path)) == told


@pytest.mark.slow
def test_the_study_runs_from_nothing_and_goes_on_where_it_stood(tmp_path, monkeypatch, text_cache):
    text = arms.DOMAINS["text"]
    data = {
        **text.data,
        "init_args": {**text.data["init_args"], "dataset": "python_docs", "cache_dir": str(text_cache)},
    }
    tiny = replace(text, budget=text.budget / 200, data=data, val_batches=1, ladder=(2, 4, 8))
    monkeypatch.setattr(study, "DOMAINS", {"text": tiny})
    command = [str(tmp_path / "out"), "--domains", "text", "--reduced", "--jobs", "2", "--logs", str(tmp_path / "logs")]
    assert study.main(command) == 0
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made == {f"text{end}" for end in (".md", ".json", ".png", "_sizes.png", "_fits.csv", "_curves.csv")}
    told = (tmp_path / "out" / "text.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if " C |" in line]
    jumps = {row[0]: float(row[5]) for row in rows if len(row) == 8 and "e" in row[5]}
    assert jumps["published growth"] > 1e-4 > 1e-6 > max(jumps["grown"], jumps["grown in tokens alone"])
    settings = json.loads((tmp_path / "out" / "text.json").read_text())
    assert "sha256" in settings["corpus"] and settings["environments"][0]["torch"]
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "logs").rglob("measured.json")}
    assert study.main([*command, "--draw-only"]) == 0
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "logs").rglob("measured.json")}


def test_short_sequences_cost_their_share_and_the_control_at_full_cost_has_the_steps_of_the_control():
    domain = arms.DOMAINS["images"]
    control = arms.controls(domain)[0]
    for kept, at in ((2, 0.9), (4, 0.75), (6, 0.5)):
        arm = baselines.with_few(control, kept, at)
        short, whole = (model_cost(config).training_flops * domain.batch_size for config in arm.configs(domain))
        steps, (start,) = arm.steps(domain), arm.starts(domain)
        assert start * short + (steps - start) * whole == pytest.approx(0.45 * domain.budget, rel=2e-3)
        assert kept / 16 < short / whole < 0.55
        fit = arm.fit(domain, 0, 1)
        assert fit["model"]["init_args"]["overrides"]["patch_drop_rate"] == 1 - kept / 16
        (dropping,) = (one for one in fit["trainer"]["callbacks"] if one["class_path"].endswith("PatchDropSchedule"))
        assert dropping["init_args"] == {"schedule": {start: 0.0}, "unit": "step"}
        masked = baselines.at_full_cost(SimpleNamespace(domain=domain), arm, control, 0.5)
        assert masked.steps(domain) == replace(control, share=0.5).steps(domain)


def test_arms_of_muon_differ_in_the_optimizer_alone():
    domain = arms.DOMAINS["text"]
    arm = replace(arms.controls(domain)[0], lr=0.01)
    plain, muon = (one.fit(domain, 0, 1) for one in (arm, replace(arm, optimizer=baselines.MUON)))
    ours, theirs = (fit["model"]["init_args"].pop("optimizer") for fit in (muon, plain))
    assert plain == muon and theirs["class_path"] == "torch.optim.AdamW"
    assert ours["class_path"] == "lit_tokenformer.optim.MuonWithAuxAdam"
    assert theirs["init_args"] == {**ours["init_args"], "fused": True}


@pytest.mark.parametrize(("better", "wins"), [(6, True), (6, False), (24, True)])
def test_another_batch_size_goes_on_for_as_long_as_it_wins(better, wins):
    configs = []

    def fit(arm, what, config):
        configs.append(config)
        loss, init = 2.0, config["model"]["init_args"]["optimizer"]["init_args"]
        if config["data"]["init_args"]["batch_size"] == better:
            on_all = config["trainer"]["max_steps"] > 1.5 * quarter * 12 / better
            loss = 2.5 if on_all and not wins else 1 + abs(init["lr"] - 0.003)
        return SimpleNamespace(result={"loss": loss}, folder=None)

    runner = SimpleNamespace(fit=fit, run=lambda fits: None)
    domain, options = arms.DOMAINS["text"], SimpleNamespace(seeds=[0, 1])
    quarter = arms.replace(baselines.with_muon(arms.controls(domain)[0]), share=0.25).steps(domain)
    muon = study.Study("text", domain, options, runner)
    (arm,) = muon.with_rates([baselines.with_muon(arms.controls(domain)[0])])
    muon.halved([arm])
    for size in (6, 24):
        before, first = len(configs), len(muon.outcomes)
        baselines.train_with_batch(muon, arm, size)
        steps = [config["trainer"]["max_steps"] / (quarter * 12 / size) for config in configs[before:]]
        final = [one for one in muon.outcomes[first:] if one.phase == "final"]
        assert {config["data"]["init_args"]["batch_size"] for config in configs[before:]} == {size}
        assert steps[:3] == pytest.approx([1, 1, 1], rel=0.01)
        if size != better:
            assert len(steps) == 3
        elif not wins:
            assert steps[3:] == pytest.approx([4, 4], rel=0.01) and not final
        else:
            assert [(one.arm.share, one.seed) for one in final] == [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
            assert {one.arm.lr for one in final} == {0.003}
    assert domain.data["init_args"]["batch_size"] == 12


def test_equal_settings_are_one_fit_under_any_label(tmp_path):
    runner = Runner(tmp_path, 1, read_only=True)
    made = runner.fit("images control", "seed 0", {"seed_everything": 0}).folder
    made.mkdir()
    assert runner.fit("images control", "final", {"seed_everything": 0}).folder == made
    assert runner.fit("another name", "final", {"seed_everything": 0}).folder == made
    assert runner.fit("images control", "seed 1", {"seed_everything": 1}).folder != made


def test_all_seeds_decide_on_the_learning_rates_of_short_sequences_with_muon():
    losses = {0.012: (1.0, 3.0), 0.006: (1.1, 2.0)}

    def fit(arm, what, config):
        init = config["model"]["init_args"]["optimizer"]["init_args"]
        return SimpleNamespace(result={"loss": losses[init["lr"]][config["seed_everything"]]}, folder=None)

    options, runner = SimpleNamespace(seeds=[0, 1], reduced=False), SimpleNamespace(fit=fit, run=lambda fits: None)
    images = study.Study("images", arms.DOMAINS["images"], options, runner)
    assert len(list(baselines.patches_muon(images))) == 9
    assert {one.arm.lr for one in images.outcomes if one.phase == "final"} == {0.006}
    assert len(images.outcomes) == 9 * (4 + 2)


def use_domain(monkeypatch, name, domain):
    """Let a study train on another domain."""
    label, _, *others = baselines.STUDIES[name]
    monkeypatch.setitem(baselines.STUDIES, name, (label, domain, *others))


@pytest.mark.slow
def test_the_baselines_run_and_are_read_again(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path)
    images = arms.DOMAINS["images"]
    data = {**images.data, "init_args": {**images.data["init_args"], "batch_size": 8, "eval_batch_size": 4}}
    tiny = replace(images, budget=images.budget / 500, data=data, val_batches=1)
    use_domain(monkeypatch, "patches", tiny)
    command = ["patches", str(tmp_path / "out"), "--reduced", "--root", str(tmp_path), "--logs", str(tmp_path / "logs")]
    assert baselines.main(command) == 0
    told = (tmp_path / "out" / "patches.md").read_text()
    rows = [line.removeprefix("| ").split(" | ")[:2] for line in told.splitlines() if " C | " in line]
    assert [cost for arm, cost in rows if arm.endswith(baselines.FULL_COST)] == ["0.50 C", "1.00 C"]
    assert ["4 of 16 patches for 75%", "0.45 C"] in rows
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "logs").rglob("measured.json")}
    assert len(times) == len(rows)
    (tmp_path / "out" / "patches.md").unlink()
    assert baselines.main([*command, "--draw-only"]) == 0
    assert (tmp_path / "out" / "patches.md").read_text() == told
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "logs").rglob("measured.json")}


@pytest.mark.slow
def test_all_studies_continue_from_their_tables(tmp_path):
    results = Path(baselines.__file__).parent / "results" / "baselines"
    command = ["all", str(tmp_path / "out"), "--logs", str(tmp_path / "logs"), "--tables", str(results), "--draw-only"]
    assert baselines.main(command) == 0
    for name in baselines.STUDIES:
        if name != "late":  # has a column that needs the curves of the fits
            assert (tmp_path / "out" / f"{name}.md").read_text() == (results / f"{name}.md").read_text()
            again, before = (json.loads((at / f"{name}.json").read_text()) for at in (tmp_path / "out", results))
            assert again == before
        again, before = (list(csv.DictReader((at / f"{name}.csv").open())) for at in (tmp_path / "out", results))
        own = {"nested": "", "train_seconds": ""}  # the search and the final runs can share a fit
        assert [{**row, **own} for row in before] == [{**row, **own} for row in again]


@pytest.mark.slow
def test_every_way_of_late_growth_trains(tmp_path, monkeypatch, text_cache):
    domain = late_growth.DOMAIN
    data = {**domain.data, "init_args": {**domain.data["init_args"], "cache_dir": str(text_cache)}}
    data["init_args"]["dataset"] = "python_docs"
    tiny = replace(domain, budget=domain.budget / 60, data=data, val_batches=1)
    use_domain(monkeypatch, "late", tiny)
    monkeypatch.setattr(late_growth, "EVALUATIONS", 2)
    command = ["late", str(tmp_path / "out"), "--reduced", "--logs", str(tmp_path / "logs")]
    assert baselines.main(command) == 0
    with (tmp_path / "out" / "late.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"].split(" at")[0] for row in rows} == {"from scratch, 32 tokens", *late_growth.WAYS}
    assert len({row["steps"] for row in rows}) == 1 and all(row["failed"] == "" for row in rows)


def test_late_growth_has_the_steps_of_its_control_and_decays_in_the_second_half():
    domain = late_growth.DOMAIN
    control = arms.controls(domain)[0]
    assert control.steps(domain) == late_growth.STEPS
    assert control.configs(domain)[0].depth == late_growth.BLOCKS
    for way in late_growth.WAYS:
        for at in late_growth.AT:
            arm = late_growth.grown(control, way, at)
            fit = arm.fit(domain, 0, 1)
            (start,) = arm.starts(domain)
            assert arm.steps(domain) == fit["trainer"]["max_steps"] == late_growth.STEPS
            assert start == pytest.approx(at * late_growth.STEPS, abs=1)
            assert fit["model"]["init_args"]["schedule"]["decay"] == pytest.approx((1 - at) / 2)
            assert [config.depth for config in arm.configs(domain)] == [1, late_growth.BLOCKS]


@pytest.mark.parametrize(("losses", "mixed"), [((4, 3, 2.505, 2.0, 1.9), 200), ((4, 3, 2.9, 2.6, 1.0), None)])
def test_steps_to_mix_are_counted_before_the_decay(losses, mixed):
    def run(arm, losses):
        return outcome.Outcome("", "", arm, 0, {"steps": 1000, "curve": {"losses": losses}}, None)

    control = arms.controls(late_growth.DOMAIN)[0]
    late = replace(control, at=(0.4,), schedule={"decay": 0.2})
    theirs = (4, 3, 2.5, 2.0, 1.5)
    stable = replace(control, schedule={"decay": 0.1})
    assert late_growth.mixing_steps(run(late, losses), run(stable, theirs)) == mixed
    assert late_growth.mixing_steps(run(late, losses), run(control, theirs)) == mixed  # after 600 steps
    early = replace(control, schedule={"decay": 0.5})
    assert late_growth.mixing_steps(run(late, losses), run(early, theirs)) is None  # after 500
    never = replace(control, schedule={"decay": 0.6})
    assert late_growth.mixing_text([run(late, losses)], [run(never, theirs)]) == "-"


def test_a_recorded_fit_has_no_mixing_time():
    row = {"failed": "", "steps": "10", "parameters": "3", "train_seconds": "1", "loss": "2", "score": "3"}
    recorded = outcome.Recorded({**row, "score_name": "x", "largest_jump": "", "tflop": "1"})
    late = replace(arms.controls(late_growth.DOMAIN)[0], at=(0.4,), schedule={"decay": 0.2})
    one, whole = (
        outcome.Outcome("", "", late, 0, result, None)
        for result in (recorded.result, {"steps": 10, "curve": {"losses": (3.0, 2.0)}})
    )
    assert late_growth.mixing_text([one], [one]) == late_growth.mixing_text([one], [whole]) == "-"
    assert late_growth.mixing_text([one, whole], [whole]) != "-"


def test_tables_of_another_study_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    command = ["muon", str(tmp_path / "out"), "--logs", str(tmp_path / "logs"), "--draw-only", "--tables"]
    with pytest.raises(SystemExit):
        baselines.main([*command, str(tmp_path)])
    assert f"error: --tables: {tmp_path} has no muon.csv with its .json" in capsys.readouterr().err
    use_domain(monkeypatch, "muon", replace(arms.DOMAINS["text"], budget=1e9))
    with pytest.raises(SystemExit):
        baselines.main([*command, str(Path(baselines.__file__).parent / "results" / "baselines")])
    assert "muon.json has other settings than this version's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_appended_blocks_are_those_of_a_new_model():
    torch.manual_seed(0)
    model = create_backbone("tokenformer_lm_tiny", dim=8, depth=1, num_heads=1, param_tokens=4, vocab_size=5)
    (first,) = model.blocks
    assert model_growth.append_random(model, 3) == {}
    assert model.blocks[0] is first and len(model.blocks) == model.config.depth == 3
    keys = [block.mlp.key_tokens for block in model.blocks]
    assert len({one.sum().item() for one in keys}) == 3
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 5)


@pytest.mark.parametrize("domain", arms.DOMAINS.values(), ids=arms.DOMAINS)
def test_a_ladder_counts_its_shared_stages_once(domain):
    *_, tokens = ladders = family.ladders(domain)
    blocks = ["blocks"] if domain.task == "LitCausalLM" else []
    assert [one.name for one in ladders] == ["hidden units", *blocks, "tokens"]
    for ladder in ladders:
        costs = [family.step_flops(arm, domain)[0] for arm in ladder.scratch]
        budgets = [arm.steps(domain) * cost for arm, cost in zip(ladder.scratch, costs, strict=True)]
        for share, spent in zip(family.BUDGETS, budgets, strict=True):
            assert 1.0 < spent / (share * domain.budget) < 1.15  # updates of Muon
        assert ladder.separate == pytest.approx(sum(budgets), rel=2e-3)
        assert ladder.flops(0.4) == pytest.approx(budgets[0] + 0.4 * sum(budgets[1:]), rel=2e-3)
        runs, stages = ladder.arms(0.4, 0.01), ladder.stages(0.4)
        ends = [sum(stable for stable, _ in stages[: number + 1]) for number in range(len(stages))]
        for number, run in enumerate(runs, 1):
            assert run.starts(domain) == ends[:number] and run.steps(domain) == ends[number] + stages[number][1]
            fit = run.fit(domain, 0, 1)
            rate = fit["model"]["init_args"]["schedule"]
            assert rate["unit"] == "step" and rate["decay"] == stages[number][1]
            growth = next(one for one in fit["trainer"]["callbacks"] if "ParameterGrowth" in one["class_path"])
            assert list(growth["init_args"]["schedule"]) == ends[:number]
            assert growth["init_args"]["new_state"] == "reset_copies"
            with torch.device("meta"):
                before, *after = (growable_size(Tokenformer(size.configs(domain)[0])) for size in ladder.scratch)
            for totals, size in zip(growth["init_args"]["schedule"].values(), after, strict=False):
                before |= totals
                assert before == size
    assert tokens.nested_shares == [0.25, 0.5]
    nested = tokens.nested(0.01).fit(domain, 0, 1)["trainer"]["callbacks"][0]
    assert nested["class_path"] == "callbacks.NestedSizes" and nested["init_args"]["sizes"] == [0.25, 0.5]
    assert tokens.separate > tokens.nested_flops > domain.budget


def test_updates_of_muon_are_the_products_of_its_iterations():
    config = arms.controls(arms.DOMAINS["text"])[0].configs(arms.DOMAINS["text"])[0]
    shapes = [(32, 32)] * 8 + [(32, 128)] * 2  # keys and values of q, k, v and proj; of the feed-forward
    products = [
        2 * a * a * b + 2 * a**3 + 2 * a * a * b for a, b in shapes
    ]  # X X^T, its square, and its product with X
    assert family.update_flops(config) == 3 * 5 * sum(products)


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([(0.4, -0.01), (0.6, -0.02)], "<= 0.40"),
        ([(0.4, 0.01), (0.6, -0.01)], "0.50"),
        ([(0.4, 0.02), (0.6, 0.01)], "> 0.60"),
    ],
)
def test_the_share_at_which_a_family_is_reached(points, told):
    assert family.crossing(points) == told


@pytest.mark.slow
def test_the_family_runs_and_is_read_again(tmp_path, monkeypatch, text_cache):
    text = arms.DOMAINS["text"]
    given = {"dataset": "python_docs", "cache_dir": str(text_cache), "batch_size": 4, "eval_batch_size": 4}
    data = {**text.data, "init_args": {**text.data["init_args"], **given}}
    tiny = replace(text, budget=text.budget / 1000 / baselines.REDUCED, data=data, val_batches=1)
    use_domain(monkeypatch, "family", tiny)
    command = ["family", str(tmp_path / "out"), "--reduced", "--logs", str(tmp_path / "logs")]
    assert baselines.main(command) == 0
    told = (tmp_path / "out" / "family.md").read_text()
    assert "tokens: each size from scratch | 1.00 |" in told and "ladder, further sizes at 40% | 0.4" in told
    (tmp_path / "out" / "family.md").unlink()
    assert baselines.main([*command, "--draw-only"]) == 0
    assert (tmp_path / "out" / "family.md").read_text() == told
