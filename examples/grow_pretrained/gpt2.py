"""A GPT-2 of transformers, trained by its Trainer on the source of Python's standard library."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from lit_tokenformer.data import TextDataModule

LENGTH, BATCH = 128, 8
WIDTH, HEADS = 48, 3


def text(seed: int = 0) -> TextDataModule:
    """Return the bytes of the standard library; the split into training and validation does not depend on the seed."""
    return TextDataModule(
        "python_stdlib",
        tokenizer="bytes",
        block_size=LENGTH,
        val_fraction=0.05,
        seed=seed,
        batch_size=BATCH,
        eval_batch_size=64,
    )


@cache
def training_blocks() -> list[dict[str, torch.Tensor]]:
    """Return the training documents as a data set of Trainer: blocks of ``LENGTH`` bytes, with their labels."""
    data = text()
    separator = data.separator_id
    stream = [separator]
    for split, document in data.corpus.documents():
        if split == "train":
            stream += [*document.encode(), separator]  # the token of a byte is its value
    count = len(stream) // LENGTH
    return [{"input_ids": block, "labels": block} for block in torch.tensor(stream[: count * LENGTH]).view(-1, LENGTH)]


def train_base(folder: Path, seed: int, lr: float, steps: int, depth: int) -> None:
    """Train a GPT-2 with ``transformers.Trainer``, and save it as ``save_pretrained`` does."""
    transformers.set_seed(seed)
    data = text()
    end = data.separator_id
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=data.vocab_size,
            n_positions=LENGTH,
            n_embd=WIDTH,
            n_layer=depth,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=lr,
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
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=training_blocks())
    trainer.train()
    model.save_pretrained(folder)
    data.tokenizer.save(folder / "tokenizer.json")


@torch.no_grad()
def score(folder: Path) -> dict[str, float]:
    """Load a folder with transformers alone, and evaluate it on the held-out documents.

    Returns:
        Loss in nats per byte, bits per byte, parameters in all and in the blocks.
    """
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count = 0.0, 0
    for tokens in text().val_dataloader():  # (B, T + 1), -100 where a block is not full
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
