"""Shared prompts, padded rows and each sequence alone through the plain model: the same log-probs
and the same gradient of every weight, per architecture; and what cannot share says so and pads."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.integrations import moe

from prefopt import attention
from prefopt.data.encode import Encoded
from prefopt.data.packing import pack
from prefopt.errors import InputError
from prefopt.policy import Policy

V = 61
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **SPECIAL, "vocab_size": V, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
MLA |= {"v_head_dim": 12, "head_dim": 4, "num_key_value_heads": 4}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
WINDOW = {"sliding_window": 7}  # shorter than prompts and responses; blocks here are of 16 queries

SHARED = {
    "Llama": ("LlamaConfig", LLAMA),
    "Qwen2": ("Qwen2Config", LLAMA),
    "Qwen3": ("Qwen3Config", LLAMA | {"head_dim": 16}),
    "Mistral": ("MistralConfig", LLAMA | WINDOW),
    "Gemma2": (
        "Gemma2Config",
        LLAMA | WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0,
                          "final_logit_softcapping": 7.0},
    ),
    "Gemma3": ("Gemma3TextConfig", LLAMA | WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 12,
               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "GPT2": ("GPT2Config", {**SPECIAL, "vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "GPTNeoX": ("GPTNeoXConfig", NEOX),
    "Phi3": ("Phi3Config", LLAMA | WINDOW),
    "OLMo2": ("Olmo2Config", LLAMA),
    "SmolLM3": ("SmolLM3Config", LLAMA | {"no_rope_layers": [1, 0, 1]}),
    # Beyond the usual: values of another size than keys, biases on the head, scaled logits.
    "DeepseekV3": ("DeepseekV3Config", LLAMA | MLA | {"n_routed_experts": 4, "n_group": 1,
                   "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "Phi": ("PhiConfig", LLAMA),
    "Cohere": ("CohereConfig", LLAMA | {"logit_scale": 0.5}),
    "Granite": ("GraniteConfig", LLAMA | {"logits_scaling": 3.0, "attention_multiplier": 0.4}),
}  # fmt: skip

PADDED = {
    "Bloom": ("BloomConfig", {**SPECIAL, "vocab_size": V, "hidden_size": 32, "n_layer": 2,
              "n_head": 4}, "bloom models take no attention function from outside"),
    "Mamba": ("MambaConfig", {**SPECIAL, "vocab_size": V, "hidden_size": 32, "state_size": 8,
              "num_hidden_layers": 2}, "mamba models take no attention function from outside"),
    "MPT": ("MptConfig", {"vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2,
            "expansion_ratio": 2}, "mpt models take no attention function from outside"),
    "Falcon": ("FalconConfig", {**SPECIAL, "vocab_size": V, "hidden_size": 32, "alibi": True,
               "num_hidden_layers": 2, "num_attention_heads": 4}, "falcon models take no"),
    "RWKV": ("RwkvConfig", {**SPECIAL, "vocab_size": V, "hidden_size": 32,
             "num_hidden_layers": 2}, "rwkv models take no"),
    "Qwen3Next": ("Qwen3NextConfig", LLAMA | LINEAR | {"head_dim": 8, "num_experts": 4,
                  "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                  "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16}, "qwen3_next models take no"),
    "GPT-OSS": ("GptOssConfig", LLAMA | WINDOW | {"head_dim": 8, "num_local_experts": 4},
                "gpt_oss failed with a shared prompt: attention with s_aux cannot share a prompt"),
    "DiffLlama": ("DiffLlamaConfig", LLAMA, "has 3 layers and called 6 times for attention"),
    "LFM2": ("Lfm2Config", LLAMA | {"layer_types": ["conv", "full_attention", "conv"]},
             "lfm2 has 3 layers and called 1 times for attention"),
    "Phimoe": ("PhimoeConfig", LLAMA | WINDOW | {"num_local_experts": 4},
               "phimoe limits attention to 7 tokens in a mask of its own"),
    "Llama4": ("Llama4TextConfig", LLAMA | {"head_dim": 8, "intermediate_size_mlp": 48,
               "num_local_experts": 2, "attention_chunk_size": 7},
               "llama4_text limits attention to 7 tokens in a mask of its own"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)


def build(name: str, dtype: torch.dtype = torch.float32):
    """A model whose weights are large enough that a wrong mask or scale moves every number."""
    kind, options, *_ = (SHARED | PADDED)[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            noise = 0.2 * torch.randn(p.shape, dtype=torch.float64).to(dtype)
            p.copy_(noise if p.dim() > 1 else p + noise)
    model.tie_weights()
    return model


@cache
def groups() -> list[Encoded]:
    """Windows and blocks cut prompts and responses; two responses are of a single token."""
    rng = np.random.default_rng(0)

    def tokens(n):
        return rng.integers(3, V, n).astype(np.int32)

    sizes = ((37, 24, 19), (5, 1, 31), (20, 12, 1))
    return [Encoded(tokens(p), (tokens(a), tokens(b)), i) for i, (p, a, b) in enumerate(sizes)]


def batch_of(layout: str):
    (batch,) = pack(groups(), max_tokens=1 << 20, layout=layout)
    return batch


def alone(model) -> torch.Tensor:
    """The log-prob of every response token, one sequence at a time, by the definition."""
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    logps = []
    for group in groups():
        for response in group.responses:
            ids = torch.from_numpy(np.concatenate([group.prompt, response])).long()
            logits = model(input_ids=ids[None], use_cache=False).logits[0].to(dtype)
            scored = logits.log_softmax(-1)[len(group.prompt) - 1 : -1]
            logps.append(scored.gather(1, ids[len(group.prompt) :, None])[:, 0])
    return torch.cat(logps)


def gradients(model, logps: torch.Tensor, reference: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the DPO loss, for every weight that the loss depends on."""
    batch = batch_of("shared")
    rewards = torch.zeros(batch.num_responses, dtype=logps.dtype)
    rewards = rewards.index_add(0, batch.response_ids, 0.1 * (logps - reference))
    loss = -F.logsigmoid(rewards[::2] - rewards[1::2]).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def compare(name: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """(largest difference of a log-prob, largest relative difference of a gradient) of each way."""
    model = build(name, dtype)
    plain = copy.deepcopy(model)
    policy = Policy(model, None, base=name)
    results = {"alone": (plain, alone(plain))}
    for layout in ["shared", "padded"] if policy.layout == "shared" else ["padded"]:
        results[layout] = (model, policy(batch_of(layout)))
    want = results["alone"][1].detach()
    reference = want + torch.arange(len(want)).sin()
    grads = {way: gradients(m, logps, reference) for way, (m, logps) in results.items()}
    differences = {}
    for a, b in (("shared", "padded"), ("shared", "alone"), ("padded", "alone")):
        if a in results:
            logps = (results[a][1] - results[b][1]).abs().max().item()
            assert grads[a].keys() == grads[b].keys()
            relative = [((g - grads[a][k]).norm() / g.norm()).item() for k, g in grads[b].items()]
            differences[f"{a}/{b}"] = (logps, max(relative))
    return differences


@pytest.mark.parametrize("name", SHARED)
def test_layouts_agree_in_float32(name):
    differences = compare(name, torch.float32)
    assert len(differences) == 3
    for logps, gradient in differences.values():
        assert logps < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("name", [n for n in (*SHARED, *PADDED) if n != "DiffLlama"])
def test_layouts_agree_in_float64(name, monkeypatch):
    """What is left of a difference in float32 is rounding. Models compute norms, rotations and
    softmax in float32 whatever their dtype is: here they are kept from it (DiffLlama cannot be: it
    has a sum in float32)."""
    to, softmax = torch.Tensor.to, F.softmax

    def stay(x, *args, **kwargs):
        if x.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values()):
            return x
        return to(x, *args, **kwargs)

    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)  # it takes no float64
    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: stay(x, torch.float32))
    monkeypatch.setattr(F, "softmax", lambda x, *a, dtype=None, **more: softmax(x, *a, **more))
    differences = compare(name, torch.float64)
    assert len(differences) == (3 if name in SHARED else 1)
    for logps, gradient in differences.values():
        assert logps < 1e-10 and gradient < 1e-10


@pytest.mark.parametrize("name", SHARED)
def test_float32_masters_under_bfloat16_autocast(name):
    """Full fine-tuning in 16 bits: forward and backward run in both layouts, and are as close to
    float32 as the plain model under the same autocast."""
    model = build(name, torch.bfloat16)
    plain = copy.deepcopy(model).float()
    policy = Policy(model, None, base=name)
    policy.use_float32_masters()
    want = alone(plain)
    want_grads = gradients(plain, want, want.detach())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = alone(plain)
    bound = 1.5 * (theirs - want).abs().mean() + 1e-3
    for layout in ("shared", "padded"):
        logps = policy(batch_of(layout))
        assert logps.dtype == torch.float32
        assert (logps - want).abs().mean() < bound
        grads = gradients(model, logps, want.detach())
        got, want_ = (torch.cat([g.flatten() for g in x.values()]) for x in (grads, want_grads))
        assert (got - want_).norm() < 0.2 * want_.norm()


def test_bfloat16_weights():
    """Both layouts round alike: neither is further from float32 than the plain model is."""
    model = build("Llama", torch.bfloat16)
    plain = copy.deepcopy(model)
    policy = Policy(model, None, base="Llama")
    assert policy.layout == "shared" and policy.dtype == torch.bfloat16
    with torch.no_grad():
        theirs, truth = alone(plain), alone(plain.float())
        for layout in ("shared", "padded"):
            error = (policy(batch_of(layout)) - truth).abs().mean()
            assert error < 1.2 * (theirs - truth).abs().mean()


def test_one_token_too_much_would_be_seen():
    """The tolerance of 1e-5 is far below what the smallest mistake in a window makes."""
    policy = Policy(build("Mistral"), None, base="")
    with torch.no_grad():
        right = policy(batch_of("shared"))
        policy.model.config.sliding_window += 1
        assert (policy(batch_of("shared")) - right).abs().max() > 1e-2


# -- models that cannot share a prompt


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, V)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("name", PADDED)
def test_falls_back_to_padding_and_says_why(name):
    policy = Policy(build(name), None, base=name)
    assert policy.layout == "padded" and PADDED[name][2] in policy.layout_reason
    assert "\n" not in policy.layout_reason and policy.attention_class.startswith("padded-")
    assert policy.model.config._attn_implementation != attention.NAME
    with pytest.raises(InputError, match="layout='padded'"):
        policy(batch_of("shared"))
    ((logps, gradient),) = compare(name, torch.float32).values()
    rounding = 100 if name == "Qwen3Next" else 1  # of its delta rule, see float64
    assert logps < 1e-5 and gradient < 1e-5 * rounding


@pytest.mark.parametrize("name", PADDED)
def test_generates_without_sharing(name):
    """Prompts of different lengths in one call get what each gets alone."""
    model = build(name)
    plain = copy.deepcopy(model)
    policy = Policy(model, tokenizer(), base=name)
    lengths = (3, 9, 3, 14)
    prompts = [torch.from_numpy(groups()[0].prompt[i : i + n]) for i, n in enumerate(lengths)]
    texts = [" ".join(f"w{t}" for t in prompt.tolist()) for prompt in prompts]
    got = policy.generate(texts, max_new_tokens=6, template="plain")
    for prompt, result in zip(prompts, got, strict=True):
        ids = prompt.long()[None]
        out = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            pad_token_id=0, eos_token_id=2,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        stop = out.index(2) if 2 in out else None
        assert result.text == policy.tokenizer.decode(out[:stop], skip_special_tokens=True)
        assert result.finish == ("length" if stop is None else "stop")


def test_asked_for_padding():
    policy = Policy(build("Llama"), None, base="", attention="padded")
    assert policy.layout == "padded" and "asked for" in policy.layout_reason
    with pytest.raises(InputError, match="'auto' or 'padded'"):
        Policy(build("Llama"), None, base="", attention="flash")
