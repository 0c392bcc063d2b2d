"""`prefopt demo`: the whole way on the tiny model in the package, in a minute or two of CPU.

Its assistant was pretrained on answers of both kinds, helpful and polite as well as curt, wrong,
rude or unsafe, about equally often. DPO on pairs of the two changes which of them it gives.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from prefopt import loading
from prefopt.config import TrainConfig
from prefopt.data.records import Message
from prefopt.data.sources import load_preferences
from prefopt.errors import InputError
from prefopt.metrics import format_duration
from prefopt.nn.lora import LoraConfig
from prefopt.objectives.dpo import DPO
from prefopt.policy import Generation, Policy
from prefopt.report import write_report
from prefopt.rundir import RunDir
from prefopt.train import train

SETTINGS: dict[str, Any] = {"lr": 3e-4, "max_length": 256, "save_every": 0}
BETA = 0.1


def run_demo(out: str | None, max_steps: int | None, say) -> int:
    """Check the data, train, and show the same prompts before and after. ``say`` prints a line."""
    began = time.monotonic()
    folder = Path(out) if out else _new_folder(Path("runs"))
    settings = {**SETTINGS, **({"max_steps": max_steps} if max_steps else {})}
    config = TrainConfig(str(folder), samples=0, cache=str(folder / "reference"), **settings)
    RunDir(folder, resuming=False)

    say("1. data", "bold")
    data = load_preferences(str(loading.EMBEDDED / "preferences.jsonl.gz"))
    data.report.source = "embedded"
    for line in data.report.lines():
        say(f"   {line}")
    torch.manual_seed(config.seed)
    policy = Policy.from_pretrained("embedded", lora=LoraConfig(), dtype="float32")
    prompts = _prompts()
    before = policy.generate(prompts, max_new_tokens=48)

    say("2. DPO", "bold")
    recorded = {"command": "demo", "model": "embedded", "data": "embedded", "beta": BETA}
    run = train(DPO(beta=BETA), policy, data, config, settings=recorded)
    if run.stopped:
        say("stopped")
        return 0
    after = policy.generate(prompts, max_new_tokens=48)
    book = RunDir(folder, resuming=True)
    book.add_samples(0, "before", prompts, before)
    book.add_samples(config.max_steps or 0, "after", prompts, after)

    say("3. the same prompts before and after", "bold")
    for prompt, old, new in zip(prompts, before, after, strict=True):
        say(f"   > {prompt[-1].content}", "dim")
        say(f"     before: {_shown(old)}")
        say(f"     after:  {_shown(new)}", "green")
    say(f"4. held-out pairs: {_verdict(folder)}", "bold")
    say(f"{format_duration(time.monotonic() - began)}; report: {write_report(folder)}")
    return 0


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


def _verdict(folder: Path) -> str:
    """Accuracy before is that of the model's own log-probs: its margins are all 0 by definition."""
    known = json.loads((folder / "evaluation.json").read_text())
    before, after = known["before"], known["after"]
    return (
        f"the polite answer was the likelier one in {before['logps/accuracies']:.0%}, now "
        f"{after['logps/accuracies']:.0%}; preferred more than before in {after['accuracy']:.0%} "
        f"[{after['accuracy_low']:.0%}, {after['accuracy_high']:.0%}] of {after['n']}"
    )
