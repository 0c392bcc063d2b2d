"""Online reinforcement learning: sample, score, learn, over and over.

What an update samples follows from the weights, the configuration and its number. A checkpoint
between two optimizer steps of an update therefore holds the samples that are being learnt from, and
how far; one between two updates holds none. Either way a resumed run goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from prefopt import moving
from prefopt.collect import HELD_OUT, ROLLOUT, Collector
from prefopt.data.prompts import Prompts, columns_of, load_prompts
from prefopt.data.records import Message
from prefopt.errors import InputError
from prefopt.experience import Experience
from prefopt.learner import Learner
from prefopt.metrics import MetricsLog, peak_memory_bytes, read_metrics
from prefopt.nn.adapted import adapted_modules
from prefopt.online_checks import Watch, repetition
from prefopt.online_config import PPOConfig
from prefopt.online_plan import PromptPlan, minibatches, plan_prompts, update_groups
from prefopt.online_state import Update, restore, save
from prefopt.online_table import OnlineTable
from prefopt.optim import lr_factor, warmup_steps
from prefopt.policy import ADAPTER
from prefopt.prepare import find_checkpoint
from prefopt.rewards import Reward, check_columns, load_rewards
from prefopt.rl import AdaptiveKL, explained_variance
from prefopt.roles import make_critic, save_critic
from prefopt.rollout.torch_engine import TorchEngine
from prefopt.rollout.types import RolloutEngine
from prefopt.rundir import RunDir
from prefopt.stats import bootstrap_ci
from prefopt.stop import Stopped, StopSignal
from prefopt.train import Run

EVALUATED = {  # name in a row of training -> in one of an evaluation, behind eval_
    "objective/scores": "scores",
    "objective/held_out_scores": "held_out_scores",
    "objective/kl": "kl",
    "lengths/mean": "lengths",
    "lengths/stop_rate": "stop_rate",
}

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


class Loop:
    """A run on its way: ``update`` of ``plan.updates`` are complete, ``pending`` is in work."""

    def __init__(
        self,
        plan: PromptPlan,
        collector: Collector,
        learner: Learner,
        config: PPOConfig,
        key: dict[str, str],
        run: RunDir,
    ):
        self.plan, self.collector, self.learner, self.config = plan, collector, learner, config
        self.run_dir, self.table, self.stop = (
            run,
            OnlineTable(plan.updates, quiet=True),
            StopSignal(),
        )
        self.policy, self.key = learner.policy, key
        self.beta = AdaptiveKL(config.kl.beta, config.kl.target, config.kl.horizon)
        self.watch = Watch(
            dtype=str(learner.policy.autocast or learner.policy.dtype), kl_target=config.kl.target
        )
        self.update, self.pending = 0, None
        self.saved = (-1, -1)  # (update, steps of the pending one) of the last checkpoint
        self.elapsed = 0.0
        self.log, self.samples, self.alarms = (
            MetricsLog(run.dir / f"{name}.jsonl") for name in ("metrics", "samples", "alarms")
        )
        every = config.eval_every or max(1, math.ceil(plan.updates / 2))
        self.evaluations = {*range(0, plan.updates, every), plan.updates}  # after these updates
        self.evaluated: set[int] = set()

    def run(self, *, resumed: bool) -> None:
        for log in (self.log, self.samples, self.alarms):
            log.truncate_after(self.update if resumed else -1)
        if resumed and self.log.path.exists():
            rows = read_metrics(self.log.path)[0]
            self.evaluated = {row["step"] for row in rows if "eval_scores" in row}
            self.elapsed = max((row.get("elapsed_s") or 0.0 for row in rows), default=0.0)
        groups = islice(update_groups(self.plan.train, self.config), self.update, self.plan.updates)
        self.evaluate_due()
        for number, (epoch, numbers) in enumerate(groups, self.update + 1):
            if self.pending is None:
                self.pending = self.collect(number, epoch, numbers)
            self.learn(self.pending)
            self.finish(self.pending)
            self.evaluate_due()
            if self.config.save_every and number % self.config.save_every == 0:
                self.save()
        if self.learner.critic is not None:
            save_critic(self.learner.critic, self.run_dir.dir / "critic")
        self.run_dir.save_model(self.policy)  # last: with a model the run is finished

    # -- one update

    def collect(self, number: int, epoch: float, numbers: list[int]) -> Update:
        """Sample, score and price; nothing of the run's state changes before all of it is there."""
        config, collector, began = self.config, self.collector, time.perf_counter()
        exp, texts = self.sample(numbers, [number << 32 | i for i in numbers], ROLLOUT, config.n)
        row: dict[str, float] = {"seconds/generate": time.perf_counter() - began}
        row["generate_tokens_per_s"] = int(exp.mask.sum()) / row["seconds/generate"]

        began = time.perf_counter()
        self.table.phase("score", len(texts))
        asked = [self.plan.prompts[i] for i in numbers for _ in range(config.n)]
        row |= collector.judge(exp, asked, texts, self.columns(numbers, config.n))
        self.stop.check()
        collector.read(exp, minibatches(len(exp.groups), number, 0, config))
        row |= collector.price(exp, self.beta.beta)
        row |= collector.figures(exp, self.beta.beta)
        row["repetition"] = repetition([r for group in exp.groups for r in group.responses])
        row["seconds/score"] = time.perf_counter() - began
        return Update(number, epoch, numbers, exp, row)

    def sample(self, numbers: Sequence[int], keys: Sequence[int], place: int, n: int) -> Any:
        phase = "generate" if place == ROLLOUT else "evaluate"
        self.table.phase(phase, len(numbers) * n)

        def on_sample(done: int) -> None:
            self.table.update(done)
            self.stop.check()

        ids: Any = [self.plan.ids[i] for i in numbers]
        return self.collector.sample(ids, keys, place, n, on_sample)

    def columns(self, numbers: Sequence[int], n: int) -> dict[str, list[Any]]:
        """The other columns of the prompts' rows, a value for each of n responses."""
        found = columns_of(self.plan.prompts, numbers)
        return {name: [v for v in values for _ in range(n)] for name, values in found.items()}

    def learn(self, update: Update) -> None:
        """The optimizer steps of an update that are not taken yet."""
        config, exp = self.config, update.exp
        warmup = warmup_steps(config.warmup, self.plan.updates)
        factor = lr_factor(
            update.number - 1, self.plan.updates, warmup=warmup, schedule=config.schedule
        )
        for side in self.learner.sides.values():
            side.scale_lr(factor)
        update.row["learning_rate"] = self.learner.side.peaks[0] * factor
        self.learner.set_beta(self.beta.beta)
        began = time.perf_counter()
        steps = [
            places
            for epoch in range(config.ppo_epochs)
            for places in minibatches(len(exp.groups), update.number, epoch, config)
        ]
        self.table.phase("train", len(steps))
        warming_up = update.number <= config.critic_warmup
        for at in range(update.done, len(steps)):
            self.stop.check()
            row = self.learner.step(exp, steps[at], warming_up=warming_up)
            update.add(row)
            self.table.update(at + 1)
            far = config.early_stop_kl is not None and (
                row.get("policy/approxkl", 0.0) > config.early_stop_kl
            )
            update.done = len(steps) if far else at + 1
            if far:
                break
        update.row["seconds/train"] = (
            update.row.get("seconds/train", 0.0) + time.perf_counter() - began
        )

    def finish(self, update: Update) -> None:
        """Log the update, move beta, and be done with it."""
        exp, row = update.exp, {"step": update.number, "epoch": update.epoch, **update.figures}
        row["episodes"] = update.number * self.config.batch_size * self.config.n
        row |= self.collector.gap(exp)
        if "returns" in exp.columns:
            row["value/explained_variance"] = explained_variance(
                exp.columns["values"], exp.columns["returns"], exp.mask
            )
        tokens = int(exp.mask.sum())
        row["train_tokens_per_s"] = tokens / row["seconds/train"]
        self.elapsed += sum(row[f"seconds/{name}"] for name in ("generate", "score", "train"))
        row["elapsed_s"] = self.elapsed
        peak = peak_memory_bytes(self.policy.device)
        if peak is not None:
            row["peak_memory_bytes"] = peak
        self.log.write(row)
        self.update, self.pending = update.number, None
        self.write_samples("train", update.numbers, exp)
        for finding in self.watch.update(row):
            self.alarms.write(finding._asdict())
            self.table.say(f"{finding.message} {finding.remedy}")
        self.table.row(row)
        if "objective/kl" in row:
            self.beta.update(row["objective/kl"], len(exp.scores))

    # -- evaluation, samples, checkpoints

    def evaluate_due(self) -> None:
        """One answer to each held-out prompt, always from the same noise."""
        numbers = self.plan.held_out[: self.config.eval_prompts]
        if not numbers or self.update in self.evaluated or self.update not in self.evaluations:
            return
        stage = {0: "before", self.plan.updates: "after"}.get(self.update, "during")
        exp, texts = self.sample(numbers, numbers, HELD_OUT, 1)
        prompts = [self.plan.prompts[i] for i in numbers]
        judged = self.collector.judge(exp, prompts, texts, self.columns(numbers, 1))
        self.collector.read(exp, [range(len(numbers))], only_reference=True)
        row = {**judged, **self.collector.figures(exp, self.beta.beta)}
        values = {short: row[name] for name, short in EVALUATED.items() if name in row}
        low, high = bootstrap_ci(exp.scores.numpy())
        if math.isfinite(low):
            values |= {"scores_low": low, "scores_high": high}
        self.run_dir.add_evaluation(stage, {"n": len(numbers), "step": self.update, **values})
        self.log.write({"step": self.update, **{f"eval_{k}": v for k, v in values.items()}})
        self.write_samples(stage, numbers, exp)
        self.evaluated.add(self.update)

    def write_samples(self, stage: str, numbers: Sequence[int], exp: Experience) -> None:
        """The first answers of an update or an evaluation, for people."""
        shown = range(min(self.config.samples, len(numbers)))
        for row in self.collector.shown(exp, [self.plan.prompts[numbers[i]] for i in shown]):
            self.samples.write({"step": self.update, "stage": stage, **row})

    def save(self) -> None:
        save(self)
        self.saved = self.place

    @property
    def place(self) -> tuple[int, int]:
        return self.update, self.pending.done if self.pending else 0

    def save_stopped(self) -> None:
        if self.place != self.saved:
            self.save()
