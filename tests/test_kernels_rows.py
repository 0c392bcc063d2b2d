"""prefopt_kernels.logprob against float64, on the GPU or in Triton's interpreter; 64-bit offsets of
all row kernels.

The criterion: an error against float64 of at most what plain torch float32 arithmetic on the same
logits has, plus 1e-6 and 2 ulp of the largest logit. Outputs in 16 bits may add half an ulp.
"""

import math
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt_kernels import gather, logprob, rows, tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [
    {},
    {"temperature": 0.7, "bias": True},
    {"softcap": 30.0},
    {"temperature": 0.7, "softcap": 30.0, "scale": 1.3, "bias": True},
]
INF = math.inf


class Case(NamedTuple):
    z: torch.Tensor
    y: torch.Tensor
    head: dict


class Folded(NamedTuple):
    lse: torch.Tensor
    entropy: torch.Tensor
    p: torch.Tensor  # over the last tile
    share: torch.Tensor


def case(r: int, c: int, dtype=torch.float32, head=None, spread=4.0, seed=0) -> Case:
    """Logits [r, c], targets among which some are outside, the head with its bias [c]."""
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(r, c, generator=generator) * spread).to(dtype).to(DEVICE)
    y = torch.randint(0, c, (r,), generator=generator)
    for i in range(3, r, 5):
        y[i] = (-1, c, -100, 2**40, c + 7)[i // 5 % 5]
    head = dict(head or {})
    if head.pop("bias", False):
        head["bias"] = torch.randn(c, generator=generator).to(dtype).to(DEVICE)
    return Case(z, y.to(DEVICE), head)


def transformed(x, bias=None, temperature=1.0, softcap=None, scale=1.0):
    """z' and slope."""
    x = (x if bias is None else x + bias.to(x.dtype)) * scale
    if softcap is None:
        return x / temperature, torch.ones_like(x)
    t = torch.tanh(x / softcap)
    return softcap * t / temperature, 1 - t * t


def others(c: Case, dtype):
    """z' without the targets' columns, slope, and where the targets are."""
    z, slope = transformed(c.z.to(dtype), **c.head)
    own = torch.arange(z.shape[1], device=DEVICE) == c.y[:, None]
    return z.masked_fill(own, -INF), slope, own


def plain(c: Case, dtype) -> Folded:
    z, slope, _ = others(c, dtype)
    lse = z.logsumexp(1)
    logp = (z - lse[:, None]).nan_to_num(-1e6, neginf=-1e6).clamp_min(-1e6)
    p = logp.exp()
    return Folded(lse, -(p * logp).sum(1), p * slope, (lse > -INF).to(dtype))


def empty(n: int) -> torch.Tensor:
    return torch.full((n,), math.nan, device=DEVICE)


def folded(c: Case, widths=None, p=None, entropy=True) -> Folded:
    """The tiles of the given widths one after another; p of the last."""
    r, columns = c.z.shape
    lse, h, share = empty(r), empty(r), empty(r)
    start, head = 0, dict(c.head)
    for width in widths or [columns]:
        tile = slice(start, start + width)
        p_tile = torch.empty_like(c.z[:, tile], dtype=torch.float32) if p is None else p[:, tile]
        if "bias" in head:
            head["bias"] = c.head["bias"][tile].contiguous()
        logprob.fold(
            c.z[:, tile], c.y - start, lse, share, entropy=h if entropy else None,
            p=p_tile, first=start == 0, **head,
        )  # fmt: skip
        start += width
    assert start == columns
    return Folded(lse, h, p_tile, share)


def ulp(x: float) -> float:
    return 2.0 ** (math.floor(math.log2(max(abs(x), 1e-30))) - 23)


def step_of(c: Case) -> float:
    z = transformed(c.z.double(), **c.head)[0]
    z = z[z.isfinite()]
    return ulp(z.abs().max().item()) if z.numel() else 0.0


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; equal infinities differ by 0."""
    a, b = a.double(), b.double()
    assert torch.equal(a.isfinite(), b.isfinite()) and not a.isnan().any()
    difference = torch.where(a == b, 0, (a - b).abs())
    return difference.max().item() if difference.numel() else 0.0


def half_ulp(x: torch.Tensor) -> torch.Tensor:
    """Of the 16-bit numbers `x`, the upper bound; next to 0 one step."""
    if x.dtype == torch.float32:
        return torch.zeros_like(x)
    info = torch.finfo(x.dtype)
    return (x.double().abs() * info.eps / 2).clamp_min(info.tiny * info.eps)


def check_fold(c: Case, got: Folded | None = None, dtype=torch.float32) -> None:
    exact, peer = plain(c, torch.float64), plain(c, torch.float32)
    got = folded(c, p=torch.empty_like(c.z, dtype=dtype)) if got is None else got
    step = step_of(c)
    for name in ("lse", "entropy", "share"):
        error = worst(getattr(got, name), getattr(exact, name))
        allowed = worst(getattr(peer, name), getattr(exact, name)) + 1e-6 + 2 * step
        assert error <= allowed, (name, error, allowed)
    assert worst(got.lse, exact.lse) <= 4e-6 + 4 * step
    error = (got.p.double() - exact.p).abs()
    allowed = worst(peer.p, exact.p) + 1e-6 + 2 * step + half_ulp(got.p)
    assert (error <= allowed).all(), (error - allowed).max()
    _, _, own = others(c, torch.float64)
    assert not got.p[own].any()


@pytest.fixture
def blocks_of_16(monkeypatch):
    """Many blocks in a short row."""
    monkeypatch.setattr(tuning, "row_config", lambda *_: tuning.Rows(16, 1))


# ---- fold ----


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [1, 2, 31, 1000, 4097, 50257])
def test_fold_against_float64(c, dtype, head):
    for r in (0, 1, 33 if c <= 1000 and head in HEADS[::3] else 2):
        check_fold(case(r, c, dtype, head), dtype=dtype)


@pytest.mark.parametrize("head", HEADS[::3], ids=str)
def test_fold_every_column_as_target_across_blocks(blocks_of_16, head):
    for v in (15, 16, 17, 50):
        check_fold(case(v, v, head=head)._replace(y=torch.arange(v, device=DEVICE)))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_in_tiles_is_fold_in_one(dtype, head):
    c = case(4, 300, dtype, head)
    one, step = folded(c), step_of(c)
    for widths in ([300], [128, 128, 44], [1, 299], [64] * 4 + [44], [299, 1]):
        tiles = folded(c, widths)
        assert worst(tiles.lse, one.lse) <= 3 * step
        assert worst(tiles.entropy, one.entropy) <= 1e-6 + 3 * step
        assert worst(tiles.p * tiles.share[:, None], one.p[:, -widths[-1] :]) <= 3 * step
    check_fold(c, folded(c, [300]))


@pytest.mark.parametrize("head", [HEADS[0], HEADS[3]], ids=str)
def test_the_weighted_mean_moves_on(head):
    """mean.lerp(p @ W, share) ends as softmax(others) * slope @ W, whatever the tiles."""
    c = case(7, 90, head=head)
    c.z[0, :40] += 50  # early tiles rule
    c.z[1, 60:] += 50  # late ones do
    weight = torch.randn(90, 5, device=DEVICE)
    exact = plain(c, torch.float64).p @ weight.double()
    for widths in ([90], [30, 30, 30], [1, 60, 29]):
        lse, share, mean = empty(7), empty(7), torch.full((7, 5), 3.0, device=DEVICE)
        start, settings_ = 0, dict(c.head)
        for width in widths:
            tile = slice(start, start + width)
            p = torch.empty(7, width, device=DEVICE)
            if "bias" in settings_:
                settings_["bias"] = c.head["bias"][tile].contiguous()
            logprob.fold(c.z[:, tile], c.y - start, lse, share, p=p, first=not start, **settings_)
            mean = mean.lerp(p @ weight[tile], share[:, None])
            start += width
        assert worst(mean, exact) <= 1e-5 + 8 * step_of(c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_p_over_z_and_for_the_leading_rows(blocks_of_16, dtype):
    c = case(6, 50, dtype, HEADS[3])
    expected = folded(c, p=torch.empty_like(c.z))
    for rows_with_p in (6, 4, 0):
        room = torch.full((6, 80), math.nan, dtype=dtype, device=DEVICE)
        room[:, 7:57] = c.z
        z = room[:, 7:57]
        lse, share, h = empty(6), empty(6), empty(6)
        logprob.fold(z, c.y, lse, share, entropy=h, p=z[:rows_with_p], first=True, **c.head)
        assert torch.equal(lse, expected.lse) and torch.equal(h, expected.entropy)
        assert torch.equal(z[:rows_with_p], expected.p[:rows_with_p])
        assert torch.equal(z[rows_with_p:], c.z[rows_with_p:])
        assert room[:, :7].isnan().all() and room[:, 57:].isnan().all()


@pytest.mark.parametrize("p_dtype", DTYPES, ids=str)
def test_fold_p_in_another_type(p_dtype):
    c = case(4, 40, torch.bfloat16)
    p = torch.empty(4, 40, dtype=p_dtype, device=DEVICE)
    check_fold(c, folded(c, p=p))


def test_fold_without_entropy_and_without_p():
    c = case(5, 70, head=HEADS[1])
    full, bare = folded(c), folded(c, entropy=False)
    lse, share = empty(5), empty(5)
    logprob.fold(c.z, c.y, lse, share, first=True, **c.head)
    assert torch.equal(lse, full.lse) and torch.equal(bare.lse, lse)
    assert torch.equal(bare.p, full.p) and (share == 1).all() and bare.entropy.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_of_nothing(blocks_of_16, dtype):
    """Rows in which no column contributes, at first and later, alone and beside others."""
    c = case(5, 48, dtype)
    c.z[:] = -INF
    c.z[1, 5] = 2.0
    c.z[2, 5] = 2.0
    c.y[:] = torch.tensor([0, 0, 5, -1, 47])
    got = folded(c, p=torch.empty_like(c.z))
    assert got.lse.tolist() == [-INF, 2.0, -INF, -INF, -INF]
    assert not got.entropy.any() and got.share.tolist() == [0, 1, 0, 0, 0]
    assert got.p.nonzero().tolist() == [[1, 5]] and got.p[1, 5] == 1
    later, lse, h, share = case(5, 20, dtype), got.lse.clone(), got.entropy.clone(), empty(5)
    later.z[0] = -INF
    later.z[1] = -INF
    logprob.fold(later.z, later.y, lse, share, entropy=h)
    exact = plain(later, torch.float64)
    assert share.tolist() == [0, 0, 1, 1, 1]
    assert lse[0] == -INF and lse[1] == 2.0 and worst(lse[2:], exact.lse[2:]) < 2e-6
    assert not h[:2].any() and worst(h[2:], exact.entropy[2:]) < 2e-6
    nothing = later.z[:, :0]
    logprob.fold(nothing, later.y, lse, share, entropy=h, p=nothing)
    assert not share.any() and worst(lse[2:], exact.lse[2:]) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [{}, {"temperature": 0.7}, {"softcap": 30.0}], ids=str)
def test_fold_large_logits_and_minus_infinity(blocks_of_16, dtype, head):
    c = case(9, 50, dtype, head)
    c.z[0] += 3e4
    c.z[1] -= 3e4
    c.z[2] *= 3e3
    c.z[3] = 3e4
    c.z[4] = -3e4
    c.z[5, 1::2] = 3e4
    c.z[5, ::2] = -3e4
    c.z[6, 20] = 3e4
    c.y[6] = 20  # the rest decides
    c.z[7, ::3] = -INF
    c.z[8, :33] = -INF
    check_fold(c, dtype=dtype)
    step = step_of(c)
    one, two = folded(c, [50]), folded(c, [17, 33])
    assert worst(one.lse, two.lse) <= 3 * step
    assert worst(one.entropy, two.entropy) <= 1e-6 + 3 * step
    assert worst(one.p[:, 17:], two.p * two.share[:, None]) <= 1e-6 + 3 * step


def test_fold_bias_at_minus_infinity_hides_a_column():
    c = case(3, 40, head=HEADS[1])
    c.head["bias"][7] = -INF
    got = folded(c)
    assert not got.p[:, 7].any()
    check_fold(c, got)


@pytest.mark.filterwarnings("ignore:All-NaN")  # numpy's, in the interpreter
def test_fold_not_a_number_stays_one():
    c = case(4, 40)
    c.y[:] = 9
    c.z[0, 5] = math.nan
    c.z[1, 9] = math.nan  # the target: left out
    got = folded(c)
    assert got.lse[0].isnan() and got.entropy[0].isnan() and got.p[0, :9].isnan().all()
    assert all(x[1:].isfinite().all() for x in got)
    one = case(1, 1)._replace(z=torch.full((1, 1), math.nan, device=DEVICE))
    assert folded(one._replace(y=one.y - 1)).lse.isnan().all()


def test_fold_arguments_it_does_not_take():
    c = case(4, 30)
    lse, share = empty(4), empty(4)
    for z in (c.z.t(), c.z.double(), c.z[0], c.z[:, ::2]):
        with pytest.raises(AssertionError):
            logprob.fold(z, c.y, lse, share)
    for arguments in (
        {"y": c.y.int()}, {"lse": lse[:3]}, {"share": share.double()}, {"lse": torch.empty(8)[::2]},
        {"p": c.z[:, :20]}, {"p": torch.empty(5, 30)}, {"bias": torch.empty(29)},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            logprob.fold(**({"z": c.z, "y": c.y, "lse": lse, "share": share} | arguments))


# ---- dlogits ----


def upstream(n: int, seed=1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return g[0].contiguous(), g[1].contiguous()


def plain_dlogits(c: Case, lse, entropy, g, g_entropy, dtype):
    z, slope, own = others(c, dtype)
    gain = c.head.get("scale", 1.0) / c.head.get("temperature", 1.0)
    lse, entropy, g, g_entropy = (x.to(dtype)[:, None] for x in (lse, entropy, g, g_entropy))
    logp = (z - lse).nan_to_num(-1e6, neginf=-1e6).clamp_min(-1e6)
    d = -logp.exp() * (g + g_entropy * (logp + entropy)) * slope * gain
    return d.masked_fill(own, 0)


def totals(c: Case):
    """lse and entropy of all columns."""
    z = transformed(c.z.double(), **c.head)[0]
    lse = z.logsumexp(1)
    logp = (z - lse[:, None]).nan_to_num(-1e6, neginf=-1e6).clamp_min(-1e6)
    return lse.float(), -(logp.exp() * logp).sum(1).float()


def check_dlogits(c: Case, out: torch.Tensor | None = None) -> torch.Tensor:
    lse, entropy = totals(c)
    g, g_entropy = upstream(len(c.z))
    g_entropy[1::4] = 0
    exact = plain_dlogits(c, lse, entropy, g, g_entropy, torch.float64)
    peer = plain_dlogits(c, lse, entropy, g, g_entropy, torch.float32)
    out = torch.empty_like(c.z) if out is None else out
    logprob.dlogits(c.z, c.y, lse, g, out, g_entropy=g_entropy, entropy=entropy, **c.head)
    size = exact.abs().amax(1, keepdim=True) if exact.numel() else exact
    allowed = worst(peer, exact) + (1e-6 + 2 * step_of(c)) * size + half_ulp(out)
    error = (out.double() - exact).abs()
    assert (error <= allowed).all(), (error - allowed).max()
    _, _, own = others(c, torch.float64)
    assert not out[own].any()
    return out


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [1, 2, 31, 1000, 4097, 50257])
def test_dlogits_against_float64(c, dtype, head):
    for r in (0, 1, 33 if c <= 1000 and head in HEADS[::3] else 2):
        check_dlogits(case(r, c, dtype, head))


def test_dlogits_is_the_gradient():
    """Of g_entropy * entropy - g * lse by the raw logits, where no column is a target."""
    for head in HEADS:
        c = case(4, 60, head=head)
        x = c.z.double().requires_grad_()
        z = transformed(x, **c.head)[0]
        g, g_entropy = upstream(4)
        logp = z.log_softmax(1)
        total = (g_entropy * -(logp.exp() * logp).sum(1) - g * z.logsumexp(1)).sum()
        (exact,) = torch.autograd.grad(total, x)
        out, (lse, entropy) = torch.empty_like(c.z), totals(c)
        none = torch.full_like(c.y, -1)
        logprob.dlogits(c.z, none, lse, g, out, g_entropy=g_entropy, entropy=entropy, **c.head)
        assert worst(out, exact) < 4e-6


@pytest.mark.parametrize("head", HEADS[::3], ids=str)
def test_dlogits_every_column_as_target_across_blocks(blocks_of_16, head):
    for v in (15, 16, 17, 50):
        check_dlogits(case(v, v, head=head)._replace(y=torch.arange(v, device=DEVICE)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dlogits_strided_in_place_and_in_another_type(blocks_of_16, dtype):
    c = case(6, 50, dtype, HEADS[3])
    expected = check_dlogits(c)
    room = torch.full((6, 80), math.nan, dtype=dtype, device=DEVICE)
    room[:, 7:57] = c.z
    lse, entropy = totals(c)
    g, g_entropy = upstream(6)
    g_entropy[1::4] = 0
    z, wide = room[:, 7:57], torch.full((6, 70), math.nan, device=DEVICE)
    both = {"g_entropy": g_entropy, "entropy": entropy} | c.head
    logprob.dlogits(z, c.y, lse, g, wide[:, 3:53], **both)
    assert wide[:, :3].isnan().all() and wide[:, 53:].isnan().all()
    assert torch.equal(wide[:, 3:53].to(dtype), expected)
    logprob.dlogits(z, c.y, lse, g, z, **both)
    assert torch.equal(z, expected)
    assert room[:, :7].isnan().all() and room[:, 57:].isnan().all()


def test_dlogits_rows_without_upstream_gradient_are_zero_and_unread(blocks_of_16):
    c = case(5, 50)
    lse, entropy = totals(c)
    g, g_entropy = upstream(5)
    g[1] = g_entropy[2] = g[3] = g_entropy[3] = 0
    exact = plain_dlogits(c, lse, entropy, g, g_entropy, torch.float64)
    c.z[3] = lse[3] = entropy[3] = math.nan
    logprob.dlogits(c.z, c.y, lse, g, c.z, g_entropy=g_entropy, entropy=entropy)
    assert worst(c.z, exact) < 1e-6 and not c.z[3].any()
    c = case(5, 50)
    c.z[1] = c.z[3] = math.nan
    lse, entropy = totals(case(5, 50))
    logprob.dlogits(c.z, c.y, lse, g, c.z)
    exact = plain_dlogits(case(5, 50), lse, entropy, g, 0 * g, torch.float64)
    assert worst(c.z, exact) < 1e-6 and not c.z[1].any() and not c.z[3].any()


@pytest.mark.parametrize("head", [{}, {"temperature": 0.7}, {"softcap": 30.0}], ids=str)
def test_dlogits_large_logits_and_minus_infinity(blocks_of_16, head):
    c = case(8, 50, head=head)
    c.z[0] += 3e4
    c.z[1] -= 3e4
    c.z[2] = 3e4
    c.z[3, ::2] = -3e4
    c.z[4, 20] = 3e4
    c.y[4] = 20
    c.z[5, ::3] = -INF
    c.z[6, :33] = -INF
    out = check_dlogits(c)
    assert "softcap" in head or (not out[5, ::3].any() and not out[6, :33].any())
    c.z[7] = -INF
    if not head.get("softcap"):
        lse, _ = totals(c)
        assert lse[7] == -INF
        logprob.dlogits(c.z, c.y, lse, upstream(8)[0], out, **head)
        assert out.isfinite().all() and not out[7].any()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_results_are_rounded_to_nearest_even(dtype):
    """With z' = lse = 0 the result is -g."""
    eps = torch.finfo(dtype).eps
    g = 1 + eps * torch.tensor([0.5, 1.5, 0.49, 0.51, 1.0], device=DEVICE)
    z, zero = torch.zeros(5, 1, dtype=dtype, device=DEVICE), torch.zeros(5, device=DEVICE)
    out = torch.empty_like(z)
    logprob.dlogits(z, torch.full((5,), -1, device=DEVICE), zero, g, out)
    assert torch.equal(out[:, 0], -g.to(dtype))


# ---- target_dot ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 31, 64, 1000, 4097])
def test_target_dot(d, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, d, generator=generator).to(dtype).to(DEVICE)
    weight = torch.randn(50, d + 3, generator=generator).to(dtype).to(DEVICE)[:, 1 : d + 1]
    y = torch.randint(0, 50, (33,), generator=generator).to(DEVICE)
    for r in (0, 1, 33):
        got = logprob.target_dot(hidden[:r], weight, y[:r])
        products = hidden[:r].double() * weight[y[:r]].double()
        assert got.dtype == torch.float32 and got.shape == (r,)
        assert ((got - products.sum(1)).abs() <= 1e-6 * products.abs().sum(1)).all()
    strided = hidden.repeat(1, 2)[::3, :d]
    assert torch.equal(logprob.target_dot(strided, weight, y[::3].contiguous()), got[::3])
    y[:5] = torch.tensor([-1, 50, -100, 2**40, 2**32])
    outside = logprob.target_dot(hidden, weight, y)
    assert not outside[:5].any() and torch.equal(outside[5:], got[5:])


# ---- properties ----

FEW = settings(max_examples=25)  # the interpreter takes milliseconds a row
tiles = st.builds(
    case,
    r=st.integers(1, 3),
    c=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    head=st.sampled_from(HEADS),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    seed=st.integers(0, 10**6),
)


@FEW
@given(tiles, st.data())
def test_property_tiles_do_not_matter(c, data):
    cuts = data.draw(st.lists(st.integers(1, c.z.shape[1]), max_size=4, unique=True))
    edges = [0, *sorted({*cuts, c.z.shape[1]})]
    widths = [b - a for a, b in pairwise(edges)]
    one, many, step = folded(c), folded(c, widths), step_of(c)
    assert worst(one.lse, many.lse) <= 1e-6 + 4 * step
    assert worst(one.entropy, many.entropy) <= 2e-6 + 4 * step
    assert worst(one.p[:, -widths[-1] :], many.p * many.share[:, None]) <= 1e-6 + 4 * step


@FEW
@given(tiles)
def test_property_p_sums_to_one_and_shares_too(c):
    c.head.pop("softcap", None)  # whose slope is in p
    first = folded(c)
    assert worst(first.p.sum(1), first.share) < 4e-6
    if c.z.shape[1] > 1:
        last = folded(c, [1, c.z.shape[1] - 1])
        alive = last.share > 0
        assert worst(last.p.sum(1)[alive], torch.ones_like(last.lse)[alive]) < 4e-6
        bias = {k: v[:1] for k, v in c.head.items() if k == "bias"}
        before = folded(c._replace(z=c.z[:, :1], head=c.head | bias)).lse
        some = last.lse > -INF
        assert worst(last.share[some], 1 - (before - last.lse)[some].exp()) < 4e-6


@FEW
@given(tiles, st.sampled_from([-64.0, -1.0, 0.5, 2.0, 512.0]))
def test_property_shift_invariance(c, shift):
    c = c._replace(z=(c.z.float() * 256).round() / 256, head={})  # so that the sum is exact
    a, b = folded(c), folded(c._replace(z=c.z + shift))
    top = ulp((c.z.abs().max() + abs(shift)).item())
    assert worst(a.p, b.p) <= 1e-6 and worst(a.entropy, b.entropy) <= 2e-6
    assert worst(a.lse + shift, b.lse) <= 2 * top


@FEW
@given(tiles, st.randoms(use_true_random=False))
def test_property_rows_know_nothing_of_each_other(c, random):
    order = list(range(len(c.z)))
    random.shuffle(order)
    order = order[: random.randint(1, len(order))]
    picked = c._replace(z=c.z[order].contiguous(), y=c.y[order])
    for a, b in zip(folded(c), folded(picked), strict=True):
        assert torch.equal(a[order], b)
    (lse, entropy), (g, g_entropy) = totals(c), upstream(len(c.z))
    out, some = torch.empty_like(c.z), torch.empty_like(picked.z)
    logprob.dlogits(c.z, c.y, lse, g, out, g_entropy=g_entropy, entropy=entropy, **c.head)
    logprob.dlogits(
        picked.z, picked.y, lse[order], g[order], some,
        g_entropy=g_entropy[order], entropy=entropy[order], **c.head,
    )  # fmt: skip
    assert torch.equal(out[order], some)


@FEW
@given(tiles)
def test_property_gradient_rows_sum_to_minus_g(c):
    """Without a target in the tile and without softcap, -g c: what the target's own term is for."""
    c.head.pop("softcap", None)
    (lse, entropy), (g, g_entropy) = totals(c), upstream(len(c.z))
    c = c._replace(y=torch.full_like(c.y, -1))
    out = torch.empty_like(c.z, dtype=torch.float32)
    logprob.dlogits(c.z, c.y, lse, g, out, g_entropy=g_entropy, entropy=entropy, **c.head)
    gain = c.head.get("scale", 1.0) / c.head.get("temperature", 1.0)
    loose = 2e-6 + 8 * step_of(c) * (1 + entropy)
    assert ((out.sum(1) + g * gain).abs() <= loose * gain * (1 + g.abs() + g_entropy.abs())).all()


# ---- offsets ----


class Seen(NamedTuple):
    addresses: set[int]

    def offsets(self, x: torch.Tensor, width: int) -> set[int]:
        """How many elements past x[0, 0] the rows began, columns taken off."""
        offsets = {(a - x.data_ptr()) // x.element_size() for a in self.addresses}
        return {o for o in offsets if 0 <= o and not any(0 < o - p < width for p in offsets)}


@contextmanager
def watched(*real: torch.Tensor):
    """In the interpreter, addresses outside the `real` tensors are noted down in place of being
    touched, so that a kernel can be launched with rows further apart than any memory holds."""
    from types import SimpleNamespace

    import numpy as np
    from triton.runtime import interpreter

    actual, seen = interpreter._interpreter, Seen(set())
    spans = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in real]

    def is_real(addresses, mask) -> bool:
        live = [int(a) for a in addresses[mask]]
        inside = [any(a <= x < b for a, b in spans) for x in live]
        assert all(inside) or not any(inside)
        if not any(inside):
            seen.addresses.update(live)
        return all(inside) and bool(live)

    def load(addresses, mask, other, dtype):
        if is_real(addresses, mask):
            return actual.load(addresses, mask, other, dtype)
        return np.zeros(addresses.shape, dtype)

    def store(addresses, values, mask):
        if is_real(addresses, mask):
            actual.store(addresses, values, mask)

    names = {name: getattr(actual, name) for name in dir(actual) if not name.startswith("__")}
    with pytest.MonkeyPatch.context() as patch:
        stand_in = SimpleNamespace(**(names | {"load": load, "store": store}))
        patch.setattr(interpreter, "_interpreter", stand_in)
        yield seen


@pytest.mark.skipif(DEVICE != "cpu", reason="watches the interpreter's memory")
@pytest.mark.parametrize("kernel", ["fold", "dlogits", "forward", "backward", "target_dot"])
def test_offsets_take_64_bits(kernel):
    far, width, config = 2**30, 20, tuning.Rows(32, 1)
    x, out = torch.zeros(2, width), torch.zeros(2, width)
    y, v = torch.zeros(5, dtype=torch.int64), [torch.ones(5) for _ in range(5)]
    factors, head = rows.factors(1.0, None, 1.0), {"HAS_BIAS": False, "HAS_SOFTCAP": False}
    cap, bias = {"HAS_SOFTCAP": False}, x
    launches = {
        "fold": lambda: rows.launch(
            logprob.fold_kernel, 5, config, x, y, *v[:3], out, bias, width, far, far + 32, 5, 1,
            *factors, **head, ENTROPY=True, WRITE_P=True,
        ),
        "dlogits": lambda: rows.launch(
            logprob.dlogits_kernel, 5, config, x, y, *v[:4], bias, out, width, far, far + 32,
            *factors, **head, HAS_ENTROPY=False,
        ),
        "forward": lambda: rows.launch(
            gather.gather_forward_kernel, 5, config, x, y, *v[:3], width, far, -100, *factors,
            **cap,
            ENTROPY=True,
        ),
        "backward": lambda: rows.launch(
            gather.gather_backward_kernel, 5, config, x, y, *v, out, width, far, far + 32, -100,
            *factors, **cap, HAS_ENTROPY=False, HAS_LSE=False,
        ),
        "target_dot": lambda: rows.launch(
            logprob.target_dot_kernel, 5, config, x, out, y, v[0], width, 50, far, far + 32,
        ),
    }  # fmt: skip
    y[:] = torch.arange(5)
    with watched(y, *v) as seen:
        launches[kernel]()
    assert {far * i for i in range(5)} <= seen.offsets(x, width)
    if kernel != "forward":
        assert {(far + 32) * i for i in range(5)} <= seen.offsets(out, width)
    assert len(seen.addresses) <= 2 * 5 * width


@pytest.mark.gpu
def test_rows_more_than_2_to_the_31_elements_in():
    """2**31 + 64 columns apart, 8.6 GB of bfloat16."""
    far, c = 2**31 + 64, case(2, 1000, torch.bfloat16)
    room = torch.empty(far + 1000, dtype=torch.bfloat16, device=DEVICE)
    z = room.as_strided((2, 1000), (far, 1))
    z.copy_(c.z)
    check_fold(c._replace(z=z))
    check_dlogits(c._replace(z=z), out=z)
