"""The lean SwiGLU against the models' own: the same bits, a fifth less kept."""

import copy

import pytest
import torch
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

from prefopt.nn.swiglu import _GatedSilu, use_lean_swiglu

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
    "config, blocks",
    [
        (LlamaConfig, 2),
        (MistralConfig, 2),
        (Qwen2Config, 2),
        (Qwen3Config, 2),
        (Olmo2Config, 2),
        (SmolLM3Config, 2),
        (Gemma2Config, 0),  # GELU
        (Phi3Config, 0),  # one projection for gate and up
    ],
)
def test_which_models_it_serves(config, blocks):
    assert use_lean_swiglu(Auto.from_config(config(**SMALL))) == blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_autograd_and_less_kept(dtype):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SMALL)).to(dtype)
    lean = copy.deepcopy(plain)
    assert use_lean_swiglu(lean) == 2
    again = copy.deepcopy(lean)  # a copy computes with its own weights, not with the original's
    with torch.no_grad():
        lean.model.layers[0].mlp.up_proj.weight.mul_(1)
    ids, kept = torch.arange(30)[None], {}
    for name, model in (("plain", plain), ("lean", lean), ("again", again)):
        kept[name] = 0

        def count(tensor, name=name):
            kept[name] += tensor.nbytes * (tensor.shape[-1] == 48 and tensor.dim() == 3)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            model(ids).logits.float().square().sum().backward()
    for other in (lean, again):
        for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), name
    # gate, silu(gate) and up against gate and up; the input of down_proj is kept by both
    assert kept["lean"] < kept["plain"]
    again.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert not torch.equal(again(ids).logits, lean(ids).logits)


def test_gradcheck():
    gate, up = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(_GatedSilu.apply, (gate.requires_grad_(), up.requires_grad_()))
