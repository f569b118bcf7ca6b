"""A GPT-2 of transformers, trained by its Trainer on the source of Python's standard library."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch.nn import functional as F

from examples.grow_pretrained.arms import Demonstration, Study, write
from lit_tokenformer.cli.parser import shipped_configs
from lit_tokenformer.data import TextDataModule

LENGTH, BATCH, WIDTH, HEADS, DEPTH = 128, 8, 32, 2, 2
LR = 1.6e-2  # for the base model; 0.008 ends at 2.81 bits per byte, 0.016 at 2.76


class Text:
    """Training and evaluation by transformers alone, on bytes.

    Args:
        dataset: Source of ``TextDataModule``. Documents are held out by a hash, so the split is the same everywhere.
    """

    def __init__(self, dataset: str) -> None:
        self.settings = {"dataset": dataset, "block_size": LENGTH, "val_fraction": 0.05}
        self.data = TextDataModule(**self.settings, tokenizer="bytes", batch_size=BATCH, eval_batch_size=64)

    def training_blocks(self) -> list[dict[str, torch.Tensor]]:
        """Return the training documents as a data set of Trainer: blocks of ``LENGTH`` bytes, with their labels."""
        separator = torch.tensor([self.data.separator_id])
        parts = [separator]
        for split, document in self.data.corpus.documents():
            if split == "train":
                parts += [torch.tensor(list(document.encode())), separator]  # the token of a byte is its value
        stream = torch.cat(parts)
        blocks = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
        return [{"input_ids": block, "labels": block} for block in blocks]

    def train_base(self, folder: Path, seed: int, steps: int) -> None:
        """Train a GPT-2 with ``transformers.Trainer``, and save it with ``save_pretrained``."""
        transformers.set_seed(seed)
        end = self.data.separator_id
        config = transformers.GPT2Config(
            vocab_size=self.data.vocab_size,
            n_positions=LENGTH,
            n_embd=WIDTH,
            n_layer=DEPTH,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
        model = transformers.GPT2LMHeadModel(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=LR,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_steps=max(1, steps // 10),
            report_to=[],
            disable_tqdm=True,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=self.training_blocks()).train()
        model.save_pretrained(folder)
        self.data.tokenizer.save(folder / "tokenizer.json")

    @torch.no_grad()
    def score(self, folder: Path) -> dict[str, float]:
        """Load a folder with transformers alone, and evaluate it on the held-out documents.

        Returns:
            Loss in nats per byte, bits per byte, parameters in all and in the blocks.
        """
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        total, count = 0.0, 0
        for tokens in self.data.val_dataloader():  # (B, T + 1), -100 where a block is not full
            logits = model(tokens[:, :-1].clamp_min(0)).logits
            targets = tokens[:, 1:]
            total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum").item()
            count += int((targets != -100).sum())
        return {
            "loss": total / count,
            "bits_per_byte": total / count / math.log(2),
            "parameters": model.num_parameters(),
            "block_parameters": sum(parameter.numel() for parameter in model.transformer.h.parameters()),
        }

    def demonstration(self, smoke: bool) -> Demonstration:
        """Set up the arms; a smoke test takes seconds and shows nothing."""
        settings = yaml.safe_load(shipped_configs()["grow_pretrained"].read_text())
        settings["data"]["init_args"] |= {**self.settings, "loader": {"batch_size": BATCH}}
        return Demonstration(
            train_base=self.train_base,
            score=self.score,
            format="transformers",
            settings=settings,
            preset="gpt2_tiny",
            fields={"dim": WIDTH, "depth": DEPTH, "num_heads": HEADS},
            of_data={"vocab_size": 257, "context_length": LENGTH},
            final={"depth": 3, "mlp_ratio": 6.0},
            batch=BATCH,
            base_steps=20 if smoke else 2000,
            share=0.4,
            rates=(LR / 4,) if smoke else (LR / 8, LR / 4, LR / 2),
            scratch_rates=(LR,) if smoke else (LR / 2, LR),
            variants={}
            if smoke
            else {
                "depth alone": {"sizes": {"depth": "2x"}, "final": {"depth": 4}},
                "hidden units alone": {"sizes": {"hidden": "2.5x"}, "final": {"mlp_ratio": 10.0}},
                "old rows frozen for 100 steps": {"freeze_old_steps": 100},
                "constant, then linear decay": {"schedule": {"name": "wsd", "decay": 0.6}},
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="Folder of the fits; those found there are not repeated.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base_steps", type=int, help="Steps of the base model; other settings are not tried then.")
    parser.add_argument("--smoke", action="store_true", help="A few steps on a smaller corpus.")
    given = parser.parse_args()
    demonstration = Text("python_docs" if given.smoke else "python_stdlib").demonstration(given.smoke)
    if given.base_steps is not None:
        demonstration = replace(demonstration, base_steps=given.base_steps, variants={})
    results = Study(demonstration, given.output).run(given.seeds)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write(results, given.output / "gpt2", ("bits_per_byte", "loss"), versions)


if __name__ == "__main__":
    main()
