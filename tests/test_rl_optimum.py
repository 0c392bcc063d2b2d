"""The whole of online training against the optimum of a world small enough to be enumerated.

What is left to the closed form's optimum is at most half a percent of the way; with faults of a
kind that no error message and no single function shows, put in on purpose, it is more.
"""

from pathlib import Path

import pytest
import torch

import prefopt.collect
from prefopt import Policy
from prefopt.experience import Experience
from prefopt.rl import kl_estimate, shape_rewards
from tests import rl_world
from tests.rl_world import LEFT, PROMPTS, RESPONSES, TEXTS, TableReward

# -- the world is what it says


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = rl_world.make_world(tmp_path_factory.mktemp("world") / "model", 0)
    return Policy.from_pretrained(folder, dtype="float32")


def test_every_response_has_a_text_a_probability_and_a_reward(world: Policy) -> None:
    assert len(set(TEXTS)) == len(RESPONSES) == 1 + 5 + 25 + 125 + 625
    logp = rl_world.response_logprobs(world.model, world.tokenizer, 0.7)
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(2).double())
    for ids, text in zip(RESPONSES[::50], TEXTS[::50], strict=True):
        assert world.tokenizer.decode(ids, skip_special_tokens=True) == text
    table = rl_world.reward_table(0)
    reward = TableReward(table)
    assert reward([PROMPTS[1], PROMPTS[0]], [TEXTS[7], TEXTS[700]]) == [table[1, 7], table[0, 700]]


def test_the_probabilities_are_those_that_are_sampled(world: Policy) -> None:
    given = world.generate(
        [list(PROMPTS[0])] * 2000,
        max_new_tokens=rl_world.LONGEST,
        temperature=0.7,
        template="plain",
    )
    p = rl_world.response_logprobs(world.model, world.tokenizer, 0.7)[0].exp()
    ended = torch.tensor([0 in ids for ids in RESPONSES])
    share = sum(answer.finish == "stop" for answer in given) / 2000
    assert abs(share - p[ended].sum().item()) < 4 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_best_policy_is_worth_beta_log_z_and_no_other_is_worth_more(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    table = rl_world.reward_table(0)
    ref = torch.randn(table.shape, generator=generator).double().log_softmax(1)
    best = rl_world.best(ref, table, beta)
    z = (ref.exp() * (table / beta).exp()).sum(1)
    top = rl_world.worth(best, ref, table, beta)
    assert top.value == pytest.approx((beta * z.log()).mean().item())
    for step in (1e-3, 0.1, 1.0):
        other = (best + step * torch.randn(table.shape, generator=generator)).log_softmax(1)
        less = top.value - rl_world.worth(other, ref, table, beta).value
        divergence = (other.exp() * (other - best)).sum(1).mean().item()
        assert less == pytest.approx(beta * divergence) and less > 0


# -- the optimum is reached


@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimum_is_reached(seed: int, tmp_path: Path) -> None:
    found = rl_world.learn(tmp_path, seed, "rloo")
    assert found.left <= LEFT, found


# -- and what is wrong does not come there


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
