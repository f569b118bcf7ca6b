"""Image and text in one sequence: who sees whom, what is learned from, and how answers are decoded."""

import pytest
import torch
import torch.nn.functional as F

from lit_tokenformer.cli.main import main
from lit_tokenformer.data import VisionLanguageDataModule
from lit_tokenformer.models.image_text import ImageTextReader, greedy_answers, image_text_features
from lit_tokenformer.tasks import LitVisionLanguage, LRSchedule

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8, "rotary_fraction": 0.5, "patch_size": 8}


def make_task(**settings):
    given = {"image_size": 16, "context_length": 20, "separator_id": 256, "overrides": SIZES}
    return LitVisionLanguage("tokenformer_lm_tiny", **{**given, "schedule": LRSchedule("constant"), **settings})


def make_data(**settings):
    given = {"train_samples": 48, "val_samples": 12, "batch_size": 8, "seed": 3, "num_workers": 0}
    return VisionLanguageDataModule("digits_grid", **{**given, **settings})


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
    alone = [ImageTextReader(task.backbone, image[None], [row], 9, cache) for image, row in zip(images, prompts)]
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
