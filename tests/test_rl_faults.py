"""The test of the test: with faults put in on purpose, of a kind that no error message and no
single function shows, a run does not come within half a percent of the optimum of its world."""

from pathlib import Path

import pytest
import torch

import prefopt.collect
from prefopt import Policy
from prefopt.experience import Experience
from prefopt.rl import kl_estimate, shape_rewards
from tests import rl_world
from tests.rl_world import LEFT


def no_stop_token(patch: pytest.MonkeyPatch) -> None:
    """The stop token is left out of the loss, as where it is taken for padding."""

    def without_stop(exp: Experience) -> torch.Tensor:
        last = torch.arange(exp.mask.shape[1]) == exp.lengths[:, None] - 1
        return exp.mask & exp.kept[:, None] & ~(last & exp.stopped[:, None])

    patch.setattr(Experience, "learnt", property(without_stop))


def no_temperature(patch: pytest.MonkeyPatch) -> None:
    """Log-probs are taken at temperature 1 of samples at another."""
    forward = Policy.forward
    patch.setattr(Policy, "forward", lambda *a, **k: forward(*a, **k | {"temperature": 1.0}))


def k3_in_reward(patch: pytest.MonkeyPatch) -> None:
    def k3(logp: torch.Tensor, ref: torch.Tensor, *, kind: str) -> torch.Tensor:
        return kl_estimate(logp, ref, kind="k3")

    patch.setattr(prefopt.collect, "kl_estimate", k3)


def wrong_sign(patch: pytest.MonkeyPatch) -> None:
    """The KL is rewarded instead of penalised."""

    def flipped(*rows: torch.Tensor, beta: float, **more: torch.Tensor) -> torch.Tensor:
        return shape_rewards(*rows, beta=-beta, **more)

    patch.setattr(prefopt.collect, "shape_rewards", flipped)


@pytest.mark.parametrize("fault", [no_stop_token, no_temperature, k3_in_reward, wrong_sign])
def test_a_fault_keeps_it_from_the_optimum(
    fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    found = rl_world.learn(tmp_path, 0, "rloo")
    assert found.left > 2 * LEFT, found
