"""From prompts to an Experience: sample, score, and give every token its advantage.

Shapes: R responses, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.data.packing import Batch
from prefopt.data.records import Message
from prefopt.errors import InputError
from prefopt.experience import Experience, from_samples
from prefopt.online_config import PPOConfig
from prefopt.rewards import Reward, score_tokens, takes_tokens
from prefopt.rl import RunningMoments, advantages, kl_estimate, shape_rewards, whiten
from prefopt.rollout.stops import as_text, stop_ids
from prefopt.rollout.types import RolloutEngine, Sample
from prefopt.scoring import penalised, standardised

ROLLOUT, HELD_OUT = 0, 1  # places in the noise of the sampler


def scoring(policy: Any, config: PPOConfig) -> dict[str, Any]:
    """How Policy.forward gives the log-probs that are learnt from: those of the distribution that
    was sampled from; of the policy as it is where pairs of samples are what is learnt."""
    if config.loss == "dpo":
        return {"temperature": 1.0, "closed": None}
    return of_samples(policy, config)


def of_samples(policy: Any, config: PPOConfig) -> dict[str, Any]:
    """How Policy.forward gives log-probs of the distribution that was sampled from."""
    stops = stop_ids(config.sampling, policy.model, policy.tokenizer)
    closed = (config.min_new_tokens, stops) if config.min_new_tokens and stops else None
    return {"temperature": config.temperature, "closed": closed}


class Collector:
    """What is asked about an update's samples: the engine, the rewards, the reference, the critic.

    ``watched``: rewards that are only looked at. ``trusts_sampler``: the sampler's log-probs are
    the trainer's (float32, the same arithmetic but for the order of sums), so no forward is spent
    on forming them again where only the KL asks for them.
    """

    def __init__(
        self,
        policy: Any,
        critic: Any,
        engine: RolloutEngine,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float] | None,
        watched: Mapping[str, Reward],
        config: PPOConfig,
    ):
        self.policy, self.critic, self.engine, self.config = policy, critic, engine, config
        self.rewards, self.watched = rewards, watched
        self.weights = {name: 1.0 if weights is None else weights[name] for name in rewards}
        self.stats = {
            name: getattr(reward, "score_stats", None) for name, reward in rewards.items()
        }
        for name, stats in self.stats.items():
            if config.normalize_scores == "reference" and stats is None:
                raise InputError(
                    f"normalize_scores is reference, and reward {name!r} has no score_stats.json; "
                    "take running or none"
                )
        self.moments = RunningMoments()  # of all scores so far
        self.scoring = scoring(policy, config)
        self.of_samples = self.scoring == of_samples(policy, config)
        self.stops = stop_ids(config.sampling, policy.model, policy.tokenizer)
        full = policy.dtype == torch.float32 and policy.autocast is None
        self.trusts_sampler = full and config.engine == "torch"

    # -- sampling and scoring

    def sample(
        self,
        ids: Sequence[np.ndarray],
        keys: Sequence[int],
        place: int,
        n: int,
        on_sample: Callable[[int], None],
    ) -> tuple[Experience, list[str]]:
        """Samples of prompts, and their texts; ``keys`` name prompts in the noise of ``place``."""
        seed = int(np.random.SeedSequence((self.config.seed, place)).generate_state(1)[0])
        training = self.policy.training
        self.policy.eval()
        try:
            samples = self.engine.generate(
                ids, self.config.sampling, n=n, seed=seed, keys=keys, on_sample=on_sample
            )
        finally:
            self.policy.train(training)
        texts = [self._text(sample) for some in samples for sample in some]
        exp = from_samples(ids, samples)
        if self.config.truncated == "mask":
            exp.kept = exp.stopped.clone()
        return exp, texts

    def _text(self, sample: Sample) -> str:
        """What rewards and people read: no stop token, and nothing from a stop text on."""
        return as_text(sample, self.config.sampling, self.stops, self.policy.tokenizer).text

    def judge(
        self,
        exp: Experience,
        prompts: list[list[Message]],
        texts: list[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> dict[str, float]:
        """Fill in the scores, and say what each reward gave on average. ``columns``: of the rows
        that the prompts came from, a value per response."""
        tokens = self._token_texts(exp)
        ends = torch.zeros(len(texts), dtype=torch.float64)
        each, row = exp.empty(), {}
        for name, reward in self.rewards.items():
            said = score_tokens(reward, name, prompts, texts, columns, tokens)
            whole = torch.tensor(said.ends, dtype=torch.float64)
            if len(self.rewards) > 1:
                row[f"objective/scores/{name}"] = float(np.mean(said.totals))
            if self.config.normalize_scores == "reference":
                whole = standardised(whole, self.stats[name])
            ends += self.weights[name] * whole
            each += self.weights[name] * said.rows(each.shape[1])
        exp.ends = ends.float()
        exp.scores = exp.worth = (ends + each.double().sum(1)).float()
        if each.any():
            exp.columns["token_scores"] = each
        for name, reward in self.watched.items():
            said = score_tokens(reward, name, prompts, texts, columns, tokens)
            row["objective/held_out_scores"] = float(np.mean(said.totals))
        return row

    def _token_texts(self, exp: Experience) -> list[list[str]] | None:
        """The text of each token of each response, if a reward asks for them."""
        if not any(
            takes_tokens(reward) for reward in [*self.rewards.values(), *self.watched.values()]
        ):
            return None
        decode = self.policy.tokenizer.batch_decode
        return [
            decode(tokens[:, None].tolist()) for group in exp.groups for tokens in group.responses
        ]

    def shaped(self, exp: Experience) -> Tensor:
        """The scores of whole responses that are learnt from, [R]: penalised for a missing stop and
        for length, then standardised by all so far, then clipped."""
        config, scale = self.config, None
        overlong = None
        if config.overlong_buffer is not None:
            overlong = (config.max_new_tokens, config.overlong_buffer, config.overlong_factor)
        scores = penalised(
            exp.ends, exp.stopped, exp.lengths, overlong=overlong,
            missing_stop_penalty=config.missing_stop_penalty,
            missing_stop_score=config.missing_stop_score,
        )  # fmt: skip
        if config.normalize_scores == "running":
            self.moments.update(scores)
            scale = self.moments
        return standardised(scores, scale, clip=config.clip_scores)

    # -- what the models say of the samples

    @torch.no_grad()
    def read(
        self, exp: Experience, order: Sequence[Sequence[int]], *, only_reference: bool = False
    ) -> None:
        """Fill in "ref", "old" and "values" as far as they are needed, in batches packed as the
        first pass over the update will be (``order``: its minibatches), so that they round alike
        and the first ratio is exactly 1."""
        config = self.config
        asked = {
            "old": config.loss != "dpo" and self.needs_old and not only_reference,
            "ref": config.kl.beta > 0,
            "values": config.has_critic and not only_reference,
        }
        for places in order if any(asked.values()) else ():
            for batch in exp.batches(places, self.policy, config.micro_tokens):
                self._read_batch(exp, batch.to(self.policy.device), asked)
        if config.truncated == "bootstrap" and not only_reference:
            places = [place for part in order for place in part]
            for batch in exp.batches(places, self.policy, config.micro_tokens, ends=True):
                _, at_end = self.critic.values(batch.to(self.policy.device), ends=True)
                rows, _ = exp.rows_of(batch)
                exp.bootstrap[rows] = at_end.float().cpu()
            exp.bootstrap[exp.stopped] = 0.0

    def _read_batch(self, exp: Experience, batch: Batch, asked: Mapping[str, bool]) -> None:
        policy = self.policy
        if asked["old"]:
            exp.record("old", batch, policy(batch, **self.scoring))
        if asked["ref"]:
            with policy.reference():
                exp.record("ref", batch, policy(batch, **self.scoring))
        if asked["values"]:
            exp.record("values", batch, self.critic.values(batch))

    @property
    def needs_old(self) -> bool:
        """Whether log-probs before the update take a forward of their own: not where the first
        pass over the samples is one optimizer step, which forms them anyway."""
        kl = self.config.kl
        in_reward = kl.beta > 0 and kl.placement == "reward"
        return self.config.minibatches > 1 or (in_reward and not self.trusts_sampler)

    # -- advantages

    def price(self, exp: Experience, beta: float) -> dict[str, float]:
        """Fill in ``worth``, "advantages" and "returns"; what the update's row says of these."""
        config, learnt = self.config, exp.learnt
        scores, token_scores = self.shaped(exp), exp.columns.get("token_scores")
        exp.worth = scores if token_scores is None else scores + token_scores.sum(1)
        if config.loss == "dpo":
            return {}
        kl = self._kl(exp, "k1")
        in_reward = beta if config.kl.placement == "reward" else 0.0
        rewards = shape_rewards(scores, kl, exp.mask, beta=in_reward, token_scores=token_scores)
        if config.whiten_rewards:
            rewards = whiten(rewards, exp.mask, center=False)
        adv, returns = advantages(
            rewards, exp.mask, estimator=config.estimator, group_ids=exp.group_ids,
            values=exp.columns.get("values"), bootstrap=exp.bootstrap,
            gamma=config.gamma, lam=config.lam,
        )  # fmt: skip
        raw, row = adv[learnt], {}
        if len(raw):
            row["advantages/mean"] = raw.mean().item()
            row["advantages/std"] = raw.std(correction=0).item()
        if config.has_critic and config.whiten_advantages:
            adv = whiten(adv, learnt)
        exp.columns["advantages"] = adv
        if returns is not None:
            exp.columns["returns"] = returns
        return row

    def _kl(self, exp: Experience, kind: str) -> Tensor:
        """Per token, [R, T], 0 where there is none or no reference."""
        if not self._comparable(exp):
            return exp.empty()
        logp = exp.columns.get("old", exp.columns["sampled"])
        return kl_estimate(logp, exp.columns["ref"], kind=kind) * exp.mask

    def _comparable(self, exp: Experience) -> bool:
        """Whether there is a reference, and of the distribution that was sampled from."""
        return "ref" in exp.columns and self.of_samples

    def figures(self, exp: Experience, beta: float) -> dict[str, float]:
        """What the update's row says of scores, KL, entropy and lengths."""
        scores, lengths = exp.scores.double(), exp.lengths.double()
        groups = exp.worth.view(-1, exp.n)
        row = {
            "objective/scores": scores.mean().item(),
            "objective/scores_std": scores.std(correction=0).item(),
            "objective/scores_min": scores.min().item(),
            "objective/scores_max": scores.max().item(),
            "objective/entropy": -exp.columns["sampled"].sum().item() / int(exp.mask.sum()),
            "lengths/mean": lengths.mean().item(),
            "lengths/max": lengths.max().item(),
            "lengths/stop_rate": exp.stopped.double().mean().item(),
        }
        if exp.n > 1:
            same = (groups == groups[:, :1]).all(1)
            row["groups/zero_variance"] = same.double().mean().item()
        if self._comparable(exp):
            kl, k3 = (self._kl(exp, kind).double().sum() for kind in ("k1", "k3"))
            row["objective/kl"] = kl.item() / len(scores)
            row["objective/kl_token"] = kl.item() / int(exp.mask.sum())
            row["objective/kl_k3"] = k3.item() / len(scores)
            row["objective/kl_coef"] = beta
            row["objective/rlhf_reward"] = row["objective/scores"] - beta * row["objective/kl"]
        return row

    def gap(self, exp: Experience) -> dict[str, float]:
        """How far the sampler's log-probs are from the trainer's."""
        if "old" not in exp.columns:
            return {}
        far = (exp.columns["old"] - exp.columns["sampled"]).abs()[exp.learnt].double()
        if not len(far):
            return {}
        names = ("rollout/logprob_gap_mean", "rollout/logprob_gap_max")
        return dict(zip(names, (far.mean().item(), far.max().item()), strict=True))

    def shown(self, exp: Experience, prompts: Sequence[list[Message]]) -> Iterator[dict[str, Any]]:
        """Rows of samples.jsonl: the first answer to each of the first prompts."""
        kl = self._kl(exp, "k1").sum(1)
        for place, prompt in enumerate(prompts):
            at = place * exp.n
            tokens = exp.groups[place].responses[0]
            finish = "stop" if exp.stopped[at] else "length"
            row = {
                "prompt": "\n\n".join(turn.content for turn in prompt),
                "response": self._text(Sample(tokens, np.empty(0), finish)),
                "finish": finish,
                "tokens": len(tokens),
                "score": exp.scores[at].item(),
            }
            yield {**row, "kl": kl[at].item()} if self._comparable(exp) else row
