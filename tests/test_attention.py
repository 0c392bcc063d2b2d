"""Attention over runs against a dense masked softmax written out in float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import attention
from prefopt.attention import Runs, run_attention
from prefopt.data.encode import Encoded
from prefopt.data.packing import pack

MODULE = torch.nn.Module()


def segments(*groups: tuple[int, ...], layout: str = "shared") -> torch.Tensor:
    """The run table of groups given as (prompt length, response lengths...)."""
    encoded = [
        Encoded(np.zeros(p, np.int32), tuple(np.zeros(n, np.int32) for n in lengths), 0)
        for p, *lengths in groups
    ]
    return next(pack(encoded, max_tokens=1 << 20, layout=layout)).segments


def visible(table: torch.Tensor, tokens: int, window: int | None) -> torch.Tensor:
    """[T, T] bool by the definition: same sequence, not ahead, less than `window` behind."""
    see = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, end, p0, p1 in table.tolist():
        sequence = [*range(p0, p1), *range(start, end)]
        for i, query in enumerate(sequence):
            for j, key in enumerate(sequence[: i + 1]):
                if query >= start and (window is None or i - j < window):
                    see[query, key] = True
    return see


def dense(q, k, v, table, scale=None, window=None, softcap=None):
    """q [1, H, T, d], k and v [1, G, T, d] -> [1, T, H, d] with the whole [T, T] mask."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    see = visible(table, q.shape[2], window).to(q.device)
    weights = scores.masked_fill(~see, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2)


def inputs(table, heads=2, groups=2, d=4, dtype=torch.float64, seed=0, e=None):
    g = torch.Generator().manual_seed(seed)
    tokens = int(table[:, 1].max())
    shapes = ((1, n, tokens, size) for n, size in ((heads, d), (groups, d), (groups, e or d)))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def shared(q, k, v, table, scale=None, window=None, softcap=None):
    runs = Runs(table, q.device)
    out, weights = run_attention(
        MODULE, q, k, v, None, segments=runs,
        scaling=scale, sliding_window=window, softcap=softcap,
    )  # fmt: skip
    assert weights is None and runs.calls == 1
    return out


def value_and_gradients(f, qkv, *args, **kwargs):
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = f(*qkv, *args, **kwargs)
    # an upstream gradient that differs at every place
    g = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out, *torch.autograd.grad((out * g.sin()).sum(), qkv)]


lengths = st.integers(1, 9)
groups_of_runs = st.lists(
    st.tuples(lengths, lengths) | st.tuples(lengths, lengths, lengths, lengths),
    min_size=1,
    max_size=3,
)


@given(
    groups=groups_of_runs,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    window=st.none() | st.integers(1, 20),
    softcap=st.none() | st.floats(0.5, 5),
    scale=st.none() | st.floats(0.1, 2),
    value_size=st.sampled_from([4, 4, 3]),
    block=st.integers(1, 12),
)
def test_equals_a_dense_mask(groups, heads, window, softcap, scale, value_size, block):
    """Values and all gradients, for any runs, heads per key head, window, cap and block size."""
    table = segments(*groups)
    how = {"scale": scale, "window": window, "softcap": softcap}
    qkv = inputs(table, *heads, e=value_size)
    want = value_and_gradients(dense, qkv, table, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        got = value_and_gradients(shared, qkv, table, **how)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(block, window, softcap, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    table = segments((3, 4, 1, 3), (2, 3))
    qkv = [x.requires_grad_() for x in inputs(table, 2, 1, 2)]
    assert torch.autograd.gradcheck(
        lambda *x: shared(*x, table, window=window, softcap=softcap), qkv
    )


def test_runs_in_any_order_and_apart():
    """The table, not the order in memory, says what a run sees; here prefixes lie behind runs, and
    two runs lie between a prompt and its response."""
    table = torch.tensor([[0, 4, 9, 12], [4, 9, 4, 4], [9, 12, 9, 9], [12, 15, 4, 9]])
    qkv = inputs(table, 4, 2)
    for window in (None, 3):
        got = value_and_gradients(shared, qkv, table, window=window)
        want = value_and_gradients(dense, qkv, table, window=window)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_queries_that_are_views():
    """Models hand over transposed views; gradients must come back in the same shape."""
    table = segments((4, 5, 3))
    tokens = int(table[:, 1].max())
    flat = [x.transpose(1, 2).contiguous() for x in inputs(table, 4, 2)]
    views = [x.transpose(1, 2) for x in flat]
    assert not views[0].is_contiguous() and views[0].shape == (1, 4, tokens, 4)
    got, want = (value_and_gradients(f, views, table) for f in (shared, dense))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_error_against_float64(dtype, bound, softcap):
    """Relative to the norm of each result, on two pairs that cross the real block size."""
    table = segments((150, 140, 90), (20, 300, 7))
    qkv = inputs(table, 4, 2, 16, dtype, seed=1)
    got = value_and_gradients(shared, qkv, table, window=100, softcap=softcap)
    want = value_and_gradients(dense, [x.double() for x in qkv], table, window=100, softcap=softcap)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < bound


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_autocast_computes_what_16_bit_inputs_give(softcap):
    """To the last bit: the scores are float32 there too. Models hand over float32 queries with
    bfloat16 values, as rotations are in float32."""
    table = segments((20, 30, 9))
    q, k, v = inputs(table, 4, 2, 16, torch.float32)
    rounded = [x.bfloat16() for x in (q, k, v)]
    want = value_and_gradients(shared, rounded, table, window=7, softcap=softcap)

    def under_autocast(*qkv):
        with torch.autocast("cpu", torch.bfloat16):
            return shared(*qkv, table, window=7, softcap=softcap)

    got = value_and_gradients(under_autocast, [q, k, rounded[2]])
    assert [x.dtype for x in got] == [torch.bfloat16, q.dtype, q.dtype, torch.bfloat16]
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(got, want, strict=True))


def test_huge_scores_stay_finite():
    table = segments((4, 3, 3))
    q, k, v = inputs(table, dtype=torch.float32)
    results = value_and_gradients(shared, [q * 1e4, k * 1e4, v], table)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_what_cannot_be_served_is_refused(name):
    """Learned sinks and position biases change the result: dropping them would be silent."""
    table = segments((2, 2))
    q, k, v = inputs(table)
    with pytest.raises(NotImplementedError, match=name):
        run_attention(
            MODULE, q, k, v, None, segments=Runs(table, q.device), **{name: torch.zeros(2)}
        )


# -- the varlen call of CUDA devices


def varlen_reference(
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size=(-1, -1), enable_gqa=False
):
    """What torch.nn.attention.varlen.varlen_attn computes: run by run, causal and windowed from
    the bottom right, q [sum L, H, d], k and v [sum M, G, d] -> [sum L, H, d]."""
    out = torch.empty_like(q)
    left, right = window_size
    assert enable_gqa == (q.shape[1] != k.shape[1])
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        rows, columns = int(q1 - q0), int(k1 - k0)
        assert rows <= max_q and columns <= max_k
        offset = torch.arange(columns) - torch.arange(rows)[:, None] - (columns - rows)
        hidden = (offset > right if right >= 0 else torch.zeros_like(offset, dtype=torch.bool)) | (
            offset < -left if left >= 0 else torch.zeros_like(offset, dtype=torch.bool)
        )
        repeats = q.shape[1] // k.shape[1]
        keys, values = (x[k0:k1].repeat_interleave(repeats, 1).transpose(0, 1) for x in (k, v))
        scores = q[q0:q1].transpose(0, 1) @ keys.transpose(1, 2) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[q0:q1] = (weights @ values).transpose(0, 1)
    return out


@given(
    groups=groups_of_runs,
    heads=st.sampled_from([(2, 2), (4, 2)]),
    window=st.none() | st.integers(1, 20),
    special=st.sampled_from([{}, {}, {"softcap": 2.0}, {"e": 3}]),
)
def test_the_varlen_call_equals_a_dense_mask(groups, heads, window, special):
    """The gathered rows, the offsets and the window handed to the kernel, with the kernel's
    semantics emulated: what differs on a GPU is then the kernel alone. A softcap, or values of
    another size than keys, it does not take."""
    table = segments(*groups)
    softcap = special.get("softcap")
    qkv = inputs(table, *heads, e=special.get("e"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_varlen_attn", lambda: varlen_reference)
        patch.setattr(attention, "varlen_obstacle", lambda query: None)
        got = value_and_gradients(shared, qkv, table, window=window, softcap=softcap)
    want = value_and_gradients(dense, qkv, table, window=window, softcap=softcap)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_varlen_table():
    gather, cu_q, cu_k, max_q, max_k = Runs(segments((3, 3, 1, 2)), torch.device("cpu")).varlen
    assert gather.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert cu_q.tolist() == [0, 3, 5, 6] and cu_k.tolist() == [0, 3, 8, 12]
    assert cu_q.dtype == cu_k.dtype == torch.int32 and gather.dtype == torch.int64
    assert (max_q, max_k) == (3, 5)


@dataclass
class _Query:
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]


def test_why_varlen_is_not_used():
    """Sentences for what can be told without a GPU; on the CPU it is never used."""
    cuda = torch.device("cuda")
    reasons = [
        attention.varlen_obstacle(torch.empty(1, 2, 3, 64, dtype=torch.bfloat16)),
        attention.varlen_obstacle(_Query(cuda, torch.float32, (64,))),
        attention.varlen_obstacle(_Query(cuda, torch.float16, (512,))),
        attention.varlen_obstacle(_Query(cuda, torch.float16, (36,))),
    ]
    for reason, word in zip(reasons, ["cpu", "float32", "512", "36"], strict=True):
        assert word in reason
    assert attention._varlen_attn() is not None  # what _varlen relies on, in this torch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_varlen_on_the_gpu(dtype, window, heads):
    table = segments((150, 140, 90), (20, 300, 7))
    qkv = [x.cuda() for x in inputs(table, *heads, 64, dtype, seed=2)]
    assert attention.varlen_obstacle(qkv[0]) is None
    got = value_and_gradients(shared, qkv, table, window=window)
    want = value_and_gradients(dense, [x.double() for x in qkv], table, window=window)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() / b.norm() < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_blocks_on_the_gpu(softcap):
    table = segments((150, 140, 90), (20, 300, 7))
    qkv = [x.cuda() for x in inputs(table, 4, 2, 64, seed=2)]
    got = value_and_gradients(shared, qkv, table, window=100, softcap=softcap)
    want = value_and_gradients(dense, qkv, table, window=100, softcap=softcap)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
