"""TrainConfig: what a training run is, apart from the model, the data and the objective."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from prefopt.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """How to train; every field is a flag of the command line.

    Attributes:
        out: folder of the run; made if missing, refused if it holds another run.
        batch_size: pairs (dialogues, rankings) of one optimizer step.
        batch_tokens: tokens of one optimizer step instead, as many whole pairs as fit.
        micro_tokens: most tokens in one packed forward; gradients accumulate over them.
        max_length: most tokens of prompt and response; longer responses are cut.
        lr: peak learning rate; null is 2e-4 for an adapter and 1e-5 for all weights.
        epochs: passes over the training pairs.
        max_steps: stop after so many optimizer steps.
        eval_fraction: share of prompts held out for evaluation; 0 evaluates nothing.
        eval_every: steps between evaluations; null evaluates before training and after each epoch.
        save_every: steps between checkpoints; 0 keeps only the final model.
        keep: checkpoints kept.
        seed: order of the data, initial adapter, dropout, sampling.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
        max_norm: gradients are clipped to this norm; 0 for no clipping.
        warmup: steps of warm-up, or their fraction if below 1.
        schedule: learning rate after the warm-up.
        weight_decay: AdamW's.
        ref_sync_steps: steps from one move of the reference to the next (TR-DPO); null for none.
        ref_sync_alpha: how far it moves towards the policy; at 1 it becomes the policy.
        lora_plus: how many times as fast LoRA's B learns as A (LoRA+; its paper suggests 16).
        template: how conversations become text; auto: the tokenizer's chat template if it has one.
        log_every: steps between rows of metrics.jsonl.
        samples: held-out prompts answered before and after training, for the report.
        sample_tokens: longest of these answers.
        cache: folder of the reference log-probs; null is prefopt/reference in the user's cache.
        parallel: auto runs on this process's device.
        resume: auto continues from the last good checkpoint in out, a path from that checkpoint.
    """

    out: str
    batch_size: int = 8
    batch_tokens: int | None = None
    micro_tokens: int = 4096
    max_length: int = 1024
    lr: float | None = None
    epochs: int = 1
    max_steps: int | None = None
    eval_fraction: float = 0.1
    eval_every: int | None = None
    save_every: int = 100
    keep: int = 3
    seed: int = 0
    gradient_checkpointing: bool = False
    max_norm: float = 1.0
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    ref_sync_steps: int | None = None
    ref_sync_alpha: float = 0.6
    lora_plus: float = 1.0
    template: Literal["auto", "chat", "transcript", "plain"] = "auto"
    log_every: int = 1
    samples: int = 4
    sample_tokens: int = 64
    cache: str | None = None
    parallel: Literal["auto"] = "auto"
    resume: str | None = None

    def __post_init__(self) -> None:
        check_lowest(
            self,
            batch_size=1, micro_tokens=2, max_length=2, epochs=1, save_every=0, keep=1,
            log_every=1, samples=0, sample_tokens=1, batch_tokens=1, max_steps=1, eval_every=1,
            max_norm=0, warmup=0, weight_decay=0, ref_sync_steps=1,
        )  # fmt: skip
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"lr is {self.lr!r}; it must be above 0")
        if not 0 < self.lora_plus < math.inf:
            raise InputError(f"lora_plus is {self.lora_plus!r}; it must be above 0")
        if not 0 < self.ref_sync_alpha <= 1:
            raise InputError(f"ref_sync_alpha is {self.ref_sync_alpha!r}; it must be in (0, 1]")
        if not 0 <= self.eval_fraction < 1:
            raise InputError(f"eval_fraction is {self.eval_fraction!r}; it must be in [0, 1)")
        check_choices(self)
        check_single_process()


def check_lowest(config: Any, **lowest: float) -> None:
    """InputError for the first field that is below its lowest value, or infinite; None passes."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise InputError(f"{name} is {value!r}; it must be at least {low}")


def check_choices(config: Any) -> None:
    """InputError for the first field that is not among the values that its Literal lists."""
    for name, hint in get_type_hints(type(config)).items():
        kinds = (hint, *get_args(hint))
        choices = [
            value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)
        ]
        value = getattr(config, name)
        if choices and value not in choices and not (value is None and NoneType in kinds):
            raise InputError(f"{name} is {value!r}; it is one of {', '.join(choices)}")


def check_single_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("this release trains in one process; start it without torchrun")


def default_cache() -> Path:
    """PREFOPT_CACHE, or prefopt/reference in the user's cache folder: shared by all runs."""
    if "PREFOPT_CACHE" in os.environ:
        return Path(os.environ["PREFOPT_CACHE"])
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "prefopt" / "reference"
