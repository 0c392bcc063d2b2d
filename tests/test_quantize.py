"""prefopt.nn.quantize.quantize_model: which layers, what the report says, and no half work."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from prefopt.errors import InputError
from prefopt.nn.linear import use_onednn
from prefopt.nn.lora import LoraConfig, add_lora
from prefopt.nn.nf4 import dequantize_nf4, quantize_nf4
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.nn.quantize import quantize_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    config = transformers.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_the_report(dense):
    model = loaded(dense)
    before = {
        name: m.weight.detach().clone() for name, m in model.named_modules() if type(m) is nn.Linear
    }
    report = quantize_model(model)
    assert not any(module.training for module in model.modules())  # as it was
    assert [layer.name for layer in report.layers] == [n for n in before if n != "lm_head"]
    for layer in report.layers:
        w = before[layer.name].double()
        p = quantize_nf4(before[layer.name])
        error = (dequantize_nf4(p).double() - w).norm() / w.norm()
        assert layer.error == pytest.approx(error.item(), rel=1e-6) and layer.double
        assert layer.parameters == w.numel()
        held = model.get_submodule(layer.name)
        assert layer.bytes == held.weight.nbytes + held.scales.nbytes + held.nested.nbytes
    state = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}
    # The frequencies of the positions are a buffer that is not saved.
    assert report.after == sum(state.values()) + 2 * 8 * 4
    assert report.before > 4 * report.after / 3 and report.skipped == {
        "lm_head": "the output embedding"
    }
    assert report.bytes_per_parameter == pytest.approx(0.5 + 1 / 64 + 8 * 14 / 73728, abs=1e-3)
    lines = report.lines()
    assert lines[0].startswith("14 linear layers, 73,728 weights, in nf4: 0.51")
    worst = max(report.layers, key=lambda layer: layer.error)
    assert f"{worst.error:.4f} at worst ({worst.name})" in lines[2]
    assert lines[3:] == ["left as it is: lm_head: the output embedding"]


def test_options_reach_the_weights(dense):
    model = loaded(dense)
    report = quantize_model(model, kind="fp4", double=False, search="signed")
    layer = model.model.layers[0].mlp.up_proj
    want = quantize_nf4(
        loaded(dense).model.layers[0].mlp.up_proj.weight, kind="fp4", double=False, search="signed"
    )
    assert torch.equal(layer.packed().codes, want.codes) and layer.kind == "fp4"
    assert "in fp4: 0.5625 bytes" in report.lines()[0] and not report.fallbacks


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (("lm_head", "down_proj"), {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}),
        (("lm_head", "layers.1"), {f"model.layers.1.{n}" for n in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}),
        ("lm_head", set()),
        (("lm_head", "model.layers.0.self_attn.q_proj"), {"model.layers.0.self_attn.q_proj"}),
    ],
)  # fmt: skip
def test_skip(skip, kept, dense):
    model = loaded(dense)
    report = quantize_model(model, skip=skip)
    plain = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    assert plain == kept | {"lm_head"} == report.skipped.keys()


def test_the_head_too_if_it_is_not_skipped(dense):
    model = loaded(dense)
    report = quantize_model(model, skip=())
    assert isinstance(model.lm_head, NF4Linear) and not report.skipped


class Strange(nn.Module):
    """A head by another name, a layer tied to an embedding, a subclass, experts, a Conv1D."""

    def __init__(self):
        super().__init__()
        self.embed, self.tied = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
        self.tied.weight = self.embed.weight
        self.good, self.embed_out = nn.Linear(64, 64), nn.Linear(64, 96)
        self.sub = nn.modules.linear.NonDynamicallyQuantizableLinear(64, 64)
        self.conv1d = transformers.pytorch_utils.Conv1D(64, 64)
        self.conv, self.experts = nn.Conv1d(4, 4, 3), nn.Module()
        self.experts.w = nn.Parameter(torch.zeros(2, 4, 4))

    def get_output_embeddings(self):
        return self.embed_out


def test_what_is_left_alone_and_why():
    model = Strange()
    report = quantize_model(model)
    assert [layer.name for layer in report.layers] == ["good"]
    assert {name: reason.split(",")[0] for name, reason in report.skipped.items()} == {
        "tied": "tied to embed.weight",
        "embed_out": "the output embedding",
        "sub": "a NonDynamicallyQuantizableLinear",
        "conv1d": "a Conv1D",
        "experts": "a 3-D weight (experts in one tensor)",
    }
    assert any(line.startswith("left as it is: experts: a 3-D weight") for line in report.lines())


def test_fallback_to_plain_scales_is_reported():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[4:] *= 1e-4
    report = quantize_model(model)
    assert report.fallbacks == ["1"] and model[1].nested is None
    assert "float32 scales, as 8-bit ones would hurt: 1" in report.lines()


def test_a_layer_of_zeros():
    model = nn.Sequential(nn.Linear(64, 64))
    nn.init.zeros_(model[0].weight)
    assert quantize_model(model).layers[0].error == 0


def bad_value(value):
    def change(model):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[3, 5:7] = value

    return change


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (bad_value(float("nan")), {}, r"layers\.1\.mlp\.down_proj\.weight has 2 NaN or infinite"),
        (bad_value(float("-inf")), {}, r"layers\.1\.mlp\.down_proj\.weight has 2 NaN or infinite"),
        (lambda m: None, {"kind": "nf3"}, "kind is 'nf3'"),
        (lambda m: None, {"search": "both"}, "search is 'both'"),
        (lambda m: None, {"skip": ("lm_head", "w1")}, 'skip has "w1", which is no module'),
        (lambda m: add_lora(m, LoraConfig(r=2)), {}, "has an adapter; quantise the base model"),
        (quantize_model, {}, r"is quantised already \(NF4Linear\)"),
    ],
)
def test_errors_change_nothing(change, arguments, words, dense):
    model = loaded(dense)
    change(model)
    before = {name: id(m) for name, m in model.named_modules()}
    with pytest.raises(InputError, match=words):
        quantize_model(model, **arguments)
    assert before == {name: id(m) for name, m in model.named_modules()}


def test_nothing_to_quantise():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=96)
    with pytest.raises(InputError, match=r"no linear layer .*c_attn: a Conv1D, whose weight"):
        quantize_model(transformers.GPT2LMHeadModel(config))
    with pytest.raises(InputError, match="none at all"):
        quantize_model(nn.Embedding(3, 3))


def test_layers_that_a_policy_has_changed_are_linear_all_the_same(dense):
    """Those that compute through oneDNN."""
    plain, changed = loaded(dense), loaded(dense)
    use_onednn(changed)
    assert quantize_model(changed).layers == quantize_model(plain).layers
