"""One update of online reinforcement learning against a plain implementation on padded rows, and
what must not change it: how samples are packed, ordered, cut into micro-batches or padded."""

import dataclasses
import json
import shutil
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from prefopt import KLConfig, collect, online_loop
from prefopt.data.encoded import Encoded
from prefopt.experience import Experience
from prefopt.objectives.ppo import PPO, ValueLoss
from prefopt.roles import add_critic
from prefopt.rundir import RunDir
from prefopt.step import optimizer_step
from tests.online_case import Done, one_update, policy_of, write_case


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("online") / "base")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(RunDir, "report", lambda self: None)


# -- the objective, from its definition


def plain_logps(model, prompt, response, temperature, closed):
    """(log-probs of the tokens of one response, entropies, last hidden states before each), by
    transformers' own forward on this one sequence."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    out = model(ids, use_cache=False, output_hidden_states=True)
    start, n = len(prompt) - 1, len(response)
    logits = out.logits[0, start : start + n] / temperature
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    if closed:
        keep = torch.ones_like(logits, dtype=torch.bool)
        keep[: closed[0], list(closed[1])] = False
        logits = logits.masked_fill(~keep, float("-inf"))
    logps = logits.log_softmax(-1)[torch.arange(n), torch.as_tensor(response).long()]
    return logps, entropy, out.hidden_states[-1][0, start : start + n]


def padded(rows, fill=0.0):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def plain_loss(name, ratio, logp, adv, mask, lengths):
    """Unreduced [S, T], by the papers' formulas with their defaults."""
    if name == "ppo":
        return torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    if name == "ppo, higher and dual":
        loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.9, 1.28))
        return torch.where(adv < 0, torch.minimum(loss, -2.0 * adv), loss)
    if name == "gspo":
        mean = (ratio.log() * mask).sum(1, keepdim=True) / lengths[:, None]
        s = mean.detach().exp() * (logp - logp.detach()).exp()
        return torch.maximum(-adv * s, -adv * s.clamp(1 - 3e-4, 1 + 4e-4))
    if name == "cispo":
        return -ratio.detach().clamp(max=6.0) * adv * logp
    return -adv * logp


def plain_mean(x, mask, mode, denom):
    """As section 3 of the papers has them; responses of which nothing counts do not count."""
    x, lengths = x * mask, mask.sum(1)
    present = lengths > 0
    if mode == "token-mean":
        return x.sum() / mask.sum()
    if mode == "seq-mean-token-mean":
        return (x.sum(1)[present] / lengths[present]).mean()
    return x.sum() / present.sum() / (1 if mode == "seq-mean-token-sum" else denom)


def plain_objective(model, head, exp, *, loss, mode, setup, places=None):
    """The loss of one minibatch, from one forward per sequence and tables [S, T]."""
    flat = [(g.prompt, r) for g in exp.groups for r in g.responses]
    per_row = [plain_logps(model, *pair, setup["temperature"], setup["closed"]) for pair in flat]
    logp = padded([row[0] for row in per_row])
    mask = (exp.mask & exp.kept[:, None])[:, : logp.shape[1]]
    old = exp.columns["old"].to(logp)
    adv = exp.columns["advantages"].to(logp)
    ratio = torch.where(mask, logp - old, 0.0).exp()
    safe = mask.sum(1).clamp(min=1)
    found = plain_loss(loss, ratio, logp, adv, mask, safe)
    if setup["importance"]:
        weight = torch.where(mask, (old - exp.columns["sampled"].to(logp)).exp(), 0.0)
        if setup["importance"] == "truncate":
            weight = weight.clamp(max=1.1)
        elif setup["importance"] == "mask":
            weight = weight * (weight <= 1.1)
        else:
            whole = torch.where(mask, (old - exp.columns["sampled"].to(logp)), 0.0).sum(1).exp()
            weight = (whole * (whole <= 1.1))[:, None].expand_as(logp)
        found = found * weight
    if setup["kl"]:
        d = logp - exp.columns["ref"].to(logp)
        k = d**2 / 2 if setup["kl"] == "k2" else (-d).exp() - 1 + d
        found = found + 0.3 * ratio.detach() * k
    if setup["entropy"]:
        found = found - 0.2 * padded([row[1] for row in per_row])
    total = plain_mean(found, mask, mode, 8.0)
    if setup["values"]:
        values = padded([head(row[2]).squeeze(-1) for row in per_row])
        before, returns = (exp.columns[k].to(values) for k in ("values", "returns"))
        near = before + (values - before).clamp(-0.2, 0.2)
        wrong = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
        total = total + 0.7 * plain_mean(wrong, mask, mode, 8.0)
    return total


def some_experience(dtype=torch.float32, seed=0, stops=True) -> Experience:
    """Three prompts, two responses each, one of them not learnt from, with all columns at random;
    one response is the stop token alone, or a word where there are to be no stops."""
    rng = np.random.default_rng(seed)
    sizes = ((4, (8, 1)), (1, (5, 7)), (6, (3, 8)))
    draw = lambda n: rng.integers(3, 32, n).astype(np.int32)  # noqa: E731
    groups = [Encoded(draw(p), tuple(draw(n) for n in ns), i) for i, (p, ns) in enumerate(sizes)]
    groups[0].responses[1][:] = 2 if stops else 5
    if not stops:
        for group in groups:
            for response in group.responses:
                response[np.isin(response, (2, 9))] = 10
    lengths = torch.tensor([n for _, ns in sizes for n in ns])
    mask = torch.arange(8) < lengths[:, None]
    zeros = torch.zeros(6)
    kept = torch.tensor([True, True, True, False, True, True])
    generator = torch.Generator().manual_seed(seed)
    column = lambda scale: scale * torch.randn(6, 8, generator=generator, dtype=dtype) * mask  # noqa: E731
    columns = {"advantages": column(1.0), "values": column(0.5), "returns": column(0.8)}
    columns["noise"] = column(0.15)
    return Experience(groups, mask, kept, kept, zeros, zeros, zeros, zeros, columns)


def with_logps(exp, model, setup):
    """Old, reference and sampler's log-probs, near those of the model."""
    how = setup["temperature"], setup["closed"]
    flat = [(group.prompt, response) for group in exp.groups for response in group.responses]
    with torch.no_grad():
        logp = padded([plain_logps(model, *pair, *how)[0] for pair in flat])
    noise = exp.columns.pop("noise")
    exp.columns |= {"old": (logp + noise) * exp.mask, "ref": (logp - 2 * noise.flip(0)) * exp.mask}
    exp.columns |= {"sampled": (logp + noise + 0.8 * noise.roll(1, 0)) * exp.mask}
    return exp


HEADS = ("model.lm_head.weight", "value_head.weight", "value_head.bias")
SETUP = {"temperature": 1.0, "closed": None, "importance": None, "kl": None, "entropy": False,
         "values": False}  # fmt: skip
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum-const")
OPTIONS = {
    "ppo, higher and dual": ("ppo", {"clip": 0.1, "clip_high": 0.28, "dual_clip": 2.0}),
}  # fmt: skip
EXTRAS = {
    "temperature": {"temperature": 0.7},
    "min_new_tokens": {"closed": (3, (2, 9)), "temperature": 1.3},
    "k2": {"kl": "k2"},
    "k3": {"kl": "k3"},
    "entropy": {"entropy": True},
    "truncate": {"importance": "truncate"},
    "mask": {"importance": "mask"},
    "sequence-mask": {"importance": "sequence-mask"},
    "values": {"values": True},
    "all": {
        "temperature": 0.9,
        "kl": "k2",
        "entropy": True,
        "importance": "truncate",
        "values": True,
    },
}
CASES = [(loss, mode, "none") for loss, mode in product(
    ("ppo", "ppo, higher and dual", "gspo", "cispo", "reinforce"), MODES)]  # fmt: skip
CASES += [(loss, "seq-mean-token-mean", extra) for loss, extra in product(("ppo", "gspo"), EXTRAS)]
CASES += [("ppo", mode, "all") for mode in MODES if mode != "seq-mean-token-mean"]


@dataclasses.dataclass
class Plain:
    """transformers' model and a linear value head, in float64."""

    model: Any
    head: torch.nn.Linear

    def gradients(self) -> dict[str, torch.Tensor]:
        """By the names that a Policy has for them."""
        named = [(f"model.{name}", p) for name, p in self.model.named_parameters()]
        named += [(f"value_head.{name}", p) for name, p in self.head.named_parameters()]
        found = {name: p.grad for name, p in named if p.grad is not None}
        for _, p in named:
            p.grad = None
        return found


@pytest.fixture(scope="module")
def plain(base):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    head = torch.nn.Linear(32, 1, dtype=torch.float64)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
        head.bias.fill_(0.1)
    return Plain(model, head)


@pytest.fixture(scope="module")
def trunks(base, plain):
    """Policies of the same weights with a trunk's critic, by dtype and layout."""
    found = {}
    kinds = (torch.float64, "auto"), (torch.float32, "auto"), (torch.float32, "padded")
    for dtype, attention in kinds:
        policy = policy_of(base, None, dtype=dtype, attention=attention)
        add_critic(policy, kind="trunk")
        assert policy.value_head is not None
        policy.value_head.load_state_dict(plain.head.state_dict())
        found[dtype, attention] = policy
    return found


def of_step(policy, objective, batches):
    """(loss, gradients by name) of what optimizer_step would do, without moving anything."""
    parameters = dict(policy.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
    stats = optimizer_step(policy, objective, batches, optimizer, max_norm=0)
    return stats.loss, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


def furthest(ours, theirs, *names) -> float:
    """Largest difference of gradients, relative to the largest of all of them."""
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max().item() for g in theirs.values())
    chosen = [name for name in theirs if name in names or not names]
    return max((ours[n].double() - theirs[n]).abs().max().item() for n in chosen) / largest


def objective_of(loss, mode, setup):
    name, options = OPTIONS.get(loss, (loss, {}))
    options: Any = options
    return PPO(
        name, temperature=setup["temperature"], closed=setup["closed"], aggregation=mode, denom=8.0,
        kl_loss_kind=setup["kl"], beta=0.3, entropy_coef=0.2 if setup["entropy"] else 0.0,
        importance=setup["importance"] or "none", importance_cap=1.1,
        value_coef=0.7 if setup["values"] else None, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("loss", "mode", "extra"), CASES)
def test_the_objective_is_its_definition(plain, trunks, loss, mode, extra):
    setup = {**SETUP, **EXTRAS.get(extra, {})}
    exp = with_logps(some_experience(torch.float64, stops=not setup["closed"]), plain.model, setup)
    want = plain_objective(plain.model, plain.head, exp, loss=loss, mode=mode, setup=setup)
    want.backward()
    gradients = plain.gradients()
    policy = trunks[torch.float64, "auto"]
    for tokens in (1000, 1):  # all at once, one prompt at a time
        batches = list(exp.batches(range(3), policy, tokens))
        assert len(batches) == (1 if tokens > 1 else 3)
        got, ours = of_step(policy, objective_of(loss, mode, setup), batches)
        assert got.item() == pytest.approx(want.item(), rel=1e-12, abs=1e-13)
        assert furthest(ours, gradients, *HEADS) < 1e-12
        assert furthest(ours, gradients) < 1e-6  # transformers' norms compute in float32
    single = dataclasses.replace(exp, columns={k: v.float() for k, v in exp.columns.items()})
    if extra in ("none", "all"):
        for attention in ("auto", "padded"):
            policy = trunks[torch.float32, attention]
            batches = list(single.batches([2, 0, 1], policy, 40))
            got, ours = of_step(policy, objective_of(loss, mode, setup), batches)
            assert got.item() == pytest.approx(want.item(), rel=1e-6, abs=1e-6)
            assert furthest(ours, gradients) < 2e-6, attention


def test_the_loss_of_a_critic_of_its_own(plain, trunks):
    """Half the squared error, clipped, a mean over the tokens that are learnt from."""
    exp = with_logps(some_experience(torch.float64), plain.model, SETUP)
    flat = [(g.prompt, r) for g in exp.groups for r in g.responses]
    states = [plain_logps(plain.model, *pair, 1.0, None)[2] for pair in flat]
    for clip in (0.2, None):
        values = padded([plain.head(row).squeeze(-1) for row in states])
        old, returns = exp.columns["values"], exp.columns["returns"]
        near = old + (values - old).clamp(-clip, clip) if clip else values
        wrong = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
        mask = exp.mask & exp.kept[:, None]
        want = (wrong * mask).sum() / mask.sum()
        want.backward(retain_graph=True)
        gradients = plain.gradients()
        policy = trunks[torch.float64, "auto"]
        for tokens in (1000, 1):
            batches = list(exp.batches(range(3), policy, tokens))
            got, ours = of_step(policy, ValueLoss(clip), batches)
            assert got.item() == pytest.approx(want.item(), rel=1e-12)
            assert furthest(ours, gradients, "value_head.weight", "value_head.bias") < 1e-12
            assert furthest(ours, gradients) < 1e-6


def test_what_a_step_says_of_the_ratio(plain, trunks):
    """As counted on the padded rows, however the step is cut into micro-batches."""
    exp = with_logps(some_experience(torch.float64), plain.model, SETUP)
    flat = [(g.prompt, r) for g in exp.groups for r in g.responses]
    logp = padded([plain_logps(plain.model, *pair, 1.0, None)[0] for pair in flat]).detach()
    mask, columns = exp.mask & exp.kept[:, None], exp.columns
    log_ratio = (logp - columns["old"])[mask]
    adv, weight = columns["advantages"][mask], (columns["old"] - columns["sampled"])[mask].exp()
    want = {
        "tokens": mask.sum(), "policy/approxkl": (log_ratio.exp() - 1 - log_ratio).sum(),
        "policy/ratio": log_ratio.exp().sum(), "rollout/importance_clipped": (weight > 1.1).sum(),
        "policy/clipfrac_low": ((log_ratio.exp() < 0.95) & (adv < 0)).sum(),
        "policy/clipfrac_high": ((log_ratio.exp() > 1.05) & (adv > 0)).sum(),
    }  # fmt: skip
    want["policy/clipfrac"] = want["policy/clipfrac_low"] + want["policy/clipfrac_high"]
    assert want["policy/clipfrac_low"] > 0 < want["policy/clipfrac_high"]
    assert 0 < want["rollout/importance_clipped"] < mask.sum()
    policy = trunks[torch.float64, "auto"]
    objective = PPO("ppo", clip=0.05, importance="truncate", importance_cap=1.1)
    for tokens in (1000, 1):
        sums: dict[str, Any] = {}
        for batch in exp.batches(range(3), policy, tokens):
            _, _, found = objective(policy, batch)
            sums = {name: sums.get(name, 0) + value for name, value in found.items()}
        assert {name: sums[name].item() for name in want} == pytest.approx(
            {name: value.item() for name, value in want.items()}, rel=1e-9
        )
        extremes = objective.take_extremes()
        assert extremes["policy/ratio_max"] == pytest.approx(log_ratio.exp().max().item())
        assert extremes["policy/ratio_min"] == pytest.approx(log_ratio.exp().min().item())


# -- what must not change an update

# Adam divides a gradient by its own size; with an eps of 1e-5 what rounding leaves of a gradient
# near 0 would be as large a part of a step.
GAE = {"ppo_epochs": 2, "truncated": "bootstrap", "adam_eps": 1e-3}
GRPO = {
    "estimator": "grpo", "kl": KLConfig("k2", "loss", 0.1), "entropy_coef": 0.01, "ppo_epochs": 2,
    "truncated": "mask", "adam_eps": 1e-3,
}  # fmt: skip
TRUNK = {
    "critic": "trunk", "lora": None, "lr": 1e-3, "minibatches": 2, "temperature": 0.8,
    "adam_eps": 1e-3,
}  # fmt: skip
KINDS = {"gae": GAE, "grpo": GRPO, "trunk": TRUNK}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, base, tmp_path_factory):
    """(settings, what an update with them does)."""
    settings = KINDS[request.param]
    return settings, one_update(base, tmp_path_factory.mktemp("one") / "run", **settings)


def same_bits(one: Done, other: Done) -> bool:
    names = [name for name in one.exp.columns if name in other.exp.columns]
    columns = [(one.exp.columns[name], other.exp.columns[name]) for name in names]
    width = one.exp.mask.shape[1]
    return (
        one.weights.keys() == other.weights.keys()
        and all(torch.equal(one.weights[k], other.weights[k]) for k in one.weights)
        and one.exp.columns.keys() == other.exp.columns.keys()
        and all(torch.equal(a, b[:, :width]) for a, b in columns)
    )


def nearly(one: Done, other: Done, order=None) -> tuple[float, float]:
    """(largest difference of a column, of a weight), each relative to the largest value of its
    kind; the same tokens must have been sampled. ``order``: of the other's groups."""
    n, groups = one.exp.n, range(len(one.exp.groups))
    order = list(order or groups)
    rows = [place * n + i for place in order for i in range(n)]
    theirs = other.exp.columns
    assert torch.equal(one.exp.mask, other.exp.mask[rows])
    for place, group in enumerate(one.exp.groups):
        pairs = zip(group.responses, other.exp.groups[order[place]].responses, strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    assert one.exp.columns.keys() == theirs.keys()
    columns = max(
        ((a - theirs[name][rows]).abs().max() / a.abs().max().clamp(min=1e-3)).item()
        for name, a in one.exp.columns.items()
    )
    biggest = max(a.abs().max().item() for a in one.weights.values())
    moved = [(a - other.weights[name]).abs().max().item() for name, a in one.weights.items()]
    return columns, max(moved) / biggest


def test_the_case_is_a_case(kind):
    """All that could differ is there: columns, moved weights, several lengths, cut responses."""
    settings, done = kind
    wanted = {"sampled", "old", "ref", "advantages"}
    wanted |= {"values", "returns"} if settings is not GRPO else set()
    assert done.exp.columns.keys() == wanted
    assert 0 < done.exp.stopped.sum() < len(done.exp.stopped)
    assert len(set(done.exp.lengths.tolist())) > 1
    assert all(done.exp.columns[name].abs().sum() > 0 for name in wanted - {"values"})


def test_pad_width(kind, base, tmp_path, monkeypatch):
    """Columns behind the longest response change no bit."""
    settings, done = kind
    plainly = collect.from_samples

    def widened(ids, samples):
        exp = plainly(ids, samples)
        pad = torch.nn.functional.pad
        exp.columns["sampled"] = pad(exp.columns["sampled"], (0, 5))
        return dataclasses.replace(exp, mask=pad(exp.mask, (0, 5)))

    monkeypatch.setattr(collect, "from_samples", widened)
    wide = one_update(base, tmp_path / "run", **settings)
    assert wide.exp.mask.shape[1] == done.exp.mask.shape[1] + 5
    assert same_bits(done, wide)


@pytest.mark.parametrize(
    "changed",
    [{"micro_tokens": 2}, {"micro_tokens": 40}, {"slots": 1}, {"slots": 4},
     {"load": {"attention": "padded"}}, {"gradient_checkpointing": True}],
    ids=str,
)  # fmt: skip
def test_packing_slots_and_layout(kind, base, tmp_path, changed):
    """Padded rows instead of packed ones and shared prompts, too."""
    settings, done = kind
    columns, weights = nearly(done, one_update(base, tmp_path / "run", **settings, **changed))
    assert columns < 1e-6 and weights < 1e-6


def test_order_of_the_prompts(kind, base, tmp_path, monkeypatch):
    settings, done = kind
    if "minibatches" in settings:
        settings = {**settings, "minibatches": 1}
        done = one_update(base, tmp_path / "forward", **settings)
    straight = online_loop.update_groups
    turned = lambda *args: ((at, numbers[::-1]) for at, numbers in straight(*args))  # noqa: E731
    monkeypatch.setattr(online_loop, "update_groups", turned)
    other = one_update(base, tmp_path / "run", **settings)
    assert other.numbers == done.numbers[::-1]
    columns, weights = nearly(done, other, range(len(done.numbers))[::-1])
    assert columns < 1e-6 and weights < 1e-6


def test_pad_is_eos(kind, base, tmp_path):
    """A tokenizer that pads with its end of text: the same training to the bit, and the end of text
    is learnt."""
    settings, done = kind
    other = tmp_path / "base"
    shutil.copytree(base, other)
    file = other / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "</s>"}))
    assert policy_of(other).tokenizer.pad_token_id == 2
    assert same_bits(done, one_update(other, tmp_path / "run", **settings))


# -- where an update starts from


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("settings", [{}, {"minibatches": 2}, {"minibatches": 3, **GRPO}], ids=str)
def test_the_first_ratio_is_exactly_one(base, tmp_path, settings, layout):
    """In float32, of the first minibatch of the first pass, however it is packed; of the others it
    is not, for the policy has moved."""
    settings = {**settings, "temperature": 0.7, "min_new_tokens": 2, "load": {"attention": layout}}
    for tokens in (4096, 30):
        out = tmp_path / str(tokens)
        done = one_update(base, out, **settings, micro_tokens=tokens)
        assert done.row["policy/ratio_first"] == 0.0
        assert done.row["policy/ratio_max"] > 1.0 > done.row["policy/ratio_min"]


@pytest.mark.parametrize("kind_of", KINDS)
def test_the_kl_starts_at_zero_and_the_sampler_agrees(base, tmp_path, kind_of):
    """Captured log-probs are those of a forward over the whole sequence, at the temperature and
    with the stops that min_new_tokens rules out; the reference is the policy."""
    settings = {**KINDS[kind_of], "temperature": 0.7, "min_new_tokens": 3, "max_new_tokens": 6}
    done = one_update(base, tmp_path / "run", **settings)
    columns, exp = done.exp.columns, done.exp
    assert abs(done.row["objective/kl"]) < 1e-5 and done.row["objective/kl_k3"] < 1e-9
    assert (columns["sampled"] - columns["old"]).abs().max() < 1e-5
    assert (columns["sampled"] - columns["ref"]).abs().max() < 1e-5
    assert exp.lengths.min() >= 3 and exp.stopped.any()
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for place, group in enumerate(exp.groups):
        for i, response in enumerate(group.responses):
            with torch.no_grad():
                logps, *_ = plain_logps(model, group.prompt, response, 0.7, (3, (2, 9)))
            row = place * exp.n + i
            assert (logps - columns["sampled"][row][: len(logps)]).abs().max() < 1e-5
