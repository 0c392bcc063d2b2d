"""PPOConfig: what a run of online RL is, apart from the model, the prompts and the reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.config import check_choices, check_lowest, check_single_process
from prefopt.errors import InputError

Estimator = Literal["gae", "reinforce++", "rloo", "grpo", "dr_grpo", "rf++_baseline"]
Loss = Literal["ppo", "gspo", "cispo", "reinforce", "dpo"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum-const"]
GROUPED = ("rloo", "grpo", "dr_grpo", "rf++_baseline")  # compare samples of the same prompt

OF_CRITIC = ("critic", "critic_start", "critic_lr", "critic_warmup")
NOT_OF_DPO = ("aggregation", "entropy_coef", "importance", "early_stop_kl", "whiten_rewards")


@dataclass(frozen=True)
class KLConfig:
    """How the policy is held to the reference.

    Attributes:
        kind: estimator of the divergence, from the log-probs of sampled tokens; k1 in the reward,
            k2 or k3 in the loss.
        placement: reward takes it off the reward of every token, loss adds it to the loss.
        beta: its weight, in units of the reward per nat; 0 computes no reference.
        target: nats per response to steer beta for; null holds beta fixed.
        horizon: samples in which beta follows the target.
    """

    kind: Literal["k1", "k2", "k3"] = "k1"
    placement: Literal["reward", "loss"] = "reward"
    beta: float = 0.05
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.beta < math.inf:
            raise InputError(f"kl.beta is {self.beta!r}; it must be at least 0")
        for name in ("target", "horizon"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"kl.{name} is {value!r}; it must be above 0")
        if self.target is not None and not self.beta:
            raise InputError("kl.target steers kl.beta, which has to start above 0")


@dataclass(frozen=True)
class PPOConfig:
    """How to train on samples of the policy's own; every field is a flag of the command line.

    Attributes:
        out: folder of the run; made if missing, refused if it holds another run.
        estimator: of the advantages; gae learns a critic, the others compare samples.
        loss: of the policy; dpo pairs the best and the worst sample of each prompt, by the score
            that is learnt from.
        loss_options: options of the loss, spelled --loss.clip 0.2 as flags.
        aggregation: how tokens are averaged; null is what the loss or estimator was published
            with, token-mean for most.
        kl: closeness to the reference.
        entropy_coef: weight of the entropy in the loss, in units of it per nat.
        batch_size: prompts of one update.
        samples_per_prompt: null is 1 where a critic or the batch is the baseline, 4 in groups, 2
            for dpo.
        minibatches: optimizer steps of one pass over the samples of an update.
        ppo_epochs: passes over the samples of an update.
        micro_tokens: most tokens in one packed forward; gradients accumulate over them.
        max_length: most tokens of prompt and response; longer prompts are left out.
        max_new_tokens: longest response.
        min_new_tokens: shortest response.
        temperature: of the sampling and of every log-prob.
        top_p: must be 1, see top_k.
        top_k: must be 0; samples of a truncated distribution are not from the policy that learns.
        stop: texts that end a response, besides the stop tokens.
        stop_ids: token ids that end a response; null is what the model says.
        engine: torch samples with a slot cache, continuous by transformers' continuous batching.
        slots: responses sampled at a time.
        truncated: what a response cut at the limit is: terminal, as if it had ended there;
            bootstrap, continued with the critic's value; mask, left out of the loss.
        missing_stop_penalty: taken off the score of a response without a stop.
        missing_stop_score: score of a response without a stop, whatever the reward says.
        overlong_buffer: in so many tokens before the limit the score falls (DAPO); null for none.
        overlong_factor: by how much, at the limit.
        normalize_scores: scores of whole responses: none, running (by the mean and deviation of
            all so far) or reference (of the reward model's reference scores).
        clip_scores: then they are clipped to this distance from 0.
        whiten_rewards: give the rewards of tokens deviation 1 about their mean.
        whiten_advantages: advantages of gae with mean 0 and deviation 1.
        gamma: discount per token.
        lam: lambda of gae.
        importance: weights for what separates the sampler from the trainer; none, truncate, mask
            or sequence-mask; null is none where both are the same in float32, else truncate.
        importance_cap: largest of these weights.
        critic: adapter (its own, on the same base), trunk (a head on the policy's hidden states),
            or the folder of a model; null is adapter where an adapter trains, else trunk.
        critic_start: zero, or reward for the weights of the reward model.
        critic_lr: null is twice the policy's.
        critic_warmup: updates in which only the critic learns, of a trunk its head.
        value_coef: weight of the value loss where the critic is a trunk.
        value_clip: how far values may move from those before the update; null for no clipping.
        lr: peak learning rate; null is 1e-4 for an adapter and 3e-6 for all weights.
        epochs: passes over the training prompts.
        max_steps: stop after so many updates.
        early_stop_kl: end an update when the policy is this far from the sampler (nats per token).
        max_norm: gradients are clipped to this norm; 0 for no clipping.
        warmup: updates of warm-up, or their fraction if below 1.
        schedule: learning rate after the warm-up.
        weight_decay: AdamW's.
        adam_eps: AdamW's epsilon.
        eval_fraction: share of prompts held out; 0 evaluates nothing.
        eval_prompts: most held-out prompts answered in an evaluation.
        eval_every: updates between evaluations; null evaluates before, halfway and after.
        samples: responses written to samples.jsonl, of every update and of evaluations.
        save_every: updates between checkpoints; 0 keeps only the final model.
        keep: checkpoints kept.
        seed: order of the prompts, initial adapter, sampling.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
        template: how conversations become text; auto: the tokenizer's chat template if it has one.
        parallel: auto runs on this process's device.
        resume: auto continues from the last good checkpoint in out, a path from that checkpoint.
    """

    out: str
    estimator: Estimator = "gae"
    loss: Loss = "ppo"
    loss_options: dict[str, Any] | None = None
    aggregation: Aggregation | None = None
    kl: KLConfig = KLConfig()
    entropy_coef: float = 0.0
    batch_size: int = 32
    samples_per_prompt: int | None = None
    minibatches: int = 1
    ppo_epochs: int = 2
    micro_tokens: int = 4096
    max_length: int = 1024
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] | None = None
    stop_ids: list[int] | None = None
    engine: Literal["torch", "continuous"] = "torch"
    slots: int = 64
    truncated: Literal["terminal", "bootstrap", "mask"] = "terminal"
    missing_stop_penalty: float = 0.0
    missing_stop_score: float | None = None
    overlong_buffer: int | None = None
    overlong_factor: float = 1.0
    normalize_scores: Literal["none", "running", "reference"] = "none"
    clip_scores: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    gamma: float = 1.0
    lam: float = 0.95
    importance: Literal["none", "truncate", "mask", "sequence-mask"] | None = None
    importance_cap: float = 2.0
    critic: str | None = None
    critic_start: Literal["zero", "reward"] = "zero"
    critic_lr: float | None = None
    critic_warmup: int = 0
    value_coef: float = 0.1
    value_clip: float | None = 0.2
    lr: float | None = None
    epochs: int = 1
    max_steps: int | None = None
    early_stop_kl: float | None = None
    max_norm: float = 1.0
    warmup: float = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    adam_eps: float = 1e-5
    eval_fraction: float = 0.1
    eval_prompts: int = 64
    eval_every: int | None = None
    samples: int = 4
    save_every: int = 50
    keep: int = 3
    seed: int = 0
    gradient_checkpointing: bool = False
    template: Literal["auto", "chat", "transcript", "plain"] = "auto"
    parallel: Literal["auto"] = "auto"
    resume: str | None = None

    def __post_init__(self) -> None:
        check_lowest(
            self,
            batch_size=1, samples_per_prompt=1, minibatches=1, ppo_epochs=1, micro_tokens=2,
            max_length=2, max_new_tokens=1, min_new_tokens=0, slots=1, epochs=1, max_steps=1,
            max_norm=0, warmup=0, weight_decay=0, eval_prompts=1, eval_every=1, samples=0,
            save_every=0, keep=1, critic_warmup=0, missing_stop_penalty=0,
            value_coef=0, entropy_coef=0, overlong_buffer=1, overlong_factor=0,
        )  # fmt: skip
        for name in (
            *("temperature", "lr", "critic_lr", "adam_eps", "early_stop_kl", "clip_scores"),
            *("value_clip", "importance_cap"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value!r}; it must be above 0")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be in [0, 1]")
        if not 0 <= self.eval_fraction < 1:
            raise InputError(f"eval_fraction is {self.eval_fraction!r}; it must be in [0, 1)")
        if self.missing_stop_score is not None and self.missing_stop_penalty:
            raise InputError("missing_stop_score replaces the score that the penalty lowers")
        if self.missing_stop_score is not None and not math.isfinite(self.missing_stop_score):
            raise InputError(f"missing_stop_score is {self.missing_stop_score!r}, no finite number")
        if (self.overlong_buffer or 0) > self.max_new_tokens:
            raise InputError(
                f"overlong_buffer is {self.overlong_buffer}, above max_new_tokens "
                f"{self.max_new_tokens}"
            )
        check_choices(self)
        self._check_sampling()
        self._check_algorithm()
        check_single_process()

    def _check_sampling(self) -> None:
        if self.top_p != 1 or self.top_k != 0:
            raise InputError(
                "top_p and top_k would sample from a truncated distribution, which is not the one "
                "whose log-probs are trained: leave them at 1 and 0, and lower the temperature"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}"
            )
        if self.max_new_tokens >= self.max_length:
            raise InputError(
                f"max_new_tokens is {self.max_new_tokens}, which leaves no room for a prompt "
                f"within max_length {self.max_length}"
            )

    def _check_algorithm(self) -> None:
        from prefopt.rl import check_kl
        from prefopt.rl_losses import policy_loss_from

        kl = self.kl
        if self.grouped and self.n < 2:
            needs = "loss dpo" if self.loss == "dpo" else f"estimator {self.estimator}"
            raise InputError(f"samples_per_prompt is {self.n}; {needs} needs at least 2")
        if self.loss == "dpo":
            if self.loss_options or kl.placement != "reward" or kl.target or not kl.beta:
                raise InputError(
                    "loss dpo takes its beta from kl.beta, above 0; it has no loss options, no KL "
                    "in the loss and no kl.target"
                )
        else:
            check_kl(kl.kind, kl.placement)
            policy_loss_from(self.loss, **(self.loss_options or {}))
        if self.truncated == "bootstrap" and not self.has_critic:
            raise InputError("truncated bootstrap needs the critic of estimator gae")
        self._check_idle()

    def _check_idle(self) -> None:
        """InputError for a field that is set and would do nothing."""
        default = {name: field.default for name, field in type(self).__dataclass_fields__.items()}
        moved = {name for name, value in default.items() if getattr(self, name) != value}
        for name in OF_CRITIC:
            if name in moved and not self.has_critic:
                raise InputError(f"{name} is about the critic of estimator gae, and there is none")
        for name in NOT_OF_DPO:
            if name in moved and self.loss == "dpo":
                raise InputError(f"loss dpo has no {name}; leave it out")

    @property
    def has_critic(self) -> bool:
        return self.estimator == "gae" and self.loss != "dpo"

    @property
    def grouped(self) -> bool:
        """Whether samples of the same prompt are compared."""
        return self.loss == "dpo" or self.estimator in GROUPED

    @property
    def n(self) -> int:
        """Samples of each prompt."""
        fallback = 2 if self.loss == "dpo" else 4 if self.grouped else 1
        return self.samples_per_prompt or fallback

    @property
    def mode(self) -> str:
        """The aggregation, as published where none is named."""
        published = "token-sum-const" if self.estimator == "dr_grpo" else "token-mean"
        if self.loss == "gspo":
            published = "seq-mean-token-mean"
        return self.aggregation or published

    @property
    def sampling(self) -> Any:
        """SamplingParams for the rollout engine."""
        from prefopt.rollout.types import SamplingParams

        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            stop=tuple(self.stop or ()),
            stop_ids=None if self.stop_ids is None else tuple(self.stop_ids),
        )
