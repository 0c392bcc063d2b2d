"""The lean RMSNorm against the models' own: the same bits forward, its gradients, less kept."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from prefopt.nn import rmsnorm
from prefopt.nn.rmsnorm import use_lean_rmsnorm

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config, norms",
    [
        (LlamaConfig, 5),
        (MistralConfig, 5),
        (Qwen2Config, 5),
        (Qwen3Config, 9),  # of queries and keys too
        (Phi3Config, 5),
        (SmolLM3Config, 5),
        (Olmo2Config, 0),  # multiplies before it rounds
        (Gemma2Config, 0),  # 1 + w
    ],
)
def test_which_models_it_serves(config, norms):
    assert use_lean_rmsnorm(Auto.from_config(config(**SMALL))) == norms


def both(width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    plain = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(width, generator=generator))
    lean = copy.deepcopy(plain)
    assert use_lean_rmsnorm(lean) == 1
    return plain, lean


@pytest.mark.parametrize("block", [1, 100, rmsnorm.BLOCK])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 7, 24), (1, 40, 3, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_autograd_and_float64(dtype, shape, block, monkeypatch):
    """Forward in the same bits. dx and dw no further from float64 than autograd's."""
    monkeypatch.setattr(rmsnorm, "BLOCK", block)
    plain, lean = both(24, dtype)
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    results = {}
    for name, norm in (("plain", plain), ("lean", lean)):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(g)
        results[name] = y.detach(), leaf.grad, norm.weight.grad
    assert torch.equal(results["lean"][0], results["plain"][0])
    wide, w = x.double().requires_grad_(), plain.weight.detach().double().requires_grad_()
    (w * wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).backward(g.double())
    for i, exact in ((1, wide.grad), (2, w.grad)):
        error, others = ((results[k][i].double() - exact).norm() for k in ("lean", "plain"))
        floor = torch.finfo(dtype).eps * exact.norm()
        assert error <= 1.2 * others + 0.1 * floor, (i, error, others)


def test_only_x_and_a_number_for_each_row_are_kept():
    _, lean = both(64, torch.bfloat16)
    x, kept = torch.randn(1, 30, 64, dtype=torch.bfloat16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lean(x)
    places = {t.data_ptr() for t in kept} - {x.data_ptr(), lean.weight.data_ptr()}
    [r] = [t for t in kept if t.data_ptr() in places]
    assert r.shape == (30, 1) and r.dtype == torch.float32


def test_a_frozen_weight_takes_no_gradient_and_a_frozen_input_neither():
    plain, lean = both(24, torch.float32)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    for frozen in ("weight", "x"):
        grads = []
        for norm in (plain, lean):
            norm.weight.requires_grad_(frozen != "weight")
            norm.weight.grad = None
            leaf = x.clone().requires_grad_(frozen != "x")
            norm(leaf).square().sum().backward()
            grads.append((leaf.grad, norm.weight.grad))
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_other_dtypes_go_the_models_own_way():
    """float64, which the model rounds to float32, and a weight that is wider than the input."""
    for wide, narrow in ((torch.float64, torch.float64), (torch.float32, torch.bfloat16)):
        plain, lean = both(24, wide)
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2)).to(narrow)
        assert torch.equal(lean(x), plain(x)) and lean(x).dtype == plain(x).dtype


def test_a_model_and_its_copy():
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SMALL))
    lean = copy.deepcopy(plain)
    use_lean_rmsnorm(lean)
    again, ids = copy.deepcopy(lean), torch.arange(30)[None]
    for model in (plain, lean, again):
        model(ids).logits.square().sum().backward()
    for other in (lean, again):
        for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)
    nn.init.zeros_(again.model.norm.weight)  # it computes with its own weights
    assert again(ids).logits.abs().max() == 0 and torch.equal(lean(ids).logits, plain(ids).logits)
