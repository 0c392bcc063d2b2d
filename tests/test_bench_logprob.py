"""The log-prob benchmark measures what it says: sides agree, bounds count every product, cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NO_COMPILER = ("compile", "cce")  # minutes of g++: left to the benchmark itself


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_logprob

    return bench_logprob


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_every_side_that_runs_here_is_right(bench, dtype: str, head: str) -> None:
    tolerance = 1e-5 if dtype == "float32" else 0.1
    sides = [name for name in bench.SIDES if name not in NO_COMPILER]
    run = bench.Run(bench.arguments(["--sides", *sides]))
    for entropy in (False, True):
        case = bench.Case(dtype, 64, 500, 24, head, entropy)
        entry = bench.error_case(run, case, sides)
        assert {"prefopt", "naive"} <= set(entry["sides"])
        assert set(entry["sides"]) | set(entry["absent"]) == set(sides)
        assert not [why for why in entry["absent"].values() if why.startswith("failed")]
        for name, found in entry["sides"].items():
            assert ("entropy_max" in found) == entropy
            assert ("d_weight" in found) == (head == "trained")
            assert found["token_max"] < tolerance, name
            assert max(found["d_hidden"], found.get("d_weight", 0.0)) < tolerance, name


def test_errors_see_a_wrong_side(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.Case("float32", 16, 50, 8, "trained")
    p = bench.sides.problem(case, "cpu")
    right = bench.sides.exact(p)
    outputs, (d_hidden, d_weight) = bench.sides.step(bench.SIDES["naive"](case, "cpu"), p)
    off = bench.sides.errors((outputs[0] + 0.5,), (d_hidden * 1.1, d_weight * 0.9), right, p)
    assert off["token_max"] == pytest.approx(0.5, abs=1e-4)
    assert off["sum"] == pytest.approx(4.0, abs=1e-3)
    assert off["d_hidden"] == pytest.approx(0.1, abs=1e-4)
    assert off["d_weight"] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("head", ["forward", "frozen", "trained"])
def test_bare_gemms_do_all_products_and_no_more(bench, head: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = bench.Case("float32", 32, 5000, 1500, head)
    ways = bench.sides.bare_gemms(bench.sides.problem(case, "cpu"))
    counted = {name: call for name, call in ways.items() if name.startswith("linear")}
    assert set(counted) == {"linear whole", "linear 1024x2048", "linear 512x4096"}
    for call in counted.values():
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            call()
        assert flops.get_total_flops() == case.flops


def test_cases_put_what_matters_first(bench) -> None:
    first, rest = bench.cases(bench.arguments([]))
    assert {(c.shape, c.dtype) for c in first} == {
        (shape, dtype) for shape in bench.SHAPES for dtype in ("float32", "bfloat16")
    }
    assert all(c.head == "frozen" and not c.entropy for c in first)
    assert {(c.head, c.entropy) for c in rest} == {
        ("frozen", True), ("trained", False), ("trained", True),
    }  # fmt: skip
    first, rest = bench.cases(bench.arguments(["--device", "cuda"]))
    assert {c.m for c in first[:4]} == {8192} and {c.dtype for c in first} == {"bfloat16"}
    assert {c.m for c in first + rest} == {256, 2048, 8192, 32768}
    assert len(set(first + rest)) == len(first) + len(rest)


@pytest.mark.slow
def test_a_tiny_run_writes_every_part(bench, tmp_path: Path, capsys) -> None:
    out = tmp_path / "bench.json"
    small = "--shapes 32x300 --rows 20 --rounds 2 --threads 1 --gather 300x20 --heads frozen"
    parts = "--parts time error memory recompile gather tiles --dtypes float32 --entropy no"
    sides = "--sides prefopt naive prefopt-fused"
    bench.main([*f"{small} {parts} {sides}".split(), "--out", str(out)])
    found = json.loads(out.read_text())
    (timed,) = found["time"]
    assert timed["fastest_peer"] == "naive" and timed["bare"].startswith("bare ")
    assert "CUDA" in timed["absent"]["prefopt-fused"]
    assert timed["sides"]["prefopt"]["runs"] == 2
    assert found["summary"]["float32 frozen"]["cases"] == 1
    assert [x["sides"]["prefopt"]["token_max"] < 1e-4 for x in found["error"]] == [True]
    memory = {x["side"]: x for x in found["memory"]}
    assert 0 <= memory["prefopt"]["bytes"] < 1 << 28 and "absent" in memory["prefopt-fused"]
    assert found["recompilations"][0] == {
        "side": "prefopt", "graphs": 0, "kernels": 0, "temperature_kernels": 0,
    }  # fmt: skip
    assert "default" in found["tiles"][0]["budgets"] and not found["left_out"]
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "written:" in capsys.readouterr().out


def test_out_of_time_is_said(bench, tmp_path: Path, capsys) -> None:
    out = tmp_path / "bench.json"
    bench.main(["--budget", "1e-9", "--sides", "naive", "--out", str(out)])
    assert any(name.startswith("time") for name in json.loads(out.read_text())["left_out"])
    assert "out of time" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_counts_from_the_reset(bench) -> None:
    from common import output_bytes, peak_rss_bytes, reset_peak

    big = torch.ones(64 << 18)  # 64 MiB, gone before the reset
    del big
    before = reset_peak()
    kept = torch.ones(32 << 18)
    grown = peak_rss_bytes() - before
    assert 0.9 * kept.nbytes < grown < 1.5 * kept.nbytes
    assert output_bytes(((kept,), [kept, kept[:2]])) == 2 * kept.nbytes + 8


def test_compilations_are_counted(bench) -> None:
    from common import Compilations

    triton = pytest.importorskip("triton")
    before = triton.knobs.runtime.jit_post_compile_hook
    with Compilations() as counted:
        triton.knobs.runtime.jit_post_compile_hook(key="", already_compiled=False)
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert (counted.graphs, counted.kernels) == (1, 1)
    assert triton.knobs.runtime.jit_post_compile_hook is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(bench, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench.main(["--device", "cuda"])
    script = BENCHMARKS / "gpu.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU" in done.stdout and not (tmp_path / "out").exists()


def test_figures_of_a_gpu(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Its branches, with a device that is not there: limits by arithmetic, peak, shares."""
    args = "--shapes 32x300 --rows 20 --rounds 2 --dtypes float32 --sides prefopt naive".split()
    run = bench.Run(bench.arguments([*args, "--out", str(tmp_path / "bench.json")]))
    run.cuda, run.found["limits"] = True, {"copy": 1e9, "float32": 1e12}
    monkeypatch.setattr(bench, "cuda_peak", lambda call: len(call()))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    case = bench.Case("float32", 32, 300, 20, "trained")
    result = bench.time_case(run, case)
    assert result["limit_seconds"] == case.bytes / 1e9 > case.flops / 1e12
    ours = result["sides"]["prefopt"]
    assert ours["backward_of_limit"] == pytest.approx(2 * case.flops / 3e12 / ours["backward"])
    assert ours["peak_bytes"] == 2 and ours["runs"] == 2
    bench.show_case(run, case, result)
    assert "TFLOP/s" in capsys.readouterr().out
