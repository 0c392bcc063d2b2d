"""The loss of KTO, whose responses come alone, against its paper."""

from decimal import Decimal as D
from decimal import localcontext

import pytest
import torch

from prefopt import losses


def oracle_kto(r, desirable, z, beta, weights):
    value = s(beta * (r - z)) if desirable else s(beta * (z - r))
    return weights[0 if desirable else 1] * (1 - value)


def s(x: D) -> D:
    return 1 / (1 + (-x).exp())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.5)])
@pytest.mark.parametrize("kl", [0.0, 3.7])
def test_kto_is_its_paper(dtype, bound, weights, kl):
    generator = torch.Generator().manual_seed(3)
    r = 40 * torch.randn(64, generator=generator, dtype=torch.float64).to(dtype)
    desirable = torch.rand(64, generator=generator) < 0.4
    named = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    got = losses.kto(r, desirable, torch.tensor(kl, dtype=dtype), beta=0.3, **named)
    kl = D(torch.tensor(kl, dtype=dtype).item())
    with localcontext() as context:
        context.prec = 60
        want = [
            float(oracle_kto(D(x), d, kl, D("0.3"), [D(w) for w in weights]))
            for x, d in zip(r.tolist(), desirable.tolist(), strict=True)
        ]
    assert got.dtype == dtype
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)


def test_kto_gradients():
    r = torch.randn(8, dtype=torch.float64, requires_grad=True)
    desirable = torch.arange(8) % 3 == 0
    kl = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: losses.kto(x, desirable, kl.detach()), r)
    grad, none = torch.autograd.grad(losses.kto(r, desirable, kl).sum(), (r, kl), allow_unused=True)
    assert none is None
    assert (grad[desirable] < 0).all() and (grad[~desirable] > 0).all()
    for far in (-1e4, 1e4):
        x = torch.full((2,), far, requires_grad=True)
        loss = losses.kto(x, torch.tensor([True, False]), torch.tensor(0.0), beta=1.0)
        assert loss.tolist() == ([1, 0] if far < 0 else [0, 1])
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


def test_kto_at_its_baseline_is_half_of_each_weight():
    r, desirable = torch.full((2,), 1.25), torch.tensor([True, False])
    loss = losses.kto(r, desirable, torch.tensor(1.25), desirable_weight=3, undesirable_weight=2)
    assert loss.tolist() == [1.5, 1.0]
