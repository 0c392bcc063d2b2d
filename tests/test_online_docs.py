"""docs/online.md and the remedies of the checks name flags, alarms and metrics that exist."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml

from prefopt import online_findings
from prefopt.command_groups import Setup
from prefopt.data.prompts import load_prompts
from prefopt.metrics import read_metrics
from prefopt.nn.lora import LoraConfig
from prefopt.online import train_ppo
from prefopt.online_commands import ppo
from prefopt.online_config import KLConfig, PPOConfig
from prefopt.online_findings import CHECKS
from prefopt.online_history import HELD_OUT, WATCHED
from prefopt.policy import Policy
from prefopt.rl import ESTIMATORS
from prefopt.rl_losses import MODES, POLICY_LOSSES

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "online.md").read_text()
SECTION = PAGE.partition("## Recipes")[2].partition("## Warnings")[0]
RECIPES = dict(re.findall(r"^\| ([^|]+) \| .*?(--[^|]*)\|$", SECTION, re.MULTILINE))


def known_flags():
    names = {f.name for kind in (PPOConfig, Setup) for f in dataclasses.fields(kind)}
    names |= {f"kl.{f.name}" for f in dataclasses.fields(KLConfig)}
    losses = [function for function, _ in POLICY_LOSSES.values()]
    names |= {f"loss.{p}" for function in losses for p in inspect.signature(function).parameters}
    return names | set(inspect.signature(ppo).parameters)


@pytest.mark.parametrize("where", ["docs", "remedies"])
def test_every_flag_exists(where):
    text = PAGE if where == "docs" else inspect.getsource(online_findings)
    flags = {flag.rstrip(".") for flag in re.findall(r"--([a-z][\w.]*)", text)}
    assert len(flags) > 8 and flags <= known_flags(), flags - known_flags()


def test_every_choice_is_explained():
    for name in (*ESTIMATORS, *POLICY_LOSSES, *MODES, *CHECKS):
        assert f"`{name}`" in PAGE, name


def glossary():
    """The names of the table of metrics; `_max` after a name stands for it with another end."""
    names = set()
    for cell in re.findall(r"^\| (`[^|]+) \|", PAGE.partition("## Metrics")[2], re.MULTILINE):
        last = ""
        for name in re.findall(r"`([^`]+)`", cell):
            if name.startswith("/"):
                name = last.rpartition("/")[0] + name
            elif name.startswith("_"):
                ends = ("_mean", "_first")
                name = next((last.removesuffix(e) for e in ends if last.endswith(e)), last) + name
            else:
                last = name
            names.add(name)
    return names


def test_every_metric_is_explained(tmp_path):
    def halves(prompts, responses):
        return [float(len(text) % 2) for text in responses]

    config = PPOConfig(
        str(tmp_path), batch_size=3, samples_per_prompt=2, max_new_tokens=4, max_length=64,
        importance="truncate", eval_fraction=0.3, save_every=0,
    )  # fmt: skip
    prompts = load_prompts([{"prompt": f"What is {i}?"} for i in range(8)])
    policy = Policy.from_pretrained("embedded", lora=LoraConfig(r=2), device="cpu")
    run = train_ppo(policy, prompts, halves, config, held_out_reward=halves, quiet=True)
    rows = read_metrics(run.dir / "metrics.jsonl")[0]
    found = {name for row in rows for name in row} - {"step", "non_finite"}
    assert found - glossary() == set()
    assert set(WATCHED) | {HELD_OUT} <= glossary()


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_configurations(name):
    words = [word for part in re.findall(r"`?(--[^`|]+)`?", RECIPES[name]) for word in part.split()]
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    settings, kl, loss = {}, {}, {}
    for flag, value in pairs.items():
        place, _, key = flag.removeprefix("--").rpartition(".")
        {"kl": kl, "loss": loss, "": settings}[place][key] = yaml.safe_load(value)
    PPOConfig("out", kl=KLConfig(**kl), loss_options=loss or None, **settings)


def test_there_are_recipes():
    assert len(RECIPES) == 10
