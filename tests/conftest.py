"""What every test shares: no network, one torch thread, repeatable examples, the real data."""

import os

# Before anything imports torch or a Hugging Face library, and for the processes that tests start.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # workers run in parallel; and sums do not depend on the machine
    "MPLBACKEND": "agg",
}

from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# The same examples on every run, so that a red test stays red; HYPOTHESIS_PROFILE=explore looks
# further. Nothing is timed: a slow machine is no failure.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "explore", hypothesis.settings.get_profile("fixed"), derandomize=False, max_examples=1000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _from_shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(('../shared', *parts))}, which is not there")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository."""
    return _from_shared()


@pytest.fixture(scope="session")
def hh_path() -> Path:
    """1,500 real preference pairs (HH-RLHF, harmless-base), gzipped JSON lines."""
    return _from_shared("data", "hh_harmless.jsonl.gz")


@pytest.fixture(scope="session")
def stories_path() -> Path:
    """A real pretrained Llama of 260,032 parameters, a Hugging Face model folder."""
    return _from_shared("models", "stories260K")
