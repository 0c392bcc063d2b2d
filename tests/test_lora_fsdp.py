"""LoRA on a 4-bit base under FSDP2: two processes compute what one does, bit for bit."""

import os
import socket
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_equal_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join([ROOT, os.path.join(ROOT, "kernels")]),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK], env=shared | {"RANK": rank}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=120)
            assert rank.returncode == 0 and output.endswith("equal\n"), output
    finally:
        for rank in ranks:
            rank.kill()


_RANK = """
import contextlib, copy, os, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.nn.lora import LoraConfig, add_lora, lora_parameters

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = torch.distributed.init_device_mesh("cpu", (2,))
sizes = [(128, 65), (65, 128), (128, 64)]  # rows that two processes do not share evenly
for dtype, config in [
    (torch.float32, {"use_dora": True}),
    (torch.bfloat16, {"use_dora": True, "init": "pissa"}),
    (torch.bfloat16, {"modules_to_save": ["3"]}),
]:
    torch.manual_seed(0)
    linears = [nn.Linear(*size).to(dtype) for size in sizes]
    plain = nn.Sequential(*map(NF4Linear.from_linear, linears), nn.Linear(64, 4).to(dtype))
    add_lora(plain, LoraConfig(r=4, targets=["0", "1", "2"], **config))
    with torch.no_grad():
        for _, p in lora_parameters(plain):
            p.add_(0.1 * torch.randn(p.shape))
    sharded = copy.deepcopy(plain)
    for layer in (*sharded, sharded):
        fully_shard(layer, mesh=mesh)
    pairs = [
        (p, q) for (_, p), (_, q) in zip(lora_parameters(plain), lora_parameters(sharded))
    ]
    assert all(q.to_local().numel() < p.numel() for p, q in pairs)
    optimizers = [torch.optim.AdamW(group, lr=1e-2) for group in zip(*pairs)]
    for step in range(2):
        x = torch.randn(6, 128, dtype=dtype)
        y, z = plain(x), sharded(x)
        assert torch.equal(y, z)
        y.float().square().sum().backward()
        z.float().square().sum().backward()
        for p, q in pairs:
            assert torch.equal(p.grad, q.grad.full_tensor()) and p.grad.any()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, q in pairs:
        assert torch.equal(p, q.full_tensor()) and q.dtype == torch.float32
print("equal", flush=True)
with contextlib.suppress(RuntimeError):  # the other may be gone
    dist.barrier()
os._exit(0)  # an orderly end is a race between gloo's threads, which may abort or hang
"""
