"""DPO steps per second and peak memory: prefopt against TRL's DPOTrainer with a peft LoRA, on CPU.

    PYTHONPATH=.:kernels python benchmarks/bench_dpo_step.py ../shared/data/hh_harmless.jsonl.gz

Both sides train the same LoRA (r 16 on q, k, v, o) on the same model (see dpo_sides.py) with the
same HH-RLHF pairs in the same order: 4 pairs a step, at most 512 tokens, AdamW, no gradient
checkpointing, the reference pass inside the timed steps. Every (side, dtype, round) is a process of
its own and the sides take turns, so memory is per side and a busy machine hits both. The first step
of each process is a warm-up: not timed, but part of the peak memory.

TRL keeps its defaults except: gradient checkpointing off, the order of the data kept, a constant
learning rate of 1e-4, a log line per step, nothing saved. So its reference is computed inside the
step, with the adapters off; with `--trl_reference precompute` its constructor does that, and the
time it takes for the timed pairs counts. bfloat16 can be asked of it in three ways (TRL_MODES): all
run in every round, and what is compared is the fastest of the round.

Fractions are useful work (`useful_flops`) over the GEMM rates measured between the rounds. "others"
is the share of the machine's processors that other programs took meanwhile: run it on an idle one.
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

from common import RESULTS, environment, report, run_worker, spread, table, versions, write_result
from dpo_sides import BATCH, TRL_MODES, WORKERS, given, useful_flops

KEYS = ("pairs_per_s", "pairs_per_cpu_s", "peak_rss", "useful_gflops", "others")


def timed(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """The figures of one worker and what follows from them; stops if it scored other tokens."""
    log, lengths = Path(job["work"]) / f"{side}.log", given(job)
    result = run_worker(__file__, job | {"side": side}, log=log)
    right = [sum(x["prompt"] for x in lengths), sum(sum(x["responses"]) for x in lengths)]
    encoded = [result["prompt_tokens"], result["response_tokens"]]
    if encoded != right:
        raise SystemExit(f"{side} has {encoded} prompt and response tokens instead of {right}")
    if side == "prefopt" and job["profile"]:
        print(log.read_text())
    result |= {key: job[key] for key in ("dtype", "round")} | {"side": side}
    result |= {"mode": job["mode"] if side == "trl" else "", "compared": False}
    pairs = len(lengths) - BATCH
    result["pairs_per_s"] = pairs / result["seconds"]
    result["pairs_per_cpu_s"] = pairs / result["cpu_seconds"]
    result["useful_gflops"] = useful_flops(lengths[BATCH:]) / result["seconds"] / 1e9
    print(
        f"round {job['round']} {job['dtype']:8} {side:7} {result['mode']:26}"
        f" {result['pairs_per_s']:.3f} pairs/s {result['pairs_per_cpu_s']:.3f} pairs/CPU s"
        f" {result['peak_rss'] / 1e9:.2f} GB, first loss {result['losses'][0]:.6f}"
        f" logps/chosen {result['chosen_logps']:.3f}, others {result['others']:.0%}",
        flush=True,
    )
    return result


def run_rounds(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every (side, dtype, round) in turn -> (runs, GEMM rates)."""
    runs, gemms = [], []
    for number in range(args.rounds):
        for dtype in args.dtypes:
            job = {
                "work": str(args.work),
                "model": str(args.work / "model"),
                "threads": args.threads,
                "round": number + 1,
                "steps": args.steps,
                "dtype": dtype,
                "reference": args.trl_reference,
                "micro_tokens": args.micro_tokens,
                "profile": args.profile,
            }
            rates = run_worker(__file__, job | {"side": "gemm"}, log=args.work / "gemm.log")
            gemms.append({"dtype": dtype, "round": number + 1} | rates)
            if "trl" in args.sides:
                modes = [mode for mode in TRL_MODES[dtype] if mode in args.trl_modes]
                tried = [timed("trl", job | {"mode": mode}) for mode in modes]
                max(tried, key=lambda run: run["pairs_per_s"])["compared"] = True
                runs += tried
            if "prefopt" in args.sides:
                runs.append(timed("prefopt", job) | {"compared": True})
    return runs, gemms


def summarise(runs: list[dict[str, Any]], gemms: list[dict[str, Any]]) -> dict[str, Any]:
    """Per dtype: GEMM rates, each side's spread over the rounds, and prefopt over TRL by round."""
    summary: dict[str, Any] = {}
    for dtype in dict.fromkeys(run["dtype"] for run in runs):
        own = [g for g in gemms if g["dtype"] == dtype]
        shapes = [key for key in own[0] if key not in ("dtype", "round")]
        rates = {shape: statistics.median(g[shape] for g in own) for shape in shapes}
        part = summary[dtype] = {"gemm_gflops": rates}
        by_side = {
            side: [r for r in runs if (r["side"], r["dtype"], r["compared"]) == (side, dtype, True)]
            for side in ("trl", "prefopt")
        }
        for side, rounds in by_side.items():
            if rounds:
                speed = statistics.median(r["useful_gflops"] for r in rounds)
                part[side] = {key: spread([r[key] for r in rounds]) for key in KEYS}
                part[side]["modes"] = list(dict.fromkeys(r["mode"] for r in rounds))
                part[side]["of_gemm_rate"] = {s: speed / rate for s, rate in rates.items()}
        if all(by_side.values()):
            part["prefopt_over_trl"] = {}
            for key in KEYS[:3]:
                pairs = zip(by_side["prefopt"], by_side["trl"], strict=True)
                ratios = [ours[key] / theirs[key] for ours, theirs in pairs]
                median = statistics.median(ratios)
                part["prefopt_over_trl"][key] = {"by_round": ratios, "median": median}
    return summary


def show(summary: dict[str, Any]) -> None:
    """The summary as plain tables."""
    header = ["", "pairs/s", "min-max", "pairs/CPU s", "peak GB", "others", "useful GFLOP/s"]
    for dtype, part in summary.items():
        rates = part["gemm_gflops"]
        print(f"\n{dtype}: GEMM", ", ".join(f"{r:.0f} GFLOP/s at {s}" for s, r in rates.items()))
        rows = []
        for side in [s for s in ("trl", "prefopt") if s in part]:
            own = part[side]
            speed = own["pairs_per_s"]
            rows.append(
                [
                    f"{side} {' | '.join(own['modes'])}".strip(),
                    f"{speed['median']:.3f}",
                    f"{speed['min']:.3f}-{speed['max']:.3f}",
                    f"{own['pairs_per_cpu_s']['median']:.3f}",
                    f"{own['peak_rss']['max'] / 1e9:.2f}",
                    f"{own['others']['max']:.0%}",
                    f"{own['useful_gflops']['median']:.1f}",
                    *(f"{fraction:.1%}" for fraction in own["of_gemm_rate"].values()),
                ]
            )
        print(table([*header, *(f"of {shape}" for shape in rates)], rows))
        for key, ratio in part.get("prefopt_over_trl", {}).items():
            by_round = ", ".join(f"{value:.3f}" for value in ratio["by_round"])
            print(f"prefopt / trl, {key}: {by_round}; median {ratio['median']:.3f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, dtypes, sides = parser.add_argument, list(TRL_MODES), ["trl", "prefopt"]
    add("data", help="HH-RLHF pairs: hh_harmless.jsonl.gz")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=4, help="timed optimizer steps of each process")
    add("--dtypes", nargs="+", default=dtypes, choices=dtypes)
    add("--sides", nargs="+", default=sides, choices=sides)
    add("--threads", type=int, default=os.cpu_count())
    add("--micro_tokens", type=int, default=4096, help="prefopt: token budget of one forward")
    modes = [mode for ways in TRL_MODES.values() for mode in ways]
    add("--trl_modes", nargs="+", default=modes, choices=modes, metavar="MODE", help=str(modes))
    add("--trl_reference", default="step", choices=["step", "precompute"])
    add("--profile", action="store_true", help="prefopt: print the costliest operators")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "prefopt-bench-dpo-step")
    add("--out", type=Path, default=RESULTS / "bench_dpo_step.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not Path(args.data).exists():
        print(f"skipped: {args.data} is not there; give the path of hh_harmless.jsonl.gz")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    job = {"side": "prepare", "work": str(args.work), "data": args.data, "threads": args.threads}
    data = run_worker(__file__, job, log=args.work / "prepare.log")
    needed = args.rounds * BATCH * (1 + args.steps)
    if data["pairs"] < needed:
        raise SystemExit(f"{args.rounds} rounds of {args.steps} steps need {needed} pairs: {data}")
    runs, gemms = run_rounds(args)
    summary = summarise(runs, gemms)
    show(summary)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "work", "out")}
    packages = versions("torch", "transformers", "trl", "peft", "accelerate", "tokenizers")
    result = {"settings": settings, "data": data, "summary": summary, "runs": runs, "gemm": gemms}
    write_result(args.out, result | {"packages": packages, "environment": environment()})
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        order = json.loads(sys.argv[sys.argv.index("--worker") + 1])
        report(WORKERS[order["side"]](order))
    else:
        main()
