"""`prefopt merge`: an adapter into a folder of plain weights, compared with what was trained.

The merged model is checked before it is written. On the same pairs, over the whole vocabulary,
KL(trained || merged) says what merging cost and KL(trained || base) how much there was to keep. Of
a reward model the scores are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prefopt import durable
from prefopt.data.encode import Encoded
from prefopt.data.packing import pack
from prefopt.errors import InputError
from prefopt.logprobs import sequence_logprobs
from prefopt.nn import merge
from prefopt.nn.lora import adapters, unload_lora
from prefopt.policy import ADAPTER, Policy

TEXTS, ROWS = 8, 32  # whose logits are compared: pairs, and tokens of each
NOISE = 1e-6  # nats a token; what two ways to round the same model may differ by


class Reading(NamedTuple):
    """One model on B groups: logits [n, V] float32 at the last tokens of some of the texts, and
    log p of the first response minus that of the last (of pairs: chosen, rejected), or log p of the
    only one, [B]. Of a reward model the scores of all responses, and first minus last."""

    logits: Tensor
    preference: Tensor


@dataclass(frozen=True)
class Verdict:
    """The merged model against the trained one. KL in nats a token, accuracies over `pairs`, or
    texts: against the untrained base (margin above 0), and how often both models agree in it."""

    pairs: int
    tokens: int
    kl_merged: float
    kl_base: float
    max_logit_difference: float
    accuracy_trained: float
    accuracy_merged: float
    agreement: float

    @property
    def kept(self) -> bool:
        """Whether the merged model is the trained one, by a rule of thumb: less than half as far
        from it as the base is (KL grows with the square of a distance), and of its opinion in nine
        of ten pairs."""
        near = self.kl_merged <= self.kl_base / 4 and self.agreement >= 0.9
        return near or self.kl_merged <= NOISE

    @property
    def loss(self) -> str:
        """For a message."""
        return (
            f"KL to the trained model {self.kl_merged:.2e} nats a token, the untrained base has "
            f"{self.kl_base:.2e}, and the same preference in {self.agreement:.0%} of {self.pairs} "
            "pairs"
        )

    def lines(self) -> list[str]:
        """For the terminal."""
        return [
            f"KL to the trained model, nats a token: merged {self.kl_merged:.2e}, untrained "
            f"{self.kl_base:.2e} ({self.tokens} tokens); logits differ by at most "
            f"{self.max_logit_difference:.2g}",
            f"accuracy against the base: trained {self.accuracy_trained:.1%}, merged "
            f"{self.accuracy_merged:.1%}; the same preference in {self.agreement:.1%} of "
            f"{self.pairs} pairs",
        ]


@dataclass(frozen=True)
class ScoreVerdict:
    """The merged reward model against the trained one. `moved`: root mean square of what merging
    did to the scores of the pairs; `spread`: standard deviation of the trained model's."""

    pairs: int
    moved: float
    spread: float
    max_score_difference: float
    accuracy_trained: float
    accuracy_merged: float
    agreement: float

    @property
    def kept(self) -> bool:
        """By a rule of thumb: scores moved by less than a tenth of what they differ by, and the
        same order in nine of ten pairs."""
        near = self.moved <= self.spread / 10 and self.agreement >= 0.9
        return near or self.max_score_difference <= 10 * NOISE

    @property
    def loss(self) -> str:
        """For a message."""
        return (
            f"scores moved by {self.moved:.2g}, where they spread by {self.spread:.2g}, and "
            f"the same preference in {self.agreement:.0%} of {self.pairs} pairs"
        )

    def lines(self) -> list[str]:
        """For the terminal."""
        return [
            f"scores moved by {self.moved:.2g} (root mean square; at most "
            f"{self.max_score_difference:.2g}), where they spread by {self.spread:.2g}",
            f"accuracy: trained {self.accuracy_trained:.1%}, merged {self.accuracy_merged:.1%}; "
            f"the same preference in {self.agreement:.1%} of {self.pairs} pairs",
        ]


def merge_policy(
    policy: Policy,
    encoded: Sequence[Encoded],
    out: str | Path,
    *,
    requantize: bool = False,
    original: Policy | None = None,
    force: bool = False,
) -> tuple[merge.MergeReport, Verdict | ScoreVerdict]:
    """Merges the adapter of `policy`, compares, and writes the folder `out`.

    Into the weights it was trained on, dequantised if they are 4-bit, or, with `requantize`, into 4
    bits again; or into those of `original`, the same adapter on another base. Afterwards `policy`
    is used up. InputError, and nothing is written, when the merged model is not the trained one any
    more (the verdict's `kept`), unless `force`.
    """
    if policy.adapter is None:
        raise InputError(f"{policy.base} has no adapter to merge; give an adapter or run folder")
    trained = read(policy, encoded)
    with adapters(policy.model, None):
        base = read(policy, encoded)
    policy = original or policy
    if not requantize:
        merge.dequantize_base(policy.model)
    report = merge.merge_lora(policy.model, ADAPTER, requantize=requantize, keep=False)
    unload_lora(policy.model)
    policy.adapter = None
    merged = read(policy, encoded)
    if policy.is_reward_model:
        verdict = compare_scores(trained, merged)
    else:
        verdict = compare(trained, base, merged)
    if not (verdict.kept or force):
        elsewhere, wide = original is not None or requantize, policy.dtype.itemsize >= 4
        advice = "keep the adapter as it is" if wide else "merge in --dtype float32"
        if elsewhere:
            advice = "merge into the weights it was trained on with --into dequantized"
        raise InputError(
            f"merging lost much of the training, so nothing was written: {verdict.loss}; "
            f"{advice}, or write it all the same with --force"
        )
    policy.save_pretrained(out)
    changes = {path: change._asdict() for path, change in report.changes.items()}
    durable.write_json(Path(out) / "merge_report.json", {**asdict(verdict), "layers": changes})
    return report, verdict


@torch.no_grad()
def read(policy: Policy, encoded: Sequence[Encoded]) -> Reading:
    """What the model says, by transformers' own forward for the logits."""
    training = policy.training
    policy.eval()
    try:
        if policy.is_reward_model:
            scores = [
                policy(batch.to(policy.device)).cpu()
                for batch in pack(encoded, max_tokens=4096, layout=policy.layout, ends=True)
            ]
            scores = torch.cat(scores)
            return Reading(scores, _first_minus_last(scores, encoded))
        logits = torch.cat([_last_logits(policy, item) for item in encoded[:TEXTS]])
        sums = []
        for batch in pack(encoded, max_tokens=4096, layout=policy.layout):
            batch = batch.to(policy.device)
            logps = sequence_logprobs(policy(batch), batch.response_ids, batch.num_responses)
            sums.append(logps.cpu())
    finally:
        policy.train(training)
    return Reading(logits, _first_minus_last(torch.cat(sums), encoded))


def _first_minus_last(values: Tensor, encoded: Sequence[Encoded]) -> Tensor:
    """Of each group [B]; the value itself where there is only one response."""
    sizes = torch.tensor([len(item.responses) for item in encoded])
    last = sizes.cumsum(0) - 1
    return values[last - sizes + 1] - torch.where(sizes > 1, values[last], 0.0)


def _last_logits(policy: Policy, item: Encoded) -> Tensor:
    """Of the prompt and its first response, [at most ROWS, V] float32 on the CPU."""
    ids = torch.tensor([[*item.prompt.tolist(), *item.responses[0].tolist()]], device=policy.device)
    with policy.plain_attention():
        logits = policy.model(ids, use_cache=False).logits[0]
    return logits[-ROWS:].float().cpu()


def compare(trained: Reading, base: Reading, merged: Reading) -> Verdict:
    """The readings of three models on the same pairs."""

    def kl(other: Reading) -> float:
        p, q = (x.logits.double().log_softmax(-1) for x in (trained, other))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    margins = [x.preference - base.preference for x in (trained, merged)]
    right = [(m > 0).float() for m in margins]
    return Verdict(
        pairs=len(base.preference),
        tokens=len(base.logits),
        kl_merged=kl(merged),
        kl_base=kl(base),
        max_logit_difference=(merged.logits - trained.logits).abs().max().item(),
        accuracy_trained=right[0].mean().item(),
        accuracy_merged=right[1].mean().item(),
        agreement=(right[0] == right[1]).float().mean().item(),
    )


def compare_scores(trained: Reading, merged: Reading) -> ScoreVerdict:
    """The readings of two reward models on the same pairs."""
    difference = (merged.logits - trained.logits).double()
    right = [(x.preference > 0).float() for x in (trained, merged)]
    return ScoreVerdict(
        pairs=len(trained.preference),
        moved=difference.square().mean().sqrt().item(),
        spread=trained.logits.double().std(correction=0).item(),
        max_score_difference=difference.abs().max().item(),
        accuracy_trained=right[0].mean().item(),
        accuracy_merged=right[1].mean().item(),
        agreement=(right[0] == right[1]).float().mean().item(),
    )
