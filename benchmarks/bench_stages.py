"""SFT and reward-model steps per second and peak memory: prefopt against TRL's trainers, on CPU.

    PYTHONPATH=.:kernels python benchmarks/bench_stages.py ../shared/data/hh_harmless.jsonl.gz

As bench_dpo_step.py: the shape of SmolLM2-135M (dpo_sides.py) with LoRA r 16 on q, k, v, o, HH-RLHF
rows of at most 512 tokens, 4 a step, AdamW, no gradient checkpointing; each (side, task, dtype,
round) a process of its own, in turn; the first step is a warm-up. SFT learns the chosen responses
(TRL: completion-only loss, its default for prompts and completions), a reward model both of a pair.
TRL keeps its defaults except for what bench_dpo_step.py changes, too; of its ways to bfloat16 the
fastest of a round is compared. The losses of SFT must agree, or nothing is compared.
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
from dpo_sides import ALPHA, BATCH, LR, MAX_LENGTH, RANK, TARGETS, TRL_MODES, given, prepare, timer

TASKS = ("sft", "reward")
KEYS = ("items_per_s", "items_per_cpu_s", "peak_rss")


def trl_side(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: SFTTrainer or RewardTrainer, timed from the end of the first step to the last."""
    import torch

    torch.set_num_threads(job["threads"])
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    autocast, weights = TRL_MODES[job["dtype"]][job["mode"]]
    clock, sft = Clock(), job["task"] == "sft"

    make, trainer_class = (SFTConfig, SFTTrainer) if sft else (RewardConfig, RewardTrainer)
    config = make(
        output_dir=job["work"] + "/trl", per_device_train_batch_size=BATCH, max_length=MAX_LENGTH,
        max_steps=1 + job["steps"], learning_rate=LR, lr_scheduler_type="constant",
        gradient_checkpointing=False, bf16=autocast, model_init_kwargs={"dtype": weights},
        train_sampling_strategy="sequential", use_cpu=True, report_to="none",
        save_strategy="no", eval_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS,
        task_type="CAUSAL_LM" if sft else "SEQ_CLS",
    )  # fmt: skip
    pairs = [x["pair"] for x in given(job)]
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs] if sft else pairs
    trainer = trainer_class(
        model=job["model"],
        args=config,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora,
        callbacks=[timer(clock)],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return clock.figures() | {"peak_rss": peak_rss_bytes(), "losses": losses}


def prefopt_side(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: prefopt over the same rows."""
    import torch

    torch.set_num_threads(job["threads"])
    import prefopt

    head = "lm" if job["task"] == "sft" else "score"
    lora = prefopt.LoraConfig(r=RANK, alpha=ALPHA, targets=TARGETS)
    policy = prefopt.Policy.from_pretrained(
        job["model"], head=head, lora=lora, dtype=job["dtype"], device="cpu"
    )
    objective: Any = prefopt.SFT() if head == "lm" else prefopt.Reward()
    pairs = prefopt.load_preferences([x["pair"] for x in given(job)])
    options = {"max_length": MAX_LENGTH, "template": "auto"}
    encoded = objective.encode(pairs, policy.tokenizer, **options)
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=LR, weight_decay=0.0)
    clock, losses = Clock(), []
    for start in range(0, len(encoded), BATCH):
        if start == BATCH:
            clock.start()
        batches = prefopt.pack(
            encoded[start : start + BATCH], max_tokens=job["micro_tokens"],
            layout=policy.layout, ends=objective.ends,
        )  # fmt: skip
        stats = prefopt.optimizer_step(policy, objective, batches, optimizer, max_norm=1.0)
        losses.append(stats.loss.item())
    clock.stop()
    return clock.figures() | {"peak_rss": peak_rss_bytes(), "losses": losses}


WORKERS = {"prepare": prepare, "trl": trl_side, "prefopt": prefopt_side}


def timed(side: str, job: dict[str, Any]) -> dict[str, Any]:
    result = run_worker(__file__, job | {"side": side}, log=Path(job["work"]) / f"{side}.log")
    result |= {k: job[k] for k in ("task", "dtype", "round")} | {"side": side, "compared": False}
    result["mode"] = job.get("mode", "")
    items = BATCH * job["steps"]
    result["items_per_s"] = items / result["seconds"]
    result["items_per_cpu_s"] = items / result["cpu_seconds"]
    print(
        f"round {job['round']} {job['task']:6} {job['dtype']:8} {side:7} {result['mode']:26}"
        f" {result['items_per_s']:.3f} items/s {result['items_per_cpu_s']:.3f} items/CPU s"
        f" {result['peak_rss'] / 1e9:.2f} GB, first loss {result['losses'][0]:.5f}, others"
        f" {result['others']:.0%}",
        flush=True,
    )
    return result


def run_rounds(args: argparse.Namespace) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for task in args.tasks:
            for dtype in args.dtypes:
                job = {
                    "work": str(args.work), "model": str(args.work / "model"), "task": task,
                    "threads": args.threads, "round": number + 1, "steps": args.steps,
                    "dtype": dtype, "micro_tokens": args.micro_tokens,
                }  # fmt: skip
                tried = [timed("trl", job | {"mode": mode}) for mode in TRL_MODES[dtype]]
                best = max(tried, key=lambda run: run["items_per_s"])
                ours = timed("prefopt", job)
                best["compared"] = ours["compared"] = True
                bound = 1e-4 if dtype == "float32" else 2e-2
                if task == "sft" and abs(best["losses"][0] - ours["losses"][0]) > bound:
                    raise SystemExit(f"the first losses differ: {best['losses']} {ours['losses']}")
                runs += [*tried, ours]
    return runs


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per task and dtype each side's spread over the rounds, and prefopt over TRL by round."""
    summary: dict[str, Any] = {}
    compared = [run for run in runs if run["compared"]]
    for task, dtype in dict.fromkeys((run["task"], run["dtype"]) for run in compared):
        own = [run for run in compared if (run["task"], run["dtype"]) == (task, dtype)]
        sides = {side: [r for r in own if r["side"] == side] for side in ("trl", "prefopt")}
        part = summary[f"{task} {dtype}"] = {
            side: {key: spread([r[key] for r in rounds]) for key in KEYS}
            for side, rounds in sides.items()
        }
        part["trl"]["modes"] = list(dict.fromkeys(r["mode"] for r in sides["trl"]))
        part["prefopt_over_trl"] = {
            key: statistics.median(
                ours[key] / theirs[key]
                for ours, theirs in zip(sides["prefopt"], sides["trl"], strict=True)
            )
            for key in KEYS
        }
    return summary


def show(summary: dict[str, Any]) -> None:
    rows = []
    for name, part in summary.items():
        ratio = part["prefopt_over_trl"]
        for side in ("trl", "prefopt"):
            speed, peak = part[side]["items_per_s"], part[side]["peak_rss"]["max"]
            over = " | ".join(part[side].get("modes", []))
            if side == "prefopt":
                over = f"{ratio['items_per_s']:.2f}x, memory {ratio['peak_rss']:.2f}"
            cells = [name, side, f"{speed['median']:.3f}", f"{peak / 1e9:.2f}", over]
            rows.append(cells)
    print(table(["", "", "items/s", "peak GB", "over TRL"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, dtypes = parser.add_argument, list(TRL_MODES)
    add("data", help="HH-RLHF pairs: hh_harmless.jsonl.gz")
    add("--rounds", type=int, default=2)
    add("--steps", type=int, default=3, help="timed optimizer steps of each process")
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    add("--dtypes", nargs="+", default=dtypes, choices=dtypes)
    add("--threads", type=int, default=os.cpu_count())
    add("--micro_tokens", type=int, default=1024, help="prefopt: token budget of one forward")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "prefopt-bench-stages")
    add("--out", type=Path, default=RESULTS / "bench_stages.json")
    args = parser.parse_args()
    if not Path(args.data).exists():
        print(f"skipped: {args.data} is not there; give the path of hh_harmless.jsonl.gz")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    job = {"side": "prepare", "work": str(args.work), "data": args.data, "threads": args.threads}
    data = run_worker(__file__, job, log=args.work / "prepare.log")
    runs = run_rounds(args)
    summary = summarise(runs)
    show(summary)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "work", "out")}
    packages = versions("torch", "transformers", "trl", "peft", "accelerate", "tokenizers")
    result = {"settings": settings, "data": data, "summary": summary, "runs": runs}
    write_result(args.out, result | {"packages": packages, "environment": environment()})
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        order = json.loads(sys.argv[sys.argv.index("--worker") + 1])
        report(WORKERS[order["side"]](order))
    else:
        main()
