"""token_, gather_ and sequence_logprobs against plain log_softmax on full logits."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import folding
from prefopt import logprobs as lp


def plain(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, scale=1.0):
    """The definition, on full logits: (log-prob of the target, entropy)."""
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    logp = (z / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def inputs(n=13, d=7, v=31, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(0, v, (n,), generator=g)


@pytest.fixture(
    params=[((16, 256), 0), ((4, 8), 0), ((4, 8), 1 << 20)],
    ids=["one tile", "tiles of 4 x 8", "tiles of 4 x 8, kept"],
)
def tiling(request, monkeypatch):
    shape, retain = request.param
    monkeypatch.setattr(folding, "tile_shape", lambda *a, **k: shape)
    monkeypatch.setitem(folding.RETAIN_BYTES, "cpu", retain)


HEADS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0, "temperature": 1.3},
    {"scale": 0.25},
    {"bias": True, "scale": 2.0, "softcap": 5.0},
]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("trains", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_equal_autograd_through_full_logits(head, trains, tiling):
    """Frozen head (unit), trained head (recompute) and with entropy; a zeroed upstream row too."""
    head = dict(head)
    train_weight, train_bias, entropy = trains
    hidden, weight, targets = inputs()
    bias = torch.linspace(-1, 1, 31, dtype=torch.float64) if head.pop("bias", False) else None
    leaves = [hidden.requires_grad_(), weight.requires_grad_(train_weight)]
    if bias is not None:
        leaves.append(bias.requires_grad_(train_bias))
    leaves = [x for x in leaves if x.requires_grad]
    g = torch.linspace(-2, 2, 13, dtype=torch.float64)  # its middle row is 0

    want, want_entropy = plain(hidden, weight, targets, bias, **head)
    got = lp.token_logprobs(hidden, weight, targets, bias=bias, entropy=entropy, **head)
    loss, want_loss = (g * (got[0] if entropy else got)).sum(), (g * want).sum()
    if entropy:
        torch.testing.assert_close(got[1], want_entropy, rtol=1e-12, atol=1e-12)
        loss, want_loss = (
            loss + (g.flip(0) * got[1]).sum(),
            want_loss + (g.flip(0) * want_entropy).sum(),
        )
    torch.testing.assert_close(got[0] if entropy else got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want_loss, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("train_weight", [False, True])
def test_gradcheck(train_weight, entropy, tiling):
    hidden, weight, targets = inputs(5, 3, 6)
    bias = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def f(h, w, b):
        return lp.token_logprobs(
            h, w, targets, bias=b, temperature=0.8, softcap=2.0, scale=1.5, entropy=entropy
        )

    args = (
        hidden.requires_grad_(),
        weight.requires_grad_(train_weight),
        bias.requires_grad_(train_weight),
    )
    assert torch.autograd.gradcheck(f, args)


def realistic(n, d, v, dtype, seed):
    """|z| up to about 20, the target likely: what a trained model gives."""
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(v, d, generator=g, dtype=torch.float64) * 2 / d**0.5).to(dtype)
    targets = torch.randint(0, v, (n,), generator=g)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64)
    hidden += weight[targets].double() * torch.rand(n, 1, generator=g, dtype=torch.float64) * 4
    return hidden.to(dtype), weight, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64(dtype):
    """512 tokens over 5,000 words, in tiles; the float32 target logit is what keeps the sum."""
    hidden, weight, targets = realistic(512, 96, 5000, dtype, seed=3)
    want, want_entropy = plain(hidden.double(), weight.double(), targets)
    got = lp.token_logprobs(hidden, weight, targets)
    assert got.dtype == torch.float32
    error = (got.double() - want).abs()
    assert error.max() <= (5e-5 if dtype == torch.float32 else 2e-2)
    assert abs((got.double() - want).sum()) <= (1e-3 if dtype == torch.float32 else 5e-2)
    _, entropy = lp.token_logprobs(hidden, weight, targets, entropy=True)
    relative = ((entropy - want_entropy) / want_entropy).abs().max()
    assert relative <= (1e-5 if dtype == torch.float32 else 1e-2)
    if dtype != torch.float32:  # better than rounding the logits and then working in float32
        rounded = naive(hidden, weight, targets, False)
        assert error.mean() < 0.5 * (rounded.double() - want).abs().mean()


def naive(hidden, weight, targets, entropy):
    """What one writes without a library: 16-bit logits, then float32."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    own = logp.gather(1, targets[:, None])[:, 0]
    return (own, -(logp.exp() * logp).sum(-1)) if entropy else own


@pytest.mark.parametrize("mode", ["unit", "retain", "recompute", "entropy"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2.6e-3)])
def test_gradient_error_against_float64(dtype, bound, mode, monkeypatch):
    """Relative, over several tiles each way, for the hidden states and the trained head."""
    monkeypatch.setitem(folding.RETAIN_BYTES, "cpu", (mode == "retain") << 30)
    monkeypatch.setattr(folding, "TILE", {"cpu": 128 << 10})
    hidden, weight, targets = realistic(700, 96, 3000, dtype, seed=4)
    g = torch.randn(700, generator=torch.Generator().manual_seed(5))

    def grads(f, h, w):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_(mode in "retain recompute")
        out = f(h, w)
        loss = (out[0] * g).sum() + (out[1] * g.flip(0)).sum() if mode == "entropy" else (out * g)
        return torch.autograd.grad(loss.sum(), [h, w][: 1 + w.requires_grad])

    def plainly(h, w):
        both = plain(h, w, targets)
        return both if mode == "entropy" else both[0]

    wants = grads(plainly, hidden.double(), weight.double())
    ours = grads(
        lambda h, w: lp.token_logprobs(h, w, targets, entropy=mode == "entropy"), hidden, weight
    )
    theirs = grads(lambda h, w: naive(h, w, targets, mode == "entropy"), hidden, weight)
    for got, want, other in zip(ours, wants, theirs, strict=True):
        assert got.dtype == dtype
        error, naive_error = ((x.double() - want).norm() / want.norm() for x in (got, other))
        assert error <= naive_error + bound / 8
        if mode == "entropy" and dtype != torch.float32:
            # the entropy's gradient is p (log p + H): log p has the rounding of its 16-bit logit
            assert error <= 0.75 * naive_error
        else:
            assert error <= bound


@given(n=st.integers(0, 9), v=st.integers(1, 9), shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_properties(n, v, shift, seed):
    """Shift invariance, sum of exp = 1, rows independent of their order, any chunk size."""
    hidden, weight, targets = inputs(n, 4, v, seed=seed)
    targets = targets.clamp_max(v - 1)
    got = lp.token_logprobs(hidden, weight, targets)
    bias = torch.full((v,), shift, dtype=torch.float64)
    torch.testing.assert_close(
        got, lp.token_logprobs(hidden, weight, targets, bias=bias), atol=1e-9, rtol=1e-9
    )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = lp.token_logprobs(hidden[order], weight, targets[order])
    torch.testing.assert_close(got[order], permuted, atol=1e-13, rtol=1e-13)
    every = [lp.token_logprobs(hidden, weight, torch.full_like(targets, k)).exp() for k in range(v)]
    torch.testing.assert_close(sum(every), torch.ones(n, dtype=torch.float64), atol=1e-12, rtol=0)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[3e4], [-3e4], [0.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    hidden.requires_grad_()
    got = lp.token_logprobs(hidden, weight, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, -1.0986123]))
    got.sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_autocast_runs_in_its_precision():
    hidden, weight, targets = inputs(6, 8, 50, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = lp.token_logprobs(hidden, weight, targets)
    want = lp.token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(got, want) and got.dtype == torch.float32
    got.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("impl, dtype", [("torch", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.6, None), (1.2, 4.0)])
@pytest.mark.parametrize("entropy", [False, True])
def test_gather_logprobs(impl, dtype, temperature, softcap, entropy):
    """Values and gradients against the definition in float64; the last row is masked."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 11, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (2, 3), generator=g)
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    logp = (z / temperature).log_softmax(-1)
    want = [logp.gather(-1, targets[..., None])[..., 0]]
    want += [-(logp.exp() * logp).sum(-1)] if entropy else []
    live = torch.ones(2, 3, dtype=torch.float64)
    targets, live[1, 2] = targets.clone(), 0
    targets[1, 2] = -100
    ours = logits.detach().to(dtype).requires_grad_()
    got = lp.gather_logprobs(
        ours, targets, temperature=temperature, softcap=softcap, entropy=entropy, impl=impl
    )
    got = got if entropy else (got,)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if impl == "torch" else {"rtol": 2e-6, "atol": 2e-6}
    mixture = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and a[1, 2] == 0
        torch.testing.assert_close(a.double(), b * live, **tolerance)
    loss, want_loss = (sum((x.double() * mixture * live).sum() for x in xs) for xs in (got, want))
    (a,), (b,) = torch.autograd.grad(loss, ours), torch.autograd.grad(want_loss, logits)
    torch.testing.assert_close(a.double(), b, **tolerance)
    assert lp.gather_logprobs(logits.bfloat16(), targets).dtype == torch.float32


def test_gather_logprobs_of_extreme_logits():
    logits = torch.tensor([[3e4, -3e4, 0.0], [-torch.inf, 1.0, 1.0], [-torch.inf, 0.0, -torch.inf]])
    logits.requires_grad_()
    got, entropy = lp.gather_logprobs(logits, torch.tensor([2, 1, 1]), entropy=True)
    torch.testing.assert_close(got, torch.tensor([-3e4, -0.6931472, 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 0.6931472, 0.0]))
    (got.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[1, 0] == 0


def test_sequence_logprobs():
    logps = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 2, 2, 0])
    sums = lp.sequence_logprobs(logps, ids, 4)
    assert sums.tolist() == [5.0, 0.0, 5.0, 0.0]
    assert lp.sequence_logprobs(logps, ids, 3, average=True).tolist() == [2.5, 0.0, 2.5]
    assert torch.autograd.gradcheck(lambda x: lp.sequence_logprobs(x, ids, 4), (logps,))
    assert lp.sequence_logprobs(torch.zeros(0), torch.zeros(0, dtype=torch.long), 2).tolist() == [
        0,
        0,
    ]


@given(st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=40), st.integers(0, 5))
def test_sequence_sum_does_not_depend_on_its_place(values, others):
    """Bitwise the same sum alone and behind other responses."""
    own = torch.tensor(values)
    alone = lp.sequence_logprobs(own, torch.zeros(len(own), dtype=torch.long), 1)
    packed = torch.cat([torch.linspace(-9, -1, 7).repeat(others), own])
    ids = torch.cat([torch.arange(others).repeat_interleave(7), torch.full((len(own),), others)])
    assert torch.equal(lp.sequence_logprobs(packed, ids, others + 1)[-1:], alone)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (64, 33, 17)])
def test_onednn_gemm_is_a_gemm(shape):
    m, k, n = shape
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g) for s in ((m, k), (n, k), (n,)))
    want = x.double() @ w.double().T + b
    torch.testing.assert_close(lp.dispatch.mm_nt(x, w, b).double(), want, rtol=1e-5, atol=1e-5)
    y = torch.randn(m, n, generator=g)
    torch.testing.assert_close(
        lp.dispatch.mm_nt(y, w.t()).double(), y.double() @ w.double(), rtol=1e-5, atol=1e-4
    )
