"""What goes wrong in online RL: one function a fault, from the rows so far to a finding.

Names of metrics and what each finding means: docs/online.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from prefopt.online_history import RECENT, SCORE, History, known, trend

RISE, FALL = 4.0, -6.0  # t statistics of a trend: of the score, of what is held out


class Bounds(NamedTuple):
    """How much rounding explains: max |ratio - 1| of a token, nats of KL per token, and mean
    |sampled - trained| log-prob per token."""

    ratio: float
    kl_token: float
    gap: float


# In the same layout every ratio is 1 to the bit. Other neighbours in the batch mean another order
# of summation: stories260K padded instead of packed moves log-probs by 2e-6 on average and 2e-5 at
# worst in float32, by 0.04 and 0.25 in bfloat16 (0.05 and 0.7 are reported of 0.5B weights);
# float16 has 3 bits of mantissa more. Dropout, another temperature, a shifted token or a wrong
# adapter move most log-probs by 0.1 or more.
BOUNDS = {
    "float32": Bounds(1e-4, 1e-5, 1e-4),
    "float16": Bounds(0.1, 1e-3, 0.02),
    "bfloat16": Bounds(1.0, 1e-2, 0.1),
}


class Trip(NamedTuple):
    """What a check found; `severity` grows with how bad it is."""

    severity: float
    message: str
    remedy: str


class Setting(NamedTuple):
    """What the checks need to know of the run."""

    bounds: Bounds
    dtype: str
    kl_target: float | None


# ---------------------------------------------------------------- the machinery is right


def ratio_not_one(row: Mapping[str, Any], _: History, run: Setting) -> Trip | None:
    away = known(row, "policy/ratio_first")
    if away is None or away <= run.bounds.ratio:
        return None
    return Trip(
        away,
        f"The ratio of new to old probabilities is off by up to {away:.2g} before anything was "
        f"learned from these samples; in {run.dtype} rounding explains {run.bounds.ratio:g}.",
        "Old log-probs and those of the loss must come from the same weights: look for dropout, "
        "another temperature, or a model that depends on what shares its batch (batch norm, "
        "expert capacity).",
    )


def kl_at_start(row: Mapping[str, Any], _: History, run: Setting) -> Trip | None:
    """k3 is never negative, so nothing cancels in its mean."""
    spread, length = known(row, "objective/kl_k3"), known(row, "lengths/mean")
    if row.get("step") != 1 or spread is None or not length:
        return None
    per_token = spread / length
    if per_token <= run.bounds.kl_token:
        return None
    return Trip(
        1.0,
        f"The policy is {spread:.3g} nats per response away from the reference ({per_token:.2g} a "
        "token) before the first update, where it should be the reference itself.",
        "The reference is another model than the policy started from: check --model, the adapter "
        "it starts with and its merged weights.",
    )


def negative_kl(_: Mapping[str, Any], history: History, run: Setting) -> Trip | None:
    """A mean over samples may fall below 0 by chance; over 16 updates in a row it does not."""
    values, tokens = (history.last(name, 16) for name in ("objective/kl", "objective/kl_token"))
    if values is None or values.mean() >= 0:
        return None
    error = values.std(ddof=1) / math.sqrt(len(values))
    if values.mean() > -7 * error or (tokens is not None and tokens.mean() > -run.bounds.kl_token):
        return None
    return Trip(
        -float(values.mean()),
        f"The estimated KL has been negative for {len(values)} updates, {values.mean():.3g} nats "
        "per response on average; a true KL never is.",
        "The samples do not come from the policy whose log-probs are taken: check that sampler and "
        "trainer have the same weights and temperature, and that nothing truncates the "
        "distribution (top_p, top_k, a logits processor).",
    )


def sampler_gap(row: Mapping[str, Any], _: History, run: Setting) -> Trip | None:
    mean, most = (known(row, f"rollout/logprob_gap_{end}") for end in ("mean", "max"))
    if mean is None or mean <= run.bounds.gap:
        return None
    worst = "" if most is None else f" and {most:.2g} at most"
    return Trip(
        mean,
        f"Log-probs of the sampler and of the trainer differ by {mean:.2g} per token on average"
        f"{worst}; in {run.dtype} rounding explains {run.bounds.gap:g}.",
        "--importance truncate corrects for it; the cause is a sampler with other weights, another "
        "dtype or another temperature. --dtype float32 tells rounding from a mistake.",
    )


# ---------------------------------------------------------------- it can learn


def no_stop(_: Mapping[str, Any], history: History, __: Setting) -> Trip | None:
    rates = history.last("lengths/stop_rate", 5)
    if rates is None or rates.mean() >= 0.05:
        return None
    return Trip(
        1.0,
        f"Only {rates.mean():.1%} of the responses end by themselves; all others are cut off at "
        "the limit and scored unfinished.",
        "Raise --max_new_tokens; check that the model knows the stop token (--stop_ids, --stop); "
        "--missing_stop_penalty rewards ending.",
    )


def stops_fall(_: Mapping[str, Any], history: History, __: Setting) -> Trip | None:
    moved = history.moved("lengths/stop_rate")
    if moved is None or moved[0] - moved[1] < 0.25 or moved[2] > -5:
        return None
    return Trip(
        moved[0] - moved[1],
        f"Responses that end by themselves fell from {moved[0]:.0%} to {moved[1]:.0%}.",
        "The reward may favour length, or not see the end: give --missing_stop_penalty or "
        "--missing_stop_score, and read the longest samples.",
    )


def nothing_to_compare(row: Mapping[str, Any], history: History, _: Setting) -> Trip | None:
    spread = history.last("objective/scores_std", 3)
    if spread is not None and not spread.any():
        return Trip(
            4.0,
            f"Every response of the last {len(spread)} updates has the same score, "
            f"{known(row, SCORE) or 0:.3g}, so nothing can be learned from the reward.",
            "Check the reward on a few responses by hand: it may fail to read their format, or be "
            "too hard for this model; a reward in steps gives partial credit.",
        )
    share = history.last("groups/zero_variance", 8)
    if share is None or share.mean() <= 0.7:
        return None
    return Trip(
        float(share.mean()),
        f"In {share.mean():.0%} of the groups all samples have the same score; they teach nothing.",
        "Raise --samples_per_prompt or --temperature, choose prompts that are neither too easy nor "
        "too hard, or make the reward finer.",
    )


def useless_critic(_: Mapping[str, Any], history: History, __: Setting) -> Trip | None:
    values = history.last("value/explained_variance", 20)
    if values is None or values.mean() > -0.05:
        return None
    if values.mean() > -4 * values.std(ddof=1) / math.sqrt(len(values)):
        return None
    return Trip(
        1.0,
        f"The critic's explained variance has been {values.mean():.2f} on average over "
        f"{len(values)} updates: its values are further from the returns than a constant would be.",
        "Raise --critic_lr or --ppo_epochs, let it learn first with --critic_warmup, scale the "
        "scores (--normalize_scores running), or do without one: --estimator rloo.",
    )


def entropy_collapse(_: Mapping[str, Any], history: History, __: Setting) -> Trip | None:
    moved = history.moved("objective/entropy")
    if moved is None or moved[0] <= 0 or moved[1] > 0.2 * moved[0]:
        return None
    return Trip(
        moved[0] / max(moved[1], 1e-6),
        f"Entropy fell from {moved[0]:.3g} to {moved[1]:.3g} nats per token: the policy says "
        "nearly the same every time and finds nothing new.",
        "Raise --kl.beta, lower --lr, give --entropy_coef a little (0.001), or let unlikely tokens "
        "grow with a larger upper clip (--loss.clip_high 0.28).",
    )


def clipped(_: Mapping[str, Any], history: History, __: Setting) -> Trip | None:
    share = history.last("policy/clipfrac", 5)
    if share is None or share.mean() <= 0.3:
        return None
    return Trip(
        float(share.mean()),
        f"{share.mean():.0%} of the tokens are clipped: the policy leaves its samples behind "
        "within one update.",
        "Lower --lr, --ppo_epochs or --minibatches, or end updates early with --early_stop_kl.",
    )


# ---------------------------------------------------------------- it learns what was meant


def kl_budget(_: Mapping[str, Any], history: History, run: Setting) -> Trip | None:
    """Without a target the line is half a nat a token: there the policy gives its own tokens 1.6
    times the reference's probability, and the reference holds little."""
    values, tokens = (history.last(name, 8) for name in ("objective/kl", "objective/kl_token"))
    if values is None:
        return None
    spent = float(values.mean())
    if run.kl_target is not None:
        share, against = spent / run.kl_target, f"the target of {run.kl_target:g}"
        over = share > 1.5
    else:
        share = 0.0 if tokens is None else float(tokens.mean()) / 0.5
        against, over = "half a nat per token, and no target is set", share > 1
    if not over:
        return None
    remedy = "Raise --kl.beta or lower --lr."
    remedy += " A smaller --kl.horizon steers faster." if run.kl_target else ""
    return Trip(
        share,
        f"The policy is {spent:.3g} nats per response away from the reference, beyond {against}; "
        "there a learned reward is no longer to be trusted.",
        f"{remedy} Compare samples with those of the start, and take an earlier checkpoint if they "
        "got worse.",
    )


def reward_hacking(_: Mapping[str, Any], history: History, __: Setting) -> Trip | None:
    """Gao et al. 2022, arXiv 2210.10760: the proxy rises on while what it stands for falls."""
    windows = [(history.both, 1)]
    if history.stretch > 1:
        windows.append((history.stretches[-RECENT:], history.stretch))
    for pairs, stretch in windows:
        if len(pairs) < RECENT // 2:
            continue
        score, held_out = np.array(pairs).T
        if trend(score) < RISE or trend(held_out) > FALL:
            continue
        (a, b), (c, d) = (
            (float(part[: len(part) // 4].mean()), float(part[-(len(part) // 4) :].mean()))
            for part in (score, held_out)
        )
        return Trip(
            1.0,
            f"Over the last {len(pairs) * stretch} updates the score rose from {a:.3g} to {b:.3g} "
            f"while the held-out reward fell from {c:.3g} to {d:.3g}: the policy exploits the "
            "reward.",
            "Take the checkpoint at which the held-out reward was best, raise --kl.beta, and "
            "compare samples from before and after to see what is exploited.",
        )
    return None


def length_drift(_: Mapping[str, Any], history: History, __: Setting) -> Trip | None:
    moved = history.moved("lengths/mean")
    if moved is None or min(moved[:2]) <= 0 or abs(moved[2]) < 6:
        return None
    factor = moved[1] / moved[0]
    if 0.5 < factor < 1.5:
        return None
    score = history.moved(SCORE)
    also = "" if score is None else f" while the score went from {score[0]:.3g} to {score[1]:.3g}"
    word = "longer" if factor > 1 else "shorter"
    return Trip(
        max(factor, 1 / factor),
        f"Responses got {word}: {moved[0]:.0f} tokens at the start, {moved[1]:.0f} now{also}.",
        f"If {word} is not better here, the reward has a length bias: score a few responses of "
        "both lengths by hand and take length out of the reward.",
    )


def repeats(_: Mapping[str, Any], history: History, __: Setting) -> Trip | None:
    moved = history.moved("repetition")
    if moved is None or moved[1] < 0.2 or moved[1] - moved[0] < 0.15:
        return None
    return Trip(
        moved[1],
        f"{moved[1]:.0%} of the four-token sequences repeat an earlier one of the same response; "
        f"at the start it was {moved[0]:.0%}.",
        "The reward does not mind repetition: take a share of repeated n-grams off it, or raise "
        "--kl.beta.",
    )


CHECKS: dict[str, Callable[[Mapping[str, Any], History, Setting], Trip | None]] = {
    "ratio": ratio_not_one,
    "kl_at_start": kl_at_start,
    "negative_kl": negative_kl,
    "sampler_gap": sampler_gap,
    "no_stop": no_stop,
    "stops_fall": stops_fall,
    "zero_variance": nothing_to_compare,
    "explained_variance": useless_critic,
    "entropy": entropy_collapse,
    "clip_fraction": clipped,
    "kl_budget": kl_budget,
    "reward_hacking": reward_hacking,
    "length_drift": length_drift,
    "repetition": repeats,
}
