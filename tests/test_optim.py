"""The optimizer against AdamW written out, and the learning-rate schedules."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt.optim import lr_factor, make_optimizer, make_scaler, warmup_steps

SCHEDULES = ("linear", "cosine", "constant")


def adamw(p, grads, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    """Algorithm 2 of arXiv 1711.05101, with the learning rate on both terms as torch has it."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        p = p - lr * decay * p
        p = p - lr * m_hat / (v_hat.sqrt() + eps)
    return p


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_optimizer_is_adamw(decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    grads = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer(iter([parameter]), 0.01, weight_decay=decay)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.data, adamw(start, grads, 0.01, decay), rtol=0, atol=1e-12)


def test_warmup_is_a_number_of_steps_or_a_fraction():
    assert warmup_steps(0, 100) == 0
    assert warmup_steps(0.1, 100) == 10
    assert warmup_steps(0.1, 101) == 11
    assert warmup_steps(0.5, 1) == 1
    assert warmup_steps(1, 100) == 1
    assert warmup_steps(20, 100) == 20


def test_the_schedules_at_known_steps():
    def factors(schedule, warmup=0):
        return [lr_factor(s, 4, warmup=warmup, schedule=schedule) for s in range(4)]

    assert factors("linear") == [1.0, 0.75, 0.5, 0.25]
    assert factors("constant") == [1.0] * 4
    half = math.sqrt(0.5)
    assert factors("cosine") == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert factors("linear", warmup=2) == [0.5, 1.0, 1.0, 0.5]
    assert factors("constant", warmup=4) == [0.25, 0.5, 0.75, 1.0]


@given(
    total=st.integers(1, 60),
    warmup=st.integers(0, 80),
    schedule=st.sampled_from(SCHEDULES),
)
def test_up_in_the_warmup_then_never_up_again(total, warmup, schedule):
    factors = [lr_factor(s, total, warmup=warmup, schedule=schedule) for s in range(total)]
    assert all(0 < factor <= 1 for factor in factors), "no step is wasted on a rate of 0"
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert not falling or falling[0] == 1.0
    if schedule != "constant":  # one step after the last
        end = lr_factor(
            max(total, warmup + 1), max(total, warmup + 1), warmup=warmup, schedule=schedule
        )
        assert end == pytest.approx(0, abs=1e-15)


def test_only_float16_scales_its_loss():
    cpu = torch.device("cpu")
    assert make_scaler(torch.float32, cpu) is None and make_scaler(torch.bfloat16, cpu) is None
    scaler = make_scaler(torch.float16, cpu)
    assert scaler is not None and scaler.is_enabled() and scaler.get_scale() == 65536
