"""Whole updates of online RL per second, prefopt against TRL's RLOOTrainer and GRPOTrainer, on CPU.

    PYTHONPATH=.:kernels python benchmarks/bench_ppo.py ../shared/models/stories260K

64 samples an update, 4 to a prompt, 96 new tokens, one optimizer step of all weights, AdamW, beta
0.05 (RLOO: KL in the reward; GRPO: k3 in the loss), float32, the same prompts and the same reward.
An update is sampling, scoring, reference, and learning. Each (side, method, round) is a process of
its own, in turn; time runs from the first call of the reward to the last, so that both sides are
measured over whole updates and what comes before the first does not count. TRL keeps its defaults
but for gradient checkpointing, which is off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Clock,
    environment,
    peak_rss_bytes,
    report,
    run_worker,
    spread,
    table,
    versions,
    write_result,
)  # fmt: skip

METHODS = ("rloo", "grpo")
PROMPTS, GROUP, TOKENS, BETA, LR = 16, 4, 96, 0.05, 1e-5
KEYS = ("samples_per_s", "samples_per_cpu_s", "tokens_per_s", "peak_rss")
NAMES = ("Lily", "Tom", "Max", "Mia", "Ben", "Anna", "Sam", "Lucy", "Tim", "Sue", "Jack", "Amy")
BEGINNINGS = ("Once upon a time, there was a girl named {}.", "One day, {} went to the park.")


def prompts(updates: int) -> list[str]:
    """One for each group of all updates; both sides shuffle them."""
    texts = [text.format(name) for name in NAMES for text in BEGINNINGS]
    return [
        f"{texts[i % len(texts)]} {'So ' * (i // len(texts))}" for i in range(PROMPTS * updates)
    ]


class Timed:
    """The reward of both sides, the share of vowels; the clock runs from its first call to its
    last."""

    def __init__(self) -> None:
        self.clock, self.calls, self.mark = Clock(), 0, None
        self.characters: list[float] = []

    def __call__(self, texts: list[str]) -> list[float]:
        if self.calls:
            self.clock.stop()
        self.calls += 1
        self.characters.append(statistics.mean(map(len, texts)))
        self.clock.start()
        return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]

    def figures(self, tokens: float) -> dict[str, Any]:
        """Over the updates between the calls; ``tokens``: of an answer, on average."""
        samples = PROMPTS * GROUP * (self.calls - 1)
        figures = self.clock.figures()
        return figures | {
            "samples_per_s": samples / figures["seconds"],
            "samples_per_cpu_s": samples / figures["cpu_seconds"],
            "tokens_per_s": tokens * samples / figures["seconds"],
            "tokens": tokens,
            "characters": statistics.mean(self.characters),
            "updates": self.calls - 1,
            "peak_rss": peak_rss_bytes(),
        }


def trl_side(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: TRL's trainer of the method."""
    import torch

    torch.set_num_threads(job["threads"])
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    rloo, reward = job["method"] == "rloo", Timed()
    make, trainer_class = (RLOOConfig, RLOOTrainer) if rloo else (GRPOConfig, GRPOTrainer)
    config = make(
        output_dir=job["work"] + "/trl", per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP, max_completion_length=TOKENS, beta=BETA, max_steps=job["updates"],
        learning_rate=LR, lr_scheduler_type="constant", gradient_checkpointing=False, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip

    def share(prompts: Any, completions: list[str], **rest: Any) -> list[float]:
        return reward(completions)

    trainer = trainer_class(
        model=job["model"],
        args=config,
        processing_class=AutoTokenizer.from_pretrained(job["model"], padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts(job["updates"])]),
        reward_funcs=share,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    return reward.figures(statistics.mean(row["completions/mean_length"] for row in rows))


def prefopt_side(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: prefopt over the same prompts."""
    import torch

    torch.set_num_threads(job["threads"])
    import prefopt

    reward = Timed()
    rloo = job["method"] == "rloo"
    kl = prefopt.KLConfig(beta=BETA) if rloo else prefopt.KLConfig("k3", "loss", BETA)
    config = prefopt.PPOConfig(
        str(Path(tempfile.mkdtemp(dir=job["work"])) / "run"), estimator=job["method"], kl=kl,
        batch_size=PROMPTS, samples_per_prompt=GROUP, max_new_tokens=TOKENS, ppo_epochs=1,
        lr=LR, schedule="constant", eval_fraction=0.0, save_every=0, samples=0, max_length=512,
        template="plain", micro_tokens=job["micro_tokens"], slots=job["slots"],
    )  # fmt: skip
    policy = prefopt.Policy.from_pretrained(job["model"], dtype="float32", device="cpu")
    given = prefopt.load_prompts(prompts(job["updates"]))
    run = prefopt.train_ppo(policy, given, lambda _, texts: reward(texts), config, quiet=True)
    rows = run.metrics
    phases = {
        name: statistics.median(row[f"seconds/{name}"] for row in rows[1:])
        for name in ("generate", "score", "train")
    }
    return reward.figures(statistics.mean(row["lengths/mean"] for row in rows)) | {"phases": phases}


WORKERS = {"trl": trl_side, "prefopt": prefopt_side}


def run_rounds(args: argparse.Namespace) -> list[dict[str, Any]]:
    runs = []
    for number in range(args.rounds):
        for method in args.methods:
            for side in WORKERS:
                job = {
                    "side": side, "method": method, "round": number + 1, "work": str(args.work),
                    "model": str(Path(args.model).resolve()), "threads": args.threads,
                    "updates": args.updates + 1, "micro_tokens": args.micro_tokens,
                    "slots": args.slots,
                }  # fmt: skip
                run = run_worker(__file__, job, log=args.work / f"{side}.log")
                runs.append({"side": side, "method": method, "round": number + 1} | run)
                print(
                    f"round {number + 1} {method} {side:7} {run['samples_per_s']:.1f} samples/s, "
                    f"{run['tokens']:.1f} tokens each, {run['peak_rss'] / 1e9:.2f} GB, others "
                    f"{run['others']:.0%} {run.get('phases', '')}",
                    flush=True,
                )
    return runs


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per method each side's spread over the rounds, and prefopt over TRL by round."""
    summary: dict[str, Any] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        sides = {
            side: [r for r in runs if (r["side"], r["method"]) == (side, method)]
            for side in WORKERS
        }
        part: dict[str, Any] = {
            side: {key: spread([r[key] for r in rounds]) for key in KEYS}
            for side, rounds in sides.items()
        }
        pairs = list(zip(sides["prefopt"], sides["trl"], strict=True))
        part["prefopt_over_trl"] = {
            key: statistics.median(a[key] / b[key] for a, b in pairs) for key in KEYS
        }
        summary[method] = part
    return summary


def show(summary: dict[str, Any]) -> None:
    rows = []
    for method, part in summary.items():
        for side in WORKERS:
            over = part["prefopt_over_trl"]
            ratio = f"{over['samples_per_s']:.2f}x, memory {over['peak_rss']:.2f}"
            speed, peak = part[side]["samples_per_s"], part[side]["peak_rss"]
            cells = [method, side, f"{speed['median']:.1f}", f"{peak['median'] / 1e9:.2f}"]
            rows.append([*cells, ratio if side == "prefopt" else ""])
    print(table(["", "", "samples/s", "peak GB", "over TRL"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model", help="folder of a small causal language model")
    add("--rounds", type=int, default=3)
    add("--updates", type=int, default=12, help="measured updates of each process")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--threads", type=int, default=os.cpu_count())
    add("--micro_tokens", type=int, default=8192, help="prefopt: token budget of one forward")
    add("--slots", type=int, default=PROMPTS * GROUP, help="prefopt: answers sampled at a time")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "prefopt-bench-ppo")
    add("--out", type=Path, default=RESULTS / "bench_ppo.json")
    args = parser.parse_args()
    if not Path(args.model).exists():
        print(f"skipped: {args.model} is not there; give the folder of a model")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    runs = run_rounds(args)
    summary = summarise(runs)
    show(summary)
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "work", "out")}
    settings |= {
        "prompts": PROMPTS,
        "group": GROUP,
        "tokens": TOKENS,
        "model": Path(args.model).name,
    }
    packages = versions("torch", "transformers", "trl", "accelerate", "tokenizers")
    result = {"settings": settings, "summary": summary, "runs": runs}
    write_result(args.out, result | {"packages": packages, "environment": environment()})
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        order = json.loads(sys.argv[sys.argv.index("--worker") + 1])
        report(WORKERS[order["side"]](order))
    else:
        main()
