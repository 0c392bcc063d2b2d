"""The LoRA layer against float64 autograd and peft, and what adapters may not change."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefopt.errors import InputError
from prefopt.nn.lora import (
    LoraConfig,
    LoraLinear,
    adapter_names,
    adapters,
    add_lora,
    copy_adapter,
    has_adapter,
    is_zero_adapter,
    lora_layers,
    lora_parameters,
)
from prefopt.nn.lora_linear import _Lora

IDS = torch.arange(24).reshape(2, 12) % 61


def tiny(kind: str = "llama", *, tied: bool = False) -> nn.Module:
    """A tiny random model, always the same: Llama, Qwen2 (biases on q, k, v) or GPT-2 (Conv1D)."""
    import transformers

    torch.manual_seed(7)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=tied,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids,
        )  # fmt: skip
    else:
        name = {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}[kind]
        config = getattr(transformers, name)(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, **ids,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    return model.eval()


def randomise(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    """Gives every B of the adapter a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in lora_parameters(model, name):
            if f".B.{name}" in path:
                p.normal_(std=0.2, generator=generator)


def layer(width=24, out=18, *, bias=True, conv1d=False, dtype=torch.float32, **config):
    """(LoraLinear with adapter "default" whose B is not 0, its base), frozen base."""
    torch.manual_seed(1)
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        base = Conv1D(out, width)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(width, out, bias=bias)
    base = base.to(dtype).requires_grad_(False)
    module = LoraLinear(base, "default")
    module.add("default", LoraConfig(**{"r": 4, "alpha": 6, **config}))
    nn.init.normal_(module.B["default"], std=0.2)
    return module, base


def oracle(base: nn.Module, x: Tensor, A: Tensor, B: Tensor, s: float, branch=None) -> Tensor:
    """The definition, in float64 and with autograd; `branch` is x after dropout."""
    W = base.weight.double() if isinstance(base, nn.Linear) else base.weight.double().t()
    y = x @ W.t() + (0 if base.bias is None else base.bias.double())
    return y + s * (((x if branch is None else branch) @ A.t()) @ B.t())


def gradients(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(IDS).logits.float()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return {path: p.grad.clone() for path, p in lora_parameters(model, name)}


# ---- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0), ("r", 2.0), ("r", True), ("alpha", 0), ("alpha", -1), ("alpha", math.inf),
        ("alpha", math.nan), ("dropout", 1.0), ("dropout", -0.1), ("dropout", "x"),
        ("targets", ""), ("targets", []), ("targets", ["q_proj", ""]), ("targets", "q_proj("),
        ("targets", 3), ("use_rslora", 1), ("use_dora", 1), ("init", "olora"),
        ("exclude", "q("), ("exclude", [""]),
        ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q(": 4}), ("rank_pattern", ["q"]),
        ("alpha_pattern", {"q_proj": 0}), ("alpha_pattern", {"": 1}),
        ("modules_to_save", "lm_head"), ("modules_to_save", [""]),
    ],
)  # fmt: skip
def test_config_rejects(key, value):
    with pytest.raises(InputError, match=re.escape(f"lora.{key} is {value!r}")):
        LoraConfig(**{key: value})


def test_scaling():
    assert LoraConfig(r=16, alpha=32).scaling == 2
    assert LoraConfig(r=16, alpha=32, use_rslora=True).scaling == 8


# ---- numerics of one layer -----------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("x_grad", [False, True])
def test_gradcheck(transposed, x_grad):
    if transposed:
        from transformers.pytorch_utils import Conv1D

        base = Conv1D(5, 7).double()
    else:
        base = nn.Linear(7, 5).double()
    base.requires_grad_(False)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=x_grad)
    A = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    B = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, A, B: _Lora.apply(x, A, B, base, transposed, 1.5, 0.0), (x, A, B)
    )


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    width=st.integers(1, 40),
    out=st.integers(1, 40),
    r=st.integers(1, 9),
    alpha=st.floats(0.1, 64),
    use_rslora=st.booleans(),
    bias=st.booleans(),
    conv1d=st.booleans(),
)
def test_matches_float64_autograd(shape, width, out, r, alpha, use_rslora, bias, conv1d):
    module, base = layer(
        width, out, bias=bias, conv1d=conv1d, r=r, alpha=alpha, use_rslora=use_rslora
    )
    x = torch.randn(*shape, 3, width, requires_grad=True)
    g = torch.randn(*shape, 3, out)
    y = module(x)
    y.backward(g)
    exact = [t.detach().double().requires_grad_() for t in (x, *_AB(module))]
    expected = oracle(base, *exact, alpha / (math.sqrt(r) if use_rslora else r))
    expected.backward(g.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip((x, *_AB(module)), exact, strict=True):
        assert mine.grad.dtype == torch.float32 and mine.grad.is_contiguous()
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)


def _AB(module: LoraLinear) -> tuple[Tensor, Tensor]:
    return module.A["default"], module.B["default"]


def test_float64_input_is_computed_in_float64():
    module, base = layer()
    module.double()
    assert module.A["default"].dtype == torch.float32
    x = torch.randn(9, 24, dtype=torch.float64, requires_grad=True)
    y = module(x)
    y.sum().backward()
    A, B = (t.detach().double() for t in _AB(module))
    torch.testing.assert_close(y, oracle(base, x, A, B, 1.5), rtol=1e-13, atol=1e-13)
    assert {t.grad.dtype for t in _AB(module)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errors_are_roundings(dtype):
    module, base = layer(64, 48, dtype=dtype)
    x = torch.randn(33, 64).to(dtype).requires_grad_()
    y = module(x)
    g = torch.randn(33, 48).to(dtype)
    y.backward(g)
    assert y.dtype == x.grad.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in (x, *_AB(module))]
    expected = oracle(base, *exact, 1.5)
    expected.backward(g.double())
    pairs = [(y, expected)]
    pairs += [(m.grad, e.grad) for m, e in zip((x, *_AB(module)), exact, strict=True)]
    for mine, theirs in pairs:
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < torch.finfo(dtype).eps  # a few roundings to half an eps each, in the mean


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_zero_adapter_is_bitwise_the_base(dtype, conv1d, bias):
    module, base = layer(dtype=dtype, conv1d=conv1d, bias=bias)
    x = torch.randn(2, 17, 24).to(dtype)
    module.active = None
    assert torch.equal(module(x), base(x))
    module.active = "default"
    assert not torch.equal(module(x), base(x))
    nn.init.zeros_(module.B["default"])
    assert torch.equal(module(x), base(x))
    assert torch.equal(module(x[0, 0]), base(x[0, 0]) if not conv1d else base(x[0, :1])[0])


@pytest.mark.parametrize("conv1d", [False, True])
def test_dropout_uses_one_mask_in_forward_and_backward(conv1d):
    module, base = layer(conv1d=conv1d, dropout=0.4)
    x = torch.randn(3, 11, 24, requires_grad=True)
    g = torch.randn(3, 11, 18)
    torch.manual_seed(5)
    y = module(x)
    y.backward(g)
    exact = [t.detach().double().requires_grad_() for t in (x, *_AB(module))]
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(3, 11, 24), 0.4).double()
    assert 0.2 < (mask == 0).double().mean() < 0.6
    oracle(base, *exact, 1.5, branch=exact[0] * mask).backward(g.double())
    for mine, theirs in zip((x, *_AB(module)), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    module.eval()
    A, B = (t.detach().double() for t in _AB(module))
    expected = oracle(base, x.double(), A, B, 1.5)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_a_float32_base(dtype):
    module, base = layer(64, 48)
    x = torch.randn(33, 64, requires_grad=True)
    g = torch.randn(33, 48).to(dtype)
    with torch.autocast("cpu", dtype):
        y = module(x)
        with torch.no_grad():
            plain = base(x)
    y.backward(g)
    assert y.dtype == plain.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in (x, *_AB(module))]
    expected = oracle(base, *exact, 1.5)
    expected.backward(g.double())
    pairs = [(y, expected)]
    for mine, theirs in zip((x, *_AB(module)), exact, strict=True):
        assert mine.grad.dtype == torch.float32
        pairs.append((mine.grad, theirs.grad))
    for mine, theirs in pairs:
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < torch.finfo(dtype).eps
    nn.init.zeros_(module.B["default"])
    with torch.autocast("cpu", dtype):
        assert torch.equal(module(x), plain)


def test_gradient_arrives_from_strided_upstreams():
    module, base = layer()
    x = torch.randn(4, 6, 24).transpose(0, 1).requires_grad_()
    module(x).transpose(0, 1).sum().backward()  # stride 0, and another order of rows
    exact = [t.detach().double().requires_grad_() for t in (x, *_AB(module))]
    oracle(base, *exact, 1.5).sum().backward()
    for mine, theirs in zip((x, *_AB(module)), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)


def saved(function) -> list[Tensor]:
    """What `function` saves for backward, parameters apart, one tensor per storage."""
    tensors = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            tensors[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = function()
    assert kept is not None
    return list(tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_only_x_and_h(dtype):
    q, _ = layer(dtype=dtype)
    k, _ = layer(dtype=dtype)
    x = torch.randn(50, 24, dtype=dtype, requires_grad=True)
    kept = saved(lambda: (q(x), k(x)))
    size = sum(t.numel() * t.element_size() for t in kept)
    assert size == (50 * 24 + 2 * 50 * 4) * dtype.itemsize  # one x for both, one h each
    for group in (q.A, q.B):
        group["default"].requires_grad_(False)
    assert saved(lambda: q(x)) == []  # a frozen adapter passes gradients on and keeps nothing
    with torch.no_grad():
        assert saved(lambda: k(x)) == []


def test_a_trainable_base_is_refused():
    module, base = layer()
    base.bias.requires_grad_(True)
    with pytest.raises(InputError, match="freeze"):
        module(torch.randn(2, 24))


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_equals_peft(kind):
    peft = pytest.importorskip("peft")
    model, twin = tiny(kind), tiny(kind)
    add_lora(model, LoraConfig(r=4, alpha=6))
    randomise(model)
    theirs = peft.get_peft_model(
        twin,
        peft.LoraConfig(
            r=4, lora_alpha=6, target_modules="all-linear", fan_in_fan_out=kind == "gpt2"
        ),
    ).eval()
    names = {n for n, m in twin.named_modules() if hasattr(m, "lora_A")}
    assert names == {name for name, _ in lora_layers(model)}
    modules = dict(twin.named_modules())
    with torch.no_grad():
        for name, lora in lora_layers(model):
            modules[name].lora_A["default"].weight.copy_(lora.A["default"])
            modules[name].lora_B["default"].weight.copy_(lora.B["default"])
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    mine = gradients(model)
    logits = theirs(IDS).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for path, grad in mine.items():
        name, letter, _ = path.rsplit(".", 2)
        expected = getattr(modules[name], f"lora_{letter}")["default"].weight.grad
        assert (grad - expected).norm() <= 1e-5 * expected.norm() and expected.norm() > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapter_leaves_the_logits_alone(kind, dtype):
    model = tiny(kind).to(dtype)
    before = model(IDS).logits
    report = add_lora(model, LoraConfig(r=4))
    assert is_zero_adapter(model)
    assert torch.equal(model(IDS).logits, before)
    randomise(model)
    assert not is_zero_adapter(model)
    assert not torch.equal(model(IDS).logits, before)
    with adapters(model, None):
        assert torch.equal(model(IDS).logits, before)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in lora_parameters(model)}
    assert report.trainable == sum(p.numel() for _, p in lora_parameters(model))


def test_report():
    model = tiny()
    total = sum(p.numel() for p in model.parameters())
    report = add_lora(model, LoraConfig(r=2))
    per_layer = 2 * (32 + 32) * 2 + 2 * (32 + 16) * 2 + 3 * 2 * (32 + 48)
    assert len(report.adapted) == 14
    assert (report.trainable, report.total) == (2 * per_layer, total + 2 * per_layer)
    assert report.skipped == {"lm_head": "it is the output embedding"}
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert report.coverage == weights / (weights + 61 * 32)
    text = "\n".join(report.lines())
    assert "14 layers (down_proj, gate_proj" in text and "lm_head (it is the output" in text


def test_same_seed_same_adapter():
    one, two = tiny(), tiny()
    for model in (one, two):
        torch.manual_seed(11)
        add_lora(model, LoraConfig(init="gaussian", r=8))
    for (_, p), (_, q) in zip(lora_parameters(one), lora_parameters(two), strict=True):
        assert torch.equal(p, q)
    A = torch.cat([lora.A["default"].flatten() for _, lora in lora_layers(one)])
    assert 0.9 < A.std() * 8 < 1.1
    torch.manual_seed(11)
    add_lora(one, LoraConfig(r=8), "uniform")
    for _, lora in lora_layers(one):
        A, bound = lora.A["uniform"], 1 / math.sqrt(lora.A["uniform"].shape[1])
        assert 0.8 * bound < A.abs().max() <= bound


def test_gradient_checkpointing_changes_nothing():
    model = tiny()
    add_lora(model, LoraConfig(r=4, dropout=0.3))
    randomise(model)
    model.train()
    results = []
    for wrap in (False, True):
        if wrap:
            for block in model.model.layers:
                block.forward = _checkpointed(block.forward)
        torch.manual_seed(2)
        results.append(gradients(model))
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]) and grad.any()


def _checkpointed(forward):
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def test_float32_masters_move_where_bf16_would_not():
    model = tiny().to(torch.bfloat16)
    add_lora(model, LoraConfig(r=4))
    randomise(model)
    model.to(torch.bfloat16)  # also after the adapter is there
    parameters = [p for _, p in lora_parameters(model)]
    assert {p.dtype for p in parameters} == {torch.float32}
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-7, weight_decay=0.0)
    grads = gradients(model)
    optimizer.step()
    for p, old, grad in zip(parameters, before, grads.values(), strict=True):
        assert grad.dtype == torch.float32
        # A step is 1e-7; it is lost where the float32 grid is wider than twice that (|p| > 1).
        moved = (p != old) | (grad == 0) | (old.abs() > 1)
        assert moved.all() and (p != old).double().mean() > 0.99
        stuck = (p.to(torch.bfloat16) == old.to(torch.bfloat16)).double().mean()
        assert stuck > 0.9


def test_masters_survive_casts_bit_for_bit():
    model = tiny()
    add_lora(model, LoraConfig(r=4))
    before = {name: p.detach().clone() for name, p in lora_parameters(model)}
    for cast in (model.half, model.bfloat16, model.double, model.float):
        cast()
        for name, p in lora_parameters(model):
            assert p.dtype == torch.float32 and torch.equal(p, before[name])
    assert model.model.norm.weight.dtype == torch.float32


# ---- switching and copying -----------------------------------------------------------------------


def test_adapters_nest_and_restore():
    model = tiny()
    add_lora(model, LoraConfig(r=4, targets=["q_proj", "v_proj"]))
    add_lora(model, LoraConfig(r=2, alpha=8, targets=["q_proj", "up_proj"]), "second")
    assert adapter_names(model) == ["default", "second"]
    randomise(model)
    randomise(model, "second", seed=4)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def logits(name):
        with adapters(model, name):
            return model(IDS).logits

    by_name = {name: logits(name) for name in (None, "default", "second")}
    assert len({t.sum().item() for t in by_name.values()}) == 3
    assert torch.equal(model(IDS).logits, by_name["default"])  # the first stays the active one
    with adapters(model, "second"):
        with adapters(model, None):
            with adapters(model, "default"):
                assert torch.equal(model(IDS).logits, by_name["default"])
            assert torch.equal(model(IDS).logits, by_name[None])
        assert torch.equal(model(IDS).logits, by_name["second"])
        with pytest.raises(RuntimeError, match="inside"), adapters(model, None):
            raise RuntimeError("inside")
        assert torch.equal(model(IDS).logits, by_name["second"])
    assert torch.equal(model(IDS).logits, by_name["default"])
    with pytest.raises(InputError, match=r'no adapter "other"; it has: default, second'):
        logits("other")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert flags["model.layers.0.self_attn.q_proj.A.second"]


def test_adapters_without_lora():
    model = tiny()
    with adapters(model, None):
        assert not has_adapter(model)
    with pytest.raises(InputError, match="it has: none"), adapters(model, "default"):
        pass


def test_copy_is_frozen_and_independent():
    model = tiny()
    add_lora(model, LoraConfig(r=4, dropout=0.5))
    randomise(model)
    start = model(IDS).logits.detach()
    copy_adapter(model, "default", "reference")
    assert not any(p.requires_grad for _, p in lora_parameters(model, "reference"))
    assert torch.equal(model(IDS).logits, start)  # the policy is still the active one
    randomise(model, seed=9)
    model.train()
    with adapters(model, "reference"):
        assert torch.equal(model(IDS).logits, start)  # without the policy's dropout
    assert not torch.equal(model(IDS).logits, start)
    with pytest.raises(InputError, match="already"):
        copy_adapter(model, "default", "reference")
    with pytest.raises(InputError, match="no adapter"):
        copy_adapter(model, "nothing", "elsewhere")


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "2nd", "a b"])
def test_bad_names(name):
    with pytest.raises(InputError, match="cannot name an adapter"):
        add_lora(tiny(), LoraConfig(), name)


# ---- targets -------------------------------------------------------------------------------------


def test_targets_as_regex_and_full_names():
    model = tiny()
    report = add_lora(model, LoraConfig(targets=r"model\.layers\.1\.(self_attn|mlp)(\.[qd].*)?"))
    ones = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert sorted(report.adapted) == sorted(ones)
    assert report.skipped.keys() == {"model.layers.1.self_attn", "model.layers.1.mlp"}
    assert (
        report.skipped["model.layers.1.mlp"] == "a module of class LlamaMLP is not a linear layer"
    )
    model = tiny()
    report = add_lora(model, LoraConfig(targets=["layers.0.mlp.up_proj", "lm_head"]))
    assert report.adapted == ["model.layers.0.mlp.up_proj", "lm_head"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "q_porj"], 'LoRA target "q_porj" matches no module; did you mean "q_proj"?'),
        (["xyz"], "linear layers are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj"),
        (["proj"], 'LoRA target "proj" matches no module'),
        (r".*\.qkv", "matches no linear layer"),
        (["self_attn"], "matches no linear layer"),
        (
            ["embed_tokens"],
            "cannot adapt model.embed_tokens: it shares its weight with lm_head",
        ),
        (["lm_head"], "cannot adapt lm_head: it shares its weight with model.embed_tokens"),
        (".*norm", "a module of class LlamaRMSNorm is not a linear layer"),
    ],
)
def test_bad_targets_change_nothing(targets, message):
    model = tiny(tied=True)
    with pytest.raises(InputError, match=re.escape(message)):
        add_lora(model, LoraConfig(targets=targets))
    assert not has_adapter(model)
    assert all(p.requires_grad for p in model.parameters())


def test_all_linear_skips_what_is_shared():
    model = nn.Module()
    model.a, model.b, model.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    model.b.weight = model.a.weight
    report = add_lora(model, LoraConfig())
    assert report.adapted == ["c"]
    assert report.skipped["a"] == "it shares its weight with b"
    with pytest.raises(InputError, match="matches no linear layer"):
        add_lora(nn.Sequential(nn.ReLU()), LoraConfig())
