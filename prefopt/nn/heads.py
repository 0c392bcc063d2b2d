"""Output heads: hidden states to words, or to the one score of a reward model.

Shapes: N or R hidden rows of size D, V words.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.durable import write_json
from prefopt.errors import InputError
from prefopt.logprobs import token_logprobs
from prefopt.nn.adapted import Adapted
from prefopt.nn.lora_config import LoraConfig, name_matches
from prefopt.nn.lora_linear import LoraLinear
from prefopt.nn.nf4_linear import NF4Linear

LM, SCORE = "lm", "score"  # kinds of heads; SCORE is the module's name too
STATS = "score_stats.json"


def backbone(model: Any) -> Any:
    """The model without its output head (Llama 4's is not where its class says)."""
    return getattr(model, "model", model) if model.base_model is model else model.base_model


def weight_of(head: Any) -> Tensor:
    """The output head's weight [V, D], dequantised where it is 4-bit."""
    return head.dequantize() if isinstance(head, NF4Linear) else head.weight


def project(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) whose product is the logits. An adapter on the head is so many columns
    more, [h, s h A^T] [W, B]^T: in 16 bits W + s B A would round a young adapter away. Without the
    adapter they are 0, so that policy and reference go through the same product."""
    head = model.get_output_embeddings()
    if not isinstance(head, LoraLinear) or head.merged:
        head = head.base if isinstance(head, LoraLinear) else head
        return hidden, weight_of(head), head.bias
    name = head.on or head.names[0]
    A, B = head.factors(name)
    dropped = nn.functional.dropout(
        hidden, head.configs[name].dropout, head.training and name == head.on
    )
    low = dropped @ A.to(hidden).t() * (head.scaling[name] if name == head.on else 0.0)
    weight = weight_of(head.base)
    weight = torch.cat([weight, B.to(weight)], 1)
    return torch.cat([hidden, low], 1), weight, head.bias


def word_logprobs(
    model: Any,
    hidden: Tensor,
    targets: Tensor,
    options: dict[str, Any],
    collisions: bool = False,
    entropy: bool = False,
) -> tuple[Tensor, ...]:
    """hidden [N, D], targets [N] -> (log p(target) [N]; with `entropy` that of p [N]; with
    `collisions` log sum_v p(v)^2 [N] without gradient); options: of `token_logprobs`."""
    hidden, weight, bias = project(model, hidden)
    options = {"bias": bias, "temperature": 1.0, **options}
    found: Any = token_logprobs(hidden, weight, targets, entropy=entropy, **options)
    columns = found if entropy else (found,)
    if not collisions:
        return columns
    # log sum p^2 = lse(2 z) - 2 lse(z), and at half the temperature log p(y) = 2 z_y - lse(2 z)
    options["temperature"] /= 2
    with torch.no_grad():
        sharp: Any = token_logprobs(hidden, weight, targets, **options)
        return *columns, 2 * columns[0] - sharp


def log_rest(model: Any, hidden: Tensor, ids: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    """log(1 - sum of p(v) over `ids`) at hidden [N, D], [N]; options as in `word_logprobs`."""
    hidden, weight, bias = project(model, hidden)
    columns: Any = [
        token_logprobs(hidden, weight, torch.full_like(hidden[:, 0], v, dtype=torch.int64),
                       bias=bias, **options)
        for v in ids
    ]  # fmt: skip
    logps = torch.stack(columns).sort(0, descending=True).values
    # 1 - p of the likeliest by expm1, because log p keeps its digits where p is nearly 1.
    return (-logps[0].expm1() - logps[1:].exp().sum(0)).log()


@torch.no_grad()
def head_options(model: Any) -> dict[str, Any]:
    """Softcap and scale between hidden states and logits, checked against the model's logits."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    options: dict[str, Any] = {}
    for name in ("final_logit_softcapping", "logits_soft_cap"):  # Gemma, RecurrentGemma
        if getattr(config, name, None):
            options["softcap"] = getattr(config, name)
    if getattr(config, "logit_scale", None):  # Cohere
        options["scale"] = config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        options["scale"] = 1 / config.logits_scaling
    device = next(model.parameters()).device
    ids = torch.arange(3, 10, device=device)[None] % config.vocab_size
    targets = torch.arange(6, device=device)

    weight = weight_of(head)
    dtype = torch.promote_types(weight.dtype, torch.float32)

    def logprobs(tokens: int) -> Tensor:
        logits = model(ids[:, :tokens], use_cache=False).logits[0, :6]
        return logits.to(dtype).log_softmax(-1)[targets, targets]

    want, bound = logprobs(7), _bound(weight.dtype)
    hidden = backbone(model)(ids[:, :6], use_cache=False)[0][0]
    difference = math.inf
    if hidden.shape[-1] == weight.shape[1]:
        got = token_logprobs(hidden, weight, targets, bias=head.bias, **options)
        assert isinstance(got, Tensor)
        difference = (got - want).abs().max().item()
    if difference <= bound:
        return options
    if not (logprobs(6) - want).abs().max().item() <= bound:
        raise InputError(
            f"this {config.model_type} model sees the tokens behind the one it predicts, so it "
            "has no log-probs of a response; use a causal language model"
        )
    raise InputError(
        f"the output head of {config.model_type} does more than a linear layer, a scale and a "
        f"softcap (log-probs differ by {difference:.2g}), so its hidden states cannot be scored"
    )


def _bound(dtype: torch.dtype) -> float:
    return 1e-3 if dtype.itemsize >= 4 else 0.25


# -- the head of a reward model


def with_score(config: LoraConfig) -> LoraConfig:
    """The same adapter, with the score head trained in full beside it."""
    if name_matches(config.modules_to_save, SCORE):
        return config
    return replace(config, modules_to_save=[*config.modules_to_save, SCORE])


def scores(head: nn.Module, hidden: Tensor) -> Tensor:
    """hidden [R, D] -> [R] w . h, in float32 (float64 for float64) whatever is on around it."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(torch.promote_types(hidden.dtype, torch.float32))).squeeze(-1)


def widen_score(model: Any) -> None:
    """The score head in float32: at a sum of D products 16 bits would cost two digits."""
    model.score.to(torch.promote_types(model.score.weight.dtype, torch.float32))


@torch.no_grad()
def draw_score(model: Any) -> None:
    """A fresh head: w ~ N(0, 1 / (d + 1)), from torch's generator, so that a normalised hidden
    state scores about N(0, 1) (Stiennon et al. 2020, arXiv 2009.01325, whose text has 1 / (d + 1)
    for the standard deviation, not for its square)."""
    weight = model.score.weight
    weight.copy_(torch.randn(weight.shape) / math.sqrt(weight.shape[1] + 1))


def check_score_head(model: Any) -> None:
    """InputError for a model without the head of a reward model."""
    head, kind, reason = getattr(model, SCORE, None), type(model).__name__, None
    head = head.base if isinstance(head, Adapted) else head
    if not isinstance(head, nn.Linear):
        reason = f"{kind} has no linear layer called 'score'"
    elif head.out_features != 1:
        reason = f"its head has {head.out_features} labels (num_labels in config.json)"
    elif head.bias is not None:
        reason = f"the 'score' of {kind} has a bias"
    if reason is not None:
        raise InputError(
            f"this cannot be a reward model: {reason}; it needs one score without bias, as the "
            "sequence classification models of decoders have it"
        )


@torch.no_grad()
def check_scores(model: Any) -> None:
    """InputError unless transformers' own forward scores the last token that is not padding by
    `scores` of its hidden state."""
    config = model.config.get_text_config()
    device, pad = next(model.parameters()).device, config.pad_token_id
    real = [i % config.vocab_size for i in range(3, 12)]
    real = [i for i in real if i != pad][:7]
    ids = torch.tensor([real, [*real[:4], pad, pad, pad]], device=device)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3], device=device)
    half = model.dtype.itemsize == 2
    with torch.autocast(device.type, model.dtype if half else None, enabled=half):
        want = model(ids, attention_mask=mask, use_cache=False).logits[:, 0].float()
        hidden = backbone(model)(ids, use_cache=False)[0]
        got = scores(model.score, hidden[[0, 1], [6, 3]]).float()
    difference = (got - want).abs().max().item()
    if not difference <= _bound(model.dtype) * max(1.0, want.abs().max().item()):
        raise InputError(
            f"transformers scores a text with {type(model).__name__} in another way than by a "
            f"linear layer on its last token (scores differ by {difference:.2g}); use a causal "
            "sequence classification model"
        )


@dataclass(frozen=True)
class ScoreStats:
    """Mean and standard deviation (of the population) of n scores of reference responses."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Tensor) -> ScoreStats:
        """Of scores [n]; InputError for none."""
        if not len(values):
            raise InputError("there is no score to take statistics of")
        values = values.detach().double()
        return cls(values.mean().item(), values.std(correction=0).item(), len(values))

    @classmethod
    def read(cls, folder: Path) -> ScoreStats | None:
        """Those of a model folder; None where it has none. InputError for a damaged file."""
        file = folder / STATS
        if not file.is_file():
            return None
        try:
            fields = json.loads(file.read_text())
            stats = cls(float(fields["mean"]), float(fields["std"]), int(fields["n"]))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{file} is damaged ({error!r}); remove it") from None
        if not (math.isfinite(stats.mean) and math.isfinite(stats.std) and stats.std >= 0):
            raise InputError(f"{file} has a mean or std that is no number to scale by; remove it")
        return stats

    def write(self, folder: Path) -> None:
        write_json(folder / STATS, asdict(self))

    def apply(self, values: Tensor) -> Tensor:
        """(values - mean) / std; InputError where all reference scores are the same."""
        if self.std == 0:
            raise InputError(f"all {self.n} reference scores are equal: there is no scale in them")
        return (values - self.mean) / self.std
