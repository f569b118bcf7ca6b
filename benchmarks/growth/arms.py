"""What the study trains: domains, arms, and the fit that each arm comes to at a budget."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from lit_tokenformer.cost import model_cost
from lit_tokenformer.growth import target_tokens
from lit_tokenformer.models import TokenformerConfig, preset_config

GROWTH = "callbacks.ParameterGrowthCallback"


@dataclass(frozen=True)
class Domain:
    """Data, architecture, ladder and budget.

    Args:
        task: The LightningModule.
        data: The data module's class and settings.
        preset: The Tokenformer.
        twin: Its twin with linear projections.
        base: Fields of the architecture that all arms share.
        twin_base: Those of the twin, at which it has as many parameters as the final size.
        of_data: Fields that follow from the data.
        ladder: Parameter tokens of each size, the final one last.
        budget: Training operations C of the final size from scratch.
        rates: Learning rates that every arm tries.
        val_batches: Batches of each validation.
        weight_decay: Of AdamW.
    """

    task: str
    data: dict[str, Any]
    preset: str
    twin: str
    base: dict[str, Any]
    twin_base: dict[str, Any]
    of_data: dict[str, int]
    ladder: tuple[int, ...]
    budget: float
    rates: tuple[float, ...]
    val_batches: int
    weight_decay: float = 0.1

    @property
    def batch_size(self) -> int:
        return int(self.data["init_args"]["batch_size"])


DOMAINS = {
    "text": Domain(
        task="LitCausalLM",
        data={
            "class_path": "lit_tokenformer.data.TextDataModule",
            "init_args": {
                "dataset": "python_stdlib",
                "tokenizer": "bytes",
                "block_size": 64,
                "batch_size": 12,
                "eval_batch_size": 128,
                "val_fraction": 0.05,
            },
        },
        preset="tokenformer_lm_tiny",
        twin="transformer_tiny",
        base={"dim": 32, "depth": 3, "num_heads": 2},
        twin_base={"mlp_ratio": 6},
        of_data={"vocab_size": 257, "context_length": 64},
        ladder=(8, 16, 32),
        budget=1.2e12,
        rates=(6e-3, 1.2e-2, 2.4e-2),
        val_batches=10,
    ),
    "images": Domain(
        task="LitImageClassifier",
        data={
            "class_path": "kept_images.KeptImages",
            "init_args": {"root": "data", "batch_size": 64, "eval_batch_size": 500},
        },
        preset="tokenformer_vit_tiny_patch16_224",
        twin="vit_tiny_patch16_224",
        base={
            "dim": 32,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 7,
            "in_chans": 1,
            "global_pool": "avg",
            "class_token": False,
        },
        twin_base={"dim": 24, "num_heads": 2, "mlp_ratio": 1.5, "bias": False, "norm_affine": False},
        of_data={"num_classes": 10, "image_size": 28},
        ladder=(2, 4, 8),
        budget=0.5e12,
        rates=(1.2e-2, 2.4e-2),
        val_batches=10,
        weight_decay=0.05,
    ),
}


@dataclass(frozen=True)
class Arm:
    """A way to spend operations.

    Args:
        name: What it is called.
        sizes: Fields of the architecture at each stage, beside those that all arms share.
        at: Shares of the steps at which the second size and those after it begin.
        growth: Settings of the growth callback; with ``way`` it is the study's own.
        schedule: The learning rate's; shares of the whole run, or of the stage with ``restart``.
        twin: Whether it has linear projections.
        restart: Whether the learning rate begins anew at each growth.
        share: Of the budget C that it may spend.
        learned_tau: Whether tau is a parameter.
        small: Height and width of the images before the last stage; None for those of the data.
        dropped: Share of the patches that is left out before the last stage.
        length: Optimizer steps, where no budget sets them.
        once: Whether one seed is enough.
        lr: Its learning rate, as it was searched for.
        rate_factor: Multiple of it that is used.
        rate_at_growth: Factor of it at each growth.
    """

    name: str
    sizes: tuple[dict[str, Any], ...]
    at: tuple[float, ...] = ()
    growth: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    twin: bool = False
    restart: bool = False
    share: float = 1.0
    learned_tau: bool = False
    small: int | None = None
    dropped: float = 0.0
    length: int = 0
    once: bool = False
    lr: float = 0.0
    rate_factor: float = 1.0
    rate_at_growth: float = 1.0

    def configs(self, domain: Domain) -> list[TokenformerConfig]:
        """The architecture at each stage."""
        preset = domain.twin if self.twin else domain.preset
        shared = {**domain.base, **(domain.twin_base if self.twin else {}), **domain.of_data}
        *before, last = (preset_config(preset, **{**shared, **size}) for size in self.sizes)
        short = {"patch_drop_rate": self.dropped, **({"image_size": self.small} if self.small else {})}
        return [*(replace(config, **short) for config in before), last]

    def steps(self, domain: Domain) -> int:
        """Optimizer steps that its share of the budget allows."""
        if self.length:
            return self.length
        starts = (0.0, *self.at)
        lengths = [end - start for start, end in zip(starts, (*self.at, 1.0), strict=True)]
        costs = [model_cost(config).training_flops for config in self.configs(domain)]
        mean = sum(length * cost for length, cost in zip(lengths, costs, strict=True))
        return max(2, int(self.share * domain.budget / (mean * domain.batch_size)))

    def starts(self, domain: Domain) -> list[int]:
        """The step at which each stage after the first begins."""
        return [max(1, round(share * self.steps(domain))) for share in self.at]

    def fit(self, domain: Domain, seed: int, evaluations: int) -> dict[str, Any]:
        """The YAML of its fit."""
        steps, starts = self.steps(domain), self.starts(domain)
        interval = max(1, steps // evaluations)
        callbacks: list[dict[str, Any]] = []
        if len({str(size) for size in self.sizes}) > 1:
            callbacks.append({"class_path": "model_growth.LossAtGrowth", "init_args": {"steps": starts}})
            callbacks.append(self._growth(domain, starts))
        if self.learned_tau:
            callbacks.append({"class_path": "model_growth.LearnedTau"})
        if self.rate_at_growth != 1:
            scaled = {"steps": starts, "factor": self.rate_at_growth}
            callbacks.append({"class_path": "model_growth.RateAtGrowth", "init_args": scaled})
        if self.small:
            small = {"size": self.small, "steps": starts[-1]}
            callbacks.append({"class_path": "model_growth.SmallImages", "init_args": small})
        if self.dropped:
            whole = {"schedule": {starts[-1]: 0.0}, "unit": "step"}
            callbacks.append({"class_path": "callbacks.PatchDropSchedule", "init_args": whole})
        callbacks += [
            {"class_path": "callbacks.TrainingMonitor", "init_args": {"log_images": 0, "row_norms": False}},
            {"class_path": "runs.Meter"},
        ]
        schedule = {"name": "wsd", "warmup": 0.05, "decay": 0.4, "unit": "share", **self.schedule}
        if self.restart:
            schedule["restarts"] = starts
        shared = {**domain.base, **(domain.twin_base if self.twin else {}), **self.sizes[0]}
        if self.dropped:
            shared["patch_drop_rate"] = self.dropped
        optimizer = {
            "lr": self.lr * self.rate_factor,
            "betas": [0.9, 0.95],
            "weight_decay": domain.weight_decay,
            "fused": True,
        }
        return {
            "seed_everything": seed,
            "trainer": {
                "max_steps": steps,
                "max_epochs": -1,
                "accelerator": "cpu",
                "devices": 1,
                "logger": True,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": max(1, steps // 40),
                "check_val_every_n_epoch": None,
                "val_check_interval": interval,
                "limit_val_batches": domain.val_batches,
                "gradient_clip_val": 1.0,
                "callbacks": callbacks,
            },
            "model": {
                "class_path": f"lit_tokenformer.tasks.{domain.task}",
                "init_args": {
                    "preset": domain.twin if self.twin else domain.preset,
                    "overrides": shared,
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": optimizer},
                    "schedule": schedule,
                },
            },
            "data": copy.deepcopy(domain.data),
        }

    def _growth(self, domain: Domain, starts: list[int]) -> dict[str, Any]:
        settings = dict(self.growth)
        if "way" in settings:
            field_name = "dim" if settings["way"] == "widen" else "depth"
            schedule = {step: size[field_name] for step, size in zip(starts, self.sizes[1:], strict=True)}
            return {"class_path": "model_growth.ModelGrowth", "init_args": {**settings, "schedule": schedule}}
        tokens: dict[str, int] = dict(self.configs(domain)[0].tokens.items())
        waits = settings.get("trigger", "schedule") != "schedule"
        keys = range(1, len(starts) + 1) if waits else starts
        schedule = {}
        for step, size in zip(keys, self.sizes[1:], strict=True):
            tokens = target_tokens(size["param_tokens"], tokens)
            schedule[step] = {**tokens, **({"depth": size["depth"]} if "depth" in size else {})}
        return {
            "class_path": GROWTH,
            "init_args": {"unit": "step", "check": False, **settings, "schedule": schedule},
        }


def token_ladder(ladder: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
    """Sizes by their parameter tokens."""
    return tuple({"param_tokens": tokens} for tokens in ladder)


def depth_ladder(domain: Domain, *blocks: int) -> tuple[dict[str, Any], ...]:
    """Sizes by their blocks, each with all parameter tokens."""
    return tuple({"param_tokens": domain.ladder[-1], "depth": depth} for depth in blocks)


def family_steps(domain: Domain) -> dict[tuple[str, str], tuple[dict[str, Any], ...]]:
    """Sizes with the final one, by the names of their arms from scratch, and both as fields of the architecture."""
    *_, small, final = domain.ladder
    name = f"{final} tokens"
    return {
        (f"{small} tokens", name): token_ladder((small, final)),
        ("1 block", name): depth_ladder(domain, 1, domain.base["depth"]),
    }


def controls(domain: Domain) -> list[Arm]:
    """What growth is compared with; the sizes of the ladder first, the final one at their head."""
    final = domain.ladder[-1]
    dim, depth, heads = (domain.base[name] for name in ("dim", "depth", "num_heads"))
    sizes = [Arm(f"from scratch, {n} tokens", token_ladder((n,))) for n in reversed(domain.ladder)]
    shallow = Arm("from scratch, 1 block", depth_ladder(domain, 1))
    cosine = Arm("from scratch, cosine", token_ladder((final,)), schedule={"name": "cosine"}, once=True)
    linear = Arm("from scratch, linear decay", token_ladder((final,)), schedule={"decay": 0.95})
    learned = Arm("from scratch, tau learned", token_ladder((final,)), learned_tau=True, once=True)
    published = Arm(
        "published growth",
        token_ladder(domain.ladder),
        (0.4, 0.7),
        {"method": "random", "new_state": "reset"},
        {"name": "cosine", "warmup": 0.02},
        restart=True,
        share=0.65,
    )
    twin = Arm("transformer twin, from scratch", ({},), twin=True)
    grown_twin = replace(published, twin=True, at=(0.3,), schedule={"warmup": 0.05})
    stacked = replace(
        grown_twin,
        name="twin, stacked (G_stack)",
        sizes=({"depth": 1}, {"depth": depth}),
        growth={"way": "stack"},
    )
    widened = replace(
        grown_twin,
        name="twin, widened (Net2Net)",
        sizes=({"dim": dim // 2, "num_heads": heads // 2}, {"dim": dim, "num_heads": heads}),
        growth={"way": "widen"},
    )
    of_text = [widened, cosine, linear, learned] if domain.task == "LitCausalLM" else []  # it widens tied embeddings
    return [*sizes, shallow, published, twin, stacked, *of_text]


def reduced_arms(domain: Domain) -> list[Arm]:
    """The most important arms, with the learning rates that the whole study found for text."""
    rates = {
        f"from scratch, {domain.ladder[-1]} tokens": 6e-3,
        "from scratch, 1 block": 1.2e-2,
        "published growth": 6e-3,
    }
    known = [arm for arm in controls(domain) if arm.name in rates]
    (inserted,) = (arm for arm in policies(domain)["depth"] if arm.name == "grown: blocks inserted")
    known += [replace(inserted, name="grown"), tokens_alone(domain)]
    return [replace(arm, lr=rates.get(arm.name, 6e-3)) for arm in known]


def few_patches(arm: Arm, left: int = 9) -> Arm:
    """The same with some of each image's 16 patches in the first half, and the growth after it."""
    sizes = arm.sizes if arm.at else 2 * arm.sizes
    name = f"{arm.name}, {left} of 16 patches first"
    return replace(arm, name=name, sizes=sizes, at=(0.5,), dropped=1 - left / 16, share=0.65)


def small_images(arm: Arm, domain: Domain) -> Arm:
    """The same with images of half the height and width in the first half, and the growth after it."""
    whole, name = few_patches(arm), f"{arm.name}, small images first"
    return replace(whole, name=name, dropped=0.0, small=domain.of_data["image_size"] // 2)


def base_policy(domain: Domain, share: float = 0.65) -> Arm:
    """Where the search begins: split, growths in the first half, the learning rate going on."""
    return Arm("grown: split", token_ladder(domain.ladder), (0.2, 0.45), share=share)


def tokens_alone(domain: Domain) -> Arm:
    """Growth in tokens at the places that won the search."""
    return replace(base_policy(domain), name="grown in tokens alone", at=(0.1, 0.25))


def policies(domain: Domain) -> dict[str, list[Arm]]:
    """The search, one factor at a time: other values of each factor of :func:`base_policy`."""
    base = base_policy(domain)
    small, final = domain.ladder[0], domain.ladder[-1]

    def other(name: str, **changes: Any) -> Arm:
        return replace(base, name=f"grown: {name}", **changes)

    def growth(name: str, **settings: Any) -> Arm:
        return other(name, growth=settings)

    ffn_first = tuple(
        {"param_tokens": {"qkv": a, "proj": a, "ffn": 4 * f}}
        for a, f in ((small, small), (small, final), (final, final))
    )
    depths = depth_ladder(domain, *range(1, domain.base["depth"] + 1))

    def deeper(name: str, **changes: Any) -> Arm:
        return other(name, **{"sizes": (depths[0], depths[-1]), "at": (0.3,), **changes})

    return {
        "when": [
            other("at 10 and 25 %", at=(0.1, 0.25)),
            other("at 40 and 70 %", at=(0.4, 0.7)),
            growth("by the slope of the loss", trigger="slope", window=25, cooldown=100),
            growth("on a plateau", trigger="plateau", window=25, cooldown=100, min_delta=0.03),
        ],
        "how much": [
            other(f"{small} to {final} at once", sizes=token_ladder((small, final)), at=(0.3,)),
            other("feed-forward first", sizes=ffn_first),
        ],
        "new rows": [
            growth("split, noise 0.3", noise=0.3),
            growth("split, noise 2", noise=2.0),
            growth("zero keys", method="zero_keys"),
            growth("random", method="random"),
        ],
        "tau": [
            other("tau learned", learned_tau=True),
            growth("zero keys, tau to sqrt(N) in 200 steps", method="zero_keys", tau_steps=200),
        ],
        "optimizer state": [
            growth("state dropped", new_state="reset"),
        ],
        "updates": [growth("updates of new rows rise in 100 steps", ramp_steps=100)],
        "learning rate": [
            growth("learning rate rises again in 100 steps", rewarm_steps=100),
            other("twice the learning rate", rate_factor=2.0),
            other("cosine", schedule={"name": "cosine"}),
            other("decay in the last 60 %", schedule={"decay": 0.6}),
        ],
        "old rows": [
            growth("old rows frozen for 200 steps", freeze_old_steps=200),
            growth("old rows slowed to a fifth for 400 steps", freeze_old_steps=400, old_updates=0.2),
        ],
        "depth": [
            deeper("blocks copied", growth={"way": "insert_copies", "keep_state": True}),
            deeper("blocks inserted"),
            deeper("blocks inserted at 15 %", at=(0.15,)),
            deeper("blocks inserted at 45 %", at=(0.45,)),
            deeper("blocks inserted, tau learned", learned_tau=True),
            deeper("blocks inserted, twice the learning rate before", rate_factor=2.0, rate_at_growth=0.5),
            deeper("blocks inserted, linear decay", schedule={"decay": 0.95}),
            deeper("blocks inserted one by one", sizes=depths, at=(0.35,) if len(depths) == 2 else (0.15, 0.35)),
            deeper("blocks inserted, tokens doubled", sizes=({**depths[0], "param_tokens": final // 2}, depths[-1])),
        ],
    }
