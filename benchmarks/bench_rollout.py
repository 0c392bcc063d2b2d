"""Tokens per second of sampling: the torch engine against transformers, on CPU.

    PYTHONPATH=.:kernels python benchmarks/bench_rollout.py ../shared/models/stories260K

Cases: stories260K, 64 responses of 96 tokens, all equally long; the same with 256 responses that
end at a stop token; a Llama of the shape of SmolLM2-135M with random weights, whose stop tokens
give geometric lengths. Sides: `TorchEngine`; `generate` of transformers in batches of as many rows
as the engine has slots, which wait for the longest; its continuous batching. They take
turns in one process; tokens behind a stop token do not count. Before anything is timed, the greedy
tokens of all sides are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    RESULTS,
    Clock,
    environment,
    report,
    run_worker,
    spread,
    table,
    versions,
    write_result,
)

SIDES = ("prefopt", "transformers generate", "transformers continuous")


@dataclass(frozen=True)
class Case:
    model: str  # "stories" or "135M"
    requests: int
    rows: int  # slots, or rows of a batch
    most: int  # new tokens
    mean: int | None = (
        None  # tokens that a response has on average, were there no limit; None: most
    )
    continuous: bool = True


CASES = {
    "stories260K, equal lengths": Case("stories", 64, 64, 96),
    "stories260K, mixed lengths": Case("stories", 256, 64, 96, 24),
    "135M, mixed lengths": Case("135M", 48, 16, 96, 24, continuous=False),
}


def load(name: str, stories: str, work: Path) -> tuple[Any, Any]:
    """The policy, and transformers' own model untouched by it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prefopt import Policy

    folder = Path(stories)
    if name == "135M":
        folder = work / "llama-135M"
        if not (folder / "config.json").exists():
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
                tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )  # fmt: skip
            LlamaForCausalLM(config).save_pretrained(folder)
            AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    policy = Policy.from_pretrained(folder, dtype="float32", device="cpu").eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return policy, model


def left_padded(prompts: list[np.ndarray]) -> tuple[Any, Any]:
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt).long()
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def cut(tokens: list[int], stops: tuple[int, ...]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


def sides(policy: Any, model: Any, case: Case) -> dict[str, Callable[..., list[list[int]]]]:
    """(prompts, params, seed) -> the tokens of one response to each, of every side."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from prefopt.rollout.torch_engine import TorchEngine

    engine = TorchEngine(policy, slots=case.rows)

    def settings(params: Any) -> Any:
        drawn = {"temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=params.max_new_tokens, do_sample=params.temperature > 0,
            eos_token_id=list(params.stop_ids) or None, pad_token_id=0,
            **(drawn if params.temperature else {}),
        )  # fmt: skip

    def ours(prompts, params, seed):
        return [s.tokens.tolist() for (s,) in engine.generate(prompts, params, seed=seed)]

    def generate(prompts, params, seed):
        torch.manual_seed(seed)
        found = []
        for start in range(0, len(prompts), case.rows):
            ids, mask = left_padded(prompts[start : start + case.rows])
            out = model.generate(ids, attention_mask=mask, generation_config=settings(params))
            found += [cut(row, params.stop_ids) for row in out[:, ids.shape[1] :].tolist()]
        return found

    def continuous(prompts, params, seed):
        pages = -(-(max(map(len, prompts)) + params.max_new_tokens) // 64)
        config = ContinuousBatchingConfig(
            return_logprobs=True, seed=seed, page_size=64, num_blocks=case.rows * pages,
            max_requests_per_batch=case.rows, max_batch_tokens=512,
        )  # fmt: skip
        generation = settings(params)
        if generation.eos_token_id is None:
            generation.eos_token_id = -1
        asked = [prompt.tolist() for prompt in prompts]
        out = model.generate_batch(
            asked, generation_config=generation, continuous_batching_config=config
        )
        return [result.generated_tokens for result in out.values()]

    found = dict(zip(SIDES, (ours, generate, continuous), strict=True))
    return found if case.continuous else {name: found[name] for name in SIDES[:2]}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: all sides of one case, in turns."""
    import torch

    from prefopt.rollout.types import SamplingParams

    torch.set_num_threads(job["threads"])
    case = CASES[job["case"]]
    policy, model = load(case.model, job["stories"], Path(job["work"]))
    rng, words = np.random.default_rng(0), model.config.vocab_size
    prompts = [rng.integers(3, words, n).astype(np.int32)
               for n in rng.integers(8, 33, case.requests)]  # fmt: skip
    if case.model == "stories":
        texts = ("Once upon a time", "One day, a little girl", "Tom and his dog", "The sun was")
        encoded = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        prompts = [np.array([1, *encoded[i % 4]], np.int32) for i in range(case.requests)]
    stops = () if case.mean is None else stop_tokens(case, words, policy, prompts)
    params = SamplingParams(max_new_tokens=case.most, stop_ids=stops)
    known = sides(policy, model, case)
    greedy = replace(params, temperature=0, max_new_tokens=16)
    want = known[SIDES[0]](prompts[:8], greedy, 0)
    for name, run in known.items():
        assert run(prompts[:8], greedy, 0) == want, f"{name} takes other tokens"
    rates: dict[str, list[float]] = {name: [] for name in known}
    lengths: dict[str, list[float]] = {name: [] for name in known}
    others = []
    for turn in range(job["rounds"]):
        for name, run in known.items():
            clock = Clock()
            clock.start()
            tokens = run(prompts, params, turn)
            clock.stop()
            assert len(tokens) == case.requests and all(tokens)
            rates[name].append(sum(map(len, tokens)) / clock.wall)
            lengths[name].append(statistics.fmean(map(len, tokens)))
            others.append(clock.figures()["others"])
    return {"rates": rates, "lengths": lengths, "others": statistics.fmean(others)}


def stop_tokens(case: Case, words: int, policy: Any, prompts: list[np.ndarray]) -> tuple[int, ...]:
    """With which a response ends after about `mean` tokens: of a random model any, so many; of a
    trained one the token that has this share."""
    from prefopt.rollout.torch_engine import TorchEngine
    from prefopt.rollout.types import SamplingParams

    assert case.mean is not None
    if case.model != "stories":
        return tuple(range(3, words, case.mean))
    params = SamplingParams(max_new_tokens=case.most, stop_ids=())
    drawn = TorchEngine(policy).generate(prompts[:64], params, seed=99)
    counts = np.bincount(np.concatenate([s.tokens for (s,) in drawn]), minlength=words)
    share = counts / counts.sum()
    close = np.argsort(np.abs(share - 1 / case.mean))
    return (int(close[0]),)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("stories", help="the folder of stories260K, whose tokenizer the random model gets too")
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=os.cpu_count())
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "prefopt-bench-rollout")
    add("--out", type=Path, default=RESULTS / "bench_rollout.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not Path(args.stories).exists():
        print(f"skipped: {args.stories} is not there; give the folder of stories260K")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    job = {"stories": str(Path(args.stories).resolve()), "work": str(args.work)}
    job |= {"threads": args.threads, "rounds": args.rounds}
    runs, rows = {}, []
    for case in args.cases:
        log = args.work / f"{case.replace(',', '').replace(' ', '-')}.log"
        runs[case] = run = run_worker(__file__, job | {"case": case}, log=log)
        ours = run["rates"][SIDES[0]]
        for name, rates in run["rates"].items():
            ratios = [a / b for a, b in zip(ours, rates, strict=True)]
            rows.append(
                [
                    f"{case}: {name}", f"{statistics.median(rates):.0f}",
                    f"{min(rates):.0f}-{max(rates):.0f}",
                    f"{statistics.fmean(run['lengths'][name]):.1f}",
                    f"{statistics.median(ratios):.2f}", f"{run['others']:.0%}",
                ]
            )  # fmt: skip
            print(rows[-1], flush=True)
        run["summary"] = {name: spread(rates) for name, rates in run["rates"].items()}
    header = ["", "tokens/s", "from-to", "mean length", "prefopt is x times", "others"]
    print(table(header, rows))
    packages = versions("torch", "transformers")
    write_result(
        args.out, {"environment": environment() | packages, "rounds": args.rounds, "cases": runs}
    )


if __name__ == "__main__":
    import json
    import sys

    if len(sys.argv) > 2 and sys.argv[1] == "--worker":
        report(measure(json.loads(sys.argv[2])))
    else:
        main()
