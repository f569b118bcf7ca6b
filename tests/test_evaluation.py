"""The harness's scores of a model, against scoring by hand; nothing is fetched."""

import json
import math
import sys

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from lightning.pytorch import Trainer
from lm_eval._cli.harness import HarnessCLI
from lm_eval.api.instance import Instance

from lit_tokenformer.cli.evaluate import evaluate_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.inference.lm_eval import HarnessModel, evaluate
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.interop.transformers import save_transformers
from lit_tokenformer.models import create_backbone
from lit_tokenformer.registry import WEIGHT_FORMATS
from lit_tokenformer.tasks import LitCausalLM

QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " a very long river"], "label": 0},
    {"question": "Water is", "choices": [" dry", " wet", " loud"], "label": 1},
    {"question": "Two and two are", "choices": [" four", " five"], "label": 0},
    {"question": "A cat says", "choices": [" woof", " meow meow"], "label": 1},
]


@pytest.fixture(scope="module")
def include_path(tmp_path_factory):
    """A folder with a task of the harness; one for all, since reading the harness's own tasks takes seconds."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = "\n".join(json.dumps(question) for question in QUESTIONS)
    (folder / "questions.jsonl").write_text(lines)
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    text = {key: task[key] for key in ("dataset_path", "dataset_kwargs", "test_split", "target_delimiter")}
    text |= {"doc_to_text": "{{question}}", "doc_to_target": "{{choices[label]}}"}
    written = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    scores = [{"metric": name} for name in ("word_perplexity", "bits_per_byte")]
    for own in (
        task,
        {**text, "task": "tiny_text", "output_type": "generate_until", "generation_kwargs": written},
        {
            **{**text, "doc_to_text": "", "doc_to_target": "{{question}} {{choices[0]}}, said the cat to the other."},
            **{"task": "tiny_rolling", "output_type": "loglikelihood_rolling", "metric_list": scores},
        },
    ):
        (folder / f"{own['task']}.yaml").write_text(yaml.safe_dump(own))
    return str(folder)


@pytest.fixture
def generator():
    return make_generator(320)


def make_generator(vocab_size):
    torch.manual_seed(1)
    sizes = {"vocab_size": vocab_size, "context_length": 32, "dim": 32, "depth": 2, "num_heads": 2}
    backbone = create_backbone("tokenformer_lm_tiny", **sizes, rotary_fraction=0.5)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)  # so that the logits differ
    return TextGenerator(backbone.eval(), Tokenizer.bytes())


def by_hand(generator, context, continuation):
    """Log-probability of a continuation in nats, and whether each of its tokens is the most probable."""
    tokenizer = generator.tokenizer
    first, second = tokenizer.encode(context) or [tokenizer.separator_id], tokenizer.encode(continuation)
    ids = torch.tensor([(first + second)[-33:]])
    with torch.no_grad():
        logits = generator.backbone(ids[:, :-1])[0, -len(second) :]
    picked = logits.log_softmax(dim=-1).gather(1, ids[0, -len(second) :, None])
    return picked.sum().item(), bool((logits.argmax(dim=-1) == ids[0, -len(second) :]).all())


def requests(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_those_by_hand(generator, batch_size):
    pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    pairs += [("", "A beginning"), ("x" * 50, " is cut on the left")]
    found = HarnessModel(generator, batch_size=batch_size).loglikelihood(requests("loglikelihood", *pairs))
    for (score, greedy), pair in zip(found, pairs, strict=True):
        expected, most_probable = by_hand(generator, *pair)
        assert score == pytest.approx(expected, rel=1e-4)
        assert greedy == most_probable


def test_what_greedy_decoding_writes_is_greedy(generator):
    text = generator.generate("Once", max_new_tokens=4, temperature=0, return_full_text=False)
    if text.encode().decode(errors="ignore") != text or "\ufffd" in text:
        pytest.skip("the model writes broken characters")
    ((_, greedy),) = HarnessModel(generator).loglikelihood(requests("loglikelihood", ("Once", text)))
    assert greedy


def test_whole_texts_are_scored_in_windows_of_the_context(generator):
    text = "Each token is predicted once, and none twice, in windows as long as the context."
    (found,) = HarnessModel(generator, batch_size=2).loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    tokens = generator.tokenizer.encode(text)
    expected, done = 0.0, 0
    while done < len(tokens):
        size = min(32, len(tokens) - done)
        first = [generator.tokenizer.separator_id, *tokens][max(0, done + size - 32) : done + size]
        with torch.no_grad():
            log_probs = generator.backbone(torch.tensor([first]))[0, -size:].log_softmax(dim=-1)
        expected += log_probs.gather(1, torch.tensor(tokens[done : done + size])[:, None]).sum().item()
        done += size
    assert found == pytest.approx(expected, rel=1e-4)


def test_text_is_written_up_to_a_stop(generator):
    model = HarnessModel(generator)
    (text,) = model.generate_until(requests("generate_until", ("Once upon", {"until": ["\n\n"], "max_gen_toks": 6})))
    assert text == generator.generate("Once upon", 6, temperature=0, stop="\n\n", return_full_text=False)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_texts_of_a_batch_are_those_of_each_alone_and_contexts_are_read_as_they_are_encoded(generator, batch_size):
    contexts = ["Once upon a time", "é" * 40, "A", "", "The sky is"]  # the second is cut within a character
    settings = [{"until": ["\n\n"], "max_gen_toks": 6}] * 3 + [{"until": ["e"], "max_gen_toks": 4}] * 2
    asked = list(zip(contexts, settings, strict=True))
    calls, read = [], generator.run
    generator.run = lambda prompts, *given: calls.append(prompts) or read(prompts, *given)
    texts = HarnessModel(generator, batch_size=batch_size).generate_until(requests("generate_until", *asked))
    assert sorted(len(prompts) for prompts in calls) == ([1, 2, 2] if batch_size == 2 else [2, 3])
    ids = generator.tokenizer.encode(contexts[1])
    assert any(ids[6 - 32 :] in [list(prompt) for prompt in prompts] for prompts in calls)
    for one, text in zip(asked, texts, strict=True):
        assert HarnessModel(generator, batch_size=1).generate_until(requests("generate_until", one)) == [text]


def test_sampled_texts_are_written_in_batches_and_are_those_of_each_alone(generator):
    settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9, "top_k": 50}
    asked = [(context, settings) for context in ("Once upon a time", "A", "", "The sky is", "A")]
    calls, read = [], generator.run
    generator.run = lambda prompts, *given: calls.append(len(prompts)) or read(prompts, *given)
    texts = HarnessModel(generator, batch_size=3).generate_until(requests("generate_until", *asked))
    assert calls == [3, 2]
    assert texts[1] != texts[4]  # a repeated request is another sample
    alone = HarnessModel(generator, batch_size=8)
    assert texts[:4] == [alone.generate_until(requests("generate_until", one))[0] for one in asked[:4]]


@pytest.mark.slow
def test_a_local_multiple_choice_task_gives_the_accuracy_by_hand(generator, include_path):
    results = evaluate(generator, ["tiny_choice"], include_path=include_path, batch_size=2)["results"]["tiny_choice"]
    right = normed = 0
    for question in QUESTIONS:
        scores = [by_hand(generator, question["question"], choice)[0] for choice in question["choices"]]
        lengths = [len(choice) for choice in question["choices"]]
        right += max(range(len(scores)), key=scores.__getitem__) == question["label"]
        normed += max(range(len(scores)), key=lambda i: scores[i] / lengths[i]) == question["label"]
    assert results["acc,none"] == right / len(QUESTIONS)
    by_pattern = evaluate(generator, ["tiny_ch*"], include_path=include_path, batch_size=2)["results"]
    assert by_pattern["tiny_choice"]["acc,none"] == results["acc,none"]
    assert results["acc_norm,none"] == normed / len(QUESTIONS)
    assert not math.isnan(results["acc_stderr,none"])


def test_the_command_scores_quantized_weights(include_path, tmp_path, capsys):
    pytest.importorskip("torchao")
    task = LitCausalLM("tokenformer_lm_tiny", 320, 32, overrides={"dim": 32, "depth": 1, "num_heads": 2})
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(task)
    task.tokenizer_json = Tokenizer.bytes().to_json()
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    args = {"ckpt_path": str(tmp_path / "one.ckpt"), "tasks": "tiny_rolling", "include_path": include_path}
    found = evaluate_checkpoint(**args, quantize="int8")
    assert found["config"]["model_args"] == {"ckpt_path": str(tmp_path / "one.ckpt"), "quantize": "int8"}
    scores = []
    for scheme in ("int8", None):
        loaded = TextGenerator.load(tmp_path / "one.ckpt", quantize=scheme)
        results = evaluate(loaded, ["tiny_rolling"], include_path=include_path)["results"]["tiny_rolling"]
        scores.append(next(value for name, value in results.items() if name.startswith("word_perplexity,")))
    (own,) = (value for name, value in found["results"]["tiny_rolling"].items() if name.startswith("word_perplexity,"))
    assert own == scores[0] != scores[1] == pytest.approx(own, rel=0.05)
    assert "word_perplexity" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_tells_scores_of_tasks_that_are_here_and_knows_the_published_ones(
    generator, include_path, tmp_path, capsys
):
    published = ["hellaswag", "lambada_openai", "piqa", "arc_easy", "arc_challenge"]
    with pytest.raises(ValueError, match="tasks: unknown to the harness .got hellaswak"):
        evaluate(generator, [*published, "hellaswak"], include_path=include_path)
    task = LitCausalLM("tokenformer_lm_tiny", 320, 32, overrides={"dim": 32, "depth": 1, "num_heads": 2})
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(task)
    task.tokenizer_json = Tokenizer.bytes().to_json()
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    args = ["--ckpt_path", str(tmp_path / "one.ckpt"), "--include_path", include_path]
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", *args, "--tasks", "[tiny_choice]", "--output", str(tmp_path / "scores.json")])
    assert "tiny_choice" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())["results"]["tiny_choice"]
    assert scores["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert main(["evaluate", *args, "--tasks", "[tiny_choice]", "--output", str(tmp_path / "scores.json")]) == 2
    capsys.readouterr()
    asked = ["evaluate", *args, "--tasks", "tiny_choice, tiny_ch*", "--output_path", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="0"):
        main([*asked, "--log_samples", "true", "--batch_size", "auto"])
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.endswith("one.ckpt")
    (results,), (samples,) = folder.glob("results_*.json"), folder.glob("samples_tiny_choice_*.jsonl")
    found = json.loads(results.read_text())
    assert found["results"]["tiny_choice"]["acc,none"] == scores["acc,none"] and "samples" not in found
    assert found["config"]["model"] == "lit_tokenformer" and found["config"]["batch_size"] == 64
    assert found["config"]["model_args"] == {"ckpt_path": str(tmp_path / "one.ckpt")}
    assert [json.loads(row)["doc"]["question"] for row in samples.read_text().splitlines()] == [
        question["question"] for question in QUESTIONS
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", *args, "--tasks", "list"])
    assert "tiny_choice" in capsys.readouterr().out
    for option, message in (
        (["--log_samples", "true"], "error: log_samples: needs output_path"),
        (["--output_path", str(tmp_path / "one.ckpt")], "error: output_path: expected a folder, got the file"),
    ):
        assert main(["evaluate", *args, "--tasks", "tiny_choice", *option]) == 2
        assert capsys.readouterr().err.startswith(message)


@pytest.mark.slow
def test_the_harness_scores_the_exported_folder_as_evaluate_scores_the_checkpoint(include_path, tmp_path, monkeypatch):
    pytest.importorskip("transformers", minversion="5")
    generator = make_generator(Tokenizer.bytes().size)  # transformers also decodes the padding of a vocabulary
    save_transformers(generator.backbone, tmp_path / "model")
    WEIGHT_FORMATS["transformers"].write_tokenizer(tmp_path / "model", generator.tokenizer.to_json())
    tasks = "tiny_choice,tiny_text,tiny_rolling"
    where = ["--include_path", include_path, "--output_path", str(tmp_path / "out"), "--log_samples"]
    options = ["--tasks", tasks, "--batch_size", "2", "--device", "cpu", *where]
    folder = f"pretrained={tmp_path / 'model'},trust_remote_code=True"
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", "hf", "--model_args", folder, *options])
    HarnessCLI().execute(HarnessCLI().parse_args())
    ours = evaluate(generator, tasks.split(","), batch_size=2, include_path=include_path, log_samples=True)
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    for task, scores in ours["results"].items():
        for name, score in scores.items():
            expected = theirs[task][name]
            assert score == (pytest.approx(expected, rel=1e-5) if isinstance(score, float) else expected), name
    for task, samples in ours["samples"].items():
        (file,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(row) for row in file.read_text().splitlines()]
        answers = [one["resps"] for one in sorted(rows, key=lambda one: one["doc_id"])]
        if task == "tiny_text":
            assert [one["resps"] for one in sorted(samples, key=lambda one: one["doc_id"])] == answers


def test_a_batch_that_does_not_fit_into_memory_is_halved(generator):
    model, sizes = HarnessModel(generator, batch_size="auto"), []

    def score(batch):
        sizes.append(len(batch))
        if len(batch) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return batch

    assert model._in_batches(list(range(70)), score) == list(range(70))
    assert sizes == [64, 32, 16, 16, 16, 16, 6]
    with pytest.raises(torch.OutOfMemoryError):
        HarnessModel(generator, batch_size=64)._in_batches(list(range(70)), score)
