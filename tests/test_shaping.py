"""f-divergences against the derivatives of their generators, LD-DPO and WPO token by token."""

import math
from collections.abc import Callable
from decimal import Decimal as D
from decimal import localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import LOSSES, InputError, PairLogps, losses
from prefopt.logprobs import sequence_logprobs
from prefopt.shaping import CAP, DIVERGENCES, desensitised, f_divergence, wpo_weights

DTYPES = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)]
)
KINDS = [
    *(("reverse_kl", 0.5), ("forward_kl", 0.5), ("js_divergence", 0.5)),
    *(("alpha_divergence", alpha) for alpha in (0.1, 0.5, 0.9)),
]

# The generators f(u) of table 1 of arXiv 2309.16240; D_f(pi, ref) is the mean of f(pi / ref).
GENERATORS: dict[str, Callable[[D, D], D]] = {
    "reverse_kl": lambda u, a: u * u.ln(),
    "forward_kl": lambda u, a: -u.ln(),
    "js_divergence": lambda u, a: u * u.ln() - (u + 1) * ((u + 1) / 2).ln(),
    "alpha_divergence": lambda u, a: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
}


def slope(kind: str, alpha: float, r: D) -> D:
    """f'(e^r) - f'(1), by differences of 1e-20 in decimals of 60 digits."""
    f, h, a = GENERATORS[kind], D("1e-20"), D(alpha)
    at = [(f(u + h, a) - f(u - h, a)) / (2 * h) for u in (r.exp(), D(1))]
    return at[0] - at[1]


def pairs(chosen, rejected, dtype=torch.float64) -> PairLogps:
    """Pairs with these log-ratios, their lengths all 5."""
    a, b = torch.tensor(chosen, dtype=dtype), torch.tensor(rejected, dtype=dtype)
    zero, length = torch.zeros_like(a), torch.full(a.shape, 5)
    return PairLogps(a, b, zero, zero.clone(), length, length)


def shaped_ratios(p: PairLogps, kind: str, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    q = f_divergence(p, kind=kind, alpha=alpha)
    assert torch.equal(q.chosen, p.chosen) and torch.equal(q.rejected, p.rejected)
    return q.chosen - q.ref_chosen, q.rejected - q.ref_rejected


@DTYPES
@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_log_ratios_become_the_slope_of_the_generator(kind, alpha, dtype, bound):
    ratios = [-8.0, -3.5, -1.0, -1e-3, 0.0, 1e-3, 0.5, 2.0, 7.0]
    p = pairs(ratios, ratios[::-1], dtype)
    p.chosen.requires_grad_()
    got, got_rejected = shaped_ratios(p, kind, alpha)
    (grad,) = torch.autograd.grad(got.sum(), p.chosen)
    with localcontext() as context:
        context.prec = 60
        h, exact = D("1e-12"), [D(r) for r in p.chosen.tolist()]
        want = torch.tensor([float(slope(kind, alpha, r)) for r in exact], dtype=torch.float64)
        rises = [
            float((slope(kind, alpha, r + h) - slope(kind, alpha, r - h)) / (2 * h)) for r in exact
        ]
    size = 8 + want.abs()  # the pair's own log-probs go up to 8
    assert ((got.detach().double() - want).abs() / size).max() <= bound
    assert ((got_rejected.double().flip(0) - want).abs() / size).max() <= bound
    rises = torch.tensor(rises, dtype=torch.float64)
    assert ((grad.double() - rises).abs() / (1 + rises)).max() <= bound


@given(r=st.floats(-200, 200), step=st.floats(1e-3, 50), alpha=st.floats(0.01, 0.99))
def test_slopes_rise_and_are_zero_at_the_reference(r, step, alpha):
    for kind in DIVERGENCES:
        low, high = shaped_ratios(pairs([r], [r + step]), kind, alpha)
        assert low <= high + 1e-13, kind  # a rounding of the log-probs that carry it
        assert shaped_ratios(pairs([0.0], [0.0]), kind, alpha)[0].item() == 0.0


def test_alpha_goes_from_reverse_to_forward_kl():
    p = pairs([-2.0, 0.3], [1.0, -0.7])
    for kind, alpha in (("reverse_kl", 1e-9), ("forward_kl", 1 - 1e-9)):
        want = shaped_ratios(p, kind, 0.5)
        torch.testing.assert_close(
            shaped_ratios(p, "alpha_divergence", alpha), want, atol=1e-7, rtol=0
        )


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_reads_the_shaped_ratios(name, kind):
    p = pairs([-1.0, -2.0, -0.5], [-3.0, -0.1, -0.2])._replace(
        ref_chosen=torch.tensor([-1.5, -1.0, -2.0]).double(),
        ref_rejected=torch.tensor([-2.0, -0.4, -1.0]).double(),
    )
    chosen, rejected = shaped_ratios(p, kind, 0.5)
    zero = torch.zeros_like(chosen)
    got = LOSSES[name](f_divergence(p, kind=kind))
    if name in losses.REFERENCE_FREE:
        assert torch.equal(got, LOSSES[name](p))
    elif name != "aot":  # which sorts the margins of policy and reference one by one
        want = LOSSES[name](
            p._replace(chosen=chosen, rejected=rejected, ref_chosen=zero, ref_rejected=zero)
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "alpha"), [*KINDS, ("alpha_divergence", 0.01)])
def test_far_log_ratios_stay_finite(kind, alpha, dtype):
    far = [-1e4, -1e4, 1e4, 1e4, 0.0]
    for loss in LOSSES.values():
        p = pairs(far, [1e4, -1e4, 1e4, -1e4, -1e4], dtype)
        given_p = p._replace(ref_chosen=p.chosen * 0, chosen=p.chosen.requires_grad_())
        values = loss(f_divergence(given_p, kind=kind, alpha=alpha))
        (grad,) = torch.autograd.grad(values.sum(), p.chosen)
        assert values.isfinite().all() and grad.isfinite().all(), loss.__name__


def test_beyond_the_cap_the_slope_is_a_tangent():
    p = pairs([-CAP - 1e-9, -CAP, -CAP + 1e-9, -CAP - 10], [0.0] * 4)
    p.chosen.requires_grad_()
    got, _ = shaped_ratios(p, "forward_kl", 0.5)
    (grad,) = torch.autograd.grad(got.sum(), p.chosen)
    assert got[:3].tolist() == pytest.approx([1 - math.exp(CAP)] * 3, rel=1e-8)
    assert grad.tolist() == pytest.approx([math.exp(CAP)] * 4, rel=1e-8)
    assert got[3].item() == pytest.approx(1 - 11 * math.exp(CAP), rel=1e-12)


def test_unknown_divergences():
    p = pairs([0.0], [0.0])
    with pytest.raises(InputError, match="it is one of reverse_kl, forward_kl, js_divergence"):
        f_divergence(p, kind="kl")
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="above 0 and below 1"):
            f_divergence(p, kind="alpha_divergence", alpha=alpha)


# -- tokens


@st.composite
def responses(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(log-probs [N], response_ids [N] in any order, R), some responses empty."""
    lengths = draw(st.lists(st.tuples(*[st.integers(0, 6)] * 2), min_size=1, max_size=4))
    ids = [i for i, length in enumerate(n for pair in lengths for n in pair) for _ in range(length)]
    ids = draw(st.permutations(ids))
    generator = torch.Generator().manual_seed(len(ids))
    logprobs = -3 * torch.rand(len(ids), generator=generator, dtype=torch.float64)
    return logprobs, torch.tensor(ids, dtype=torch.int64), 2 * len(lengths)


def tokens_of(logprobs, ids, r) -> list[list[float]]:
    out: list[list[float]] = [[] for _ in range(r)]
    for logprob, i in zip(logprobs.tolist(), ids.tolist(), strict=True):
        out[i].append(logprob)
    return out


@given(rows=responses(), alpha=st.floats(0, 1))
def test_desensitised_counts_the_overhang_by_alpha(rows, alpha):
    logprobs, ids, r = rows
    tokens = tokens_of(*rows)
    want = []
    for i in range(r):
        shared = min(len(tokens[i]), len(tokens[i ^ 1]))
        want.append(math.fsum([*tokens[i][:shared], *(alpha * x for x in tokens[i][shared:])]))
    got = desensitised(logprobs, ids, r, alpha=alpha)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    narrow = desensitised(logprobs.float(), ids, r, alpha=alpha)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), got, rtol=1e-6, atol=1e-6)
    plain = sequence_logprobs(logprobs, ids, r)
    assert torch.equal(desensitised(logprobs, ids, r, alpha=1.0), plain)
    even = [len(tokens[i]) <= len(tokens[i ^ 1]) for i in range(r)]
    assert torch.equal(got[even], plain[even])


def test_desensitised_gradients_are_the_weights():
    ids = torch.tensor([0, 0, 0, 1, 3, 2, 3, 3])
    logprobs = torch.full((8,), -1.0, requires_grad=True)
    sums = desensitised(logprobs, ids, 4, alpha=0.25)
    (grad,) = torch.autograd.grad(sums.sum(), logprobs)
    assert grad.tolist() == [1, 0.25, 0.25, 1, 1, 1, 0.25, 0.25]
    assert sums.tolist() == [-1.5, -1, -1, -1.5]
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"ld_alpha is .*; it must be in \[0, 1\]"):
            desensitised(logprobs, ids, 4, alpha=alpha)


@given(rows=responses(), temperature=st.floats(0.3, 3))
def test_wpo_weights_are_their_paper(rows, temperature):
    _, ids, r = rows
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(len(ids), 11, generator=generator, dtype=torch.float64) / temperature
    targets = torch.randint(11, (len(ids),), generator=generator)
    log_p, collisions, per_token = [], [], []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        probs = [math.exp(x) for x in row]
        probs = [x / math.fsum(probs) for x in probs]
        log_p.append(math.log(probs[target]))
        collisions.append(math.log(math.fsum(x * x for x in probs)))
        per_token.append(log_p[-1] - collisions[-1])
    tokens = tokens_of(torch.tensor(per_token, dtype=torch.float64), ids, r)
    means = [math.fsum(x) / max(len(x), 1) for x in tokens]
    want = [math.exp(means[i]) * math.exp(means[i + 1]) for i in range(0, r, 2)]
    logprobs = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    got = wpo_weights(logprobs, torch.tensor(collisions, dtype=torch.float64), ids, r)
    assert got.shape == (r // 2,) and not got.requires_grad
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_uniform_policy_weighs_every_pair_with_1():
    logprobs = torch.full((6,), -math.log(50))
    ids = torch.tensor([0, 0, 1, 2, 3, 3])
    assert wpo_weights(logprobs, logprobs.clone(), ids, 4).tolist() == [1, 1]
