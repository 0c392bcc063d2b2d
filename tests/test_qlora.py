"""Training on a 4-bit base: the dense base's gradients, a reference without error, a run that comes
back as it was."""

import json
from dataclasses import replace

import pytest
import torch

from prefopt.cli import main
from prefopt.data.encode import encode_pairs
from prefopt.data.packing import pack
from prefopt.data.sources import load_preferences
from prefopt.errors import InputError
from prefopt.flops import useful_flops
from prefopt.nn import pissa
from prefopt.nn.lora import LoraConfig, lora_parameters
from prefopt.nn.merge import dequantize_base
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.objectives.dpo import DPO
from prefopt.optim import make_optimizer
from prefopt.policy import Policy
from prefopt.step import optimizer_step

CONFIGS = {
    "lora": LoraConfig(r=4, alpha=8),
    "dora": LoraConfig(r=4, alpha=8, use_dora=True),
    "pissa": LoraConfig(r=4, alpha=8, init="pissa"),
    "saved": LoraConfig(r=4, alpha=8, modules_to_save=["norm"]),
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def load(path, **options) -> Policy:
    torch.manual_seed(0)
    return Policy.from_pretrained(path, **options)


def batches(policy: Policy, rows) -> list:
    encoded = encode_pairs(load_preferences(rows[:6]), policy.tokenizer, max_length=96)
    return list(pack(encoded, max_tokens=256, layout=policy.layout))


def with_reference(policy: Policy, packed: list) -> list:
    with torch.no_grad(), policy.reference():
        return [replace(batch, ref_logprobs=policy(batch)) for batch in packed]


def step(policy: Policy, packed: list):
    """Gradients of one DPO step, by name, and its statistics."""
    optimizer = make_optimizer(policy.parameter_groups(0.0), 0.0)
    stats = optimizer_step(policy, DPO(), packed, optimizer, max_norm=None)
    grads = {name: p.grad.clone() for name, p in policy.trainable() if p.grad is not None}
    return grads, stats


def move(policy: Policy) -> None:
    """As training would: no tensor of the adapter stays at its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in lora_parameters(policy.model):
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_has_the_gradients_of_the_dequantised_base(tiny_model, tiny_rows, name, kind):
    policy = load(tiny_model, lora=CONFIGS[name], quantize=kind)
    other = load(tiny_model, lora=CONFIGS[name], quantize=kind)
    assert dequantize_base(other.model) == 14
    assert not any(isinstance(m, NF4Linear) for m in other.model.modules())
    for p in (policy, other):
        move(p)
    packed = with_reference(policy, batches(policy, tiny_rows))
    ours, stats = step(policy, packed)
    theirs, expected = step(other, packed)
    assert ours.keys() == theirs.keys() and len(ours) >= 28
    assert stats.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert abs(stats.metrics["rewards/margins"]) > 1e-3  # the adapter does something
    for key, grad in ours.items():
        assert grad.norm() > 0, key
        assert ((grad - theirs[key]).norm() / theirs[key].norm()).item() < 1e-6, key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_has_no_error_at_step_0(tiny_model, tiny_rows, name, dtype):
    policy = load(tiny_model, lora=CONFIGS[name], quantize="nf4", dtype=dtype)
    assert not policy.has_reference_copy
    packed = with_reference(policy, batches(policy, tiny_rows))
    _, stats = step(policy, packed)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert stats.metrics[key].item() == 0.0, key


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_that_is_not_zero_is_copied_and_the_reference_has_no_error(
    tiny_model, tiny_rows, tmp_path, name
):
    """An adapter of supervised training, say: with it off the reference would be another model."""
    first = load(tiny_model, lora=CONFIGS[name], quantize="nf4")
    move(first)
    first.save_pretrained(tmp_path / "sft")
    policy = load(tmp_path / "sft")
    assert policy.has_reference_copy and policy.kind == "nf4"
    packed = with_reference(policy, batches(policy, tiny_rows))
    with torch.no_grad(), policy.reference():
        started = torch.cat([policy(batch) for batch in packed])
    with torch.no_grad():
        saved = torch.cat([first(batch) for batch in packed])
    tolerance = {"rtol": 0, "atol": 1e-5}  # two products of rank r, or one of 2 r (PiSSA)
    torch.testing.assert_close(started, saved, **tolerance)
    _, stats = step(policy, packed)
    assert stats.metrics["rewards/margins"].item() == 0.0
    move(policy)
    with torch.no_grad(), policy.reference():
        assert torch.equal(torch.cat([policy(batch) for batch in packed]), started)


def test_the_base_stays_as_it_is_and_takes_no_gradient(tiny_model, tiny_rows):
    policy = load(tiny_model, lora=CONFIGS["lora"], quantize="nf4")
    before = {k: v.clone() for k, v in policy.model.state_dict().items() if "default" not in k}
    optimizer = make_optimizer(policy.parameter_groups(0.1), 0.1)
    packed = with_reference(policy, batches(policy, tiny_rows))
    optimizer_step(policy, DPO(), packed, optimizer)
    after = policy.model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert any(v.dtype == torch.uint8 for v in before.values())


def test_gradient_checkpointing_changes_nothing(tiny_model, tiny_rows):
    gradients = []
    for checkpointing in (False, True):
        policy = load(tiny_model, lora=CONFIGS["lora"], quantize="nf4")
        move(policy)
        if checkpointing:
            model = policy.model  # whose method transformers 5.23 renamed
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        packed = with_reference(policy, batches(policy, tiny_rows))
        policy.train()
        gradients.append(step(policy, packed)[0])
    for key, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], grad, rtol=1e-6, atol=1e-8)


def test_the_key_of_the_reference_knows_the_4bit_base_but_no_adapter(tiny_model, tmp_path):
    keys = [
        load(tiny_model, lora=lora, quantize=kind).reference_key()
        for kind in (None, "nf4", "fp4")
        for lora in (CONFIGS["lora"], CONFIGS["dora"], CONFIGS["pissa"], CONFIGS["saved"])
    ]
    assert keys[:1] * 4 + keys[4:5] * 4 + keys[8:9] * 4 == keys
    assert len({key["weights"] for key in keys}) == 3
    policy = load(tiny_model, lora=CONFIGS["dora"], quantize="nf4")
    move(policy)
    policy.save_pretrained(tmp_path / "a")
    started = load(tmp_path / "a")
    key = started.reference_key()
    assert key["weights"] not in {k["weights"] for k in keys}
    move(started)
    assert started.reference_key() == key


def test_an_adapter_comes_back_on_the_base_it_was_trained_on(tiny_model, tiny_rows, tmp_path):
    policy = load(tiny_model, lora=CONFIGS["lora"], quantize="nf4")
    move(policy)
    policy.save_pretrained(tmp_path / "adapter")
    packed = batches(policy, tiny_rows)
    back = load(tmp_path / "adapter")
    dense = load(tmp_path / "adapter", quantize="none")
    with torch.no_grad():
        for batch in packed:
            assert torch.equal(back(batch), policy(batch))
            assert (dense(batch) - policy(batch)).abs().max() > 0.01
    assert (policy.kind, back.kind, dense.kind) == ("nf4", "nf4", None)
    load(tiny_model, lora=CONFIGS["lora"]).save_pretrained(tmp_path / "adapter")
    assert load(tmp_path / "adapter").kind is None  # not what was in the folder before
    (tmp_path / "adapter" / "base_quantization.json").write_text('{"kind": "int3"}')
    with pytest.raises(InputError, match=r"base_quantization\.json"):
        load(tmp_path / "adapter")


def test_a_4bit_model_is_saved_and_loaded_as_one(tiny_model, tiny_rows, tmp_path):
    policy = load(tiny_model, quantize="nf4")
    policy.save_pretrained(tmp_path / "four")
    back = load(tmp_path / "four")
    packed = batches(policy, tiny_rows)
    with torch.no_grad():
        assert all(torch.equal(back(batch), policy(batch)) for batch in packed)
    assert back.kind is None  # the folder itself says so
    with pytest.raises(InputError, match="nf4 already"):
        load(tmp_path / "four", quantize="fp4")
    adapted = load(tmp_path / "four", lora=CONFIGS["lora"])
    move(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "base_quantization.json").exists()
    with torch.no_grad():
        again = load(tmp_path / "adapter")
        assert all(torch.equal(again(batch), adapted(batch)) for batch in packed)


def test_useful_flops_count_weights_not_bytes(tiny_model, tiny_rows):
    dense, packed = (load(tiny_model, lora=CONFIGS["lora"], quantize=q) for q in (None, "nf4"))
    [batch, *_] = batches(dense, tiny_rows)
    for backward in (False, True):
        flops = [useful_flops(p, batch, backward=backward) for p in (dense, packed)]
        assert flops[0] == flops[1]


def test_4bit_weights_alone_cannot_be_trained(tiny_model):
    policy = load(tiny_model, quantize="nf4")
    with pytest.raises(InputError, match="adapter"):
        policy.parameter_groups(1e-4)


def test_dora_on_the_head_is_refused(tmp_path, stories_path):
    lora = LoraConfig(targets=["lm_head"], use_dora=True)
    with pytest.raises(InputError, match="lm_head"):
        load(stories_path, lora=lora)


# ---- LoRA+ ---------------------------------------------------------------------------------------


def test_lora_plus_gives_b_a_learning_rate_of_its_own(tiny_model):
    policy = load(tiny_model, lora=CONFIGS["saved"])
    groups = policy.parameter_groups(1e-4, lora_plus=16)
    names = {id(p): name for name, p in policy.trainable()}
    by_lr = {group["lr"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert by_lr.keys() == {1e-4, 16e-4}
    assert all(".B." in name for name in by_lr[16e-4]) and len(by_lr[16e-4]) == 14
    assert not any(".B." in name for name in by_lr[1e-4])
    assert sum(map(len, by_lr.values())) == len(names)
    with pytest.raises(InputError, match="no adapter"):
        load(tiny_model).parameter_groups(1e-4, lora_plus=16)


def test_lora_plus_trains_and_resumes(tiny_model, tiny_data, tmp_path):
    """Bitwise, with two parameter groups in the checkpoint."""
    flags = [
        "dpo", "--model", str(tiny_model), "--data", str(tiny_data), "--max_steps", "4",
        "--eval_fraction", "0", "--lora.r", "4", "--lr", "5e-3", "--lora_plus", "4",
        "--save_every", "2", "--quantize", "nf4", "--quiet",
    ]  # fmt: skip
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert main([*flags, "--out", str(tmp_path / "cut")]) == 0
    at = str(tmp_path / "cut" / "checkpoints" / "step-000002")
    (tmp_path / "cut" / "model").rename(tmp_path / "old")
    assert main([*flags, "--out", str(tmp_path / "cut"), "--resume", at]) == 0
    name = "adapter_model.safetensors"
    whole = (tmp_path / "whole" / "model" / name).read_bytes()
    assert (tmp_path / "cut" / "model" / name).read_bytes() == whole
    assert main([*flags[:-1], "--lora_plus", "1", "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "model" / name).read_bytes() != whole
    row = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["learning_rate"] <= 5e-3  # that of A


def test_a_checkpoint_holds_where_pissa_started(tiny_model, tiny_data, tmp_path, monkeypatch):
    """Other machines find other last digits of singular vectors; a run goes on with its own."""
    flags = [
        "dpo", "--model", str(tiny_model), "--data", str(tiny_data), "--max_steps", "4",
        "--eval_fraction", "0", "--lora.r", "4", "--lora.init", "pissa", "--save_every", "2",
        "--quiet",
    ]  # fmt: skip
    for out in ("whole", "cut"):
        assert main([*flags, "--out", str(tmp_path / out)]) == 0
    real = pissa.principal
    monkeypatch.setattr(pissa, "principal", lambda *a: tuple(1.001 * t for t in real(*a)))
    at = str(tmp_path / "cut" / "checkpoints" / "step-000002")
    (tmp_path / "cut" / "model").rename(tmp_path / "old")
    assert main([*flags, "--out", str(tmp_path / "cut"), "--resume", at]) == 0
    name = "model/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
