"""Adapted embeddings, modules trained in full, PiSSA, patterns and LoRA+, with peft beside them."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefopt.errors import InputError
from prefopt.nn import pissa
from prefopt.nn.lora import (
    LoraConfig,
    LoraEmbedding,
    SavedModule,
    adapted_modules,
    adapter_names,
    adapters,
    add_lora,
    copy_adapter,
    has_adapter,
    is_zero_adapter,
    lora_layers,
    lora_parameters,
    lora_plus_groups,
    unload_lora,
)
from prefopt.nn.nf4_linear import NF4Linear

IDS = torch.arange(24).reshape(2, 12) % 61


def tiny(kind: str = "llama", *, tied: bool = False, hidden: int = 32) -> nn.Module:
    """A tiny random model, always the same: Llama, or Gemma 3 (embeddings times sqrt(hidden))."""
    import transformers

    torch.manual_seed(7)
    sizes = {
        "vocab_size": 61, "hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "gemma3":
        config = transformers.Gemma3TextConfig(head_dim=8, sliding_window=16, **sizes)
    else:
        config = transformers.LlamaConfig(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def randomise(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    """Moves all that the adapter trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in lora_parameters(model, name):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def loss(model: nn.Module) -> Tensor:
    logits = model(IDS).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ---- embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_an_embedding_starts_as_the_base(kind, dtype):
    model = tiny(kind).to(dtype)
    before = logits(model)
    report = add_lora(model, LoraConfig(r=4, alpha=6, targets=["embed_tokens", "v_proj"]))
    assert report.adapted[0] == "model.embed_tokens" and 0 < report.coverage < 1
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, LoraEmbedding)
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (61, 32, 0)
    assert embedding.B["default"].std() > 0.8 and not embedding.A["default"].any()
    assert is_zero_adapter(model) and torch.equal(logits(model), before)
    with torch.no_grad():
        embedding.A["default"].normal_()
    assert not is_zero_adapter(model) and not torch.equal(logits(model), before)
    trained = logits(model)
    copy_adapter(model, "default", "reference")
    randomise(model)
    with adapters(model, None):
        assert torch.equal(logits(model), before)
    with adapters(model, "reference"):
        assert torch.equal(logits(model), trained)
    assert {p.dtype for _, p in lora_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_an_embedding_equals_peft(kind):
    peft = pytest.importorskip("peft")
    model, twin = tiny(kind), tiny(kind)
    targets = ["embed_tokens", "v_proj"]
    add_lora(model, LoraConfig(r=4, alpha=6, targets=targets))
    randomise(model)
    theirs = peft.get_peft_model(
        twin, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    ).eval()
    own, inner = model.get_input_embeddings(), dict(twin.named_modules())
    with torch.no_grad():
        for part in ("A", "B"):
            group = getattr(inner["model.embed_tokens"], f"lora_embedding_{part}")
            group["default"].copy_(getattr(own, part)["default"])
            for path, layer in lora_layers(model):
                weight = getattr(inner[path], f"lora_{part}")["default"].weight
                weight.copy_(getattr(layer, part)["default"])
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=2e-6)
    loss(model).backward()
    loss(theirs).backward()
    for part in ("A", "B"):
        mine = getattr(own, part)["default"].grad
        expected = getattr(inner["model.embed_tokens"], f"lora_embedding_{part}")["default"].grad
        assert (mine - expected).norm() <= 1e-5 * expected.norm() > 0
        if part == "A":
            assert not mine[:, 0].any()  # padding


def test_embedding_delta_is_the_definition():
    base = nn.Embedding(11, 6, padding_idx=2).requires_grad_(False)
    module = LoraEmbedding(base, "default")
    module.add("default", LoraConfig(r=3, alpha=4, use_rslora=True))
    with torch.no_grad():
        module.A["default"].normal_()
    ids = torch.arange(11).view(1, 11)
    W = base.weight + 4 / 3**0.5 * (module.B["default"] @ module.A["default"]).t()
    torch.testing.assert_close(module(ids)[0], W, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module.merged_weight("default"), W, rtol=1e-6, atol=1e-6)


class Odd(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        (nn.Embedding(9, 4, max_norm=1.0), "it shrinks its own rows"),
        (Odd(9, 4), "how a module of class Odd computes is not known"),
    ],
)
def test_embeddings_that_cannot_be(embedding, reason):
    model = nn.ModuleDict({"words": embedding, "q": nn.Linear(4, 4)})
    with pytest.raises(InputError, match=f"cannot adapt words: {reason}"):
        add_lora(model, LoraConfig(targets=["words", "q"]))


# ---- modules_to_save -----------------------------------------------------------------------------

SAVED = ["lm_head", "model.norm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_modules_start_as_the_base_and_move(dtype):
    model = tiny().to(dtype)
    before = logits(model)
    report = add_lora(model, LoraConfig(r=4, modules_to_save=SAVED))
    assert report.saved == ["model.norm", "lm_head"]  # in the order of the model
    assert report.skipped == {"lm_head": "it is in lora.modules_to_save"}
    assert "trained in full: model.norm, lm_head" in report.lines()
    head = model.get_output_embeddings()
    assert isinstance(head, SavedModule) and head.weight.dtype == dtype
    assert is_zero_adapter(model) and torch.equal(logits(model), before)
    assert not any(p.requires_grad for p in head.base.parameters())
    names = dict(lora_parameters(model))
    assert {"lm_head.copies.default.weight", "model.norm.copies.default.weight"} < names.keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names.keys()
    loss(model).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in names.values())
    assert names["lm_head.copies.default.weight"].grad.any()
    optimizer = torch.optim.SGD(names.values(), lr=1e-3)
    old = head.copies["default"].weight.detach().clone()
    optimizer.step()
    assert (head.copies["default"].weight != old).any()
    randomise(model)
    assert not is_zero_adapter(model)
    trained = logits(model)
    assert torch.equal(head.weight, head.copies["default"].weight.to(dtype))
    with adapters(model, None):
        assert torch.equal(logits(model), before) and torch.equal(head.weight, head.base.weight)
    copy_adapter(model, "default", "reference")
    randomise(model, seed=5)
    with adapters(model, "reference"):
        assert torch.equal(logits(model), trained)
    assert not any(p.requires_grad for _, p in lora_parameters(model, "reference"))
    masters = {name: p.detach().clone() for name, p in lora_parameters(model)}
    model.half().bfloat16()
    for name, p in lora_parameters(model):
        assert p.dtype == torch.float32 and torch.equal(p, masters[name])


def test_saved_modules_equal_peft():
    peft = pytest.importorskip("peft")
    model, twin = tiny(), tiny()
    add_lora(model, LoraConfig(r=4, targets=["q_proj"], modules_to_save=SAVED))
    randomise(model)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], modules_to_save=SAVED)
    theirs = peft.get_peft_model(twin, config).eval()
    inner = dict(twin.named_modules())
    pairs = []
    for path, module in adapted_modules(model):
        for part, p in module.parts("default").items():
            where = "modules_to_save.default" if isinstance(module, SavedModule) else ""
            where = where or f"lora_{part}.default"
            pairs.append((p, inner[f"{path}.{where}"].weight))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-6, atol=1e-6)
    loss(model).backward()
    loss(theirs).backward()
    for mine, other in pairs:
        assert (mine.grad - other.grad).norm() <= 1e-6 * other.grad.norm() > 0


def test_a_whole_block_and_a_bias():
    model = tiny()
    add_lora(model, LoraConfig(targets=["q_proj"], modules_to_save=["layers.1.mlp"]))
    block = dict(adapted_modules(model))["model.layers.1.mlp"]
    assert list(block.parts("default")) == [f"{x}_proj.weight" for x in ("gate", "up", "down")]
    before = logits(model)
    with torch.no_grad():
        block.copies["default"].up_proj.weight.mul_(2)
    assert not torch.equal(logits(model), before)
    unload_lora(model)
    assert torch.equal(logits(model), before)
    assert model.state_dict().keys() == tiny().state_dict().keys()


@pytest.mark.parametrize(
    ("config", "tied", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, True, "lm_head cannot be trained in full: it shares its "
         "weight with model.embed_tokens"),
        ({"modules_to_save": ["lm_haed"]}, False, '"lm_haed" matches no module; did you mean "lm'),
        ({"modules_to_save": ["mlp", "up_proj"]}, False, "it lies in another one of them"),
        ({"modules_to_save": ["rotary_emb"]}, False, "LlamaRotaryEmbedding has no weights"),
        ({"targets": ["lm_head"]}, True, "cannot adapt lm_head: it shares its weight with model"),
        ({"targets": ["embed_tokens"]}, True, "cannot adapt model.embed_tokens: it shares its"),
        ({"exclude": ["qproj"]}, False, 'lora.exclude "qproj" keeps no target out; did you mean'),
        ({"exclude": ["norm"]}, False, 'lora.exclude "norm" keeps no target out'),
        ({"exclude": r".*\.w"}, False, r'lora.exclude ".*\.w" keeps no target out'),
        ({"exclude": ".*"}, False, "lora.targets 'all-linear' matches no linear layer"),
        ({"rank_pattern": {"qproj": 2}}, False, 'lora.rank_pattern "qproj" matches no adapted '
         'layer; did you mean "q_proj"?'),
        ({"alpha_pattern": {"lm_head": 2}}, False, 'lora.alpha_pattern "lm_head" matches no ad'),
        ({"alpha_pattern": {"proj": 2}}, False, 'lora.alpha_pattern "proj" matches no a'),
        ({"init": "pissa", "r": 17}, False, "at most 16 singular values of model.layers.0."
         "self_attn.k_proj, and its rank is 17"),
    ],
)  # fmt: skip
def test_bad_settings_change_nothing(config, tied, message):
    model = tiny(tied=tied)
    with pytest.raises(InputError, match=re.escape(message)):
        add_lora(model, LoraConfig(**config))
    assert not has_adapter(model) and all(p.requires_grad for p in model.parameters())


def test_what_another_adapter_holds_is_refused():
    model = tiny()
    add_lora(model, LoraConfig(targets=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(InputError, match="lm_head: another adapter trains it in full"):
        add_lora(model, LoraConfig(targets=["lm_head"]), "second")
    with pytest.raises(InputError, match=r"q_proj cannot be .* an adapter is on it already"):
        add_lora(model, LoraConfig(targets=["v_proj"], modules_to_save=["q_proj"]), "second")
    with pytest.raises(InputError, match=r"self_attn cannot be .* an adapter is on it already"):
        add_lora(model, LoraConfig(targets=["up_proj"], modules_to_save=["self_attn"]), "second")
    add_lora(model, LoraConfig(targets=["v_proj"], modules_to_save=["lm_head"]), "second")
    assert adapter_names(model) == ["default", "second"]
    before = logits(model)
    randomise(model, "second")
    assert torch.equal(logits(model), before)
    quantised = tiny(hidden=64)
    quantised.lm_head = NF4Linear.from_linear(quantised.lm_head)
    with pytest.raises(InputError, match=r"lm_head cannot be .* its weights are quantised"):
        add_lora(quantised, LoraConfig(modules_to_save=["lm_head"]))


# ---- patterns, exclude, LoRA+ --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_patterns_are_pefts():
    peft = pytest.importorskip("peft")
    patterns = {
        "rank_pattern": {"layers.0.*q_proj": 2, "q_proj": 3, ".*mlp.up_proj": 5, "model.x": 7},
        "alpha_pattern": {"proj": 9, r"[vk]_proj": 32, "model.layers.1.mlp.down_proj": 1.5},
    }
    theirs = peft.get_peft_model(
        tiny(),
        peft.LoraConfig(
            r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear",
            exclude_modules=["o_proj", "0.mlp.gate_proj"], **patterns,
        ),
    )  # fmt: skip
    del patterns["rank_pattern"]["model.x"], patterns["alpha_pattern"]["proj"]  # they match nothing
    model = tiny()
    config = LoraConfig(
        r=4, alpha=6, use_rslora=True, exclude=["o_proj", "0.mlp.gate_proj"], **patterns
    )
    report = add_lora(model, config)
    excluded = [name for name, why in report.skipped.items() if why == "it is in lora.exclude"]
    assert len(excluded) == 3
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert layers.keys() == set(report.adapted)
    for path, layer in lora_layers(model):
        assert layer.A["default"].shape == layers[path].lora_A["default"].weight.shape, path
        assert layer.scaling["default"] == layers[path].scaling["default"], path
    ranks = {layer.A["default"].shape[0] for _, layer in lora_layers(model)}
    assert ranks == {2, 3, 4, 5}


def test_exclude_as_a_regular_expression():
    report = add_lora(tiny(), LoraConfig(exclude=r".*layers\.0\..*"))
    assert len(report.adapted) == 7 and all(".layers.1." in name for name in report.adapted)


def test_lora_plus_groups():
    model = tiny()
    config = LoraConfig(
        use_dora=True, targets=["q_proj", "up_proj"], modules_to_save=["lm_head", "embed_tokens"]
    )
    add_lora(model, config)
    slow, fast = lora_plus_groups(model, "default", 1e-4, 16)
    assert (slow["lr"], fast["lr"]) == (1e-4, 16e-4)
    names = {id(p): name for name, p in lora_parameters(model)}
    order = list(names.values())
    assert [names[id(p)] for p in fast["params"]] == [n for n in order if ".B." in n]
    assert [names[id(p)] for p in slow["params"]] == [n for n in order if ".B." not in n]
    assert len(order) == 2 * 2 * 3 + 2
    torch.optim.AdamW([slow, fast])  # what an optimizer takes
    copy_adapter(model, "default", "reference")
    assert lora_plus_groups(model, "reference", 1e-4, 16) == []
    embedded = tiny()
    add_lora(embedded, LoraConfig(targets=["embed_tokens"]))
    assert len(lora_plus_groups(embedded, "default", 1e-4, 16)) == 1  # no linear layer, no B


# ---- PiSSA ---------------------------------------------------------------------------------------


def test_principal_is_the_best_approximation():
    torch.manual_seed(0)
    W = torch.randn(20, 13)
    A, B = pissa.principal(W, 4, 1.5)
    U, S, Vh = torch.linalg.svd(W.double())
    best = U[:, :4] * S[:4] @ Vh[:4]
    torch.testing.assert_close(1.5 * (B @ A).double(), best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))  # halved evenly
    flipped = pissa.principal(W, 4, 1.5)
    assert torch.equal(A, flipped[0]) and A.is_contiguous() and B.is_contiguous()
    assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_pissa_starts_as_the_base_with_the_adapter_on_and_off(dtype, use_dora, quantised):
    model = tiny(hidden=64).to(dtype)
    if quantised:
        model.model.layers[0].self_attn.q_proj = NF4Linear.from_linear(
            model.model.layers[0].self_attn.q_proj
        )
    state = {name: t.clone() for name, t in model.state_dict().items()}
    before = logits(model)
    add_lora(model, LoraConfig(r=8, alpha=4, init="pissa", use_dora=use_dora))
    assert is_zero_adapter(model)
    assert torch.equal(logits(model), before)
    randomise(model)
    assert not is_zero_adapter(model) and not torch.equal(logits(model), before)
    trained = logits(model)
    copy_adapter(model, "default", "reference")
    randomise(model, seed=8)
    with adapters(model, "reference"):
        assert torch.equal(logits(model), trained)
    with adapters(model, None):
        assert torch.equal(logits(model), before)
    unload_lora(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_pissa_trains_what_peft_trains():
    """The residual base of the paper and the difference on the whole base are one function."""
    peft = pytest.importorskip("peft")
    model, twin = tiny(), tiny()
    add_lora(model, LoraConfig(r=4, alpha=6, init="pissa", targets=["q_proj", "down_proj"]))
    theirs = peft.get_peft_model(
        twin,
        peft.LoraConfig(
            r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"]
        ),
    ).eval()
    inner = dict(twin.named_modules())
    for path, layer in lora_layers(model):
        weights = [getattr(inner[path], f"lora_{part}")["default"].weight for part in "AB"]
        product, same = weights[1] @ weights[0], layer.B["default"] @ layer.A["default"]
        torch.testing.assert_close(product, same, rtol=1e-4, atol=1e-5)
        with torch.no_grad():  # the signs of singular vectors are free
            for part, weight in zip("AB", weights, strict=True):
                weight.copy_(getattr(layer, part)["default"])
                step = torch.randn_like(weight) * 0.1
                weight.add_(step)
                getattr(layer, part)["default"].add_(step)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=2e-6)
    loss(model).backward()
    loss(theirs).backward()
    for path, layer in lora_layers(model):
        for part, p in layer.parts("default").items():
            expected = getattr(inner[path], f"lora_{part}")["default"].weight.grad
            assert (p.grad - expected).norm() <= 1e-4 * expected.norm() > 0


@pytest.mark.parametrize("first", [True, False])
def test_an_error_on_the_way_leaves_the_model_as_it_was(first):
    model = tiny()
    if not first:
        add_lora(model, LoraConfig(r=4, modules_to_save=["lm_head"]), "first")
    names = [name for name, _ in model.named_parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    with torch.no_grad():
        down.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj is not finite"):
        add_lora(model, LoraConfig(r=4, init="pissa", modules_to_save=["lm_head"]))
    assert [name for name, _ in model.named_parameters()] == names
    assert [p.requires_grad for p in model.parameters()] == flags
    assert adapter_names(model) == ([] if first else ["first"])


# ---- all kinds together --------------------------------------------------------------------------


def everything(dtype=torch.float32) -> nn.Module:
    """A 4-bit base with DoRA, an adapted embedding left out, a head and norms trained in full."""
    model = tiny(hidden=64).to(dtype)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, NF4Linear.from_linear(module))
    add_lora(
        model, LoraConfig(r=4, use_dora=True, init="pissa", modules_to_save=["lm_head", "norm"])
    )
    return model


def test_a_deepcopy_is_independent():
    model = everything()
    randomise(model)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    randomise(twin, seed=9)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)


def checkpointed(forward):
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def test_gradient_checkpointing_changes_nothing():
    model = everything()
    randomise(model)
    model.train()
    results = []
    for on in (False, True):
        if on:
            for block in model.model.layers:
                block.forward = checkpointed(block.forward)
        model.zero_grad()
        loss(model).backward()
        results.append({name: p.grad.clone() for name, p in lora_parameters(model)})
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]) and grad.any(), name


def test_a_4_bit_model_reports_its_dense_size():
    dense, small = tiny(hidden=64), everything()
    report = add_lora(small, LoraConfig(r=4, exclude=["k_proj"]), "second")
    plain = add_lora(dense, LoraConfig(r=4, exclude=["k_proj"]))
    own = sum(p.numel() for n, p in small.named_parameters() if "default" in n)
    assert report.total - own == plain.total
    assert report.coverage == plain.coverage


def test_states_of_the_adapters_are_restored():
    model = everything()
    randomise(model)
    now = logits(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), adapters(model, None):
        with adapters(model, "default"):
            assert torch.equal(logits(model), now)
        assert not torch.equal(logits(model), now)
        raise RuntimeError("inside")
    assert torch.equal(logits(model), now)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
