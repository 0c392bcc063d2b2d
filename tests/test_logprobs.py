"""token_, gather_ and sequence_logprobs against plain log_softmax on full logits."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import logprobs as lp
from prefopt.errors import InputError


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


@pytest.fixture(params=[1 << 30, 4 * 31 * 8], ids=["one chunk", "chunks of 4 rows"])
def workspace(request, monkeypatch):
    monkeypatch.setitem(lp.WORKSPACE_BYTES, "cpu", request.param)


HEADS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0, "temperature": 1.3},
    {"scale": 0.25},
    {"bias": True, "scale": 2.0, "softcap": 5.0},
]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("trains", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_equal_autograd_through_full_logits(head, trains, workspace):
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
def test_gradcheck(train_weight, entropy):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64(dtype):
    """512 tokens over 4,096 words; the bound on the sum is what the float32 target logit buys."""
    hidden, weight, targets = inputs(512, 64, 4096, dtype, seed=3)
    want, _ = plain(hidden.double(), weight.double(), targets)
    got = lp.token_logprobs(hidden, weight, targets)
    assert got.dtype == torch.float32
    error = (got.double() - want).abs()
    assert error.max() <= (5e-5 if dtype == torch.float32 else 0.15)
    assert abs((got.double() - want).sum()) <= (1e-3 if dtype == torch.float32 else 0.05 * 512**0.5)
    if dtype != torch.float32:  # no worse than rounding the logits and then working in float32
        rounded = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        assert error.mean() < (rounded.double() - want).abs().mean()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_gradient_error_against_float64(dtype, bound, trained):
    """Within the bound, and no worse than autograd through the logits of the same dtype."""
    hidden, weight, targets = inputs(64, 48, 500, dtype, seed=4)
    hidden = hidden / 4  # logits of a few units, as a trained model has
    g = torch.randn(64, generator=torch.Generator().manual_seed(5))

    def grads(f, h, w):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_(trained)
        return torch.autograd.grad((f(h, w) * g).sum(), [h, w][: 1 + trained])

    def peer(h, w):
        return (h @ w.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    wants = grads(lambda h, w: plain(h, w, targets)[0], hidden.double(), weight.double())
    ours = grads(lambda h, w: lp.token_logprobs(h, w, targets), hidden, weight)
    for got, want, theirs in zip(ours, wants, grads(peer, hidden, weight), strict=True):
        error, peer_error = ((x.double() - want).norm() / want.norm() for x in (got, theirs))
        assert error <= bound and error <= peer_error + bound / 8, (error, peer_error)


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


def test_logits_are_never_whole(monkeypatch):
    """No tensor larger than the workspace is made, whatever N and V."""
    monkeypatch.setitem(lp.WORKSPACE_BYTES, "cpu", 64 << 10)
    sizes = []
    original = lp.dispatch.mm_nt
    monkeypatch.setattr(
        lp.dispatch, "mm_nt", lambda *a: sizes.append((r := original(*a)).nbytes) or r
    )
    hidden, weight, targets = inputs(300, 8, 1000, torch.float32)
    lp.token_logprobs(hidden.requires_grad_(), weight, targets).sum().backward()
    assert len(sizes) > 30 and max(sizes) <= 64 << 10


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


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gather_logprobs(temperature):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 11, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (2, 3), generator=g)
    got = lp.gather_logprobs(logits, targets, temperature=temperature)
    want = (logits / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: lp.gather_logprobs(x, targets, temperature=temperature), (logits,)
    )
    assert lp.gather_logprobs(logits.bfloat16(), targets).dtype == torch.float32


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


def test_impl_is_explained():
    hidden, weight, targets = inputs()
    assert "on cpu" in lp.dispatch.why_not("logprob", "cpu")
    with pytest.raises(
        InputError, match="impl='triton' cannot run: the logprob kernel needs a CUDA"
    ):
        lp.token_logprobs(hidden, weight, targets, impl="triton")
    with pytest.raises(InputError, match="not 'fast'"):
        lp.token_logprobs(hidden, weight, targets, impl="fast")


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
