"""A rollout engine on transformers' continuous batching: paged attention, flash where installed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from prefopt.data.encode import Encoded
from prefopt.data.packing import pack
from prefopt.errors import InputError
from prefopt.rollout.stops import stop_ids
from prefopt.rollout.types import Sample, SamplingParams, check_prompts, evaluating

PAGE = 64  # tokens of a page of the cache on the CPU
BOUND, BOUND_16 = 1e-4, 0.05  # nats a token that log-probs may differ from training's on average
WAIT = 0.2  # seconds until it is looked again whether the other thread still runs


class ContinuousEngine:
    """Samples with ``model.continuous_batching_context_manager`` of transformers; a RolloutEngine.

    What it cannot do that TorchEngine does: the noise is torch's generator, seeded, so that a
    sample depends on what else is in the batch and ``keys`` mean nothing; stop texts, top-p, top-k
    and a minimal length are refused, as is what computes under autocast (it generates in a thread
    of its own, which autocast does not reach), and a model that transformers cannot page. Log-probs
    are those of the logits at the temperature as the model gives them: in 16 bits they differ from
    training's by the rounding of a logit. Paged attention leaves out what some models ask of it
    (Gemma 2's softcap), so in every call the longest response is scored again as training would.
    """

    def __init__(self, policy: Any, *, slots: int = 64):
        """``slots``: most responses that are written at the same time."""
        self.policy, self.slots = policy, slots
        self._config_class = _config_class()
        if policy.autocast is not None:
            raise InputError(
                "continuous batching does not compute under autocast, and this policy has float32 "
                "weights that do; use the torch engine, or load the model with dtype='float32'"
            )

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        params: SamplingParams,
        *,
        n: int = 1,
        seed: int = 0,
        keys: Sequence[int] | None = None,
        on_sample: Callable[[int], None] | None = None,
    ) -> list[list[Sample]]:
        """See RolloutEngine, and the class for what is not served; InputError for that."""
        policy = self.policy
        check_prompts(
            policy.model, prompts, params, n, range(len(prompts)) if keys is None else keys
        )
        _check_params(params)
        if not len(prompts):
            return []
        stops = stop_ids(params, policy.model, policy.tokenizer)
        # Each prompt n times, not num_return_sequences: its copies share their first token.
        asked = [prompt.tolist() for prompt in prompts for _ in range(n)]
        devices = [policy.device] if policy.device.type == "cuda" else []
        with evaluating(policy), torch.random.fork_rng(devices):
            policy.attend(policy._own_attention)
            with self._manager(params, stops, seed, asked) as manager:
                names = manager.add_requests(inputs=asked, max_new_tokens=params.max_new_tokens)
                results = _collect(manager, set(names), on_sample)
            flat = [_sample(results[name], stops) for name in names]
            self._check(asked, flat, params.temperature or 1.0)
        return [flat[start : start + n] for start in range(0, len(flat), n)]

    @contextlib.contextmanager
    def _manager(
        self, params: SamplingParams, stops: Sequence[int], seed: int, asked: list[list[int]]
    ) -> Iterator[Any]:
        from transformers import GenerationConfig

        drawn = params.temperature > 0
        settings = {"temperature": params.temperature, "top_k": 0, "top_p": 1.0} if drawn else {}
        generation = GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            do_sample=drawn,
            eos_token_id=list(stops) or -1,
            **settings,
        )
        batching = self._config_class(
            return_logprobs=True, seed=seed % 2**63, **self._cache(params, asked)
        )
        manager = self.policy.model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        try:
            manager.start()
            yield manager
        finally:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()

    def _check(self, asked: list[list[int]], samples: list[Sample], temperature: float) -> None:
        """InputError where the log-probs of the longest response are not those of training."""
        policy = self.policy
        i = max(range(len(samples)), key=lambda i: len(asked[i]) + len(samples[i].tokens))
        encoded = Encoded(np.asarray(asked[i], np.int32), (samples[i].tokens,), i)
        (batch,) = pack([encoded], max_tokens=1 << 30, layout=policy.layout)
        wanted = policy(batch.to(policy.device), temperature=temperature).cpu().numpy()
        difference = np.abs(wanted - samples[i].logprobs).mean()
        if not difference < (BOUND if policy.dtype.itemsize >= 4 else BOUND_16):
            raise InputError(
                f"transformers' continuous batching computes something else than "
                f"{policy.model.config.model_type} models do (log-probs differ by "
                f"{difference:.2g} nats per token); use the torch engine"
            )

    def _cache(self, params: SamplingParams, asked: list[list[int]]) -> dict[str, Any]:
        """On the CPU a forward reads all of the cache, so it gets no more than what it needs; its
        size anywhere else is left to transformers."""
        rows = min(self.slots, len(asked))
        if self.policy.device.type != "cpu":
            return {"max_requests_per_batch": rows}
        blocks = rows * -(-(max(map(len, asked)) + params.max_new_tokens) // PAGE)
        return {"max_requests_per_batch": rows, "page_size": PAGE, "num_blocks": blocks}


def _config_class() -> Any:
    """InputError where the installed transformers has no continuous batching with log-probs."""
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError:
        ContinuousBatchingConfig = None
    known = ContinuousBatchingConfig and dataclasses.fields(ContinuousBatchingConfig)
    if not known or "return_logprobs" not in {field.name for field in known}:
        raise InputError(
            "this transformers has no continuous batching that returns log-probs; "
            "update it, or use the torch engine"
        )
    return ContinuousBatchingConfig


def _check_params(params: SamplingParams) -> None:
    plain = SamplingParams()
    for name in ("min_new_tokens", "top_p", "top_k", "stop"):
        if getattr(params, name) != getattr(plain, name):
            raise InputError(f"continuous batching takes no {name}; use the torch engine")


def _collect(manager: Any, names: set[str], on_sample: Callable[[int], None] | None) -> dict:
    results: dict[str, Any] = {}
    while len(results) < len(names):
        result = manager.get_result(timeout=WAIT)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended before all responses")
        elif result.error is not None:
            raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
        elif result.is_finished() and result.request_id in names:
            results[result.request_id] = result
            if on_sample is not None:
                on_sample(len(results))
    return results


def _sample(result: Any, stops: Sequence[int]) -> Sample:
    tokens = np.asarray(result.generated_tokens, dtype=np.int32)
    finish = "stop" if len(tokens) and tokens[-1] in stops else "length"
    return Sample(tokens, np.asarray(result.logprobs, dtype=np.float32), finish)
