"""DPO steps with LoRA: prefopt's layers against PEFT's under autograd, in the same policy, on CPU.

    PYTHONPATH=.:kernels python benchmarks/bench_lora.py ../shared/data/hh_harmless.jsonl.gz

Only the adapter differs: model (see dpo_sides.py), packing, attention, head, loss, optimizer, and
order of the pairs are prefopt's on every side. "peft" wraps the same linear layers as prefopt
does (float32 products through oneDNN), "peft, nn.Linear" those of torch. With `--dtypes nf4` the
base is 4-bit and computes in bfloat16, prefopt's own against bitsandbytes' Linear4bit under PEFT
(which stays in training mode: in evaluation its CPU path repacks the weights and loses gradients).

A step is the reference pass, forward, backward and AdamW on 4 pairs. The sides take turns, step by
step and in another order each time, in one process; the ratio is the median over the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, Clock, environment, report, run_worker, table, versions, write_result
from dpo_sides import ALPHA, BATCH, BETA, LR, MAX_LENGTH, RANK, prepare

DTYPES = ("float32", "bfloat16", "nf4")
SIDES = {
    "float32": ("prefopt", "peft", "peft, nn.Linear"),
    "bfloat16": ("prefopt", "peft"),
    "nf4": ("prefopt", "peft + bitsandbytes"),
}


class Side:
    """A policy with an adapter, its optimizer, and how to switch the adapter off."""

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        import torch

        import prefopt

        nf4, dtype = job["dtype"] == "nf4", "bfloat16" if job["dtype"] == "nf4" else job["dtype"]
        torch.manual_seed(0)
        ours = name == "prefopt"
        lora = prefopt.LoraConfig(r=RANK, alpha=ALPHA) if ours else None
        self.policy = prefopt.Policy.from_pretrained(
            job["model"], lora=lora, dtype=dtype, device="cpu",
            quantize="nf4" if nf4 and ours else None,
        )  # fmt: skip
        self.off = self.policy.reference if ours else self._wrap(name, dtype).disable_adapter
        self.names = [n for n, p in self.policy.named_parameters() if p.requires_grad]
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
        self.objective = prefopt.DPO(beta=BETA)
        self.train_mode = not ours

    def _wrap(self, name: str, dtype: str) -> Any:
        import peft
        import torch
        from torch import nn

        model = self.policy.model
        if name == "peft, nn.Linear":
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.__class__ = nn.Linear
        elif name == "peft + bitsandbytes":
            _to_bitsandbytes(model, getattr(torch, dtype))
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(model, config)

    def step(self, groups: list[Any], micro_tokens: int) -> dict[str, Any]:
        """Reference pass and optimizer step; the loss, and seconds of each part."""
        import torch

        import prefopt

        began = time.perf_counter()
        self.policy.train()
        with torch.no_grad(), self.off():
            if self.train_mode:
                self.policy.train()
            batches = [
                replace(batch, ref_logprobs=self.policy(batch))
                for batch in prefopt.pack(
                    groups, max_tokens=micro_tokens, layout=self.policy.layout
                )
            ]
        middle = time.perf_counter()
        self.policy.train()
        stats = prefopt.optimizer_step(self.policy, self.objective, batches, self.optimizer)
        ended = time.perf_counter()
        return {
            "loss": stats.loss.item(),
            "grad_norm": stats.grad_norm.item(),
            "seconds": ended - began,
            "training": ended - middle,
        }


def _to_bitsandbytes(model: Any, dtype: Any) -> None:
    """Every linear layer but the head as Linear4bit, nf4 with double quantisation."""
    import bitsandbytes as bnb
    from torch import nn

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
            continue
        out, width = module.weight.shape
        new = bnb.nn.Linear4bit(width, out, False, dtype, True, "nf4")
        new.weight = bnb.nn.Params4bit(
            module.weight.data.to(dtype), requires_grad=False, quant_type="nf4",
            compress_statistics=True,
        )  # fmt: skip
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to("cpu"))


def saved_bytes(side: Side, groups: list[Any], micro_tokens: int) -> float:
    """Bytes that autograd keeps per token of one forward, weights left out, shared memory once."""
    import torch

    import prefopt

    weights = {p.untyped_storage().data_ptr() for p in side.policy.parameters()}
    weights |= {b.untyped_storage().data_ptr() for b in side.policy.buffers()}
    kept: dict[int, int] = {}

    def pack(x: Any) -> Any:
        where = x.untyped_storage().data_ptr()
        if where not in weights:
            kept[where] = x.untyped_storage().nbytes()
        return x

    [batch, *_] = prefopt.pack(groups, max_tokens=micro_tokens, layout=side.policy.layout)
    side.policy.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive = side.policy(batch)
    del alive
    return sum(kept.values()) / len(batch.input_ids)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: all sides of one dtype, step by step in turn."""
    import torch

    torch.set_num_threads(job["threads"])
    import prefopt

    sides = {name: Side(name, job) for name in job["sides"]}
    fitting = json.loads((Path(job["work"]) / "pairs.json").read_text())
    pairs = prefopt.load_preferences([x["pair"] for x in fitting[: BATCH * (1 + job["steps"])]])
    tokenizer = next(iter(sides.values())).policy.tokenizer
    encoded = prefopt.encode_pairs(pairs, tokenizer, max_length=MAX_LENGTH)
    clock, shuffled = Clock(), random.Random(0)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for start in range(0, len(encoded), BATCH):
        if start == BATCH:  # the first step warms up
            clock.start()
        order = list(sides)
        shuffled.shuffle(order)
        for name in order:
            groups = encoded[start : start + BATCH]
            runs[name].append(sides[name].step(groups, job["micro_tokens"]))
    clock.stop()
    kept = {n: saved_bytes(s, encoded[:BATCH], job["micro_tokens"]) for n, s in sides.items()}
    weights = {
        n: sum(t.nbytes for t in (*s.policy.parameters(), *s.policy.buffers()))
        for n, s in sides.items()
    }
    figures = {"runs": runs, "saved_bytes_per_token": kept, "model_bytes": weights}
    if job["profile"]:
        figures["profile"] = profile(sides, encoded[:BATCH], job["micro_tokens"])
    return figures | {"others": clock.figures()["others"], "dtype": job["dtype"]}


def profile(sides: dict[str, Side], groups: list[Any], micro_tokens: int) -> dict[str, str]:
    """The costliest operators of one step of each side."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    tables = {}
    for name, side in sides.items():
        with torch_profile(activities=[ProfilerActivity.CPU]) as profiler:
            side.step(groups, micro_tokens)
        tables[name] = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
    return tables


def compare(result: dict[str, Any]) -> dict[str, Any]:
    """Per side: median seconds of a step, and how much longer than prefopt's, step by step."""
    runs = {name: own[1:] for name, own in result["runs"].items()}
    summary: dict[str, Any] = {"others": result["others"]}
    for name, own in runs.items():
        ratios = {
            key: [a[key] / b[key] for a, b in zip(own, runs["prefopt"], strict=True)]
            for key in ("seconds", "training")
        }
        summary[name] = {
            "seconds": statistics.median(r["seconds"] for r in own),
            "training_seconds": statistics.median(r["training"] for r in own),
            "times_prefopt": statistics.median(ratios["seconds"]),
            "training_times_prefopt": statistics.median(ratios["training"]),
            "by_step": ratios["seconds"],
            "first_loss": result["runs"][name][0]["loss"],
            "first_grad_norm": result["runs"][name][0]["grad_norm"],
            "saved_bytes_per_token": result["saved_bytes_per_token"][name],
            "model_bytes": result["model_bytes"][name],
        }
    return summary


def show(dtype: str, summary: dict[str, Any]) -> None:
    header = ["", "s/step", "x prefopt", "training s", "x", "kept KB/token", "model MB", "loss 1"]
    rows = [
        [
            name,
            f"{own['seconds']:.3f}",
            f"{own['times_prefopt']:.2f}",
            f"{own['training_seconds']:.3f}",
            f"{own['training_times_prefopt']:.2f}",
            f"{own['saved_bytes_per_token'] / 1e3:.0f}",
            f"{own['model_bytes'] / 1e6:.0f}",
            f"{own['first_loss']:.6f}",
        ]
        for name, own in summary.items()
        if name != "others"
    ]
    print(f"\n{dtype} (other programs {summary['others']:.0%})\n{table(header, rows)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", help="HH-RLHF pairs: hh_harmless.jsonl.gz")
    add("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    add("--steps", type=int, default=8, help="timed steps of each side")
    add("--threads", type=int, default=os.cpu_count())
    add("--micro_tokens", type=int, default=4096)
    add("--profile", action="store_true", help="print the costliest operators of a step")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "prefopt-bench-dpo-step")
    add("--out", type=Path, default=RESULTS / "bench_lora.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not Path(args.data).exists():
        print(f"skipped: {args.data} is not there; give the path of hh_harmless.jsonl.gz")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    job = {"work": str(args.work), "threads": args.threads, "model": str(args.work / "model")}
    data = run_worker(
        __file__, job | {"side": "prepare", "data": args.data}, log=args.work / "prepare.log"
    )
    results, summary = [], {}
    for dtype in args.dtypes:
        order = job | {"side": "measure", "dtype": dtype, "sides": SIDES[dtype]}
        order |= {"steps": args.steps, "micro_tokens": args.micro_tokens, "profile": args.profile}
        results.append(run_worker(__file__, order, log=args.work / f"lora-{dtype}.log"))
        for name, text in results[-1].pop("profile", {}).items():
            print(f"{dtype}, {name}\n{text}")
        summary[dtype] = compare(results[-1])
        show(dtype, summary[dtype])
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "work", "out")}
    packages = versions("torch", "transformers", "peft", "bitsandbytes")
    result = {"settings": settings, "data": data, "summary": summary, "results": results}
    write_result(args.out, result | {"packages": packages, "environment": environment()})
    print(f"\nwritten: {args.out}")


WORKERS = {"prepare": prepare, "measure": measure}

if __name__ == "__main__":
    if "--worker" in sys.argv:
        task = json.loads(sys.argv[sys.argv.index("--worker") + 1])
        report(WORKERS[task["side"]](task))
    else:
        main()
