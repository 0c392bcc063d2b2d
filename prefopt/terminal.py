"""What the commands print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from prefopt.config import TrainConfig, default_cache
from prefopt.nn.lora_config import LoraConfig

if TYPE_CHECKING:
    from prefopt.policy import Policy


def say(text: str = "", style: str | None = None) -> None:
    """One line to the terminal; plain where stdout is not one."""
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text, style=style, markup=False)


def describe(policy: Policy, lora: LoraConfig | None) -> None:
    """Which parameters train, on what, in which layout."""
    from prefopt.nn.nf4_linear import NF4Linear

    dtype = str(policy.dtype).removeprefix("torch.")
    kinds = ", ".join(sorted({m.kind for m in policy.model.modules() if isinstance(m, NF4Linear)}))
    weights = f", linear layers in {kinds}" if kinds else ""
    say(f"{policy.base}: {policy.model.config.model_type}, {dtype} on {policy.device}{weights}")
    for report in (policy.quant_report, policy.lora_report):
        for line in report.lines() if report else ():
            say(line)
    if policy.adapter is None:
        say(f"training all {sum(p.numel() for _, p in policy.trainable()):,} weights")
    elif policy.lora_report is None:
        say("training the adapter of --model further")
    if policy.adapter and policy.has_reference_copy:
        say("the adapter does not start at zero, so the reference is a frozen copy of it")
    elif policy.adapter:
        say("the adapter starts at zero, so the reference is the base with the adapter off")
    if policy.layout_reason:
        say(f"prompts are not shared between responses: {policy.layout_reason}")


def show_plan(objective: Any, policy: Policy, config: TrainConfig, plan: Any) -> None:
    """What a run would do, and the first item as the model sees it."""
    from rich.console import Console
    from rich.text import Text

    from prefopt.data.encode import preview

    say(f"template: {plan.encoded.template}")
    for name, count in plan.encoded.counts.items():
        if count:
            say(f"{name}: {count:,}")
    tokens = plan.encoded.sizes
    say(
        f"{len(plan.train):,} {objective.unit} to train on, {len(plan.held_out):,} held out; "
        f"{plan.steps:,} steps; {tokens.mean():.0f} tokens each, at most {tokens.max()}"
    )
    if objective.needs_reference:
        say(f"reference log-probs in {config.cache or default_cache()}")
    say(f"run folder {config.out} (not written: --dry_run)")
    style = {"prompt": "dim", "response": "green", "eos": "bold magenta", "truncated": "bold red"}
    console = Console(highlight=False, soft_wrap=True)
    for kind, text in preview(plan.encoded[plan.train[0]], policy.tokenizer):
        console.print(Text(f"{kind:>9}  "), Text(repr(text), style=style.get(kind, "")), sep="")


def finish(run: Any) -> None:
    """The last lines: what came out and what to do with it."""
    if run.stopped:
        latest = run.dir / "checkpoints" / "latest"
        where = latest.read_text().strip() if latest.exists() else "the first step"
        say(f"stopped; --resume auto continues from {where}")
        return
    known = json.loads((run.dir / "evaluation.json").read_text()) if has_evaluation(run) else {}
    for stage in ("before", "after"):
        if stage in known:
            say(f"{stage:>6}: {summary_line(known[stage])}")
    say(f"model:  {run.dir / 'model'}")
    say(f"report: {run.dir / 'report.html'}")


def has_evaluation(run: Any) -> bool:
    return (run.dir / "evaluation.json").is_file()


def evaluation_lines(summary: dict[str, Any]) -> list[str]:
    """A preference evaluation: all of it, each source, and how far its confidence is right."""
    lines = [summary_line(summary)]
    parts = summary.get("sources", {})
    lines += [f"  {name}: {summary_line(part)}" for name, part in parts.items()]
    told = summary["calibration"]
    if summary["ties"] == summary["n"]:
        return lines
    lines.append(
        f"calibration: ECE {told['ece']:.1%}, Brier score {told['brier']:.3f}, log loss "
        f"{told['log_loss']:.3f} (a coin: 0.250, 0.693)"
    )
    for row in told["bins"]:
        if row["n"]:
            lines.append(
                f"  confidence {row['low']:.0%} to {row['high']:.0%}: {row['confidence']:.1%} on "
                f"average, right {row['accuracy']:.1%} of {row['n']}"
            )
    return lines


def summary_line(summary: dict[str, Any]) -> str:
    """Score, perplexity, or accuracy and margin of a preference evaluation, with intervals."""
    if "scores" in summary:
        return _score_line(summary)
    if "perplexity" in summary:
        low, high = summary["perplexity_low"], summary["perplexity_high"]
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        counts = f"{summary['n']:,} dialogues, {summary['tokens']:,} tokens"
        return f"perplexity {summary['perplexity']:.3f}{interval} ({counts})"
    n, ties = summary["n"], summary["ties"]
    if ties == n:
        return f"policy = reference: all margins are 0 ({n} pair{'s' * (n > 1)})"
    text = f"accuracy {summary['accuracy']:.1%}"
    if summary["accuracy_low"] is not None:
        text += f" [{summary['accuracy_low']:.1%}, {summary['accuracy_high']:.1%}]"
    text += f", margin {summary['margin_mean']:.3f}"
    if summary["margin_low"] is None:
        return f"{text} ({n} pair{'s' * (n > 1)} of one prompt)"
    text += f" [{summary['margin_low']:.3f}, {summary['margin_high']:.3f}]"
    return f"{text} ({n} pairs, 95% intervals over {summary['prompts']} prompts)"


def _score_line(summary: dict[str, Any]) -> str:
    """Of answers to held-out prompts."""
    text = f"score {summary['scores']:.3f}"
    if "scores_low" in summary:
        text += f" [{summary['scores_low']:.3f}, {summary['scores_high']:.3f}]"
    if "kl" in summary:
        text += f", {summary['kl']:.2f} nats from the reference"
    return (
        f"{text} ({summary['n']} prompts, {summary['lengths']:.0f} tokens on average, "
        f"{summary['stop_rate']:.0%} ended by themselves)"
    )
