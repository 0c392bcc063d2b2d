"""SFT: its loss and gradient against a plain forward pass of transformers and cross-entropy, one
dialogue at a time; against TRL; whole runs, and a run that was killed and resumed."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from prefopt.config import TrainConfig
from prefopt.data.dialogues import load_dialogues
from prefopt.data.encode import Encoded
from prefopt.data.encode_dialogues import encode_dialogues
from prefopt.data.packing import pack
from prefopt.data.records import Dialogue, Message, Pair, Ranking
from prefopt.data.sources import load_preferences
from prefopt.errors import InputError
from prefopt.evaluate import evaluate
from prefopt.nn.lora_config import LoraConfig
from prefopt.objectives.sft import SFT
from prefopt.policy import Policy
from prefopt.rundir import RunDir
from prefopt.step import optimizer_step
from prefopt.train import train


def dialogue(*contents, weight=1.0):
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], text) for i, text in enumerate(contents)]
    return Dialogue(turns, weight=weight)


DATA = [
    dialogue("Please tell me about it.", "I will gladly help.", "And more?", "The thing"),
    dialogue("A", "B", weight=2.0),
    Dialogue([], "Please tell me about the thing. I will gladly help."),
    dialogue("tell me", "I will help, gladly, about the thing", weight=0.5),
    dialogue("a", "b", "c", "d e f", "g h", "i will"),
]


class Norm(torch.nn.Module):
    """RMSNorm in the dtype of its input; the model's own rounds to float32 whatever that is."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def new_policy(folder, dtype=torch.float32, **options):
    torch.manual_seed(0)
    policy = Policy.from_pretrained(folder, dtype=dtype, **options)
    if dtype == torch.float64:
        policy.model.double()
        for module in list(policy.model.modules()):
            for name, child in list(module.named_children()):
                if hasattr(child, "variance_epsilon"):
                    setattr(module, name, Norm(child))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from where LoRA's gradients are 0
        for _, p in policy.trainable():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
    return policy


def encoded_of(policy, data=DATA, **options):
    return encode_dialogues(data, policy.tokenizer, max_length=128, **options)


def oracle(policy, items):
    """Mean of -log p times weight over all scored tokens: each dialogue by itself through
    transformers' own forward, its unscored tokens left out by cross_entropy."""
    total, count = 0.0, 0
    with policy.plain_attention():
        for item in items:
            ids = torch.from_numpy(np.concatenate([item.prompt, *item.responses])).long()
            labels = ids.clone()
            labels[: len(item.prompt)] = -100
            if item.scored is not None:
                labels[len(item.prompt) :][~torch.from_numpy(item.scored[0])] = -100
            logits = policy.model(ids[None], use_cache=False).logits[0, :-1]
            nll = F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            total, count = total + item.weight * nll, count + int((labels != -100).sum())
    return total / count, count


def step(policy, batches):
    """What optimizer_step takes of these batches: (mean loss, count, gradient by name)."""
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    stats = optimizer_step(policy, SFT(), batches, optimizer, max_norm=None)
    return stats.loss, stats.count, {n: p.grad.clone() for n, p in policy.trainable()}


def expected_of(policy, encoded):
    """(mean loss, count, gradient by name) of the oracle."""
    loss, count = oracle(policy, encoded)
    names, parameters = zip(*policy.trainable(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return loss.detach(), count, dict(zip(names, grads, strict=True))


def check(ours, theirs, bound):
    """Equal to so many parts of the loss, and of the largest gradient."""
    assert ours[1] == theirs[1] and abs(ours[0] - theirs[0]) <= bound * abs(theirs[0])
    scale = max(grad.abs().max() for grad in theirs[2].values())
    assert ours[2].keys() == theirs[2].keys() and scale > 0
    for name, grad in theirs[2].items():
        assert (ours[2][name] - grad).abs().max() <= bound * scale, name


# --- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora, dtype, bound",
    [
        (None, torch.float32, 1e-6),
        (LoraConfig(r=4), torch.float32, 1e-6),  # whose factors are float32 on any model
        (None, torch.float64, 1e-12),
    ],
)
def test_packed_equals_one_dialogue_at_a_time(tiny_model, lora, dtype, bound):
    policy = new_policy(tiny_model, dtype, lora=lora)
    encoded = encoded_of(policy)
    assert [item.weight for item in encoded] == [1.0, 2.0, 1.0, 0.5, 1.0]
    assert encoded[0].scored is not None and encoded[1].scored is None
    expected = expected_of(policy, encoded)
    assert len(list(pack(encoded, max_tokens=10_000))) == 1
    for layout, max_tokens in (("shared", 10_000), ("shared", 1), ("padded", 10_000)):
        batches = pack(encoded, max_tokens=max_tokens, layout=layout)
        check(step(policy, batches), expected, bound)


def test_all_tokens(tiny_model):
    policy = new_policy(tiny_model, torch.float64)
    encoded = encoded_of(policy, loss_on="all")
    tokens = sum(len(item.prompt) + len(item.responses[0]) for item in encoded)
    expected = expected_of(policy, encoded)
    assert expected[1] == tokens - len(encoded)
    check(step(policy, pack(encoded, max_tokens=10_000)), expected, 1e-12)
    assert (
        SFT("all").encode(DATA, policy.tokenizer, max_length=128, template="auto")[0].scored is None
    )


@settings(max_examples=15)
@given(
    st.permutations(range(len(DATA))), st.integers(1, 160), st.sampled_from(["shared", "padded"])
)
def test_order_and_split_change_nothing(tiny_model, order, max_tokens, layout):
    policy = new_policy(tiny_model)
    encoded = encoded_of(policy)
    expected = step(policy, pack(encoded, max_tokens=10_000))
    items = [encoded[i] for i in order]
    check(step(policy, pack(items, max_tokens=max_tokens, layout=layout)), expected, 1e-6)


def test_a_token_counts_the_same_in_a_long_answer(tiny_model):
    policy = new_policy(tiny_model, torch.float64)
    first, second = (encoded_of(policy, [DATA[i]]) for i in (1, 4))
    (a, n), (b, m) = (oracle(policy, items) for items in (first, second))
    both, count, _ = step(policy, pack([*first, *second], max_tokens=10_000))
    assert n != m and count == n + m
    assert both.item() == pytest.approx(((a * n + b * m) / (n + m)).item(), rel=1e-12)


# --- the objective -----------------------------------------------------------------------------


def test_what_it_takes():
    objective = SFT()
    assert (objective.needs_reference, objective.ends, objective.samples) == (False, False, True)
    with pytest.raises(InputError, match="loss_on is 'user'; it is one of assistant, all"):
        SFT("user")


def test_pairs_are_imitated_and_other_records_refused(tiny_model):
    tokenizer = Policy.from_pretrained(tiny_model).tokenizer
    sides = [Message("assistant", "yes")], [Message("assistant", "no")]
    pair = Pair([Message("user", "q")], *sides, weight=3.0)
    options = {"max_length": 64, "template": "auto"}
    (item,) = SFT().encode([pair], tokenizer, **options)
    (expected,) = encode_dialogues([dialogue("q", "yes")], tokenizer)
    assert item.responses[0].tolist() == expected.responses[0].tolist() and item.weight == 3.0
    bad = Ranking([Message("user", "q")], [*sides])
    with pytest.raises(InputError, match=r"record 1 is a Ranking.*load_dialogues"):
        SFT().encode([pair, bad], tokenizer, **options)


def test_perplexity(tiny_model):
    policy = new_policy(tiny_model, torch.float64)
    encoded = encoded_of(policy)
    with torch.no_grad():
        loss, count = oracle(policy, encoded)
        bare = [Encoded(i.prompt, i.responses, i.index, scored=i.scored) for i in encoded]
        unweighted, _ = oracle(policy, bare)
    result = evaluate(policy, pack(encoded, max_tokens=100), SFT())
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(unweighted), rel=1e-12)
    assert result.margins.shape == (0,) and json.loads(json.dumps(result.summary)) == result.summary
    summary = result.summary
    assert (summary["n"], summary["tokens"]) == (len(DATA), count)
    assert summary["perplexity_low"] < result.metrics["perplexity"] < summary["perplexity_high"]
    assert {"loss", "perplexity"} < summary.keys()


def evaluation_of(nll, tokens):
    from prefopt.objectives.sft import Likelihood

    read = Likelihood(torch.tensor(nll, dtype=torch.float64), torch.tensor(tokens))
    return SFT().evaluation(read, torch.ones(len(nll)), []).summary


def test_the_interval_is_over_dialogues_and_weighs_tokens():
    """Against all resamples of four dialogues, 4^4, counted out."""
    nll, tokens = [10.0, 30.0, 80.0, 150.0], [2, 30, 40, 100]
    draws = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    ratios = np.exp(np.array(nll)[draws].sum(1) / np.array(tokens)[draws].sum(1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    summary = evaluation_of(nll, tokens)
    assert summary["perplexity_low"] == pytest.approx(low, rel=0.02)
    assert summary["perplexity_high"] == pytest.approx(high, rel=0.02)
    equal = evaluation_of([2.0, 4.0], [1, 2])
    assert equal["perplexity_low"] == pytest.approx(equal["perplexity_high"], rel=1e-12)
    alone = evaluation_of([2.0], [1])
    assert alone["perplexity_low"] is alone["perplexity_high"] is None


# --- TRL ---------------------------------------------------------------------------------------

TRL_ROWS = {
    "completion": [
        {"prompt": "Please tell me.", "completion": " I will gladly help."},
        {"prompt": "About the thing", "completion": " The"},
    ],
    "assistant": [{"messages": [turn._asdict() for turn in DATA[i].turns]} for i in (0, 1, 4)],
}
GENERATION = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["completion", "assistant"])
def test_loss_and_gradient_are_trls(tiny_model, tmp_path, kind):
    """The trainer's own batch, collated by itself, and the same rows through load_dialogues."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM

    policy = new_policy(tiny_model)
    tokenizer = policy.tokenizer
    if kind == "assistant":
        tokenizer.chat_template = GENERATION
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.load_state_dict(policy.model.state_dict())
    rows = TRL_ROWS[kind]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=len(rows), max_length=128,
            use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            disable_tqdm=True, assistant_only_loss=kind == "assistant",
            completion_only_loss=kind == "completion" or None,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    (inputs,) = trainer.get_train_dataloader()
    labels = inputs["labels"]
    theirs = trainer.compute_loss(trainer.model, inputs)
    named = dict(trainer.model.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(theirs, list(named.values())), strict=True))

    template = "plain" if kind == "completion" else "chat"
    encoded = encode_dialogues(load_dialogues(rows), tokenizer, template=template)
    scored = int((labels[:, 1:] != -100).sum())
    ours = step(policy, pack(encoded, max_tokens=10_000))
    check(ours, (theirs.detach(), scored, expected), 1e-5)


# --- whole runs --------------------------------------------------------------------------------

TIMING = {"tokens_per_s", "flop_utilization", "elapsed_s", "peak_memory_bytes"}


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(RunDir, "report", lambda self: None)


def config(out, **changes):
    values = {
        "batch_size": 8, "micro_tokens": 1024, "max_length": 256, "lr": 3e-3, "max_steps": 12,
        "eval_fraction": 0.2, "samples": 0, "save_every": 0,
    }  # fmt: skip
    return TrainConfig(str(out), **{**values, **changes})


def rows_of(run):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run.metrics]


@pytest.mark.parametrize("lora", [None, LoraConfig(r=8)], ids=["full", "lora"])
def test_perplexity_of_held_out_dialogues_falls(stories_path, hh_path, tmp_path, no_report, lora):
    data = load_dialogues(hh_path)[:240]
    policy = Policy.from_pretrained(stories_path, lora=lora)
    run = train(SFT(), policy, data, config(tmp_path / "run", max_steps=24), quiet=True)
    before, after = (
        json.loads((run.dir / "evaluation.json").read_text())[k] for k in ("before", "after")
    )
    assert after["n"] == before["n"] >= 10
    assert after["perplexity"] < before["perplexity_low"]
    assert after["perplexity_high"] < before["perplexity"]
    assert run.metrics[-1]["eval_perplexity"] == pytest.approx(after["perplexity"])
    notes = json.loads((run.dir / "data_report.json").read_text())["encoding"]
    assert notes["train dialogues"] + notes["held-out dialogues"] <= 240
    assert notes["template"].startswith("transcript")
    again = evaluate(
        Policy.from_pretrained(run.dir),
        pack(encode_dialogues(data[:9], policy.tokenizer), max_tokens=4096),
        SFT(),
    )
    ours = evaluate(
        policy, pack(encode_dialogues(data[:9], policy.tokenizer), max_tokens=4096), SFT()
    )
    assert again.metrics == ours.metrics, "what was saved is what was trained"


def test_a_killed_run_goes_on_bitwise(tiny_model, tiny_rows, tmp_path, no_report):
    data = [*load_dialogues(tiny_rows), Dialogue([], "I will gladly help: rain is a fine thing.")]
    lora = LoraConfig(r=4, dropout=0.1)

    def run(out, **changes):
        changes = {"max_steps": 6, "save_every": 1, "keep": 99, "micro_tokens": 128, **changes}
        torch.manual_seed(0)
        policy = Policy.from_pretrained(tiny_model, lora=lora)
        return train(SFT(), policy, data, config(out, epochs=9, **changes), quiet=True)

    whole = run(tmp_path / "whole")
    assert rows_of(whole)[-1]["step"] == 6
    for at in (1, 4):
        out = tmp_path / f"killed-{at}"
        shutil.copytree(whole.dir, out)
        shutil.rmtree(out / "model")
        for folder in (out / "checkpoints").glob("step-*"):
            if int(folder.name[5:]) > at:
                shutil.rmtree(folder)
        (out / "checkpoints" / "latest").write_text(f"step-{at:06d}\n")
        torch.rand(3)
        resumed = run(out, resume="auto")
        assert rows_of(resumed) == rows_of(whole)
        ours, theirs = (
            load_file(r.dir / "model" / "adapter_model.safetensors") for r in (resumed, whole)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_run_on_pairs_holds_out_the_prompts_that_dpo_does(tiny_model, tiny_rows, tmp_path):
    from prefopt.data.split import split_pairs
    from prefopt.prepare import make_plan

    pairs = load_preferences(tiny_rows)
    policy = Policy.from_pretrained(tiny_model)
    plan = make_plan(SFT(), policy, pairs, config(tmp_path / "run", max_length=128))
    train_rows, held_out = split_pairs(pairs, 0.2)
    assert [plan.encoded[i].index for i in plan.train] == train_rows
    assert [plan.encoded[i].index for i in plan.held_out] == held_out
