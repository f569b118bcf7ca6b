"""``predict --images``: classes of images by a checkpoint alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from callbacks.prediction_writer import TOP, free_path, prediction_header, prediction_row
from lit_tokenformer import tasks
from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.errors import UserError
from lit_tokenformer.inference.text import find_device
from lit_tokenformer.tasks.rebuild import rebuild_task


def predict_images(
    ckpt_path: str,
    images: str | list[str],
    output: str | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "auto",
) -> Path:
    """Classify images with a checkpoint; neither a config nor the training data are needed.

    Args:
        ckpt_path: Path to a checkpoint of an image classifier.
        images: Image, folder (all images below) or tar file; or a list of them.
        output: CSV file for the predictions; defaults to predictions.csv in the current folder.
        batch_size: Images per batch.
        num_workers: Number of worker processes that read images.
        device: Device of the model, such as "cpu" or "cuda:0"; "auto" selects the accelerator if available.

    Returns:
        Path of the CSV file, with the five most probable classes of each image; empty cells for an unreadable image.

    Raises:
        UserError: If the checkpoint is not of an image classifier or has no class names, if a path contains no image,
            or if the output already exists.
    """
    target = Path(output) if output else free_path(Path("predictions.csv"))
    if target.exists():
        raise UserError(f"output: {target} exists already")
    task = rebuild_task(ckpt_path, read_checkpoint(ckpt_path, "meta", optimizers=False))
    found = [one for one in task.modules() if isinstance(one, tasks.LitImageClassifier)]
    if len(found) != 1:
        raise UserError(f"ckpt_path: expected one LitImageClassifier in {ckpt_path}, got {len(found)}; see `split`")
    found[0].to(find_device(device))
    predictions = found[0].predict_images(images, batch_size, num_workers, TOP)
    columns = max(len(one.probabilities) for one in predictions)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(prediction_header(columns))
    for image, probabilities in predictions:
        row = prediction_row(image, probabilities.items())
        writer.writerow(row + [""] * (1 + 2 * columns - len(row)))
    with atomic_write(target) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    print(f"{target}: predictions for {len(predictions)} images")
    return target
