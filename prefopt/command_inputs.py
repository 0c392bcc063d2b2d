"""What commands read: the records of --data and the model of --model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefopt.errors import InputError
from prefopt.nn.lora_config import LoraConfig
from prefopt.terminal import say

if TYPE_CHECKING:
    from prefopt.policy import Policy

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["nf4", "fp4", "none"]


def records(
    load: Callable[..., Any],
    data: str,
    split: str | None,
    columns: dict[str, str | None] | None,
    *,
    quiet: bool = False,
    **options: Any,
) -> Any:
    """What ``load`` (`load_preferences` or another) makes of --data, with its report printed."""
    if data == "embedded":
        result = load(embedded_rows(split), columns=columns, **options)
        result.report.source = "embedded"
    else:
        result = load(data, split=split, columns=columns, **options)
    for line in () if quiet else result.report.lines():
        say(line)
    return result


def embedded_rows(split: str | None) -> list[dict[str, Any]]:
    """The preference data in the package, all of it or one of its splits."""
    import gzip

    from prefopt.loading import EMBEDDED

    with gzip.open(EMBEDDED / "preferences.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if split is None or row.get("split") == split]


def load_policy(
    model: str,
    lora: LoraConfig | None,
    dtype: str,
    device: str,
    quantize: str | None = None,
    head: str | None = None,
) -> Policy:
    """--model with a fresh adapter, or with its own where --model is an adapter already."""
    from prefopt import loading
    from prefopt.policy import Policy

    quiet_transformers()
    has_adapter = loading.resolve(model).adapter is not None
    lora = None if has_adapter else lora
    return Policy.from_pretrained(
        model, lora=lora, quantize=quantize, dtype=dtype, device=device, head=head
    )


def quiet_transformers() -> None:
    """Its progress bars and warnings would tear ours apart."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def pairs_or_rankings(source: Any, **options: Any) -> Any:
    """For reward models; pairs keep their margins."""
    from prefopt.data.rankings import load_rankings
    from prefopt.data.schemas.base import LISTS

    return _pairs_or(load_rankings, LISTS, source, options)


def pairs_or_dialogues(source: Any, **options: Any) -> Any:
    """For a language model, whatever it was trained on."""
    from prefopt.data.dialogues import load_dialogues
    from prefopt.data.schemas.base import SCORED

    return _pairs_or(load_dialogues, SCORED, source, options)


def pairs_or_feedback(source: Any, **options: Any) -> Any:
    """For KTO."""
    from prefopt.data.feedback import load_feedback
    from prefopt.data.schemas.base import LABELLED

    return _pairs_or(load_feedback, LABELLED, source, options)


def _pairs_or(load: Callable[..., Any], level: int, source: Any, options: dict[str, Any]) -> Any:
    """Pairs of rows whose schema is below ``level``; of others what ``load`` makes."""
    from prefopt.data.sources import level_of, load_preferences

    split, columns = options.get("split"), options.get("columns")
    found = level_of(source, split, columns)
    if found is not None and found < level:
        return load_preferences(source, **options)
    return load(source, split=split, columns=columns)


def reference_of(model: str, reference: str | None, policy: Policy, dtype: str, device: str):
    """batch -> reference log-probs [N] of --reference, else of what the run or adapter began as."""
    import torch
    import yaml

    from prefopt import loading
    from prefopt.nn.lora import adapters

    config, asked = Path(model) / "config.yaml", reference is not None
    if reference is None and config.is_file():
        reference = yaml.safe_load(config.read_text()).get("model")
    if reference is None and policy.adapter is None:
        raise InputError(
            f"{model} is neither a run nor an adapter, so it is not known what it started from; "
            "name the starting model with --reference"
        )
    began = loading.Source(policy.base) if reference is None else loading.resolve(reference)
    same = began.adapter is None and loading.absolute(began.base) == policy.base
    # A base that was made 4-bit for the adapter is the one in memory, not the folder's.
    is_base = policy.adapter is not None and same and not (asked and policy.kind)
    other = policy if is_base else load_policy(str(reference), None, dtype, device)

    @torch.no_grad()
    def logprobs(batch):
        with adapters(policy.model, None) if is_base else contextlib.nullcontext():
            return other(batch.to(other.device))

    return logprobs
