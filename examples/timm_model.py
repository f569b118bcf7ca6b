"""A vision transformer of timm: imported, grown in depth and hidden units, and given back to timm.

    python -m examples.timm_model OUTPUT [FOLDER_OR_REPOSITORY_OF_TIMM]

Without a source, the model is a small one with random weights, so that nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

from lit_tokenformer.cli import main as lit_tokenformer


def run(*args: str) -> None:
    """Run a command of lit-tokenformer in this process."""
    status: object
    try:
        status = lit_tokenformer(args)
    except SystemExit as end:
        status = end.code
    if status:
        raise SystemExit(f"failed: {' '.join(args)}")


def main(output: str, source: str | None = None) -> float:
    """Import, grow and export.

    Returns:
        Largest difference of timm's logits before and after, relative to the largest logit.
    """
    folder = Path(output)
    if source is None:
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        source = str(folder / "timm")
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
        save_for_hf(model, source, model_args=sizes, safe_serialization=True)
    base, grown, back = str(folder / "base.ckpt"), str(folder / "grown.ckpt"), str(folder / "back")
    run("import", "--source", source, "--output", base)
    run("grow", "--ckpt_path", base, "--tokens", "{depth: 3, hidden: 288}", "--output", grown)
    run("export", "--ckpt_path", grown, "--format", "timm", "--output", back)

    before = timm.create_model(f"local-dir:{source}", pretrained=True).eval()
    after = timm.create_model(f"local-dir:{back}", pretrained=True).eval()
    image = torch.randn(4, 3, *before.patch_embed.img_size)
    with torch.no_grad():
        expected, got = before(image), after(image)
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (before, after)]
    print(f"{counts[0]:,} -> {counts[1]:,} parameters, relative difference of the logits {difference:.1e}")
    return difference


if __name__ == "__main__":
    main(*sys.argv[1:])
