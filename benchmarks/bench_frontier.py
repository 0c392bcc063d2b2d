"""The KL-reward frontier: PPO and DPO against the optimum in closed form.

    PYTHONPATH=.:kernels python benchmarks/bench_frontier.py

In the world of tests/rl_world.py every response can be enumerated, so reward and KL(pi || ref) of a
policy are exact, and so is the frontier that no policy is beyond: pi* = ref exp(reward / beta) / Z.
PPO with a critic is trained at each beta with the true reward. DPO is trained at each beta on n
pairs sampled from the reference, of which one is preferred with the probability that Bradley and
Terry give the difference of rewards, for 150 steps of 256 pairs: 500 pairs are seen 75 times over,
5,000 are seen 7 times. Nothing is tuned to a beta or to a number of pairs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, cpu_seconds, environment, table, write_result

sys.path.insert(0, str(ROOT))

from tests import rl_world

BETAS = (0.1, 0.2, 0.5, 1.0)
PAIRS = (500, 5_000)
SEED, STEPS, DPO_LR, BATCH = 1, 150, 5e-3, 256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--pairs", type=int, nargs="*", default=PAIRS, help="of DPO; none: no DPO")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of DPO")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_frontier.json")
    return parser.parse_args()


def point(worth: rl_world.Worth, best: rl_world.Worth, start: rl_world.Worth) -> dict[str, float]:
    gap = best.value - worth.value
    return {
        "reward": worth.reward, "kl": worth.kl, "gap": gap,
        "gap_of_start": gap / (best.value - start.value),
    }  # fmt: skip


def ppo(beta: float) -> dict[str, float]:
    """A point reached by train_ppo, in the settings of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        began = cpu_seconds()
        found = rl_world.learn(Path(folder), SEED, "gae", beta=beta, temperature=1.0)
        seconds = cpu_seconds() - began
    return {**point(found.worth, found.best, found.at_start), "cpu_seconds": seconds}


def sampled_pairs(policy: Any, ref: Any, reward: Any, n: int) -> list[Any]:
    """n pairs of different responses from the reference, the same number of each prompt; one is the
    chosen one with probability sigmoid(difference of rewards)."""
    import numpy as np
    import torch

    from prefopt.data.encoded import Encoded

    generator = torch.Generator().manual_seed(SEED)
    responses = [np.array(ids, dtype=np.int32) for ids in rl_world.RESPONSES]
    items: list[Any] = []
    for place, prompt in enumerate(rl_world.PROMPTS):
        ids = np.array(policy.tokenizer(prompt[0].content)["input_ids"], dtype=np.int32)
        drawn = torch.multinomial(ref[place].exp(), 4 * n, True, generator=generator).view(-1, 2)
        drawn = drawn[drawn[:, 0] != drawn[:, 1]][: n // len(rl_world.PROMPTS)]
        better = (reward[place][drawn[:, 0]] - reward[place][drawn[:, 1]]).sigmoid()
        swap = torch.rand(len(drawn), generator=generator) >= better
        drawn = torch.where(swap[:, None], drawn.flip(1), drawn)
        for chosen, rejected in drawn.tolist():
            items.append(Encoded(ids, (responses[chosen], responses[rejected]), len(items)))
    order = torch.randperm(len(items), generator=generator).tolist()
    return [replace(items[i], index=place) for place, i in enumerate(order)]


def dpo(beta: float, n: int, steps: int) -> dict[str, float]:
    """A point reached by DPO's loss on n pairs, in minibatches of 256, each over and over."""
    import torch

    from prefopt import DPO, Policy, optimizer_step, pack
    from prefopt.optim import make_optimizer

    with tempfile.TemporaryDirectory() as folder:
        model = rl_world.make_world(Path(folder), SEED)
        policy = Policy.from_pretrained(model, dtype="float32", attention="padded")
    reward = rl_world.reward_table(SEED)
    ref = rl_world.response_logprobs(policy.model, policy.tokenizer, 1.0)
    began, items, minibatches = cpu_seconds(), sampled_pairs(policy, ref, reward, n), []
    for begin in range(0, len(items), BATCH):
        part = [replace(x, index=i) for i, x in enumerate(items[begin : begin + BATCH])]
        batches = list(pack(part, max_tokens=10**6, layout=policy.layout))
        with torch.no_grad():
            batches = [replace(batch, ref_logprobs=policy(batch)) for batch in batches]
        minibatches.append(batches)
    optimizer = make_optimizer(policy.parameters(), DPO_LR, eps=1e-5)
    for step, batches in zip(range(steps), itertools.cycle(minibatches)):
        optimizer.param_groups[0]["lr"] = DPO_LR * (1 - step / steps)
        optimizer_step(policy, DPO(beta=beta), batches, optimizer)
    seconds = cpu_seconds() - began
    at = rl_world.worth(
        rl_world.response_logprobs(policy.model, policy.tokenizer, 1.0), ref, reward, beta
    )
    best = rl_world.worth(rl_world.best(ref, reward, beta), ref, reward, beta)
    start = rl_world.worth(ref, ref, reward, beta)
    return {**point(at, best, start), "cpu_seconds": seconds}


def frontier(points: int = 60) -> list[dict[str, float]]:
    """The optimum at betas from 0.05 to 20, from far to near."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        from prefopt import Policy

        policy = Policy.from_pretrained(rl_world.make_world(Path(folder), SEED), dtype="float32")
    ref = rl_world.response_logprobs(policy.model, policy.tokenizer, 1.0)
    reward, rows = rl_world.reward_table(SEED), []
    for beta in torch.logspace(-1.3, 1.3, points).tolist():
        at = rl_world.worth(rl_world.best(ref, reward, beta), ref, reward, beta)
        rows.append({"beta": beta, "reward": at.reward, "kl": at.kl})
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), dpi=150, layout="constrained")
    curve = result["frontier"]
    axes.plot(
        [row["kl"] for row in curve], [row["reward"] for row in curve],
        color="#888888", linewidth=1.5, label="optimum, in closed form", zorder=1,
    )  # fmt: skip
    looks = [("PPO", "#1b5e9e", "o"), ("DPO", "#c8553d", "s"), ("DPO", "#e3a857", "^")]
    for (name, rows), (_, colour, marker) in zip(result["sides"].items(), looks, strict=False):
        axes.scatter(
            [row["kl"] for row in rows], [row["reward"] for row in rows],
            color=colour, marker=marker, s=28, label=name, zorder=2,
        )  # fmt: skip
        for row in rows:
            axes.annotate(
                f"{row['beta']:g}", (row["kl"], row["reward"]), color=colour, fontsize=7,
                xytext=(4, -9), textcoords="offset points",
            )  # fmt: skip
    axes.set_xlabel("KL(policy || reference), nats per response")
    axes.set_ylabel("mean reward")
    axes.set_title("Reward at a distance from the reference (labels: beta)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)


def main() -> None:
    asked = arguments()
    sides: dict[str, list[dict[str, float]]] = {"PPO": []}
    for beta in asked.betas:
        sides["PPO"].append({"beta": beta, **ppo(beta)})
        for n in asked.pairs:
            side = sides.setdefault(f"DPO, {n:,} pairs", [])
            side.append({"beta": beta, **dpo(beta, n, asked.steps)})
    result = {"environment": environment(), "seed": SEED, "sides": sides, "frontier": frontier()}
    write_result(asked.out, result)
    plot(result, asked.out.with_suffix(".png"))
    header = ("side", "beta", "reward", "KL", "gap", "of start", "CPU s")
    rows = [
        (name, f"{row['beta']:g}", f"{row['reward']:.3f}", f"{row['kl']:.3f}", f"{row['gap']:.4f}",
         f"{row['gap_of_start']:.2%}", f"{row['cpu_seconds']:.1f}")
        for name, points in sides.items() for row in points
    ]  # fmt: skip
    print(table(header, rows))


if __name__ == "__main__":
    main()
