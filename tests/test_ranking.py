"""Losses of reward models against probabilities in decimals of 60 digits."""

import math
from decimal import Decimal as D
from decimal import localcontext
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt.ranking import bradley_terry, plackett_luce

DTYPES = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)]
)
scores = st.floats(-30, 30)


def oracle_bradley_terry(c: D, r: D, margin: D, center: D) -> D:
    return ((c - margin).exp() / ((c - margin).exp() + r.exp())).ln() * -1 + center * (c + r) ** 2


def oracle_plackett_luce(ranked: list[D], center: D = D(0)) -> D:
    """-log of the chance to draw, without putting back, in this order."""
    probability = D(1)
    for i in range(len(ranked)):
        probability *= ranked[i].exp() / sum((x.exp() for x in ranked[i:]), D(0))
    mean = sum(ranked, D(0)) / max(len(ranked), 1)
    return -probability.ln() + center * (2 * mean) ** 2


def draws(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(count, generator=generator, dtype=torch.float64)).to(dtype)


def in_groups(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)], dtype=torch.int64)


@DTYPES
@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_is_its_papers(dtype, bound, center, with_margin):
    c, r, margin = (draws(64, dtype, seed) for seed in (0, 1, 2))
    margin = margin if with_margin else torch.zeros_like(margin)
    got = bradley_terry(c, r, margin=margin if with_margin else None, center=center)
    with localcontext() as context:
        context.prec = 60
        rows = zip(c.tolist(), r.tolist(), margin.tolist(), strict=True)
        want = [float(oracle_bradley_terry(D(x), D(y), D(m), D(center))) for x, y, m in rows]
    assert got.dtype == dtype
    want = torch.tensor(want, dtype=torch.float64)
    assert ((got.double() - want).abs() / (1 + want.abs())).max() <= bound


@DTYPES
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_plackett_luce_is_its_paper(dtype, bound, center):
    sizes = [3, 1, 5, 2, 0, 9, 2, 4]
    s = draws(sum(sizes), dtype, 3)
    got = plackett_luce(s, in_groups(sizes), len(sizes), center=center)
    with localcontext() as context:
        context.prec = 60
        parts = [[D(x) for x in part] for part in (t.tolist() for t in s.split(sizes))]
        want = [float(oracle_plackett_luce(part, D(center))) for part in parts]
    assert got.dtype == dtype and got.shape == (8,)
    want = torch.tensor(want, dtype=torch.float64)
    assert ((got.double() - want).abs() / (1 + want.abs())).max() <= bound
    if center == 0:
        assert got[1] == 0 and got[4] == 0


@pytest.mark.parametrize("center", [0.0, 0.3])
@given(
    rows=st.lists(st.tuples(scores, scores), min_size=1, max_size=20), far=st.sampled_from([1, 400])
)
def test_plackett_luce_of_two_is_bradley_terry_bit_for_bit(center, rows, far):
    for dtype in (torch.float32, torch.float64):
        flat = (far * torch.tensor(rows, dtype=dtype)).flatten().requires_grad_()
        groups = in_groups([2] * len(rows))
        ranked = plackett_luce(flat, groups, len(rows), center=center)
        paired = bradley_terry(flat[::2], flat[1::2], center=center)
        assert torch.equal(ranked, paired)
        grads = [torch.autograd.grad(x.sum(), flat)[0] for x in (ranked, paired)]
        assert torch.equal(*grads) if center == 0 else torch.allclose(*grads, rtol=1e-6, atol=1e-6)


def test_gradcheck():
    c, r, margin = (draws(5, torch.float64, seed).requires_grad_() for seed in range(3))
    for center in (0.0, 0.1):
        assert torch.autograd.gradcheck(
            lambda c, r, m, center=center: bradley_terry(c, r, margin=m, center=center),
            (c, r, margin),
        )
        s, groups = draws(9, torch.float64, 3).requires_grad_(), in_groups([4, 1, 0, 2, 2])
        assert torch.autograd.gradcheck(
            lambda s, center=center, groups=groups: plackett_luce(s, groups, 5, center=center), s
        )


@given(ranked=st.lists(scores, min_size=4, max_size=4))
def test_the_probabilities_of_all_rankings_add_up_to_1(ranked):
    orders = torch.tensor(list(permutations(ranked)), dtype=torch.float64)
    losses = plackett_luce(orders.flatten(), in_groups([4] * 24), 24)
    assert torch.exp(-losses).sum().item() == pytest.approx(1, abs=1e-12)


@given(ranked=st.lists(scores, min_size=1, max_size=7), shift=st.floats(-100, 100))
def test_only_differences_of_scores_count(ranked, shift):
    s = torch.tensor(ranked, dtype=torch.float64)
    groups = in_groups([len(ranked)])
    here, there = (plackett_luce(x, groups, 1).item() for x in (s, s + shift))
    assert here == pytest.approx(there, abs=1e-10)
    same = plackett_luce(torch.full_like(s, shift), groups, 1).item()
    assert same == pytest.approx(math.log(math.factorial(len(ranked))), abs=1e-12)
    if len(ranked) > 1:
        centered = plackett_luce(s, groups, 1, center=0.5).item() - here
        assert centered == pytest.approx(2 * (sum(ranked) / len(ranked)) ** 2, abs=1e-9)


@given(c=scores, r=scores, step=st.floats(1e-3, 30))
def test_bradley_terry_mirrors_and_falls(c, r, step):
    c, r, up = (torch.tensor([x], dtype=torch.float64) for x in (c, r, step))
    there, back = bradley_terry(c, r), bradley_terry(r, c)
    assert (there - back).item() == pytest.approx((r - c).item(), abs=1e-12)
    assert bradley_terry(c + up, r) <= there <= bradley_terry(c, r + up)
    assert bradley_terry(c, c).item() == pytest.approx(math.log(2), abs=1e-15)
    assert torch.equal(bradley_terry(c, r, margin=up), bradley_terry(c - r - up, torch.zeros(1)))


def test_groups_do_not_see_each_other():
    sizes = [3, 2, 5]
    s = draws(10, torch.float64, 4)
    whole = plackett_luce(s, in_groups(sizes), 3, center=0.1)
    for i, part in enumerate(s.split(sizes)):
        alone = plackett_luce(part, in_groups([sizes[i]]), 1, center=0.1)
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_scores_stay_finite(dtype):
    ends = [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4), (0.0, 0.0)]
    c, r = (torch.tensor(x, dtype=dtype).requires_grad_() for x in zip(*ends, strict=True))
    for center in (0.0, 0.01):
        loss = bradley_terry(c, r, center=center)
        grads = torch.autograd.grad(loss.sum(), (c, r))
        assert loss.isfinite().all() and all(g.isfinite().all() for g in grads)
    s = torch.tensor([1e4, -1e4, 0.0, -1e4, 1e4, 1e4, 1e4], dtype=dtype, requires_grad=True)
    loss = plackett_luce(s, in_groups([3, 4]), 2)
    (grad,) = torch.autograd.grad(loss.sum(), s)
    assert loss.tolist() == pytest.approx([1e4, 2e4 + math.log(3 * 6)], rel=1e-6)
    assert grad.isfinite().all() and grad.double().sum().abs() < 1e-6
    assert grad[:3].tolist() == [0, -1, 1]


def test_scores_come_group_by_group():
    s = torch.zeros(4)
    with pytest.raises(AssertionError, match="ascend"):
        plackett_luce(s, torch.tensor([0, 1, 0, 1]), 2)
    with pytest.raises(AssertionError, match="ascend"):
        plackett_luce(s, torch.tensor([0, 0, 1, 2]), 2)
    assert plackett_luce(s[:0], torch.tensor([], dtype=torch.int64), 0).shape == (0,)
    with pytest.raises(AssertionError):
        bradley_terry(s, s[:3])
