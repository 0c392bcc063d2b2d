"""Gradients of KL penalties by enumeration: every response of a small world, weighed by its exact
probability, in float64. The policy is a table of logits with one row for every context."""

import itertools

import pytest
import torch
from torch import Tensor

from prefopt.errors import InputError
from prefopt.rl import gae, kl_estimate, shape_rewards
from prefopt.rl_losses import kl_loss, reinforce_policy_loss

TOKENS = 3  # 0 ends a response


class World:
    """All responses of at most ``longest`` tokens; ``ref``, ``old``: random log-prob tables."""

    def __init__(self, longest: int, seed: int = 0, distance: float = 1.0):
        self.responses = [
            (*words, 0) if len(words) < longest else words
            for n in range(longest + 1)
            for words in itertools.product(range(1, TOKENS), repeat=n)
        ]
        contexts = sorted({r[:t] for r in self.responses for t in range(len(r))})
        place = {context: i for i, context in enumerate(contexts)}
        at = [[place[r[:t]] * TOKENS + r[t] for t in range(len(r))] for r in self.responses]
        self.mask = torch.tensor([[t < len(r) for t in range(longest)] for r in self.responses])
        self.at = torch.tensor([row + [0] * (longest - len(row)) for row in at])
        self.context = self.at // TOKENS
        generator = torch.Generator().manual_seed(seed)
        shape = len(contexts), TOKENS
        logits, *others = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        self.logits = logits.requires_grad_()
        self.ref, self.old = ((logits.detach() + distance * x).log_softmax(1) for x in others)

    def rows(self, table: Tensor) -> Tensor:
        """Log-probs of the tokens of all responses, [S, T]; 0 behind their ends."""
        return table.flatten()[self.at].where(self.mask, 0.0)

    @property
    def pi(self) -> Tensor:
        return self.logits.log_softmax(1)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]

    def expected(self, per_token: Tensor, table: Tensor) -> Tensor:
        """The mean over responses sampled from ``table`` of the sum over tokens."""
        p = self.rows(table.detach()).sum(1).exp()
        return (p[:, None] * per_token.where(self.mask, 0.0)).sum()

    def kl(self, of: Tensor, towards: Tensor) -> Tensor:
        """Over whole responses."""
        one, other = self.rows(of).sum(1), self.rows(towards).sum(1)
        return (one.exp() * (one - other)).sum()

    def in_reward(self, kind: str) -> Tensor:
        """The gradient of REINFORCE where the estimate is a negative reward of each token."""
        logp, ref = self.rows(self.pi), self.rows(self.ref)
        kl = kl_estimate(logp.detach(), ref, kind=kind)
        rewards = shape_rewards(torch.zeros(len(kl)).double(), kl, self.mask, beta=1.0)
        advantages, _ = gae(rewards, torch.zeros_like(kl), self.mask, lam=1.0)
        return self.gradient(self.expected(reinforce_policy_loss(logp, advantages), self.pi))

    def in_loss(self, kind: str, sampled_from: Tensor) -> Tensor:
        loss = kl_loss(
            self.rows(self.pi), self.rows(sampled_from.detach()), self.rows(self.ref), kind=kind
        )
        return self.gradient(self.expected(loss, sampled_from))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def far(got: Tensor, want: Tensor) -> None:
    assert (got - want).norm() > 0.02 * want.norm()


@pytest.mark.parametrize("longest", [1, 3])
def test_k1_in_the_reward_is_the_gradient_of_the_kl_of_responses(longest: int) -> None:
    world = World(longest)
    close(world.in_reward("k1"), world.gradient(world.kl(world.pi, world.ref)))


@pytest.mark.parametrize("sampled_from", ["pi", "old"])
def test_k2_and_k3_in_the_loss_of_one_token(sampled_from: str) -> None:
    """k2: KL(pi || ref). k3: KL(ref || pi), another. On the policy's own samples, and on others."""
    world = World(1)
    source = getattr(world, sampled_from)
    reverse = world.gradient(world.kl(world.pi, world.ref))
    forward = world.gradient(world.kl(world.ref, world.pi))
    close(world.in_loss("k2", source), reverse)
    close(world.in_loss("k3", source), forward)
    far(forward, reverse)


def test_of_longer_responses_the_loss_takes_each_context_as_it_is() -> None:
    world = World(3)
    tables = world.pi.detach(), world.pi, world.ref
    weight = torch.zeros(len(world.pi), dtype=torch.float64)  # how often a context is met
    p = world.rows(tables[0]).sum(1).exp()
    weight.index_add_(0, world.context[world.mask], p[:, None].expand(world.mask.shape)[world.mask])
    per_context = (world.pi.exp() * (world.pi - world.ref)).sum(1)
    want = world.gradient((weight * per_context).sum())
    close(world.in_loss("k2", world.pi), want)
    far(want, world.gradient(world.kl(world.pi, world.ref)))


def test_k1_in_the_loss_has_a_gradient_of_mean_zero_and_is_refused() -> None:
    world = World(3)
    estimate = kl_estimate(world.rows(world.pi), world.rows(world.ref), kind="k1")
    got = world.gradient(world.expected(estimate, world.pi))
    close(got, torch.zeros_like(got))
    with pytest.raises(InputError, match="mean zero"):
        world.in_loss("k1", world.pi)


def test_k3_in_the_reward_is_the_difference_of_two_divergences() -> None:
    """And so next to nothing near the reference."""
    shares = []
    for distance in (0.01, 0.05, 0.2, 1.0):
        world = World(1, distance=distance)
        reverse = world.gradient(world.kl(world.pi, world.ref))
        forward = world.gradient(world.kl(world.ref, world.pi))
        close(world.in_reward("k3"), reverse - forward)
        shares.append(((reverse - forward).norm() / reverse.norm()).item())
    assert shares == sorted(shares) and shares[0] < 0.02 and shares[-1] > 0.1


def test_without_the_ratio_other_samples_give_another_gradient() -> None:
    world = World(1)
    on_policy = kl_loss(
        world.rows(world.pi), world.rows(world.pi), world.rows(world.ref), kind="k2"
    )
    got = world.gradient(world.expected(on_policy, world.old))
    far(got, world.gradient(world.kl(world.pi, world.ref)))


def test_what_a_gradient_through_the_ratio_would_descend() -> None:
    """Why the ratio is detached: with k2 it would be the mean of k2, which is no KL."""
    world = World(1)
    logp, old, ref = (world.rows(x) for x in (world.pi, world.old, world.ref))
    through = (logp - old).exp()
    k2, k3 = (
        world.gradient(world.expected(through * kl_estimate(logp, ref, kind=kind), world.old))
        for kind in ("k2", "k3")
    )
    reverse = world.gradient(world.kl(world.pi, world.ref))
    mean_k2 = (world.pi.exp() * (world.pi - world.ref).square() / 2).sum()
    close(k2, world.gradient(mean_k2))
    far(k2, reverse)
    close(k3, reverse)
