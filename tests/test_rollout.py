"""The torch engine: what it captures is what training computes, and what it samples depends on
nothing but the weights, the parameters and the names of the noise."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from prefopt.data.encode import Encoded
from prefopt.data.packing import pack
from prefopt.errors import InputError
from prefopt.nn.lora import LoraConfig, add_lora
from prefopt.nn.quantize import quantize_model
from prefopt.policy import Policy
from prefopt.rollout import lean as lean_module
from prefopt.rollout import plain, slots, torch_engine
from prefopt.rollout.lean import lean
from prefopt.rollout.noise import uniforms
from prefopt.rollout.torch_engine import TorchEngine
from prefopt.rollout.types import SamplingParams
from tests.test_layouts import PADDED, SHARED, V, build, tokenizer

LEAN = ("Llama", "Qwen2", "Qwen3", "Mistral", "Granite")  # whose forward takes few operations
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, V, n).astype(np.int32) for n in (5, 1, 20, 9, 2, 13, 5)]
STOPS = (4, 9, 17, 33)
DRAW = SamplingParams(max_new_tokens=14, temperature=0.7, stop_ids=STOPS)


def policy_of(name="Llama", dtype=torch.float32, **options) -> Policy:
    return Policy(build(name, dtype), tokenizer(), base=name, **options)


@pytest.fixture(scope="module")
def llama() -> Policy:
    return policy_of()


def same(a, b, bits=True) -> bool:
    """The same samples; and the same log-probs, to the bit unless told otherwise."""
    pairs = [(s, t) for x, y in zip(a, b, strict=True) for s, t in zip(x, y, strict=True)]
    return all(
        np.array_equal(s.tokens, t.tokens)
        and s.finish == t.finish
        and (np.array_equal(s.logprobs, t.logprobs) if bits
             else np.abs(s.logprobs - t.logprobs).max() < 1e-5)
        for s, t in pairs
    )  # fmt: skip


@torch.no_grad()
def scored(policy, prompts, samples, temperature) -> list[np.ndarray]:
    """What training computes for them, sample by sample."""
    found = []
    for i, (prompt, group) in enumerate(zip(prompts, samples, strict=True)):
        encoded = Encoded(prompt=prompt, responses=tuple(s.tokens for s in group), index=i)
        (batch,) = pack([encoded], max_tokens=1 << 16, layout=policy.layout)
        logps = policy(batch, temperature=temperature)
        found += logps.split([len(s.tokens) for s in group])
    return [x.numpy() for x in found]


def gap(policy, prompts, samples, temperature) -> float:
    """The largest difference between captured log-probs and training's."""
    wanted = scored(policy, prompts, samples, temperature)
    got = [s.logprobs for group in samples for s in group]
    return max(np.abs(a - b).max() for a, b in zip(got, wanted, strict=True))


# -- what is captured


@pytest.mark.parametrize("name", [*SHARED, *PADDED])
def test_captured_log_probs_are_those_of_training(name):
    """With more responses than slots, prompts of many lengths, and stops."""
    policy = policy_of(name)
    samples = TorchEngine(policy, slots=8).generate(PROMPTS, DRAW, n=3, seed=1)
    lengths = {len(s.tokens) for group in samples for s in group}
    assert len(lengths) > 3 and max(lengths) == DRAW.max_new_tokens
    for group in samples:
        for s in group:
            assert s.tokens.dtype == np.int32 and s.logprobs.dtype == np.float32
            ends = np.isin(s.tokens, STOPS)
            assert not ends[:-1].any() and (s.finish == "stop") == ends[-1]
    assert gap(policy, PROMPTS, samples, 0.7) < 1e-5
    assert gap(policy, PROMPTS, samples, 1.0) > 0.1


@pytest.mark.parametrize("name", SHARED)
def test_slots_and_the_models_own_cache_agree(name):
    """Two ways that share the sampler only."""
    policy = policy_of(name)
    got = TorchEngine(policy, slots=8).generate(PROMPTS, DRAW, n=2, seed=3)
    policy.attend(slots.register())
    assert (lean(policy, 64) is not None) == (name in LEAN)
    own = policy_of(name, attention="padded")
    assert same(got, TorchEngine(own).generate(PROMPTS, DRAW, n=2, seed=3), bits=False)


@pytest.mark.parametrize("name", [*SHARED, "Bloom", "Mamba", "RWKV", "LFM2"])
def test_greedy_is_what_transformers_generates(name):
    policy = policy_of(name)
    model = copy.deepcopy(policy.model)
    model.set_attn_implementation(policy._own_attention)
    params = SamplingParams(max_new_tokens=10, temperature=0, stop_ids=())
    samples = TorchEngine(policy).generate(PROMPTS, params)
    for prompt, (sample,) in zip(PROMPTS, samples, strict=True):
        ids = torch.from_numpy(prompt).long()[None]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert sample.tokens.tolist() == out[0, len(prompt) :].tolist()
    assert gap(policy, PROMPTS, samples, 1.0) < 1e-5


ADAPTERS = {
    "plain": LoraConfig(r=4, targets="all-linear"),
    "dora": LoraConfig(r=4, use_dora=True),
    "head": LoraConfig(r=4, targets=["v_proj", "lm_head"]),
}


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4-bit"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_and_4_bit(kind, quantized):
    """The adapter that is active now, or none, on whatever the base is stored as."""
    model = build("Llama")
    if quantized:
        quantize_model(model)
    add_lora(model, ADAPTERS[kind], "default")
    policy = Policy(model, tokenizer(), base="Llama")
    policy.adapter = "default"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    engine = TorchEngine(policy)
    adapted = engine.generate(PROMPTS, DRAW, n=2)
    assert gap(policy, PROMPTS, adapted, 0.7) < 1e-5
    with policy.reference():
        base = engine.generate(PROMPTS, DRAW, n=2)
        assert gap(policy, PROMPTS, base, 0.7) < 1e-5
    assert not same(adapted, base)
    assert same(adapted, engine.generate(PROMPTS, DRAW, n=2))


@pytest.mark.parametrize("masters", [False, True], ids=["bfloat16", "masters"])
def test_bfloat16(masters):
    """As close to training as training in one layout is to training in the other."""
    policy = policy_of(dtype=torch.bfloat16)
    padded = policy_of(dtype=torch.bfloat16, attention="padded")
    if masters:
        policy.use_float32_masters()
        padded.use_float32_masters()
    samples = TorchEngine(policy).generate(PROMPTS, DRAW, n=8)
    got = np.concatenate([s.logprobs for group in samples for s in group])
    ours, theirs = (np.concatenate(scored(p, PROMPTS, samples, 0.7)) for p in (policy, padded))
    noise = np.abs(ours - theirs).mean()
    assert 0 < np.abs(got - ours).mean() < 2 * noise < 0.1


def test_weights_that_moved_are_the_ones_that_sample(llama):
    policy = policy_of()
    engine = TorchEngine(policy)
    before = engine.generate(PROMPTS, DRAW)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    after = engine.generate(PROMPTS, DRAW)
    assert not same(before, after) and gap(policy, PROMPTS, after, 0.7) < 1e-5


# -- what it depends on


def test_nothing_else_decides_what_is_sampled(llama):
    """Not the number of slots, the order, the other prompts, nor how n is split; to the bit."""
    want = TorchEngine(llama).generate(PROMPTS, DRAW, n=8, seed=5)
    for count in (1, 9, 24):
        assert same(TorchEngine(llama, slots=count).generate(PROMPTS, DRAW, n=8, seed=5), want)
    order = [4, 0, 6, 2, 5, 1, 3]
    moved = [PROMPTS[i] for i in order]
    got = TorchEngine(llama, slots=16).generate(moved, DRAW, n=8, seed=5, keys=order)
    assert same(got, [want[i] for i in order])
    alone = TorchEngine(llama).generate([PROMPTS[3]], DRAW, n=8, seed=5, keys=[3])
    assert same(alone, [want[3]])
    half = TorchEngine(llama).generate(PROMPTS, DRAW, n=4, seed=5)
    assert same(half, [group[:4] for group in want])
    other = TorchEngine(llama).generate(PROMPTS, DRAW, n=8, seed=6)
    assert not any(same([a], [b]) for a, b in zip(other, want, strict=True))


def test_the_padding_token_and_the_global_generator_are_irrelevant(llama):
    want = TorchEngine(llama).generate(PROMPTS, DRAW, seed=5)
    policy = policy_of()
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    policy.model.config.pad_token_id = policy.model.generation_config.pad_token_id = 2
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert same(TorchEngine(policy).generate(PROMPTS, DRAW, seed=5), want)
    assert torch.equal(torch.get_rng_state(), state)


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """In standard deviations, words with few expected counts taken together."""
    expected = p * counts.sum()
    rare = expected < 5
    c, e = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    c, e = (c, e) if e[-1] >= 5 else (c[:-1], e[:-1])
    return (((c - e) ** 2 / e).sum() - (len(c) - 1)) / np.sqrt(2 * (len(c) - 1))


@pytest.mark.parametrize("name", ["Llama", "Bloom"])
def test_samples_are_distributed_as_the_model_says(name):
    """Of the first token, and of the second after each of the first."""
    policy, params = policy_of(name), replace(DRAW, max_new_tokens=2, temperature=1.5, stop_ids=())
    (samples,) = TorchEngine(policy, slots=256).generate([PROMPTS[0]], params, n=6000, seed=11)
    tokens = np.array([s.tokens for s in samples])
    model = policy.model
    model.set_attn_implementation(policy._own_attention)

    def probabilities(*new):
        ids = torch.tensor([[*PROMPTS[0].tolist(), *new]])
        with torch.no_grad():
            return (model(ids).logits[0, -1].double() / 1.5).softmax(-1).numpy()

    assert abs(chi_square(np.bincount(tokens[:, 0], minlength=V), probabilities())) < 4
    first = np.bincount(tokens[:, 0], minlength=V).argmax()
    second = np.bincount(tokens[tokens[:, 0] == first, 1], minlength=V)
    assert abs(chi_square(second, probabilities(int(first)))) < 4
    at_1 = probabilities() ** 1.5 / (probabilities() ** 1.5).sum()
    assert chi_square(np.bincount(tokens[:, 0], minlength=V), at_1) > 20  # it can fail


def test_tokens_are_those_of_the_inverse_cdf(llama):
    """By the definition, in float64, without a cache."""
    samples = TorchEngine(llama).generate(PROMPTS, DRAW, n=2, seed=9, keys=range(10, 17))
    llama.attend(llama._own_attention)
    for i, prompt in enumerate(PROMPTS):
        for j in range(2):
            ids, noise = prompt.tolist(), uniforms(9, 10 + i, j, DRAW.max_new_tokens)
            for token, u in zip(samples[i][j].tokens, noise, strict=False):
                with torch.no_grad():
                    logits = llama.model(torch.tensor([ids])).logits[0, -1].double()
                edges = (logits / 0.7).softmax(-1).cumsum(0)
                assert token == int((edges > u).nonzero()[0])
                ids.append(int(token))


def test_top_p_and_top_k(llama):
    """Only the likeliest are drawn; the log-probs stay those of the whole distribution."""
    for how in ({"top_k": 3}, {"top_p": 0.4}, {"top_k": 5, "top_p": 0.7}):
        params = replace(DRAW, temperature=1.3, **how)
        samples = TorchEngine(llama).generate(PROMPTS, params, n=3, seed=2)
        assert gap(llama, PROMPTS, samples, 1.3) < 1e-5
        llama.attend(llama._own_attention)
        for prompt, group in zip(PROMPTS, samples, strict=True):
            for s in group:
                ids = torch.from_numpy(np.concatenate([prompt, s.tokens])).long()[None]
                with torch.no_grad():
                    p = (llama.model(ids).logits[0, len(prompt) - 1 : -1] / 1.3).softmax(-1)
                own = p.gather(1, ids[0, len(prompt) :, None])
                above = p.where(p > own, 0)
                assert ((above > 0).sum(1) < params.top_k).all() or not params.top_k
                assert (above.sum(1) < params.top_p).all()
    one = TorchEngine(llama).generate(PROMPTS, replace(DRAW, top_k=1), seed=2)
    greedy = TorchEngine(llama).generate(PROMPTS, replace(DRAW, temperature=0), seed=2)
    assert all(np.array_equal(a[0].tokens, b[0].tokens) for a, b in zip(one, greedy, strict=True))


# -- when a response ends


def test_the_least_and_the_most_tokens(llama):
    """Before the least, stop tokens have no probability, and the rest has all of it."""
    params = replace(DRAW, min_new_tokens=6, max_new_tokens=8)
    samples = TorchEngine(llama).generate(PROMPTS, params, n=6, seed=4)
    lengths = [len(s.tokens) for group in samples for s in group]
    assert min(lengths) >= 6 and {6, 7, 8} >= set(lengths) and len(set(lengths)) > 1
    llama.attend(llama._own_attention)
    for prompt, group in zip(PROMPTS, samples, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, group[0].tokens])).long()[None]
        with torch.no_grad():
            z = llama.model(ids).logits[0, len(prompt) - 1 : -1] / 0.7
        z[:6, list(STOPS)] = -torch.inf
        want = z.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert np.abs(group[0].logprobs - want.numpy()).max() < 1e-5


def test_stop_texts(llama):
    """The token that completes the text is the last; texts and ids may both be given."""
    free = TorchEngine(llama).generate(PROMPTS, replace(DRAW, stop_ids=()), n=2, seed=1)
    words = [[f"w{t}" for t in s.tokens] for group in free for s in group]
    stop = (" ".join(words[0][3:5]), words[1][6])
    got = TorchEngine(llama).generate(PROMPTS, replace(DRAW, stop_ids=(), stop=stop), n=2, seed=1)
    for whole, s in zip(words, (s for group in got for s in group), strict=True):
        ends = [i for i in range(len(whole)) if any(x in " ".join(whole[: i + 1]) for x in stop)]
        assert s.finish == ("stop" if ends else "length")
        assert len(s.tokens) == (ends[0] + 1 if ends else DRAW.max_new_tokens)
    assert len(got[0][0].tokens) <= 5


def test_what_the_model_and_its_tokenizer_stop_at():
    policy = policy_of()
    policy.model.generation_config.eos_token_id = [4, 9]
    policy.tokenizer.eos_token = "w17"
    got = TorchEngine(policy).generate(PROMPTS, replace(DRAW, stop_ids=None), n=3, seed=1)
    want = TorchEngine(policy).generate(PROMPTS, replace(DRAW, stop_ids=(4, 9, 17)), n=3, seed=1)
    assert same(got, want) and any(s.finish == "stop" for group in got for s in group)


# -- slots


def test_slots_grow_and_are_handed_on(llama, monkeypatch):
    """Many long responses through few slots, each prompt read once, no slot idle."""
    seen = []
    forward = torch_engine._forward

    def watched(read, cache, drafts, prompts, device):
        seen.append((drafts.live, [len(p) for p in prompts], cache.places))
        return forward(read, cache, drafts, prompts, device)

    monkeypatch.setattr(torch_engine, "_forward", watched)
    params = replace(DRAW, max_new_tokens=200, stop_ids=(4,))
    samples = TorchEngine(llama, slots=8).generate(PROMPTS, params, n=5, seed=8)
    assert gap(llama, PROMPTS, samples, 0.7) < 1e-5
    live, read, places = zip(*seen, strict=True)
    assert [n for new in read for n in new] == [len(p) for p in PROMPTS]
    assert places[-1] > places[0]
    tokens = sum(len(s.tokens) for group in samples for s in group)
    assert sum(live) == tokens, "work was done for a response that had ended"
    full = [count for count, prompts in zip(live, read, strict=True)][1:]
    drain = next(i for i, count in enumerate(full) if count < 8)
    assert sum(full[:drain]) > 0.5 * tokens and sorted(full[drain:], reverse=True) == full[drain:]


def test_long_prompts_are_read_a_few_at_a_time(llama, monkeypatch):
    want = TorchEngine(llama).generate(PROMPTS, DRAW, n=2, seed=1)
    monkeypatch.setattr(torch_engine, "PROMPT_TOKENS", 10)
    assert same(TorchEngine(llama).generate(PROMPTS, DRAW, n=2, seed=1), want)


def test_large_models_go_through_their_modules(llama, monkeypatch):
    want = TorchEngine(llama).generate(PROMPTS, DRAW, n=2, seed=1)
    monkeypatch.setattr(lean_module, "MOST_BYTES", 0)
    got = TorchEngine(llama).generate(PROMPTS, DRAW, n=2, seed=1)
    assert same(got, want, bits=False) and not same(got, want)


def test_a_model_that_only_looks_like_a_llama_is_found_out():
    policy = policy_of("Granite")
    for config in (policy.model.config, policy.model.model.config):
        config.residual_multiplier = 0.5
    for layer in policy.model.model.layers:
        layer.residual_multiplier = 0.5
    policy.attend(slots.register())
    assert lean_module._fits(policy, policy.model.model) and lean(policy, 64) is None
    samples = TorchEngine(policy).generate(PROMPTS, DRAW)
    assert gap(policy, PROMPTS, samples, 0.7) < 1e-5


def test_how_a_cache_is_trusted():
    """RWKV's in transformers is wrong for two rows; one that is wrong for one is not used."""
    assert plain._how(policy_of("Bloom"), 16) == plain.How(16, True)
    assert plain._how(policy_of("RWKV"), 16) == plain.How(1, True)
    policy = policy_of("Mamba")
    want = TorchEngine(policy).generate(PROMPTS, DRAW, n=2)
    forward = policy.model.backbone.forward

    def forgetful(*args, cache_params=None, **kwargs):
        return forward(*args, **kwargs)

    policy.model.backbone.forward = forgetful
    assert plain._how(policy, 16) == plain.How(16, False)
    assert same(TorchEngine(policy).generate(PROMPTS, DRAW, n=2), want, bits=False)


# -- as callers see it


class Stop(BaseException):
    pass


@pytest.mark.parametrize("name", ["Llama", "Mamba"])
def test_interrupted_it_leaves_everything_as_it_was(name):
    policy = policy_of(name).train()
    attention, counts = policy.model.config._attn_implementation, []

    def on_sample(count):
        counts.append(count)
        if count == 5:
            raise Stop

    with pytest.raises(Stop):
        TorchEngine(policy).generate(PROMPTS, DRAW, n=2, on_sample=on_sample)
    assert counts == [1, 2, 3, 4, 5]
    assert policy.training and policy.model.config._attn_implementation == attention
    done = []
    samples = TorchEngine(policy).generate(PROMPTS, DRAW, n=2, on_sample=done.append)
    assert done == [*range(1, 15)] and gap(policy.eval(), PROMPTS, samples, 0.7) < 1e-5
    assert all(p.grad is None and not p.is_inference() for p in policy.parameters())


def test_policy_generate(llama):
    """The same engine, with text around it."""
    texts = [" ".join(f"w{t}" for t in prompt) for prompt in PROMPTS]
    kwargs = {"max_new_tokens": 6, "temperature": 0.7, "seed": 3, "template": "plain"}
    flat = llama.generate(texts, n=3, **kwargs)
    samples = TorchEngine(llama).generate(
        PROMPTS, replace(DRAW, max_new_tokens=6, stop_ids=None), n=3, seed=3
    )
    for got, s in zip(flat, (s for group in samples for s in group), strict=True):
        words = [f"w{t}" for t in s.tokens]
        words = words[:-1] if s.finish == "stop" else words
        shown = [word for word in words if word not in ("w0", "w1", "w2")]  # these are special
        assert (got.text.split(), got.finish, got.tokens) == (shown, s.finish, len(words))
    word = flat[0].text.split()[2]
    cut = llama.generate(texts[:1], stop=word, **kwargs)[0]
    assert cut.finish == "stop" and cut.text == flat[0].text[: flat[0].text.index(word)]
    assert llama.generate(texts, batch_size=1, n=3, **kwargs) == flat
    assert llama.generate([], n=3) == []
    least = llama.generate(texts, min_new_tokens=6, top_k=9, top_p=0.9, **kwargs)
    assert {g.tokens for g in least} == {6}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"prompts": [PROMPTS[0], PROMPTS[0][:0]]}, "Prompt 1 is empty"),
        ({"n": 0}, "n is 0"),
        ({"keys": [1, 2]}, "2 keys for 7 prompts"),
        ({"params": replace(DRAW, max_new_tokens=240)}, "Prompt 2 has 20 tokens.* context of 256"),
    ],
)
def test_what_cannot_be_asked_for(llama, given, reason):
    given = {"prompts": PROMPTS, "params": DRAW} | given
    with pytest.raises(InputError, match=reason):
        TorchEngine(llama).generate(**given)


def test_slots_below_one(llama):
    with pytest.raises(InputError, match="slots is 0"):
        TorchEngine(llama, slots=0)


def test_stories(stories_path):
    """A trained model and real words: it tells a story, and what is captured is as close to
    training as training in one layout is to training in the other."""
    policy = Policy.from_pretrained(stories_path)
    (answer,) = policy.generate(["Once upon a time"], max_new_tokens=40, template="plain")
    assert "there was" in answer.text or "named" in answer.text
    starts = ("Once upon a time", "One day, Lily", "Tom and his dog", "The sun")
    prompts = [np.array([1, *policy.tokenizer(t, add_special_tokens=False)["input_ids"]], np.int32)
               for t in starts]  # fmt: skip
    params = SamplingParams(max_new_tokens=100)
    samples = TorchEngine(policy, slots=16).generate(prompts, params, n=8)
    padded = Policy.from_pretrained(stories_path, attention="padded")
    ours, theirs = (np.concatenate(scored(p, prompts, samples, 1.0)) for p in (policy, padded))
    got = np.concatenate([s.logprobs for group in samples for s in group])
    assert np.abs(got - ours).max() < 1.5 * np.abs(ours - theirs).max() < 3e-5
    assert np.abs(got - ours).mean() < 1.5 * np.abs(ours - theirs).mean()
