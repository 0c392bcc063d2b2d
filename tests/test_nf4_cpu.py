"""The compiled decoder against the formula: the same bits, with and without AVX-512, or a no."""

import platform
import subprocess
import sys

import pytest
import torch

from prefopt.nn import nf4_cpu

DTYPES = (torch.float32, torch.bfloat16)
needs_compiler = pytest.mark.skipif(
    nf4_cpu.why_not() is not None, reason=nf4_cpu.why_not() or "it runs"
)


def forget():
    nf4_cpu.why_not.cache_clear()
    nf4_cpu._library.cache_clear()


@pytest.fixture
def rebuilt(monkeypatch, tmp_path):
    """A cache folder of its own, and a library built anew in it and after it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def packed(n, block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.randn(-(-n // block), generator=generator)
    codebook = torch.randn(16, generator=generator)
    return codes, absmax, codebook


def decode(codes, absmax, codebook, block, out):
    """With scales in float32."""
    return nf4_cpu.decode(codes, absmax, None, None, torch.zeros(256), codebook, block, out)


def formula(codes, absmax, codebook, block, n, dtype):
    nibbles = torch.stack([codes >> 4, codes & 15], 1).flatten()[:n].long()
    return (codebook[nibbles] * absmax.repeat_interleave(block)[:n]).to(dtype)


def check(n, block, dtype, seed=0, change=lambda *t: None):
    codes, absmax, codebook = packed(n, block, seed)
    change(codes, absmax, codebook)
    out = torch.full((n + 8,), 7.0, dtype=dtype)
    assert decode(codes, absmax, codebook, block, out[:n])
    want = formula(codes, absmax, codebook, block, n, dtype)
    torch.testing.assert_close(out[:n], want, rtol=0, atol=0, equal_nan=True)
    assert (out[:n].signbit() == want.signbit())[~want.isnan()].all()  # -0.0 too
    assert (out[n:] == 7).all()  # nothing is written behind the end


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [64, 128, 2])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 63, 64, 65, 95, 127, 128, 4096, 4111])
def test_bits(n, block, dtype):
    check(n, block, dtype, seed=n)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 700])
def test_scales_in_eight_bits(blocks, dtype):
    """Decoded with two roundings: a fused multiply-add would differ in many of them."""
    n, generator = 64 * blocks - 5, torch.Generator().manual_seed(blocks)
    codes, _, codebook = packed(n, 64)
    scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    nested = torch.rand(-(-blocks // 256), generator=generator)
    dynamic, offset = torch.randn(256, generator=generator), torch.tensor(0.3)
    out = torch.empty(n, dtype=dtype)
    assert nf4_cpu.decode(codes, scales, nested, offset, dynamic, codebook, 64, out)
    absmax = dynamic[scales.long()] * nested.repeat_interleave(256)[:blocks] + offset
    assert torch.equal(out, formula(codes, absmax, codebook, 64, n, dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_threads(dtype):
    """Above the size at which a second thread is started; the ranges meet inside the tensor."""
    check(2 * nf4_cpu._PER_THREAD + 67, 64, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scales(dtype):
    values = [0.0, -0.0, float("nan"), float("inf"), -3.0, 1e-45, 1e-38, 3.4e38, 1.5e-40]

    def change(_codes, absmax, codebook):
        absmax[: len(values)] = torch.tensor(values)
        codebook[7] = 0.0

    check(64 * 16, 64, dtype, change=change)


@needs_compiler
def test_bfloat16_is_rounded_to_nearest_even():
    codebook = torch.ones(16)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20])
    out = torch.empty(4 * 64, dtype=torch.bfloat16)
    assert decode(torch.zeros(128, dtype=torch.uint8), ties, codebook, 64, out)
    assert out[::64].tolist() == [1.0, 1 + 2**-6, -1.0, 1 + 2**-7]


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is one of x86")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_loops_give_the_same_bits(rebuilt, monkeypatch, dtype):
    monkeypatch.setattr(nf4_cpu, "_FLAGS", (*nf4_cpu._FLAGS, "-mno-avx512f"))
    for n in (1, 63, 64, 67, 4111):
        check(n, 64, dtype, seed=n)


@needs_compiler
def test_it_is_compiled_once_and_found_again(rebuilt):
    assert nf4_cpu.why_not() is None
    [library] = (rebuilt / "prefopt" / "native").iterdir()
    before = library.stat().st_mtime_ns
    forget()
    check(64, 64, torch.float32)
    assert (
        [library.stat().st_mtime_ns]
        == [path.stat().st_mtime_ns for path in (rebuilt / "prefopt" / "native").iterdir()]
        == [before]
    )


def test_without_a_compiler_it_says_no_and_why(rebuilt, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    codes, absmax, codebook = packed(64, 64)
    assert decode(codes, absmax, codebook, 64, torch.empty(64)) is False
    assert "no C compiler" in str(nf4_cpu.why_not())


def test_a_compiler_that_fails_is_named(rebuilt, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert "false failed" in str(nf4_cpu.why_not())
    assert not any((rebuilt / "prefopt" / "native").iterdir())


def test_dtypes_it_has_not_are_left_to_torch():
    codes, absmax, codebook = packed(64, 64)
    for dtype in (torch.float16, torch.float64):
        out = torch.empty(64, dtype=dtype)
        assert decode(codes, absmax, codebook, 64, out) is False


@needs_compiler
def test_it_survives_a_fork():
    """No thread of it lives between calls."""
    code = """
import os, torch
from prefopt.nn import nf4_cpu
n = 2 * nf4_cpu._PER_THREAD
codes, out = torch.zeros(n // 2, dtype=torch.uint8), torch.empty(n)
def decode():
    ones = torch.ones(n // 64)
    return nf4_cpu.decode(codes, ones, None, None, torch.ones(256), torch.ones(16), 64, out)
assert decode()
pid = os.fork()
if pid == 0:
    os._exit(0 if decode() and (out == 1).all() else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
