"""TrainConfig: what it refuses, and that every field says what it is."""

import dataclasses
import inspect
import math
from pathlib import Path

import pytest
import yaml

from prefopt import InputError, TrainConfig
from prefopt.config import default_cache


def test_the_defaults_are_the_documented_ones():
    config = TrainConfig("runs/x")
    assert (config.batch_size, config.micro_tokens, config.max_length) == (8, 4096, 1024)
    assert (config.epochs, config.eval_fraction, config.seed) == (1, 0.1, 0)
    assert config.max_steps is None and config.resume is None and config.parallel == "auto"
    assert config.gradient_checkpointing is False and config.max_norm == 1.0


def test_every_field_is_explained():
    doc = inspect.getdoc(TrainConfig)
    listed = [line.strip().split(":")[0] for line in doc.splitlines() if line.startswith("    ")]
    assert listed == [field.name for field in dataclasses.fields(TrainConfig)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0), ("batch_tokens", 0), ("micro_tokens", 1), ("max_length", 1),
        ("lr", 0.0), ("lr", -1e-4), ("lr", math.nan), ("lr", math.inf), ("epochs", 0),
        ("max_steps", 0), ("eval_fraction", -0.1), ("eval_fraction", 1.0),
        ("eval_fraction", math.nan), ("eval_every", 0), ("save_every", -1), ("keep", 0),
        ("max_norm", -1.0), ("max_norm", math.nan), ("warmup", -1), ("warmup", math.inf),
        ("weight_decay", -0.1), ("log_every", 0), ("samples", -1), ("sample_tokens", 0),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(InputError, match=rf"^{field} is {value!r}; it must be "):
        TrainConfig("out", **{field: value})


@pytest.mark.parametrize("field", ["save_every", "max_norm", "warmup", "weight_decay", "samples"])
def test_zero_means_none_of_it(field):
    assert getattr(TrainConfig("out", **{field: 0}), field) == 0


def test_more_than_one_process_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        TrainConfig("out")
    monkeypatch.setenv("WORLD_SIZE", "1")
    TrainConfig("out")


def test_it_is_plain_data():
    """config.yaml is this, so it must go through YAML and back."""
    config = TrainConfig("out", lr=3e-4, warmup=10)
    text = yaml.safe_dump(dataclasses.asdict(config))
    assert TrainConfig(**yaml.safe_load(text)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", "/there")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache() == Path("/there")
    monkeypatch.delenv("PREFOPT_CACHE")
    assert default_cache() == Path("/xdg/prefopt/reference")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "prefopt" / "reference"
