"""`prefopt ppo`: training on samples of the policy's own; arguments are flags, docstrings help."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from prefopt.command_groups import Setup
from prefopt.command_inputs import load_policy, quiet_transformers
from prefopt.errors import InputError
from prefopt.online_config import PPOConfig
from prefopt.terminal import describe, finish, say
from prefopt.train_commands import load_data


def ppo(
    online: PPOConfig,
    setup: Setup,
    reward: str | dict[str, str] | None = None,
    reward_weights: dict[str, float] | None = None,
    held_out_reward: str | None = None,
) -> int:
    """Train a model on its own answers to prompts, by a reward: PPO, RLOO, GRPO or online DPO.

    Args:
        reward: a reward model's folder, module:function or the URL of a server; several as
            {name: folder}, whose weighted scores are added.
        reward_weights: weight of each of several rewards; null is 1 for each.
        held_out_reward: one more, which is only watched.
    """
    import torch

    from prefopt import loading
    from prefopt.data.prompts import load_prompts
    from prefopt.online import train_ppo
    from prefopt.online_plan import plan_prompts
    from prefopt.prepare import find_checkpoint
    from prefopt.rundir import RunDir
    from prefopt.stop import Stopped, StopSignal

    if reward is None:
        raise InputError("ppo needs --reward: a reward model's folder, module:function or a URL")
    if setup.quiet:
        logging.getLogger("prefopt").setLevel(logging.WARNING)
    quiet_transformers()
    RunDir(Path(online.out), resuming=online.resume is not None)
    find_checkpoint(online)
    loading.resolve(setup.model)
    try:
        with StopSignal(at_once=True):
            prompts = load_data(setup, load_prompts)
            torch.manual_seed(online.seed)  # the adapter's A is drawn from it
            policy = load_policy(setup.model, setup.lora, setup.dtype, setup.device, setup.quantize)
    except Stopped:
        say("stopped before training")
        return 0
    if not setup.quiet or setup.dry_run:
        describe(policy, setup.lora)
    if setup.dry_run:
        show_online(plan_prompts(policy, prompts, online), online)
        return 0
    adapted = {"lora": setup.lora if policy.lora_report else None}
    recorded = dataclasses.asdict(dataclasses.replace(setup, **adapted))
    recorded |= {"reward": reward, "reward_weights": reward_weights}
    recorded |= {"held_out_reward": held_out_reward}
    for key in ("dry_run", "quiet"):
        recorded.pop(key)
    run = train_ppo(
        policy, prompts, reward, online, reward_weights=reward_weights,
        held_out_reward=held_out_reward, quiet=setup.quiet, settings=recorded,
    )  # fmt: skip
    if not setup.quiet:
        finish(run)
    return 0


def show_online(plan, config: PPOConfig) -> None:
    """What a run would do."""
    samples = config.batch_size * config.n
    steps = config.ppo_epochs * config.minibatches
    say(f"{len(plan.train):,} prompts to train on, {len(plan.held_out):,} held out")
    for name, count in plan.notes["encoding"].items():
        if name == "prompts without room" and count:
            say(f"left out {count:,}: no room for {config.max_new_tokens} new tokens")
    say(
        f"{plan.updates:,} updates of {samples:,} samples ({config.batch_size} prompts, {config.n} "
        f"each) and {steps} optimizer steps; estimator {config.estimator}, loss {config.loss}"
    )
    say(f"run folder {config.out} (not written: --dry_run)")
