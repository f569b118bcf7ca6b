"""Image and text in one sequence: who sees whom, what is learned from, and how answers are decoded."""

import csv
import json
import re
from functools import partial

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image, ImageColor

from callbacks import GrowingEMA, ParameterGrowthCallback, PredictionWriter
from lit_tokenformer.checkpoints.load import read_checkpoint, write_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.cli.merge import merge_checkpoints
from lit_tokenformer.cli.preflight import check_data_fit, check_monitors
from lit_tokenformer.cli.weights import export_weights
from lit_tokenformer.data import (
    ImageDataModule,
    MultiTaskDataModule,
    TextDataModule,
    Tokenizer,
    VisionLanguageDataModule,
)
from lit_tokenformer.data.image_text.datamodule import to_tensor
from lit_tokenformer.data.image_text.sources import render
from lit_tokenformer.growth import grow
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.models.image_text import ImageTextReader, greedy_answers, image_text_features
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMultiTask, LitVisionLanguage, LRSchedule
from lit_tokenformer.tasks.merge import merge_tasks
from lit_tokenformer.tasks.rebuild import fresh_checkpoint, rebuild_task

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8, "rotary_fraction": 0.5, "patch_size": 8}


def make_task(**settings):
    given = {"image_size": 16, "context_length": 20, "separator_id": 256, "overrides": SIZES}
    return LitVisionLanguage("tokenformer_lm_tiny", **{**given, "schedule": LRSchedule("constant"), **settings})


def make_data(dataset="digits_grid", **settings):
    given = {"train_samples": 48, "val_samples": 12, "batch_size": 8, "seed": 3, "num_workers": 0}
    return VisionLanguageDataModule(dataset, **{**given, **settings})


def spread(model):
    """Larger weights, so that the model's answers depend on what it reads."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def test_patches_see_each_other_and_text_sees_only_what_is_before_it():
    model = spread(make_task().backbone)
    image, tokens = torch.randn(1, 3, 16, 16), torch.randint(256, (1, 6))
    stem = model.stem
    x = torch.cat([stem.image(image), stem.embedding(tokens)], dim=1).detach()  # (1, P + 6, D)
    captured = {}
    model.stem.image.register_forward_hook(lambda *_: captured["patches"])
    model.stem.embedding.register_forward_hook(lambda *_: captured["words"])
    leaves = x.requires_grad_()
    captured.update(patches=leaves[:, : stem.length], words=leaves[:, stem.length :])
    outputs = []
    handle = model.norm.register_forward_hook(lambda module, given, out: outputs.append(out))
    image_text_features(model, tokens, image)
    handle.remove()
    (output,) = outputs
    for place in range(output.shape[1]):
        (grad,) = torch.autograd.grad(output[0, place, 0], leaves, retain_graph=True)
        seen = [i for i in range(leaves.shape[1]) if grad[0, i].abs().sum() > 0]
        assert seen == list(range(max(stem.length, place + 1)))


def test_text_without_an_image_is_a_plain_language_model():
    task = make_task()
    tokens = torch.randint(256, (2, 7))
    changed = tokens.clone()
    changed[:, -1] = 1
    assert torch.equal(task.backbone(tokens)[:, :-1], task.backbone(changed)[:, :-1])


@pytest.mark.parametrize("cache", [True, False])
def test_a_prompt_is_continued_as_if_it_were_alone_in_its_batch(cache):
    task = make_task()
    spread(task.backbone).eval()
    images = torch.randn(3, 3, 16, 16)
    prompts = [torch.randint(256, (length,)) for length in (2, 5, 3)]
    batch = ImageTextReader(task.backbone, images, prompts, 9, cache)
    alone = [
        ImageTextReader(task.backbone, image[None], [row], 9, cache) for image, row in zip(images, prompts, strict=True)
    ]
    tokens = None
    with torch.no_grad():
        for _ in range(4):
            logits = batch(tokens)
            single = [read(None if tokens is None else tokens[i : i + 1]) for i, read in enumerate(alone)]
            assert torch.allclose(logits, torch.cat(single), atol=1e-5)
            tokens = logits.argmax(-1, keepdim=True)


def test_the_cache_changes_no_answer():
    task = make_task()
    spread(task.backbone).eval()
    images, prompts = torch.randn(2, 3, 16, 16), [torch.randint(256, (length,)) for length in (2, 5)]
    cached, plain = (ImageTextReader(task.backbone, images, prompts, 12, cache) for cache in (True, False))
    tokens = None
    with torch.no_grad():
        for _ in range(6):
            logits = cached(tokens)
            assert torch.allclose(logits, plain(tokens), atol=1e-5)
            tokens = logits.argmax(-1, keepdim=True)


def test_only_the_answer_is_learned():
    data = make_data()
    batch = next(iter(data.val_dataloader()))
    for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        end = tokens.index(256)
        question = data.tokenizer.decode(tokens[:end])
        answer = [label for label in labels if label >= 0]
        assert labels[:end] == [-100] * end and answer[-1] == 256
        assert len(answer) == (5 if question == "all?" else 2)
        assert data.tokenizer.decode(answer[:-1]).isdigit()
    task = make_task()
    logits = task(batch["image"], batch["tokens"])
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    assert torch.allclose(task.feature_loss(*task.batch_features(batch))[0], expected)


def test_held_out_digits_are_in_no_training_grid():
    splits = make_data().splits
    train, val = ({digit.tobytes() for digit in part.images} for part in (splits.train, splits.val))
    assert not train & val and len(val) == 360


def test_exact_match_is_that_of_greedy_decoding():
    task, data = make_task(), make_data(val_samples=40)
    (batch,) = data.__class__("digits_grid", val_samples=40, batch_size=40, num_workers=0).val_dataloader()
    task.tokenizer_json = data.tokenizer.to_json()
    spread(task.backbone).eval()
    labels = batch["labels"].clone()
    own = task.answer_batch(batch)
    for row in range(0, 40, 2):  # every second label is the model's own answer
        start = int((labels[row] >= 0).int().argmax())
        answer = [*data.tokenizer.encode(own[row]), 256][: labels.shape[1] - start]
        if len(answer) < 4:
            batch["tokens"][row, start + 1 : start + len(answer)] = torch.tensor(answer[:-1])
            labels[row, start:] = -100
            labels[row, start : start + len(answer)] = torch.tensor(answer)
    right = task._right(*task.batch_features({**batch, "labels": labels})).tolist()
    decoded = task.answer_batch({**batch, "labels": labels})
    assert right == [a == b for a, b in zip(decoded, task.decode_labels(labels), strict=True)]


def test_greedy_answers_stop_at_the_separator():
    task = make_task()
    task.backbone.forward_head = lambda x, pre_logits=False: torch.eye(257)[256].expand(*x.shape[:2], 257)
    assert greedy_answers(task.backbone, torch.zeros(2, 3, 16, 16), [torch.tensor([256])] * 2, 5, 256) == [[], []]


def make_pair(**image):
    """An image classifier and a language model of equal width, depth and heads."""
    shared = {name: SIZES[name] for name in ("dim", "depth", "num_heads", "param_tokens")}
    vit = LitImageClassifier("tokenformer_vit_tiny_patch16_224", 7, 16, {**shared, "patch_size": 8, **image})
    lm = LitCausalLM("tokenformer_lm_tiny", 257, 20, 256, {**shared, "rotary_fraction": 0.5})
    lm.tokenizer_json = Tokenizer.bytes().to_json()
    for task in (vit, lm):
        spread(task.backbone)
    return vit, lm


def test_merging_leaves_both_models_as_they_were():
    vit, lm = (task.double() for task in make_pair())
    grow(lm, {"ffn": 48, "qkv": 16}, noise=0.5)
    vit.image_data = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.4]}
    merged = merge_tasks(vit, lm).double()
    merged.load_state_dict({**merged.state_dict()})
    pixels, tokens = torch.rand(3, 3, 16, 16).double(), torch.randint(257, (3, 9))
    mean, std = (torch.tensor(vit.image_data[name]).double()[:, None, None] for name in ("mean", "std"))
    assert torch.allclose(merged.backbone(tokens), lm.backbone(tokens), atol=1e-6)
    assert torch.allclose(merged.classify(pixels * 2 - 1), vit((pixels - mean) / std), atol=1e-6)
    assert vit((pixels - mean) / std).std() > 0.01
    joint = merged(pixels * 2 - 1, tokens)
    assert not torch.allclose(joint, lm.backbone(tokens), atol=1e-2)  # the text reads the image


def test_merged_checkpoints_serve_as_the_text_model_and_start_a_fit(tmp_path):
    vit, lm = make_pair()
    for name, task in (("vit", vit), ("lm", lm)):
        write_checkpoint(fresh_checkpoint(task, task.state_dict()), tmp_path / f"{name}.ckpt")
    merge_checkpoints(str(tmp_path / "vit.ckpt"), str(tmp_path / "lm.ckpt"), str(tmp_path / "both.ckpt"))
    both, alone = (TextGenerator.load(tmp_path / f"{name}.ckpt", "cpu") for name in ("both", "lm"))
    assert both.generate("ab", 6, temperature=0) == alone.generate("ab", 6, temperature=0)
    task = rebuild_task(tmp_path / "both.ckpt", read_checkpoint(tmp_path / "both.ckpt"))
    image = torch.rand(2, 3, 16, 16)
    assert torch.allclose(task.classify(image), vit.eval()(image), atol=1e-5)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(task, make_data())
    model = {"class_path": "lit_tokenformer.tasks.LitVisionLanguage", "init_args": {"preset": "checkpoint"}}
    data = {"class_path": "VisionLanguageDataModule", "init_args": {"train_samples": 16, "batch_size": 8}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    more = ["--init_from", tmp_path / "both.ckpt", "--trainer.default_root_dir", tmp_path, "--trainer.max_steps=1"]
    assert run("fit", "--config", tmp_path / "own.yaml", *more, "--trainer.limit_val_batches=0") == 0
    assert trainer.global_step == 2 and not torch.equal(task.backbone.stem.image.pos_embed, vit.backbone.stem.pos_embed)


def test_models_of_other_shapes_are_not_merged():
    with pytest.raises(ValueError, match="merge: expected models of equal depth, got 3 in image, 2 in text"):
        merge_tasks(*make_pair(depth=3))
    with pytest.raises(ValueError, match="image_tokens: expected blocks with no parameters but parameter tokens"):
        make_task(overrides={**SIZES, "norm_affine": True}, image_tokens=4)


def make_trainer(folder, **settings):
    given = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**{**given, "default_root_dir": folder, "enable_checkpointing": False, "max_epochs": 2, **settings})


class Batches(Callback):
    """Losses and weights of a fit."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


@pytest.mark.parametrize("image_tokens", [None, 8])
def test_a_growth_in_mid_fit_is_exact_and_a_resumed_fit_is_bit_equal(tmp_path, image_tokens):
    def fit(name, **settings):
        seed_everything(0)
        growth = ParameterGrowthCallback({1: {"qkv": 16, "ffn": 48} | ({"ffn:image": 48} if image_tokens else {})})
        saving = ModelCheckpoint(tmp_path / name, every_n_train_steps=8, save_top_k=-1, filename="{step}")
        seen, task = Batches(), make_task(image_tokens=image_tokens)
        trainer = make_trainer(
            tmp_path, callbacks=[growth, GrowingEMA(decay=0.5), saving, seen], enable_checkpointing=True
        )
        trainer.fit(task, make_data(), **settings)
        return growth.events, seen.losses, task

    events, whole, task = fit("whole")
    assert events[0]["output_difference"] < 1e-5 and events[0]["after"]["qkv"] == 16
    _, resumed, again = fit("again", ckpt_path=tmp_path / "whole" / "step=8.ckpt")
    assert resumed == whole[8:]
    state = task.state_dict()
    assert all(torch.equal(state[name], one) for name, one in again.state_dict().items())


@pytest.fixture
def trained(tmp_path):
    """Checkpoint, and three images next to it."""
    task = make_task()
    spread(task.backbone)
    task.tokenizer_json = Tokenizer.bytes().to_json()
    write_checkpoint(fresh_checkpoint(task, task.state_dict()), tmp_path / "vl.ckpt")
    for number in range(3):
        noise = np.random.default_rng(number).integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    return tmp_path / "vl.ckpt"


def run(*args):
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main([*map(str, args)]))
    return ended.value.code


def test_generate_answers_questions_about_images(trained, capsys):
    images = [trained.parent / f"{number}.png" for number in range(3)]
    given = ["generate", "--ckpt_path", trained, "--temperature", 0, "--max_new_tokens", 4, "--device", "cpu"]
    listed = [text for image in images for text in ("--image", image)]
    assert run(*given, *listed, "--prompt", "top left?", "--format", "json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    task = rebuild_task(trained, read_checkpoint(trained)).eval()
    pixels = torch.stack([to_tensor(Image.open(image), 16) for image in images])
    prompt = torch.tensor([*b"top left?", 256])
    answers = greedy_answers(task.backbone, pixels, [prompt] * 3, 4, 256)
    assert [row["completion"] for row in rows] == [task.tokenizer.decode(one) for one in answers]
    assert [row["prompt"] for row in rows] == ["top left?"] * 3
    assert run(*given, "--image", images[1], "--prompt", "top left?") == 0
    assert capsys.readouterr().out == f"top left? {rows[1]['completion']}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "no.png"], "image: cannot read no.png (no.png is not a file)"),
        (["--image", "0.png", "--image", "1.png", *["--prompt", "a"] * 3], "image: expected one, or one for each of 3"),
        (["--image", "0.png", "--prompts", "rows.jsonl"], "image: conflicts with prompts"),
    ],
)
def test_images_that_do_not_fit_the_prompts_are_rejected(trained, capsys, monkeypatch, options, message):
    monkeypatch.chdir(trained.parent)
    assert run("generate", "--ckpt_path", trained, *options) == 2
    assert message in capsys.readouterr().err


def test_a_text_model_reads_no_image(trained, tmp_path, capsys):
    _, lm = make_pair()
    write_checkpoint(fresh_checkpoint(lm, lm.state_dict()), tmp_path / "lm.ckpt")
    given = ["generate", "--ckpt_path", tmp_path / "lm.ckpt", "--image", tmp_path / "0.png", "--prompt", "a"]
    assert run(*given) == 2
    assert "image: the model reads no images (got stem 'token'" in capsys.readouterr().err


def write_folder(folder, names=("red", "green", "blue", "white"), **texts):
    """Pictures of one color in the layout of Hugging Face, with a question for every second."""
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        rows = []
        for number, name in enumerate(names):
            Image.new("RGB", (20, 12), name).save(folder / split / f"{name}.png")
            question = {"question": f"what color? {number}"} if number % 2 else {"question": None}
            rows.append({"file_name": f"{name}.png", "text": name, **question, **texts})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_files_are_read_from_the_layout_of_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = VisionLanguageDataModule("files", write_folder(tmp_path / "data"), 8, batch_size=4, num_workers=0)
    (batch,) = data.val_dataloader()
    task = make_task(image_size=8, context_length=64)
    task.tokenizer_json = data.tokenizer.to_json()
    answers = task.decode_labels(batch["labels"])
    assert sorted(answers) == ["blue", "green", "red", "white"] and data.num_train_samples == 4
    for image, tokens, answer in zip(batch["image"], batch["tokens"], answers, strict=True):
        assert image[:, 4, 4].add(1).mul(127.5).round().tolist() == list(ImageColor.getrgb(answer))
        question = data.tokenizer.decode(tokens.tolist()[: tokens.tolist().index(256)])
        assert question.startswith("what color?") == (answer in ("green", "white"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": None}, "data.root: expected a folder of images with metadata.jsonl, got None"),
        ({"text_column": "caption"}, "data.text_column: no column 'caption'; the columns are image, text, question"),
        ({"hf_image_column": "picture"}, "data.hf_image_column: expected one column of images (image), got 'picture'"),
        ({"tokenizer": "bpe:300"}, "data.tokenizer: expected bytes or an existing vocabulary, got bpe:300"),
        ({"in_chans": 2}, "data.in_chans: expected 3 (RGB) or 1 (gray), got 2"),
        ({"streaming": True}, "data.streaming: unsupported by VisionLanguageDataModule (expected false)"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = write_folder(tmp_path / "data")
    with pytest.raises(ValueError, match=re.escape(message)):
        VisionLanguageDataModule("files", **{"root": root, **settings}).setup("fit")


def test_classes_are_chosen_by_the_probability_of_their_names(tmp_path):
    data = VisionLanguageDataModule("images/digits", image_size=16, batch_size=90, num_workers=0)
    image_data = ImageDataModule("digits")
    assert data.num_train_samples == 1437 and list(data.class_names) == image_data.class_names
    assert len(data.splits.val) == len(image_data.splits.val.labels)
    task = make_task(context_length=32)
    spread(task.backbone).eval()
    task.tokenizer_json = data.tokenizer.to_json()
    batch, names = next(iter(data.val_dataloader())), ["7", "a lot", "0"]
    scores = []
    for name in names:  # the sum over the tokens of each name
        tokens = torch.tensor([*b"class?", 256, *name.encode(), 256]).expand(90, -1)
        logp = task(batch["image"], tokens[:, :-1])[:, 6:].log_softmax(-1)
        scores.append(logp.gather(2, tokens[:, 7:, None]).sum((1, 2)))
    assert torch.allclose(task.choose(batch["image"], "class?", names), torch.stack(scores, 1).softmax(-1), atol=1e-5)
    (scored,) = make_trainer(tmp_path).validate(task, data, verbose=False)
    assert 0 <= scored["val/acc1"] <= 1 and scored["val/exact_match"] <= 1


@pytest.mark.parametrize(("dataset", "score"), [("digits_grid", "exact_match/all"), ("images/digits", "acc1")])
def test_metrics_that_depend_on_the_data_can_be_monitored(tmp_path, dataset, score):
    task, data = make_task(context_length=32), make_data(dataset, image_size=16, block_size=32)
    best, typo = ModelCheckpoint(tmp_path, monitor=f"val/{score}"), ModelCheckpoint(tmp_path, monitor=f"val/{score}x")
    check_monitors(make_trainer(tmp_path, callbacks=[best], enable_checkpointing=True), task, data)
    with pytest.raises(ValueError, match=f"did you mean 'val/{score}'"):
        check_monitors(make_trainer(tmp_path, callbacks=[typo], enable_checkpointing=True), task, data)


def test_predictions_are_a_table_of_answers(tmp_path):
    task, writer = make_task(), PredictionWriter(str(tmp_path / "answers.csv"))
    make_trainer(tmp_path, callbacks=[writer]).predict(task, make_data(val_samples=6), return_predictions=False)
    rows = list(csv.DictReader((tmp_path / "answers.csv").open()))
    assert [row["image"] for row in rows] == [str(number) for number in range(6)]
    assert list(rows[0]) == ["image", "question", "answer", "target"]
    assert all(row["target"].isdigit() and row["question"].endswith("?") for row in rows)


def test_words_are_held_out_and_drawn_within_the_image():
    splits = VisionLanguageDataModule("rendered_text", val_samples=200).splits
    assert not {*splits.train.words} & {*splits.val.words} and len(splits.val) == 200
    image = splits.train.read(0, np.random.default_rng(0), True).image
    for word in (
        "gypqjl",
        max(splits.train.words, key=lambda word: np.asarray(render(word)).any(0).nonzero()[0].max()),
    ):
        whole, cut = np.asarray(render(word, (3, 0))), np.asarray(render(word, (-4, -4)))
        assert whole[:, -1].max() == 0 and whole.shape == np.asarray(image).shape == (16, 80)
        assert (whole > 0).sum() == (np.asarray(render(word, (3, -2))) > 0).sum() > (cut > 0).sum()  # nothing is cut


def test_plain_text_is_a_second_task_on_the_same_blocks(tmp_path):
    (tmp_path / "a.txt").write_text("import this, import that; " * 40)
    text = TextDataModule("files", str(tmp_path / "a.txt"), block_size=16, batch_size=4, cache_dir=str(tmp_path))
    data = MultiTaskDataModule(tasks={"eyes": make_data(), "prose": text})
    sizes = {**SIZES, "patch_size": None}
    eyes = partial(LitVisionLanguage, image_size=16, context_length=20, separator_id=256, overrides={"patch_size": 8})
    prose = partial(LitCausalLM, vocab_size=257, context_length=16, separator_id=256)
    task = LitMultiTask("tokenformer_lm_tiny", overrides=sizes, tasks={"eyes": eyes, "prose": prose})
    assert task.eyes.backbone.blocks is task.prose.backbone.blocks
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, data)
    logged = {name for name in trainer.callback_metrics if not name.startswith("size/")}
    assert logged == task.logged_metrics() == LitMultiTask.logged_metrics(task, data)
    assert {"val/eyes/exact_match", "val/eyes/exact_match/all", "val/prose/bits_per_byte"} <= logged
    eyes = partial(eyes, image_tokens=8)
    with pytest.raises(ValueError, match="model.tasks.eyes.image_tokens: unsupported with several tasks"):
        LitMultiTask("tokenformer_lm_tiny", overrides=sizes, tasks={"eyes": eyes, "prose": prose})


def fit(folder, *more):
    config = ["fit", "--config", "vision_language_small", "--trainer.default_root_dir", str(folder)]
    sizes = ["--model.overrides.dim=32", "--model.overrides.depth=1", "--model.overrides.num_heads=2"]
    sizes += ["--model.overrides.param_tokens=8", "--model.overrides.rotary_fraction=0.5"]
    data = ["--data.train_samples=32", "--data.val_samples=8", "--data.batch_size=8", "--data.eval_batch_size=8"]
    return main([*config, *sizes, *data, "--trainer.max_epochs=4", "--trainer.enable_progress_bar=false", *more])


def test_the_shipped_config_fits_and_grows(tmp_path, capsys):
    assert fit(tmp_path) == 0
    found = next(tmp_path.rglob("metrics.csv"), None)
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["param_tokens"]["qkv"] == 96 and saved["task"] == "LitVisionLanguage"
    assert found is None or "val/exact_match_blind" in found.read_text()


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        (make_task, lambda: ImageDataModule("digits"), "data: ImageDataModule has no vocab_size"),
        (make_task, TextDataModule, "data: LitVisionLanguage needs VisionLanguageDataModule, got TextDataModule"),
        (lambda: make_pair()[0], make_data, "data: VisionLanguageDataModule has no num_classes"),
        (lambda: make_pair()[1], make_data, "data: LitCausalLM needs TextDataModule, got VisionLanguageDataModule"),
        (
            make_task,
            lambda: make_data(image_size=8),
            r"model.image_size: does not match the data \(got 16, expected 8\)",
        ),
    ],
)
def test_data_of_another_kind_are_rejected(tmp_path, task, data, message):
    task, data = task(), data()
    with pytest.raises(ValueError, match=message):
        check_data_fit(task, data)
        trainer = make_trainer(tmp_path)
        trainer.datamodule = data
        task._trainer = trainer
        task.setup("fit")


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("onnx", "format: no graph for text after an image (got stem 'image_text')"),
        ("transformers", "stem: not in TokenFormer's class in transformers (got 'image_text', expected 'token')"),
    ],
)
def test_formats_without_images_are_refused(trained, format, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        export_weights(str(trained), str(trained.with_suffix("")), format)


@pytest.mark.slow
@pytest.mark.usefixtures("text_cache")
def test_the_benchmark_runs_and_continues(tmp_path, capsys):
    from benchmarks import vision_language

    sizes = json.dumps({"dim": 16, "depth": 1, "num_heads": 2, "param_tokens": 8})
    given = ["--seeds=1", "--steps=4", "--word_steps=4", "--every=2", "--batch_size=8", "--sizes", sizes]
    vision_language.main([*given, "--output", str(tmp_path / "found.json")])
    once = (tmp_path / "found.json").read_text()
    words, merged = (json.loads(once)[part]["fits"] for part in ("words", "merge"))
    assert [row["step"] for row in next(iter(words.values()))[0]] == [2, 4]
    (separate, both, joint), (scratch,) = merged["separate, merged, joint"][0], merged["joint from scratch"][0]
    assert separate["val/bits_per_byte"] == pytest.approx(both["val/bits_per_byte"], abs=1e-3)
    assert separate["flops"] == both["flops"] < joint["flops"] == pytest.approx(scratch["flops"], rel=0.1)
    vision_language.main([*given, "--parts", "words", "--output", str(tmp_path / "found.json")])
    assert (tmp_path / "found.json").read_text() == once and "## zero_shot" in capsys.readouterr().out
