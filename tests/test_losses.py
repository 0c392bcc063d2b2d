"""The losses against oracles of their own: decimals with 60 digits, the formula as its authors
published it, and what must hold for any input."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import LOSSES, InputError, PairLogps, loss_from, losses

BETAS, SMOOTHINGS = (0.01, 0.1, 0.5, 2.0), (0.0, 0.1, 0.4)


def pairs(chosen, rejected, ref_chosen, ref_rejected, dtype=torch.float64):
    four = [torch.tensor(x, dtype=dtype) for x in (chosen, rejected, ref_chosen, ref_rejected)]
    lengths = torch.full((len(four[0]),), 7)
    return PairLogps(*four, lengths, lengths)


def at_margin(margin, dtype=torch.float64):
    return pairs([margin], [0.0], [0.0], [0.0], dtype)


def random_pairs(count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    four = -60 * torch.rand(4, count, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 50, (2, count), generator=generator)
    return PairLogps(*four.to(dtype), *lengths)


def oracle(p, beta, smoothing):
    """-(1 - e) ln sigmoid(x) - e ln sigmoid(-x), in decimal arithmetic from the same inputs."""
    out = []
    with localcontext() as context:
        context.prec = 60
        b, e = Decimal(beta), Decimal(smoothing)
        for chosen, rejected, ref_chosen, ref_rejected in zip(
            *(x.tolist() for x in p[:4]), strict=True
        ):
            margin = (Decimal(chosen) - Decimal(ref_chosen)) - (
                Decimal(rejected) - Decimal(ref_rejected)
            )
            x = b * margin
            out.append((1 - e) * (1 + (-x).exp()).ln() + e * (1 + x.exp()).ln())
    return torch.tensor([float(x) for x in out], dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_dpo_is_its_formula(dtype, bound, beta, smoothing):
    p = random_pairs(64, dtype)
    got = losses.dpo(p, beta=beta, label_smoothing=smoothing)
    want = oracle(p, beta, smoothing)
    assert got.dtype == dtype and got.shape == (64,)
    # Relative to the size of the terms: a float32 margin of 60 nats is known to 4e-6 of a nat.
    scale = 1 + beta * p.margin.abs().double()
    assert ((got.double() - want).abs() / scale).max() <= bound


def published(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing):
    """Equation 7 and its label noise, in the order of the authors' code: log-ratios first."""
    pi_logratios = policy_chosen - policy_rejected
    ref_logratios = ref_chosen - ref_rejected
    logits = pi_logratios - ref_logratios
    kept = torch.sigmoid(beta * logits).log() * (1 - label_smoothing)
    flipped = torch.sigmoid(-beta * logits).log() * label_smoothing
    return -kept - flipped


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_dpo_is_the_published_formula(beta, smoothing):
    p = random_pairs(64, torch.float64, seed=1)
    theirs = published(*p[:4], beta, smoothing)
    ours = losses.dpo(p, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_gradcheck(smoothing):
    p = random_pairs(5, torch.float64, seed=2)
    inputs = [x.requires_grad_() for x in p[:4]]

    def loss(*four):
        return losses.dpo(PairLogps(*four, *p[4:]), beta=0.3, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


logps = st.floats(-300, 0, allow_nan=False)
betas = st.floats(1e-3, 10)


@given(chosen=logps, rejected=logps, beta=betas, smoothing=st.floats(0, 0.49))
def test_a_policy_that_is_its_reference_loses_ln_2(chosen, rejected, beta, smoothing):
    p = pairs([chosen], [rejected], [chosen], [rejected])
    loss = losses.dpo(p, beta=beta, label_smoothing=smoothing)
    assert p.margin.item() == 0.0
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)


@given(margin=st.floats(-100, 100), beta=betas, smoothing=st.floats(0, 0.49))
def test_swapping_the_answers_mirrors_the_loss(margin, beta, smoothing):
    there, back = at_margin(margin), at_margin(-margin)
    loss = losses.dpo(there, beta=beta)
    # -ln s(x) + ln s(-x) = -x
    assert (loss - losses.dpo(back, beta=beta)).item() == pytest.approx(-beta * margin, abs=1e-9)
    # A label that is wrong with probability e is the swapped pair with probability 1 - e.
    smooth = losses.dpo(there, beta=beta, label_smoothing=smoothing)
    mirror = losses.dpo(back, beta=beta, label_smoothing=1 - smoothing)
    assert smooth.item() == pytest.approx(mirror.item(), rel=1e-12, abs=1e-12)


@given(low=st.floats(-100, 100), step=st.floats(1e-3, 100), beta=betas)
def test_a_larger_margin_never_loses_more(low, step, beta):
    loss = losses.dpo(pairs([low, low + step], [0.0] * 2, [0.0] * 2, [0.0] * 2), beta=beta)
    assert loss[1] <= loss[0] and (loss > 0).any() and (loss >= 0).all()


@given(margin=st.floats(-5, 5), smoothing=st.floats(0.05, 0.4))
def test_smoothing_puts_the_minimum_at_its_log_odds(margin, smoothing):
    best = math.log((1 - smoothing) / smoothing)
    at_best = losses.dpo(at_margin(best), beta=1.0, label_smoothing=smoothing)
    elsewhere = losses.dpo(at_margin(margin), beta=1.0, label_smoothing=smoothing)
    assert at_best <= elsewhere + 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_extreme_margins_stay_finite(dtype, margin, smoothing):
    p = at_margin(margin, dtype)
    p.chosen.requires_grad_()
    loss = losses.dpo(p, beta=1.0, label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(loss.sum(), p.chosen)
    # ln(1 + exp(-x)) is -x at the far left and 0 at the far right; the slopes are -1 and 0.
    wrong = (1 - smoothing) if margin < 0 else smoothing
    assert loss.item() == pytest.approx(wrong * 1e4, rel=1e-6)
    assert grad.item() == pytest.approx(-wrong if margin < 0 else wrong, abs=1e-6)


def test_the_gradient_of_the_reference_is_the_policys_turned_around():
    p = random_pairs(3, torch.float64, seed=3)
    inputs = [x.requires_grad_() for x in p[:4]]
    grads = torch.autograd.grad(losses.dpo(p).sum(), inputs)
    assert torch.equal(grads[0], -grads[1]) and torch.equal(grads[0], -grads[2])
    assert torch.equal(grads[0], grads[3]) and (grads[0] < 0).all()


def test_pairs_do_not_see_each_other_nor_lengths():
    p = random_pairs(6, torch.float64, seed=4)
    whole = losses.dpo(p)
    for i in range(6):
        alone = PairLogps(*(x[i : i + 1] for x in p))
        assert torch.equal(losses.dpo(alone), whole[i : i + 1])
        assert torch.equal(
            losses.dpo(alone._replace(chosen_len=p.chosen_len[:1] + 9)), whole[i : i + 1]
        )


def test_shapes_are_checked():
    p = random_pairs(3, torch.float64)
    with pytest.raises(AssertionError):
        losses.dpo(p._replace(ref_rejected=p.ref_rejected[:2]))


# -- by name


def test_loss_from_binds_its_keywords():
    p = random_pairs(8, torch.float64)
    bound = loss_from("dpo", beta=0.7, label_smoothing=0.2)
    assert torch.equal(bound(p), losses.dpo(p, beta=0.7, label_smoothing=0.2))
    assert torch.equal(loss_from("dpo")(p), losses.dpo(p, beta=0.1))
    assert LOSSES["dpo"] is losses.dpo


def test_an_unknown_loss_names_the_nearest_and_all():
    with pytest.raises(InputError, match=r"unknown loss 'dpoo' \(did you mean 'dpo'\?\).*: dpo"):
        loss_from("dpoo")
    with pytest.raises(InputError, match="there are: ") as error:
        loss_from("quartic")
    assert all(name in str(error.value) for name in LOSSES)
    assert "did you mean" not in str(error.value)


def test_an_unknown_keyword_names_what_the_loss_takes():
    with pytest.raises(InputError) as error:
        loss_from("dpo", beta=0.1, label_smooting=0.1)
    assert "'label_smooting'" in str(error.value)
    assert "did you mean 'label_smoothing'" in str(error.value)
    assert "it takes: beta, label_smoothing" in str(error.value)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_gives_one_finite_number_a_pair(name):
    p = random_pairs(9, torch.float32)
    assert LOSSES[name](p).shape == (9,) and LOSSES[name](p).isfinite().all()
    assert LOSSES[name].__doc__ and "arXiv" in LOSSES[name].__doc__
