"""LoRA (Hu et al. 2021, arXiv 2106.09685) on an embedding: y = W[ids] + s A^T[ids] B^T.

W [vocabulary, dim] frozen, A [r, vocabulary] = 0 and B [dim, r] from N(0, 1), float32 masters
(B is the full one, since a column of A is trained by its token alone).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.nn.adapted import Adapted, Masters
from prefopt.nn.lora_config import LoraConfig


class LoraEmbedding(Adapted):
    """A frozen nn.Embedding and its adapters. With A = 0: bitwise the base."""

    def __init__(self, base: nn.Embedding, active: str | None = None) -> None:
        super().__init__(base, active)
        self.A, self.B = Masters(), Masters()

    def add(self, name: str, config: LoraConfig, path: str = "") -> None:
        """Adds adapter `name`: random numbers are those of torch's CPU generator everywhere."""
        (vocabulary, dim), device = self.base.weight.shape, self.base.weight.device
        r = config.rank(path)
        B = torch.empty(dim, r, dtype=torch.float32, device="cpu").normal_()
        A = torch.zeros(r, vocabulary, dtype=torch.float32, device=device)
        self.A.put(name, A, trainable=True)
        self.B.put(name, B.to(device), trainable=True)
        self.configs[name], self.scaling[name] = config, config.scale(path)

    def parts(self, name: str) -> dict[str, nn.Parameter]:
        return {"A": self.A[name], "B": self.B[name]}

    def is_zero(self, name: str) -> bool:
        return not (self.A[name].any() and self.B[name].any())

    @torch.no_grad()
    def delta(self, name: str) -> Tensor:
        """s (B A)^T in float32, [vocabulary, dim]."""
        return (self.A[name].t() @ self.B[name].t()).mul_(self.scaling[name])

    @torch.no_grad()
    def merged_weight(self, name: str) -> Tensor:
        """W + s (B A)^T in float32, [vocabulary, dim]."""
        W = self.base.weight
        return W.to(torch.promote_types(W.dtype, torch.float32)) + self.delta(name)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., dim]"""
        name, y = self.on, self.base(ids)
        if name is None:
            return y
        self.refuse_trainable_base()
        # As in nn.Embedding, padding trains nothing.
        h = F.embedding(ids, self.A[name].t(), padding_idx=self.base.padding_idx).to(y.dtype)
        scale = self.scaling[name] * embed_scale(self.base)
        return y.add(h @ self.B[name].to(y.dtype).t(), alpha=scale)


def embed_scale(base: nn.Module) -> float:
    """What an embedding multiplies its rows by (Gemma: sqrt(dim), rounded to the model's dtype)."""
    scale = getattr(base, "embed_scale", 1.0)
    return float(scale)


def why_not_embedding(module: nn.Module) -> str | None:
    """None for an embedding that can be adapted, else the reason."""
    kind = type(module).__name__
    if not isinstance(module, nn.Embedding):
        return f"a module of class {kind} is not an embedding"
    if module.max_norm is not None:
        return "it shrinks its own rows (max_norm)"
    if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
        return f"how a module of class {kind} computes is not known"
    if not module.weight.is_floating_point():
        return f"its weight is quantised ({kind})"
    return None
