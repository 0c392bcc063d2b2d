"""Every loss against the formula of its paper in decimals of 60 digits, values and gradients; the
formulas its authors published; and the far ends."""

import math
from collections.abc import Callable, Mapping
from decimal import Decimal as D
from decimal import localcontext
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch

from prefopt import LOSSES, PairLogps, losses

E4 = 1e4


class Case(NamedTuple):
    name: str
    options: Mapping[str, float | bool] = MappingProxyType({})


CASES = [
    *(Case("dpo", {"beta": b, "label_smoothing": e}) for b in (0.01, 2.0) for e in (0.0, 0.4)),
    *(Case("robust", {"label_smoothing": e}) for e in (0.0, 0.3)),
    *(Case("ipo", {"beta": b, "average": a}) for b in (0.05, 1.0) for a in (False, True)),
    *(Case("hinge", {"beta": b}) for b in (0.02, 0.5)),
    *(Case("exo_pair", {"label_smoothing": e}) for e in (1e-3, 0.3)),
    *(Case("nca_pair", {"beta": b}) for b in (0.1, 1.0)),
    *(Case("bco_pair", {"beta": b}) for b in (0.1, 1.0)),
    *(Case("sppo_hard", {"beta": b}) for b in (0.02, 1.0)),
    *(Case("aot", {"label_smoothing": e}) for e in (0.0, 0.3)),
    *(Case("aot_unpaired", {"label_smoothing": e}) for e in (0.0, 0.3)),
    *(Case("apo_zero", {"beta": b}) for b in (0.1, 1.0)),
    *(Case("apo_down", {"beta": b}) for b in (0.1, 1.0)),
    *(Case("discopop", {"beta": b, "tau": t}) for b in (0.1, 1.0) for t in (0.05, 1.0)),
    Case("sft"),
    *(Case("sigmoid_norm", {"beta": b}) for b in (0.1, 5.0)),
    *(Case("simpo", {"gamma": g, "label_smoothing": e}) for g in (0.0, 1.4) for e in (0.0, 0.2)),
    *(Case("cpo", {"alpha": a, "label_smoothing": e}) for a in (0.0, 0.7) for e in (0.0, 0.2)),
    *(Case("orpo", {"beta": b}) for b in (0.1, 1.0)),
    *(Case(name) for name in LOSSES),
]
EACH = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: ",".join([c.name, *(f"{k}={v}" for k, v in c.options.items())])
)
DTYPES = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)]
)


# -- the papers: a, b are log pi of the chosen and the rejected response, ra, rb log ref, na, nb the
# lengths, u = pi / ref


def s(x: D) -> D:
    return 1 / (1 + (-x).exp())


def noisy(x: D, e: D) -> D:
    return -(1 - e) * s(x).ln() - e * s(-x).ln()


def oracle_dpo(a, b, ra, rb, na, nb, beta=D("0.1"), label_smoothing=D(0)):
    ua, ub = ((a - ra).exp() ** beta, (b - rb).exp() ** beta)  # Bradley-Terry strengths
    wins, loses = ua / (ua + ub), ub / (ua + ub)
    return -(1 - label_smoothing) * wins.ln() - label_smoothing * loses.ln()


def oracle_robust(a, b, ra, rb, na, nb, beta=D("0.1"), label_smoothing=D(0)):
    kept, flipped = (-s(x).ln() for x in (beta * (a - ra - b + rb), beta * (b - rb - a + ra)))
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def oracle_ipo(a, b, ra, rb, na, nb, beta=D("0.1"), average=False):
    if average:
        a, b, ra, rb = a / na, b / nb, ra / na, rb / nb
    h = (a - b) - (ra - rb)
    return (h - 1 / (2 * beta)) ** 2


def oracle_hinge(a, b, ra, rb, na, nb, beta=D("0.1")):
    return max(D(0), 1 - (beta * (a - ra) - beta * (b - rb)))


def oracle_exo_pair(a, b, ra, rb, na, nb, beta=D("0.1"), label_smoothing=D("0.001")):
    ua, ub = ((a - ra).exp() ** beta, (b - rb).exp() ** beta)
    q, target = (ua / (ua + ub), ub / (ua + ub)), (1 - label_smoothing, label_smoothing)
    return sum(x * (x / y).ln() for x, y in zip(q, target, strict=True))


def oracle_nca_pair(a, b, ra, rb, na, nb, beta=D("0.1")):
    reward_a, reward_b = beta * (a - ra), beta * (b - rb)
    return -(s(reward_a).ln() + (s(-reward_a).ln() + s(-reward_b).ln()) / 2)


def oracle_bco_pair(a, b, ra, rb, na, nb, beta=D("0.1")):
    return -(s(beta * (a - ra)) * s(beta * (rb - b))).ln()


def oracle_sppo_hard(a, b, ra, rb, na, nb, beta=D("0.1")):
    eta = 1 / beta
    return (a - ra - eta * (1 - D("0.5"))) ** 2 + (b - rb - eta * (0 - D("0.5"))) ** 2


def oracle_apo_zero(a, b, ra, rb, na, nb, beta=D("0.1")):
    return -s(beta * (a - ra)) + s(beta * (b - rb)) + 1


def oracle_apo_down(a, b, ra, rb, na, nb, beta=D("0.1")):
    reward_a, reward_b = beta * (a - ra), beta * (b - rb)
    return s(reward_a) - s(reward_a - reward_b) + 1


def oracle_discopop(a, b, ra, rb, na, nb, beta=D("0.1"), tau=D("0.05")):
    rho = beta * ((a - ra) - (b - rb))
    gate = s(rho / tau)
    return s(-rho / tau) * -s(rho).ln() + gate * (-rho).exp()


def oracle_sft(a, b, ra, rb, na, nb):
    return -a / na


def oracle_sigmoid_norm(a, b, ra, rb, na, nb, beta=D("0.1")):
    return -s(beta / na * (a - ra) - beta / nb * (b - rb)).ln()


def oracle_simpo(a, b, ra, rb, na, nb, beta=D(2), gamma=D("0.5"), label_smoothing=D(0)):
    return noisy(beta / na * a - beta / nb * b - gamma, label_smoothing)


def oracle_cpo(a, b, ra, rb, na, nb, beta=D("0.1"), alpha=D(1), label_smoothing=D(0)):
    return noisy(beta * a - beta * b, label_smoothing) - alpha * a / na


def oracle_orpo(a, b, ra, rb, na, nb, beta=D("0.1")):
    q_a, q_b = (a / na).exp(), (b / nb).exp()
    ratio = q_a / (1 - q_a) / (q_b / (1 - q_b))
    return -a / na - beta * s(ratio.ln()).ln()


def oracle_aot(rows, beta=D("0.1"), label_smoothing=D(0)):
    policy, reference = sorted(a - b for a, b, *_ in rows), sorted(r[2] - r[3] for r in rows)
    return [noisy(beta * (x - y), label_smoothing) for x, y in zip(policy, reference, strict=True)]


def oracle_aot_unpaired(rows, beta=D("0.1"), label_smoothing=D(0)):
    chosen, rejected = sorted(r[0] - r[2] for r in rows), sorted(r[1] - r[3] for r in rows)
    return [noisy(beta * (x - y), label_smoothing) for x, y in zip(chosen, rejected, strict=True)]


def decimals(p: PairLogps) -> list[list[D]]:
    return [[D(x) for x in row] for row in zip(*(x.tolist() for x in p), strict=True)]


def oracle(case: Case, rows: list[list[D]]) -> list[D]:
    of: Callable = globals()[f"oracle_{case.name}"]
    options = {k: v if isinstance(v, bool) else D(v) for k, v in case.options.items()}
    if case.name in losses.WHOLE_BATCH:
        return of(rows, **options)
    return [of(*row, **options) for row in rows]


def slopes(case: Case, rows: list[list[D]]) -> list[list[float]]:
    """Derivatives of the summed oracle by each log-prob of each pair, by differences of 1e-20."""
    step, out = D("1e-20"), []
    for i, row in enumerate(rows):
        out.append([])
        for j in range(4):
            ends = []
            for h in (step, -step):
                moved = [*row[:j], row[j] + h, *row[j + 1 :]]
                batch = [*rows[:i], moved, *rows[i + 1 :]]
                alone = batch if case.name in losses.WHOLE_BATCH else [moved]
                ends.append(sum(oracle(case, alone)))
            out[-1].append(float((ends[0] - ends[1]) / (2 * step)))
    return out


def random_pairs(count: int, dtype: torch.dtype, seed: int = 0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    four = -60 * torch.rand(4, count, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 50, (2, count), generator=generator)
    return pairs_of(four.to(dtype), lengths)


def pairs_of(logps, lengths) -> PairLogps:
    """From four columns of log-probs and two of lengths."""
    a, b, ra, rb = logps
    na, nb = lengths
    return PairLogps(a, b, ra, rb, na, nb)


def gradients(case: Case, p: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses [B], gradients of their sum by the four log-probs [B, 4])."""
    four = [x.clone().requires_grad_() for x in p[:4]]
    loss = LOSSES[case.name](pairs_of(four, p[4:]), **case.options)
    grads = torch.autograd.grad(loss.sum(), four, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(four, grads, strict=True)]
    return loss.detach(), torch.stack(filled, 1)


def assert_is_the_oracle(case: Case, p: PairLogps, bound: float) -> None:
    rows = decimals(p)
    got, got_slopes = gradients(case, p)
    with localcontext() as context:
        context.prec = 60
        want = torch.tensor([float(x) for x in oracle(case, rows)], dtype=torch.float64)
        want_slopes = torch.tensor(slopes(case, rows), dtype=torch.float64)
    assert got.dtype == p.chosen.dtype and got.shape == p.chosen.shape
    assert ((got.double() - want).abs() / (1 + want.abs())).max() <= bound
    assert ((got_slopes.double() - want_slopes).abs() / (1 + want_slopes.abs())).max() <= bound


@DTYPES
@EACH
def test_every_loss_is_its_paper(case, dtype, bound):
    assert_is_the_oracle(case, random_pairs(12, dtype), bound)


FAR = [(0.0, -E4, 0.0, 0.0), (-E4, 0.0, 0.0, 0.0), (0.0, 0.0, -E4, 0.0), (0.0, 0.0, 0.0, -E4),
       (0.0, -E4, -E4, 0.0), (-E4, 0.0, 0.0, -E4), (-E4, -E4, 0.0, 0.0), (0.0, 0.0, -E4, -E4),
       (-1e-3, -E4, -1.0, -1.0), (-E4, -1e-3, -1.0, -1.0), (0.0, 0.0, 0.0, 0.0)]  # fmt: skip


@DTYPES
@EACH
@pytest.mark.parametrize("length", [1, 37])
def test_the_far_ends_are_finite_and_right(case, dtype, bound, length):
    far = torch.tensor(FAR, dtype=dtype).T
    p = pairs_of(far, torch.full((2, len(FAR)), length))
    got, slopes = gradients(case, p)
    assert got.isfinite().all() and slopes.isfinite().all()
    if case.name == "orpo":  # an average log-prob of 0 has no log-odds; the oracle has to stay off
        p = pairs_of(far.clamp_max(-0.25), torch.full((2, len(FAR)), length))
    if case.name not in ("hinge", *losses.WHOLE_BATCH):  # no slope at a kink or a tie
        assert_is_the_oracle(case, p, bound)


@EACH
def test_gradcheck(case):
    p = random_pairs(4, torch.float64, seed=2)
    if (
        case.name == "discopop"
    ):  # whose curvature of 1 / tau^2 differences of 1e-6 do not see far out
        p = p._replace(chosen=p.ref_chosen + 0.3, rejected=p.ref_rejected - 0.2)
    inputs = [x.clone().requires_grad_() for x in p[:4]]

    def loss(*four):
        return LOSSES[case.name](pairs_of(four, p[4:]), **case.options)

    assert torch.autograd.gradcheck(loss, inputs)


def test_dpo_twice_differentiable():
    p = random_pairs(4, torch.float64, seed=2)
    inputs = [x.clone().requires_grad_() for x in p[:4]]
    assert torch.autograd.gradgradcheck(lambda *x: losses.dpo(pairs_of(x, p[4:])), inputs)


# -- the authors' code


def published(p, beta, label_smoothing=0.0, ipo=False, reference_free=False):
    """Preference losses in the order of Mitchell's code: log-ratios of the two models first."""
    pi_logratios = p.chosen - p.rejected
    ref_logratios = p.ref_chosen - p.ref_rejected
    if reference_free:
        ref_logratios = 0
    logits = pi_logratios - ref_logratios
    if ipo:
        return (logits - 1 / (2 * beta)) ** 2
    kept = torch.sigmoid(beta * logits).log() * (1 - label_smoothing)
    return -kept - torch.sigmoid(-beta * logits).log() * label_smoothing


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_dpo_and_ipo_are_the_published_formulas(beta, smoothing):
    p = random_pairs(64, torch.float64, seed=1)
    free = p._replace(ref_chosen=torch.zeros(64), ref_rejected=torch.zeros(64))
    for given, reference_free in ((p, False), (free, True)):
        theirs = published(p, beta, smoothing, reference_free=reference_free)
        ours = losses.dpo(given, beta=beta, label_smoothing=smoothing)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        theirs = published(p, beta, ipo=True, reference_free=reference_free)
        torch.testing.assert_close(losses.ipo(given, beta=beta), theirs, rtol=1e-12, atol=1e-12)


# -- shape


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_documented_and_gives_one_number_a_pair(name):
    p = random_pairs(9, torch.float32)
    assert LOSSES[name](p).shape == (9,) and LOSSES[name](p).isfinite().all()
    assert "arXiv" in str(LOSSES[name].__doc__) and "[B]" in str(LOSSES[name].__doc__)
    with pytest.raises(AssertionError):
        LOSSES[name](p._replace(ref_rejected=p.ref_rejected[:2]))


def test_orpo_survives_certainty():
    lengths = torch.tensor([3, 3])
    for dtype in (torch.float32, torch.float64):
        for tiny in (0.0, 1e-300, 1e-30, 1e-9):
            p = pairs_of(torch.full((4, 2), -tiny, dtype=dtype), (lengths, lengths))
            loss, slopes = gradients(Case("orpo"), p)
            assert loss.isfinite().all() and slopes.isfinite().all()
            assert loss[0].item() == pytest.approx(0.1 * math.log(2), rel=1e-6)
