"""What a command loads and builds before it begins."""

import subprocess
import sys

import pytest
from lightning.pytorch.cli import LightningCLI

from lit_tokenformer.checkpoints.load import write_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.tasks import LitCausalLM
from lit_tokenformer.tasks.rebuild import fresh_checkpoint

LOADED = """
import sys
import lightning.pytorch
before = set(sys.modules)
from lit_tokenformer.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
try:
    main(["generate", "--ckpt_path", sys.argv[1], "--prompt", "Once", "--max_new_tokens", "1", "--device", "cpu"])
except SystemExit:
    pass
names = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print("\\nloaded:", *names)
"""
HEAVY = {"datasets", "lm_eval", "matplotlib", "pandas", "pyarrow", "scipy", "sklearn", "tensorboard", "transformers"}


def test_help_and_generate_load_no_heavy_package_beside_lightning(tmp_path):
    tokenizer = Tokenizer.bytes()
    task = LitCausalLM("tokenformer_lm_tiny", vocab_size=tokenizer.size, context_length=16)
    task.tokenizer_json = tokenizer.to_json()
    write_checkpoint(fresh_checkpoint(task, task.state_dict()), tmp_path / "tiny.ckpt")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "tiny.ckpt")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loaded = set(shown.splitlines()[-1].removeprefix("loaded: ").split())
    assert "usage: lit-tokenformer" in shown and "Once" in shown and "lit_tokenformer" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(("args", "built"), [(["--help"], []), (["fit", "--help"], ["fit"])])
def test_only_the_options_of_the_command_that_is_asked_for_are_built(args, built, monkeypatch, capsys):
    names = []
    build = LightningCLI._prepare_subcommand_parser

    def counted(self, kind, name, **settings):
        names.append(name)
        return build(self, kind, name, **settings)

    monkeypatch.setattr(LightningCLI, "_prepare_subcommand_parser", counted)
    with pytest.raises(SystemExit):
        main(args)
    assert names == built
