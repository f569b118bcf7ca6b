"""A GPT-2 of transformers: imported, grown, trained further in a fit that grows it again, and given back.

    python -m examples.transformers_model OUTPUT [FOLDER_OR_REPOSITORY]

Without a source, the model is a small one with random weights, so that nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from examples.timm_model import run
from lit_tokenformer.data import Tokenizer

SMALL = ("--data.block_size=32", "--data.batch_size=4")


def main(output: str, source: str | None = None, steps: int = 20) -> tuple[int, int]:
    """Import, fit with one growth, and export.

    Returns:
        Number of parameters before and after.
    """
    folder = Path(output)
    if source is None:
        torch.manual_seed(0)
        source = str(folder / "gpt2")
        config = GPT2Config(
            vocab_size=257, n_positions=32, bos_token_id=0, eos_token_id=256, n_embd=32, n_layer=2, n_head=2
        )
        GPT2LMHeadModel(config).save_pretrained(source)
        Path(source, "tokenizer.json").write_text(Tokenizer.bytes().to_json(), encoding="utf-8")
    base, fits, back = str(folder / "base.ckpt"), folder / "fits", str(folder / "back")
    run("import", "--source", source, "--output", base)
    run(
        *("fit", "--config", "grow_pretrained", "--ckpt_path", base, *SMALL),
        *("--trainer.callbacks+=ParameterGrowthCallback", "--trainer.callbacks.unit=step"),
        f"--trainer.callbacks.schedule={{{steps // 2}: {{depth: 3, hidden: 192}}}}",
        *(f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"),
        *("--trainer.limit_val_batches=1", f"--trainer.default_root_dir={fits}", "--trainer.enable_progress_bar=false"),
    )
    (last,) = fits.rglob("last.ckpt")
    run("export", "--ckpt_path", str(last), "--format", "transformers", "--output", back)

    counts = [AutoModelForCausalLM.from_pretrained(one).num_parameters() for one in (source, back)]
    print(f"{counts[0]:,} -> {counts[1]:,} parameters; AutoModelForCausalLM.from_pretrained({back!r})")
    return counts[0], counts[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
