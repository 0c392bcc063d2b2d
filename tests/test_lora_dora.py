"""DoRA against its definition in float64, against peft, and what it may not change."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prefopt.errors import InputError
from prefopt.nn import dora
from prefopt.nn.lora import (
    LoraConfig,
    LoraLinear,
    adapters,
    add_lora,
    copy_adapter,
    is_zero_adapter,
    lora_layers,
    lora_parameters,
)
from prefopt.nn.nf4_linear import NF4Linear

IDS = torch.arange(24).reshape(2, 12) % 61


def layer(width=24, out=18, *, bias=True, conv1d=False, dtype=torch.float32, **config):
    """(LoraLinear with a DoRA adapter in the middle of training, its base)."""
    torch.manual_seed(1)
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        base = Conv1D(out, width)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(width, out, bias=bias)
    base = base.to(dtype).requires_grad_(False)
    module = LoraLinear(base, "default")
    module.add("default", LoraConfig(**{"r": 4, "alpha": 6, "use_dora": True, **config}))
    with torch.no_grad():
        module.B["default"].normal_(std=0.2)
        module.m["default"].mul_(torch.rand(out) + 0.5)
    return module, base


def trained(module: LoraLinear) -> list[Tensor]:
    return list(module.parts("default").values())


def oracle(base, x, A, B, m, s, masked=None) -> Tensor:
    """The definition, in float64 and with autograd; `masked` is x after dropout."""
    W = base.weight.double() if isinstance(base, nn.Linear) else base.weight.double().t()
    c = m / (W + s * (B @ A)).norm(dim=1).detach()
    bias = 0 if base.bias is None else base.bias.double()
    if masked is None:
        return c * (x @ W.t() + s * (x @ A.t() @ B.t())) + bias
    return x @ W.t() + bias + (c - 1) * (masked @ W.t()) + c * s * (masked @ A.t() @ B.t())


def compare(module, base, x, g, s, rtol=1e-5, atol=1e-4, masked=None, seed=None):
    """y and all gradients of `module` against the definition."""
    if seed is not None:
        torch.manual_seed(seed)
    y = module(x)
    y.backward(g)
    exact = [t.detach().double().requires_grad_() for t in (x, *trained(module))]
    expected = oracle(base, *exact, s, masked and masked(exact[0]))
    expected.backward(g.double())
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)
    for mine, theirs in zip((x, *trained(module)), exact, strict=True):
        assert mine.grad.is_contiguous() and mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(transposed, bias):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = (Conv1D(5, 7) if transposed else nn.Linear(7, 5, bias=bias)).double()
    base.requires_grad_(False)
    shapes = {"x": (2, 3, 7), "A": (4, 7), "B": (5, 4), "m": (5,)}
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes.values()]
    norms = torch.rand(5, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(
        lambda *t: dora.product(*t, norms, base, transposed, 1.5, 0.0), tensors
    )


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    width=st.integers(1, 40),
    out=st.integers(1, 40),
    r=st.integers(1, 9),
    use_rslora=st.booleans(),
    bias=st.booleans(),
    conv1d=st.booleans(),
)
def test_matches_float64_autograd(shape, width, out, r, use_rslora, bias, conv1d):
    module, base = layer(width, out, bias=bias, conv1d=conv1d, r=r, use_rslora=use_rslora)
    x = torch.randn(*shape, 3, width, requires_grad=True)
    g = torch.randn(*shape, 3, out)
    compare(module, base, x, g, 6 / (math.sqrt(r) if use_rslora else r))


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dropout_is_pefts(conv1d, bias):
    module, base = layer(conv1d=conv1d, bias=bias, dropout=0.4)
    x = torch.randn(3, 11, 24, requires_grad=True)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(3, 11, 24), 0.4).double()
    assert 0.2 < (mask == 0).double().mean() < 0.6
    compare(module, base, x, torch.randn(3, 11, 18), 1.5, 1e-5, 1e-5, lambda x: x * mask, seed=5)
    module.eval()
    exact = [t.detach().double() for t in (x, *trained(module))]
    torch.testing.assert_close(module(x).double(), oracle(base, *exact, 1.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 30, 1 << 20])
@pytest.mark.parametrize("conv1d", [False, True])
def test_norms_without_the_product(monkeypatch, block, conv1d):
    monkeypatch.setattr(dora, "BLOCK", block)
    module, base = layer(conv1d=conv1d)
    W = base.weight.double().t() if conv1d else base.weight.double()
    A, B = (p.detach().double() for p in trained(module)[:2])
    expected = (W + 1.5 * (B @ A)).norm(dim=1)
    torch.testing.assert_close(module.row_norms("default").double(), expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        base.weight.mul_(3)  # in place: what was remembered of W is void
    expected = (3 * W + 1.5 * (B @ A)).norm(dim=1)
    torch.testing.assert_close(module.row_norms("default").double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "4-bit"])
def test_the_start_is_bitwise_the_base(dtype, kind):
    _, base = layer(64, 18, dtype=dtype, bias=kind != "no bias", conv1d=kind == "conv1d")
    if kind == "4-bit":
        base = NF4Linear.from_linear(base.float()).to(dtype)
    module = LoraLinear(base, "default")
    module.add("default", LoraConfig(use_dora=True, r=4))
    x = torch.randn(2, 17, 64).to(dtype)
    assert torch.equal(module(x), base(x)) and module.is_zero("default")
    with torch.no_grad():
        module.m["default"][3] *= 1.001
    assert not module.is_zero("default")
    if dtype.itemsize > 2:
        assert not torch.equal(module(x), base(x))


def test_a_row_of_zeros_stays_one():
    module, base = layer()
    with torch.no_grad():
        base.weight[3], base.weight[4] = 0, 0
        module.B["default"][3] = 0
        module.m["default"][3] = 0
    x = torch.randn(9, 24, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert torch.equal(y[:, 3], base.bias[3].expand(9))
    assert all(t.grad.isfinite().all() for t in (x, *trained(module)))
    assert module.m["default"].grad[3] == 0 and module.m["default"].grad[4] != 0
    fresh = LoraLinear(nn.Linear(24, 18).requires_grad_(False), "default")
    fresh.base.weight.zero_()
    fresh.add("default", LoraConfig(use_dora=True))
    assert torch.equal(fresh(x), fresh.base(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errors_are_roundings(dtype):
    module, base = layer(64, 48, dtype=dtype)
    with torch.no_grad():
        start = module.row_norms("default")
        module.m["default"].copy_(start * (1 + 2e-3 * torch.rand(48)))  # c is below the last bit
    x = torch.randn(33, 64).to(dtype).requires_grad_()
    y, g = module(x), torch.randn(33, 48).to(dtype)
    y.backward(g)
    exact = [t.detach().double().requires_grad_() for t in (x, *trained(module))]
    expected = oracle(base, *exact, 1.5)
    expected.backward(g.double())
    assert y.dtype == x.grad.dtype == dtype
    pairs = [(y, expected)]
    pairs += [(m.grad, e.grad) for m, e in zip((x, *trained(module)), exact, strict=True)]
    for mine, theirs in pairs:
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < torch.finfo(dtype).eps  # a few roundings to half an eps each, in the mean


def test_a_length_is_not_rounded_to_16_bits():
    """c = 1.01 has two neighbours in bfloat16, 1.0078 and 1.0156; the mean over tokens shows it."""
    module, base = layer(64, 48, dtype=torch.bfloat16, bias=False)
    with torch.no_grad():
        module.B["default"].zero_()
        c = 1 + (0.01 + 0.02 * torch.rand(48)) * (1 - 2 * (torch.arange(48) % 2))
        module.m["default"].copy_(module.row_norms("default") * c)
    x = torch.randn(4096, 64).bfloat16()
    y, plain = module(x).double(), x.double() @ base.weight.double().t()
    gain = (y * plain).sum(0) / plain.square().sum(0)
    assert (gain - c).abs().mean() < 3e-4  # rounded it would be 1.5e-3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_over_a_float32_base(dropout):
    module, base = layer(64, 48, dropout=dropout)
    x, g = torch.randn(33, 64, requires_grad=True), torch.randn(33, 48).bfloat16()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.backward(g)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(33, 64, dtype=torch.bfloat16), dropout).double() if dropout else 1
    exact = [t.detach().double().requires_grad_() for t in (x, *trained(module))]
    masked = exact[0] * mask if dropout else None
    expected = oracle(base, *exact, 1.5, masked)
    expected.backward(g.double())
    assert y.dtype == torch.bfloat16
    pairs = [(y, expected)]
    for mine, theirs in zip((x, *trained(module)), exact, strict=True):
        assert mine.grad.dtype == torch.float32
        pairs.append((mine.grad, theirs.grad))
    for mine, theirs in pairs:
        assert (mine.double() - theirs).norm() < torch.finfo(torch.bfloat16).eps * theirs.norm()


def test_saves_x_h_and_one_more():
    module, _ = layer(dtype=torch.bfloat16, bias=False)
    x = torch.randn(50, 24, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    per_layer = 18 * 4 + 18 * 2  # the norms, and c - 1
    assert sum(kept.values()) == 2 * 50 * (24 + 4 + 18) + per_layer
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_4_bit_base_equals_the_dequantised_one(dtype, dropout):
    linear = nn.Linear(128, 48).to(dtype).requires_grad_(False)
    small = NF4Linear.from_linear(linear)
    linear.weight.copy_(small.dequantize())
    results = []
    for base in (linear, small):
        module = LoraLinear(base, "default")
        torch.manual_seed(2)
        module.add("default", LoraConfig(use_dora=True, r=4, dropout=dropout))
        with torch.no_grad():
            module.B["default"].normal_(std=0.2)
            module.m["default"].mul_(1.5)
        x = torch.randn(7, 128).to(dtype).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in trained(module))])
        results[-1].append(module.merged_weight("default"))
    for dense, packed in zip(*results, strict=True):
        assert torch.equal(dense, packed)


@pytest.mark.parametrize("conv1d", [False, True])
def test_merged_weight(conv1d):
    module, base = layer(conv1d=conv1d, bias=False)
    x = torch.randn(9, 24)
    W = module.merged_weight("default")
    assert W.shape == base.weight.shape and W.dtype == torch.float32
    y = F.linear(x, W.t() if conv1d else W)
    y = y if base.bias is None else y + base.bias
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)


# ---- models --------------------------------------------------------------------------------------


def tiny(kind: str = "llama") -> nn.Module:
    import transformers

    torch.manual_seed(7)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids,
        )  # fmt: skip
    else:
        config = transformers.Qwen2Config(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, **ids,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    return model.eval()


def randomise(model: nn.Module, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, p in lora_parameters(model, name):
            if f".B.{name}" in path:
                p.normal_(std=0.2, generator=generator)
            if f".m.{name}" in path:
                p.mul_(0.5 + torch.rand(p.shape, generator=generator))


def loss(model: nn.Module) -> Tensor:
    logits = model(IDS).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_equals_peft(kind, dropout):
    peft = pytest.importorskip("peft")
    model, twin = tiny(kind), tiny(kind)
    add_lora(model, LoraConfig(r=4, alpha=6, use_dora=True, dropout=dropout))
    randomise(model)
    theirs = peft.get_peft_model(
        twin,
        peft.LoraConfig(
            r=4, lora_alpha=6, target_modules="all-linear", use_dora=True, lora_dropout=dropout,
            fan_in_fan_out=kind == "gpt2",
        ),
    )  # fmt: skip
    modules = dict(twin.named_modules())
    with torch.no_grad():
        for name, lora in lora_layers(model):
            modules[name].lora_A["default"].weight.copy_(lora.A["default"])
            modules[name].lora_B["default"].weight.copy_(lora.B["default"])
            modules[name].lora_magnitude_vector["default"].weight.copy_(lora.m["default"])
    results = []
    for one in (model.train(), theirs.train()):
        torch.manual_seed(11)
        results.append(loss(one))
        results[-1].backward()
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    assert (loss(model) - loss(tiny(kind))).abs() > 1e-3
    for name, lora in lora_layers(model):
        for part, mine in lora.parts("default").items():
            where = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}[part]
            expected = getattr(modules[name], where)["default"].weight.grad
            assert (mine.grad - expected).norm() <= 1e-5 * expected.norm(), (name, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_model(dtype):
    model = tiny().to(dtype)
    before = model(IDS).logits
    report = add_lora(model, LoraConfig(r=4, use_dora=True))
    assert is_zero_adapter(model) and torch.equal(model(IDS).logits, before)
    names = [name for name, _ in lora_parameters(model)]
    assert len(names) == 3 * 14 and "model.layers.0.mlp.up_proj.m.default" in names
    assert report.trainable == sum(p.numel() for _, p in lora_parameters(model))
    randomise(model)
    model.to(dtype)
    assert {p.dtype for _, p in lora_parameters(model)} == {torch.float32}
    now = model(IDS).logits
    copy_adapter(model, "default", "reference")
    with adapters(model, "reference"):
        assert torch.equal(model(IDS).logits, now)
    with adapters(model, None):
        assert torch.equal(model(IDS).logits, before)


def test_embeddings_have_no_magnitude():
    with pytest.raises(InputError, match=r"lora.use_dora does not go with .* model.embed_tokens"):
        add_lora(tiny(), LoraConfig(use_dora=True, targets=["q_proj", "embed_tokens"]))
