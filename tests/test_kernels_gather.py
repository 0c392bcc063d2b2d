"""prefopt_kernels.gather against float64, on the GPU or in Triton's interpreter.

The criterion: an error against float64 of at most what plain torch float32 arithmetic on the same
logits has, plus 1e-6 and 2 ulp of the largest logit; log p besides within 4e-6 and 4 ulp. A
gradient in 16 bits may add half an ulp of its type.
"""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt_kernels import gather, tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [
    {},
    {"temperature": 0.7},
    {"softcap": 30.0},
    {"temperature": 0.7, "softcap": 30.0, "scale": 1.3},
]
INF = math.inf


class Case(NamedTuple):
    logits: torch.Tensor
    targets: torch.Tensor
    upstream: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of log p, entropy, lse


class Results(NamedTuple):
    logp: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor
    grad: torch.Tensor


def case(m: int, v: int, dtype=torch.float32, spread=4.0, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(m, v, generator=generator) * spread).to(dtype)
    targets = torch.randint(0, v, (m,), generator=generator)
    upstream = torch.randn(3, m, generator=generator)
    upstream[:, 2::7] = 0
    return Case(logits.to(DEVICE), targets.to(DEVICE), tuple(upstream.to(DEVICE)))


def transformed(x, temperature=1.0, softcap=None, scale=1.0):
    x = x * scale
    return (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature


def plain(c: Case, dtype, ignore_index=-100, **head) -> Results:
    """What torch makes of it in `dtype`, with autograd. 0 log 0 = 0."""
    x = c.logits.detach().to(dtype, copy=True).requires_grad_()
    z = transformed(x, **head)
    lse = z.logsumexp(1)
    logps = z.log_softmax(1)
    live = c.targets != ignore_index
    logp = logps.gather(1, torch.where(live, c.targets, 0)[:, None])[:, 0]
    entropy = -(logps.exp() * logps.clamp_min(-1e6)).sum(1)
    results = [torch.where(live, r, 0) for r in (logp, lse, entropy)]
    g, g_entropy, g_lse = (u.to(dtype) for u in c.upstream)
    total = (g * results[0] + g_lse * results[1] + g_entropy * results[2]).sum()
    (grad,) = torch.autograd.grad(total, x)
    return Results(*(r.detach() for r in results), grad)


def kernel(c: Case, out=None, **head) -> Results:
    g, g_entropy, g_lse = c.upstream
    logp, lse, entropy = gather.gather_forward(c.logits, c.targets, entropy=True, **head)
    grad = gather.gather_backward(
        c.logits, c.targets, lse, entropy, g, g_entropy=g_entropy, g_lse=g_lse, out=out, **head
    )
    return Results(logp, lse, entropy, grad)


def ulp(x: float) -> float:
    return 2.0 ** (math.floor(math.log2(max(abs(x), 1e-30))) - 23)


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; equal infinities differ by 0."""
    a, b = a.double(), b.double()
    assert torch.equal(a.isfinite(), b.isfinite()) and not a.isnan().any()
    difference = torch.where(a == b, 0, (a - b).abs())
    return difference.max().item() if difference.numel() else 0.0


def check(c: Case, got: Results | None = None, **head) -> None:
    exact, peer = plain(c, torch.float64, **head), plain(c, torch.float32, **head)
    got = kernel(c, **head) if got is None else got
    z = transformed(c.logits.double(), **{k: v for k, v in head.items() if k != "ignore_index"})
    z = z[z.isfinite()]
    step = ulp(z.abs().max().item()) if z.numel() else 0.0
    for name in ("logp", "lse", "entropy"):
        assert getattr(got, name).dtype == torch.float32
        error = worst(getattr(got, name), getattr(exact, name))
        allowed = worst(getattr(peer, name), getattr(exact, name)) + 1e-6 + 2 * step
        assert error <= allowed, (name, error, allowed)
    assert worst(got.logp, exact.logp) <= 4e-6 + 4 * step
    assert got.grad.dtype == c.logits.dtype and got.grad.shape == c.logits.shape
    size = exact.grad.abs().amax(1, keepdim=True) if exact.grad.numel() else exact.grad
    rounding = {2: torch.finfo(got.grad.dtype).eps / 2, 4: 0}[got.grad.element_size()]
    error = (got.grad.double() - exact.grad).abs()
    peers = (peer.grad.double() - exact.grad).abs().max().item() if size.numel() else 0.0
    tiny = torch.finfo(got.grad.dtype).tiny * rounding
    allowed = peers + (1e-6 + 2 * step) * size + rounding * exact.grad.abs() + tiny
    assert (error <= allowed).all(), ("grad", (error - allowed).max())


@pytest.fixture
def blocks_of_16(monkeypatch):
    """Many blocks in a short row."""
    monkeypatch.setattr(tuning, "row_config", lambda *_: tuning.Rows(16, 1))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 2, 31, 1000, 4097, 50257])
def test_against_float64(v, dtype, head):
    for m in (0, 1, 33 if v <= 1000 and head in HEADS[::3] else 2):
        check(case(m, v, dtype), **head)


@pytest.mark.parametrize("v", [4097, 50257])
def test_many_rows_of_a_large_vocabulary(v):
    check(case(33, v))


@pytest.mark.parametrize("head", [{}, HEADS[3]], ids=str)
def test_every_column_as_target_across_blocks(blocks_of_16, head):
    for v in (15, 16, 17, 33):
        c = case(v, v)
        check(c._replace(targets=torch.arange(v, device=DEVICE)), **head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_and_in_place(dtype):
    c = case(6, 100, dtype)
    room = torch.full((6, 137), math.nan, dtype=dtype, device=DEVICE)
    room[:, 5:105] = c.logits
    strided = c._replace(logits=room[:, 5:105])
    expected = kernel(c)
    for a, b in zip(kernel(strided), expected, strict=True):
        assert torch.equal(a, b)
    out = torch.full((6, 111), math.nan, dtype=dtype, device=DEVICE)
    kernel(strided, out=out[:, 3:103])
    assert torch.equal(out[:, 3:103], expected.grad)
    assert out[:, :3].isnan().all() and out[:, 103:].isnan().all()
    grad = kernel(strided, out=strided.logits).grad
    assert grad.data_ptr() == strided.logits.data_ptr() and torch.equal(grad, expected.grad)
    assert room[:, :5].isnan().all() and room[:, 105:].isnan().all()


def test_every_other_row_and_expanded_upstream():
    c = case(8, 40)
    half = c._replace(logits=c.logits[::2], targets=c.targets[:4])
    one = torch.ones((), device=DEVICE)
    half = half._replace(upstream=tuple(one.expand(4) for _ in range(3)))
    check(half, kernel(half))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_masked_rows_are_zero_and_unread(dtype, ignore_index):
    c = case(9, 60, dtype)
    c.targets[c.targets == 3] = 4
    c.targets[::3] = ignore_index
    check(c, ignore_index=ignore_index)
    c.logits[::3] = math.nan
    for result in kernel(c, ignore_index=ignore_index):
        assert torch.equal(result[::3], torch.zeros_like(result[::3]))
        assert result.isfinite().all()
    c.targets[:] = ignore_index
    c.logits[:] = math.nan
    assert all(not r.any() for r in kernel(c, ignore_index=ignore_index))


def test_rows_without_upstream_gradient_are_zero_and_unread():
    c = case(4, 60)
    for u in c.upstream:
        u.zero_()
    for i, u in enumerate(c.upstream):
        u[i] = 1.0
    _, lse, entropy = gather.gather_forward(c.logits, c.targets, entropy=True)
    g, g_entropy, g_lse = c.upstream
    expected = plain(c, torch.float64).grad
    c.logits[3] = math.nan
    grad = gather.gather_backward(
        c.logits, c.targets, lse, entropy, g, g_entropy=g_entropy, g_lse=g_lse
    )
    assert torch.equal(grad[3], torch.zeros_like(grad[3]))
    assert worst(grad, expected) < 1e-6
    grad = gather.gather_backward(c.logits, c.targets, lse, None, g)
    assert worst(grad[0], expected[0]) < 1e-6 and not grad[1:].any()
    grad = gather.gather_backward(c.logits, c.targets, lse, entropy, g, g_entropy=g_entropy)
    assert worst(grad[:2], expected[:2]) < 1e-6 and not grad[2:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_at_minus_infinity(blocks_of_16, dtype):
    c = case(8, 70, dtype)
    c.logits[:, ::3] = -INF
    c.logits[1, :32] = -INF  # whole blocks, the first ones
    c.logits[2, 16:] = -INF  # and the last ones
    c.logits[3, :] = -INF
    c.logits[3, 40] = 2.0  # one column is left
    c.targets[:] = 1
    c.targets[1] = 50 if c.logits[1, 50] > -INF else 52
    c.targets[3] = 40
    check(c)
    check(c, temperature=0.7)
    got = kernel(c)
    assert got.logp[3] == 0 and got.entropy[3] == 0 and not got.grad[3, :40].any()


def test_a_target_at_minus_infinity():
    c = case(2, 40)
    c.logits[:, 7] = -INF
    c.targets[0] = 7
    got = kernel(c)
    exact = plain(c, torch.float64)
    assert got.logp[0] == -INF and torch.isfinite(got.logp[1])
    assert worst(got.lse, exact.lse) < 2e-6 and worst(got.entropy, exact.entropy) < 2e-6
    assert got.grad.isfinite().all()
    assert abs(got.grad[0, 7] - c.upstream[0][0]) < 1e-6


@pytest.mark.parametrize("v", [1, 40])
def test_a_row_of_minus_infinity_has_no_gradient(v):
    c = case(2, v)
    c.logits[0] = -INF
    got = kernel(c)
    assert got.logp[0] == -INF and got.lse[0] == -INF and got.entropy[0] == 0
    assert not got.grad[0].any() and got.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [{}, {"temperature": 0.7}, {"softcap": 30.0}], ids=str)
def test_large_logits(blocks_of_16, dtype, head):
    c = case(7, 50, dtype)
    c.logits[0] += 3e4
    c.logits[1] -= 3e4
    c.logits[2] *= 3e3
    c.logits[3] = 3e4
    c.logits[4] = -3e4
    c.logits[5, 1::2] = 3e4
    c.logits[5, ::2] = -3e4
    c.logits[6, 20] = 3e4
    c.targets[6] = 20
    check(c, **head)


def test_large_logits_keep_their_digits():
    """A shift that float32 takes without rounding changes nothing, not even the last bits."""
    c = case(5, 200)
    c = c._replace(logits=(c.logits * 256).round() / 256)
    moved = c._replace(logits=c.logits + 2.0**15)
    for a, b in zip(kernel(c)[:3:2], kernel(moved)[:3:2], strict=True):
        assert worst(a, b) <= 1e-6


def test_log_p_near_zero_keeps_its_digits():
    gaps = torch.tensor([0.5, 2.0, 5.0, 9.0, 15.0, 30.0, 60.0], device=DEVICE)
    logits = torch.zeros(len(gaps), 2, device=DEVICE)
    logits[:, 0] = gaps
    c = case(len(gaps), 2)._replace(logits=logits, targets=gaps.long() * 0)
    got = kernel(c)
    exact = -torch.log1p(torch.exp(-gaps.double()))
    assert (((got.logp - exact) / exact).abs() < 1e-7 * (3 + gaps)).all()  # of exp(-gap)
    q = torch.sigmoid(-gaps.double())
    entropy = -(1 - q) * exact - q * torch.log(q)
    assert (((got.entropy - entropy) / entropy).abs() < 1e-7 * (5 + gaps)).all()
    other = kernel(c._replace(targets=c.targets + 1))
    assert (other.logp + torch.nn.functional.softplus(gaps.double())).abs().max() < 4e-6


def test_not_a_number_stays_one():
    c = case(3, 40)
    c.logits[0, 5] = math.nan
    c.targets[0] = 9
    c.logits[1, 5] = math.nan
    c.targets[1] = 5
    got = kernel(c)
    assert all(r[:2].isnan().all() for r in got[:3])
    assert all(r[2].isfinite().all() for r in got)
    alone = kernel(case(1, 1)._replace(logits=torch.full((1, 1), math.nan, device=DEVICE)))
    assert all(r.isnan().all() for r in alone[:3])


@pytest.mark.parametrize("target", [-1, 40, 2**31, 2**32 + 3, -(2**32)])
def test_a_target_that_is_no_column_gives_nan(target):
    c = case(3, 40)
    c.targets[1] = target
    got = kernel(c)
    assert got.logp[1].isnan() and got.logp[::2].isfinite().all()


def test_without_entropy_and_without_upstream_of_lse():
    c = case(5, 70)
    logp, lse, entropy = gather.gather_forward(c.logits, c.targets)
    full = kernel(c)
    assert entropy is None and torch.equal(logp, full.logp) and torch.equal(lse, full.lse)
    none = torch.zeros_like(c.upstream[0])
    only = c._replace(upstream=(c.upstream[0], none, none))
    grad = gather.gather_backward(c.logits, c.targets, lse, None, c.upstream[0])
    assert worst(grad, plain(only, torch.float64).grad) < 2e-6


def test_arguments_it_does_not_take():
    c = case(4, 30)
    _, lse, _ = gather.gather_forward(c.logits, c.targets)
    g = c.upstream[0]
    for logits in (c.logits.t(), c.logits.double(), c.logits[0], c.logits[:, ::2]):
        with pytest.raises(AssertionError):
            gather.gather_forward(logits, c.targets)
    for targets in (c.targets.int(), c.targets[:3]):
        with pytest.raises(AssertionError):
            gather.gather_forward(c.logits, targets)
    with pytest.raises(AssertionError, match="needs the entropies"):
        gather.gather_backward(c.logits, c.targets, lse, None, g, g_entropy=g)
    for bad in ({"g": g.double()}, {"lse": lse[:3]}, {"out": c.logits[:3]}):
        arguments = {"lse": lse, "g": g} | bad
        with pytest.raises(AssertionError):
            gather.gather_backward(c.logits, c.targets, entropies=None, **arguments)


# ---- properties ----

logit_rows = st.builds(
    case,
    m=st.integers(1, 3),
    v=st.integers(1, 24),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    seed=st.integers(0, 10**6),
)
heads = st.sampled_from(HEADS)
FEW = settings(max_examples=25)  # the interpreter takes milliseconds a row


@FEW
@given(logit_rows, heads)
def test_property_probabilities_sum_to_one(c, head):
    v = c.logits.shape[1]
    every = c.logits.repeat_interleave(v, 0)
    targets = torch.arange(v, device=DEVICE).repeat(len(c.logits))
    logp, lse, _ = gather.gather_forward(every, targets, **head)
    p = logp.double().exp().view(-1, v)
    assert (p.sum(1) - 1).abs().max() < 2e-6 + 4 * ulp(lse.abs().max().item())
    assert (logp <= 0).all()
    expected = transformed(c.logits.double(), **head).softmax(1)
    assert (p - expected).abs().max() < 2e-6 + 4 * ulp(lse.abs().max().item())


@FEW
@given(logit_rows, heads)
def test_property_gradient_rows_sum_to_zero(c, head):
    c = c._replace(upstream=(*c.upstream[:2], torch.zeros_like(c.upstream[0])))
    if head.get("softcap"):  # whose slope weighs the columns
        head = {}
    c = c._replace(logits=c.logits.float())
    grad = kernel(c, **head).grad.double()
    step = ulp(transformed(c.logits, **head).abs().max().item())
    assert (grad.sum(1).abs() <= 1e-6 + 8 * step * (1 + grad.abs().sum(1))).all()


@FEW
@given(logit_rows, st.sampled_from([-64.0, -1.0, 0.5, 2.0, 512.0]))
def test_property_shift_invariance(c, shift):
    c = c._replace(logits=(c.logits.float() * 256).round() / 256)  # so that the sum is exact
    a, b = kernel(c), kernel(c._replace(logits=c.logits + shift))
    assert worst(a.logp, b.logp) <= 1e-6
    assert worst(a.entropy, b.entropy) <= 2e-6
    top = ulp((c.logits.abs().max() + abs(shift)).item())
    assert worst(a.lse + shift, b.lse) <= 2 * top
    scale = 1 + sum(u.abs().max().item() for u in c.upstream)
    assert worst(a.grad, b.grad) <= 20 * top * scale  # p is exp(z - lse), and lse has 24 bits


@FEW
@given(logit_rows, heads, st.randoms(use_true_random=False))
def test_property_rows_know_nothing_of_each_other(c, head, random):
    order = list(range(len(c.logits)))
    random.shuffle(order)
    order = order[: random.randint(1, len(order))]
    got = kernel(c, **head)
    picked = Case(
        c.logits[order].contiguous(), c.targets[order], tuple(u[order] for u in c.upstream)
    )
    for a, b in zip(got, kernel(picked, **head), strict=True):
        assert torch.equal(a[order], b)


@FEW
@given(logit_rows, heads, st.sampled_from([1, 2, 8, 32, 128]))
def test_property_the_block_does_not_matter(c, head, block):
    expected = kernel(c, **head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "row_config", lambda *_: tuning.Rows(block, 1))
        got = kernel(c, **head)
    step = ulp(max(1.0, expected.lse.abs().max().item()))
    assert worst(got.logp, expected.logp) <= 4 * step + 5e-7
    assert worst(got.lse, expected.lse) <= 2 * step
    assert worst(got.entropy, expected.entropy) <= 4 * step + 1e-6
    eps = torch.finfo(c.logits.dtype).eps
    scale = 1 + sum(u.abs().max().item() for u in c.upstream)
    assert worst(got.grad, expected.grad) <= (20 * step + eps) * scale
