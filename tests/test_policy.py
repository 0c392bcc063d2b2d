"""Policy: what it loads, what its reference is, what it saves, and what it says of bad input."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers

from prefopt import InputError, LoraConfig, Policy, encode_pairs, load_preferences, pack
from prefopt.data.encode import Encoded
from prefopt.data.records import Message
from prefopt.flops import useful_flops
from prefopt.nn.lora import adapter_names, adapters
from prefopt.policy import REFERENCE

V = 61
LLAMA = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LORA = LoraConfig(r=4, alpha=8)


def write_model(folder: Path, kind="Llama", dtype=torch.float32, **options) -> Path:
    """A random model with large weights, and a tokenizer whose files no program would rewrite."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**LLAMA | options)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape).to(dtype))
    model.tie_weights()
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, V)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = json.loads((folder / name).read_text())
        (folder / name).write_text("\n" + json.dumps(text, separators=(" ,", ":  ")))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama") / "base", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)


def load(path, lora=None, **kwargs) -> Policy:
    torch.manual_seed(0)
    return Policy.from_pretrained(path, lora=lora, **kwargs)


def groups() -> list[Encoded]:
    rng = np.random.default_rng(0)

    def tokens(n):
        return rng.integers(3, V, n).astype(np.int32)

    sizes = ((11, 9, 4), (3, 1, 12))
    return [Encoded(tokens(p), (tokens(a), tokens(b)), i) for i, (p, a, b) in enumerate(sizes)]


def batch_of(policy, layout=None):
    (batch,) = pack(groups(), max_tokens=1 << 20, layout=layout or policy.layout)
    return batch.to(policy.device)


@torch.no_grad()
def scored(policy) -> torch.Tensor:
    return policy(batch_of(policy))


@torch.no_grad()
def reference(policy) -> torch.Tensor:
    with policy.reference():
        return policy(batch_of(policy))


@torch.no_grad()
def alone(model) -> torch.Tensor:
    """The same log-probs from a plain transformers (or PEFT) model, one sequence at a time."""
    logps = []
    for group in groups():
        for response in group.responses:
            ids = torch.from_numpy(np.concatenate([group.prompt, response])).long()
            logits = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            chosen = logits[len(group.prompt) - 1 : -1]
            logps.append(chosen.gather(1, ids[len(group.prompt) :, None])[:, 0])
    return torch.cat(logps)


@torch.no_grad()
def move(policy, size=0.05) -> Policy:
    """Some way from the start, as training would."""
    generator = torch.Generator().manual_seed(3)
    for _, p in policy.trainable():
        p.add_(size * torch.randn(p.shape, generator=generator).to(p))
    return policy


def near(a, b, tolerance=1e-5):
    return (a - b).abs().max().item() < tolerance


def plain(path, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


# -- loading


@pytest.mark.parametrize(
    "asked, dtype",
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16),
     ("float16", torch.float16), (torch.float64, torch.float64)],
)  # fmt: skip
def test_dtype_is_what_was_asked_for(llama, asked, dtype):
    policy = load(llama, LORA, dtype=asked, device="cpu")
    assert policy.dtype == dtype == next(policy.model.parameters()).dtype
    assert {p.dtype for _, p in policy.trainable()} == {torch.float32}  # masters
    logps = scored(policy)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = {torch.bfloat16: 0.5, torch.float16: 0.05}.get(dtype, 1e-5)
    assert near(logps, alone(plain(llama)), bound)


def test_device(llama):
    policy = load(llama)
    if not torch.cuda.is_available():
        assert policy.device.type in ("cpu", "mps", "xpu")
        with pytest.raises(InputError, match="no device 'cuda'"):
            load(llama, device="cuda")
    assert load(llama, device="cpu").device == torch.device("cpu")
    with pytest.raises(InputError, match="not 'tpu'"):
        load(llama, device="tpu")


@pytest.mark.parametrize(
    "options, sentence",
    [({"dtype": "int8"}, "dtype is"), ({"quantize": "int8"}, "quantize"),
     ({"attention": "flash"}, "attention is"),
     ({"lora": LoraConfig(targets=["nowhere"])}, "nowhere"),
     ({"lora": LoraConfig(targets=["norm"])}, "norm")],
)  # fmt: skip
def test_options_that_cannot_be(llama, options, sentence):
    with pytest.raises(InputError, match=sentence):
        load(llama, **options)


def test_lora_is_added_and_reported(llama):
    policy = load(llama, LORA)
    names = [name for name, _ in policy.trainable()]
    assert policy.adapter == "default" and len(policy.lora_report.adapted) == 14
    assert len(names) == 28 and all(".A.default" in n or ".B.default" in n for n in names)
    assert adapter_names(policy.model) == ["default"]  # it starts at zero: the base is reference
    assert policy.layout == "shared" and policy.layout_reason is None
    assert policy.attention_class == "shared-runs"


def test_a_model_that_was_a_policys_before(llama):
    first = load(llama)
    second = Policy(first.model, first.tokenizer, base=first.base)
    assert second.layout == "shared" and torch.equal(scored(second), scored(first))
    assert near(second(batch_of(second, "padded")), scored(first))


def test_without_lora_every_weight_trains(llama):
    policy = load(llama)
    assert policy.adapter is None and policy.lora_report is None
    assert len(policy.trainable()) == len(list(policy.model.parameters()))


def damaged(base: Path, folder: Path, what: str) -> Path:
    shutil.copytree(base, folder)
    weights = folder / "model.safetensors"
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "empty weights":
        weights.write_bytes(b"")
    elif what == "garbage weights":
        weights.write_bytes(b"\xff" * 1000)
    elif what == "a tensor less":
        tensors = {}
        with safe_open(weights, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys() if "layers.1.mlp.up" not in k}
        import safetensors.torch

        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "another shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    elif what == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif what in ("config.json", "tokenizer.json"):
        (folder / what).write_text('{"model": ')
    elif what == "unknown kind":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    return folder


@pytest.mark.parametrize(
    "what, sentence",
    [("no config", "no config.json"), ("no weights", "no weights"),
     ("cut weights", "cannot load a model"), ("empty weights", "cannot load a model"),
     ("garbage weights", "cannot load a model"), ("a tensor less", "lacks weights"),
     ("another shape", "cannot load a model"), ("no tokenizer", "tokenizer"),
     ("config.json", "cannot load"), ("tokenizer.json", "cannot load a tokenizer"),
     ("unknown kind", "nonesuch")],
)  # fmt: skip
def test_a_damaged_folder_is_one_sentence(llama, tmp_path, what, sentence):
    folder = damaged(llama, tmp_path / "model", what)
    with pytest.raises(InputError, match=sentence) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_model(llama, tmp_path):
    for path, sentence in (
        (tmp_path / "absent", "there is no model folder"),
        (llama / "config.json", "is a file"),
        (tmp_path, "no config.json"),
    ):
        with pytest.raises(InputError, match=sentence) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_the_embedded_model_loads():
    policy = load("embedded")
    assert policy.layout == "shared" and policy.tokenizer.eos_token_id is not None


# -- heads


@pytest.mark.parametrize(
    "kind, options",
    [("Llama", {"tie_word_embeddings": True}), ("Llama", {"tie_word_embeddings": False}),
     ("Phi", {}), ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
     ("Granite", {"logits_scaling": 4.0}), ("Cohere", {"logit_scale": 0.3})],
    ids=["tied", "untied", "bias", "softcap", "divided", "scaled"],
)  # fmt: skip
def test_every_kind_of_head(tmp_path, kind, options):
    folder = write_model(tmp_path / "model", kind, **options)
    assert near(scored(load(folder)), alone(plain(folder)))


def test_a_head_that_does_more_is_refused(llama, monkeypatch):
    kind = transformers.LlamaForCausalLM
    forward = kind.forward

    def odd(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(kind, "forward", odd)
    with pytest.raises(InputError, match="output head of llama does more than a linear layer"):
        load(llama)


def test_a_model_that_sees_the_future_is_refused(tmp_path):
    folder = write_model(tmp_path / "bert", "BertGeneration", is_decoder=False)
    with pytest.raises(InputError, match="sees the tokens behind"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_the_head(llama, dtype):
    """Its few columns go through the head beside the weight's; a tied head cannot be adapted."""
    policy = move(load(llama, LoraConfig(r=4, targets=["lm_head"]), dtype=dtype))
    truth = copy.deepcopy(policy.model).float()
    truth.set_attn_implementation("sdpa")
    change = alone(truth)
    with adapters(truth, None):
        change -= alone(truth)
    error = scored(policy) - reference(policy) - change
    assert change.norm() > 0.5
    assert error.norm() < (1e-5 if dtype == torch.float32 else 0.1) * change.norm()
    policy(batch_of(policy)).sum().backward()
    grads = [p.grad for _, p in policy.trainable()]
    assert len(grads) == 2 and all(g.dtype == torch.float32 and g.any() for g in grads)


def test_lora_on_a_tied_head_is_refused(tied):
    with pytest.raises(InputError, match="lm_head"):
        load(tied, LoraConfig(targets=["lm_head"]))


# -- the reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=str)
def test_the_first_margin_is_zero_to_the_last_bit(llama, dtype, targets):
    policy = load(llama, LoraConfig(r=4, dropout=0.3, targets=targets), dtype=dtype)
    assert torch.equal(scored(policy.eval()), reference(policy.train()))
    assert policy.training


def test_the_base_is_the_reference_of_a_zero_adapter(llama):
    policy = load(llama, LORA)
    start = scored(policy)
    move(policy)
    assert torch.equal(reference(policy), start) and not near(scored(policy), start, 0.1)
    assert near(start, alone(plain(llama)))


def test_the_reference_of_a_trained_adapter_is_a_frozen_copy(llama, tmp_path):
    first = move(load(llama, LORA))
    first.save_pretrained(tmp_path / "first")
    policy = load(tmp_path / "first")
    start = scored(policy)
    assert torch.equal(start, scored(first)) and torch.equal(reference(policy), start)
    assert adapter_names(policy.model) == ["default", REFERENCE]
    assert len(policy.trainable()) == 28 and not any(REFERENCE in n for n, _ in policy.trainable())
    move(policy)
    assert torch.equal(reference(policy), start)
    assert not near(scored(policy), start, 0.1) and not near(start, reference(first), 0.1)
    policy.save_pretrained(tmp_path / "second")  # the trained adapter, not its reference
    assert torch.equal(scored(load(tmp_path / "second")), scored(policy))


def test_an_adapter_saved_before_training_starts_from_the_base(llama, tmp_path):
    load(llama, LORA).save_pretrained(tmp_path / "zero")
    policy = load(tmp_path / "zero")
    assert adapter_names(policy.model) == ["default"]
    assert torch.equal(reference(policy), scored(load(llama)))


def test_an_adapter_made_by_peft(llama, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        plain(llama), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "peft")
    policy = load(tmp_path / "peft")
    assert near(scored(policy), alone(model)) and len(policy.trainable()) == 8
    start = scored(policy)
    move(policy)
    assert torch.equal(reference(policy), start)


def test_an_adapter_takes_no_second_adapter(llama, tmp_path):
    load(llama, LORA).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="adapter already"):
        load(tmp_path / "adapter", LORA)


@pytest.mark.parametrize("text", ["{", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_without_its_base(llama, tmp_path, text):
    load(llama, LORA).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match="base_model_name_or_path"):
        load(tmp_path / "adapter")


def test_a_run_folder_is_its_model(llama, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("out: run\n")
    policy = move(load(llama, LORA))
    policy.save_pretrained(run / "model")
    assert torch.equal(scored(load(run)), scored(policy))


def test_the_reference_ignores_dropout_and_gives_the_mode_back(llama):
    policy = load(llama, replace(LORA, dropout=0.5)).train()
    move(policy)
    assert torch.equal(reference(policy), reference(policy))
    assert policy.training and not torch.equal(scored(policy), scored(policy))
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert policy.training and torch.equal(scored(policy.eval()), scored(policy))


# -- its key in the cache


def test_the_key_depends_on_what_the_number_depends_on(llama, tmp_path):
    key = load(llama, LORA).reference_key()
    assert set(key) == {"weights", "dtype", "attention"}
    others = [
        load(llama, LoraConfig(r=2, alpha=64, targets=["q_proj"])),
        load(llama, LoraConfig(targets=["lm_head"])),
        load(llama),
        move(load(llama, LORA), 1.0),
        load(llama, LORA).train(),
    ]
    shutil.copytree(llama, tmp_path / "elsewhere")
    others.append(load(tmp_path / "elsewhere"))
    assert all(policy.reference_key() == key for policy in others)
    scored(others[0]), others[0].generate(["w3"], max_new_tokens=1)
    assert others[0].reference_key() == key

    changed = load(llama, LORA)
    with torch.no_grad():
        changed.model.model.layers[1].mlp.up_proj.base.weight[3, 4] += 1e-3
    assert changed.reference_key()["weights"] != key["weights"]
    assert load(llama, dtype="bfloat16").reference_key()["dtype"] != key["dtype"]
    assert load(llama, attention="padded").reference_key()["attention"] != key["attention"]
    masters = load(llama, dtype="bfloat16")
    masters.use_float32_masters()
    assert masters.reference_key()["dtype"] not in (key["dtype"], "bfloat16")


def test_the_key_of_a_trained_adapter(llama, tmp_path):
    """It is part of the reference: its values and its scale, but not what training makes of it."""
    base = load(llama).reference_key()
    move(load(llama, LORA)).save_pretrained(tmp_path / "a")
    policy = load(tmp_path / "a")
    key = policy.reference_key()
    assert key["weights"] != base["weights"] == load(llama).reference_key()["weights"]
    assert move(policy).reference_key() == key == load(tmp_path / "a").reference_key()
    move(load(llama, LORA), 0.06).save_pretrained(tmp_path / "b")
    assert load(tmp_path / "b").reference_key()["weights"] != key["weights"]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    text = json.dumps(config | {"lora_alpha": 16})
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    assert load(tmp_path / "a").reference_key()["weights"] != key["weights"]


# -- training modes


def gradients(policy, layout):
    policy.zero_grad()
    logps = policy(batch_of(policy, layout))
    (logps * torch.arange(len(logps)).sin()).sum().backward()
    return [p.grad.clone() for _, p in policy.trainable()]


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Phi3"])
def test_gradient_checkpointing_changes_nothing(tmp_path, kind, lora, layout):
    options = {"head_dim": 8} if kind == "Gemma2" else {}
    folder = write_model(tmp_path / "model", kind, sliding_window=5, **options)
    policy = move(load(folder, lora)).train()
    want = gradients(policy, layout)
    enable = getattr(policy.model, "activation_checkpointing_enable", None)  # its name from 5.23 on
    (enable or policy.model.gradient_checkpointing_enable)({"use_reentrant": False})
    got = gradients(policy, layout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and want[0].any()


@pytest.mark.parametrize(
    "kind, options",
    [("GPT2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
     ("Phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
     ("OPT", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.9, "ffn_dim": 48,
              "word_embed_proj_dim": 32}),
     ("Bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
     ("GPTBigCode", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
     ("Mixtral", {"router_jitter_noise": 0.5, "attention_dropout": 0.5, "num_local_experts": 4})],
)  # fmt: skip
def test_training_mode_adds_no_noise(tmp_path, kind, options):
    """Noise in the policy alone would be noise in every margin: the base's dropout goes."""
    policy = load(write_model(tmp_path / "model", kind, **options))
    want = scored(policy.eval())
    assert torch.equal(scored(policy.train()), want) and policy.training


def test_loras_own_dropout_acts_in_training_alone(llama):
    for targets in ("all-linear", ["lm_head"]):
        policy = move(load(llama, replace(LORA, dropout=0.5, targets=targets)))
        assert torch.equal(scored(policy.eval()), scored(policy))
        assert not torch.equal(scored(policy.train()), scored(policy))


def test_full_fine_tuning_in_bfloat16(tied, tmp_path):
    """Float32 masters move by less than a bfloat16 bit; what is saved is bfloat16, tied once."""
    base = tmp_path / "base"
    model = plain(tied, dtype=torch.bfloat16)
    model.save_pretrained(base)
    for file in tied.glob("tokenizer*"):
        shutil.copyfile(file, base / file.name)
    policy = load(base, dtype="bfloat16")
    before = scored(policy)
    policy.use_float32_masters()
    assert {p.dtype for _, p in policy.trainable()} == {torch.float32}
    assert policy.autocast == torch.bfloat16 and policy.dtype == torch.bfloat16
    assert near(scored(policy), before, 0.5)
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=1e-6, weight_decay=0.0)
    weight = policy.model.model.layers[0].mlp.up_proj.weight
    start = weight.detach().clone()
    policy(batch_of(policy)).sum().neg().backward()
    optimizer.step()
    assert (weight != start).float().mean() > 0.99
    assert (weight.bfloat16() != start.bfloat16()).float().mean() < 0.01

    move(policy, 0.1)
    policy.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        saved = {k: file.get_tensor(k) for k in file.keys()}
    assert "lm_head.weight" not in saved
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = plain(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, p in again.named_parameters():
        assert torch.equal(p, policy.model.get_parameter(name).bfloat16())
    assert weight.dtype == torch.float32 and near(scored(policy), alone(again), 0.5)


def test_masters_are_for_full_fine_tuning_in_16_bits(llama):
    for policy in (load(llama), load(llama, LORA, dtype="bfloat16")):
        policy.use_float32_masters()
        assert policy.autocast is None


# -- saving


def check_files(saved: Path, base: Path, expected: set[str]):
    """The tokenizer's files byte for byte, nothing left over, readable as open() makes files."""
    assert {f.name for f in saved.iterdir()} == expected
    for file in base.glob("tokenizer*"):
        assert (saved / file.name).read_bytes() == file.read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    for file in saved.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file.name
    assert not list(saved.parent.glob(".tmp-*"))


@pytest.mark.parametrize("which", ["llama", "tied"])
def test_a_trained_model_loads_in_transformers(request, which, tmp_path):
    base = request.getfixturevalue(which)
    policy = move(load(base), 0.1)
    policy.save_pretrained(tmp_path / "out")
    files = {"config.json", "generation_config.json", "model.safetensors"}
    check_files(tmp_path / "out", base, files | {"tokenizer.json", "tokenizer_config.json"})
    model = plain(tmp_path / "out")
    assert near(alone(model), scored(policy)) and model.config._attn_implementation == "sdpa"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (which == "tied")
    assert "prefopt" not in (tmp_path / "out" / "config.json").read_text()
    assert policy.layout == "shared" and torch.equal(scored(load(tmp_path / "out")), scored(policy))
    policy.save_pretrained(tmp_path / "out")  # over what is there
    assert near(alone(plain(tmp_path / "out")), scored(policy))


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "lm_head"]], ids=str)
def test_a_trained_adapter_loads_in_peft(llama, tmp_path, targets):
    peft = pytest.importorskip("peft")
    policy = move(load(llama, replace(LORA, targets=targets)))
    policy.save_pretrained(tmp_path / "out")
    files = {"adapter_config.json", "adapter_model.safetensors"}
    files |= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    check_files(tmp_path / "out", llama, files)
    model = peft.PeftModel.from_pretrained(plain(llama), tmp_path / "out").eval()
    assert near(alone(model), scored(policy))
    with model.disable_adapter():
        assert near(alone(model), reference(policy))
    assert not near(scored(policy), reference(policy), 0.1)


# -- generation


PROMPTS = ["w5 w9 w31", "w7", "w8 w8 w60 w12 w13 w14 w15 w16 w17", "w40 w3"]


def greedy(model, tokenizer, prompt, stops, n):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
        pad_token_id=0, eos_token_id=stops,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    end = next((i for i, t in enumerate(out) if t in stops), None)
    text = tokenizer.decode(out[:end], skip_special_tokens=True)
    return text, "length" if end is None else "stop"


def test_greedy_generation_is_that_of_each_prompt_alone(llama):
    policy = load(llama).train()
    model = plain(llama)
    for batch_size in (1, 3, 16):
        got = policy.generate(PROMPTS, max_new_tokens=12, batch_size=batch_size, template="plain")
        for prompt, result in zip(PROMPTS, got, strict=True):
            want = greedy(model, policy.tokenizer, prompt, [2], 12)
            assert (result.text, result.finish) == want
    assert policy.training and policy.generate([]) == []
    assert near(scored(policy), alone(model))  # it shares prompts again


def test_generation_follows_the_adapter(llama):
    policy = move(load(llama, LORA), 0.3)
    texts = [g.text for g in policy.generate(PROMPTS, max_new_tokens=8)]
    with policy.reference():
        base = [g.text for g in policy.generate(PROMPTS, max_new_tokens=8)]
    assert texts != base == [g.text for g in load(llama).generate(PROMPTS, max_new_tokens=8)]


def test_it_stops_at_every_end_token(llama):
    """At what training puts behind a response, and at what the model's authors put there."""
    policy = load(llama)
    first = policy.generate(PROMPTS[:1], max_new_tokens=6, template="plain")[0]
    words = first.text.split()
    assert first.finish == "length" and len(words) == 6
    at = next(i for i, word in enumerate(words) if word != words[0])
    end = policy.tokenizer.convert_tokens_to_ids(words[at])
    others = sorted(set(range(3, V)) - set(policy.tokenizer.convert_tokens_to_ids(words)))
    for theirs, ours in ((end, "</s>"), ([others[0], end], "</s>"), (others[0], words[at])):
        policy.model.generation_config.eos_token_id = theirs
        policy.tokenizer.eos_token = ours
        got = policy.generate(PROMPTS[:1], max_new_tokens=6, template="plain")[0]
        assert (got.text.split(), got.finish) == (words[:at], "stop")


def test_sampling_is_decided_by_the_seed_alone(llama):
    policy = load(llama)

    def sample(seed, temperature=1.0):
        answers = policy.generate(PROMPTS, max_new_tokens=8, temperature=temperature, seed=seed)
        return [answer.text for answer in answers]

    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert sample(1) == first != sample(2)
    cold = sample(3, temperature=1e-3)
    assert cold == [g.text for g in policy.generate(PROMPTS, max_new_tokens=8)]


def test_a_failed_generation_leaves_the_policy_as_it_was(llama, monkeypatch):
    policy = load(llama).train()
    want = scored(policy)
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(policy.model.model, "forward", lambda *args, **kwargs: 1 / 0)
        policy.generate(["w3"])
    assert policy.training and torch.equal(scored(policy), want)


def test_messages_and_empty_prompts(llama):
    policy = load(llama)
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )
    (got,) = policy.generate([[Message("user", "w5"), Message("assistant", "w6"),
                               Message("user", "w7")]], max_new_tokens=5)  # fmt: skip
    want = greedy(plain(llama), policy.tokenizer, "w5 w6 w7 w9", [2], 5)
    assert (got.text, got.finish) == want
    with pytest.raises(InputError, match="Prompt 1 is empty"):
        policy.generate(["w3", ""], template="plain")


# -- how much work a batch is


def test_useful_flops(llama, tied, tmp_path):
    """Two per weight and token, the head where it scores; thrice where a weight trains."""
    tokens, targets = 11 + 8 + 3 + 3 + 0 + 11, 9 + 4 + 1 + 12
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
    forward = 2 * (tokens * 2 * layer + targets * V * 32)
    for folder in (llama, tied):
        policy = load(folder)
        batch = batch_of(policy)
        assert useful_flops(policy, batch, backward=False) == forward
        assert useful_flops(policy, batch, backward=True) == 3 * forward
        padded = batch_of(policy, "padded")
        assert useful_flops(policy, padded, backward=True) == 3 * forward
    adapter = 4 * 2 * (4 * 64 - 2 * 16 + 3 * 80)  # r (in + out): attention, MLP
    policy = load(llama, LORA)
    assert useful_flops(policy, batch, backward=False) == forward + 2 * tokens * adapter
    assert useful_flops(policy, batch, backward=True) == 2 * forward + 6 * tokens * adapter
    move(policy).save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    assert useful_flops(again, batch, backward=True) == 2 * forward + 6 * tokens * adapter

    options = {"num_local_experts": 4, "num_experts_per_tok": 2}
    experts = load(write_model(tmp_path / "experts", "Mixtral", **options))
    layer += 3 * 32 * 48 + 4 * 32  # two experts of the four, and the router
    assert useful_flops(experts, batch, backward=False) == 2 * (
        tokens * 2 * layer + targets * V * 32
    )


# -- real input, and a GPU


def test_layouts_agree_on_real_pairs(stories_path, hh_path):
    policy = load(stories_path, LORA)
    encoded = list(encode_pairs(load_preferences(hh_path)[:6], policy.tokenizer, max_length=512))
    shared, padded = (
        torch.cat([policy(b).detach() for b in pack(encoded, max_tokens=2048, layout=layout)])
        for layout in ("shared", "padded")
    )
    assert len(shared) > 200 and near(shared, padded, 3e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma2"])
def test_varlen_attention_on_the_gpu(tmp_path, kind):
    options = {"head_dim": 8, "sliding_window": 5} if kind != "Llama" else {}
    folder = write_model(tmp_path / "model", kind, **options)
    policy = load(folder, LORA, device="cuda", dtype="bfloat16")
    assert policy.attention_class == "shared-varlen"
    truth = alone(plain(folder))
    with torch.no_grad():
        errors = [
            (policy(batch_of(policy, layout)).cpu() - truth).abs().mean()
            for layout in ("shared", "padded")
        ]
    assert errors[0] < 1.5 * errors[1] + 1e-2
    policy(batch_of(policy)).sum().backward()
    state = torch.cuda.get_rng_state()
    policy.generate(PROMPTS, max_new_tokens=4, temperature=1.0)
    assert torch.equal(torch.cuda.get_rng_state(), state)
