"""The 4-bit linear layer against bitsandbytes' training path and a bfloat16 linear.

    PYTHONPATH=.:kernels python benchmarks/bench_nf4.py

Everything runs in one process and takes turns, in another order each round; the ratios are medians
over the rounds. x is bfloat16 [tokens, in], the weight NF4 with double quantisation, frozen;
"backward" has the gradient of x. bitsandbytes stays in training mode (in evaluation its CPU path
repacks the weights). "dequantise" is the weight alone, into fresh memory; "(scratch)" is how the
layer itself does it, into memory that it keeps; "(torch)" serves where there is no C compiler.

`--parts saved` counts what autograd keeps of one forward of a small Llama with LoRA on every linear
layer, in bytes per token, hidden unit and layer, against PEFT on the same model, and the bytes per
parameter of the layers as they are stored. With `--device cuda` bitsandbytes is left out where it
is not installed, and each dequantisation is set beside the rate of a copy on the device.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Clock,
    Stopwatch,
    copy_rate,
    environment,
    table,
    versions,
    write_result,
)

SHAPES = ("1024x1024", "8192x2048", "2048x8192")  # out x in
TOKENS = (1, 256, 2048)
PARTS = ("linear", "dequantise", "quantise", "saved")


def bitsandbytes(device: str) -> Any:
    """The package; None where it is not installed and not asked for."""
    try:
        import bitsandbytes
    except ImportError:
        if device == "cpu":
            raise SystemExit("this needs bitsandbytes: pip install bitsandbytes") from None
        return None
    return bitsandbytes


def linears(out: int, width: int, device: str) -> dict[str, Any]:
    """The same frozen weight as three layers."""
    import torch
    from torch import nn

    from prefopt.nn.nf4_linear import NF4Linear

    dense = nn.Linear(width, out, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layers = {"prefopt": NF4Linear.from_linear(dense, double=True)}
    if bnb := bitsandbytes(device):
        theirs = bnb.nn.Linear4bit(width, out, False, torch.bfloat16, True, "nf4")
        theirs.weight = bnb.nn.Params4bit(
            dense.weight.data.clone(), requires_grad=False, quant_type="nf4",
            compress_statistics=True,
        )  # fmt: skip
        layers["bitsandbytes"] = theirs.train()
    layers["bfloat16"] = dense
    return {name: layer.to(device) for name, layer in layers.items()}


def calls(
    layers: dict[str, Any], tokens: int, width: int, backward: bool, device: str
) -> dict[str, Callable]:
    """One call per layer; the outputs agree, or the benchmark stops."""
    import torch

    x = torch.randn(tokens, width).to(device, torch.bfloat16).requires_grad_()

    def run(layer: Any) -> Any:
        y = layer(x)
        return torch.autograd.grad(y, x, y)[0] if backward else y

    # The 8-bit scales of bitsandbytes' CPU path are rounded another way: the last bits differ.
    other = "bitsandbytes" if "bitsandbytes" in layers else "bfloat16"
    ours, theirs = run(layers["prefopt"]).float(), run(layers[other]).float()
    error = (ours - theirs).norm() / theirs.norm()
    if not error < (1e-2 if other == "bitsandbytes" else 0.15):
        raise SystemExit(f"prefopt and {other} differ by {error:.2g}")
    return {name: lambda layer=layer: run(layer) for name, layer in layers.items()}


def in_turn(ways: dict[str, Callable], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way in each round: the fastest of as many calls as fill `args.shortest`."""
    shuffled, times = random.Random(0), {name: [] for name in ways}
    watch = Stopwatch(args.device)
    for name in ways:
        ways[name]()
    for _ in range(args.rounds):
        order = list(ways)
        shuffled.shuffle(order)
        for name in order:
            spent: list[float] = []
            while sum(spent) < args.shortest:
                spent.append(watch.measure(lambda mark, way=ways[name]: way())[1])
            times[name].append(min(spent))
    return times


def summarise(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median seconds of each, and prefopt's over each of the others."""
    own = times["prefopt"]
    over = {
        name: statistics.median(a / b for a, b in zip(own, other, strict=True))
        for name, other in times.items()
    }
    return {
        name: {"seconds": statistics.median(t), "prefopt_over_it": over[name]}
        for name, t in times.items()
    }


def linear_part(args: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for shape in args.shapes:
        out, width = map(int, shape.split("x"))
        layers = linears(out, width, args.device)
        for tokens in args.tokens:
            for backward in (False, True):
                ways = calls(layers, tokens, width, backward, args.device)
                figures = summarise(in_turn(ways, args))
                case = {"shape": shape, "tokens": tokens, "backward": backward}
                results.append(case | figures)
    return results


def weights(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Any]]:
    """(what it is, a weight of normal numbers)"""
    import torch

    for shape in args.shapes:
        for dtype in (torch.bfloat16, torch.float32):
            for double in (True, False):
                case = {"shape": shape, "dtype": str(dtype)[6:], "double": double}
                yield case, torch.randn(*map(int, shape.split("x"))).to(args.device, dtype)


def dequantise_part(args: argparse.Namespace) -> list[dict[str, Any]]:
    from prefopt.nn.nf4 import dequantize_nf4, quantize_nf4
    from prefopt.nn.nf4_linear import NF4Linear, dense_weight, frozen_tensors

    results, bnb = [], bitsandbytes(args.device)
    rate = copy_rate(args.device) if args.device != "cpu" else None
    for case, w in weights(args):
        packed = quantize_nf4(w, double=case["double"])
        layer = NF4Linear(packed)
        ways = {
            "prefopt": lambda p=packed: dequantize_nf4(p),
            "prefopt (scratch)": lambda m=layer, d=w.dtype: dense_weight(m, frozen_tensors(m), d),
            "prefopt (torch)": lambda p=packed: dequantize_nf4(p, impl="torch"),
        }
        if rate is not None:  # there is no scratch on a GPU
            del ways["prefopt (scratch)"]
        if bnb:
            codes, state = bnb.functional.quantize_4bit(
                w, blocksize=64, quant_type="nf4", compress_statistics=case["double"]
            )
            ways["bitsandbytes"] = lambda c=codes, s=state: bnb.functional.dequantize_4bit(c, s)
        figures = summarise(in_turn(ways, args))
        if rate is not None:
            moved = w.nbytes + sum(t.nbytes for t in frozen_tensors(layer))
            case["of copy rate"] = round(moved / figures["prefopt"]["seconds"] / rate, 3)
        results.append(case | figures)
    return results


def quantise_part(args: argparse.Namespace) -> list[dict[str, Any]]:
    from prefopt.nn.nf4 import quantize_nf4

    results, bnb = [], bitsandbytes(args.device)
    for case, w in weights(args):
        double = case["double"]
        ways = {
            "prefopt": lambda w=w, d=double: quantize_nf4(w, double=d),
            "prefopt (signed search)": lambda w=w, d=double: quantize_nf4(
                w, double=d, search="signed"
            ),
        }
        if bnb:
            ways["bitsandbytes"] = lambda w=w, d=double: bnb.functional.quantize_4bit(
                w, blocksize=64, quant_type="nf4", compress_statistics=d
            )
        results.append(case | summarise(in_turn(ways, args)))
    return results


def saved_part() -> dict[str, Any]:
    """Bytes kept for backward with either LoRA, and bytes per parameter of the stored weights."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefopt.nn.lora import LoraConfig, add_lora
    from prefopt.nn.nf4 import bytes_per_parameter, quantize_nf4

    hidden, layers, tokens = 512, 4, 256
    config = LlamaConfig(
        vocab_size=128, hidden_size=hidden, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    ids = torch.arange(tokens)[None] % 128

    def kept(adapt: Callable[[Any], Any]) -> float:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
        model = adapt(model)
        model.train()
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        found: dict[int, int] = {}

        def pack(x: Any) -> Any:
            if (where := x.untyped_storage().data_ptr()) not in own:
                found[where] = x.untyped_storage().nbytes()
            return x

        base = getattr(model, "base_model", model)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            alive = getattr(base, "model", model).model(ids, use_cache=False)
        del alive
        return sum(found.values()) / (tokens * hidden * layers)

    def ours(model: Any) -> Any:
        add_lora(model, LoraConfig(r=16))
        return model

    def theirs(model: Any) -> Any:
        lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(model, lora)

    w = torch.randn(2048, 2048)
    return {
        "kept_prefopt": kept(ours),
        "kept_peft": kept(theirs),
        "bytes_per_parameter_double": bytes_per_parameter(quantize_nf4(w)),
        "bytes_per_parameter_single": bytes_per_parameter(quantize_nf4(w, double=False)),
    }


def show(results: dict[str, Any]) -> None:
    for part, cases in results.items():
        if part == "saved":
            print("\n" + "\n".join(f"{key}: {value:.4g}" for key, value in cases.items()))
            continue
        named = [key for key, value in cases[0].items() if not isinstance(value, dict)]
        ways = [key for key in cases[0] if key not in named]
        header = [*named, *(f"{way} ms" for way in ways), *(f"/ {way}" for way in ways[1:])]
        rows = [
            [case[key] for key in named]
            + [f"{case[way]['seconds'] * 1e3:.3f}" for way in ways]
            + [f"{case[way]['prefopt_over_it']:.2f}" for way in ways[1:]]
            for case in cases
        ]
        print(f"\n{part}\n{table(header, rows)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    add("--shapes", nargs="+", default=list(SHAPES), help="out x in")
    add("--tokens", nargs="+", type=int, default=list(TOKENS))
    add("--rounds", type=int, default=9)
    add("--shortest", type=float, default=0.02, help="seconds of calls per way and round")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, default=os.cpu_count())
    add("--out", type=Path, default=RESULTS / "bench_nf4.json")
    return parser.parse_args()


def main() -> None:
    import torch

    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock, results = Clock(), {}
    clock.start()
    if "linear" in args.parts:
        results["linear"] = linear_part(args)
    if "dequantise" in args.parts:
        results["dequantise"] = dequantise_part(args)
    if "quantise" in args.parts:
        results["quantise"] = quantise_part(args)
    clock.stop()
    if "saved" in args.parts:
        results["saved"] = saved_part()
    show(results)
    others = clock.figures()["others"]
    print(f"\nother programs took {others:.0%} of the processors")
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    packages = versions("torch", "transformers", "peft", "bitsandbytes")
    stamp = {"others": others, "packages": packages, "environment": environment()}
    write_result(args.out, {"settings": settings, "results": results} | stamp)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
