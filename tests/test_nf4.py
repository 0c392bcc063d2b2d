"""4-bit weights against the formula, in numpy, and against bitsandbytes, byte for byte."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError
from prefopt.nn import nf4
from prefopt.nn.nf4 import (
    CODEBOOKS,
    absmax,
    bytes_per_parameter,
    dequantize_nf4,
    dynamic_map,
    quantize_nf4,
)
from prefopt.nn.scale_search import FACTORS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 128), (32, 192), (7, 11), (33, 96), (1000,), (129,), (63,), (1, 1), (3, 5, 8))


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def weight(shape, dtype=torch.float32, seed=0, std=0.02):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std
    w.view(-1)[::7] = 0
    if w.numel() >= 128:
        w.view(-1)[64:128] = 0
    return w.to(dtype)


def oracle(p):
    """The formula, element by element, every step rounded to float32; [n]."""
    codes = np.stack([p.codes.numpy() >> 4, p.codes.numpy() & 15], 1).reshape(-1)
    scales = p.scales.numpy()
    if p.nested is not None:
        groups = np.arange(len(scales)) // 256
        scales = dynamic_map().numpy()[scales] * p.nested.numpy()[groups]
        scales = scales + np.float32(p.offset)
    n = p.shape.numel()
    assert scales.dtype == np.float32
    return CODEBOOKS[p.kind].numpy()[codes[:n]] * scales[np.arange(n) // p.block]


def relative_error(w, **options):
    got = dequantize_nf4(quantize_nf4(w, **options))
    return float((got - w).double().square().sum() / w.double().square().sum())


# Constants


def test_the_bounds_of_nf4_are_those_of_the_cuda_kernel():
    _, bounds, order = nf4._sorted_codebook("nf4", torch.device("cpu"))
    literals = [
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
        -0.23460740596055984, -0.13791173315048218, -0.045525018125772476, 0.03979014977812767,
        0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
        0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ]  # fmt: skip
    assert bounds == torch.tensor(literals).tolist()
    assert order.tolist() == list(range(16))


def test_constants_are_those_of_bitsandbytes(bnb):
    for kind, book in CODEBOOKS.items():
        assert torch.equal(bnb.functional.get_4bit_type(kind, device="cpu"), book)
    assert torch.equal(bnb.functional.create_dynamic_map(), dynamic_map())
    assert dynamic_map()[127] == 0 and dynamic_map()[255] == 1


# Bytes of bitsandbytes


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_bitsandbytes(bnb, shape, dtype, kind):
    w = weight(shape, dtype)
    codes, scales = torch.ops.bitsandbytes.quantize_4bit(w, 64, kind, torch.uint8)
    p = quantize_nf4(w, kind=kind, double=False, rounding="bnb_cpu")
    assert torch.equal(p.codes, codes.view(-1)) and torch.equal(p.scales, scales)
    if w.numel() % 64 == 0:  # no block that bitsandbytes divides instead
        assert all(map(torch.equal, quantize_nf4(w, kind=kind, double=False)[:2], p[:2]))
    if w.dim() == 2 and shape[1] % 64 == 0:
        # At other even widths bitsandbytes' AVX-512 decoder takes the scales of other blocks.
        for out in FLOATS:
            theirs = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, 64, kind, shape, out)
            assert torch.equal(dequantize_nf4(p._replace(dtype=out)), theirs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 128), (192, 320), (33, 96), (1000,), (64,)])
def test_nested_scales_are_those_of_bitsandbytes(bnb, shape, dtype):
    w = weight(shape, dtype)
    codes, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    p = quantize_nf4(w, rounding="bnb_cpu")
    assert torch.equal(p.codes, codes.view(-1))
    assert torch.equal(p.scales, state.absmax)
    assert torch.equal(p.nested, state.state2.absmax)
    assert torch.equal(p.offset, state.offset)
    if w.dim() == 2 and shape[1] % 64 == 0:
        assert torch.equal(dequantize_nf4(p), bnb.functional.dequantize_4bit(codes, state))
    # To the nearest, as the CUDA kernel does, few differ, and never by much.
    q = quantize_nf4(w)
    differ = (q.scales.int() - p.scales.int()).abs()
    assert torch.equal(q.codes[:-32], p.codes[:-32]) and differ.max() <= 3
    assert differ.count_nonzero() <= max(1, 0.01 * len(differ))


@pytest.mark.parametrize("search", ["unsigned", "signed"])
def test_bitsandbytes_reads_what_the_search_wrote(bnb, search):
    w = weight((64, 256))
    p = quantize_nf4(w, double=False, search=search)
    args = (p.codes.view(-1, 1), p.scales, 64, "nf4", w.shape, torch.float32)
    assert torch.equal(torch.ops.bitsandbytes.dequantize_4bit(*args), dequantize_nf4(p))


# The formula


@given(
    n=st.integers(1, 700),
    seed=st.integers(0, 99),
    kind=st.sampled_from(sorted(CODEBOOKS)),
    block=st.sampled_from([32, 64, 128]),
    double=st.booleans(),
    search=st.sampled_from([None, "unsigned", "signed"]),
    exponent=st.integers(-20, 20),
)
def test_every_element_has_the_nearest_code_and_the_value_of_the_formula(
    n, seed, kind, block, double, search, exponent
):
    w = weight((n,), seed=seed, std=2.0**exponent)
    p = quantize_nf4(w, kind=kind, block=block, double=double, search=search)
    assert p.codes.shape == ((n + 1) // 2,) and p.scales.shape == (-(-n // block),)
    for impl in ("auto", "torch"):
        assert np.array_equal(dequantize_nf4(p, impl=impl).numpy(), oracle(p))
    # No other value of the codebook is nearer, at the scale that decided.
    a = absmax(p) if search or p.nested is None else w.abs()
    if p.nested is not None and search is None:
        a = torch.cat([part.abs().amax().view(1) for part in w.split(block)])
    a = a.double().repeat_interleave(block)[:n]
    codes = torch.stack([p.codes >> 4, p.codes & 15], 1).view(-1)[:n].int()
    values = CODEBOOKS[kind].double()[:, None] * a
    off = (values - w.double()).abs()
    chosen = off.gather(0, codes[None].long())[0]
    assert bool((chosen <= off.amin(0) + 1e-6 * a.abs()).all())


@given(n=st.integers(1, 500), seed=st.integers(0, 99), kind=st.sampled_from(sorted(CODEBOOKS)))
def test_what_was_quantised_stays_as_it_is(n, seed, kind):
    p = quantize_nf4(weight((n,), seed=seed), kind=kind, double=False)
    again = quantize_nf4(dequantize_nf4(p), kind=kind, double=False)
    assert torch.equal(again.scales, p.scales)
    assert torch.equal(dequantize_nf4(again), dequantize_nf4(p))


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_a_weight_is_rounded_to_its_own_dtype_first(dtype, impl):
    p = quantize_nf4(weight((24, 96), dtype))
    exact = torch.from_numpy(oracle(p)).view(24, 96)
    for out in (None, *FLOATS, torch.float64):
        got = dequantize_nf4(p, out, impl=impl)
        assert got.dtype == (out or dtype) and got.shape == (24, 96)
        assert torch.equal(got, exact.to(dtype).to(got.dtype))


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 640, 1001])
def test_pieces_make_no_difference(monkeypatch, n, block):
    w = weight((n,), torch.bfloat16)
    whole = quantize_nf4(w, block=block, search="signed")
    values = {d: dequantize_nf4(whole, d) for d in (torch.bfloat16, torch.float32, torch.float16)}
    monkeypatch.setattr(nf4, "_ENCODE", 128)
    monkeypatch.setattr(nf4, "_DECODE", 128)
    pieces = quantize_nf4(w, block=block, search="signed")
    assert torch.equal(pieces.codes, whole.codes) and torch.equal(pieces.scales, whole.scales)
    for dtype, value in values.items():
        for impl in ("auto", "torch"):
            assert torch.equal(dequantize_nf4(whole, dtype, impl=impl), value)


def test_into_memory_of_the_caller():
    p = quantize_nf4(weight((8, 64)))
    for out in (torch.empty(8, 64), torch.empty(512), torch.empty(512, dtype=torch.bfloat16)):
        got = dequantize_nf4(p, out=out)
        assert got.data_ptr() == out.data_ptr() and got.shape == (8, 64)
        assert torch.equal(got, dequantize_nf4(p, out.dtype))
    for bad in (torch.empty(511), torch.empty(64, 8).t(), torch.empty(1024)[::2]):
        with pytest.raises(InputError, match="contiguous with 512 elements"):
            dequantize_nf4(p, out=bad)
    with pytest.raises(InputError, match=r"torch\.float16"):
        dequantize_nf4(p, torch.float16, out=torch.empty(512))


def test_float64_is_quantised_as_float32():
    w = weight((4, 64)).double() + 1e-12
    p, q = quantize_nf4(w), quantize_nf4(w.float())
    assert torch.equal(p.codes, q.codes) and p.dtype == torch.float64
    assert torch.equal(dequantize_nf4(p), dequantize_nf4(q).double())


def test_a_weight_that_is_not_contiguous_or_requires_grad():
    w = torch.nn.Parameter(weight((64, 96)))
    p = quantize_nf4(w.t(), double=False)
    q = quantize_nf4(w.detach().t().contiguous(), double=False)
    assert torch.equal(p.codes, q.codes) and not p.scales.requires_grad


# Odd blocks


def test_zeros_denormals_and_constants():
    p = quantize_nf4(torch.zeros(130))
    assert set(p.codes.tolist()) == {0x77} and not dequantize_nf4(p).any()
    for value in (1e-45, -1e-40, 1e-37, 3e38, 1.0):
        for double in (True, False):
            w = torch.full((192,), value)
            got = dequantize_nf4(quantize_nf4(w, double=double))
            if abs(value) > 1e-38:
                assert torch.equal(got, w), value
            assert got.isfinite().all() and (got - w).abs().max() <= abs(value)
    for search in ("unsigned", "signed"):
        assert not dequantize_nf4(quantize_nf4(torch.zeros(130), search=search)).any()


@pytest.mark.parametrize(
    "bad, count", [([float("nan")], 1), ([float("inf"), float("-inf")], 2), ([1e300], 1)]
)
def test_a_damaged_weight_is_refused(bad, count):
    w = weight((256,)).double()
    w[100 : 100 + len(bad)] = torch.tensor(bad, dtype=torch.float64)
    with pytest.raises(InputError, match=f"^{count} of the 256 values .* NaN or infinite"):
        quantize_nf4(w)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block": 63}, "block is 63"),
        ({"kind": "int4"}, "kind is 'int4' .* one of 'nf4', 'fp4'"),
        ({"search": "best"}, "search is 'best'"),
        ({"rounding": "up"}, "rounding is 'up'"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(InputError, match=message):
        quantize_nf4(torch.ones(64), **options)


@pytest.mark.parametrize(
    "w", [torch.ones(64, dtype=torch.int8), torch.ones(0, 4), torch.ones(64, device="meta")]
)
def test_what_is_no_weight(w):
    with pytest.raises(InputError, match="cannot be quantised"):
        quantize_nf4(w)


# Double quantisation


def test_bytes_per_parameter():
    w = weight((256, 256))
    assert bytes_per_parameter(quantize_nf4(w, double=False)) == 0.5 + 4 / 64
    assert bytes_per_parameter(quantize_nf4(w)) <= 0.516


def test_double_quantisation_costs_next_to_nothing_on_ordinary_weights():
    torch.manual_seed(0)
    for w in (torch.randn(512, 512), torch.distributions.StudentT(5.0).sample((512, 512))):
        assert relative_error(w) < 1.006 * relative_error(w, double=False)
        assert quantize_nf4(w).nested is not None


def test_rows_of_different_size_keep_float32_scales():
    """4 rows of standard deviation 1 among 60 of 1e-4, whose scales drown in 8 bits."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    w[4:] *= 1e-4
    p = quantize_nf4(w)
    assert p.nested is None and p.scales.dtype == torch.float32
    small = dequantize_nf4(p)[4:]
    assert (small - w[4:]).square().sum() < 0.01 * w[4:].square().sum()
    forced = p._replace(**nf4._nest(p.scales, "nearest"))
    lost = (dequantize_nf4(forced)[4:] - w[4:]).square().sum() / w[4:].square().sum()
    assert lost > 1 and (absmax(forced) < 0).any()


def test_a_few_dead_blocks_do_not_cost_the_whole_weight_its_format():
    w = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    w[:3] = 1e-9
    w[3:1000] = 0  # zeros are zeros at any scale
    p = quantize_nf4(w)
    assert p.nested is not None and not dequantize_nf4(p)[3:1000].any()
    w[:10] = 1e-9
    assert quantize_nf4(w).nested is None


# Scale search


@pytest.mark.parametrize(
    "search, double, normal, heavy",  # percent off the squared error of NF4
    [
        ("unsigned", False, 14.0, 10.5),
        ("unsigned", True, 14.0, 10.5),
        ("signed", False, 18.5, 15.5),
        ("signed", True, 18.0, 14.0),
    ],
)
def test_the_search_lowers_the_error(search, double, normal, heavy):
    torch.manual_seed(0)
    normals, heavies = torch.randn(512, 512), torch.distributions.StudentT(5.0).sample((512, 512))
    for w, gain in ((normals, normal), (heavies, heavy)):
        plain, found = (relative_error(w, double=double, search=s) for s in (None, search))
        assert 1 - found / plain > gain / 100


@given(seed=st.integers(0, 99), n=st.integers(1, 300), kind=st.sampled_from(sorted(CODEBOOKS)))
def test_the_search_is_never_worse_in_any_block(seed, n, kind):
    assert 1.0 in FACTORS
    w = weight((n,), seed=seed)
    errors = []
    for search in (None, "unsigned", "signed"):
        off = dequantize_nf4(quantize_nf4(w, kind=kind, double=False, search=search)) - w
        errors.append(torch.stack([e.square().sum() for e in off.split(64)]))
    largest = torch.stack([part.square().sum() for part in w.split(64)])
    assert bool((errors[1] <= errors[0] + 1e-6 * largest).all())
    assert bool((errors[2] <= errors[1] + 1e-6 * largest).all())


def test_the_signed_search_turns_blocks_round():
    w = weight((64, 64))
    assert (quantize_nf4(w, double=False, search="signed").scales < 0).any()
    assert (quantize_nf4(w, double=False, search="unsigned").scales >= 0).all()


# Devices and modes


def test_constants_made_in_inference_mode_or_on_meta_serve_elsewhere():
    for cached in (nf4._codebook, nf4._dynamic, nf4._pairs, nf4._sorted_codebook, dynamic_map):
        cached.cache_clear()
    w = weight((4, 64))
    with torch.inference_mode(), torch.device("meta"):
        first = dequantize_nf4(quantize_nf4(w), impl="torch")
    got = dequantize_nf4(quantize_nf4(w), impl="torch")
    assert torch.equal(got, first) and not nf4._pairs("nf4", w.device).is_inference()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double", [True, False])
def test_the_same_bits_on_a_gpu(dtype, double):
    w = weight((256, 192), dtype)
    p, q = quantize_nf4(w, double=double), quantize_nf4(w.cuda(), double=double)
    assert torch.equal(p.codes, q.codes.cpu())
    moved = p._replace(**{k: t.cuda() for k, t in p._asdict().items() if torch.is_tensor(t)})
    for out in FLOATS:
        for impl in ("auto", "torch"):
            assert torch.equal(dequantize_nf4(moved, out, impl=impl).cpu(), dequantize_nf4(p, out))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs on the GPU then")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"double": False}, {"kind": "fp4"}, {"block": 128}])
def test_the_kernel_is_reached_and_has_the_same_bits(dtype, options):
    pytest.importorskip("triton")
    p = quantize_nf4(weight((9, 35), dtype), **options)
    for out in FLOATS:
        assert torch.equal(dequantize_nf4(p, out, impl="triton"), dequantize_nf4(p, out))
    with pytest.raises(InputError, match="impl is one of 'auto', 'torch', 'triton'"):
        dequantize_nf4(p, impl="compiled")
