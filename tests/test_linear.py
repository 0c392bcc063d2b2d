"""CpuLinear is nn.Linear: the same numbers, gradients, parameters and freedoms."""

import copy
import itertools

import pytest
import torch
from torch import nn

from prefopt import dispatch
from prefopt.nn.linear import CpuLinear, use_onednn

pytestmark = pytest.mark.skipif(
    not dispatch.onednn_gemm(), reason="this torch has no float32 GEMM in oneDNN"
)


def layer(bias=True, width=24, out=17):
    torch.manual_seed(0)
    linear = nn.Linear(width, out, bias=bias)
    linear.__class__ = CpuLinear
    return linear


def gradients(f, tensors):
    y = f(*tensors)
    g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    return [y, *torch.autograd.grad((y * g).sum(), wanted)]


SHAPES = [(5,), (1, 5), (2, 3, 4), (0,), ()]
TRAINS = [(x, w, b) for x, w, b in itertools.product([True, False], repeat=3) if x or w]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("train_x, train_w, bias", TRAINS)
def test_equals_linear(shape, train_x, train_w, bias):
    """Every input shape, and every choice of what trains, against float64."""
    linear = layer(bias).requires_grad_(train_w)
    x = torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1)).requires_grad_(train_x)
    tensors = [x, linear.weight, linear.bias]
    exact = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    ]
    got = gradients(lambda *_: linear(x), tensors)
    want = gradients(nn.functional.linear, exact)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


def test_views_as_input_and_upstream_gradient():
    linear, plain = layer(), nn.Linear(24, 17)
    plain.load_state_dict(linear.state_dict())
    x = torch.randn(24, 6, 3)
    results = []
    for module in (linear, plain):
        leaf = x.clone().requires_grad_()
        y = module(leaf.permute(2, 1, 0))
        y.backward(torch.ones(17, 6, 3).permute(2, 1, 0))  # strides that are not those of y
        results.append([y, leaf.grad, module.weight.grad, module.bias.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_result_may_be_changed_in_place():
    """As Llama 4 and Gemma 3n do, and with the gradient of what was computed."""
    linear = layer()
    x = torch.randn(2, 3, 24, requires_grad=True)
    y = linear(x)
    y *= 3
    y.sum().backward()
    torch.testing.assert_close(x.grad, 3 * linear.weight.sum(0).expand(2, 3, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype):
    linear = layer().to(dtype)
    x = torch.randn(4, 24).to(dtype)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_autocast_is_honoured():
    linear, x = layer(), torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16


def test_parameters_and_names_are_those_of_linear():
    linear = layer()
    assert isinstance(linear, nn.Linear) and list(linear.state_dict()) == ["weight", "bias"]
    assert copy.deepcopy(linear)(torch.ones(1, 24)).shape == (1, 17)


def test_use_onednn_takes_what_it_can_serve(monkeypatch):
    class Other(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "one": nn.Linear(2, 2),
            "bf16": nn.Linear(2, 2).bfloat16(),
            "subclass": Other(2, 2),
            "nowhere": nn.Linear(2, 2, device="meta"),
            "nested": nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        }
    )
    assert use_onednn(model) == 2
    kinds = {name: type(module) for name, module in model.items()}
    assert kinds["one"] is CpuLinear is type(model["nested"][0])
    assert kinds["bf16"] is kinds["nowhere"] is nn.Linear and kinds["subclass"] is Other
    assert use_onednn(model) == 0

    monkeypatch.setattr(dispatch, "onednn_gemm", lambda: False)
    assert use_onednn(nn.ModuleList([nn.Linear(2, 2)])) == 0
    x = torch.ones(1, 2)  # a layer that has it already still computes
    expected = nn.functional.linear(x, model["one"].weight, model["one"].bias)
    torch.testing.assert_close(model["one"](x), expected)
