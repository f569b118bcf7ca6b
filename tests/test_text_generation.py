"""Text from a checkpoint, in Python and on the command line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers as hf
import torch
from tokenizers import decoders, models, pre_tokenizers

from lit_tokenformer.cli.commands import grow_checkpoint
from lit_tokenformer.cli.generate import generate_text
from lit_tokenformer.cli.main import main
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.inference.text import Completion, TextGenerator
from lit_tokenformer.models import create_backbone
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier

TINY = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 16, "tie_embeddings": False}
CONTEXT = 64


def with_opinions(task):
    """Random weights that are large enough for one token to be much more probable than another."""
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    return task


def language_model(vocab_size=264, **settings):
    torch.manual_seed(3)
    overrides = {**TINY, "context_length": CONTEXT, "vocab_size": vocab_size}
    return with_opinions(LitCausalLM("tokenformer_lm_tiny", overrides=overrides, **settings))


def save(task, path, tokenizer=None):
    """A checkpoint as a fit writes it."""
    task.tokenizer_json = None if tokenizer is None else tokenizer.to_json()
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": task.state_dict(),
        "hyper_parameters": dict(task.hparams),
    }
    task.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(language_model(), tmp_path_factory.mktemp("lm") / "last.ckpt", Tokenizer.bytes())


@pytest.fixture(scope="module")
def generator(checkpoint):
    loaded = TextGenerator.load(checkpoint)
    loaded.backbone.double()
    return loaded


class Scripted:
    """Stands in for the sampling: writes given tokens, one list for each row."""

    def __init__(self, monkeypatch, *rows):
        longest = max(len(row) for row in rows)

        def generate_tokens(model, prompts, max_new_tokens, *_, **__):
            for step in range(min(longest, max_new_tokens)):
                yield torch.tensor([row[step] if step < len(row) else -1 for row in rows])

        monkeypatch.setattr("lit_tokenformer.inference.text.generate_tokens", generate_tokens)


# --- In Python -------------------------------------------------------------------------------------------------------


def test_three_lines(checkpoint):
    from lit_tokenformer.inference.text import TextGenerator

    generator = TextGenerator.load(checkpoint)
    text = generator.generate("The import statement", max_new_tokens=8)
    assert text.startswith("The import statement") and len(text) > len("The import statement")
    assert not generator.backbone.training and not any(p.requires_grad for p in generator.backbone.parameters())


def test_texts_are_what_the_tokens_say(generator):
    (completions,) = list(generator.run(["né"], 20, Sampling(temperature=0)))[-1:]
    text = [*"né".encode()]
    for _ in range(20):
        text.append(int(generator.backbone(torch.tensor([text]))[0, -1, :257].argmax()))
    assert completions[0].text == generator.tokenizer.decode(text[3:])


def test_one_text_for_a_text_and_a_list_for_a_list(generator):
    one = generator.generate("ab", 5)
    assert isinstance(one, str) and generator.generate(["ab"], 5) == [one]
    assert generator.generate("ab", 5, return_full_text=False) == one.removeprefix("ab")


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 4}, {"top_k": 9, "top_p": 0.9, "seed": 4}])
def test_several_prompts_of_different_length_do_not_disturb_each_other(generator, settings):
    prompts = ["ab", "", "a longer prompt than the others", "é"]
    together = generator.generate(prompts, 20, repetition_penalty=1.2, **settings)
    for number, text in enumerate(together):
        others = [prompts[number] if row == number else "x" for row in range(len(prompts))]
        assert generator.generate(others, 20, repetition_penalty=1.2, **settings)[number] == text


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prompt", ["", "abc", "né ", "\ufffd", "漢字"])
def test_streamed_text_is_the_text(generator, prompt, seed):
    settings = {"max_new_tokens": 50, "temperature": 3.0, "seed": seed}
    whole = generator.generate(prompt, **settings)
    assert "".join(generator.stream(prompt, **settings)) == whole
    assert "".join(generator.stream(prompt, return_full_text=False, **settings)) == whole.removeprefix(prompt)


def test_characters_of_several_bytes_come_whole(generator, monkeypatch):
    text = "é漢🙂!"
    Scripted(monkeypatch, [*text.encode(), *"漢".encode()[:2]])
    assert list(generator.stream("", 100)) == [*text, "\ufffd"]
    Scripted(monkeypatch, [*text.encode(), *"漢".encode()[:2]])
    assert generator.generate("", 100) == text + "\ufffd"


def test_a_seed_decides_the_text(generator):
    free = {"max_new_tokens": 20, "temperature": 2.0}
    assert generator.generate("a", **free) == generator.generate("a", seed=0, **free)
    assert generator.generate("a", seed=1, **free) != generator.generate("a", seed=0, **free)
    assert generator.generate("a", seed=None, **free) != generator.generate("a", seed=None, **free)


def test_an_empty_prompt_begins_a_document(generator):
    separator = generator.tokenizer.separator_id
    steps = generate_tokens(generator.backbone, [[separator]], 5, Sampling(temperature=0), vocab_size=257)
    assert generator.generate("", 5, temperature=0) == generator.tokenizer.decode([int(step) for step in steps])


def test_the_separator_ends_a_text_and_is_no_part_of_it(generator, monkeypatch):
    Scripted(monkeypatch, [*b"ab", 256], [*b"abcd"])
    *_, (first, second) = generator.run(["x", "y"], 4)
    assert (first.text, first.tokens, first.stopped) == ("ab", 3, "stop")
    assert (second.text, second.tokens, second.stopped) == ("abcd", 4, "length")


@pytest.mark.parametrize(
    ("stop", "text", "pieces"),
    [
        (["\n\n"], "one\n", ["o", "n", "e", "\n"]),  # what is held back comes at the end
        (["ne\nt"], "o", ["o"]),
        ("ne\nt", "o", ["o"]),
        (["two", "e"], "on", ["o", "n"]),
        (["\ntwO", "two"], "one\n", ["o", "n", "e", "\n"]),
        (["one"], "", []),
        (["é"], "one\ntwo", ["o", "n", "e", "\n", "t", "w", "o"]),
    ],
)
def test_stop_texts_end_a_text_and_are_no_part_of_it(generator, monkeypatch, stop, text, pieces):
    given = b"one\n" if stop == ["\n\n"] else b"one\ntwo"
    Scripted(monkeypatch, list(given))
    assert generator.generate("p", 100, stop=stop, return_full_text=False) == text
    streamed = list(generator.stream("p", 100, stop=stop, return_full_text=False))
    assert "".join(streamed) == text and len(streamed) <= len(pieces)
    *_, (completion,) = generator.run(["p"], 100, stop=stop)
    assert completion.stopped == ("context" if len(text) == len(given) else "stop")


def test_a_stop_text_is_found_across_tokens_and_ends_the_work(generator, monkeypatch):
    Scripted(monkeypatch, [*"aé|bc".encode()], [*"é|".encode()])
    *_, (first, second) = generator.run(["x", "y"], 100, stop=["é|"])
    assert (first.text, first.tokens, first.stopped) == ("a", 4, "stop")
    assert (second.text, second.tokens, second.stopped) == ("", 3, "stop")


def test_a_stop_text_in_the_prompt_ends_nothing(generator, monkeypatch):
    Scripted(monkeypatch, [*b"b|"])
    assert generator.generate("a|", 100, stop=["|"]) == "a|b"
    Scripted(monkeypatch, [*b"b"])
    assert generator.generate("a", 100, stop=["ab"]) == "ab"


def test_why_a_text_ended(generator):
    prompts = ["a" * CONTEXT, "a" * (CONTEXT - 3), "a"]
    *_, completions = generator.run(prompts, 10, Sampling(temperature=0))
    assert [(one.tokens, one.stopped) for one in completions] == [(0, "context"), (3, "context"), (10, "length")]
    assert completions[0].seconds == 0 < completions[1].seconds < completions[2].seconds


def test_the_dummy_rows_of_a_padded_vocabulary_are_never_written(generator):
    assert generator.backbone.config.vocab_size == 264 and generator.tokenizer.size == 257
    given = generator.generate(["a"] * 8, 50, temperature=100.0)
    assert all(text.startswith("a") for text in given)


def test_a_vocabulary_that_puts_spaces_before_words_keeps_them(monkeypatch):
    words = {"▁the": 0, "▁cat": 1, "s": 2, "<unk>": 3}
    backend = hf.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    generator = TextGenerator(language_model(8).backbone, Tokenizer(backend))
    Scripted(monkeypatch, [1, 2, 0, 4])
    assert generator.generate("the", 10) == "the cats the"
    Scripted(monkeypatch, [1, 2, 0, 4])
    assert list(generator.stream("the", 10)) == ["the", " cat", "s", " the"]


def test_a_byte_pair_vocabulary_reads_and_writes():
    tokenizer = Tokenizer.train_bpe(["the cat sat on the mat"] * 3, 270)
    generator = TextGenerator(language_model(272).backbone, tokenizer)
    text = generator.generate("the cat", 30, temperature=2.0)
    assert text.startswith("the cat") and "".join(generator.stream("the cat", 30, temperature=2.0)) == text


# --- Loading ---------------------------------------------------------------------------------------------------------


def test_the_tokenizer_beside_a_checkpoint_is_taken_where_it_holds_none(tmp_path, checkpoint):
    path = save(language_model(), tmp_path / "last.ckpt")
    Tokenizer.bytes().save(tmp_path / "tokenizer.json")
    assert TextGenerator.load(path).generate("ab", 9) == TextGenerator.load(checkpoint).generate("ab", 9)


def test_a_separator_of_ones_own_is_known_again(tmp_path):
    path = save(language_model(separator_id=256), tmp_path / "last.ckpt", Tokenizer.bytes("<document>"))
    assert TextGenerator.load(path).tokenizer.separator == "<document>"


def test_a_grown_checkpoint_writes_the_same_text(tmp_path, checkpoint):
    grown = grow_checkpoint(checkpoint, 64, output=str(tmp_path / "grown.ckpt"))
    generator = TextGenerator.load(grown)
    assert generator.backbone.param_tokens == {"qkv": 64, "proj": 64, "ffn": 256}
    text = generator.generate("ab", 20, temperature=0)
    assert text == TextGenerator.load(checkpoint).generate("ab", 20, temperature=0)


def test_a_folder_that_several_processes_wrote_writes_the_same_text(tmp_path, checkpoint):
    rest = torch.load(checkpoint, weights_only=True)
    folder = tmp_path / "folder.ckpt"
    torch.distributed.checkpoint.save({"state_dict": rest.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / "meta.pt")
    wanted, got = (TextGenerator.load(path).generate("ab", 8, seed=3) for path in (checkpoint, folder))
    assert got == wanted


def test_weights_in_half_precision(checkpoint):
    generator = TextGenerator.load(checkpoint, device="cpu", dtype="bfloat16")
    assert next(generator.backbone.parameters()).dtype == torch.bfloat16
    assert generator.generate(["ab", "abc"], 5)[1].startswith("abc")


def refused(tmp_path, kind):
    """A checkpoint that no text can be written from, and what is said of it."""
    path = tmp_path / f"{kind}.ckpt"
    if kind == "missing":
        return str(path), "is not a file"
    if kind == "image":
        overrides = {"dim": 32, "depth": 1, "num_heads": 2, "param_tokens": 8, "image_size": 8, "patch_size": 4}
        task = LitImageClassifier("tokenformer_vit_tiny_patch16_224", num_classes=3, overrides=overrides)
        return save_image(task, path), "is of a LitImageClassifier: model: not a causal language model (got head: image"
    if kind == "no_tokenizer":
        return save(language_model(), path), "(expected it there, or tokenizer.json next to it)"
    if kind == "large_tokenizer":
        return save(language_model(200), path, Tokenizer.bytes()), "it has 257 tokens, the model's vocab_size is 200"
    if kind == "damaged_tokenizer":
        (tmp_path / "tokenizer.json").write_text("{")
        return save(language_model(), path), "tokenizer.json is damaged"
    path.touch()
    return str(path), "is truncated or damaged"


def save_image(task, path):
    checkpoint = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "task": type(task).__name__}
    torch.save({**checkpoint, "pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 0}, path)
    return str(path)


KINDS = ["missing", "image", "no_tokenizer", "large_tokenizer", "damaged_tokenizer", "damaged"]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_without_text_are_refused(kind, tmp_path):
    path, message = refused(tmp_path, kind)
    with pytest.raises(ValueError) as error:
        TextGenerator.load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": "a" * 65}, "prompt: 65 tokens, the model's context_length is 64"),
        ({"prompts": ["a", "é" * 40]}, "prompt 2: 80 tokens, the model's context_length is 64"),
        ({"prompts": []}, "prompts: expected at least one"),
        ({"prompts": "\udcff"}, "prompt: .* is not valid Unicode"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number of at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected a number of at least 0, got -1.0"),
        ({"top_k": 0}, "top_k: expected"),
        ({"top_p": 2.0}, "top_p: expected"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected"),
        ({"stop": ["a", ""]}, "stop: expected texts of at least one character"),
    ],
)
def test_bad_settings_are_refused(generator, settings, message):
    with pytest.raises(ValueError, match=message):
        generator.generate(**{"prompts": "a", **settings})


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_told(checkpoint, device):
    with pytest.raises(ValueError, match=f"device: {device} cannot be used: ") as error:
        TextGenerator.load(checkpoint, device=device)
    assert "\n" not in str(error.value)


def test_a_type_that_is_not_there_is_told(checkpoint):
    with pytest.raises(ValueError, match="dtype: unknown value 'float61', did you mean 'float16'"):
        TextGenerator.load(checkpoint, dtype="float61")


# --- On the command line ---------------------------------------------------------------------------------------------


def generate(*args):
    """Runs the command; returns its exit status."""
    try:
        return main(["generate", *map(str, args)])
    except SystemExit as stop:
        return stop.code


def test_command_prints_prompt_and_text(checkpoint, capsys):
    assert generate("--ckpt_path", checkpoint, "--prompt", "The import statement", "--max_new_tokens", 9) == 0
    shown = capsys.readouterr()
    assert shown.out == TextGenerator.load(checkpoint).generate("The import statement", 9) + "\n"
    assert shown.err == ""


def test_command_without_a_prompt_writes_a_document(checkpoint, capsys):
    generate_text(checkpoint, max_new_tokens=9)
    assert capsys.readouterr().out == TextGenerator.load(checkpoint).generate("", 9) + "\n"


SETTINGS = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 7, "max_new_tokens": 12}
OPTIONS = [text for name, value in SETTINGS.items() for text in (f"--{name}", value)]


def test_command_writes_several_prompts_at_once(checkpoint, capsys):
    prompts = ["ab", "", "a longer one"]
    assert generate("--ckpt_path", checkpoint, *(f"--prompt={prompt}" for prompt in prompts), *OPTIONS) == 0
    texts = TextGenerator.load(checkpoint).generate(prompts, **SETTINGS)
    shown = "".join(f"==> {number} of 3 <==\n{text}\n" for number, text in enumerate(texts, start=1))
    assert capsys.readouterr().out == shown


def test_command_gives_one_object_for_each_prompt(checkpoint, capsys):
    prompts = ["é" * 31, "ab"]
    args = ["--ckpt_path", checkpoint, *(f"--prompt={prompt}" for prompt in prompts), *OPTIONS]
    assert generate(*args, "--format", "json") == 0
    shown = capsys.readouterr()
    given = [json.loads(line) for line in shown.out.splitlines()]
    texts = TextGenerator.load(checkpoint).generate(prompts, return_full_text=False, **SETTINGS)
    keys = ["prompt", "completion", "tokens", "stopped", "seconds", "tokens_per_second", "seed"]
    assert all(list(one) == keys for one in given)
    assert [one["prompt"] for one in given] == prompts and [one["completion"] for one in given] == texts
    assert [(one["tokens"], one["stopped"], one["seed"]) for one in given] == [(2, "context", 7), (12, "length", 7)]
    assert all(one["tokens_per_second"] == pytest.approx(one["tokens"] / one["seconds"], rel=0.01) for one in given)
    assert shown.err == "note: prompt 1: stopped at the context length of 64 tokens\n"


def test_command_stops_at_texts(checkpoint, capsys):
    free = TextGenerator.load(checkpoint).generate("ab", return_full_text=False, **SETTINGS)
    stop = free[3:5]
    generate_text(checkpoint, ["ab"], stop=["never in it", stop], format="json", **SETTINGS)
    given = json.loads(capsys.readouterr().out)
    assert given["stopped"] == "stop" and given["completion"] == free[: free.index(stop)]


PROMPTS = [{"prompt": "The import", "id": 1, "of": {"a": [None]}}, {"id": 2, "prompt": "né"}, {"prompt": "", "x": "é"}]


@pytest.mark.parametrize("given", ["file", "-"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_command_continues_the_rows_of_a_file(checkpoint, given, batch_size, tmp_path, capsys, monkeypatch):
    """Own fields are kept, and a completion is that of its prompt alone with the row's seed."""
    lines = ["\ufeff" + json.dumps(PROMPTS[0]), "", json.dumps(PROMPTS[1], ensure_ascii=False), json.dumps(PROMPTS[2])]
    (tmp_path / "rows.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", (tmp_path / "rows.jsonl").open())
    source = tmp_path / "rows.jsonl" if given == "file" else "-"
    output = tmp_path / "new" / "out.jsonl"
    args = ["--ckpt_path", checkpoint, "--prompts", source, "--batch_size", batch_size, "--output", output]
    assert generate(*args, *OPTIONS) == 0
    assert capsys.readouterr().out == ""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{name: row[name] for name in one} for row, one in zip(rows, PROMPTS, strict=True)] == PROMPTS
    alone = TextGenerator.load(checkpoint)
    for row in rows:
        settings = {**SETTINGS, "seed": [row["seed"]]}
        (*_, (completion,)) = alone.run([row["prompt"]], 12, Sampling(1.5, 40, 0.9, 1.2), None, settings["seed"])
        assert (row["completion"], row["tokens"], row["stopped"]) == (completion.text, 12, "length")
    assert [row["seed"] for row in rows] == [7, 8, 9]
    assert generate(*args) == 2 and "out.jsonl exists already" in capsys.readouterr().err


def test_command_shows_the_rows_of_a_batch_before_it_reads_the_next(checkpoint, capsys, monkeypatch):
    def lines():
        for _ in range(3):
            shown.append(len(capsys.readouterr().out.splitlines()))
            yield b'{"prompt": "a"}\n'

    shown, stdin = [], type("Stdin", (), {"buffer": lines()})
    monkeypatch.setattr("sys.stdin", stdin)
    assert generate("--ckpt_path", checkpoint, "--prompts", "-", "--batch_size", 1, "--max_new_tokens", 2) == 0
    assert shown == [0, 1, 1]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_command_continues_a_file(checkpoint, end, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_bytes(f"\ufeffdef f(x):\n    né{end}".encode())
    expected = TextGenerator.load(checkpoint).generate("def f(x):\n    né", 9) + "\n"
    monkeypatch.setattr("sys.stdin", (tmp_path / "a.txt").open())
    for source in (tmp_path / "a.txt", "-"):
        assert generate("--ckpt_path", checkpoint, "--prompt_file", source, "--max_new_tokens", 9) == 0
        assert capsys.readouterr().out == expected
    args = ["--ckpt_path", checkpoint, "--prompt_file", tmp_path / "a.txt", "--max_new_tokens", 9]
    assert generate(*args, "--output", tmp_path / "out.txt") == 0
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == expected and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt=a", "--prompts=a.jsonl"], "prompts: conflicts with prompt "),
        (["--prompt=", "--prompt_file=a.txt"], "prompt_file: conflicts with prompt "),
        (["--prompt_file=a.txt", "--prompts=a.jsonl"], "prompts: conflicts with prompt_file "),
        (["--prompts=a.jsonl", "--batch_size=0"], "batch_size: expected a whole number of at least 1, got 0"),
        (["--prompt=a", "--compile=true", "--draft_tokens=0.5"], "compile: conflicts with draft and draft_tokens"),
        (["--prompts=no.jsonl"], "prompts: cannot read no.jsonl (No such file or directory)"),
        (["--prompt_file=."], "prompt_file: cannot read . (Is a directory)"),
        (["--prompt=a", "--output=."], "output: . exists already"),
        (["--prompt=a", "--output=a.txt/b"], "output: cannot write a.txt/b "),
    ],
)
def test_command_refuses_sources_that_do_not_go_together(checkpoint, args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}')
    assert generate("--ckpt_path", checkpoint, *args) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {message}") and shown.err.count("\n") == 1 and shown.out == ""


VERBATIM = [
    "123",
    "1.0",
    "[x]",
    "{a: b}",
    "key: value",
    "- a",
    "null",
    "~",
    "# c",
    "${x}",
    '"q"',
    " a\n  b ",
    "--x",
    "",
]


def test_command_takes_prompts_and_stop_texts_as_they_are_written(monkeypatch):
    given = {}
    monkeypatch.setitem(sys.modules["lit_tokenformer.cli.main"].COMMANDS, "generate", wraps_generate(given))
    args = [f"--{option}={text}" for text in VERBATIM for option in ("prompt", "stop")]
    assert generate("--ckpt_path", "x.ckpt", *args) == 0
    assert given == {"ckpt_path": "x.ckpt", "prompt": VERBATIM, "stop": VERBATIM}


def test_command_takes_texts_that_begin_with_dashes_behind_their_option(monkeypatch):
    given = {}
    monkeypatch.setitem(sys.modules["lit_tokenformer.cli.main"].COMMANDS, "generate", wraps_generate(given))
    assert generate("--stop", "---", "--prompt", "--x", "--prompt", "- a", "--ckpt_path", "x.ckpt") == 0
    assert given == {"ckpt_path": "x.ckpt", "prompt": ["--x", "- a"], "stop": ["---"]}
    assert generate("--ckpt_path", "x.ckpt", "--stop", "--prompt", "a") == 2  # no text between two options


@pytest.mark.slow
def test_command_ends_quietly_when_nobody_reads_on(checkpoint):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lit_tokenformer", "generate", "--ckpt_path", checkpoint, "--max_new_tokens", "9"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def wraps_generate(given):
    def command(ckpt_path: str, prompt: list[str] | None = None, stop: list[str] | None = None) -> None:
        """Remembers."""
        given.update(ckpt_path=ckpt_path, prompt=prompt, stop=stop)

    return command


def test_command_shows_text_as_it_is_produced(checkpoint, monkeypatch):
    """All prompts are written at once: the first is shown as it comes, the others as far as they are by then."""
    writes = []
    steps = [("", ""), ("a", "x"), ("ab", "xy"), ("ab", "xyz")]

    def run(self, prompts, *_):  # as TextGenerator.run
        for number, texts in enumerate(steps):
            ends = [None if number < 2 else "length", None if number < 3 else "stop"]
            yield [Completion(*row, 1, end, 1.0) for *row, end in zip(prompts, texts, ends, strict=True)]

    monkeypatch.setattr(TextGenerator, "run", run)
    monkeypatch.setattr("builtins.print", lambda text, **kwargs: writes.append(text) or kwargs["flush"])
    generate_text(checkpoint, ["P", "Q"])
    assert writes == ["==> 1 of 2 <==\nP", "a", "b\n", "==> 2 of 2 <==\nQxy", "z\n"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ["a" * 65]}, "prompt: 65 tokens, the model's context_length is 64"),
        ({"format": "jsn"}, "format: unknown value 'jsn', did you mean 'json'?"),
        ({"temperature": -1.0}, "temperature: expected a number of at least 0, got -1.0"),
        ({"stop": [""]}, "stop: expected texts of at least one character, got ''"),
        ({"device": "nowhere"}, "device: nowhere cannot be used"),
    ],
)
def test_command_refuses_bad_settings_before_it_shows_anything(checkpoint, settings, message, capsys):
    with pytest.raises(ValueError) as error:
        generate_text(checkpoint, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "warm"], "temperature: expected float, got 'warm'"),
        (["--top_p", "1.5"], "top_p: expected a probability in (0, 1], got 1.5"),
        (["--promt", "a"], "did you mean 'prompt'?"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: nowhere.ckpt is not a file"),
        (None, "ckpt_path"),
    ],
)
def test_command_tells_bad_input_in_one_line(checkpoint, args, message, capsys):
    assert (generate("--prompt", "a") if args is None else generate("--ckpt_path", checkpoint, *args)) == 2
    shown = capsys.readouterr()
    told = shown.err.splitlines()
    assert told[-1].startswith("error: ") and message in told[-1] and shown.out == ""
    assert sum(line.startswith("error") for line in told) == 1


def test_a_model_that_is_trained_can_write_and_goes_on(checkpoint):
    task = language_model().train()
    generator = TextGenerator(task.backbone, Tokenizer.bytes())
    assert generator.generate("ab", 3).startswith("ab")
    assert task.backbone.training and next(task.parameters()).requires_grad
    task.backbone(torch.zeros(1, 4, dtype=torch.long)).sum().backward()


def test_image_models_cannot_be_given_a_tokenizer():
    with torch.device("meta"):
        backbone = create_backbone("tokenformer_vit_tiny_patch16_224", depth=1)
    with pytest.raises(ValueError, match="model: not a causal language model"):
        TextGenerator(backbone, Tokenizer.bytes())


def test_the_environment_can_hold_one_prompt(checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("LIT_TOKENFORMER_GENERATE__PROMPT", "a: b")
    assert generate("--ckpt_path", checkpoint, "--max_new_tokens", 3) == 0
    assert capsys.readouterr().out.startswith("a: b")
