"""What a run folder holds, read leniently: a crashed run still has a story to tell.

Nothing here raises over the content of a file. What is missing is None or empty, what is damaged
is skipped and named in `problems`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.metrics import read_metrics

FILES = (
    "config.yaml",
    "env.json",
    "metrics.jsonl",
    "samples.jsonl",
    "data_report.json",
    "evaluation.json",
)
Row = dict[str, Any]


@dataclass
class RunRecord:
    """One run folder. `config` is flat ("lora.r": 16), `finished` says a model was written, and
    `stages` are the steps of a whole, of which this run is the last one; `alarms` what was said
    while an online run went on."""

    name: str
    finished: bool = False
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    data: Row = field(default_factory=dict)
    evaluation: Row = field(default_factory=dict)
    env: Row = field(default_factory=dict)
    config_text: str = ""
    config: Row = field(default_factory=dict)
    stages: list[Row] = field(default_factory=list)
    alarms: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """ "online", "sft", "reward" (scores of a reward model) or "pairs" (rewards against a
        reference)."""
        if "estimator" in self.config or any("objective/scores" in r for r in self.train):
            return "online"
        objective = self.data.get("objective")
        return str(objective) if objective in ("sft", "reward") else "pairs"

    @property
    def unit(self) -> str:
        """What an item of the data is called: "pair", "dialogue", "ranking"."""
        return str(self.data.get("unit") or "pairs").removesuffix("s")

    def setting(self, name: str) -> Any:
        """A configuration value by its name, or by the end of it where that is unambiguous."""
        ends = [key for key in self.config if key == name or key.endswith("." + name)]
        return self.config.get(name, self.config[ends[0]] if len(ends) == 1 else None)


def read_run(run_dir: Path) -> RunRecord:
    """Reads whatever of `FILES` is there."""
    run = RunRecord(run_dir.resolve().name, finished=(run_dir / "model").is_dir())
    rows = _lines(run_dir / "metrics.jsonl", run.problems)
    rows = [row for row in rows if number(row.get("step")) is not None]
    run.train = [row for row in rows if "loss" in row]
    run.evals = [row for row in rows if any(key.startswith("eval_") for key in row)]
    run.samples = _lines(run_dir / "samples.jsonl", run.problems)
    run.data = _object(run_dir / "data_report.json", run.problems)
    run.evaluation = _object(run_dir / "evaluation.json", run.problems)
    run.env = _object(run_dir / "env.json", run.problems)
    for name in ("stages", "alarms"):
        if (run_dir / f"{name}.jsonl").is_file():
            setattr(run, name, _lines(run_dir / f"{name}.jsonl", run.problems))
    with contextlib.suppress(OSError):
        run.config_text = (run_dir / "config.yaml").read_bytes().decode("utf-8", "replace")
    run.config = _settings(run.config_text, run.problems)
    return run


def number(value: Any) -> float | None:
    """A float, NaN for what is infinite or beyond drawing; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 else math.nan


def series(rows: Iterable[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [n], values [n]) of the rows that have `key`; NaN where it was not finite (null)."""
    points = []
    for row in rows:
        step, value = number(row.get("step")), number(row.get(key))
        if key in row and step is not None and (value is not None or row[key] is None):
            points.append((step, math.nan if value is None else value))
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def finite(rows: Iterable[Row], key: str) -> np.ndarray:
    """The finite values of `key`, in order."""
    values = series(rows, key)[1]
    return values[np.isfinite(values)]


def ends(values: np.ndarray) -> tuple[float, float] | None:
    """(first value, mean over the last tenth: at least 1 and at most 20), None without values."""
    if not len(values):
        return None
    return float(values[0]), float(values[-min(20, max(1, len(values) // 10)) :].mean())


def _lines(path: Path, problems: list[str]) -> list[Row]:
    try:
        rows, damaged = read_metrics(path)
    except OSError:
        return []
    if damaged:
        line = "1 damaged line was" if damaged == 1 else f"{damaged} damaged lines were"
        problems.append(f"{path.name}: {line} skipped (a run that was killed leaves such a line).")
    return rows


def _object(path: Path, problems: list[str]) -> Row:
    try:
        value = json.loads(path.read_bytes())
    except OSError:
        return {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name}: damaged, left out.")
        return {}
    return value


def _settings(text: str, problems: list[str]) -> Row:
    import yaml

    try:
        return dict(_flat(yaml.safe_load(text), ""))
    except (yaml.YAMLError, RecursionError, ValueError):
        problems.append("config.yaml: not valid YAML, shown as it is.")
        return {}


def _flat(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(path, value)] if path else []
    return [
        pair for key, item in value.items() for pair in _flat(item, f"{path}.{key}".lstrip("."))
    ]
