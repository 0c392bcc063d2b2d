"""What must hold for any input: known values, mirrors, directions, what a loss does not look at."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt import LOSSES, PairLogps, losses

LN2 = math.log(2)
WITH_REFERENCE = sorted(set(LOSSES) - losses.REFERENCE_FREE)
PAIRWISE = sorted(set(LOSSES) - losses.WHOLE_BATCH)
logps, betas = st.floats(-300, -0.01), st.floats(1e-2, 5)
lengths, smoothings = st.integers(1, 200), st.floats(0, 0.45)
few = settings(max_examples=30)


@st.composite
def batches(draw: st.DrawFn, size: int | None = None) -> PairLogps:
    """Pairs in float64, with reference log-probs near those of the policy."""
    count = draw(st.integers(1, 6)) if size is None else size
    rows = st.lists(logps, min_size=count, max_size=count)
    a, b, ra, rb = (torch.tensor(draw(rows), dtype=torch.float64) for _ in range(4))
    sizes = st.lists(lengths, min_size=count, max_size=count)
    na, nb = (torch.tensor(draw(sizes)) for _ in range(2))
    return PairLogps(a, b, a + ra / 30, b + rb / 30, na, nb)


def swapped(p: PairLogps) -> PairLogps:
    return PairLogps(
        p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.rejected_len, p.chosen_len
    )


def ratios(p: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    return p.chosen - p.ref_chosen, p.rejected - p.ref_rejected


def close(got, want, bound=1e-10) -> None:
    torch.testing.assert_close(
        got, torch.as_tensor(want, dtype=got.dtype).expand_as(got), rtol=bound, atol=bound
    )


# -- where the policy is its reference

AT_REFERENCE = {
    "dpo": lambda beta: LN2,
    "robust": lambda beta: LN2,
    "ipo": lambda beta: 1 / (4 * beta**2),
    "hinge": lambda beta: 1.0,
    "exo_pair": lambda beta: -LN2 - math.log(1e-3 * (1 - 1e-3)) / 2,
    "nca_pair": lambda beta: 2 * LN2,
    "bco_pair": lambda beta: 2 * LN2,
    "sppo_hard": lambda beta: 1 / (2 * beta**2),
    "aot": lambda beta: LN2,
    "aot_unpaired": lambda beta: LN2,
    "apo_zero": lambda beta: 1.0,
    "apo_down": lambda beta: 1.0,
    "discopop": lambda beta: (1 + LN2) / 2,
    "sigmoid_norm": lambda beta: LN2,
}


@pytest.mark.parametrize("name", WITH_REFERENCE)
@few
@given(p=batches(), beta=betas)
def test_a_policy_that_is_its_reference_loses_a_known_amount(name, p, beta):
    p = p._replace(ref_chosen=p.chosen, ref_rejected=p.rejected)
    close(LOSSES[name](p, beta=beta), AT_REFERENCE[name](beta), 1e-14)


@few
@given(p=batches(), beta=betas, smoothing=smoothings, gamma=st.floats(0, 3))
def test_equal_responses_without_a_reference(p, beta, smoothing, gamma):
    p = p._replace(rejected=p.chosen, rejected_len=p.chosen_len)
    nll = -p.chosen / p.chosen_len
    close(losses.sft(p), nll)
    close(losses.cpo(p, beta=beta, alpha=0.3, label_smoothing=smoothing), LN2 + 0.3 * nll)
    close(losses.orpo(p, beta=beta), beta * LN2 + nll)
    close(losses.simpo(p, beta=beta, gamma=gamma), math.log1p(math.exp(gamma)))


# -- chosen and rejected swapped: what loss(p) - loss(swapped p) is


def odds(logp, length):
    q = (logp / length).exp()
    return (q / (1 - q)).log()


def mirror(name, p, beta, e):
    (up, down), (a, b) = ratios(p), (p.chosen / p.chosen_len, p.rejected / p.rejected_len)
    x = beta * (up - down)
    return {
        "dpo": -(1 - 2 * e) * x,
        "robust": -x / (1 - 2 * e),
        "ipo": -2 * (up - down) / beta,
        "hinge": torch.relu(1 - x) - torch.relu(1 + x),
        "exo_pair": torch.tanh(x / 2) * math.log(1e-3 / (1 - 1e-3)),
        "nca_pair": F.logsigmoid(beta * down) - F.logsigmoid(beta * up),
        "bco_pair": -x,
        "sppo_hard": -2 * (up - down) / beta,
        "apo_zero": 2 * (torch.sigmoid(beta * down) - torch.sigmoid(beta * up)),
        "apo_down": torch.sigmoid(beta * up) - torch.sigmoid(beta * down) - torch.tanh(x / 2),
        "sigmoid_norm": -beta * (up / p.chosen_len - down / p.rejected_len),
        "sft": b - a,
        "simpo": -(1 - 2 * e) * beta * (a - b),
        "cpo": -(1 - 2 * e) * beta * (p.chosen - p.rejected) + b - a,
        "orpo": b - a - beta * (odds(p.chosen, p.chosen_len) - odds(p.rejected, p.rejected_len)),
    }[name]


SMOOTHED = {"dpo", "robust", "simpo", "cpo"}


@pytest.mark.parametrize("name", sorted(set(PAIRWISE) - {"discopop"}))
@few
@given(p=batches(), beta=betas, e=smoothings)
def test_swapping_the_responses_mirrors_the_loss(name, p, beta, e):
    options = {} if name == "sft" else {"beta": beta}
    options |= {"label_smoothing": e} if name in SMOOTHED else {}
    options |= {"gamma": 0.0} if name == "simpo" else {}
    difference = LOSSES[name](p, **options) - LOSSES[name](swapped(p), **options)
    close(difference, mirror(name, p, beta, e), 1e-7)


@given(p=batches(), beta=betas, e=smoothings)
def test_smoothing_is_the_swapped_pair_with_its_probability(p, beta, e):
    there, back = losses.dpo(p, beta=beta), losses.dpo(swapped(p), beta=beta)
    close(losses.dpo(p, beta=beta, label_smoothing=e), (1 - e) * there + e * back)
    # robust is what has dpo for its mean when labels flip with probability e
    straight = losses.robust(p, beta=beta, label_smoothing=e)
    flipped = losses.robust(swapped(p), beta=beta, label_smoothing=e)
    close((1 - e) * straight + e * flipped, there, 1e-8)


# -- directions

FALLS_WITH_CHOSEN = {
    *("dpo", "robust", "hinge", "bco_pair", "aot", "aot_unpaired", "apo_zero", "sigmoid_norm"),
    *("sft", "simpo", "cpo", "orpo"),
}
RISES_WITH_REJECTED = FALLS_WITH_CHOSEN - {"sft"} | {"nca_pair", "apo_down"}


@pytest.mark.parametrize("name", sorted(FALLS_WITH_CHOSEN | RISES_WITH_REJECTED))
@few
@given(p=batches(), step=st.floats(1e-3, 100), closer=st.floats(0, 1))
def test_better_chosen_and_worse_rejected_never_lose_more(name, p, step, closer):
    before = LOSSES[name](p)
    if name in FALLS_WITH_CHOSEN:
        raised = p.chosen * closer  # to a log-prob of 0
        assert (LOSSES[name](p._replace(chosen=raised)) <= before + 1e-12).all()
    if name in RISES_WITH_REJECTED:
        assert (LOSSES[name](p._replace(rejected=p.rejected - step)) <= before + 1e-12).all()


def best(loss, **at) -> float:
    """The log-ratio of the chosen response, on a grid of 1/1000, at which a loss is smallest."""
    grid = torch.arange(-20000, 20001, dtype=torch.float64) / 1000
    zero, one = torch.zeros_like(grid), torch.ones_like(grid)
    return grid[loss(PairLogps(grid, zero, zero, zero, one, one), **at).argmin()].item()


def test_the_minima_are_where_the_papers_put_them():
    assert best(losses.ipo, beta=0.1) == pytest.approx(5)
    assert best(losses.sppo_hard, beta=0.1) == pytest.approx(5)
    for loss in (losses.dpo, losses.exo_pair):
        found = best(loss, beta=0.5, label_smoothing=0.1)
        assert found == pytest.approx(math.log(9) / 0.5, abs=1e-3)
    # nca: s(beta r) = 2/3, which keeps the chosen response from falling
    assert best(losses.nca_pair, beta=0.5) == pytest.approx(LN2 / 0.5, abs=1e-3)


@given(p=batches())
def test_no_loss_is_below_zero_without_label_smoothing(p):
    for name in set(LOSSES) - {"exo_pair"}:
        assert (LOSSES[name](p) >= 0).all(), name
    assert (losses.exo_pair(p) >= -1e-12).all()  # a KL divergence


# -- what a loss does not look at


def moved(p: PairLogps, chosen, rejected) -> PairLogps:
    """A constant added to policy and reference."""
    return p._replace(
        chosen=p.chosen + chosen,
        rejected=p.rejected + rejected,
        ref_chosen=p.ref_chosen + chosen,
        ref_rejected=p.ref_rejected + rejected,
    )


@pytest.mark.parametrize("name", WITH_REFERENCE)
@few
@given(p=batches(), chosen=st.floats(-50, 50), rejected=st.floats(-50, 50))
def test_a_shift_of_policy_and_reference_changes_nothing(name, p, chosen, rejected):
    close(LOSSES[name](moved(p, chosen, rejected)), LOSSES[name](p), 1e-9)


@pytest.mark.parametrize("name", sorted(LOSSES))
@few
@given(p=batches(size=3), other=logps)
def test_reference_free_losses_and_no_others_ignore_the_reference(name, p, other):
    four = [x.clone().requires_grad_() for x in p[:4]]
    given_p = PairLogps(four[0], four[1], four[2], four[3], p.chosen_len, p.rejected_len)
    loss = LOSSES[name](given_p)
    grads = torch.autograd.grad(loss.sum(), four[2:], allow_unused=True)
    changed = LOSSES[name](p._replace(ref_chosen=p.ref_chosen + 3, ref_rejected=p.ref_rejected - 2))
    if name in losses.REFERENCE_FREE:
        assert grads == (None, None) and torch.equal(changed, loss)
    else:
        assert None not in grads and not torch.equal(changed, loss)


@pytest.mark.parametrize("name", PAIRWISE)
@few
@given(p=batches(), order=st.randoms())
def test_pairs_do_not_see_each_other(name, p, order):
    whole = LOSSES[name](p)
    shuffle = list(range(len(whole)))
    order.shuffle(shuffle)
    close(LOSSES[name](PairLogps._make(x[shuffle] for x in p)), whole[shuffle], 1e-14)
    for i in range(len(whole)):
        close(LOSSES[name](PairLogps._make(x[i : i + 1] for x in p)), whole[i : i + 1], 1e-14)


@pytest.mark.parametrize("name", sorted(losses.WHOLE_BATCH))
@few
@given(p=batches(size=5), order=st.permutations(range(5)))
def test_sorting_losses_see_a_set_of_pairs(name, p, order):
    chosen = p.chosen.clone().requires_grad_()
    whole = LOSSES[name](p._replace(chosen=chosen))
    (grad,) = torch.autograd.grad(whole.sum(), chosen)
    shuffled = PairLogps._make(x[order] for x in p)
    chosen = shuffled.chosen.clone().requires_grad_()
    again = LOSSES[name](shuffled._replace(chosen=chosen))
    assert torch.equal(again, whole)  # by quantiles, whatever the order of the pairs
    keys = (p.chosen - p.rejected, p.chosen - p.ref_chosen)
    if all(len(set(key.tolist())) == 5 for key in keys):  # equal ones share theirs in any way
        assert torch.equal(torch.autograd.grad(again.sum(), chosen)[0], grad[order])


def pairs(logps: list[list[float]], chosen_len: list[int], rejected_len: list[int]) -> PairLogps:
    columns = [*(torch.tensor(x, dtype=torch.float64) for x in logps), chosen_len, rejected_len]
    return PairLogps._make(torch.as_tensor(x) for x in columns)


def test_sorting_losses_are_dpo_alone_and_depend_on_the_batch():
    p = pairs([[0, -9], [-1, -2], [-1, -1], [0, -6]], [1, 1], [1, 1])
    for name in losses.WHOLE_BATCH:
        halves = [PairLogps._make(x[i : i + 1] for x in p) for i in (0, 1)]
        alone = torch.cat([LOSSES[name](half) for half in halves])
        close(alone, losses.dpo(p), 1e-14)
        assert (LOSSES[name](p).sum() - alone.sum()).abs() > 1e-3


READS_LENGTHS = {"sigmoid_norm", "sft", "simpo", "cpo", "orpo"}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_only_averaging_losses_look_at_lengths(name):
    p = pairs([[-3], [-8], [-4], [-5]], [4], [6])
    longer = p._replace(chosen_len=p.chosen_len + 3, rejected_len=p.rejected_len + 1)
    assert torch.equal(LOSSES[name](p), LOSSES[name](longer)) == (name not in READS_LENGTHS)
    average = losses.ipo(p, average=True), losses.ipo(longer, average=True)
    assert not torch.equal(*average)


def test_averages_of_length_one_are_sums():
    p = pairs([[-3, -1], [-8, -2], [-4, -3], [-5, -7]], [1, 1], [1, 1])
    assert torch.equal(losses.ipo(p, average=True), losses.ipo(p))
    assert torch.equal(losses.sigmoid_norm(p), losses.dpo(p))
