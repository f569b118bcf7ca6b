"""``evaluate``: scores on the tasks of EleutherAI's lm-evaluation-harness, in the dialect of its own command."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.errors import UserError
from lit_tokenformer.inference.text import TextGenerator


def evaluate_checkpoint(
    ckpt_path: str,
    tasks: list[str] | str,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | Literal["auto"] = 8,
    include_path: str | None = None,
    output: str | None = None,
    output_path: str | None = None,
    log_samples: bool = False,
    device: str = "auto",
    quantize: str | None = None,
) -> dict[str, Any]:
    """Evaluate a language model on tasks of EleutherAI's lm-evaluation-harness.

    Args:
        ckpt_path: Path to a checkpoint of a fit.
        tasks: Tasks of the harness, separated by commas, such as lambada_openai,hellaswag,piqa; patterns such as
            blimp_*; or list, which prints all names.
        num_fewshot: Number of few-shot examples; defaults to that of the task.
        limit: Maximum number of examples per task, or a fraction of them if below 1.
        batch_size: Sequences per forward pass; auto starts at 64 and halves it when memory runs out.
        include_path: Folder with custom task definitions.
        output: Path of a JSON file for the results.
        output_path: Folder for the results, as CHECKPOINT/results_DATE.json.
        log_samples: Also write the documents and the model's responses, as CHECKPOINT/samples_TASK_DATE.jsonl below
            output_path.
        device: Device of the model, such as "cpu" or "cuda:0"; "auto" selects the accelerator if available.
        quantize: Weight-only quantization of the blocks: "int8" or, on CPUs, "int4"; needs torchao.

    Returns:
        Results in the harness's format.

    Raises:
        UserError: If the harness is not installed, the checkpoint cannot be used, a task is unknown, or the output
            already exists.
    """
    if output is not None and Path(output).exists():
        raise UserError(f"output: {output} exists already")
    tasks = [task.strip() for task in tasks.split(",") if task.strip()] if isinstance(tasks, str) else tasks
    if not tasks:
        raise UserError("tasks: expected at least one")
    if log_samples and output_path is None:
        raise UserError("log_samples: needs output_path")
    if output_path is not None and os.path.isfile(output_path):
        raise UserError(f"output_path: expected a folder, got the file {output_path}")
    if batch_size != "auto" and batch_size < 1:
        raise UserError(f"batch_size: expected a whole number of at least 1, got {batch_size}")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot: expected a whole number of at least 0, got {num_fewshot}")
    if limit is not None and not limit > 0:
        raise UserError(f"limit: expected a number above 0, got {limit}")
    from lit_tokenformer.inference.lm_eval import as_table, evaluate, task_list  # the harness takes seconds to import

    if tasks == ["list"]:
        print(task_list(include_path))
        return {}
    generator = TextGenerator.load(ckpt_path, device, quantize=quantize)
    try:
        results = evaluate(generator, tasks, num_fewshot, limit, batch_size, include_path, log_samples)
    except OSError as error:  # a task that is not cached, and cannot be downloaded
        raise UserError(f"tasks: {error}") from None
    results["config"]["model_args"] = {"ckpt_path": ckpt_path} | ({"quantize": quantize} if quantize else {})
    print(as_table(results))
    samples = results.pop("samples", {})
    if output_path is not None:
        date = datetime.now().isoformat().replace(":", "-")
        folder = Path(output_path, re.sub(r"[^\w.-]+", "__", ckpt_path).strip("_"))
        folder.mkdir(parents=True, exist_ok=True)
        for task, rows in samples.items():
            with atomic_write(folder / f"samples_{task}_{date}.jsonl") as file:
                file.writelines((json.dumps(row, default=str) + "\n").encode() for row in rows)
        with atomic_write(folder / f"results_{date}.json") as file:
            file.write((json.dumps(results, indent=2, default=str) + "\n").encode())
    if output is not None:
        with atomic_write(output) as file:
            file.write((json.dumps(results, indent=2, default=str) + "\n").encode())
    return results
