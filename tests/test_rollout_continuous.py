"""The engine on transformers' continuous batching: the protocol, the log-probs, what it refuses."""

import sys
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from prefopt.errors import InputError
from prefopt.nn.lora import LoraConfig, add_lora
from prefopt.rollout.continuous import ContinuousEngine
from prefopt.rollout.torch_engine import TorchEngine
from tests.test_rollout import DRAW, PROMPTS, STOPS, Stop, gap, policy_of, same


@pytest.fixture(scope="module")
def llama():
    return policy_of()


def test_captured_log_probs_are_those_of_training(llama):
    """Under an adapter too, at a temperature; afterwards everything is as it was."""
    add_lora(llama.model, LoraConfig(r=4), "default")
    llama.adapter = "default"
    with torch.no_grad():
        for parameter in llama.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    llama.train()
    torch.manual_seed(3)
    before = torch.get_rng_state(), llama.model.config._attn_implementation
    done = []
    samples = ContinuousEngine(llama).generate(PROMPTS, DRAW, n=3, seed=1, on_sample=done.append)
    assert done == [*range(1, 22)] and llama.training and llama.model.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert llama.model.config._attn_implementation == before[1]
    for s in (s for group in samples for s in group):
        ends = np.isin(s.tokens, STOPS)
        assert not ends[:-1].any() and (s.finish == "stop") == ends[-1]
        assert s.finish == "stop" or len(s.tokens) == DRAW.max_new_tokens
    assert gap(llama, PROMPTS, samples, 0.7) < 1e-5
    assert gap(llama, PROMPTS, samples, 1.0) > 0.1
    assert len({tuple(s.tokens) for s in samples[2]}) == 3
    assert same(ContinuousEngine(llama).generate(PROMPTS, DRAW, n=3, seed=1), samples)


def test_greedy_is_what_the_torch_engine_takes():
    for name in ("Llama", "Qwen3", "Mistral"):
        policy, params = policy_of(name), replace(DRAW, temperature=0)
        got = ContinuousEngine(policy, slots=4).generate(PROMPTS, params)
        assert same(got, TorchEngine(policy).generate(PROMPTS, params), bits=False)


def test_what_paged_attention_leaves_out_is_noticed():
    with pytest.raises(InputError, match="something else than gemma2 models do"):
        ContinuousEngine(policy_of("Gemma2")).generate(PROMPTS, DRAW)


def test_interrupted_no_thread_stays(llama):
    def stop(count):
        raise Stop

    threads = threading.active_count()
    with pytest.raises(Stop):
        ContinuousEngine(llama).generate(PROMPTS, DRAW, on_sample=stop)
    assert threading.active_count() <= threads + 1  # tqdm's monitor may have begun


def test_a_failure_inside_is_told(llama, monkeypatch):
    monkeypatch.setattr(llama.model.model, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(RuntimeError, match="continuous batching"):
        ContinuousEngine(llama).generate(PROMPTS, DRAW)


@dataclass
class Older:
    """The configuration before log-probs were returned."""

    max_batch_tokens: int = 256


def test_what_it_refuses(llama, monkeypatch):
    for name, value in (("stop", ("a",)), ("top_p", 0.9), ("top_k", 3), ("min_new_tokens", 2)):
        with pytest.raises(InputError, match=f"takes no {name}"):
            ContinuousEngine(llama).generate(PROMPTS, replace(DRAW, **{name: value}))
    assert ContinuousEngine(llama).generate([], DRAW) == []
    masters = policy_of(dtype=torch.bfloat16)
    masters.use_float32_masters()
    with pytest.raises(InputError, match="autocast"):
        ContinuousEngine(masters)
    module = sys.modules["transformers"]  # which it puts in its own place as it loads
    monkeypatch.setattr(module, "ContinuousBatchingConfig", Older)
    with pytest.raises(InputError, match="update it"):
        ContinuousEngine(llama)
