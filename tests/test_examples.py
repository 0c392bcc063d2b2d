"""The examples run; the longer ones at least load."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_it_loads(name, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # the parts of train_tiny import each other
    assert "main" in runpy.run_path(str(EXAMPLES / f"{name}.py")) or name.startswith("tiny_")


@pytest.mark.parametrize("name", ["dpo_by_hand", "custom_loss"])
def test_it_runs(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    if name == "dpo_by_hand":
        losses = [float(line.split()[3]) for line in lines]
        assert losses[0] == 0.6931 and losses[-1] < 0.45
    else:
        falls = [[float(x) for x in line.split("loss ")[1].split(" -> ")] for line in lines]
        assert len(falls) == 3 and all(last < first for first, last in falls)
