"""One optimizer step: the split into micro-batches is invisible, the division happens once, and
nothing moves when a number is not finite."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from prefopt import DPO, LoraConfig, Policy, encode_pairs, load_preferences, optimizer_step, pack
from prefopt.optim import make_optimizer, make_scaler


@dataclass
class Rows:
    """A micro-batch of a linear model: inputs [B, 3], outputs [B]."""

    x: torch.Tensor
    y: torch.Tensor

    def to(self, device):
        return self

    def cut(self, *sizes):
        parts = zip(self.x.split(sizes), self.y.split(sizes), strict=True)
        return [Rows(*part) for part in parts]


def squares(model, batch):
    """Sum of squared errors, count, and a metric summed over the rows."""
    errors = model(batch.x)[:, 0] - batch.y
    return (errors**2).sum(), len(errors), {"error": errors.detach().sum()}


def rows(count=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return Rows(x.to(dtype), (x @ torch.tensor([1.0, -2.0, 3.0]).double()).to(dtype))


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(3, 1, bias=False, dtype=dtype)


SPLITS = [(4,), (1, 3), (3, 1), (2, 2), (1, 1, 1, 1)]


@pytest.mark.parametrize("sizes", SPLITS[1:])
def test_the_split_is_invisible(sizes):
    whole, parts, data = model(), model(), rows()
    stats = []
    for one, cut in ((whole, (4,)), (parts, sizes)):
        optimizer = make_optimizer(one.parameters(), 0.1)
        stats = [
            optimizer_step(one, squares, data.cut(*cut), optimizer, max_norm=0.5) for _ in range(5)
        ]
        one.stats = stats
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-12)
    for a, b in zip(whole.stats, parts.stats, strict=True):
        assert a.count == b.count == 4 and a.applied and b.applied
        torch.testing.assert_close(b.loss, a.loss, rtol=0, atol=1e-12)
        torch.testing.assert_close(b.grad_norm, a.grad_norm, rtol=0, atol=1e-12)
        torch.testing.assert_close(b.metrics["error"], a.metrics["error"], rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_the_mean():
    one, data = model(), rows()
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    before = one.weight.detach().clone()
    stats = optimizer_step(one, squares, data.cut(1, 3), optimizer, max_norm=None)
    residual = data.x @ before[0] - data.y
    gradient = 2 * (residual[:, None] * data.x).mean(0)
    torch.testing.assert_close(one.weight[0], before[0] - 0.1 * gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.loss, (residual**2).mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.grad_norm, gradient.norm(), rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.metrics["error"], residual.sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_norm", [0.01, 1e6, 0, None])
def test_clipping_scales_the_whole_gradient(max_norm):
    one, data = model(), rows()
    before = one.weight.detach().clone()
    optimizer = torch.optim.SGD(one.parameters(), 1.0)
    stats = optimizer_step(one, squares, data.cut(4), optimizer, max_norm=max_norm)
    assert stats.grad_norm > 1, "the norm is that before clipping"
    moved = (one.weight.detach() - before).norm()
    want = 0.01 if max_norm == 0.01 else stats.grad_norm
    torch.testing.assert_close(moved, torch.as_tensor(want).double(), rtol=1e-6, atol=0)


def test_gradients_left_from_elsewhere_do_not_count():
    one, other, data = model(), model(), rows()
    one.weight.grad = torch.full_like(one.weight, 1e3)
    for each in (one, other):
        optimizer_step(each, squares, data.cut(4), torch.optim.SGD(each.parameters(), 0.1))
    assert torch.equal(one.weight, other.weight)


def test_no_item_is_an_error():
    one = model()
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    with pytest.raises(ValueError, match="at least one item"):
        optimizer_step(one, squares, [], optimizer)
    with pytest.raises(ValueError, match="at least one item"):
        optimizer_step(one, squares, rows().cut(0, 0, 4)[:2], optimizer)


def bad_loss(model, batch):
    loss, count, metrics = squares(model, batch)
    return loss * torch.tensor(float("nan")), count, metrics


class _ZeroTimesInfinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * float("inf")


def bad_gradient(model, batch):
    loss, count, metrics = squares(model, batch)
    return _ZeroTimesInfinity.apply(loss), count, metrics


@pytest.mark.parametrize(("objective", "what"), [(bad_loss, "loss"), (bad_gradient, "gradient")])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_not_finite_stops_before_anything_moves(objective, what, max_norm):
    one, data = model(), rows()
    optimizer = make_optimizer(one.parameters(), 0.1)
    optimizer_step(one, squares, data.cut(4), optimizer)
    weight = one.weight.detach().clone()
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match=rf"the {what} is not finite .* was not taken"):
        optimizer_step(one, objective, data.cut(1, 3), optimizer, max_norm=max_norm)
    assert torch.equal(one.weight, weight)
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][0][k], v) for k, v in state["state"][0].items())


def test_one_bad_micro_batch_is_enough():
    one, data = model(), rows()
    parts = data.cut(1, 3)
    parts[1].y[2] = float("inf")
    weight = one.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="loss"):
        optimizer_step(one, squares, parts, torch.optim.SGD(one.parameters(), 0.1))
    assert torch.equal(one.weight, weight)


# -- float16 loss scaling


def scaled(one, optimizer, scaler, objective=squares):
    return optimizer_step(
        one, objective, rows(dtype=torch.float32).cut(1, 3), optimizer, scaler=scaler
    )


def test_an_overflow_skips_the_step_and_halves_the_scale():
    one = model(torch.float32)
    optimizer = make_optimizer(one.parameters(), 0.1)
    scaler = make_scaler(torch.float16, torch.device("cpu"))
    assert scaled(one, optimizer, scaler).applied
    weight = one.weight.detach().clone()
    moments = {k: v.clone() for k, v in optimizer.state[one.weight].items()}
    stats = scaled(one, optimizer, scaler, bad_gradient)
    assert not stats.applied and stats.loss.isfinite()
    assert torch.equal(one.weight, weight)
    assert all(torch.equal(optimizer.state[one.weight][k], v) for k, v in moments.items())
    assert scaler.get_scale() == 65536 / 2
    assert scaled(one, optimizer, scaler).applied and not torch.equal(one.weight, weight)


def test_scaling_changes_nothing_else():
    plain, scaled_one = model(torch.float32), model(torch.float32)
    scaler = make_scaler(torch.float16, torch.device("cpu"))
    for one, its in ((plain, None), (scaled_one, scaler)):
        optimizer = make_optimizer(one.parameters(), 0.1)
        for _ in range(3):
            stats = scaled(one, optimizer, its)
        one.last = stats
    assert torch.equal(plain.weight, scaled_one.weight), "a power of two costs no digit"
    assert torch.equal(plain.last.grad_norm, scaled_one.last.grad_norm)
    assert torch.equal(plain.last.loss, scaled_one.last.loss)


def test_a_loss_that_is_not_finite_is_no_overflow():
    one = model(torch.float32)
    scaler = make_scaler(torch.float16, torch.device("cpu"))
    optimizer = make_optimizer(one.parameters(), 0.1)
    with pytest.raises(FloatingPointError, match="loss"):
        scaled(one, optimizer, scaler, bad_loss)


def test_the_scale_survives_a_checkpoint():
    one = model(torch.float32)
    optimizer = make_optimizer(one.parameters(), 0.1)
    scaler = make_scaler(torch.float16, torch.device("cpu"))
    for objective in (bad_gradient, squares, squares, bad_gradient, squares):
        scaled(one, optimizer, scaler, objective)
    again = make_scaler(torch.float16, torch.device("cpu"))
    again.load_state_dict(scaler.state_dict())
    assert again.get_scale() == scaler.get_scale() == 65536 / 4
    assert again.state_dict() == scaler.state_dict()


# -- a real policy


@pytest.fixture(scope="module")
def four_pairs(tiny_model, tiny_rows):
    """Four encoded pairs with their reference log-probs computed, in float64."""
    policy = Policy.from_pretrained(tiny_model, dtype=torch.float64)
    encoded = list(encode_pairs(load_preferences(tiny_rows[:4]), policy.tokenizer, max_length=128))
    assert len({len(r) for item in encoded for r in item.responses}) > 2
    return encoded


def micro_batches(policy, encoded, sizes):
    out, start = [], 0
    for size in sizes:
        (batch,) = pack(encoded[start : start + size], max_tokens=10_000)
        with policy.reference(), torch.no_grad():
            out.append(replace(batch, ref_logprobs=policy(batch).float()))
        start += size
    return out


# An adapter's A and B are float32 whatever the model is: the last bit of the largest is 6e-8.
@pytest.mark.parametrize(
    ("lora", "bound"), [(LoraConfig(r=4), 6e-8), (None, 1e-12)], ids=["lora", "full"]
)
def test_a_policy_ends_up_the_same_however_its_pairs_were_split(
    tiny_model, four_pairs, lora, bound
):
    ends = []
    for sizes in SPLITS[:4]:
        torch.manual_seed(0)
        policy = Policy.from_pretrained(tiny_model, lora=lora, dtype=torch.float64)
        batches = micro_batches(policy, four_pairs, sizes)
        parameters = [p for _, p in policy.trainable()]
        optimizer = torch.optim.SGD(parameters, 0.5, momentum=0.9)
        for _ in range(3):
            stats = optimizer_step(policy, DPO(beta=0.5), batches, optimizer, max_norm=1.0)
        assert stats.count == 4 and stats.loss < 0.69
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=bound)
