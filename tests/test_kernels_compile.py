"""prefopt_kernels.compile: real compiles for GPUs that are not here, each in a process in which
Triton's interpreter is off."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton import knobs

from prefopt_kernels import compile

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kernels" / "prefopt_kernels"
COMMITTED = ROOT / "benchmarks" / "results" / "compile_matrix.json"
TEXT = COMMITTED.with_suffix(".txt")
COMMAND = (
    "python -m prefopt_kernels.compile "
    "--json benchmarks/results/compile_matrix.json > benchmarks/results/compile_matrix.txt"
)


def python(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env = {**kept, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(text, rows) of the quick subset on one old, one new and one ROCm target."""
    folder = tmp_path_factory.mktemp("compile")
    done = python(
        folder, "-m", "prefopt_kernels.compile", "--quick", "--targets", "sm_75,sm_90,gfx942",
        "--jobs", "1", "--json", str(folder / "quick.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "quick.json").read_text())["kernels"]


def launched_kernels() -> set[str]:
    """Names of the package's triton.jit functions that no other one calls."""
    defined, called = set(), set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                defined.add(node.name)
                calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
                called |= {f.id for f in calls if isinstance(f, ast.Name)}
    return defined - called


def test_every_kernel_is_in_the_matrix(quick):
    kernels = {name.removesuffix("_kernel") for name in launched_kernels()}
    assert len(kernels) >= 7
    _, rows = quick
    product = {"fold_tiles", "combine"}
    assert {row["kernel"] for row in rows if row["target"] == "sm_90"} == kernels
    assert {row["kernel"] for row in rows if row["target"] == "gfx942"} == kernels
    assert {row["kernel"] for row in rows if row["target"] == "sm_75"} == kernels - product


def test_figures(quick):
    _, rows = quick
    for row in rows:
        assert row["fault"] == "" and row["spills"] <= 8
        assert 8 < row["registers"] <= 256
        assert re.fullmatch(r"\d+(x\d+)* w\d+ s\d+", row["block"])
        if row["kernel"] == "fold_tiles":
            count, name = row["matrix"].split()
            assert int(count) > 0 and name == {"sm_90": "wgmma", "gfx942": "mfma"}[row["target"]]
            # A stage holds a block of each matrix in 16 bits, and the pipeline all but one at most.
            m, v, k, _, stages = map(int, re.findall(r"\d+", row["block"]))
            assert (
                (m + v) * k * 2 * (stages - 1) <= row["shared"] <= (m + v) * k * 2 * stages + 1024
            )
        else:
            assert row["matrix"] == "-"


def test_table(quick):
    text, rows = quick
    lines = text.splitlines()
    assert lines[0].split() == list(compile.Figures._fields[:-1])
    for line, row in zip(lines[1:], rows, strict=False):
        assert line.split()[:2] == [row["target"], row["kernel"]] and row["block"] in line
    assert "sm_75: no fused kernel: Triton has no matrix instructions for sm_75" in text
    assert f"{len(rows)} kernels compiled, 0 faulty" in lines[-1]


# The sums of this tile alone are 256 registers a thread, all there are.
FAULTS = """
from prefopt_kernels import compile, fused, tuning
tuning._FUSED["sm_80"] = tuning.Tile(256, 256, 64, 8, 3)
arguments = ["--targets", "sm_80", "--kernels", "fold_tiles", "--quick", "--jobs", "1"]
print(compile.main(arguments))
target = compile.TARGETS["sm_80"]
compile.TARGETS["sm_80"] = target._replace(matrix="wgmma", shared=100_000)
print(compile.main(arguments))
print(compile.main([*arguments[:3], "no_such_kernel"]))
"""


def test_faults_are_found_and_fail_the_command(tmp_path):
    done = python(tmp_path, "-c", FAULTS)
    assert not done.returncode, done.stderr
    first, second, third = re.split(r"^1$", done.stdout, flags=re.MULTILINE)[:3]
    assert re.search(r"256x256x64 w8 s3 .*mma  <- spills$", first, re.MULTILINE)
    assert "2 kernels compiled, 0 faulty" not in first
    shared = "has 100000 bytes of shared memory, no matrix instructions"
    assert re.search(rf" 0 wgmma  <- (spills, )?{shared}$", second, re.MULTILINE)
    assert "0 kernels compiled" in third


LABELS = """
import json
from prefopt_kernels import compile
found = []
for name, i, j in compile.tasks(compile.DEFAULT.split(","), set(), False):
    call = list(compile.calls())[i]
    found.append(compile.labels(name, call.variant, compile.record(name, call.run)[j]))
print(json.dumps(found))
"""


def test_the_committed_table_lists_what_the_code_launches(tmp_path):
    done = python(tmp_path, "-c", LABELS)
    assert not done.returncode, done.stderr
    now = {tuple(labels) for labels in json.loads(done.stdout)}
    rows = json.loads(COMMITTED.read_text())["kernels"]
    then = {(row["target"], row["kernel"], row["variant"], row["block"]) for row in rows}
    assert now == then, f"out of date; in kernels/: {COMMAND}"
    assert not any(row["fault"] for row in rows)
    lines = TEXT.read_text().splitlines()
    assert [line.split()[:2] for line in lines[1 : len(rows) + 1]] == [
        [row["target"], row["kernel"]] for row in rows
    ]


def test_unknown_targets_are_named_beside_the_known(capsys):
    assert compile.main(["--targets", "sm_90,sm_1,volta"]) == 2
    assert "unknown target sm_1, volta; known: sm_75, sm_80" in capsys.readouterr().err


def test_the_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert compile.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_rocm_figures_from_assembly():
    text = "\n .vgpr_count:     90\n .vgpr_spill_count: 2\n .sgpr_spill_count: 3\n"
    assert compile._of_text(text) == (90, 5)


def summary(rows: list[dict]) -> str:
    """The README's table: registers by kernel and target, tile and memory of the main product."""
    targets = compile.DEFAULT.split(",")
    kernels = dict.fromkeys(sorted(row["kernel"] for row in rows))
    lines = []
    for kernel in kernels:
        found = [[r for r in rows if (r["kernel"], r["target"]) == (kernel, t)] for t in targets]
        cells = (
            f"{min(x['registers'] for x in some)} to {max(x['registers'] for x in some)}"
            if some
            else "-"
            for some in found
        )
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    product = {
        r["target"]: r for r in rows if (r["kernel"], r["variant"]) == ("fold_tiles", "bf16")
    }
    cells = (
        f"{product[t]['block']}, {product[t]['shared'] / 1024:.0f} KiB" if t in product else "-"
        for t in targets
    )
    return "\n".join([*lines, f"| tile of the product | {' | '.join(cells)} |"]) + "\n"


def test_the_readme_has_the_committed_figures():
    rows = json.loads(COMMITTED.read_text())["kernels"]
    assert summary(rows) in (PACKAGE.parent / "README.md").read_text(), summary(rows)
