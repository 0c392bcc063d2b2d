"""Losses of online reinforcement learning on known cases, their averages against plain loops, and
what the ratio says of itself."""

import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from prefopt.errors import InputError
from prefopt.rl_losses import (
    MODES,
    POLICY_LOSSES,
    aggregate,
    cispo_policy_loss,
    count_of,
    gspo_policy_loss,
    importance_weights,
    policy_loss_from,
    ppo_policy_loss,
    ppo_value_loss,
    ratio_statistics,
    reinforce_policy_loss,
    token_weights,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss, logp: Tensor, *rest: Tensor, **options) -> Tensor:
    logp = logp.clone().requires_grad_()
    return torch.autograd.grad(loss(logp, *rest, **options).sum(), logp)[0]


def close(got: Tensor, want, bound: float = 1e-12) -> None:
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want.expand_as(got), rtol=bound, atol=bound)


LOGP, OLD = normal(4, 5) - 3, normal(4, 5, seed=1) - 3
ADVANTAGES = normal(4, 5, seed=2)
MASK = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
MASK[0, 2] = False  # a gap
RATIO = (LOGP - OLD).exp()

# -- policy losses


def test_ppo_is_the_worse_of_two_products() -> None:
    for clip, high in ((0.2, None), (0.2, 0.28)):
        got = ppo_policy_loss(LOGP, OLD, ADVANTAGES, clip=clip, clip_high=high)
        for at in itertools.product(range(4), range(5)):
            rho, a = RATIO[at].item(), ADVANTAGES[at].item()
            near = min(max(rho, 1 - clip), 1 + (high or clip))
            assert got[at].item() == pytest.approx(max(-a * rho, -a * near))


def test_where_ppo_is_clipped_there_is_no_gradient_and_elsewhere_the_ratio_s() -> None:
    got = gradient(ppo_policy_loss, LOGP, OLD, ADVANTAGES, clip=0.2, clip_high=0.3)
    clipped = ((ADVANTAGES > 0) & (RATIO > 1.3)) | ((ADVANTAGES < 0) & (RATIO < 0.8))
    assert clipped.any() and (~clipped).any()
    close(got, torch.where(clipped, 0.0, -ADVANTAGES * RATIO))


def test_dual_clip_bounds_the_loss_of_bad_tokens_only() -> None:
    logp = OLD + torch.linspace(-4, 4, 20).double().view(4, 5)
    bad, good = -torch.ones_like(OLD), torch.ones_like(OLD)
    plain, got = (ppo_policy_loss(logp, OLD, bad, dual_clip=c) for c in (None, 3.0))
    close(got, plain.clamp(max=3.0))
    assert (plain > 3).any()
    zero = gradient(ppo_policy_loss, logp, OLD, bad, dual_clip=3.0)[plain > 3]
    assert (zero == 0).all()
    assert torch.equal(*(ppo_policy_loss(logp, OLD, good, dual_clip=c) for c in (None, 3.0)))


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name: str) -> None:
    ones = torch.ones_like(MASK)
    loss = policy_loss_from(name)
    got = gradient(loss, LOGP, LOGP, ADVANTAGES, ones)
    close(got, gradient(reinforce_policy_loss, LOGP, ADVANTAGES))
    close(got, -ADVANTAGES)


def test_gspo_of_one_token_is_ppo() -> None:
    one = torch.zeros_like(MASK)
    one[:, 0] = True
    options = {"clip": 0.1, "clip_high": 0.3}
    arguments = (LOGP, OLD, ADVANTAGES)
    for function in (lambda f, *a, **k: f(*a, **k), gradient):
        got = function(gspo_policy_loss, *arguments, one, **options)[:, 0]
        close(got, function(ppo_policy_loss, *arguments, **options)[:, 0])


def test_gspo_has_one_ratio_a_response_and_a_gradient_at_each_token() -> None:
    wide = {"clip": 0.99, "clip_high": 99.0}
    got = gspo_policy_loss(LOGP, OLD, ADVANTAGES, MASK, **wide)
    slope = gradient(gspo_policy_loss, LOGP, OLD, ADVANTAGES, MASK, **wide)
    for row in range(4):
        at = MASK[row]
        s = math.exp((LOGP - OLD)[row][at].mean())
        close(got[row][at], -s * ADVANTAGES[row][at])
        close(slope[row][at], -s * ADVANTAGES[row][at])
    near = gspo_policy_loss(LOGP, OLD, torch.ones_like(OLD), MASK)
    assert (near[MASK] >= -1.0004 - 1e-12).all()


def test_cispo_bounds_the_weight_and_keeps_the_gradient() -> None:
    got = gradient(cispo_policy_loss, LOGP, OLD, ADVANTAGES, clip_high=0.5)
    assert (RATIO > 1.5).any()
    close(got, -RATIO.clamp(max=1.5) * ADVANTAGES)
    both = gradient(cispo_policy_loss, LOGP, OLD, ADVANTAGES, clip=0.1, clip_high=0.5)
    close(both, -RATIO.clamp(0.9, 1.5) * ADVANTAGES)
    close(cispo_policy_loss(LOGP, OLD, ADVANTAGES), -RATIO.clamp(max=6) * ADVANTAGES * LOGP)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_no_gradient_reaches_what_was_known_before(name: str) -> None:
    old, adv = OLD.clone().requires_grad_(), ADVANTAGES.clone()
    logp = LOGP.clone().requires_grad_()
    policy_loss_from(name)(logp, old, adv, MASK).sum().backward()
    assert old.grad is None and logp.grad is not None
    assert (logp.grad[~MASK] == 0).all()


# -- losses by name


def test_losses_by_name_take_their_own_options() -> None:
    loss = policy_loss_from("ppo", clip=0.1, dual_clip=3.0, clip_high=None)
    assert loss.options == {"clip": 0.1, "clip_high": None, "dual_clip": 3.0}
    want = ppo_policy_loss(LOGP, OLD, ADVANTAGES, clip=0.1, dual_clip=3.0)
    close(loss(LOGP, OLD, ADVANTAGES, MASK), torch.where(MASK, want, 0.0))
    want = gspo_policy_loss(LOGP, OLD, ADVANTAGES, MASK, clip=0.1)
    got = policy_loss_from("gspo", clip=0.1)(LOGP, OLD, ADVANTAGES, MASK)
    close(got, torch.where(MASK, want, 0.0))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("gpso", {}, "unknown policy loss 'gpso' (did you mean 'gspo'?); there are: ppo, gspo"),
        ("ppo", {"clipp": 1}, "no 'clipp' (did you mean 'clip'?); it takes: clip, clip_high, dual"),
        ("reinforce", {"clip": 0.2}, "takes no 'clip'; it takes: no options"),
        (
            "gspo",
            {"dual_clip": 3.0},
            "'dual_clip' (did you mean 'clip'?); it takes: clip, clip_high",
        ),
        ("ppo", {"clip": 0.0}, "clip is 0.0; it must be in (0, 1]"),
        ("ppo", {"clip": True}, "clip is True; it must be in (0, 1]"),
        ("ppo", {"dual_clip": 1.0}, "dual_clip is 1.0; it must be above 1"),
        ("cispo", {"clip_high": math.inf}, "clip_high is inf; it must be above 0 and finite"),
        ("cispo", {"clip_high": "5"}, "clip_high is '5'; it must be above 0"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        policy_loss_from(name, **options)


# -- values


def test_the_value_loss_is_the_worse_of_two_squares() -> None:
    values, old, returns = LOGP, OLD, ADVANTAGES
    got = ppo_value_loss(values, old, returns, clip=0.3)
    for at in itertools.product(range(4), range(5)):
        v, v0, r = (x[at].item() for x in (values, old, returns))
        near = v0 + min(max(v - v0, -0.3), 0.3)
        assert got[at].item() == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2))
    close(ppo_value_loss(values, old, returns, clip=None), (values - returns) ** 2 / 2)
    close(gradient(ppo_value_loss, values, values, returns), values - returns)


# -- averages


def by_loops(x: Tensor, mask: Tensor, mode: str, denom: float) -> float:
    rows = [row[m].tolist() for row, m in zip(x, mask, strict=True) if m.any()]
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    of_row = {
        "seq-mean-token-mean": lambda row: sum(row) / len(row),
        "seq-mean-token-sum": sum,
        "token-sum-const": lambda row: sum(row) / denom,
    }[mode]
    return sum(map(of_row, rows)) / len(rows)


@pytest.mark.parametrize("mode", MODES)
def test_averages_are_those_of_loops_and_of_weights(mode: str) -> None:
    mask = MASK.clone()
    mask[3] = False  # a sample that is left out is not counted
    want = by_loops(LOGP, mask, mode, 7.0)
    close(aggregate(LOGP, mask, mode=mode, denom=7.0), want)
    weights = token_weights(mask.sum(1).double()[:, None], mode, denom=7.0)
    count = count_of(mode, int(mask.sum()), int(mask.any(1).sum()))
    close((weights * LOGP.where(mask, 0.0)).sum() / count, want)
    flat = token_weights(mask.sum(1)[mask.nonzero()[:, 0]], mode, denom=7.0)
    assert flat.dtype == torch.float32
    close((flat * LOGP[mask]).sum() / count, want, 1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_the_split_into_micro_batches_does_not_change_the_average(mode: str) -> None:
    def part(rows: slice) -> float:
        weights = token_weights(MASK[rows].sum(1)[:, None].double(), mode, denom=7.0)
        return (weights * LOGP[rows].where(MASK[rows], 0.0)).sum().item()

    count = count_of(mode, int(MASK.sum()), len(MASK))
    whole = aggregate(LOGP, MASK, mode=mode, denom=7.0).item()
    for cuts in ([0, 4], [0, 1, 4], [0, 2, 3, 4]):
        total = sum(part(slice(*ends)) for ends in itertools.pairwise(cuts))
        assert total / count == pytest.approx(whole, abs=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_the_average_of_nothing_is_zero(mode: str) -> None:
    assert aggregate(LOGP, torch.zeros_like(MASK), mode=mode, denom=1.0) == 0


@pytest.mark.parametrize("denom", [None, 0.0, -1.0, math.inf])
def test_a_constant_divisor_has_to_be_given(denom: float | None) -> None:
    with pytest.raises(InputError, match="above 0, such as the most tokens"):
        aggregate(LOGP, MASK, mode="token-sum-const", denom=denom)


def test_an_unknown_average_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'token-mean'"):
        aggregate(LOGP, MASK, mode="tokenmean")
    with pytest.raises(InputError, match="there are: token-mean, seq-mean-token-mean"):
        count_of("x", 1, 1)


# -- the sampler and the trainer


@pytest.mark.parametrize("kind", ["truncate", "mask", "sequence-mask"])
def test_weights_are_exactly_one_where_the_sampler_is_the_trainer(kind: str) -> None:
    got = importance_weights(OLD, OLD, MASK, kind=kind)
    assert torch.equal(got, MASK.double()) and not got.requires_grad


def test_weights_of_each_kind() -> None:
    w = (LOGP - OLD).exp()
    arguments = (LOGP.clone().requires_grad_(), OLD, MASK)
    got = importance_weights(*arguments, cap=2.0)
    assert (w[MASK] > 2).any() and not got.requires_grad
    close(got, torch.where(MASK, w.clamp(max=2), 0.0))
    got = importance_weights(*arguments, kind="mask", cap=2.0, floor=0.5)
    close(got, torch.where(MASK & (w >= 0.5) & (w <= 2), w, 0.0))
    got = importance_weights(*arguments, kind="sequence-mask", cap=2.0)
    kept = []
    for row in range(4):
        whole = math.exp((LOGP - OLD)[row][MASK[row]].sum())
        kept.append(whole <= 2)
        close(got[row], MASK[row].double() * (whole if whole <= 2 else 0.0))
    assert len(set(kept)) == 2
    with pytest.raises(InputError, match="known: truncate, mask, sequence-mask"):
        importance_weights(*arguments, kind="token")


# -- what the ratio did


def test_statistics_are_counted_by_the_sign_of_the_advantage() -> None:
    logp = LOGP.clone().requires_grad_()
    got = ratio_statistics(logp, OLD, ADVANTAGES, MASK, clip=0.2, clip_high=0.28)
    d, rho, a = (x[MASK] for x in (LOGP - OLD, RATIO, ADVANTAGES))
    low, high = ((a < 0) & (rho < 0.8)).sum(), ((a > 0) & (rho > 1.28)).sum()
    assert low > 0 and high > 0
    assert got["tokens"] == MASK.sum()
    close(got["policy/approxkl"], (rho - 1 - d).sum())
    close(got["policy/ratio"], rho.sum())
    assert (got["policy/clipfrac_low"], got["policy/clipfrac_high"]) == (low, high)
    assert got["policy/clipfrac"] == low + high
    assert (got["policy/ratio_max"], got["policy/ratio_min"]) == (rho.max(), rho.min())
    assert not any(x.requires_grad for x in got.values())


def test_clipped_tokens_are_those_without_gradient() -> None:
    got = policy_loss_from("ppo").statistics(LOGP, OLD, ADVANTAGES, MASK)
    slope = gradient(policy_loss_from("ppo"), LOGP, OLD, ADVANTAGES, MASK)
    assert got["policy/clipfrac"] == ((slope == 0) & MASK).sum() > 0


def test_statistics_by_the_bounds_of_the_loss() -> None:
    rows = (LOGP, OLD, ADVANTAGES, MASK)
    cispo = policy_loss_from("cispo", clip_high=0.5).statistics(*rows)
    assert cispo["policy/clipfrac_low"] == 0
    assert cispo["policy/clipfrac"] == ((RATIO > 1.5) & (ADVANTAGES > 0) & MASK).sum() > 0
    assert policy_loss_from("reinforce").statistics(*rows)["policy/clipfrac"] == 0
    gspo = policy_loss_from("gspo")
    slope = gradient(gspo, LOGP, OLD, ADVANTAGES, MASK)
    assert gspo.statistics(*rows)["policy/clipfrac"] == ((slope == 0) & MASK).sum() > 0


def test_statistics_of_an_empty_mask_merge_with_others() -> None:
    got = ratio_statistics(LOGP, OLD, ADVANTAGES, torch.zeros_like(MASK))
    assert got["policy/ratio_max"] == -math.inf and got["policy/ratio_min"] == math.inf
    assert all(got[name] == 0 for name in got if not name.endswith(("_max", "_min")))
