"""Rewards of tokens, advantages and their statistics, against loops and closed forms in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.errors import InputError
from prefopt.rl import (
    ESTIMATORS,
    GROUPED,
    AdaptiveKL,
    RunningMoments,
    advantages,
    check_kl,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    moments,
    reinforce_advantages,
    shape_rewards,
    whiten,
)

few = settings(max_examples=40)
units = st.sampled_from([0.0, 0.3, 0.95, 1.0])


class Rows:
    """Random token rows in float64; the mask has gaps, and every row a token."""

    def __init__(self, seed: int, samples: int = 4, tokens: int = 7):
        self.generator = torch.Generator().manual_seed(seed)
        self.mask = torch.rand(samples, tokens, generator=self.generator) < 0.6
        self.mask[torch.arange(samples), torch.arange(samples) % tokens] = True
        self.rewards, self.values = self.normal(samples, tokens), self.normal(samples, tokens)
        self.bootstrap = self.normal(samples)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


rows = st.integers(0, 10_000).map(Rows)


def close(got: torch.Tensor, want, bound: float = 1e-12) -> None:
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want.expand_as(got), rtol=bound, atol=bound)


# -- generalised advantages


def gae_by_force(r: Rows, gamma: float, lam: float) -> torch.Tensor:
    """A_t = sum over tokens k from t on of (gamma lam)^(k - t) delta_k, gaps not counted."""
    found = torch.zeros_like(r.rewards)
    for s, row in enumerate(r.mask):
        at = row.nonzero().flatten().tolist()
        v = [*r.values[s, at].tolist(), r.bootstrap[s].item()]
        reward = r.rewards[s, at].tolist()
        delta = [reward[k] + gamma * v[k + 1] - v[k] for k in range(len(at))]
        for j, t in enumerate(at):
            found[s, t] = sum((gamma * lam) ** (k - j) * delta[k] for k in range(j, len(at)))
    return found


@few
@given(rows, units, units)
def test_gae_is_the_sum_over_later_tokens(r: Rows, gamma: float, lam: float) -> None:
    got, returns = gae(r.rewards, r.values, r.mask, gamma=gamma, lam=lam, bootstrap=r.bootstrap)
    want = gae_by_force(r, gamma, lam)
    close(got, want)
    close(returns, torch.where(r.mask, want + r.values, 0.0))


@few
@given(rows, units)
def test_gae_at_lambda_one_is_the_return_less_the_value(r: Rows, gamma: float) -> None:
    got, returns = gae(r.rewards, r.values, r.mask, gamma=gamma, lam=1.0, bootstrap=r.bootstrap)
    for s, row in enumerate(r.mask):
        to_go = r.bootstrap[s].item()
        for t in reversed(row.nonzero().flatten().tolist()):
            to_go = r.rewards[s, t].item() + gamma * to_go
            assert returns[s, t].item() == pytest.approx(to_go, abs=1e-12)
            assert got[s, t].item() == pytest.approx(to_go - r.values[s, t].item(), abs=1e-12)


@few
@given(rows, units)
def test_gae_at_lambda_zero_is_the_error_of_one_step(r: Rows, gamma: float) -> None:
    got, _ = gae(r.rewards, r.values, r.mask, gamma=gamma, lam=0.0, bootstrap=r.bootstrap)
    for s, row in enumerate(r.mask):
        following = r.bootstrap[s]
        for t in reversed(row.nonzero().flatten().tolist()):
            want = r.rewards[s, t] + gamma * following - r.values[s, t]
            assert got[s, t].item() == pytest.approx(want.item(), abs=1e-12)
            following = r.values[s, t]


@few
@given(rows, units, units)
def test_gae_does_not_see_a_potential(r: Rows, gamma: float, lam: float) -> None:
    """r + gamma phi' - phi with values V - phi has the advantages of r with V."""
    phi, end = r.normal(*r.mask.shape), r.normal(len(r.mask))
    shaped = r.rewards.clone()
    for s, row in enumerate(r.mask):
        following = end[s]
        for t in reversed(row.nonzero().flatten().tolist()):
            shaped[s, t] += gamma * following - phi[s, t]
            following = phi[s, t]
    how = {"gamma": gamma, "lam": lam}
    want, _ = gae(r.rewards, r.values, r.mask, bootstrap=r.bootstrap, **how)
    got, _ = gae(shaped, r.values - phi, r.mask, bootstrap=r.bootstrap - end, **how)
    close(got, want)


def test_gae_of_a_known_row() -> None:
    """By hand: gamma 1, lambda 1/2, no bootstrap."""
    one, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.5]])
    got, returns = gae(one, values, torch.ones(1, 3, dtype=torch.bool), lam=0.5)
    close(got, [[-0.25 + 0.5 * 0.5, 0.25 + 0.5 * 0.5, 0.5]])
    close(returns, [[0.5, 0.75, 1.0]])


def test_without_a_bootstrap_a_response_ends_worth_nothing() -> None:
    r = Rows(0)
    zero = torch.zeros(len(r.mask), dtype=torch.float64)
    got, want = (gae(r.rewards, r.values, r.mask, bootstrap=b)[0] for b in (None, zero))
    assert torch.equal(got, want)


# -- placement of the score


@few
@given(rows)
def test_the_score_stands_at_the_last_token_of_the_mask(r: Rows) -> None:
    scores, kl = r.bootstrap, r.values
    got = shape_rewards(scores, kl, r.mask, beta=0.3)
    want = torch.zeros_like(got)
    for s, row in enumerate(r.mask):
        at = row.nonzero().flatten().tolist()
        for t in at:
            want[s, t] = -0.3 * kl[s, t]
        want[s, at[-1]] += scores[s]
    close(got, want)
    with_tokens = shape_rewards(scores, kl, r.mask, beta=0.3, token_scores=r.rewards)
    close(with_tokens - got, torch.where(r.mask, r.rewards, 0.0))


def test_the_score_of_responses_of_one_and_of_no_token() -> None:
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    got = shape_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, 3), mask, beta=0.5)
    close(got, [[0.5, 0, 0], [0, 0, 0], [-0.5, -0.5, 2.5]])


# -- groups


@few
@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from(GROUPED))
def test_group_advantages_are_those_of_a_loop(seed: int, n: int, kind: str) -> None:
    r = Rows(seed)
    ids = torch.arange(3).repeat_interleave(n)[torch.randperm(3 * n, generator=r.generator)] * 7 - 5
    rewards = r.normal(3 * n) * 2 + 1
    want = torch.zeros_like(rewards)
    for i, (id_, reward) in enumerate(zip(ids, rewards, strict=True)):
        group = rewards[ids == id_]
        others = (group.sum() - reward) / (n - 1)
        want[i] = {
            "rloo": reward - others,
            "grpo": (reward - group.mean()) / (group.std(correction=1) + 1e-6),
            "dr_grpo": reward - group.mean(),
            "rf++_baseline": reward - group.mean(),
        }[kind]
    if kind == "rf++_baseline":
        want = (want - want.mean()) / (want.var(correction=0) + 1e-8).sqrt()
    close(group_advantages(rewards, ids, kind=kind), want, 1e-10)


@few
@given(st.integers(0, 10_000), st.sampled_from(GROUPED), st.floats(0.1, 50), st.floats(-1e3, 1e3))
def test_shifts_and_scales_of_rewards(seed: int, kind: str, scale: float, shift: float) -> None:
    rewards, ids = Rows(seed).normal(12), torch.arange(12) % 3
    found = group_advantages(rewards, ids, kind=kind)
    for group in range(3):
        assert found[ids == group].sum().item() == pytest.approx(0, abs=1e-9)
    close(group_advantages(rewards + shift, ids, kind=kind), found, 1e-8)
    free = kind in ("grpo", "rf++_baseline")
    want = found if free else scale * found
    close(group_advantages(rewards * scale, ids, kind=kind), want, 1e-4 if free else 1e-10)


def test_rloo_is_dr_grpo_times_n_over_n_less_one() -> None:
    rewards, ids = Rows(1).normal(20), torch.arange(20) // 5
    one, other = (group_advantages(rewards, ids, kind=k) for k in ("rloo", "dr_grpo"))
    close(one, other * 5 / 4)


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("value", [0.1, -3e7, 1e-20])
def test_equal_rewards_are_no_advantage(kind: str, value: float) -> None:
    """Exactly: a rounding error divided by a deviation near 0 would be one."""
    ids = torch.arange(21) % 3
    got = group_advantages(torch.full((21,), value, dtype=torch.float64), ids, kind=kind)
    assert (got == 0).all()


@pytest.mark.parametrize("kind", GROUPED)
def test_a_group_of_one_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match="group 4 has a single one; take at least 2"):
        group_advantages(torch.zeros(3), torch.tensor([2, 4, 2]), kind=kind)


# -- whitening


@few
@given(rows, st.floats(0.1, 20), st.floats(-20, 20))
def test_whitening_over_the_mask(r: Rows, scale: float, shift: float) -> None:
    got = whiten(r.rewards, r.mask)
    inside = got[r.mask]
    assert (got[~r.mask] == 0).all()
    assert inside.mean().item() == pytest.approx(0, abs=1e-12)
    assert inside.var(correction=0).item() == pytest.approx(1, abs=1e-6)
    close(whiten(r.rewards * scale + shift, r.mask), got, 1e-6)
    kept = whiten(r.rewards, r.mask, center=False)
    close(kept[r.mask], inside + r.rewards[r.mask].mean())


@few
@given(rows)
def test_whitening_over_processes_is_whitening_of_all(r: Rows) -> None:
    parts = ((r.rewards[:1], r.mask[:1]), (r.rewards[1:], r.mask[1:]))
    total = sum(moments(x, mask) for x, mask in parts)
    assert isinstance(total, torch.Tensor) and total.dtype == torch.float64
    got = torch.cat([whiten(x, mask, moments=total) for x, mask in parts])
    close(got, whiten(r.rewards, r.mask), 1e-10)


def test_whitening_what_is_equal_or_empty() -> None:
    mask = torch.tensor([[True, True], [False, True]])
    assert (whiten(torch.full((2, 2), 3.0), mask) == 0).all()
    assert (whiten(torch.full((2, 2), 3.0), torch.zeros_like(mask)) == 0).all()


def test_whitening_far_from_zero_keeps_its_digits() -> None:
    x = 1e4 + Rows(3).normal(50, 8).float()
    mask = torch.ones_like(x, dtype=torch.bool)
    want = (x.double() - x.double().mean()) / x.double().var(correction=0).sqrt()
    close(whiten(x, mask), want, 1e-5)


# -- estimators by name


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_by_its_definition(name: str) -> None:
    r, ids = Rows(5, samples=6), torch.tensor([0, 0, 1, 1, 1, 0])
    given_ = {"group_ids": ids, "values": r.values, "bootstrap": r.bootstrap}
    got, returns = advantages(r.rewards, r.mask, estimator=name, gamma=0.9, lam=0.5, **given_)
    assert (got[~r.mask] == 0).all()
    if name == "gae":
        want = gae(r.rewards, r.values, r.mask, gamma=0.9, lam=0.5, bootstrap=r.bootstrap)
        assert torch.equal(got, want[0]) and returns is not None and torch.equal(returns, want[1])
        return
    assert returns is None
    if name == "reinforce++":
        to_go = gae_by_force_to_go(r, 0.9)
        close(got, whiten(to_go, r.mask))
        close(reinforce_advantages(r.rewards, r.mask, gamma=0.9, bootstrap=r.bootstrap), got)
        return
    total = torch.stack([row[mask].sum() for row, mask in zip(r.rewards, r.mask, strict=True)])
    want = group_advantages(total, ids, kind=name)
    close(got, torch.where(r.mask, want[:, None], 0.0))


def gae_by_force_to_go(r: Rows, gamma: float) -> torch.Tensor:
    found = torch.zeros_like(r.rewards)
    for s, row in enumerate(r.mask):
        to_go = r.bootstrap[s]
        for t in reversed(row.nonzero().flatten().tolist()):
            to_go = r.rewards[s, t] + gamma * to_go
            found[s, t] = to_go
    return found


def test_an_estimator_says_what_it_lacks() -> None:
    r = Rows(0)
    with pytest.raises(InputError, match="gae needs values"):
        advantages(r.rewards, r.mask, estimator="gae")
    with pytest.raises(InputError, match="rloo needs group_ids"):
        advantages(r.rewards, r.mask, estimator="rloo")
    with pytest.raises(InputError, match="'ppo'; known: gae, reinforce"):
        advantages(r.rewards, r.mask, estimator="ppo")
    with pytest.raises(InputError, match="'gae'; known: rloo"):
        group_advantages(torch.zeros(2), torch.zeros(2), kind="gae")
    advantages(r.rewards, r.mask, estimator="reinforce++")


# -- KL


def test_estimates_of_one_token() -> None:
    logp, ref = torch.tensor(-1.0), torch.tensor(-1.5)
    assert kl_estimate(logp, ref) == 0.5
    assert kl_estimate(logp, ref, kind="k2") == 0.125
    assert kl_estimate(logp, ref, kind="k3").item() == pytest.approx(math.exp(-0.5) - 0.5)
    with pytest.raises(InputError, match="k1, k2 or k3"):
        kl_estimate(logp, ref, kind="k4")


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_estimates_have_the_divergence_as_their_mean(kind: str) -> None:
    r = Rows(2)
    pi, ref = (r.normal(30).log_softmax(0) for _ in range(2))
    got = (pi.exp() * kl_estimate(pi, ref, kind=kind)).sum()
    close(got, (pi.exp() * (pi - ref)).sum())


def test_k3_of_near_policies_is_not_lost_in_rounding() -> None:
    d = torch.logspace(-5, 0, 50)
    wide = kl_estimate(d.double(), torch.zeros(50).double(), kind="k3")
    got = kl_estimate(d, torch.zeros(50), kind="k3")
    assert ((got - wide).abs() <= 1e-3 * wide + 1e-11).all()


@pytest.mark.parametrize("kind, placement", [("k1", "reward"), ("k2", "loss"), ("k3", "loss")])
def test_what_means_a_penalty_is_allowed(kind: str, placement: str) -> None:
    check_kl(kind, placement)


@pytest.mark.parametrize(
    "kind, placement, why",
    [
        ("k3", "reward", "does not have the gradient of a KL penalty"),
        ("k2", "reward", "does not have the gradient of a KL penalty"),
        ("k1", "loss", "gradient of mean zero"),
        ("k4", "loss", "must be k1, k2 or k3"),
        ("k1", "advantage", "must be reward or loss"),
    ],
)
def test_what_means_no_penalty_is_refused(kind: str, placement: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        check_kl(kind, placement)


# -- what is steered and kept over a run


@few
@given(st.floats(1e-3, 10), st.floats(0, 1e3), st.integers(1, 10**6), st.floats(1e-2, 100))
def test_beta_moves_towards_the_target_by_a_bounded_step(
    beta: float, kl: float, n: int, target: float
) -> None:
    control = AdaptiveKL(beta, target, 10_000)
    after = control.update(kl, n)
    assert after == control.beta > 0
    assert abs(after / beta - 1) <= 0.2 * min(n / 10_000, 1) + 1e-12
    assert (after - beta) * (kl - target) >= 0


def test_beta_rests_at_the_target_and_doubles_in_the_known_time() -> None:
    control = AdaptiveKL(0.15, 6.0, 10_000)
    assert control.update(6.0, 512) == 0.15
    assert control.update(6.6, 512) == pytest.approx(0.15 * (1 + 0.1 * 512 / 10_000))
    doubling = AdaptiveKL(0.15, 6.0, 10_000)
    updates = next(i for i in range(1, 1000) if doubling.update(1e9, 512) >= 0.3)
    assert updates == 69  # 1.01024^68 is 1.9992
    assert AdaptiveKL(0.1, None, 10_000).update(1e9, 512) == 0.1


def test_kl_per_sequence_steers_to_a_target_per_sequence() -> None:
    """A plant whose KL falls with beta: the loop comes to rest where the KL is the target."""
    control = AdaptiveKL(0.01, 4.0, 2_000)
    for _ in range(400):
        control.update(1.0 / control.beta, 256)
    assert 1.0 / control.beta == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("arguments", [(-0.1, 6, 1e4), (0.1, 0, 1e4), (0.1, 6, 0)])
def test_a_control_that_cannot_work_is_refused(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(InputError, match=r"above 0|at least 0"):
        AdaptiveKL(*arguments)


def test_control_and_moments_go_on_from_their_state_to_the_bit() -> None:
    a, b = AdaptiveKL(0.1, 6.0, 1e4), AdaptiveKL(0.1, 6.0, 1e4)
    a.update(9.0, 64)
    b.restore(a.state())
    assert a.update(1.0, 64) == b.update(1.0, 64)
    one, other = RunningMoments(), RunningMoments()
    one.update(Rows(0).rewards)
    other.restore(one.state())
    for each in (one, other):
        each.update(Rows(1).rewards)
    assert (one.mean, one.std, one.n) == (other.mean, other.std, other.n)


@few
@given(st.integers(0, 1000), st.floats(-1e6, 1e6), st.lists(st.integers(0, 9), max_size=6))
def test_running_moments_are_those_of_all(seed: int, shift: float, sizes: list[int]) -> None:
    r, running = Rows(seed), RunningMoments()
    parts = [r.normal(size) + shift for size in sizes]
    for part in parts:
        running.update(part)
    both = torch.cat([*parts, torch.zeros(0, dtype=torch.float64)])
    assert running.n == len(both)
    if not len(both):
        assert (running.mean, running.std) == (0.0, 0.0)
        return
    assert running.mean == pytest.approx(both.mean().item(), abs=1e-9)
    assert running.std == pytest.approx(both.std(correction=0).item(), abs=1e-8)


def test_explained_variance() -> None:
    r = Rows(4)
    seen, returns = r.values.masked_fill(~r.mask, math.nan), r.rewards
    assert explained_variance(returns.masked_fill(~r.mask, math.nan), returns, r.mask) == 1.0
    same = torch.full_like(returns, 0.7)
    assert explained_variance(same, returns, r.mask) == pytest.approx(0)
    x, y = seen[r.mask], returns[r.mask]
    want = 1 - ((y - x).var() / y.var()).item()
    assert explained_variance(seen, returns, r.mask) == pytest.approx(want)
    assert math.isnan(explained_variance(seen, same, r.mask))
