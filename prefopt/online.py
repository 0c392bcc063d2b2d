"""Online reinforcement learning: `train_ppo`, and how a run is put together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from prefopt import moving
from prefopt.collect import Collector
from prefopt.data.prompts import Prompts, load_prompts
from prefopt.data.records import Message
from prefopt.errors import InputError
from prefopt.learner import Learner
from prefopt.nn.adapted import adapted_modules
from prefopt.online_config import PPOConfig
from prefopt.online_loop import Loop
from prefopt.online_plan import plan_prompts
from prefopt.online_state import restore
from prefopt.online_table import OnlineTable
from prefopt.policy import ADAPTER
from prefopt.prepare import find_checkpoint
from prefopt.rewards import Reward, check_columns, load_rewards
from prefopt.roles import make_critic
from prefopt.rollout.torch_engine import TorchEngine
from prefopt.rollout.types import RolloutEngine
from prefopt.rundir import RunDir
from prefopt.stop import Stopped, StopSignal
from prefopt.train import Run

_log = logging.getLogger("prefopt")


def train_ppo(
    policy: Any,
    prompts: Sequence[list[Message]] | Sequence[str],
    reward: Reward | str | Path | Mapping[str, Reward | str],
    config: PPOConfig,
    *,
    reward_weights: Mapping[str, float] | None = None,
    held_out_reward: Reward | str | Path | None = None,
    quiet: bool = False,
    settings: dict[str, Any] | None = None,
) -> Run:
    """Train ``policy`` on its own answers to ``prompts`` and write the run folder ``config.out``.

    ``prompts``: texts (user turns), message lists, or what load_prompts gives.
    ``reward``: a callable (prompts, responses) -> scores, the name of one (module:function, a
    reward model's folder, a URL), or several by name, weighed by ``reward_weights``.
    ``held_out_reward`` is only watched: a score that rises while it falls is being gamed. SIGTERM
    and the first Ctrl-C save a checkpoint and return a Run with ``stopped``. Raises InputError for
    bad input and for a reward that fails, after a checkpoint, and FloatingPointError for a loss
    that is not finite.
    """
    run = RunDir(Path(config.out), resuming=config.resume is not None)
    if config.resume == "auto" and run.finished:
        _log.info("%s is finished", run.dir)
        return Run(run.dir)
    resume_from = find_checkpoint(config)
    try:
        with StopSignal(at_once=True):  # nothing is written yet
            rewards = reward, reward_weights, held_out_reward
            loop = _make_loop(policy, prompts, rewards, config, run)
            if resume_from is not None:
                restore(loop, resume_from)
                loop.saved = loop.place
    except Stopped:
        return Run(run.dir, stopped=True)
    plan = loop.plan
    run.start(plan.notes, config, settings or {})
    with OnlineTable(plan.updates, start=loop.update, quiet=quiet) as table, StopSignal() as stop:
        loop.table, loop.stop = table, stop
        try:
            loop.run(resumed=resume_from is not None)
        except Stopped:
            loop.save_stopped()
            return Run(run.dir, stopped=True)
        except InputError as error:  # of a reward, mostly
            loop.save_stopped()
            raise InputError(
                f"{error}; what was learnt so far is in {run.dir}: --resume auto goes on from it"
            ) from error
        finally:
            with contextlib.suppress(InputError):
                run.report()
    return Run(run.dir)


def _make_loop(
    policy: Any,
    prompts: Sequence[list[Message]] | Sequence[str],
    asked: tuple[Any, Mapping[str, float] | None, Any],
    config: PPOConfig,
    run: RunDir,
) -> Loop:
    """All that a run is made of; ``asked``: reward, weights and held-out reward of train_ppo."""
    _prepare(policy, config)
    reward, weights, held_out = asked
    where = {"device": str(policy.device), "share": policy}
    rewards = load_rewards(reward, weights, **where)
    watched = {} if held_out is None else load_rewards({"held_out_reward": held_out}, **where)
    if not isinstance(prompts, Prompts) and len(prompts) and isinstance(prompts[0], str):
        prompts = load_prompts(list(prompts))
    for some in (rewards, watched):
        check_columns(some, getattr(prompts, "names", ()), tokens=True)
    plan = plan_prompts(policy, cast("Sequence[list[Message]]", prompts), config)
    key = policy.reference_key()  # before anything trains
    critic = make_critic(policy, config, rewards) if config.has_critic else None
    learner = Learner(policy, critic, config)
    engine = make_engine(policy, config)
    collector = Collector(policy, critic, engine, rewards, weights, watched, config)
    return Loop(plan, collector, learner, config, key, run)


def _prepare(policy: Any, config: PPOConfig) -> None:
    """The policy as it trains; InputError for what would make its log-probs random."""
    if policy.is_reward_model:
        raise InputError(f"{policy.base} is a reward model, which writes no text")
    modules = [m for _, m in adapted_modules(policy.model)]
    dropout = max((m.configs[ADAPTER].dropout for m in modules if ADAPTER in m.configs), default=0)
    if dropout:
        raise InputError(
            f"lora.dropout is {dropout}: with dropout the policy that learns is never the one that "
            "sampled; set it to 0"
        )
    torch.manual_seed(config.seed)
    policy.use_float32_masters()
    if config.gradient_checkpointing:
        policy.checkpoint_activations()
    if policy.adapter is None and config.kl.beta:
        policy.moved = moving.copy_weights(policy.trainable())  # the reference stays here


def make_engine(policy: Any, config: PPOConfig) -> RolloutEngine:
    if config.engine == "torch":
        return TorchEngine(policy, slots=config.slots)
    from prefopt.rollout.continuous import ContinuousEngine

    return ContinuousEngine(policy, slots=config.slots)
