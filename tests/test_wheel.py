"""What a user installs: the wheel, built from a copy of the tree."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prefopt

ROOT = Path(__file__).resolve().parents[1]
# Folders that must not end up in the wheel are copied too.
PARTS = (
    *("pyproject.toml", "README.md", "LICENSE", "prefopt", "kernels"),
    *("benchmarks", "docs", "examples", "tests"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        part = ROOT / name
        if part.is_dir():
            shutil.copytree(
                part, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".tmp-*")
            )
        elif part.exists():
            shutil.copy(part, tree)
    # The build backend itself, as pip calls it, but without a build environment from the network.
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    result = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [path] = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_two_import_names_and_nothing_else(wheel):
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "prefopt",
        "prefopt_kernels",
        f"prefopt-{prefopt.__version__}.dist-info",
    }


def test_every_module_and_asset_is_in_it(wheel):
    """Also what is no Python: the tiny model, its data, the report's template, the type marker."""
    wanted = {"prefopt/py.typed"}
    for root, package in ((ROOT, "prefopt"), (ROOT / "kernels", "prefopt_kernels")):
        files = [p for p in (root / package).rglob("*") if p.is_file()]
        wanted |= {
            p.relative_to(root).as_posix()
            for p in files
            if "__pycache__" not in p.parts and not p.name.startswith(".")
        }
    assert wanted - set(wheel.namelist()) == set()
    assert any(name.startswith("prefopt/assets/") for name in wanted)
    assert any(re.fullmatch(r"prefopt/report/.*\.j2", name) for name in wanted)


def test_metadata(wheel):
    [name] = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    text = wheel.read(name).decode()
    assert f"Version: {prefopt.__version__}\n" in text
    assert "License-Expression: Apache-2.0" in text
    required = {
        re.match(r"[\w-]+", line).group().lower()
        for line in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)
        if "extra ==" not in line
    }
    assert not required & {"accelerate", "peft", "trl", "bitsandbytes"}
    [entry] = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    assert "prefopt = prefopt.cli:main" in wheel.read(entry).decode()


def test_one_version_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(prefopt.__version__)}$", citation, re.MULTILINE)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {prefopt.__version__}" in changelog


def test_constraints_pin_what_pyproject_asks_for():
    """Every direct dependency has one exact version in the tested set."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [r for e in ("test", "bench", "dev") for r in extras[e]]
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    assert {re.match(r"[\w-]+", r).group().lower() for r in wanted} - pinned == set()
