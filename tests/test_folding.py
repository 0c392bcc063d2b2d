"""The tile loop: memory, dropped rows, kept logits, its kernels, shards, reference rows."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import dispatch, folding, tiles
from prefopt import logprobs as lp
from prefopt.errors import InputError


def inputs(n=13, d=7, v=31, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(0, v, (n,), generator=g)


def gradients(f, *leaves):
    """(values, gradients of a fixed mixture of them) for copies of `leaves` that take gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((x * torch.linspace(-2, 2, len(x)).roll(i)).sum() for i, x in enumerate(out))
    return [*out, *torch.autograd.grad(loss, leaves)]


def assert_all_close(got, want, **tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **tolerance)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(folding, "tile_shape", lambda *a, **k: (4, 8))
    monkeypatch.setitem(folding.RETAIN_BYTES, "cpu", 0)


@pytest.fixture
def products(monkeypatch):
    """The shape of every matrix product's result, in order."""
    shapes, original = [], dispatch.mm_nt

    def spy(*args):
        result = original(*args)
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(dispatch, "mm_nt", spy)
    return shapes


HEADS = [{}, {"temperature": 0.7, "scale": 1.5}, {"softcap": 3.0, "temperature": 1.3, "bias": True}]


@pytest.mark.parametrize("impl", ["triton", "fused"])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("trains, entropy", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("retain", [0, 1 << 20], ids=["recompute", "retain"])
def test_the_kernels_give_what_torch_gives(impl, head, trains, entropy, retain, monkeypatch):
    """The same loop with the kernels (interpreted) against the specification in float64."""
    monkeypatch.setattr(folding, "tile_shape", lambda *a, **k: (8, 16))
    monkeypatch.setitem(folding.RETAIN_BYTES, "cpu", retain)
    hidden, weight, targets = inputs(11, 16, 40, torch.float32)
    head = dict(head)
    bias = torch.linspace(-1, 1, 40) if head.pop("bias", False) else None

    def f(impl, dtype, h, w=weight):
        return lp.token_logprobs(
            h.to(dtype), w.to(dtype), targets, bias=None if bias is None else bias.to(dtype),
            entropy=entropy, impl=impl, **head,
        )  # fmt: skip

    leaves = (hidden, weight) if trains else (hidden,)
    want = gradients(lambda *x: f("torch", torch.float64, *x), *leaves)
    got = gradients(lambda *x: f(impl, torch.float32, *x), *leaves)
    assert_all_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("unit", [True, False])
def test_logits_are_never_whole(unit, products, monkeypatch):
    monkeypatch.setattr(folding, "UNIT_TILE", {"cpu": 16 << 10})
    monkeypatch.setattr(folding, "TILE", {"cpu": 16 << 10})
    monkeypatch.setitem(folding.RETAIN_BYTES, "cpu", 0)
    hidden, weight, targets = inputs(3000, 8, 1000, torch.float32)
    weight.requires_grad_(not unit)
    lp.token_logprobs(hidden.requires_grad_(), weight, targets).sum().backward()
    logits = [r * c for r, c in products if c > 8 and r > 8]
    assert len(logits) >= 4 and max(logits) <= (1024 if unit else 3008) * 256


@pytest.mark.parametrize("trains", [False, True])
def test_a_row_without_gradient_costs_nothing(trains, products, small_tiles):
    hidden, weight, targets = inputs(d=5)
    hidden.requires_grad_()
    weight.requires_grad_(trains)
    logps, entropy = lp.token_logprobs(hidden, weight, targets, entropy=True)
    g = torch.zeros(13, dtype=torch.float64)
    g[[2, 5, 11]] = 1.0
    products.clear()
    (logps * g + entropy * g).sum().backward()
    assert sum(c for r, c in products if r == 3 and c != 5) == 31  # 3 rows, every column once
    assert hidden.grad[[2, 5, 11]].abs().min() > 0
    assert hidden.grad[[0, 1, 3, 4]].abs().max() == 0


def test_kept_logits_are_not_formed_again(products, monkeypatch):
    monkeypatch.setattr(folding, "tile_shape", lambda *a, **k: (4, 8))
    monkeypatch.setitem(folding.RETAIN_BYTES, "cpu", 1 << 20)
    hidden, weight, targets = (x.requires_grad_(x.is_floating_point()) for x in inputs())
    logps = lp.token_logprobs(hidden, weight, targets)
    products.clear()
    first = torch.autograd.grad(logps.sum(), [hidden, weight], retain_graph=True)
    assert len(products) == 2 * 4 * 4  # two products a tile: by the hidden states, by the weight
    second = torch.autograd.grad(logps.sum(), [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_unit_backward_can_run_twice(small_tiles):
    hidden, weight, targets = inputs()
    logps = lp.token_logprobs(hidden.requires_grad_(), weight, targets)
    first, second = (torch.autograd.grad(logps.sum(), hidden, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_policy_and_reference_in_one_product(head, trains, impl, products, small_tiles):
    dtype = torch.float64 if impl == "torch" else torch.float32
    hidden, weight, targets = inputs(10, dtype=dtype)
    ref_hidden, head = hidden.flip(0) * 0.9, dict(head)
    head["bias"] = torch.linspace(-1, 1, 31, dtype=dtype) if head.get("bias") else None
    leaves = (hidden, weight) if trains else (hidden,)

    def both(h, w=weight):
        return lp.token_logprobs_and_reference(h, ref_hidden, w, targets, impl=impl, **head)

    got = gradients(lambda *x: both(*x)[0], *leaves)
    assert (8, 8) in products and (4, 8) not in products[:4]  # tiles of 4 rows of either
    want = gradients(lambda h, w=weight: lp.token_logprobs(h, w, targets, **head), *leaves)
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if impl == "torch" else {"rtol": 1e-4, "atol": 1e-5}
    assert_all_close(got, want, **tolerance)
    ref = both(hidden.requires_grad_())[1]
    assert not ref.requires_grad
    torch.testing.assert_close(
        ref, lp.token_logprobs(ref_hidden, weight, targets, **head), **tolerance
    )


@pytest.mark.parametrize("cuts", [[31], [1, 30], [8, 8, 15], [10, 1, 9, 11]], ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_shards_of_the_vocabulary(cuts, head, entropy, trains, small_tiles):
    """Any cut of the head gives the log-probs, entropies and gradients of the whole."""
    hidden, weight, targets = inputs()
    head = dict(head)
    bias = torch.linspace(-1, 1, 31, dtype=torch.float64) if head.pop("bias", False) else None
    leaves = (hidden, weight) if trains else (hidden,)

    def sharded(h, w=weight):
        starts = [0, *itertools.accumulate(cuts)]
        return lp.join_shards(
            [
                lp.shard_statistics(
                    h, w[a:b], targets, start=a, bias=None if bias is None else bias[a:b],
                    entropy=entropy, **head,
                )
                for a, b in itertools.pairwise(starts)
            ]
        )  # fmt: skip

    def whole(h, w=weight):
        return lp.token_logprobs(h, w, targets, bias=bias, entropy=entropy, **head)

    assert_all_close(gradients(sharded, *leaves), gradients(whole, *leaves), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "triton", "fused"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_a_vocabulary_of_one(impl, entropy, trains):
    hidden, weight, targets = inputs(3, 16, 1, torch.float32)
    weight.requires_grad_(trains)
    got = lp.token_logprobs(hidden.requires_grad_(), weight, targets, entropy=entropy, impl=impl)
    for x in got if entropy else (got,):
        assert x.abs().max() <= 1e-40
    sum(x.sum() for x in (got if entropy else (got,))).backward()
    assert hidden.grad.abs().max() == 0


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_words_that_cannot_come(impl, small_tiles):
    """A bias of -inf, also over whole tiles, takes words out; the rest sums to 1."""
    hidden, weight, targets = inputs(5, 16, 40, torch.float32)
    bias = torch.zeros(40)
    bias[:17] = bias[35] = -torch.inf
    targets = torch.tensor([20, 34, 36, 39, 3])
    logps, entropy = lp.token_logprobs(
        hidden.requires_grad_(), weight, targets, bias=bias, entropy=True, impl=impl
    )
    want = (hidden @ weight.T + bias).log_softmax(-1)
    torch.testing.assert_close(logps[:4], want[range(4), targets[:4]])
    assert logps[4] < -1e29  # minus infinity
    possible = want[:, bias == 0]
    torch.testing.assert_close(entropy, -(possible.exp() * possible).sum(-1))
    (logps[:4].sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 99),
    trains=st.booleans(), entropy=st.booleans(),
)  # fmt: skip
def test_any_tiling_gives_the_same(rows, columns, seed, trains, entropy):
    hidden, weight, targets = inputs(seed=seed)
    leaves = (hidden, weight) if trains else (hidden,)

    def f(h, w=weight):
        return lp.token_logprobs(h, w, targets, entropy=entropy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "tile_shape", lambda *a, **k: (64, 64))
        want = gradients(f, *leaves)
        patch.setattr(folding, "tile_shape", lambda *a, **k: (rows, columns))
        assert_all_close(gradients(f, *leaves), want, rtol=1e-11, atol=1e-12)


@given(
    n=st.integers(0, 70_000), v=st.integers(1, 300_000), unit=st.booleans(),
    trains=st.booleans(), device=st.sampled_from(["cpu", "cuda"]),
)  # fmt: skip
def test_tiles_stay_in_their_budget(n, v, unit, trains, device):
    rows, columns = folding.tile_shape(n, v, device, unit=unit, trains_head=trains)
    assert 1 <= columns <= v and rows >= 16 and rows % 16 == 0
    budget = (folding.UNIT_TILE if unit else folding.TILE).get(device, (128 if unit else 16) << 20)
    assert rows * columns <= max(budget, rows * 256)
    assert rows <= 8192


def test_choosing_an_implementation(monkeypatch):
    assert "on cpu" in dispatch.why_not("logprob", "cpu")
    hidden, weight, targets = inputs()
    with pytest.raises(InputError, match="no float64 variant"):
        lp.token_logprobs(hidden, weight, targets, impl="triton")
    with pytest.raises(InputError, match="not 'fast'"):
        lp.token_logprobs(hidden, weight, targets, impl="fast")
    with pytest.raises(InputError, match="not 'fused'"):
        lp.gather_logprobs(weight, targets[:1].expand(31), impl="fused")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="impl='triton' cannot run: the logprob kernel needs a"):
        lp.token_logprobs(hidden, weight, targets, impl="triton")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_large_logits_keep_the_digits_of_their_differences(impl, small_tiles):
    """Logits around 3e4 that differ by a few: float32 holds them to 2e-3, the entropy no worse."""
    g = torch.Generator().manual_seed(0)
    bias = 3e4 + (torch.randn(40, generator=g) * 512).round() / 256  # exact in float32
    hidden, weight, targets = torch.zeros(6, 16), torch.zeros(40, 16), torch.arange(6) * 7
    logps, entropy = lp.token_logprobs(hidden, weight, targets, bias=bias, entropy=True, impl=impl)
    want = (bias.double() - 3e4).log_softmax(0)
    torch.testing.assert_close(logps.double(), want[targets], rtol=0, atol=4e-3)
    torch.testing.assert_close(
        entropy.double(), -(want.exp() * want).sum().expand(6), rtol=0, atol=4e-3
    )


def test_softmax_onto_itself():
    """tiles.py gives torch.softmax its own input as `out`: exact on every backend it runs on."""
    x = torch.randn(37, 4099, generator=torch.Generator().manual_seed(0)) * 5
    want = torch.softmax(x, 1)
    assert torch.equal(torch.softmax(x, 1, out=x), want)


def test_the_largest_probability_gives_the_sum():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(64, 2048, generator=g) * torch.logspace(-1, 3.5, 64)[:, None]
    lse, share = torch.empty(64), torch.empty(64)
    tiles.fold(z, torch.full((64,), -1), lse, share, first=True)
    want = z.double().logsumexp(1)
    assert ((lse - want).abs() <= 3e-6 + 1e-7 * want.abs()).all()
