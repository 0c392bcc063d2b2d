"""Adapter folders: what peft reads of ours, what we read of peft's, and what is refused."""

import json
import os
import re
import stat

import pytest
import safetensors.torch
import torch

from prefopt.errors import InputError
from prefopt.nn.lora import (
    LoraConfig,
    adapter_names,
    adapters,
    add_lora,
    has_adapter,
    lora_layers,
    lora_parameters,
)
from prefopt.nn.peft_format import CONFIG, TENSORS, load_adapter, save_adapter

IDS = torch.arange(24).reshape(2, 12) % 61
KINDS = ["llama", "gpt2", "qwen2"]
LEAVES = {
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}
LEAVES["qwen2"] = LEAVES["llama"]


def tiny(kind: str = "llama"):
    """A tiny random model, always the same: Llama, Qwen2 (biases on q, k, v) or GPT-2 (Conv1D)."""
    import transformers

    torch.manual_seed(7)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids
        )
    else:
        name = {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}[kind]
        config = getattr(transformers, name)(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, **ids,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def adapted(kind: str = "llama", **config):
    """The tiny model with an adapter whose A and B are both random."""
    model = tiny(kind)
    add_lora(model, LoraConfig(**{"r": 4, "alpha": 6, **config}))
    torch.manual_seed(3)
    with torch.no_grad():
        for _, p in lora_parameters(model):
            p.normal_(std=0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def edit(folder, **changes):
    """Rewrites adapter_config.json with these keys changed."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / TENSORS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / TENSORS)


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter for tiny()."""
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- against peft --------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"use_rslora": True},
    {"alpha": 2.5},
    {"init": "gaussian"},
    {"targets": ["lm_head", "0.mlp.c_fc", "0.mlp.up_proj"]},
    {"targets": r".*\.1\..*(c_proj|[qv]_proj)"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but")  # GPT-2 with its lm_head
def test_peft_reads_ours(kind, variant, tmp_path):
    peft = pytest.importorskip("peft")
    if isinstance(targets := variant.get("targets"), list):
        there = [name for name, _ in tiny(kind).named_modules()]
        variant = {"targets": [t for t in targets if any(f".{n}".endswith(t) for n in there)]}
    model = adapted(kind, **variant)
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path="tiny/base")
    theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "adapter").eval()
    assert (logits(theirs) - logits(tiny(kind))).abs().max() > 0.05
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    result = theirs.load_adapter(str(tmp_path / "adapter"), "again")
    assert not [key for key in result.missing_keys if "lora" in key]
    assert result.unexpected_keys == []
    # exactly the same modules are adapted, with float32 tensors
    names = {name for name, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert names == {name for name, _ in lora_layers(model)}
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / TENSORS)
    theirs_keys = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False).keys()
    assert tensors.keys() == theirs_keys
    assert {t.dtype for t in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "list", "regex"])
def test_we_read_pefts(kind, rslora, targets, tmp_path):
    peft = pytest.importorskip("peft")
    by_kind = {"list": [*LEAVES[kind][:2], "not_there"], "regex": rf".*\.1\..*{LEAVES[kind][0]}"}
    config = peft.LoraConfig(
        r=5, lora_alpha=9, use_rslora=rslora, task_type="CAUSAL_LM", init_lora_weights=False,
        target_modules=by_kind.get(targets, targets), fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    torch.manual_seed(4)
    theirs = peft.get_peft_model(tiny(kind), config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny(kind)
    assert load_adapter(model, tmp_path) == []
    assert (logits(theirs) - logits(tiny(kind))).abs().max() > 0.005
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for _, p in lora_parameters(model))
    # and back: the tensors that peft wrote
    save_adapter(model, tmp_path / "back")
    one = safetensors.torch.load_file(tmp_path / TENSORS)
    two = safetensors.torch.load_file(tmp_path / "back" / TENSORS)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("kind", KINDS)
def test_config_says_what_peft_would(kind, tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(adapted(kind, r=5, alpha=9, dropout=0.1), tmp_path / "ours")
    config = peft.LoraConfig(
        r=5, lora_alpha=9, lora_dropout=0.1, task_type="CAUSAL_LM", target_modules=LEAVES[kind],
        fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    peft.get_peft_model(tiny(kind), config).save_pretrained(tmp_path / "theirs")
    ours = json.loads((tmp_path / "ours" / CONFIG).read_text())
    theirs = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])
    for key in ours.keys() - {"target_modules"}:
        assert (key, ours[key]) == (key, theirs[key])
    assert {"r", "lora_alpha", "target_modules", "bias", "use_dora", "modules_to_save"} <= {*ours}


# ---- files ---------------------------------------------------------------------------------------


def test_files(tmp_path):
    model = adapted()
    umask = os.umask(0o027)
    try:
        save_adapter(model, tmp_path / "new" / "adapter")
    finally:
        os.umask(umask)
    folder = tmp_path / "new" / "adapter"
    assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
    assert os.listdir(tmp_path / "new") == ["adapter"]
    for name in (CONFIG, TENSORS):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o640
    with safetensors.safe_open(folder / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        assert key in file.keys() and not any(".base." in k for k in file.keys())


def test_round_trip_gives_the_same_files(saved, tmp_path):
    model = tiny()
    load_adapter(model, saved)
    assert torch.equal(logits(model), logits(adapted()))
    save_adapter(model, tmp_path / "again")
    for name in (CONFIG, TENSORS):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_existing_folder_keeps_its_other_files(saved):
    (saved / "tokenizer.json").write_text("{}")
    model = tiny()
    load_adapter(model, saved)
    with torch.no_grad():
        for _, p in lora_parameters(model):
            p.mul_(2)
    save_adapter(model, saved)  # over the very file that was just read
    assert sorted(os.listdir(saved)) == [CONFIG, TENSORS, "tokenizer.json"]
    again = tiny()
    load_adapter(again, saved)
    assert torch.equal(logits(again), logits(model))


def test_a_save_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("prefopt.nn.peft_format.save_tensors", full)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(adapted(), tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


def test_save_refuses(tmp_path):
    with pytest.raises(InputError, match='no adapter "default"; it has: none'):
        save_adapter(tiny(), tmp_path / "adapter")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        save_adapter(adapted(), tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_layers_that_share_a_last_name_are_told_apart(tmp_path):
    model = adapted(targets=["layers.0.mlp.up_proj", "layers.1.mlp.down_proj"])
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["target_modules"] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    again = tiny()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


# ---- loading -------------------------------------------------------------------------------------


def test_a_second_adapter_frozen_and_inactive(saved):
    model = tiny()
    add_lora(model, LoraConfig(r=2, targets=["q_proj"]))
    base = logits(model)
    load_adapter(model, saved, "reference", trainable=False)
    assert adapter_names(model) == ["default", "reference"]
    assert not any(p.requires_grad for _, p in lora_parameters(model, "reference"))
    assert all(p.requires_grad for _, p in lora_parameters(model, "default"))
    assert torch.equal(logits(model), base)
    with adapters(model, "reference"):
        assert torch.equal(logits(model), logits(adapted()))


def test_loading_into_an_adapter_that_is_there(saved):
    model = tiny()
    add_lora(model, LoraConfig(r=4, alpha=6))
    load_adapter(model, saved)
    assert torch.equal(logits(model), logits(adapted()))
    other = tiny()
    add_lora(other, LoraConfig(r=4, alpha=8))
    with pytest.raises(InputError, match=r"rank 4 and scale 1.5, the adapter .* 4 and 2"):
        load_adapter(other, saved)


def test_half_precision_files_become_float32_masters(saved):
    def halve(tensors):
        for key in tensors:
            tensors[key] = tensors[key].bfloat16()

    edit_tensors(saved, halve)
    model = tiny().to(torch.bfloat16)
    load_adapter(model, saved)
    exact = dict(lora_parameters(adapted()))
    for name, p in lora_parameters(model):
        assert p.dtype == torch.float32
        assert torch.equal(p, exact[name].bfloat16().float())


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


def test_missing_and_surplus_tensors(saved):
    def change(tensors):
        tensors["base_model.model.model.extra.lora_A.weight"] = tensors.pop(KEY)

    edit_tensors(saved, change)
    model = tiny()
    expected = [
        f"{KEY} is missing",
        "base_model.model.model.extra.lora_A.weight is not in the model",
    ]
    with pytest.raises(InputError, match=re.escape("; ".join(expected))):
        load_adapter(model, saved)
    assert not has_adapter(model) and all(p.requires_grad for p in model.parameters())
    assert load_adapter(model, saved, strict=False) == expected
    layer = dict(lora_layers(model))["model.layers.1.mlp.up_proj"]
    assert not layer.B["default"].any()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({KEY: t[KEY][:, :3].contiguous()}), r"\[48, 3\].* needs \[48, 4\]"),
        (lambda t: t.update({KEY: t[KEY].to(torch.int32)}), r"torch.int32 \[48, 4\]"),
        (lambda t: [t.update({"x." + k: t.pop(k)}) for k in list(t)], "no tensor for this model"),
    ],
)
def test_tensors_that_do_not_fit(saved, strict, change, message):
    edit_tensors(saved, change)
    model = tiny()
    with pytest.raises(InputError, match=message):
        load_adapter(model, saved, strict=strict)
    assert not has_adapter(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"bias": "all"}, "sets bias to 'all'"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing"),
        ({"modules_to_save": ["nothing"]}, '"nothing" matches no module'),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight .* needs \[2, 32\]"),
        ({"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern is"),
        ({"alpha_pattern": 3}, "lora.alpha_pattern is 3"),
        ({"exclude_modules": ["q_proj"]}, "q_proj.lora_A.weight is not in the model"),
        ({"layers_to_transform": [0]}, "sets layers_to_transform"),
        ({"from_the_future": 1}, "sets from_the_future to 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights to 'pissa', which changes the base"),
        ({"peft_type": "IA3"}, "does not describe a LoRA adapter"),
        ({"r": None}, "does not say r"),
        ({"target_modules": None}, "does not say target_modules"),
        ({"r": 0}, "lora.r is 0"),
        ({"lora_alpha": "x"}, "lora.alpha is 'x'"),
        ({"target_modules": ["nothing"]}, 'LoRA target "nothing" matches no module'),
        ({"target_modules": ["q_proj"]}, "up_proj.lora_B.weight is not in the model|and 20 more"),
        ({"r": 8}, r"needs \[8, 32\]"),
    ],
)
def test_configs_that_are_refused(saved, changes, message):
    edit(saved, **changes)
    model = tiny()
    with pytest.raises(InputError, match=message):
        load_adapter(model, saved)
    assert not has_adapter(model)


def test_missing_and_damaged_files(saved, tmp_path):
    model = tiny()
    with pytest.raises(InputError, match=rf"nowhere has no {CONFIG}"):
        load_adapter(model, tmp_path / "nowhere")
    whole = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(whole[:-100])
    with pytest.raises(InputError, match=rf"{TENSORS} is damaged"):
        load_adapter(model, saved)
    (saved / TENSORS).unlink()
    with pytest.raises(InputError, match=rf"{TENSORS} does not exist"):
        load_adapter(model, saved)
    (saved / CONFIG).write_text((saved / CONFIG).read_text()[:-20])
    with pytest.raises(InputError, match=rf"{CONFIG} is damaged"):
        load_adapter(model, saved)
    (saved / CONFIG).write_text("[]")
    with pytest.raises(InputError, match="does not describe a LoRA"):
        load_adapter(model, saved)
    assert not has_adapter(model)
