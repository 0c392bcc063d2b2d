"""The pairs of a round: what they are made of, how they are trained on, and what became of those
that were held out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefopt import loading
from prefopt.config import TrainConfig, default_cache
from prefopt.data.audit.clean import pair_row
from prefopt.data.encoded import Encoded, EncodedSet
from prefopt.data.packing import Batch, pack
from prefopt.data.pairing import pair_up
from prefopt.data.records import Candidates, Message, Pair
from prefopt.evaluate import evaluate
from prefopt.policy import Policy
from prefopt.reference import ReferenceCache
from prefopt.sampling import Answers, promptly
from prefopt.stop import StopSignal

Row = dict[str, Any]  # of pairs.jsonl


def pair_rows(
    answers: Sequence[Answers],
    combined: Sequence[Sequence[float]],
    prompts: Mapping[int, list[Message]],
    lineage: Mapping[str, Any],
    **pairing: Any,
) -> tuple[list[Row], Counter[str]]:
    """(rows of pairs.jsonl, comparisons that made no pair by reason).

    A row is a preference pair, as load_preferences reads it, and its ``lineage``: what is given
    here, the number of the prompt, which two samples, and what every reward says of them.
    """
    rows, dropped = [], Counter()
    for answer, scores in zip(answers, combined, strict=True):
        turns = [[Message("assistant", text)] for text in answer.responses]
        paired = pair_up(Candidates(prompts[answer.prompt], turns, list(scores)), **pairing)
        dropped.update(paired.dropped)
        for pair, picked in zip(paired.pairs, paired.picks, strict=True):
            about = {
                "prompt": answer.prompt,
                "chosen": picked[0],
                "rejected": picked[1],
                "finish": [answer.finish[i] for i in picked],
                "scores": {k: [s[i] for i in picked] for k, s in answer.scores.items()},
                "combined": [scores[i] for i in picked],
            }
            rows.append({**pair_row(pair), "lineage": {**lineage, **about}})
    return rows, dropped


class AsSampled:
    """The objective, for which a response that was cut at the limit of sampling has no end: with
    one it would be taught to stop in the middle of a sentence."""

    def __init__(self, objective: Any, rows: Sequence[Row]):
        self.objective = objective
        self.cut = [[f == "length" for f in row["lineage"]["finish"]] for row in rows]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def __call__(self, policy: Policy, batch: Batch) -> Any:
        return self.objective(policy, batch)

    def encode(self, data: Any, tokenizer: Any, **options: Any) -> EncodedSet:
        encoded = self.objective.encode(data, tokenizer, **options)
        items = (self._without_end(item, tokenizer.eos_token_id) for item in encoded)
        return EncodedSet(items, encoded.counts, encoded.template)

    def _without_end(self, item: Encoded, eos: int) -> Encoded:
        responses, masks = list(item.responses), list(item.scored or ())
        for i, cut in enumerate(self.cut[item.index]):
            if cut and responses[i][-1] == eos and len(responses[i]) > 1:
                responses[i] = responses[i][:-1]
                masks[i : i + 1] = [m if m is None else m[:-1] for m in masks[i : i + 1]]
        scored = tuple(masks) or None
        return dataclasses.replace(item, responses=tuple(responses), scored=scored)


def held_out_batches(
    objective: Any,
    policy: Policy,
    pairs: Sequence[Pair],
    rows: Sequence[Row],
    config: TrainConfig,
    stop: StopSignal,
) -> list[Batch]:
    """The held-out pairs, packed as train() packs them, with the log-probs of the policy that a
    round starts from as their reference."""
    if not any(row["lineage"]["held_out"] for row in rows):
        return []
    policy.use_float32_masters()  # as in training: then its reference log-probs are these
    longest = min(config.max_length, loading.context_length(policy.model))
    options = {"max_length": longest, "template": config.template}
    encoded = objective.encode(pairs, policy.tokenizer, **options)
    items = [item for item in encoded if rows[item.index]["lineage"]["held_out"]]
    tokens, layout = config.micro_tokens, policy.layout
    batches = list(pack(items, max_tokens=tokens, layout=layout, ends=objective.ends))
    if not objective.needs_reference:
        return batches
    cache = ReferenceCache(config.cache or default_cache())
    with promptly(stop):
        refs = cache.logprobs(policy, batches, key=policy.reference_key())
        both = zip(batches, refs, strict=True)
        return [dataclasses.replace(batch, ref_logprobs=ref) for batch, ref in both]


def judge(
    objective: Any, policy: Policy, batches: Sequence[Batch], rows: Sequence[Row], stop: StopSignal
) -> dict[str, Any]:
    """Does the trained policy prefer what the rewards do, overall and each on its own?"""
    if not batches:
        return {}
    result = evaluate(policy, batches, objective, on_batch=lambda _: stop.check())
    at = [item.index for batch in batches for item in batch.encoded]
    keys = ("n", "accuracy", "accuracy_low", "accuracy_high", "margin_mean")
    summary = {key: result.summary[key] for key in keys}
    return {**summary, "rewards": accuracies(result.margins, [rows[i] for i in at])}


def accuracies(margins: np.ndarray, rows: Sequence[Row]) -> dict[str, Any]:
    """Of every reward, the share of pairs (of those it does not hold for equal) in which the margin
    [n] of the policy has the sign of the reward's own preference."""
    out: dict[str, Any] = {}
    for name in rows[0]["lineage"]["scores"]:
        scores = np.array([row["lineage"]["scores"][name] for row in rows])
        wish = np.sign(scores[:, 0] - scores[:, 1])
        told = wish != 0
        right = (np.sign(margins) == wish)[told]
        out[name] = {"accuracy": float(right.mean()) if told.any() else None, "n": int(told.sum())}
    return out
