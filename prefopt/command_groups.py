"""Flags that several commands share, as groups: the fields are the flags, docstrings their help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prefopt.command_inputs import Dtype, Quantize
from prefopt.nn.lora_config import LoraConfig


@dataclass(frozen=True)
class Setup:
    """What is trained, and on what.

    Attributes:
        model: model, adapter or run folder, or hub id; embedded is the tiny model in the package.
        data: file, folder or hub id; embedded is the set in the package; several preference sets
            as {helpful: a.jsonl, harmless: b.jsonl}.
        data_weights: share of each of several sets in the loss, for example {helpful: 2,
            harmless: 1}; null counts every pair once.
        split: which split of the data.
        columns: names of your columns, for example {prompt: question, chosen: good, rejected: bad}.
        lora: adapter to train; null trains all weights.
        quantize: nf4 or fp4 holds the linear layers in 4 bits (QLoRA); null leaves them as stored.
        dtype: of the weights; auto is bfloat16 on GPUs that have it, else float16 there, and
            float32 on CPU.
        device: auto, cpu, cuda, cuda:1, xpu or mps.
        dry_run: resolve everything, print the plan and a token preview, train and write nothing.
        quiet: print nothing but errors.
    """

    model: str = "embedded"
    data: str | dict[str, str] = "embedded"
    data_weights: dict[str, float] | None = None
    split: str | None = None
    columns: dict[str, str | None] | None = None
    lora: LoraConfig | None = LoraConfig()  # noqa: RUF009 - frozen
    quantize: Quantize | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    dry_run: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Sampling:
    """Iterative DPO: where the pairs of a round come from.

    Attributes:
        rounds: rounds of sampling answers to the prompts of --data, pairing them by --reward and
            training on the pairs; 0 trains on the pairs of --data.
        reward: a reward model's folder or module:function, or several as {name: folder}.
        reward_weights: weight of each of several rewards; null weighs them equally.
        samples_per_prompt: answers sampled for each prompt.
        temperature: of the sampling.
        new_tokens: longest answer.
        prompts_per_round: prompts of one round; null is all of them in every round.
    """

    rounds: int = 0
    reward: str | dict[str, str] | None = None
    reward_weights: dict[str, float] | None = None
    samples_per_prompt: int = 4
    temperature: float = 1.0
    new_tokens: int = 128
    prompts_per_round: int | None = None


@dataclass(frozen=True)
class Reading:
    """How preference pairs are made of the rows of --data.

    Attributes:
        ties: two responses that are equally good; drop, soft (a label of one half) or keep (the
            first one counts as chosen).
        empty: pairs of which one response says nothing; keep or drop.
        pairing: of several ranked or scored responses to a prompt; best_worst, best_rest, adjacent
            or all.
        max_pairs: most pairs of one prompt; null is all.
        min_gap: least difference of the scores, where the data has them.
    """

    ties: Literal["drop", "soft", "keep"] = "drop"
    empty: Literal["keep", "drop"] = "keep"
    pairing: Literal["best_worst", "best_rest", "adjacent", "all"] = "best_worst"
    max_pairs: int | None = None
    min_gap: float = 0.0

    def options(self) -> dict[str, Any]:
        """As load_preferences takes them."""
        return dict(vars(self))
