"""prefopt_kernels.nf4 against the formula in torch, bit for bit; on a GPU or interpreted."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.nn.nf4 import dequantize_nf4, quantize_nf4
from prefopt_kernels import nf4, tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]


class Packed(NamedTuple):
    codes: torch.Tensor
    scales: torch.Tensor
    nested: torch.Tensor | None
    offset: torch.Tensor | None
    codebook: torch.Tensor
    dynamic: torch.Tensor | None
    n: int
    block: int


def packed(n: int, block=64, double=True, seed=0, signed=False) -> Packed:
    """Random codes; scales about as large as those of weights; some negative if `signed`."""
    g = torch.Generator().manual_seed(seed)
    blocks = -(-n // block)
    codes = torch.randint(0, 256, (-(-n // 2),), generator=g, dtype=torch.uint8)
    codebook = torch.randn(16, generator=g).sort().values
    if double:
        scales = torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8)
        nested = torch.rand(-(-blocks // 256), generator=g) * (2 if signed else 0.02)
        dynamic = torch.rand(256, generator=g).mul_(2).sub_(1).sort().values
        parts = scales, nested, torch.tensor(0.0513324737), codebook, dynamic
    else:
        scales = torch.rand(blocks, generator=g) * 0.1 - (0.05 if signed else 0)
        parts = scales, None, None, codebook, None
    moved = (None if p is None else p.to(DEVICE) for p in (codes, *parts))
    return Packed(*moved, n, block)  # pyright: ignore[reportArgumentType]


def scale_of(p: Packed) -> torch.Tensor:
    if p.nested is None:
        return p.scales
    assert p.dynamic is not None and p.offset is not None
    coarse = p.nested.repeat_interleave(256)[: len(p.scales)]
    return p.dynamic[p.scales.long()] * coarse + p.offset


def plain(p: Packed, middle: torch.dtype, out: torch.dtype) -> torch.Tensor:
    code = torch.stack([p.codes >> 4, p.codes & 15], 1).flatten()[: p.n].long()
    scale = scale_of(p).repeat_interleave(p.block)[: p.n]
    return (p.codebook[code] * scale).to(middle).to(out)


def run(p: Packed, middle: torch.dtype, out: torch.dtype) -> torch.Tensor:
    """The kernel's result; what lies around it in memory must stay as it was."""
    room = torch.full((p.n + 64,), 7.0, dtype=out, device=DEVICE)
    got = nf4.dequantize(*p, middle, room[32 : 32 + p.n])
    assert (room[:32] == 7).all() and (room[32 + p.n :] == 7).all()
    return got


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits, with one NaN for all."""
    x = torch.where(x.isnan(), float("nan"), x)
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype and torch.equal(bits(got), bits(want))


@settings(max_examples=40)
@given(
    n=st.integers(1, 3000),
    block=st.sampled_from(BLOCKS),
    double=st.booleans(),
    signed=st.booleans(),
    middle=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_size_type_and_block(n, block, double, signed, middle, out, seed):
    p = packed(n, block, double, seed, signed)
    assert_same(run(p, middle, out), plain(p, middle, out))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_programs_and_nested_blocks(dtype, double):
    """64 x 600 blocks: more than 256, so that there are three nested blocks."""
    p = packed(64 * 600 + 13, 64, double)
    assert_same(run(p, dtype, dtype), plain(p, dtype, dtype))


def test_the_nested_scale_is_rounded_twice():
    """And the data shows the difference: contracted, other bits would come out."""
    p = packed(64 * 2048)
    assert p.nested is not None and p.dynamic is not None and p.offset is not None
    coarse = p.nested.repeat_interleave(256).double()
    contracted = p._replace(
        scales=(p.dynamic[p.scales.long()].double() * coarse + p.offset.double()).float(),
        nested=None,
    )
    got, want = run(p, torch.float32, torch.float32), plain(p, torch.float32, torch.float32)
    assert_same(got, want)
    assert not torch.equal(plain(contracted, torch.float32, torch.float32), want)


def test_rounded_to_the_type_of_the_weight_first():
    p = packed(4096)
    assert_same(
        run(p, torch.bfloat16, torch.float32), run(p, torch.bfloat16, torch.bfloat16).float()
    )
    exact = plain(p, torch.float32, torch.float32)
    assert not torch.equal(run(p, torch.bfloat16, torch.float32), exact)

    assert not torch.equal(run(p, torch.bfloat16, torch.float16), exact.half())


# The interpreter computes with numpy, which speaks up.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_tiny_huge_and_broken_scales(dtype):
    """0, denormal, infinite and NaN; 1e5 is infinite in float16."""
    # The interpreter, not hardware, makes 0 of denormal numbers on the way to bfloat16.
    tiny = 1e-36 if DEVICE == "cpu" and dtype == torch.bfloat16 else 1e-40
    values = [0.0, -0.0, 1e-45, tiny, 6e-8, 1e5, 3e38, float("inf"), float("nan"), -2.0]
    p = packed(64 * len(values), double=False)
    p = p._replace(scales=torch.tensor(values, device=DEVICE))
    p.codebook[7] = 0
    assert_same(run(p, dtype, dtype), plain(p, dtype, dtype))


@pytest.mark.parametrize("config", [(32, 1), (512, 2), (2048, 8)])
def test_the_tile_changes_nothing(config, monkeypatch):
    p = packed(64 * 300 + 5)
    want = run(p, torch.bfloat16, torch.bfloat16)
    monkeypatch.setattr(tuning, "dequantize_config", lambda *_: tuning.Rows(*config))
    assert_same(run(p, torch.bfloat16, torch.bfloat16), want)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_through_prefopt(kind, double):
    """The kernel behind dequantize_nf4 against the torch path, on a quantised weight."""
    w = (torch.randn(70, 129, generator=torch.Generator().manual_seed(0)) * 0.02).to(DEVICE)
    for dtype in DTYPES:
        p = quantize_nf4(w.to(dtype), kind=kind, double=double)
        for out in DTYPES:
            got = dequantize_nf4(p, out, impl="triton")
            assert_same(got, dequantize_nf4(p, out, impl="torch"))


def test_nothing_to_do():
    p = packed(0, double=False)
    assert run(p, torch.float32, torch.float32).numel() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block": 48}, "block is 48"),
        ({"n": 257}, "codes has 128 elements, not 129"),
        ({"codes": torch.zeros(128)}, "codes is torch.float32"),
        ({"scales": torch.zeros(4)}, "scales is torch.float32"),
        ({"scales": torch.zeros(5, dtype=torch.uint8)}, "scales has 5 elements"),
        ({"nested": torch.zeros(2)}, "nested has 2 elements"),
        ({"offset": None}, "all its parts"),
        ({"codebook": torch.zeros(32)[::2]}, "codebook is not contiguous"),
    ],
)
def test_what_it_does_not_take(change, words):
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    p = packed(256)._replace(**moved)
    with pytest.raises(AssertionError, match=words):
        nf4.dequantize(*p, torch.float32, torch.empty(p.n, device=DEVICE))


def test_outputs_that_it_does_not_take():
    p = packed(256)
    for out, words in (
        (torch.empty(255), "255 for 256"),
        (torch.empty(256, dtype=torch.float64), "float64"),
        (torch.empty(512)[::2], "not contiguous"),
    ):
        with pytest.raises(AssertionError, match=words):
            nf4.dequantize(*p, torch.float32, out.to(DEVICE) if out.is_contiguous() else out)


# No contraction in the machine code, and whole vectors: 4 bytes in, 16 out.
CODE = """
import re
from functools import partial
import torch, triton
from prefopt_kernels import compile as c
for name in ("sm_90", "sm_100", "gfx942"):
    (launch,) = c.record(name, partial(c._dequantize, torch.bfloat16, torch.bfloat16))
    target = c.TARGETS[name].gpu
    binary = triton.compile(launch.source, target=target, options=launch.options)
    text = binary.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    assert not re.search(r"\\b(fma|v_fma|v_pk_fma|v_fmac|v_mad)_?\\.?(rn\\.)?f32", text), name
    wide = r"st\\.global\\.v4\\.b32" if target.backend == "cuda" else "buffer_store_dwordx4"
    assert len(re.findall(wide, text)) == 1, name
    assert len(re.findall(r"ld\\.global\\.b8|_load_ubyte", text)) == 1, name
    assert re.search(r"mul(\\.rn)?\\.f32|v_(pk_)?mul_f32", text), name
"""


def test_the_compiled_code_contracts_nothing(tmp_path):
    kernels = Path(nf4.__file__).parents[1]
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env = {**kept, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(kernels)}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.gpu
def test_more_than_two_to_the_31_weights():
    n = 2**31 + 4097
    p = packed(4096 * 64, double=False)
    repeat = -(-n // p.n)
    many = p._replace(
        codes=p.codes.repeat(repeat)[: -(-n // 2)],
        scales=p.scales.repeat(repeat)[: -(-n // 64)],
        n=n,
    )
    got = run(many, torch.bfloat16, torch.bfloat16)
    want = plain(p, torch.bfloat16, torch.bfloat16)
    assert_same(got[: p.n], want)
    tail = n % p.n
    assert_same(got[n - tail :], want[:tail])
