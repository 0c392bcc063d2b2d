"""prefopt_kernels.fused against float64, and a row's independence of its batch, bit for bit; on the
GPU or in Triton's interpreter.

The criterion: an error against float64 of at most what plain torch float32 arithmetic on the same
inputs has, plus 1e-6 and 2 ulp of the largest logit. On a GPU 5e-5 in place of 1e-6: matrix units
need not round each addition to nearest.
"""

import itertools
import math

import pytest
import torch
from triton import knobs

from prefopt_kernels import fused, rows, tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLACK = 1e-6 if DEVICE == "cpu" else 5e-5
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
PLAIN = {}
FULL = {"scale": 1.3, "softcap": 8.0, "temperature": 0.7}
INF = math.inf


def inputs(m: int, h: int, v: int, dtype=torch.bfloat16, seed=0, spread=3.0):
    """hidden [m, h], weight [v, h], y [m] (some of it no column), bias [v] with -inf in it; logits
    of about `spread`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(m, h, generator=generator) * spread / math.sqrt(h)).to(dtype)
    weight = torch.randn(v, h, generator=generator).to(dtype)
    y = torch.randint(-1, v + 1, (m,), generator=generator)
    bias = torch.randn(v, generator=generator)
    bias[1::3] = -INF
    return [x.to(DEVICE) for x in (hidden, weight, y, bias)]


def plain(hidden, weight, y, dtype, bias=None, scale=1.0, softcap=None, temperature=1.0):
    """What torch makes of it in `dtype`: lse and entropy without column y, and the largest |z'|."""
    z = hidden.to(dtype) @ weight.to(dtype).T
    z = scale * (z if bias is None else z + bias.to(dtype))
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    largest = z[z.isfinite()].abs().max().item() if z.isfinite().any() else 0.0
    columns = torch.arange(len(weight), device=z.device)
    z = torch.where(columns == y[:, None], -INF, z)
    lse = z.logsumexp(1)
    logp = z - lse.nan_to_num(neginf=0.0)[:, None]
    return lse, -torch.where(z == -INF, 0.0, logp.exp() * logp).sum(1), largest


def worst(x, exact):
    assert torch.equal(x == -INF, exact == -INF)
    errors = (x.double() - exact)[exact != -INF].abs()
    return errors.max().item() if len(errors) else 0.0


def assert_right(got, hidden, weight, y, **options):
    exact_lse, exact_entropy, largest = plain(hidden, weight, y, torch.float64, **options)
    their_lse, their_entropy, _ = plain(hidden, weight, y, torch.float32, **options)
    ulp = torch.finfo(torch.float32).eps * largest
    lse, entropy = got
    assert lse.dtype == torch.float32 and lse.shape == y.shape
    assert worst(lse, exact_lse) <= worst(their_lse, exact_lse) + SLACK + 2 * ulp
    if entropy is not None:
        assert entropy.dtype == torch.float32 and entropy.shape == y.shape
        assert (entropy >= 0).all()
        error = worst(entropy, exact_entropy)
        assert error <= worst(their_entropy, exact_entropy) + 4 * SLACK + 2 * ulp


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("h", [1, 16, 31, 64, 100])
@pytest.mark.parametrize("v", [1, 2, 31, 1000, 4097])
def test_error_against_float64(dtype, h, v):
    for m, (with_bias, head) in zip((33, 1), ((True, FULL), (False, PLAIN)), strict=True):
        hidden, weight, y, bias = inputs(m, h, v, dtype)
        options = {**head, "bias": bias} if with_bias else head
        got = fused.fused_fold(hidden, weight, y, entropy=with_bias, **options)
        assert_right(got, hidden, weight, y, **options)


@pytest.mark.parametrize("name", ["bias", "scale", "softcap", "temperature", "entropy"])
def test_each_option_alone(name):
    hidden, weight, y, bias = inputs(9, 64, 700)
    options = {"bias": bias.bfloat16(), **FULL}
    options = {k: x for k, x in options.items() if k == name}
    got = fused.fused_fold(hidden, weight, y, entropy=name == "entropy", **options)
    assert (got[1] is not None) == (name == "entropy")
    assert_right(got, hidden, weight, y, **options)


def test_no_rows_and_no_columns():
    hidden, weight, y, _ = inputs(0, 16, 5)
    lse, entropy = fused.fused_fold(hidden, weight, y, entropy=True)
    assert lse.shape == entropy.shape == (0,) and lse.dtype == entropy.dtype == torch.float32
    assert fused.fused_fold(hidden, weight, y)[1] is None
    hidden, _, y, _ = inputs(5, 16, 5)
    lse, entropy = fused.fused_fold(hidden, weight[:0], y, entropy=True)
    assert (lse == -INF).all() and (entropy == 0).all() and len(lse) == 5


def test_targets_at_tile_and_split_edges():
    tile = tuning.fused_tile(tuning.arch(torch.device(DEVICE)), torch.float32, 16)
    v = tile.columns * tuning.TILES_PER_SPLIT * 2 + 1
    step = tile.columns
    edges = {e + d for e in range(0, v + step, step) for d in (-1, 0, 1)} | {
        v - 1,
        v,
        -100,
        2**32 + v - 1,
    }
    y = torch.tensor(sorted(edges), device=DEVICE)
    _, weight, _, _ = inputs(1, 16, v, torch.float32)
    hidden = 4 * weight[y.clamp(0, v - 1)]  # the target's column has the largest logit by far
    assert_right(fused.fused_fold(hidden, weight, y, entropy=True), hidden, weight, y)


def test_rows_to_which_no_column_contributes():
    hidden, weight, _, _ = inputs(3, 16, 300)
    y = torch.tensor([7, 8, -1], device=DEVICE)
    bias = torch.full((300,), -INF, device=DEVICE)
    bias[7] = 0.5
    lse, entropy = fused.fused_fold(hidden, weight, y, bias=bias, entropy=True)
    only = (hidden.double() @ weight[7].double() + 0.5).float()
    assert lse[0] == -INF and entropy[0] == 0
    torch.testing.assert_close(lse[1:], only[1:], atol=2e-6, rtol=0)
    assert (entropy[1:] == 0).all()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_logits_of_30000(dtype, softcap):
    hidden, weight, y, _ = inputs(8, 64, 1000, dtype, spread=1e4)
    assert plain(hidden, weight, y, torch.float64)[2] > 2e4
    got = fused.fused_fold(hidden, weight, y, softcap=softcap, entropy=True)
    assert_right(got, hidden, weight, y, softcap=softcap)


@pytest.mark.parametrize("base", [30000.0, -30000.0])
def test_large_logits_keep_the_digits_of_their_differences(base):
    """All products here are exact, so the entropy has no excuse."""
    weight = (base + torch.arange(1000) % 13 * 0.25).to(DEVICE)[:, None]
    hidden, y = torch.ones(3, 1, device=DEVICE), torch.tensor([0, 12, -1], device=DEVICE)
    lse, entropy = fused.fused_fold(hidden, weight, y, entropy=True)
    exact_lse, exact_entropy, _ = plain(hidden, weight, y, torch.float64)
    assert worst(entropy, exact_entropy) < 2e-6
    assert worst(lse, exact_lse) <= 2**-10  # half an ulp of 30000


def test_a_rising_maximum_over_tiles_and_splits():
    """Every tile's maximum is above the last one's, so every fold rescales what it has."""
    v = 2000
    weight = torch.linspace(-80, 80, v, device=DEVICE)[:, None].contiguous()
    hidden = torch.tensor([[1.0], [-1.0], [0.3]], device=DEVICE)
    y = torch.tensor([v - 1, 0, 77], device=DEVICE)
    assert_right(fused.fused_fold(hidden, weight, y, entropy=True), hidden, weight, y)


def launched(hidden, weight, y, tile, tiles):
    factors = rows.factors(1.0, None, 1.0)
    return fused.launch(
        hidden, weight, y, None, *factors, has_softcap=False, entropy=True, tile=tile, tiles=tiles
    )


def test_more_row_blocks_than_a_group():
    hidden, weight, y, _ = inputs(16 * 16 + 5, 32, 120)
    tile = tuning.Tile(rows=16, columns=32, depth=32, warps=4, stages=1)
    assert_right(launched(hidden, weight, y, tile, 2), hidden, weight, y)


@pytest.mark.parametrize("tiles", [1, 2, 100])
def test_any_number_of_splits(tiles):
    """70 splits are three turns of the combining kernel, one split is less than one."""
    hidden, weight, y, _ = inputs(5, 32, 16 * 70 - 3)
    tile = tuning.Tile(rows=16, columns=16, depth=32, warps=4, stages=1)
    assert_right(launched(hidden, weight, y, tile, tiles), hidden, weight, y)


# ---- a row does not see its batch ----


def same(a, b):
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b))  # noqa: B905


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("h", [64, 31])
def test_a_row_is_bitwise_the_same_in_any_batch_at_any_position(dtype, h):
    hidden, weight, y, bias = inputs(70, h, 600, dtype)

    def fold(chosen):
        return fused.fused_fold(hidden[chosen], weight, y[chosen], bias=bias, entropy=True, **FULL)

    whole = fold(slice(None))
    for row in (0, 1, 31, 32, 63, 69):  # at the edges of blocks
        assert same(fold(slice(row, row + 1)), [x[row : row + 1] for x in whole])
    for start, stop in ((0, 33), (5, 70), (31, 65)):
        assert same(fold(slice(start, stop)), [x[start:stop] for x in whole])
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    assert same(fold(order), [x[order] for x in whole])
    repeated = torch.full((40,), 17)
    assert same(fold(repeated), [x[repeated] for x in whole])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy, about NaN
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_neighbours_of_a_broken_row_are_untouched(softcap):
    hidden, weight, y, _ = inputs(6, 64, 300)
    clean = fused.fused_fold(hidden, weight, y, entropy=True, softcap=softcap)
    hidden[2] = float("nan")
    hidden[4] = INF
    lse, entropy = fused.fused_fold(hidden, weight, y, entropy=True, softcap=softcap)
    assert lse[2].isnan() and entropy[2].isnan() and lse[4].isnan()
    rest = [0, 1, 3, 5]
    assert same((lse[rest], entropy[rest]), [x[rest] for x in clean])


@pytest.mark.parametrize("h", [64, 31])
def test_memory_layout_does_not_show(h):
    hidden, weight, y, bias = inputs(12, h, 300)
    expected = fused.fused_fold(hidden, weight, y, bias=bias, entropy=True)
    wide = torch.full((24, h + 33), float("nan"), dtype=hidden.dtype, device=DEVICE)
    for offset, step, extra in itertools.product((0, 1), (1, 2), (0, 5)):
        rows_ = wide[offset : offset + 12 * step : step, extra : extra + h]
        rows_.copy_(hidden)
        assert same(fused.fused_fold(rows_, weight, y, bias=bias, entropy=True), expected)
        wide.fill_(float("nan"))
    transposed = hidden.T.contiguous().T
    assert same(fused.fused_fold(transposed, weight, y, bias=bias, entropy=True), expected)
    wide = torch.full((300, h + 9), float("nan"), dtype=weight.dtype, device=DEVICE)
    wide[:, :h] = weight
    assert same(fused.fused_fold(hidden, wide[:, :h], y, bias=bias, entropy=True), expected)


def test_layouts_that_would_compile_other_code_are_copied():
    """What reaches the kernel has one alignment and one kind of stride for each hidden size."""
    even = torch.zeros(8, 96)
    for kept in (even[:, :64], even[::2, :64], even[1:, 16:80]):
        assert fused._one_layout(kept) is kept
    for copied in (
        even[:, 1:65],
        torch.zeros(8, 70)[:, :64],
        torch.zeros(64, 8).T,
        even[:, ::2][:, :48],
    ):
        aligned = fused._one_layout(copied)
        assert aligned is not copied and aligned.is_contiguous() and torch.equal(aligned, copied)
    odd = torch.zeros(9, 31, dtype=torch.bfloat16)
    assert fused._one_layout(odd) is odd
    assert fused._one_layout(odd[1:]).data_ptr() % 16 == 0
    assert fused._one_layout(torch.zeros(9, 64)[:, :31]).stride() == (31, 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs tensors on files")
def test_offsets_beyond_two_to_the_31(tmp_path):
    """Rows 2^30 elements apart, in files of which only the rows take space."""
    small, weight, y, _ = inputs(3, 16, 3)
    expected = fused.fused_fold(small, weight, y)

    def far(x, name):
        size = 2 * 2**30 + 16
        flat = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=x.dtype)
        return flat.as_strided((3, 16), (2**30, 1)).copy_(x)

    assert same(fused.fused_fold(far(small, "hidden"), weight, y)[:1], expected[:1])
    assert same(fused.fused_fold(small, far(weight, "weight"), y)[:1], expected[:1])


# ---- what it does not take ----


def test_supported_architectures():
    for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950"):
        assert fused.supported(arch) is None
        assert isinstance(tuning.fused_tile(arch, torch.bfloat16, 4096), tuning.Tile)
    assert "no matrix instructions for sm_75" in fused.supported("sm_75")
    assert "not for gfx1100" in fused.supported("gfx1100")
    hidden, weight, y, _ = inputs(2, 16, 5)
    with tuning.as_if("sm_75"), pytest.raises(ValueError, match="sm_75"):
        fused.fused_fold(hidden, weight, y)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU there is nothing to refuse")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    hidden, weight, y, _ = inputs(2, 16, 5)
    with pytest.raises(
        ValueError, match="not on cpu; for a test on the CPU set TRITON_INTERPRET=1"
    ):
        fused.fused_fold(hidden, weight, y)


def test_tiles_depend_on_what_they_may():
    """On architecture, type and hidden size; and the newest older architecture stands in."""
    assert tuning.fused_tile("sm_86", torch.bfloat16, 64) == tuning.fused_tile(
        "sm_80", torch.float16, 4096
    )
    assert tuning.fused_tile("sm_90", torch.bfloat16, 4096).columns == 256
    assert tuning.fused_tile("sm_121", torch.bfloat16, 64) == tuning.fused_tile(
        "sm_120", torch.bfloat16, 64
    )
    for arch, dtype, h in itertools.product(("sm_80", "sm_90", "gfx942"), FLOATS, (64, 100)):
        assert h == 100 or h % tuning.fused_tile(arch, dtype, h).depth == 0


def test_arguments_that_do_not_fit():
    hidden, weight, y, bias = inputs(4, 16, 5)
    for wrong in (
        (hidden[:, :8], weight, y),
        (hidden.float(), weight, y),
        (hidden, weight, y[:3]),
        (hidden, weight, y.int()),
        (hidden, weight.T.contiguous().T, y),
        (hidden.double(), weight.double(), y),
    ):
        with pytest.raises(AssertionError):
            fused.fused_fold(*wrong)
    with pytest.raises(AssertionError):
        fused.fused_fold(hidden, weight, y, bias=bias[:4])


def test_the_search_runs_once_for_a_key(monkeypatch):
    times, asked = {"slow": 2.0, "fast": 1.0, "too large": math.inf}, []

    def milliseconds(run, candidate, repeats):
        asked.append(candidate)
        return times[candidate]

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_found", {})
    for _ in range(2):
        assert tuning.searched(("k", 1), ["slow", "too large", "fast"], print) == "fast"
    assert asked == ["slow", "too large", "fast"]
    assert tuning.searched(("k", 2), ["slow"], print) == "slow"
    with pytest.raises(RuntimeError, match="no candidate"):
        tuning.searched(("k", 3), ["too large"], print)
    assert [tuning.bucket(n) for n in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]
