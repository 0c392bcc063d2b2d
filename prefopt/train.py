"""The training loop: when to step, evaluate, save and log.

Everything a run does is decided by (data, configuration, seed) and a step number, so resuming at a
step means recomputing the plan and loading the tensors; no iterator is ever saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt import checkpoint, moving
from prefopt.config import TrainConfig, default_cache
from prefopt.data.packing import Batch, pack
from prefopt.errors import InputError
from prefopt.evaluate import evaluate
from prefopt.flops import useful_flops
from prefopt.metrics import Meter, MetricsLog, Progress, gemm_rate, peak_memory_bytes, read_metrics
from prefopt.optim import lr_factor, make_optimizer, make_scaler, warmup_steps
from prefopt.policy import Policy
from prefopt.prepare import (
    Plan,
    fill_cache,
    find_checkpoint,
    make_plan,
    order_of,
    read_checkpoint,
    step_groups,
)
from prefopt.reference import ReferenceCache
from prefopt.rundir import RunDir
from prefopt.step import optimizer_step
from prefopt.stop import Stopped, StopSignal

FINISH_ITEMS = 500  # training items that an objective's finish() sees

_log = logging.getLogger("prefopt")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or stopped run: its folder and the rows of its metrics.jsonl."""

    dir: Path
    stopped: bool = False

    @property
    def metrics(self) -> list[dict[str, Any]]:
        path = self.dir / "metrics.jsonl"
        return read_metrics(path)[0] if path.exists() else []

    def report(self) -> Path:
        """Write report.html anew and return its path."""
        from prefopt.report import write_report

        return write_report(self.dir)


def train(
    objective: Any,
    policy: Policy,
    data: Sequence[Any],
    config: TrainConfig,
    *,
    quiet: bool = False,
    settings: dict[str, Any] | None = None,
) -> Run:
    """Train ``policy`` by ``objective`` on its records and write the run folder ``config.out``.

    DPO, KTO and Reward take Pairs, SFT Dialogues, Reward also Rankings. Encodes, holds out prompts,
    computes the reference log-probs that are not on disk yet, trains, evaluates, saves.
    ``settings`` is what config.yaml records besides ``config``. SIGTERM and the first Ctrl-C save a
    checkpoint and return a Run with ``stopped``; a finished run that is resumed with "auto" is
    returned as it is. Raises InputError for bad input, before anything is written to
    ``config.out``, and FloatingPointError for a loss that is not finite.
    """
    run = RunDir(Path(config.out), resuming=config.resume is not None)
    if config.resume == "auto" and run.finished:
        _log.info("%s is finished", run.dir)
        return Run(run.dir)
    resume_from = find_checkpoint(config)
    with Progress(quiet=quiet) as progress, StopSignal(at_once=True) as stop:
        try:
            plan = make_plan(objective, policy, data, config)
            stop.at_once = False
            loop = _Loop(objective, policy, plan, config, run, progress, stop)
            loop.prepare(resume_from)
        except Stopped:  # what was computed is in the cache
            return Run(run.dir, stopped=True)
        run.start({**plan.notes, "reference": loop.cache_notes()}, config, settings or {})
        try:
            loop.run(resumed=resume_from is not None)
        except Stopped:
            loop.save_stopped()
            return Run(run.dir, stopped=True)
        finally:
            with contextlib.suppress(InputError):  # the folder was taken away: the cause is shown
                run.report()
    return Run(run.dir)


class _Loop:
    def __init__(self, objective, policy, plan: Plan, config, run: RunDir, progress, stop):
        if config.ref_sync_steps and not objective.needs_reference:
            raise InputError(f"ref_sync_steps moves a reference, and {objective.name} has none")
        self.objective, self.policy, self.plan, self.config = objective, policy, plan, config
        self.run_dir, self.progress, self.stop = run, progress, stop
        torch.manual_seed(config.seed)
        policy.use_float32_masters()
        if config.gradient_checkpointing:
            policy.checkpoint_activations()
        lr = config.lr or (2e-4 if policy.adapter else 1e-5)
        groups = policy.parameter_groups(lr, config.lora_plus)
        self.optimizer = make_optimizer(groups, lr, weight_decay=config.weight_decay)
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        names = {id(p): name for name, p in policy.trainable()}
        self.names = [names[id(p)] for group in groups for p in group["params"]]
        self.scaler = make_scaler(policy.autocast or policy.dtype, policy.device)
        self.cache = ReferenceCache(config.cache or default_cache())
        self.key: dict[str, str] = {}
        self.following = moving.copy_weights(policy.trainable()) if config.ref_sync_steps else {}
        self.log, self.meter = MetricsLog(run.dir / "metrics.jsonl"), Meter()
        self.step = self.saved = 0
        self.evaluated: set[int] = set()  # steps
        self.elapsed = 0.0

    def prepare(self, resume_from: Path | None) -> None:
        """All that can find the input wrong; nothing of it is written to the run folder."""
        self.key = self.policy.reference_key()
        saved = None
        if resume_from:
            order = order_of(self.plan, self.config)
            saved = read_checkpoint(resume_from, order, self.key, self.policy)
        if self.objective.needs_reference:
            fill_cache(
                self.cache, self.policy, self.plan, self.config, self.key, self.progress, self.stop
            )
        if saved:  # not before: without an adapter the reference is these weights' starting point
            self._restore(*saved)

    def cache_notes(self) -> dict[str, int]:
        """How many reference passes this run made, and how many responses were on disk."""
        return {
            "forward passes": self.cache.forwards,
            "responses on disk": self.cache.hits,
            "responses computed": self.cache.misses,
        }

    def run(self, *, resumed: bool) -> None:
        plan, config = self.plan, self.config
        self.log.truncate_after(self.step if resumed else -1)
        if resumed:
            rows = read_metrics(self.log.path)[0] if self.log.path.exists() else []
            self.evaluated = {row["step"] for row in rows if "eval_loss" in row}
            self.elapsed = max((row.get("elapsed_s") or 0.0 for row in rows), default=0.0)
        else:
            self._evaluate("before")
            self._sample("before")
        self._train()
        if plan.steps % (config.eval_every or plan.steps) or not config.eval_every:
            self._evaluate("after")
        self._sample("after")
        if hasattr(self.objective, "finish"):
            self.objective.finish(self.policy, self._batches(plan.train[:FINISH_ITEMS]))
        self.run_dir.save_model(self.policy)

    def _train(self) -> None:
        config, plan = self.config, self.plan
        warmup = warmup_steps(config.warmup, plan.steps)
        self.policy.train()
        clock, work = time.perf_counter(), {"tokens": 0, "flops": 0.0}
        groups = step_groups(plan.encoded, plan.train, config)
        self.progress.phase("train", plan.steps)
        for step, (epoch, group) in enumerate(groups, 1):
            if step > plan.steps:
                break
            if step < self.step:
                continue
            if step == self.step:  # the stop may have come before its evaluation was done
                self._due(step, epoch)
                continue
            self.stop.check()
            factor = lr_factor(step - 1, plan.steps, warmup=warmup, schedule=config.schedule)
            for param_group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
                param_group["lr"] = peak * factor
            batches = list(self._with_reference(self._batches(group), follow=True))
            stats = optimizer_step(
                self.policy, self.objective, batches, self.optimizer,
                max_norm=config.max_norm, scaler=self.scaler,
            )  # fmt: skip
            self.step = step
            if config.ref_sync_steps and step % config.ref_sync_steps == 0:
                moving.move(self.following, self.policy.trainable(), config.ref_sync_alpha)
                self.policy.moved = self.following
            self.meter.add({"loss": stats.loss * stats.count, **stats.metrics}, stats.count)
            if stats.applied:
                self.meter.add({"grad_norm": stats.grad_norm}, 1)
            if self.scaler:
                self.meter.add({"skipped": 1.0 - stats.applied}, 1)
            work["tokens"] += sum(len(b.input_ids) for b in batches)
            work["flops"] += sum(useful_flops(self.policy, b, backward=True) for b in batches)
            if step % config.log_every == 0 or step == plan.steps:
                row = {"step": step, "epoch": epoch, **self.meter.flush()}
                row["learning_rate"] = self.peak_lrs[0] * factor
                row.update(self._speed(work, time.perf_counter() - clock))
                self.log.write(row)
                self.progress.update(step, row)
                clock, work = time.perf_counter(), {"tokens": 0, "flops": 0.0}
            self._due(step, epoch)

    def _due(self, step: int, epoch: float) -> None:
        """Evaluate and save where this step is one for it."""
        config, last = self.config, step == self.plan.steps
        if config.eval_every:
            due = step % config.eval_every == 0
        else:
            due = epoch == int(epoch) and not last
        if due:
            self._evaluate("after" if last else "during")
            self.progress.phase("train", self.plan.steps)
        if config.save_every and step % config.save_every == 0 and not last and step > self.saved:
            self._save()

    def _speed(self, work: dict[str, float], seconds: float) -> dict[str, float]:
        device, dtype = self.policy.device, self.policy.autocast or self.policy.dtype
        row = {"tokens_per_s": work["tokens"] / seconds}
        row["flop_utilization"] = work["flops"] / seconds / gemm_rate(device, dtype)
        self.elapsed += seconds
        row["elapsed_s"] = self.elapsed
        peak = peak_memory_bytes(device)
        return row if peak is None else {**row, "peak_memory_bytes": peak}

    # -- batches and the reference

    def _batches(self, indices: list[int]) -> Iterator[Batch]:
        items = (self.plan.encoded[i] for i in indices)
        return pack(
            items,
            max_tokens=self.config.micro_tokens,
            layout=self.policy.layout,
            ends=self.objective.ends,
        )

    def _with_reference(self, batches: Iterator[Batch], follow: bool = False) -> Iterator[Batch]:
        """With the starting policy's log-probs; ``follow``: those of the reference where it is now,
        which are of no use after its next move, so they are not kept on disk."""
        for batch in batches:
            if not self.objective.needs_reference:
                yield batch
                continue
            if follow and self.policy.moved is not None:
                with self.policy.reference(), torch.no_grad():
                    ref = self.policy(batch.to(self.policy.device))
            else:
                (ref,) = self.cache.logprobs(self.policy, [batch], key=self.key)
            yield dataclasses.replace(batch, ref_logprobs=ref)

    # -- evaluation, samples, checkpoints

    def _evaluate(self, stage: str) -> None:
        held_out = self.plan.held_out
        if not held_out or self.step in self.evaluated:
            return
        self.progress.phase("evaluate", len(held_out))
        batches = self._with_reference(self._batches(held_out))
        result = evaluate(
            self.policy, batches, self.objective, on_batch=lambda _: self.stop.check()
        )
        self.progress.update(len(held_out))
        row = {f"eval_{k}": v for k, v in result.metrics.items()}
        ends = (f"{name}_{end}" for name in ("accuracy", "perplexity") for end in ("low", "high"))
        known = ((key, result.summary.get(key)) for key in ends)
        interval = {f"eval_{key}": value for key, value in known if value is not None}
        self.run_dir.add_evaluation(stage, {**result.summary, **result.metrics})
        self.log.write({"step": self.step, **row, **interval})
        self.evaluated.add(self.step)

    def _sample(self, stage: str) -> None:
        if not self.plan.prompts:
            return
        self.stop.check()
        self.progress.phase("sample", 1)
        answers = self.policy.generate(
            self.plan.prompts,
            max_new_tokens=self.config.sample_tokens,
            template=self.config.template,
        )
        self.progress.update(1)
        self.run_dir.add_samples(self.step, stage, self.plan.prompts, answers)

    def _save(self) -> None:
        tensors, state = checkpoint.optimizer_tensors(self.optimizer, self.names)
        groups = {
            "weights": {name: p.detach() for name, p in self.policy.resumable()},
            "optimizer": tensors,
            "rng": checkpoint.rng_state(),
            **({"reference": self.following} if self.following else {}),
        }
        saved = {
            "step": self.step,
            "optimizer": state,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "meter": self.meter.state(),
            "reference": self.key,
            "reference moved": self.policy.moved is not None,
            "order": order_of(self.plan, self.config),
        }
        root = self.run_dir.dir / "checkpoints"
        checkpoint.save_checkpoint(root, self.step, groups, saved, keep=self.config.keep)
        self.saved = self.step

    @torch.no_grad()
    def _restore(self, groups: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        for name, p in self.policy.resumable():
            p.copy_(groups["weights"][name])
        for name, value in self.following.items():
            value.copy_(groups["reference"][name])
        self.policy.moved = self.following if state.get("reference moved") else None
        checkpoint.load_optimizer(
            self.optimizer, self.names, groups["optimizer"], state["optimizer"]
        )
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        checkpoint.set_rng_state(groups["rng"])
        self.meter.restore(state["meter"])
        self.step = self.saved = state["step"]

    def save_stopped(self) -> None:
        if self.step > self.saved:
            self._save()
