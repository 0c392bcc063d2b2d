"""What quantising a model did, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prefopt.nn.nf4 import Packed4, dequantize_nf4

_PIECE = 1 << 18  # elements compared at a time; many more on a GPU


@dataclass(frozen=True)
class QuantLayer:
    """One quantised weight W: what it takes now, and ||W' - W|| / ||W||."""

    name: str
    parameters: int
    bytes: int
    error: float
    double: bool


@dataclass
class QuantReport:
    """What quantize_model did. Bytes are those of all the model's tensors."""

    kind: str
    double: bool
    before: int
    after: int = 0
    layers: list[QuantLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # name -> reason

    @property
    def bytes_per_parameter(self) -> float:
        """Of the quantised weights."""
        return sum(x.bytes for x in self.layers) / sum(x.parameters for x in self.layers)

    @property
    def fallbacks(self) -> list[str]:
        """Layers whose scales are not quantised although that was asked for: it would hurt them."""
        return [x.name for x in self.layers if self.double and not x.double]

    def lines(self) -> list[str]:
        """The report for people."""
        worst = max(self.layers, key=lambda x: x.error)
        mean = sum(x.error for x in self.layers) / len(self.layers)
        total = sum(x.parameters for x in self.layers)
        lines = [
            f"{len(self.layers)} linear layers, {total:,} weights, in {self.kind}: "
            f"{self.bytes_per_parameter:.4f} bytes a weight",
            f"model: {_megabytes(self.before)} before, {_megabytes(self.after)} after",
            f"relative error {mean:.4f} on average, {worst.error:.4f} at worst ({worst.name})",
        ]
        if self.fallbacks:
            lines.append(
                f"float32 scales, as 8-bit ones would hurt: {', '.join(_few(self.fallbacks))}"
            )
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        return lines + [f"left as it is: {', '.join(_few(n))}: {r}" for r, n in reasons.items()]


def measured(name: str, weight: Tensor, packed: Packed4) -> QuantLayer:
    back = dequantize_nf4(packed).view(-1)
    error = power = torch.zeros((), dtype=torch.float64, device=back.device)
    flat = weight.to(back.device).reshape(-1)
    piece = _PIECE if back.device.type == "cpu" else _PIECE << 6
    for w, b in zip(flat.split(piece), back.split(piece), strict=True):
        w = w.float()
        error = error + (b.float() - w).square_().sum(dtype=torch.float64)
        power = power + w.square_().sum(dtype=torch.float64)
    relative = (error / power).sqrt().item() if power > 0 else 0.0
    tensors = (packed.codes, packed.scales, packed.nested, packed.offset)
    size = sum(t.nbytes for t in tensors if t is not None)
    return QuantLayer(name, flat.numel(), size, relative, packed.nested is not None)


def total_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _few(names: list[str]) -> list[str]:
    return names if len(names) <= 4 else [*names[:3], f"and {len(names) - 3} more"]
