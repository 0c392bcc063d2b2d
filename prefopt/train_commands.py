"""`prefopt sft | reward | dpo`: the commands that train; arguments are flags, docstrings help."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from prefopt.command_groups import Reading, Sampling, Setup
from prefopt.command_inputs import (
    load_policy,
    pairs_or_feedback,
    pairs_or_rankings,
    quiet_transformers,
    records,
)
from prefopt.config import TrainConfig
from prefopt.errors import InputError
from prefopt.terminal import describe, finish, say, show_plan


def sft(
    config: TrainConfig, setup: Setup, loss_on: Literal["assistant", "all"] = "assistant"
) -> int:
    """Train a model to imitate dialogues or plain text.

    Args:
        loss_on: tokens that are learnt, the assistant's turns or all.
    """
    from prefopt.data.dialogues import load_dialogues
    from prefopt.objectives.sft import SFT

    settings = {"loss_on": loss_on}
    return _run(SFT(loss_on=loss_on), config, setup, load_dialogues, settings)


def reward(
    config: TrainConfig,
    setup: Setup,
    reading: Reading,
    margin: float = 0.0,
    center: float = 0.0,
) -> int:
    """Train a reward model on preference pairs or rankings.

    Args:
        margin: how much of the data's own margin the scores of a pair must differ by.
        center: weight of holding the scores around 0; 0.01 is common.
    """
    from prefopt.objectives.reward import Reward

    settings = {"margin": margin, "center": center, **reading.options()}
    objective, load = Reward(margin, center), pairs_or_rankings
    return _run(objective, config, setup, load, settings, reading=reading, head="score")


def dpo(
    config: TrainConfig,
    setup: Setup,
    reading: Reading,
    sampling: Sampling,
    loss: str = "dpo",
    loss_options: dict[str, Any] | None = None,
    beta: float | None = None,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    ld_alpha: float | None = None,
    wpo: bool = False,
) -> int:
    """Train a model on preference pairs with DPO or another preference loss.

    Args:
        loss: one of the losses, kto, a sum such as "dpo + 0.2*sft", or module:function of your own.
        loss_options: options of the loss, spelled --loss.gamma 0.5 as flags.
        beta: weight of staying close to the reference, a higher beta stays closer; null is the
            loss's own default, 0.1 for most.
        divergence: from the reference; reverse_kl, forward_kl, js_divergence or alpha_divergence.
        divergence_alpha: of the alpha_divergence.
        ld_alpha: weight of the tokens by which a response is longer than the other (LD-DPO).
        wpo: weight pairs by how probable they are under the policy (WPO).
    """
    from prefopt.data.sources import load_preferences
    from prefopt.objectives.dpo import DPO
    from prefopt.objectives.kto import KTO

    shaping = {"divergence": divergence, "divergence_alpha": divergence_alpha}
    shaping |= {"ld_alpha": ld_alpha, "wpo": wpo}
    options = dict(loss_options or {})
    if "beta" in options:
        raise InputError("the loss's beta is --beta, not --loss.beta")
    if loss == "kto":
        objective: Any = KTO(**_kto_options(beta, options, shaping))
    else:
        objective = DPO(loss, beta, **shaping, **options)  # pyright: ignore[reportArgumentType]
    settings = {"loss": loss, "loss_options": loss_options, "beta": beta, **shaping}
    settings |= {**dataclasses.asdict(sampling), **reading.options()}
    if sampling.rounds:
        return _iterate(objective, config, setup, sampling, settings)
    if sampling.reward is not None:
        raise InputError("--reward ranks sampled answers; say in how many rounds with --rounds")
    load = pairs_or_feedback if loss == "kto" else load_preferences
    return _run(objective, config, setup, load, settings, reading=reading)


def _kto_options(beta: float | None, options: dict, shaping: dict) -> dict[str, Any]:
    known = ("desirable_weight", "undesirable_weight")
    for key in options:
        if key not in known:
            raise InputError(f"loss 'kto' takes no {key!r}; it takes: beta, {', '.join(known)}")
    if shaping["divergence"] != "reverse_kl" or shaping["ld_alpha"] is not None or shaping["wpo"]:
        raise InputError("divergence, ld_alpha and wpo are about pairs, and kto has none")
    return {**({} if beta is None else {"beta": beta}), **options}


def _run(
    objective: Any,
    config: TrainConfig,
    setup: Setup,
    load: Callable[..., Any],
    settings: dict[str, Any],
    reading: Reading | None = None,
    head: str | None = None,
) -> int:
    """Load data and model, and train or only show the plan."""
    import torch

    from prefopt import loading
    from prefopt.prepare import find_checkpoint, make_plan
    from prefopt.rundir import RunDir
    from prefopt.stop import Stopped, StopSignal
    from prefopt.train import train

    if setup.quiet:
        logging.getLogger("prefopt").setLevel(logging.WARNING)
    RunDir(Path(config.out), resuming=config.resume is not None)
    find_checkpoint(config)
    loading.resolve(setup.model)
    try:
        with StopSignal(at_once=True):  # nothing is lost before train(), which waits for a step
            source = load_data(setup, load, reading)
            torch.manual_seed(config.seed)  # a fresh head and the adapter's A are drawn from it
            policy = load_policy(
                setup.model, setup.lora, setup.dtype, setup.device, setup.quantize, head
            )
    except Stopped:
        say("stopped before training")
        return 0
    if not setup.quiet or setup.dry_run:
        describe(policy, setup.lora)
    if setup.dry_run:
        plan = make_plan(objective, policy, source, config, dry_run=True)
        show_plan(objective, policy, config, plan)
        return 0
    adapted = {"lora": setup.lora if policy.lora_report else None}
    recorded = {**dataclasses.asdict(dataclasses.replace(setup, **adapted)), **settings}
    for key in ("dry_run", "quiet"):
        recorded.pop(key)
    run = train(objective, policy, source, config, quiet=setup.quiet, settings=recorded)
    if not setup.quiet:
        finish(run)
    return 0


def load_data(setup: Setup, load: Callable[..., Any], reading: Reading | None = None) -> Any:
    """The records of --data, of one source or several mixed; ``reading`` where pairs are read."""
    options = {"quiet": setup.quiet, **(reading.options() if reading else {})}
    if isinstance(setup.data, str):
        if setup.data_weights:
            raise InputError("data_weights weighs several sets; give --data as {name: file, ...}")
        return records(load, setup.data, setup.split, setup.columns, **options)
    from prefopt.data.mixing import mix
    from prefopt.data.prompts import load_prompts
    from prefopt.data.sources import load_preferences

    if load is load_prompts:
        raise InputError("--data is one source here; several can be mixed where pairs are read")
    parts = {
        name: records(load_preferences, path, setup.split, setup.columns, **options)
        for name, path in setup.data.items()
    }
    return mix(parts, setup.data_weights)


def _iterate(
    objective: Any, config: TrainConfig, setup: Setup, sampling: Sampling, settings: dict[str, Any]
) -> int:
    """--rounds: sample, rank, pair and train, over and over."""
    from prefopt.data.prompts import load_prompts
    from prefopt.rounds import iterate

    if sampling.reward is None:
        raise InputError("--rounds needs --reward: a reward model's folder or module:function")
    quiet_transformers()
    prompts = load_data(setup, load_prompts)
    if setup.dry_run:
        kept = min(sampling.prompts_per_round or len(prompts), len(prompts))
        say(
            f"{sampling.rounds} rounds, {sampling.samples_per_prompt} answers to each of {kept:,} "
            f"prompts; run folder {config.out} (not written: --dry_run)"
        )
        return 0
    results = iterate(
        setup.model, prompts, sampling.reward, config,
        rounds=sampling.rounds, objective=objective, reward_weights=sampling.reward_weights,
        samples=sampling.samples_per_prompt, temperature=sampling.temperature,
        max_new_tokens=sampling.new_tokens, prompts_per_round=sampling.prompts_per_round,
        lora=setup.lora, quantize=setup.quantize, dtype=setup.dtype, device=setup.device,
        quiet=setup.quiet, settings=settings,
    )  # fmt: skip
    if results[-1].stopped:
        say("stopped; --resume auto continues")
    return 0
