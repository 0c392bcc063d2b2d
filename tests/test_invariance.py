"""How items are packed, padded, ordered and split into micro-batches changes neither the loss nor
any gradient: for every loss, for KTO, SFT and reward models. In float64 to 1e-12. In float32 to
1e-6 of the gradient's norm or, where the padded layout takes another attention kernel, to three
times what rounding does to the gradient of one and the same batch."""

from dataclasses import replace

import pytest
import torch
import transformers

from prefopt.data.encode import encode_pairs
from prefopt.data.encode_dialogues import encode_dialogues
from prefopt.data.encode_rankings import encode_rankings
from prefopt.data.packing import pack
from prefopt.data.records import Dialogue, Message, Pair, Ranking
from prefopt.losses import LOSSES, WHOLE_BATCH
from prefopt.nn.lora_config import LoraConfig
from prefopt.objectives.dpo import DPO
from prefopt.objectives.kto import KTO
from prefopt.objectives.reward import Reward
from prefopt.objectives.sft import SFT
from prefopt.policy import Policy
from prefopt.step import optimizer_step

WORDS = "please tell me about the thing i will gladly help with it and more of that today".split()
SHAPED = {
    "forward_kl": {"divergence": "forward_kl"},
    "js_divergence": {"divergence": "js_divergence"},
    "alpha_divergence": {"divergence": "alpha_divergence", "divergence_alpha": 0.3},
    "smoothed": {"label_smoothing": 0.1},
    "ld_alpha": {"ld_alpha": 0.4},
    "wpo": {"wpo": True},
    "a sum": {"loss": "0.8*dpo + 0.2*bco_pair + sft"},
    "a sum with aot": {"loss": "aot + 0.3*sft", "ld_alpha": 0.5},
}
OBJECTIVES = {
    **{name: lambda name=name: DPO(name) for name in LOSSES},
    **{name: lambda options=options: DPO(**options) for name, options in SHAPED.items()},
    "kto": lambda: KTO(desirable_weight=1.3),
    "sft": SFT,
    "sft on all": lambda: SFT(loss_on="all"),
    "reward": lambda: Reward(margin=0.5, center=0.1),
    "rankings": lambda: Reward(center=0.1),
}


def turn(role, start, count):
    return [Message(role, " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count)))]


@pytest.fixture(scope="module")
def pairs():
    return [
        Pair(
            turn("user", i, 3 + i % 4), turn("assistant", 2 * i, 2 + i % 5),
            turn("assistant", 3 * i + 1, 6 - i % 5), margin=0.3 * i, weight=1.0 + i % 2,
        )
        for i in range(7)
    ]  # fmt: skip


def encoded(objective, name, pairs, tokenizer):
    if name == "kto":
        return objective.encode(pairs, tokenizer, max_length=128, template="auto")
    if name.startswith("sft"):
        talks = [Dialogue([*p.prompt, *p.chosen, *p.prompt, *p.rejected]) for p in pairs]
        return encode_dialogues(talks, tokenizer, loss_on=objective.loss_on)
    if name == "rankings":
        more = [turn("assistant", 5 * i + 2, 3 + i % 3) for i in range(len(pairs))]
        ranked = [
            Ranking(p.prompt, [p.chosen, extra, p.rejected][: 2 + i % 2])
            for i, (p, extra) in enumerate(zip(pairs, more, strict=True))
        ]
        return encode_rankings(ranked, tokenizer, max_length=128)
    return encode_pairs(pairs, tokenizer, max_length=128)


def moved(path, head, dtype, by=0.02):
    """A policy with an adapter some way from where it began."""
    torch.manual_seed(0)
    policy = Policy.from_pretrained(path, lora=LoraConfig(r=4), head=head, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for _, p in policy.trainable():
        p.data = p.data.to(dtype)  # of float64, too, where adapters are float32
        p.data += by * torch.randn(p.shape, generator=generator)
    return policy


@pytest.fixture(scope="module")
def policies(tiny_model, tmp_path_factory):
    """A language model and a reward model, GPT-2, whose norms do not go through float32."""
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    made = {}
    for head in ("lm", "score"):
        made[head, torch.float32] = single = moved(folder, head, torch.float32)
        made[head, torch.float64] = double = moved(folder, head, torch.float64)
        for (_, p), (_, q) in zip(double.trainable(), single.trainable(), strict=True):
            p.data = q.data.double()
    return made


def step(policy, objective, items, *, max_tokens=10_000, layout="shared"):
    """(loss, all gradients [P]) of one optimizer step over the items."""
    batches = []
    for batch in pack(items, max_tokens=max_tokens, layout=layout, ends=objective.ends):
        if objective.needs_reference:
            with policy.reference(), torch.no_grad():
                batch = replace(batch, ref_logprobs=policy(batch))
        batches.append(batch)
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    stats = optimizer_step(policy, objective, batches, optimizer, max_norm=None)
    grads = torch.cat([p.grad.flatten() for _, p in policy.trainable()])
    return stats, grads.clone(), len(batches)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_but_the_items_matters(name, policies, pairs):
    objective = OBJECTIVES[name]()
    head = "score" if objective.ends else "lm"
    items = encoded(objective, name, pairs, policies[head, torch.float32].tokenizer)
    if getattr(objective, "whole_batch", False):  # which pair a sorted loss is about has no answer
        items = [replace(item, weight=1.0) for item in items]
    exact, truth, _ = step(policies[head, torch.float64], objective, items)
    assert truth.dtype == torch.float64 and truth.norm() > 1e-3, "nothing is learnt"
    assert_same(policies[head, torch.float64], objective, items, bound=1e-12, padded=1e-12)
    stats, gradient, _ = step(policies[head, torch.float32], objective, items)
    own = (gradient - truth).norm() / truth.norm()  # what rounding does to one and the same batch
    assert own < 2e-5 and abs(stats.loss - exact.loss) < 1e-5 * max(1, abs(exact.loss))
    assert_same(
        policies[head, torch.float32], objective, items, bound=1e-6, padded=max(1e-6, 3 * own)
    )


def assert_same(policy, objective, items, *, bound, padded):
    """Loss, metrics and gradient in all variants; ``padded`` bounds the gradient where attention is
    another kernel."""
    want, gradient, _ = step(policy, objective, items)
    shuffled = [items[i] for i in (3, 0, 6, 2, 5, 1, 4)]
    variants = {
        "micro-batches": (items, {"max_tokens": 60}),
        "one by one": (items, {"max_tokens": 1}),
        "another order": (shuffled, {}),
        "padded": (items, {"layout": "padded"}),
        "padded, all of it": (shuffled, {"layout": "padded", "max_tokens": 90}),
    }
    for variant, (given, options) in variants.items():
        stats, got, batches = step(policy, objective, given, **options)
        assert "max_tokens" not in options or batches > 1
        assert stats.count == want.count
        allowed = padded if "layout" in options else bound
        assert (got - gradient).norm() <= allowed * gradient.norm(), variant
        assert abs(stats.loss - want.loss) <= bound * max(1, abs(want.loss)), variant
        for key, value in stats.metrics.items():
            near = torch.isclose(value, want.metrics[key], rtol=bound, atol=5 * bound)
            assert near, (variant, key)


@pytest.mark.parametrize("name", sorted(WHOLE_BATCH))
def test_a_sorting_loss_over_micro_batches_alone_would_be_another(name, tiny_model, pairs):
    """What the pass over the whole step is for."""
    policy, objective = moved(tiny_model, "lm", torch.float32, by=0.5), DPO(name)
    pairs = [replace(pair, weight=1.0) for pair in pairs]
    items = encode_pairs(pairs, policy.tokenizer, max_length=128)
    _, whole, _ = step(policy, objective, items)
    objective.whole_batch = False
    _, alone, _ = step(policy, objective, items, max_tokens=60)
    assert (whole - alone).abs().max() > 1e-3 * whole.abs().max()


def test_a_trained_head_as_well(tiny_model, pairs):
    """Full fine-tuning takes another backward through the output head."""
    policy = Policy.from_pretrained(tiny_model)
    for objective, name in ((SFT(), "sft"), (DPO("simpo"), "simpo")):
        items = encoded(objective, name, pairs, policy.tokenizer)
        _, want, _ = step(policy, objective, items)
        _, got, _ = step(policy, objective, items, max_tokens=60, layout="padded")
        assert (got - want).norm() <= 1e-6 * want.norm()
