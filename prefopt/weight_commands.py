"""`prefopt quantize` and `prefopt merge`: a model folder in, a model folder out."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, Literal

from prefopt.command_inputs import (
    Dtype,
    load_policy,
    pairs_or_dialogues,
    pairs_or_rankings,
    quiet_transformers,
    records,
)
from prefopt.errors import InputError
from prefopt.terminal import say


def quantize(
    model: str,
    out: str,
    kind: Literal["nf4", "fp4"] = "nf4",
    double: bool = True,
    search: Literal["unsigned", "signed"] | None = None,
    skip: list[str] = ["lm_head"],  # noqa: B006 - read, never changed
    storage: Literal["uint8", "bfloat16"] = "uint8",
    dtype: Dtype = "auto",
) -> int:
    """Write a model with 4-bit linear layers, in the format of bitsandbytes and transformers.

    Args:
        model: model folder or hub id; its weights are read one at a time.
        out: the new folder.
        kind: nf4, for normally distributed weights, or fp4.
        double: quantise the scales too, for 0.4 bits less a weight.
        search: choose the scale of each block by its error; any reader of the format takes it.
        skip: names of layers that stay as they are.
        storage: how the bytes are labelled; bfloat16 is for FSDP under torch before 2.9.
        dtype: of what stays as it is, and of what the weights become when they are used.
    """
    from prefopt import durable, loading, saving
    from prefopt.nn.bnb_format import save_bnb

    quiet_transformers()
    folder, source, cpu = new_folder(out), loading.resolve(model), loading.pick_device("cpu")
    if source.adapter is not None:
        raise InputError(f"{model} is an adapter; merge it first, or quantise its base")
    if stored := loading.stored_kind(source.base):
        raise InputError(f"the weights of {source.base} are {stored} already")
    network, tokenizer, report = loading.load_model(
        source.base, loading.pick_dtype(dtype, cpu), cpu, kind,
        double=double, search=search, skip=tuple(skip),
    )  # fmt: skip
    assert report is not None
    for line in report.lines():
        say(line)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with durable.new_dir(folder) as partial:
        save_bnb(network, partial, storage=storage)
        saving.copy_tokenizer(source.base, tokenizer, partial)
    say(f"model: {folder}")
    return 0


def merge(
    model: str,
    out: str,
    into: Literal["dequantized", "original", "4bit"] = "dequantized",
    data: str | None = None,
    pairs_checked: int = 64,
    max_length: int = 1024,
    quantize: Literal["nf4", "fp4", "none"] | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    force: bool = False,
) -> int:
    """Put an adapter into the weights of its base, check the result, and write a model folder.

    Args:
        model: run or adapter folder.
        out: the new folder, for transformers and vLLM.
        into: dequantized are the weights it was trained on, in 16 bits or more; original those
            before they became 4-bit; 4bit rounds to 4 bits again.
        data: records to compare the models on; null is what the run was trained on.
        pairs_checked: how many of them.
        max_length: most tokens of prompt and response.
        quantize: 4-bit kind the adapter was trained on; null is what its folder says.
        dtype: of the merged weights.
        device: auto, cpu, cuda, cuda:1, xpu or mps.
        force: write the result even if merging lost what was trained.
    """
    from prefopt.data.records import Pair
    from prefopt.export import merge_policy
    from prefopt.loading import context_length
    from prefopt.objectives.dpo import DPO
    from prefopt.objectives.reward import Reward
    from prefopt.objectives.sft import SFT

    new_folder(out)
    if pairs_checked < 1:
        raise InputError(f"pairs_checked is {pairs_checked}; it must be at least 1")
    given, split, columns, template = data_of(model, data)
    policy = load_policy(model, None, dtype, device, quantize)
    scores = policy.is_reward_model
    load = pairs_or_rankings if scores else pairs_or_dialogues
    source = records(load, given, split, columns, quiet=True)
    original = None
    if into == "original":
        original = load_policy(model, None, dtype, device, "none")
    length = min(max_length, context_length(policy.model))
    taken = list(islice(source, pairs_checked))
    pairs = isinstance(taken[0], Pair)
    objective: Any = Reward() if scores else DPO() if pairs else SFT()
    encoded = objective.encode(taken, policy.tokenizer, max_length=length, template=template)
    report, verdict = merge_policy(
        policy, list(encoded), out, requantize=into == "4bit", original=original, force=force
    )
    for line in (*report.lines(), *verdict.lines()):
        say(line)
    say(f"model: {out}")
    return 0


def new_folder(out: str) -> Path:
    """--out, which must not be there yet: a model is never replaced by accident."""
    if Path(out).exists():
        raise InputError(f"--out {out} exists already; name another folder, or remove it")
    return Path(out)


def data_of(model: str, data: str | None) -> tuple[str, str | None, dict | None, str]:
    """--data, or what the run trained on: (data, split, columns, template)."""
    import yaml

    config = Path(model) / "config.yaml"
    run = yaml.safe_load(config.read_text()) if config.is_file() else {}
    template = run.get("template", "auto")
    if data is not None:
        return data, None, None, template
    if "data" not in run:
        return "embedded", None, None, template
    source = run["data"]
    if isinstance(source, dict):  # several sets were mixed
        source = next(iter(source.values()))
    return source, run.get("split"), run.get("columns"), template
