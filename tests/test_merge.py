"""Merging: the merged model is the adapted one up to one rounding, and comes apart again."""

import copy
import math

import pytest
import torch
from torch import nn

from prefopt.errors import InputError
from prefopt.nn.lora import (
    LoraConfig,
    adapted_modules,
    adapters,
    add_lora,
    has_adapter,
    lora_layers,
    lora_parameters,
    unload_lora,
)
from prefopt.nn.merge import Change, dequantize_base, merge_lora, unmerge
from prefopt.nn.nf4_linear import NF4Linear

IDS = torch.arange(24).reshape(2, 12) % 61
PLAIN = LoraConfig(r=4, alpha=6)
CONFIGS = {
    "lora": PLAIN,
    "rslora": LoraConfig(r=4, alpha=6, use_rslora=True),
    "dora": LoraConfig(r=4, alpha=6, use_dora=True),
    "pissa": LoraConfig(r=4, alpha=6, init="pissa"),
    "embedding": LoraConfig(r=4, alpha=6, targets=["embed_tokens", "q_proj"]),
    "saved": LoraConfig(r=4, alpha=6, targets=["q_proj"], modules_to_save=["lm_head", "norm"]),
}


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    torch.manual_seed(7)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=False,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def trained(model: nn.Module, config: LoraConfig, size: float = 0.2) -> nn.Module:
    """The model with an adapter that has moved, every tensor of it, as training would."""
    add_lora(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in lora_parameters(model):
            p.add_(torch.randn(p.shape, generator=generator), alpha=size * (p.std() + 0.1).item())
    return model


def four_bit(model: nn.Module) -> nn.Module:
    """The decoder's linear layers in 4 bits, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, NF4Linear.from_linear(module))
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_once_and_unmerge_restores_the_bits(kind, dtype):
    model = trained(tiny(kind, dtype), PLAIN)
    layers = dict(lora_layers(model))
    before = {path: lora.base.weight.detach().clone() for path, lora in layers.items()}
    logits = model(IDS).logits
    report = merge_lora(model)
    assert report.changes.keys() == layers.keys()
    assert max(c.lost for c in report.changes.values()) < (1e-5 if dtype.itemsize == 4 else 0.1)
    assert f'merged "default" into {len(layers)} layers' in report.lines()[0]
    for path, lora in layers.items():
        A, B = (p.detach().double() for p in lora.factors("default"))
        delta = lora.scaling["default"] * (B @ A)
        exact = before[path].double() + (delta.t() if lora.transposed else delta)
        half_ulp = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-7
        assert ((lora.base.weight.double() - exact).abs() <= half_ulp).all()
    merged = model(IDS).logits
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.1}
    torch.testing.assert_close(merged, logits, **tolerance)
    with adapters(model, "default"):
        assert torch.equal(model(IDS).logits, merged)
    with pytest.raises(InputError, match="unmerge it first"), adapters(model, None):
        pass
    with pytest.raises(InputError, match="merged already"):
        merge_lora(model)
    unmerge(model)
    for path, lora in layers.items():
        assert torch.equal(lora.base.weight, before[path])
    assert torch.equal(model(IDS).logits, logits)
    with pytest.raises(InputError, match="not merged"):
        unmerge(model)


@pytest.mark.parametrize("base", ["dense", "4bit dequantised"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_adapter(name, base):
    """Merged and unloaded the model is a plain one with the adapted one's logits."""
    plain = tiny()
    model = trained(tiny() if base == "dense" else four_bit(tiny()), CONFIGS[name])
    logits = model(IDS).logits
    with adapters(model, None):
        assert (model(IDS).logits - logits).abs().max() > 0.02  # there is something to merge
    assert dequantize_base(model) == (0 if base == "dense" else 14)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-5, atol=1e-6)
    start = state(model)
    merge_lora(model)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=2e-5)
    unmerge(model)
    now = state(model)
    assert now.keys() == start.keys() and all(torch.equal(now[k], start[k]) for k in now)
    merge_lora(model)
    unload_lora(model)
    assert not has_adapter(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=2e-5)


def test_a_copy_of_the_merged_model_and_a_device_move_take_the_old_weights_along():
    model = trained(tiny(), PLAIN)
    start = {path: layer.base.weight.clone() for path, layer in lora_layers(model)}
    merge_lora(model)
    other = copy.deepcopy(model).to("cpu")
    unmerge(other)
    assert all(torch.equal(layer.base.weight, start[path]) for path, layer in lora_layers(other))
    assert all(layer.merged == "default" for _, layer in lora_layers(model))


def test_only_the_active_adapter_merges():
    model = tiny()
    add_lora(model, LoraConfig())
    with pytest.raises(InputError, match="not active"), adapters(model, None):
        merge_lora(model)
    with pytest.raises(InputError, match="no adapter"):
        merge_lora(model, "other")
    report = merge_lora(model)  # B = 0: nothing to lose
    assert set(report.changes.values()) == {Change(0.0, 1.0)}


def test_what_is_not_kept_cannot_be_unmerged():
    model = trained(tiny(), PLAIN)
    merge_lora(model, keep=False)
    assert sum(p.numel() for p in model.parameters() if p.shape == (128, 64)) == 4 * 128 * 64
    with pytest.raises(InputError, match="keep=False"):
        unmerge(model)
    unload_lora(model)


def test_the_report_says_what_rounding_left():
    """A change far below half a unit in the last place vanishes; a large one survives."""
    model = tiny(dtype=torch.bfloat16)
    add_lora(model, LoraConfig(r=4, targets=["q_proj", "v_proj"]))
    layers = dict(lora_layers(model))
    with torch.no_grad():
        for path, layer in layers.items():
            layer.base.weight.fill_(1.0)
            layer.A["default"].fill_(1.0)
            layer.B["default"].fill_(2.0**-14 if "q_proj" in path else 2.0**-4)
    report = merge_lora(model)
    for path, change in report.changes.items():
        assert change == (Change(1.0, 0.0) if "q_proj" in path else Change(0.0, 1.0))
    assert "at most 100.00%" in report.lines()[0] and "at least 0.0%" in report.lines()[0]


# ---- 4 bits --------------------------------------------------------------------------------------


def test_a_4bit_base_is_refused_and_untouched():
    model = trained(four_bit(tiny()), PLAIN)
    before, logits = state(model), model(IDS).logits
    with pytest.raises(InputError, match=r"layers.0.*4-bit.*dequantize_base.*requantize=True"):
        merge_lora(model)
    now = state(model)
    assert all(torch.equal(now[k], before[k]) for k in before)
    assert torch.equal(model(IDS).logits, logits)


def test_requantising_loses_small_changes_and_says_so():
    """|D|/|W| about 0.3% and 30%: of the small one next to nothing is left."""
    survived = {}
    for size in (0.002, 0.2):
        model = four_bit(tiny())
        add_lora(model, LoraConfig(r=4, targets=["q_proj", "up_proj"]))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, layer in lora_layers(model):
                target = size * layer.base.dequantize().norm()
                layer.B["default"].normal_(generator=generator)
                layer.B["default"].mul_(target / layer.delta("default").norm())
        start = state(model)
        report = merge_lora(model, requantize=True)
        assert report.requantized and "4-bit" in report.lines()[0]
        changes = report.changes.values()
        survived[size] = max(change.survived for change in changes)
        assert all(0.1 < change.lost < math.inf for change in changes)
        for _, layer in lora_layers(model):
            assert isinstance(layer.base, NF4Linear) and layer.base.nested is not None
        unmerge(model)
        now = state(model)
        assert now.keys() == start.keys() and all(torch.equal(now[k], start[k]) for k in now)
    assert survived[0.002] < 0.35 < 0.8 < survived[0.2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_is_the_same_model(dtype):
    model = four_bit(tiny(dtype=dtype))
    logits = model(IDS).logits
    bias = NF4Linear.from_linear(nn.Linear(64, 8))
    model.extra = bias
    assert dequantize_base(model) == 15
    assert torch.equal(model.extra.bias, bias.bias)
    assert not any(isinstance(m, NF4Linear) for m in model.modules())
    assert torch.equal(model(IDS).logits, logits)
    assert {p.dtype for p in model.get_submodule("model").parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.model.layers[0].self_attn.parameters())


def test_adapted_modules_keep_their_adapters_when_the_base_is_dequantized():
    model = trained(four_bit(tiny()), PLAIN)
    names = [path for path, _ in adapted_modules(model)]
    dequantize_base(model)
    assert [path for path, _ in adapted_modules(model)] == names
