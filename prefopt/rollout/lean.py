"""The forward of Llama and its kin (Mistral, Qwen 2 and 3, SmolLM 2) in few operations.

Writing one token takes a small model less time than Python takes to walk through its modules. Here
q, k, v are one product and gate and up another, adapters are merged and 4-bit weights unpacked for
as long as responses are written, and rotations are looked up. Float32 only: in 16 bits merged
weights would round a young adapter away. Whether this computes what the model computes is tried
out; a model for which it does not, or whose weights are too large to hold twice, goes through its
modules.

Shapes: T tokens, D hidden size, H query heads, G key/value heads, d head size, I inner size.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt import dispatch
from prefopt.nn import heads
from prefopt.nn.adapted import Adapted
from prefopt.nn.lora_linear import LoraLinear
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.rollout.slots import Slots, Step, slot_attention

MOST_BYTES = 4 << 30  # of merged weights
# Weights below this go through MKL, whose products start faster than oneDNN's. The number of rows
# has no say: both give a row the same bits among any number of others from 4 on.
SMALL = 1 << 16
PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
# What each layer asks attention for, by model and by what is active in it; None: not for this one.
_tried: weakref.WeakKeyDictionary[Any, dict[Any, list[dict[str, Any]] | None]] = (
    weakref.WeakKeyDictionary()
)


class Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.numel() < SMALL:
            return F.linear(x, self.weight, self.bias)
        return dispatch.mm_nt(x, self.weight, self.bias)

    def added_to(self, total: Tensor, x: Tensor) -> Tensor:
        """total + W x + b; may change total."""
        if self.bias is None and self.weight.numel() < SMALL:
            return total.addmm_(x, self.weight.t())
        return total.add_(self(x))


class Norm(NamedTuple):
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Layer(NamedTuple):
    before_attention: Norm
    qkv: Linear  # [(H + 2 G) d, D]
    q_norm: Norm | None
    k_norm: Norm | None
    o: Linear
    before_mlp: Norm
    gate_up: Linear  # [2 I, D]
    down: Linear
    heads: int
    groups: int


class Lean:
    """A model's weights as they are now, and the forward on them."""

    def __init__(self, backbone: Any, places: int):
        self.embed, self.norm = backbone.embed_tokens, _norm(backbone.norm)
        self.layers = [_layer(layer) for layer in backbone.layers]
        self.asked: list[dict[str, Any]] = [{} for _ in self.layers]  # scaling and sliding window
        weight = self.norm.weight
        at = torch.arange(places, device=weight.device)[None]
        cos, sin = backbone.rotary_emb(weight, at)  # [1, places, d], the two halves alike
        half = sin.shape[-1] // 2
        self.cos = cos[0, :, None].contiguous()
        self.sin = torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], -1)

    def __call__(self, ids: Tensor, places: Tensor, step: Step) -> Tensor:
        """ids, places [T] -> last hidden states [T, D]."""
        x = self.embed(ids)
        cos, sin = self.cos.index_select(0, places), self.sin.index_select(0, places)
        for layer, asked in zip(self.layers, self.asked, strict=True):
            x = layer.o.added_to(x, self._attention(layer, x, cos, sin, step, asked))
            inner = layer.gate_up(layer.before_mlp(x))
            half = inner.shape[1] // 2
            x = layer.down.added_to(x, F.silu(inner[:, :half]).mul_(inner[:, half:]))
        return self.norm(x)

    def _attention(self, layer: Layer, x, cos: Tensor, sin: Tensor, step: Step, asked) -> Tensor:
        """[T, H d]"""
        tokens, both = len(x), layer.heads + layer.groups
        qkv = layer.qkv(layer.before_attention(x)).view(tokens, both + layer.groups, -1)
        qk = qkv[:, :both]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = [layer.q_norm(qk[:, : layer.heads]), layer.k_norm(qk[:, layer.heads :])]
            qk = torch.cat(qk, 1)
        qk = (qk * cos).addcmul_(qk.roll(cos.shape[-1] // 2, -1), sin)  # the rotation
        q, k, v = (
            part.transpose(0, 1)[None]
            for part in (qk[:, : layer.heads], qk[:, layer.heads :], qkv[:, both:])
        )
        out, _ = slot_attention(self.embed, q, k, v, None, slots=step, **asked)
        return out.view(tokens, -1)


def lean(policy: Any, places: int) -> Lean | None:
    """The lean forward of ``policy``, for positions below ``places``, or None."""
    backbone = heads.backbone(policy.model)
    if not _fits(policy, backbone):
        return None
    found = Lean(backbone, max(places, 16))
    on = [module.on for module in backbone.modules() if isinstance(module, Adapted)]
    known = _tried.setdefault(policy.model, {})
    key = (policy.dtype, tuple(dict.fromkeys(on)))
    if key not in known:
        known[key] = _try(policy, backbone, found)
    asked = known[key]
    if asked is None:
        return None
    found.asked = asked
    return found


@torch.no_grad()
def _try(policy: Any, backbone: Any, found: Lean) -> list[dict[str, Any]] | None:
    """What the layers ask attention for, if the lean forward agrees with the modules."""
    ids = torch.arange(12, device=policy.device) * 7 % policy.model.config.vocab_size
    places = torch.arange(12, device=policy.device)
    step, again = (
        Step(Slots(1), np.zeros(0, np.int64), [len(ids)], policy.device) for _ in range(2)
    )
    out = backbone(ids[None], position_ids=places[None], slots=step, use_cache=False)
    wanted = out.last_hidden_state[0]
    if len(step.asked) != len(found.layers) or any(asked["softcap"] for asked in step.asked):
        return None
    found.asked = step.asked
    difference = (found(ids, places, again) - wanted).norm()
    return step.asked if difference <= 1e-4 * wanted.norm() else None


def _fits(policy: Any, backbone: Any) -> bool:
    """Whether the model has the parts of Llama, in float32, and few enough weights."""
    if policy.dtype != torch.float32 or policy.autocast is not None:
        return False
    if not all(hasattr(backbone, name) for name in ("embed_tokens", "layers", "norm")):
        return False
    rotary = getattr(backbone, "rotary_emb", None)
    if getattr(rotary, "rope_type", "dynamic") not in ("default", "linear", "llama3", "yarn"):
        return False
    if not _is_norm(backbone.norm) or not all(_is_llamas(layer) for layer in backbone.layers):
        return False
    linears = (m for m in backbone.modules() if isinstance(m, nn.Linear | NF4Linear))
    return 4 * sum(m.in_features * m.out_features for m in linears) <= MOST_BYTES


def _is_llamas(layer: nn.Module) -> bool:
    names = ("input_layernorm", "post_attention_layernorm")
    if not all(_is_norm(getattr(layer, name, None)) for name in names):
        return False
    for part, projections in PROJECTIONS.items():
        inner = getattr(layer, part, None)
        linears = [getattr(inner, name, None) for name in projections]
        if not all(isinstance(m, nn.Linear | NF4Linear | LoraLinear) for m in linears):
            return False
    attention = layer.get_submodule("self_attn")
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return norms == [None, None] or all(_is_norm(norm) for norm in norms)


def _is_norm(module: Any) -> bool:
    return not isinstance(module, Adapted) and hasattr(module, "variance_epsilon")


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    size = attention.head_dim
    q, k, v, o = (_linear(getattr(attention, name)) for name in PROJECTIONS["self_attn"])
    gate, up, down = (_linear(getattr(mlp, name)) for name in PROJECTIONS["mlp"])
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Layer(
        _norm(layer.input_layernorm),
        _stacked(q, k, v),
        None if q_norm is None else _norm(q_norm),
        None if k_norm is None else _norm(k_norm),
        o,
        _norm(layer.post_attention_layernorm),
        _stacked(gate, up),
        down,
        len(q.weight) // size,
        len(k.weight) // size,
    )


def _linear(module: Any) -> Linear:
    """Weight and bias of a linear layer, with what its active adapter adds."""
    if not isinstance(module, LoraLinear):
        return Linear(heads.weight_of(module).float(), module.bias)
    if module.on is None:
        return _linear(module.base)
    return Linear(module.merged_weight(module.on), module.base.bias)


def _stacked(*parts: Linear) -> Linear:
    weight = torch.cat([part.weight for part in parts])
    if all(part.bias is None for part in parts):
        return Linear(weight, None)
    given = [weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts]
    return Linear(weight, torch.cat(given))
