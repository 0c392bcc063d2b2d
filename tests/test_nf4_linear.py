"""The 4-bit linear layer against the dense one and bitsandbytes'; what it keeps; what moves it."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from prefopt import InputError
from prefopt.nn import nf4_linear
from prefopt.nn.nf4 import dequantize_nf4, quantize_nf4
from prefopt.nn.nf4_linear import NF4Linear, dense_weight, frozen_tensors

OPTIONS = [{}, {"double": False}, {"kind": "fp4"}, {"search": "signed"}]


def dense(out=96, width=128, dtype=torch.float32, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(width, out, bias=bias).to(dtype)


def rows(*shape, dtype=torch.float32, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def forward_and_dx(layer, x, grad):
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad


# The numbers


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("width", [128, 96, 33])
def test_it_is_the_dense_layer_of_its_weight(width, options):
    layer = NF4Linear.from_linear(dense(width=width), **options)
    W = layer.dequantize(torch.float64)
    x, g = rows(3, 5, width), rows(3, 5, 96, seed=2).detach()
    y, dx = forward_and_dx(layer, x, g)
    exact = F.linear(x.double(), W, layer.bias.double())
    exact_dx = g.double() @ W
    assert y.shape == (3, 5, 96) and dx.shape == x.shape
    assert (y - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert (dx - exact_dx).abs().max() <= 1e-6 * exact_dx.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_has_the_bits_of_the_dense_layer(dtype):
    base = dense(dtype=dtype)
    layer = NF4Linear.from_linear(base)
    base.weight.data = layer.dequantize()
    x, g = rows(7, 128, dtype=dtype), rows(7, 96, dtype=dtype, seed=2).detach()
    for ours, theirs in zip(forward_and_dx(layer, x, g), forward_and_dx(base, x, g), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    layer = NF4Linear.from_linear(dense(8, 64, bias=bias))
    assert torch.autograd.gradcheck(layer, (rows(2, 3, 64, dtype=torch.float64),))


def test_a_bias_that_is_set_free_gets_its_gradient():
    layer = NF4Linear.from_linear(dense(dtype=torch.bfloat16))
    layer.bias.requires_grad_(True)
    layer(rows(5, 128)).sum().backward()
    assert layer.bias.grad.dtype == torch.bfloat16 and bool((layer.bias.grad == 5).all())


@pytest.mark.parametrize("double", [True, False])
def test_the_bits_of_bitsandbytes_in_training(double):
    bnb = pytest.importorskip("bitsandbytes")
    base = dense(dtype=torch.bfloat16)
    theirs = bnb.nn.Linear4bit(
        128, 96, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type="nf4"
    )
    theirs.weight = bnb.nn.Params4bit(
        base.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    theirs.bias = nn.Parameter(base.bias.data.clone())
    theirs = theirs.to("cpu").train()  # in eval mode it repacks its weight and loses gradients
    ours = NF4Linear.from_linear(base, double=double, rounding="bnb_cpu")
    for m in (1, 40):
        x, g = rows(m, 128, dtype=torch.bfloat16), rows(m, 96, dtype=torch.bfloat16).detach()
        for mine, other in zip(
            forward_and_dx(ours, x, g), forward_and_dx(theirs, x, g), strict=True
        ):
            assert torch.equal(mine, other)


def test_evaluation_between_leaves_training_and_the_weight_as_they_were():
    layer = NF4Linear.from_linear(dense(dtype=torch.bfloat16))
    x, g = rows(40, 128, dtype=torch.bfloat16), rows(40, 96, dtype=torch.bfloat16).detach()
    before, state = forward_and_dx(layer, x, g), copy.deepcopy(layer.state_dict())
    for mode in (torch.no_grad, torch.inference_mode):
        layer.eval()
        with mode():
            assert torch.equal(layer(x), before[0])
        layer.train()
        for old, new in zip(before, forward_and_dx(layer, x, g), strict=True):
            assert torch.equal(old, new)
    assert all(torch.equal(t, state[k]) for k, t in layer.state_dict().items())


@pytest.mark.parametrize("shape", [(128,), (0, 128), (2, 0, 128), (1, 128)])
def test_rows_of_any_number(shape):
    layer = NF4Linear.from_linear(dense())
    x = rows(*shape)
    y = layer(x)
    y.sum().backward()
    want = F.linear(x.detach(), layer.dequantize(), layer.bias)
    assert y.shape == want.shape and torch.allclose(y, want, atol=1e-6)
    assert x.grad.shape == shape


def test_the_output_may_be_changed_in_place():
    layer = NF4Linear.from_linear(dense())
    x = rows(5, 128)
    (layer(x).mul_(2)).sum().backward()
    assert torch.allclose(x.grad, 2 * layer.dequantize().sum(0).expand(5, -1), atol=1e-5)


def test_a_wrong_width_is_an_error():
    with pytest.raises(RuntimeError, match=r"x is \[3, 64\], but the layer takes 128"):
        NF4Linear.from_linear(dense())(rows(3, 64))


def test_autocast():
    layer = NF4Linear.from_linear(dense())
    x = rows(6, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    W, b = layer.dequantize(torch.bfloat16), layer.bias.bfloat16()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert torch.equal(y, F.linear(x.detach().bfloat16(), W, b))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.detach().double()).dtype == torch.float64


# What is kept


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_is_kept_for_backward_but_references_to_the_packed_weight(options):
    layer = NF4Linear.from_linear(dense(), **options)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(rows(50, 128))
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in frozen_tensors(layer)}
        assert all(t.dtype == torch.uint8 for t in kept)
        kept.clear()
        layer(rows(50, 128).detach())
        assert not kept


def test_the_dense_weight_stands_in_one_place_that_never_escapes():
    small, large = NF4Linear.from_linear(dense(8, 64)), NF4Linear.from_linear(dense())
    first = dense_weight(large, frozen_tensors(large), torch.float32)
    y = large(rows(4, 128))
    kept = y.detach().clone()
    second = dense_weight(small, frozen_tensors(small), torch.bfloat16)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second, small.dequantize(torch.bfloat16))
    third = dense_weight(large, frozen_tensors(large), torch.float32)
    assert third.data_ptr() == first.data_ptr() and torch.equal(third, large.dequantize())
    assert torch.equal(y, kept)
    assert large.dequantize().data_ptr() != third.data_ptr()


def test_every_thread_has_a_place_of_its_own():
    layers = [NF4Linear.from_linear(dense(96, 128)) for _ in range(2)]
    layers[1].weight.data = layers[1].weight.data.flip(0)
    x = rows(16, 128).detach()
    want = [layer(x) for layer in layers]
    wrong = []

    def work(layer, y):
        wrong.extend(1 for _ in range(200) if not torch.equal(layer(x), y))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(layers, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_taken_in_inference_mode_serves_training():
    nf4_linear._of_thread.__dict__.clear()
    layer = NF4Linear.from_linear(dense())
    x = rows(2, 128, dtype=torch.float64)  # decoded by torch, which minds
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()


def test_gradient_checkpointing_changes_nothing():
    layers = nn.Sequential(*(NF4Linear.from_linear(dense(128, 128)) for _ in range(3)))
    g = rows(5, 128, seed=3).detach()
    plain = forward_and_dx(layers, rows(5, 128), g)
    again = forward_and_dx(lambda x: checkpoint(layers, x, use_reentrant=False), rows(5, 128), g)
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("make", [dense, lambda: NF4Linear.from_linear(dense())])
def test_frozen_tensors_and_dense_weight(make):
    layer = make()
    W = dense_weight(layer, frozen_tensors(layer), torch.float64)
    assert W.shape == (96, 128) and W.dtype == torch.float64 and not W.requires_grad
    same = layer.weight if isinstance(layer, nn.Linear) else layer.dequantize()
    assert torch.equal(W, same.double())


# What is stored


@pytest.mark.parametrize(
    "width, options, shapes",
    [
        (128, {}, [(96, 64), (96, 2), (8,)]),
        (128, {"double": False}, [(96, 64), (96, 8)]),
        (128, {"block": 32, "double": False}, [(96, 64), (96, 16)]),
        (96, {}, [(96 * 48, 1), (144, 1), (8,)]),
        (33, {"double": False}, [(1584, 1), (200, 1)]),
    ],
)
def test_everything_is_bytes(width, options, shapes):
    layer = NF4Linear.from_linear(dense(width=width), **options)
    tensors = frozen_tensors(layer)
    assert [tuple(t.shape) for t in tensors] == shapes
    assert all(t.dtype == torch.uint8 and not t.requires_grad for t in tensors)
    assert not any(p.requires_grad for p in layer.parameters())
    nested = [] if options.get("double") is False else ["nested"]
    assert list(layer.state_dict()) == ["weight", "scales", "bias", *nested]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("width", [128, 33])
def test_packed_is_a_view_of_what_was_quantised(width, options):
    base = dense(width=width, dtype=torch.bfloat16)
    p = quantize_nf4(base.weight, **options)
    layer = NF4Linear(p, base.bias)
    for name, mine in layer.packed()._asdict().items():
        theirs = getattr(p, name)
        assert torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs, name
    assert layer.packed().codes.data_ptr() == layer.weight.data_ptr() == p.codes.data_ptr()
    assert torch.equal(layer.dequantize(), dequantize_nf4(p))
    assert layer.dequantize().dtype == torch.bfloat16
    assert "in_features" in repr(layer) and f"double={p.nested is not None}" in repr(layer)


@pytest.mark.parametrize(
    "move",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.float,
        nn.Module.double,
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.requires_grad_(False),
    ],
)
def test_no_cast_or_copy_changes_a_byte(move):
    for options in ({}, {"double": False}):
        layer = NF4Linear.from_linear(dense(dtype=torch.bfloat16), **options)
        before = [t.clone() for t in frozen_tensors(layer)]
        moved = move(nn.Sequential(layer))[0]
        assert all(map(torch.equal, frozen_tensors(moved), before))
        assert torch.equal(moved.dequantize(), layer.dequantize())
        assert moved.dequantize().dtype == torch.bfloat16
    assert nn.Linear(2, 2).double().bias.dtype == NF4Linear.from_linear(dense()).double().bias.dtype


def test_the_state_dict_round_trip():
    layer, other = NF4Linear.from_linear(dense()), NF4Linear.from_linear(dense())
    for t in other.state_dict().values():
        t.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize())
    with pytest.raises(RuntimeError, match=r"nested|scales"):
        NF4Linear.from_linear(dense(), double=False).load_state_dict(layer.state_dict())


def test_conv1d_is_refused():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(96, 128)
    with pytest.raises(InputError, match=r"class Conv1D cannot be quantised .* \[out, in\]"):
        NF4Linear.from_linear(layer)
    W = dense_weight(layer, frozen_tensors(layer), torch.float64)
    assert torch.equal(W, layer.weight.double()) and W.shape == (128, 96)


def test_what_does_not_fit_is_refused():
    p = quantize_nf4(torch.ones(4, 64))
    with pytest.raises(InputError, match=r"bias \[out\], not \[4, 64\] and \[3\]"):
        NF4Linear(p, torch.ones(3))
    with pytest.raises(InputError, match=r"not \[256\] and None"):
        NF4Linear(quantize_nf4(torch.ones(256)))


# Devices


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_has_the_bits_of_the_dense_layer(dtype, options):
    base = dense(dtype=dtype)
    layer = NF4Linear.from_linear(base, **options).cuda()
    base.weight.data = NF4Linear.from_linear(base, **options).dequantize()
    x, g = rows(7, 128, dtype=dtype), rows(7, 96, dtype=dtype, seed=2).detach()
    ours = forward_and_dx(layer, x.cuda(), g.cuda())
    for mine, other in zip(ours, forward_and_dx(base.cuda(), x.cuda(), g.cuda()), strict=True):
        assert torch.equal(mine, other)


# FSDP2


def test_sharded_over_two_processes_it_has_the_same_bits(tmp_path):
    """Uneven rows, both formats, with and without a mixed-precision policy."""
    root = Path(__file__).resolve().parents[1]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), (tmp_path / "store").as_uri()],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    assert all(output.endswith("equal\n") for output in outputs), "\n".join(outputs)


_RANK = """
import copy, os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from prefopt.nn.nf4_linear import NF4Linear

torch.set_num_threads(1)
rank, store = sys.argv[1:]
dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=2)
mesh = torch.distributed.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
for dtype in (None, torch.bfloat16):
    for options in ({}, {"double": False}):
        sizes = [(128, 65), (65, 128), (128, 33)]  # rows that two processes do not share evenly
        plain = nn.Sequential(*(
            NF4Linear.from_linear(nn.Linear(*size), **options) for size in sizes
        ))
        plain.append(nn.Linear(33, 4))  # something to train
        sharded = copy.deepcopy(plain)
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        for layer in (*sharded, sharded):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        assert sharded[0].weight.to_local().numel() < plain[0].weight.numel()
        if dtype is not None:
            for layer in plain:
                layer.bias.data = layer.bias.data.to(dtype)
            plain[-1].to(dtype)
        for step in range(2):
            x = torch.randn(6, 128, dtype=dtype).requires_grad_()
            z = x.detach().clone().requires_grad_()
            y, w = plain(x), sharded(z)
            assert torch.equal(y, w)
            y.square().sum().backward()
            w.square().sum().backward()
            assert torch.equal(x.grad, z.grad)
        for mine, whole in zip(sharded[0].parameters(), plain[0].parameters()):
            assert mine.dtype != torch.uint8 or torch.equal(mine.full_tensor(), whole)
print("equal", flush=True)
try:
    dist.barrier()
finally:
    os._exit(0)  # torch's own threads sometimes abort a process that is torn down in order
"""
