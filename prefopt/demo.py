"""`prefopt demo`: the whole way on the tiny model in the package, in a minute or two of CPU.

Its assistant was pretrained on answers of both kinds, helpful and polite as well as curt, wrong,
rude or unsafe, about equally often. Imitating the better answers, DPO on pairs of the two, and PPO
on answers of its own change which of them it gives; a reward model trained on the same pairs is
what PPO learns from, and says by how much.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefopt import durable, loading
from prefopt.config import TrainConfig
from prefopt.data.audit.doctor import examine
from prefopt.data.prompts import load_prompts
from prefopt.data.records import Message
from prefopt.data.sources import load_preferences
from prefopt.errors import InputError
from prefopt.metrics import format_duration
from prefopt.nn.lora import LoraConfig
from prefopt.objectives.dpo import DPO
from prefopt.objectives.reward import Reward
from prefopt.objectives.sft import SFT
from prefopt.online import train_ppo
from prefopt.online_config import KLConfig, PPOConfig
from prefopt.policy import Generation, Policy
from prefopt.report import write_report
from prefopt.rewards import load_reward
from prefopt.rundir import RunDir
from prefopt.train import train

SETTINGS: dict[str, Any] = {"max_length": 256, "save_every": 0, "samples": 0}
SFT_STEPS, BETA, PPO_UPDATES = 40, 0.1, 32


@dataclass
class Demo:
    """Where its runs go, and what the stages so far took and said."""

    folder: Path
    max_steps: int | None
    say: Callable[..., None]
    stages: list[dict[str, Any]]

    def stage(self, name: str, work: Callable[[], str]) -> None:
        """Do it, print its heading and result, and keep time and result for the report."""
        self.say(f"{len(self.stages) + 1}. {name}", "bold")
        began = time.monotonic()
        result = work()
        self.say(f"   {result}", "green")
        row = {"stage": name, "seconds": time.monotonic() - began, "result": result}
        self.stages.append(row)

    def run(self, name: str, objective: Any, policy: Policy, data: Any, **changes: Any) -> Any:
        """Train into a folder of its own; its evaluation before and after, None when stopped."""
        limits = [n for n in (changes.pop("max_steps", None), self.max_steps) if n]
        steps = min(limits, default=None)
        config = TrainConfig(
            str(self.folder / name), max_steps=steps, cache=str(self.folder / "reference"),
            **{**SETTINGS, **changes},
        )  # fmt: skip
        recorded: dict[str, Any] = {"model": "embedded" if name == "sft" else "embedded after SFT"}
        recorded |= {"data": "embedded"}
        recorded |= {"loss": "dpo", "beta": BETA} if name == "dpo" else {}
        return self.result(train(objective, policy, data, config, settings=recorded))

    def ppo(self, policy: Policy, prompts: Any, reward: Path) -> Any:
        """Online, into a folder of its own; its evaluation before and after."""
        steps = min(PPO_UPDATES, self.max_steps or PPO_UPDATES)
        config = PPOConfig(
            str(self.folder / "ppo"), max_steps=steps, save_every=0, max_length=256,
            max_new_tokens=48, batch_size=32, lr=2e-3, kl=KLConfig(beta=0.05), epochs=2,
            eval_prompts=32, missing_stop_penalty=1.0, samples=0,
        )  # fmt: skip
        recorded = {"model": "embedded after SFT", "data": "embedded", "reward": str(reward)}
        return self.result(train_ppo(policy, prompts, reward, config, settings=recorded))

    def result(self, run: Any) -> Any:
        if run.stopped:
            raise _Stopped
        return json.loads((run.dir / "evaluation.json").read_text())


class _Stopped(Exception):
    pass


def run_demo(out: str | None, max_steps: int | None, say) -> int:
    """Data check, SFT, reward model, DPO, PPO; the same prompts on the way. ``say``: a line."""
    began = time.monotonic()
    folder = Path(out) if out else _new_folder(Path("runs"))
    for name in ("sft", "reward", "dpo", "ppo"):
        RunDir(folder / name, resuming=False)
    demo = Demo(folder, max_steps, say, [])
    try:
        answers = _stages(demo)
    except _Stopped:
        say("stopped")
        return 0
    book = RunDir(folder / "ppo", resuming=True)
    prompts = _prompts()
    for step, stage in enumerate(answers):
        place = {0: "before", len(answers) - 1: "after"}.get(step, stage)
        book.add_samples(step, place, prompts, answers[stage])
    lines = "".join(json.dumps(row) + "\n" for row in demo.stages)
    durable.write_bytes(folder / "ppo" / "stages.jsonl", lines.encode())

    say("the same prompts on the way", "bold")
    for i, prompt in enumerate(prompts):
        say(f"   > {prompt[-1].content}", "dim")
        for stage, given in answers.items():
            say(f"     {stage + ':':<10} {_shown(given[i])}", "green" if stage == "PPO" else None)
    say(f"{format_duration(time.monotonic() - began)}; report: {write_report(folder / 'ppo')}")
    return 0


def _stages(demo: Demo) -> dict[str, list[Generation]]:
    """All of it, in order; the answers to the demo's prompts by stage."""
    rows = str(loading.EMBEDDED / "preferences.jsonl.gz")
    prompts, known, answers = _prompts(), {}, {}

    def check() -> str:
        known["pairs"] = load_preferences(rows)
        known["pairs"].report.source = "embedded"
        report = known["pairs"].report
        tokenizer = loading.load_tokenizer(loading.resolve("embedded").base)
        findings = examine(known["pairs"], tokenizer, max_length=SETTINGS["max_length"]).findings
        wrong = [f"{f.check} ({f.count})" for f in findings if f.severity != "info"]
        looks = ", ".join(wrong) or "nothing wrong with them"
        return f"{report.kept:,} preference pairs ({report.schema}): {looks}"

    def sft() -> str:
        policy = _policy("embedded", lora=None)
        answers["start"] = policy.generate(prompts, max_new_tokens=48)
        found = demo.run("sft", SFT(), policy, known["pairs"], max_steps=SFT_STEPS, lr=2e-4)
        answers["SFT"] = policy.generate(prompts, max_new_tokens=48)
        old, new = (found[stage]["perplexity"] for stage in ("before", "after"))
        return f"perplexity of the better answers, held out: {old:.2f} before, {new:.2f} after"

    def reward() -> str:
        policy = _policy(demo.folder / "sft", lora=LoraConfig(), head="score")
        found = demo.run("reward", Reward(center=0.01), policy, known["pairs"], lr=3e-4)["after"]
        return (
            f"tells the better answer in {_share(found)}; its confidence is off by "
            f"{found['calibration']['ece']:.1%}"
        )

    def dpo() -> str:
        policy = _policy(demo.folder / "sft", lora=LoraConfig())
        found = demo.run("dpo", DPO(beta=BETA), policy, known["pairs"], lr=3e-4)
        answers["DPO"] = policy.generate(prompts, max_new_tokens=48)
        before, after = found["before"], found["after"]
        return (
            f"the better answer was the likelier one in {before['logps/accuracies']:.0%}, now "
            f"{after['logps/accuracies']:.0%}; preferred more than before in {_share(after)}"
        )

    def ppo() -> str:
        policy = _policy(demo.folder / "sft", lora=LoraConfig())
        asked = load_prompts(known["pairs"])
        found = demo.ppo(policy, asked, demo.folder / "reward")
        answers["PPO"] = policy.generate(prompts, max_new_tokens=48)
        before, after = found["before"], found["after"]
        return (
            f"mean reward of its own answers, held out: {before['scores']:.2f} before, "
            f"{after['scores']:.2f} after, {after['kl']:.1f} nats from where it started"
        )

    def scores() -> str:
        judge = load_reward(str(demo.folder / "reward"), device="cpu", dtype="float32")
        means = []
        for stage, given in answers.items():
            values = list(judge(prompts, [answer.text for answer in given]))
            means.append(f"{stage} {sum(values) / len(values):.2f}")
        return f"mean reward of the answers to {len(prompts)} prompts: {', '.join(means)}"

    for name, work in (("data check", check), ("SFT", sft), ("reward model", reward),
                       ("DPO", dpo), ("PPO", ppo), ("rewards of the answers", scores)):  # fmt: skip
        demo.stage(name, work)
    return answers


def _policy(model: str | Path, **options: Any) -> Policy:
    torch.manual_seed(0)  # what is drawn: the adapter's A, a new head
    return Policy.from_pretrained(model, dtype="float32", device="cpu", **options)


def _new_folder(parent: Path) -> Path:
    try:
        parent.mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="demo-", dir=parent))
    except OSError as error:
        raise InputError(f"cannot write to {parent.absolute()} ({error}); name --out") from None


def _prompts() -> list[list[Message]]:
    raw = json.loads((loading.EMBEDDED / "demo_prompts.json").read_text())
    return [[Message(**turn) for turn in prompt] for prompt in raw]


def _shown(answer: Generation) -> str:
    return answer.text.strip() + ("" if answer.finish == "stop" else " ...")


def _share(summary: dict[str, Any]) -> str:
    low, high = summary["accuracy_low"], summary["accuracy_high"]
    return f"{summary['accuracy']:.0%} [{low:.0%}, {high:.0%}] of {summary['n']} held-out pairs"
