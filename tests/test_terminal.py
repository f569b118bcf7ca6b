"""Output of a run in a terminal, in a pipe, and with NO_COLOR."""

import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks import ModelTable, TerminalProgress
from lit_tokenformer.cli import preflight
from lit_tokenformer.cli.terminal import shorten_warnings
from lit_tokenformer.errors import UserError

FIT = """
import sys
from lit_tokenformer.cli.main import main
tiny = ["dim", "32", "depth", "1", "num_heads", "2", "param_tokens", "8"]
options = [f"--model.overrides.{name}={value}" for name, value in zip(tiny[::2], tiny[1::2])]
limits = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
places = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={sys.argv[1]}"]
growth = ["--growth.schedule", "{1: 16}"]
sys.exit(main(["fit", "--config", "vit_small", *options, *limits, *places, *growth, *sys.argv[2:]]))
"""


def in_terminal(folder, columns, *options, interrupt=False, **environment):
    """Runs a fit in a pseudo-terminal, interrupted after its growth; returns exit status, plain output and colors."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(environment, TERM="xterm-256color", HF_HUB_OFFLINE="1")
        os.execv(sys.executable, [sys.executable, "-c", FIT, str(folder), *options])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # closed
            break
        if not part:
            break
        shown += part
        if interrupt and b"Growth at" in shown:
            os.kill(process, signal.SIGTERM)
            interrupt = False
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    text = shown.decode()
    return status, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text), re.findall(r"\x1b\[(?:\d+;)*3\d[;\d]*m", text)


@pytest.mark.parametrize(
    ("columns", "environment"),
    [
        (80, {}),
        pytest.param(180, {}, marks=pytest.mark.slow),
        pytest.param(80, {"NO_COLOR": "1"}, marks=pytest.mark.slow),
    ],
    ids=["80", "180", "80-no-color"],
)
def test_growth_and_summary_are_whole_lines_in_a_terminal(columns, environment, tmp_path):
    status, shown, colors = in_terminal(tmp_path, columns, **environment)
    assert status == 0, shown
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown)]
    assert bool(colors) is not bool(environment)
    (start,) = (number for number, line in enumerate(lines) if line.startswith("Growth at epoch 1, step 3 by split"))
    growth = " ".join(lines[start : start + 4])
    assert re.search(r"ffn 32 -> 64 tokens; .* relative output difference \S+; [\d.]+ s\b", growth)
    summary = lines.index("Run summary")
    assert re.fullmatch(r"stage  size +steps +seconds +FLOPs +val/acc1", lines[summary + 1])
    assert [line.split()[0] for line in lines[summary + 2 : summary + 4]] == ["0", "1"]
    assert not any("Epoch" in line for line in lines[summary:])  # the bar has ended
    assert "Tip" not in shown and "Total FLOPs" not in shown and "v_num" not in shown
    assert max(len(line) for line in lines if "━" in line) <= columns


@pytest.mark.slow
def test_interruption_is_a_whole_line_in_a_terminal(tmp_path):
    endless = ("--trainer.max_epochs=500", "--trainer.num_sanity_val_steps=0")
    status, shown, _ = in_terminal(tmp_path, 80, *endless, interrupt=True)
    assert status == 143, shown
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown)]
    assert any(re.match(r"Interrupted at epoch \d+, step \d+: saved", line) for line in lines)
    assert not any("━" in line for line in lines[-2:])  # the bar has ended


class Line(LightningModule):
    """Minimal module."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counts(Callback):
    """Records what the bar counts, after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        bar = trainer.progress_bar_callback
        task = bar.progress.tasks[bar.train_progress_bar_id]
        self.seen.append((task.description.strip(), task.completed, task.total))


def fit(folder, *callbacks, batches=8, resume=None, **settings):
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=folder, callbacks=[*callbacks], **quiet, **settings)
    trainer.fit(Line(), DataLoader(torch.ones(batches, 2), batch_size=1), ckpt_path=resume)
    return trainer


def test_bar_counts_to_the_last_step_and_right_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    first, rest = Counts(), Counts()
    saved = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=2, save_top_k=1, monitor=None)
    fit(tmp_path, TerminalProgress(), first, saved, max_steps=3, accumulate_grad_batches=2)
    assert first.seen == [("Epoch 0", done, 6) for done in (1, 2, 3, 4, 5, 6)]
    fit(tmp_path, TerminalProgress(), rest, max_steps=5, accumulate_grad_batches=2, resume=tmp_path / "middle.ckpt")
    whole = [("Epoch 0", done, 8) for done in (5, 6, 7, 8)]
    assert rest.seen == [*whole, ("Epoch 1", 1, 2), ("Epoch 1", 2, 2)]


def test_pipe_gets_lines_of_progress(tmp_path, capsys):
    fit(tmp_path, TerminalProgress(seconds=1e-9), max_epochs=2, batches=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    pattern = r"epoch {}, step {} of 4, [\d.e+]+ steps/s, ETA \d:\d\d:\d\d, train/loss [\d.e-]+"
    assert re.fullmatch(pattern.format(0, 1), lines[0]) and re.fullmatch(pattern.format(1, 3), lines[2])
    assert re.fullmatch(r"epoch \d, step 4 of 4, .*train/loss \S+", lines[-1])
    fit(tmp_path, TerminalProgress(seconds=1000), max_epochs=2, batches=2)
    shown = capsys.readouterr().out
    assert shown.count("step") == 2 and "step 4 of 4" in shown  # steps, steps/s: the last line only
    with pytest.raises(UserError, match="seconds: expected more than 0, got 0"):
        TerminalProgress(seconds=0)


def test_table_lists_parts_with_parameters(tmp_path, capsys):
    fit(tmp_path, ModelTable(), max_epochs=1, batches=1, enable_progress_bar=False)
    shown = capsys.readouterr().out
    assert re.search(r"^layer +Linear +3\b", shown, re.M) and "3 parameters, 3 trainable" in shown
    assert "FLOPs" not in shown


def test_a_warning_of_the_project_is_one_line_without_code(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    shorten_warnings()
    assert warnings.formatwarning("too long", UserWarning, preflight.__file__, 1) == "warning: too long\n"
    assert "module.py:1: UserWarning" in warnings.formatwarning("too long", UserWarning, "/own/module.py", 1)
