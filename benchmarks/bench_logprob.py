"""Log-probs of given tokens from hidden states and a head, forward and backward: against the peers.

    PYTHONPATH=.:kernels python benchmarks/bench_logprob.py            # CPU: about 8 minutes
    PYTHONPATH=.:kernels python benchmarks/bench_logprob.py --full     # every shape and part
    PYTHONPATH=.:kernels python benchmarks/bench_logprob.py --device cuda

All sides (logprob_sides.py) take turns within one process: warm-up, then rounds in rotating order,
medians. A side's time stands beside the bare GEMMs, products of the same sizes in the fastest of
several ways, timed in the same rounds, and beside the fastest peer. On a CPU the first call at full
size counts as a round, peers more than `--slack` times slower in it than the fastest one are not
timed again (1 run), and those more than 1.75 times slower are left out at larger shapes; `--full`
keeps them. Compiled peers are compiled once for all shapes, as for batches whose lengths vary. On a
GPU the L2 cache is flushed before each call, times are those between events, and the limit is what
the operation must do at rates measured in the same run: its products at cuBLAS's, or its inputs and
outputs at a copy's. "others" is the share of the machine that other programs took meanwhile: run it
on an idle one.

Peak memory is what a call adds to what is resident, outputs left out. On a CPU each (side, case)
has a process: inputs made, one small call (one of full size for compiled sides), the peak reset
(5 in /proc/self/clear_refs), forward and backward once, then VmHWM minus what was resident at the
reset minus the bytes of outputs and gradients. On a GPU: torch.cuda.max_memory_allocated likewise.

Errors are against float64 from the same inputs: the worst token, the sum of 512 tokens, the
gradients' relative L2 error. Recompilations: dynamo graphs and Triton kernels that 50 lengths, and
on a GPU so 5 temperatures, need after the first call; oneDNN's own cannot be counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import logprob_sides as sides
from common import (
    RESULTS,
    Clock,
    Compilations,
    Stopwatch,
    copy_rate,
    cuda_gemm_rate,
    cuda_peak,
    environment,
    geometric_mean,
    output_bytes,
    peak_rss_bytes,
    report,
    reset_peak,
    run_worker,
    table,
    versions,
    write_result,
)
from logprob_sides import COMPILED, OURS, PEERS, SIDES, Absent, Case

SHAPES = ["512x32768", "896x151936", "2048x151936", "4096x128256", "2304x256000"]
PARTS = ["time", "error", "memory", "recompile", "gather", "tiles"]
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
ERROR_ROWS = 512
ERRORS = ("token_max", "sum", "entropy_max", "d_hidden", "d_weight")
LENGTHS = [1, 2, 16, 17, 32, 33, *range(40, 480, 10)]  # 50


class Run:
    """Settings, the watch, and what was found so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.cuda = args, args.device, args.device != "cpu"
        self.stamp = {"packages": versions(*PACKAGES), "environment": environment()}
        self.watch, self.clock = Stopwatch(args.device), Clock()
        self.found: dict[str, Any] = {"settings": settings(args), "limits": {}}
        self.patience = math.inf if args.full else 8.0 if self.cuda else 1.75
        self.slow: dict[tuple, float] = {}  # (side, dtype, head, entropy): times the fastest peer

    def seconds(self, call: Callable[[Callable[[], None]], Any]) -> tuple[float, float]:
        """Seconds of a call and of its forward; counts what else the machine did meanwhile."""
        self.clock.start()
        times = self.watch.measure(call)[1:]
        self.clock.stop()
        return times

    def add(self, part: str, entry: dict[str, Any]) -> None:
        self.found.setdefault(part, []).append(entry)
        self.save()

    def save(self) -> None:
        write_result(self.args.out, self.found | self.stamp)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if k not in ("out", "worker")}


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns, or why it does not: a peer that fails must not stop the others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(), None
    except Absent as absent:
        return None, str(absent)
    except Exception as error:
        return None, "failed: " + sides.first_line(error)[:200]


# --- time ----------------------------------------------------------------------------------------


def prepare(run: Run, name: str, p: sides.Problem) -> dict[str, Any]:
    """Builds a side and warms it up -> {step, warm seconds, compile seconds, peak}; or absent."""
    case, most = p.case, run.args.memory_gib * 2**30
    need = sides.needed_bytes(name, case, run.device)
    if need > most:
        raise Absent(f"would need about {need / 2**30:.0f} GiB")
    known = run.slow.get(kind(name, case), 0.0)
    if known > run.patience:
        raise Absent(f"left out: {known:.1f} times the fastest peer at a smaller shape")
    forward = SIDES[name](case, run.device)
    small = p if name in COMPILED or run.cuda else p.rows(8)
    first, _ = run.seconds(lambda mark: sides.step(forward, small, mark))
    entry = {"step": lambda mark: sides.step(forward, p, mark), "first": first}
    if run.cuda:
        entry["peak_bytes"] = cuda_peak(lambda: sides.step(forward, p))
    return entry | {"warm": run.seconds(entry["step"])}


def bare(run: Run, p: sides.Problem) -> dict[str, dict[str, Any]]:
    """The two fastest ways to do the bare GEMMs, timed once; they go on to the rounds."""
    case, ways = p.case, {}
    for name, call in sides.bare_gemms(p).items():
        if run.slow.get(kind(f"bare {name}", case), 0.0) > run.patience:
            continue
        step = lambda mark, call=call: call()  # noqa: E731
        warm = [run.seconds(step) for _ in range(2 if run.cuda else 1)][-1]
        ways[f"bare {name}"] = {"step": step, "warm": warm}
    best = sorted(ways, key=lambda name: ways[name]["warm"][0])
    for name in best:
        run.slow[kind(name, case)] = ways[name]["warm"][0] / ways[best[0]]["warm"][0]
    return {name: ways[name] for name in best[:2]}


def kind(name: str, case: Case) -> tuple:
    return name, case.dtype, case.head, case.entropy


def time_case(run: Run, case: Case) -> dict[str, Any]:
    """One case: every side that can, and the bare GEMMs, in rounds."""
    args, p, entries, absent = run.args, sides.problem(case, run.device), {}, {}
    run.clock = Clock()
    for name in args.sides:
        entry, reason = attempt(lambda name=name: prepare(run, name, p))
        if reason:
            absent[name] = reason
        else:
            entries[name] = entry
        release(run)
    warm = {name: entry["warm"][0] for name, entry in entries.items()}
    fastest = min((warm[name] for name in warm if name in PEERS), default=0.0)
    run.slow |= {kind(name, case): warm[name] / fastest for name in warm if name in PEERS}
    contend = [name for name in warm if name in OURS or warm[name] <= args.slack * fastest]
    entries |= (gemms := bare(run, p))
    times = rounds(run, entries, [*contend, *gemms])
    found = {name: figures(entries[name], times.get(name, [])) for name in entries}
    result = {"case": case._asdict(), "flops": case.flops, "absent": absent, "sides": found}
    result["others"] = run.clock.figures()["others"]
    return result | compare(run, case, found)


def rounds(run: Run, entries: dict[str, Any], names: list[str]) -> dict[str, list]:
    """`--rounds` rounds, or as many as `--case_seconds` allow (2 at least) -> times by side."""
    times, began = {name: [] for name in names}, time.monotonic()
    done = 0 if run.cuda else 1
    for name in names if done else []:
        times[name].append(entries[name]["warm"])
    for number in range(done, run.args.rounds):
        if number >= 2 and time.monotonic() - began > run.args.case_seconds:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(run.seconds(entries[name]["step"]))
    return times


def figures(entry: dict[str, Any], times: list[tuple[float, float]]) -> dict[str, Any]:
    """Seconds of a side: over its rounds, or of its warm-up if it had none."""
    runs, taken = len(times), times or [entry["warm"]]
    found = {
        "runs": runs or 1,
        "seconds": statistics.median(t for t, _ in taken),
        "min": min(t for t, _ in taken),
        "forward": statistics.median(f for _, f in taken),
        "backward": statistics.median(t - f for t, f in taken),
        "times": [t for t, _ in taken],
    }
    return found | {key: entry[key] for key in ("first", "peak_bytes") if key in entry}


def compare(run: Run, case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """Ratios to the bare GEMMs and the fastest peer, and the part of the limit.

    On a GPU also that of forward and backward by themselves, counting for the backward the one or
    two products it cannot avoid, not the logits that it may form again.
    """
    gemm = min((n for n in found if n.startswith("bare ")), key=lambda n: found[n]["seconds"])
    bound, peers = found[gemm]["seconds"], [n for n in found if n in PEERS]
    fastest = min(peers, key=lambda n: found[n]["seconds"]) if peers else None
    limit = bound
    if run.cuda:
        rates = run.found["limits"]
        rate = rates[case.dtype]
        forward = 2 * case.m * case.h * case.v / rate
        limit = max(case.flops / rate, case.bytes / rates["copy"])
    for entry in found.values():
        entry["over_bare"] = entry["seconds"] / bound
        entry["of_limit"] = limit / entry["seconds"]
        if run.cuda:
            entry["forward_of_limit"] = forward / entry["forward"]
        if run.cuda and case.head != "forward" and entry["backward"]:
            entry["backward_of_limit"] = (case.flops / rate - forward) / entry["backward"]
        if fastest:
            entry["over_fastest_peer"] = entry["seconds"] / found[fastest]["seconds"]
    return {"bare": gemm, "fastest_peer": fastest, "limit_seconds": limit}


def release(run: Run) -> None:
    gc.collect()
    if run.cuda:
        import torch

        torch.cuda.empty_cache()


def show_case(run: Run, case: Case, result: dict[str, Any]) -> None:
    found = result["sides"]
    print(f"\n{case}: others {result['others']:.0%}")
    header = ["side", "ms", "min", "runs", "x bare", "x fastest peer", "of limit"]
    rows = []
    for name, x in sorted(found.items(), key=lambda item: item[1]["seconds"]):
        row = [name, ms(x["seconds"]), ms(x["min"]), x["runs"], f"{x['over_bare']:.2f}"]
        row += [f"{x['over_fastest_peer']:.2f}" if "over_fastest_peer" in x else "-"]
        row += [f"{x['of_limit']:.0%}"]
        if run.cuda:
            for way in ("forward", "backward"):
                share = x.get(f"{way}_of_limit")
                row += [ms(x[way]) + (f" {share:.0%}" if share else "")]
            row += [f"{case.flops / x['seconds'] / 1e12:.0f}"]
            row += [f"{x['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in x else "-"]
        rows.append(row)
    print(table([*header, *(["fwd", "bwd", "TFLOP/s", "peak MiB"] if run.cuda else [])], rows))
    for name, reason in result["absent"].items():
        print(f"  {name}: {reason}")


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


# --- the other parts -----------------------------------------------------------------------------


def error_case(run: Run, case: Case, names: list[str]) -> dict[str, Any]:
    """Each side's error against float64 on the same `ERROR_ROWS` tokens."""
    p, found, absent = sides.problem(case, run.device), {}, {}
    right = sides.exact(p)
    for name in names:

        def once(name=name):
            if sides.needed_bytes(name, case, run.device) > run.args.memory_gib * 2**30:
                raise Absent("would need too much memory")
            kept = sides.step(SIDES[name](case, run.device), p)
            return sides.errors(*kept, right, p)

        found[name], absent[name] = attempt(once)
        release(run)
    return {
        "case": case._asdict(),
        "sides": {name: x for name, x in found.items() if x},
        "absent": {name: reason for name, reason in absent.items() if reason},
    }


def memory_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: bytes one call of one side adds to what is resident, outputs left out."""
    import torch

    torch.set_num_threads(job["threads"])
    case, name = Case(**job["case"]), job["side"]
    p = sides.problem(case, "cpu")
    sides._weight.cache_clear()
    forward, reason = attempt(lambda: SIDES[name](case, "cpu"))
    if reason is None:
        small = p if name in COMPILED else p.rows(8)
        _, reason = attempt(lambda: sides.step(forward, small) and None)
    if reason:
        return {"absent": reason}
    gc.collect()
    before = reset_peak()
    kept = sides.step(forward, p)
    return {"bytes": peak_rss_bytes() - before - output_bytes(kept)}


def memory_case(run: Run, case: Case, name: str) -> dict[str, Any]:
    _, reason = attempt(lambda: SIDES[name](case, "cpu"))
    if reason:
        return {"case": case._asdict(), "side": name, "absent": reason}
    job = {"side": name, "case": case._asdict(), "threads": run.args.threads}
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = run_worker(__file__, job, log=Path(folder) / "memory.log")
        except SystemExit as died:  # of too little memory, most likely
            found = {"absent": str(died).splitlines()[0][:200]}
    return {"case": case._asdict(), "side": name} | found


def recompilations(run: Run, name: str) -> dict[str, Any]:
    """Of one side over `LENGTHS`, after a first call; `case.m` is the longest."""
    case = Case("bfloat16" if run.cuda else "float32", 128, 4097, max(LENGTHS))
    p = sides.problem(case, run.device)
    forward = SIDES[name](case, run.device)
    sides.step(forward, p)
    with Compilations() as counted:
        for length in LENGTHS:
            sides.step(forward, p.rows(length))
    return {"side": name, "graphs": counted.graphs, "kernels": counted.kernels}


def temperatures(run: Run, name: str) -> dict[str, Any]:
    """Of prefopt over 5 temperatures, which kernels may take for constants."""
    from prefopt.logprobs import token_logprobs

    case = Case("bfloat16" if run.cuda else "float32", 128, 4097, 256)
    p, impl = sides.problem(case, run.device), "fused" if name == "prefopt-fused" else "auto"
    with Compilations() as counted:
        for i in range(6):
            x = token_logprobs(p.hidden, p.weight, p.targets, temperature=0.5 + i / 8, impl=impl)
            x.sum().backward()
            if not i:
                counted.kernels = 0
    return {"temperature_kernels": counted.kernels}


def gather_case(run: Run, dtype: str, v: int, m: int) -> dict[str, Any]:
    """Log-softmax and gather on given logits: seconds and part of the copy rate, either way."""
    import torch

    torch.manual_seed(0)
    logits = torch.randn(m, v, device=run.device).mul_(2).to(getattr(torch, dtype))
    logits.requires_grad_()
    targets = torch.randint(0, v, (m,), device=run.device)
    g, steps, absent = torch.randn(m, device=run.device), {}, {}

    def step(forward: sides.Forward, mark: Callable[[], None]):
        (logps,) = forward(logits, targets)
        mark()
        return torch.autograd.grad(logps, logits, g.to(logps.dtype))

    for name, build in sides.GATHER.items():

        def built(build=build):
            forward = build(run.device)
            step(forward, lambda: None)
            call = lambda mark: step(forward, mark)  # noqa: E731
            return {"step": call, "warm": run.seconds(call)}

        entry, reason = attempt(built)
        if reason:
            absent[name] = reason
        else:
            steps[name] = entry
        release(run)
    times = rounds(run, steps, list(steps))
    moved, rate, found = logits.numel() * logits.itemsize, run.found["limits"]["copy"], {}
    for name in steps:
        found[name] = figures({}, times[name])
        found[name]["forward_of_copy"] = moved / rate / found[name]["forward"]
        found[name]["backward_of_copy"] = 2 * moved / rate / found[name]["backward"]
    case = {"dtype": dtype, "v": v, "m": m}
    return {"case": case, "sides": found, "absent": absent}


def tile_case(run: Run, case: Case) -> dict[str, Any]:
    """prefopt's host loop with other tile budgets than its own (elements), one run of rounds."""
    from prefopt import folding

    p, tables = sides.problem(case, run.device), [folding.UNIT_TILE, folding.TILE]
    before, tried = [dict(t) for t in tables], {}
    forward = SIDES["prefopt"](case, run.device)

    def step(budget: int | None, mark: Callable[[], None]):
        for t, was in zip(tables, before, strict=True):
            t.clear()
            t.update(was if budget is None else was | {run.device: budget})
        return sides.step(forward, p, mark)

    for budget in [None, *(2**k for k in (range(22, 31, 2) if run.cuda else range(18, 25, 2)))]:
        call = lambda mark, budget=budget: step(budget, mark)  # noqa: E731
        warm, reason = attempt(lambda call=call: [run.seconds(call) for _ in range(2)][1])
        if reason is None:
            tried[str(budget or "default")] = {"step": call, "warm": warm}
    times = rounds(run, tried, list(tried))
    step(None, lambda: None)  # as it was
    found = {name: figures(tried[name], times[name]) for name in tried}
    return {"case": case._asdict(), "budgets": found}


# --- which cases, in which order -----------------------------------------------------------------


def cases(args: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """(those that matter most, the rest): on a CPU all shapes with a frozen head without entropy.

    The rest are, unless asked for, the smallest shape's with a trained head and with entropy.
    """
    every = [
        Case(dtype, *map(int, shape.split("x")), rows, head, entropy == "yes")
        for head in args.heads or sides.HEADS[args.device == "cpu" :]
        for entropy in args.entropy or ["no", "yes"]
        for shape in args.shapes
        for dtype in args.dtypes
        for rows in rows_of(args, shape)
        if (head, entropy) != ("forward", "yes")
    ]
    if args.device != "cpu":
        every.sort(key=urgency)
        return [c for c in every if urgency(c)[0] < 2], [c for c in every if urgency(c)[0] >= 2]
    plain = [c for c in every if c.head == "frozen" and not c.entropy]
    small = args.shapes if args.heads or args.entropy else args.shapes[: 1 + args.full]
    return plain, [c for c in every if c not in plain and c.shape in small]


def rows_of(args: argparse.Namespace, shape: str) -> list[int]:
    if args.rows or args.device != "cpu":
        return args.rows or [8192, 2048, 256, 32768]
    if shape == "512x32768":
        return [1024]
    return [256, 1024] if args.full and shape == "896x151936" else [256]


def urgency(case: Case) -> tuple[int, int]:
    """On a GPU: bfloat16 before float32, 8192 rows first, without entropy first."""
    rows = {8192: 0, 2048: 1, 256: 2, 32768: 3}.get(case.m, 4)
    kind = {"frozen": 0, "trained": 1, "forward": 1}[case.head] + 2 * case.entropy
    return rows + kind + (4 if case.dtype == "float32" else 0), -case.m


def jobs(run: Run) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, what to do) of everything that was asked for, what is worth most first."""
    args, (first, rest) = run.args, cases(run.args)
    ours, everyone = [n for n in args.sides if n in OURS], args.sides
    wrong = [c._replace(m=ERROR_ROWS) for c in first + rest if c.head != "forward"]
    wrong = list(dict.fromkeys(wrong))
    all_sides = [c for c in wrong if run.cuda or args.full or c.shape == args.shapes[0]]
    lean = [c for c in first if c.dtype == args.dtypes[0] and c.shape == args.shapes[0]]
    yield "", lambda: measure_rates(run)
    for dtype, (v, m) in [(d, s) for s in args.gather for d in reversed(args.dtypes)]:
        yield f"gather {dtype} {v} {m}", lambda d=dtype, v=v, m=m: gather_part(run, d, v, m)
    yield from ((f"time {c}", lambda c=c: time_part(run, c)) for c in first)
    yield from ((f"recompile {n}", lambda n=n: recompile_part(run, n)) for n in everyone)
    yield from ((f"error {c}", lambda c=c: error_part(run, c, everyone)) for c in all_sides)
    if not run.cuda:
        for c, name in [(c, n) for c in first for n in ours]:
            yield f"memory {c} {name}", lambda c=c, n=name: memory_part(run, c, n)
    yield from ((f"time {c}", lambda c=c: time_part(run, c)) for c in rest)
    others = [c for c in wrong if c not in all_sides]
    yield from ((f"error {c}", lambda c=c: error_part(run, c, ours)) for c in others)
    if not run.cuda:
        wanted = first + rest if args.full else lean
        pairs = [(c, n) for c in wanted for n in everyone if n not in ours]
        for c, name in [(c, n) for c in rest for n in ours] + pairs:
            yield f"memory {c} {name}", lambda c=c, n=name: memory_part(run, c, n)
    for c in [c for c in first if c.m == first[0].m][: args.tile_cases]:
        yield f"tiles {c}", lambda c=c: tile_part(run, c)


# --- the whole -----------------------------------------------------------------------------------


def measure(run: Run) -> None:
    """All jobs whose part is wanted, until the time is up; the rest is noted as left out."""
    began, left = time.monotonic(), []
    for name, job in jobs(run):
        if name and name.split()[0] not in run.args.parts:
            continue
        if time.monotonic() - began > run.args.budget:
            left.append(name)
            continue
        job()
        release(run)
        sys.stdout.flush()
    run.found["left_out"] = left
    run.found["summary"] = summarise(run)


def measure_rates(run: Run) -> None:
    if not run.cuda and "gather" not in run.args.parts:
        return
    limits = {"copy": copy_rate(run.device, gib=4 if run.cuda else 0.25)}
    if run.cuda:
        limits |= {dtype: cuda_gemm_rate(dtype) for dtype in run.args.dtypes}
    run.found["limits"] = limits
    print("measured:", ", ".join(f"{k} {v / 1e12:.3g}e12/s" for k, v in limits.items()))


def gather_part(run: Run, dtype: str, v: int, m: int) -> None:
    entry = gather_case(run, dtype, v, m)
    show_gather(entry)
    run.add("gather", entry)


def time_part(run: Run, case: Case) -> None:
    result = time_case(run, case)
    show_case(run, case, result)
    run.add("time", result)


def recompile_part(run: Run, name: str) -> None:
    entry, reason = attempt(lambda: recompilations(run, name))
    if name in OURS and entry is not None:
        entry |= attempt(lambda: temperatures(run, name))[0] or {}
    run.add("recompilations", entry or {"side": name, "absent": reason})
    counts = ", ".join(f"{n} {k}" for k, n in (entry or {}).items() if k != "side")
    print(f"compiled over {len(LENGTHS)} lengths after the first call: {name}: {counts or reason}")


def error_part(run: Run, case: Case, names: list[str]) -> None:
    entry = error_case(run, case, names)
    run.add("error", entry)
    keys = [k for k in ERRORS if any(k in x for x in entry["sides"].values())]
    rows = [[name, *(f"{x[k]:.1e}" for k in keys)] for name, x in entry["sides"].items()]
    print(f"\nerror against float64, {case}\n" + table(["side", *keys], rows))


def memory_part(run: Run, case: Case, name: str) -> None:
    entry = memory_case(run, case, name)
    run.add("memory", entry)
    found = f"{entry['bytes'] / 2**20:.1f} MiB" if "bytes" in entry else entry["absent"]
    print(f"peak memory beyond inputs and outputs, {case}: {name} {found}")


def tile_part(run: Run, case: Case) -> None:
    entry = tile_case(run, case)
    rows = [[n, ms(x["seconds"]), ms(x["min"])] for n, x in entry["budgets"].items()]
    print(f"\ntiles, {case}\n" + table(["elements", "ms", "min"], rows))
    run.add("tiles", entry)


def show_gather(entry: dict[str, Any]) -> None:
    rows = [
        [name, ms(x["forward"]), f"{x['forward_of_copy']:.0%}", ms(x["backward"]),
         f"{x['backward_of_copy']:.0%}"]
        for name, x in entry["sides"].items()
    ]  # fmt: skip
    header = ["side", "forward ms", "of copy rate", "backward ms", "of copy rate"]
    print("\ngather on given logits:", entry["case"], "\n" + table(header, rows))
    for name, reason in entry["absent"].items():
        print(f"  {name}: {reason}")


def summarise(run: Run) -> dict[str, Any]:
    """By dtype and kind of head: prefopt over the bare GEMMs, and the fastest peer over prefopt."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in run.found.get("time", []):
        case = Case(**result["case"])
        if "prefopt" in result["sides"]:
            kind = f"{case.dtype} {case.head}{' with entropy' if case.entropy else ''}"
            groups.setdefault(kind, []).append(result)
    summary = {}
    for kind, results in groups.items():
        ours = [r["sides"]["prefopt"] for r in results]
        gains = [1 / x["over_fastest_peer"] for x in ours if "over_fastest_peer" in x]
        summary[kind] = {
            "cases": len(results),
            "over_bare_max": max(x["over_bare"] for x in ours),
            "of_limit_min": min(x["of_limit"] for x in ours),
            "gain_min": min(gains) if gains else None,
            "gain_geometric_mean": geometric_mean(gains) if gains else None,
        }
    return summary


def show_summary(summary: dict[str, Any]) -> None:
    rows = [
        [kind, x["cases"], f"{x['over_bare_max']:.2f}", f"{x['of_limit_min']:.0%}",
         *(f"{x[k]:.2f}" if x[k] else "-" for k in ("gain_min", "gain_geometric_mean"))]
        for kind, x in summary.items()
    ]  # fmt: skip
    if rows:
        header = ["prefopt", "cases", "worst x bare", "worst of limit"]
        header += ["fastest peer / prefopt: least", "geometric mean"]
        print("\n" + table(header, rows))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--full", action="store_true", help="CPU: every side, shape and part, however slow")
    add("--parts", nargs="+", choices=PARTS, help="default: all but gather and tiles")
    add("--shapes", nargs="+", default=None, metavar="HxV", help=f"default: {' '.join(SHAPES)}")
    add("--rows", nargs="+", type=int, help="default: 256 or 1024 on CPU, 256 to 32768 on GPU")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--heads", nargs="+", choices=sides.HEADS, help="default: all where it is affordable")
    add("--entropy", nargs="+", choices=["no", "yes"], help="default: both where affordable")
    add("--sides", nargs="+", default=list(SIDES), choices=list(SIDES), metavar="SIDE")
    add("--rounds", type=int, default=5)
    add("--case_seconds", type=float, help="no new round after these; default: 12, on GPU 6")
    add("--budget", type=float, help="seconds after which nothing new starts; default: 480")
    add("--slack", type=float, help="peers slower than this x the fastest have one run; 1.25")
    add("--memory_gib", type=float, help="sides needing more are left out; 14, or 3/4 of the GPU")
    add("--gather", nargs="+", type=pair, default=[(151936, 8192), (32768, 8192)], metavar="VxM")
    add("--tile_cases", type=int, default=2, help="tiles: how many of the cases")
    add("--threads", type=int, default=os.cpu_count())
    add("--out", type=Path, default=RESULTS / "bench_logprob.json")
    args = parser.parse_args(given)
    gpu = args.device != "cpu"
    args.parts = args.parts or [p for p in PARTS if p not in ("gather", "tiles")]
    args.shapes = args.shapes or SHAPES[gpu:]
    args.case_seconds = args.case_seconds or (6 if gpu else 12)
    args.budget = args.budget or (36000 if args.full else 480)
    args.slack = args.slack or (10 if gpu or args.full else 1.25)
    args.memory_gib = args.memory_gib or (0.0 if gpu else 14.0)
    return args


def pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: --device cuda cannot run")
    torch.set_num_threads(args.threads)
    if not args.memory_gib:
        args.memory_gib = 0.75 * torch.cuda.get_device_properties(0).total_memory / 2**30
    run = Run(args)
    measure(run)
    show_summary(run.found["summary"])
    left = run.found["left_out"]
    if left:
        print(f"out of time after {args.budget:.0f} s, {len(left)} left out:", "; ".join(left))
    run.save()
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        report(memory_worker(json.loads(sys.argv[sys.argv.index("--worker") + 1])))
    else:
        main()
