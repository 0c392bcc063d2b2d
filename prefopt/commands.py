"""What each command does. Arguments are its flags, docstrings its help; nothing here parses.

Heavy imports stay inside the functions, so that `prefopt --help` answers at once.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

from prefopt.command_inputs import (
    Dtype,
    Quantize,
    load_policy,
    pairs_or_rankings,
    quiet_transformers,
    records,
    reference_of,
)
from prefopt.errors import InputError
from prefopt.terminal import evaluation_lines, say


def evaluate_model(
    model: str,
    data: str = "embedded",
    split: str | None = None,
    columns: dict[str, str | None] | None = None,
    reference: str | None = None,
    held_out: float | None = None,
    beta: float = 0.1,
    max_length: int = 1024,
    micro_tokens: int = 4096,
    template: str = "auto",
    quantize: Quantize | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    out: str | None = None,
) -> int:
    """How well a model prefers what people preferred: accuracy, margin and calibration.

    Args:
        model: run, adapter or model folder, of a language model or a reward model.
        data: file, folder or hub id of preference pairs; for reward models also of rankings.
        split: which split of the data.
        columns: names of your columns.
        reference: model folder to compare with; known where model is a run or an adapter.
        held_out: only the prompts that training with this eval_fraction held out.
        beta: scale of the margin of a language model.
        max_length: most tokens of prompt and response.
        micro_tokens: most tokens in one packed forward.
        template: how conversations become text.
        quantize: nf4, fp4 or none; null is what the adapter was trained on.
        dtype: of the weights.
        device: auto, cpu, cuda, cuda:1, xpu or mps.
        out: JSON file to write the result to.
    """
    from prefopt import durable, loading
    from prefopt.data.packing import pack
    from prefopt.data.sources import load_preferences
    from prefopt.data.split import split_pairs
    from prefopt.evaluate import evaluate
    from prefopt.objectives.dpo import DPO
    from prefopt.objectives.reward import Reward

    if held_out is not None and not 0 < held_out < 1:
        raise InputError(f"held_out is {held_out!r}; it must be between 0 and 1")
    policy = load_policy(model, None, dtype, device, quantize)
    scores = policy.is_reward_model
    if scores and reference is not None:
        raise InputError(f"{model} is a reward model, which has no --reference")
    source = list(records(pairs_or_rankings if scores else load_preferences, data, split, columns))
    if held_out is not None:
        source = [source[i] for i in split_pairs(source, held_out)[1]]
    objective = Reward() if scores else DPO(beta=beta)
    length = min(max_length, loading.context_length(policy.model))
    encoded = objective.encode(source, policy.tokenizer, max_length=length, template=template)
    batches = pack(encoded, max_tokens=micro_tokens, layout=policy.layout, ends=objective.ends)
    if not scores:
        against = reference_of(model, reference, policy, dtype, device)
        batches = (replace(b, ref_logprobs=against(b)) for b in batches)
    result = evaluate(policy, batches, objective)
    for line in evaluation_lines(result.summary):
        say(line)
    if not scores:
        say(f"log pi(chosen) > log pi(rejected): {result.metrics['logps/accuracies']:.1%}")
    if out:
        durable.write_json(out, {**result.summary, **result.metrics, "counts": encoded.counts})
    return 0


def generate(
    model: str = "embedded",
    prompt: list[str] | str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    n: int = 1,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: list[str] | str | None = None,
    min_new_tokens: int = 0,
    template: str = "auto",
    quantize: Quantize | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> int:
    """Answer prompts with a model.

    Args:
        model: run, adapter or model folder, or hub id.
        prompt: a user turn, or a list of them; without it, the lines of standard input.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token, 1 samples from the model.
        seed: of the sampling.
        n: how many answers to each prompt.
        top_p: sample only from the likeliest tokens that together have this probability.
        top_k: sample only from this many likeliest tokens; 0 is all.
        stop: a text that ends an answer and is not shown, or a list of them.
        min_new_tokens: shortest answer.
        template: how conversations become text.
        quantize: nf4, fp4 or none; null is what the adapter was trained on.
        dtype: of the weights.
        device: auto, cpu, cuda, cuda:1, xpu or mps.
    """
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise InputError("max_new_tokens must be at least 1 and temperature at least 0")
    if n > 1 and temperature == 0:
        raise InputError("at temperature 0 all answers to a prompt are the same; raise it for n")
    given = [prompt] if isinstance(prompt, str) else prompt
    prompts = given or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise InputError("there is no prompt; give --prompt TEXT or lines on standard input")
    policy = load_policy(model, None, dtype, device, quantize)
    answers = policy.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        n=n,
        top_p=top_p,
        top_k=top_k,
        stop=stop or (),
        min_new_tokens=min_new_tokens,
        template=template,
    )
    for number, answer in enumerate(answers):
        say(f"> {prompts[number // n]}", style="dim")
        say(answer.text.strip() + ("" if answer.finish == "stop" else " ..."))
        say()
    return 0


def report(run: str) -> int:
    """Write report.html of a run folder, finished or not.

    Args:
        run: the run folder.
    """
    from prefopt.report import write_report

    say(str(write_report(run)))
    return 0


def env() -> int:
    """Print versions and devices, safe to paste into a bug report."""
    from prefopt.environment import environment, environment_lines

    for line in environment_lines(environment()):
        say(line)
    return 0


def demo(out: str | None = None, max_steps: int | None = None) -> int:
    """Go the whole way with the tiny model in the package: data, SFT, reward model, DPO, PPO.

    Args:
        out: folder of its runs; null is a new folder under runs/.
        max_steps: stop every stage after so many steps.
    """
    from prefopt.demo import run_demo

    quiet_transformers()
    return run_demo(out, max_steps, say)
