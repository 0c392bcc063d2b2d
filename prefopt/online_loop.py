"""One run of online reinforcement learning on its way: update by update, and what is written of it.

What an update samples follows from the weights, the configuration and its number. A checkpoint
between two optimizer steps of an update therefore holds the samples that are being learnt from, and
how far; one between two updates holds none. Either way a resumed run goes on bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from prefopt.collect import HELD_OUT, ROLLOUT, Collector
from prefopt.data.prompts import columns_of
from prefopt.experience import Experience
from prefopt.learner import Learner
from prefopt.metrics import MetricsLog, peak_memory_bytes, read_metrics
from prefopt.online_checks import Watch, repetition
from prefopt.online_config import PPOConfig
from prefopt.online_plan import PromptPlan, minibatches, update_groups
from prefopt.online_state import Update, save
from prefopt.online_table import OnlineTable
from prefopt.optim import lr_factor, warmup_steps
from prefopt.rl import AdaptiveKL, explained_variance
from prefopt.roles import save_critic
from prefopt.rundir import RunDir
from prefopt.stats import bootstrap_ci
from prefopt.stop import StopSignal

EVALUATED = {  # name in a row of training -> in one of an evaluation, behind eval_
    "objective/scores": "scores",
    "objective/held_out_scores": "held_out_scores",
    "objective/kl": "kl",
    "lengths/mean": "lengths",
    "lengths/stop_rate": "stop_rate",
}


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
