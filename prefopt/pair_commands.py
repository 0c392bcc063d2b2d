"""`prefopt data pairs`: preference pairs out of responses that the data or a reward rates."""

from __future__ import annotations

import json

from prefopt.command_groups import Reading
from prefopt.command_inputs import Dtype, quiet_transformers, records
from prefopt.terminal import say


def pairs(
    out: str,
    data: str = "embedded",
    reading: Reading = Reading(),  # noqa: B008 - frozen
    reward: str | dict[str, str] | None = None,
    reward_weights: dict[str, float] | None = None,
    split: str | None = None,
    columns: dict[str, str | None] | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    force: bool = False,
) -> int:
    """Make pairs of rated responses, each with what it was made of.

    Args:
        out: .jsonl file of the pairs, with prompt, chosen, rejected and lineage.
        data: file, folder or hub id of ranked or scored responses, trees, or preferences; with
            --reward also prompts with responses that nobody rated.
        reward: who rates the responses instead of the data; a reward model's folder or
            module:function, or several as {name: folder}.
        reward_weights: weight of each of several rewards; null weighs them equally.
        split: which split of the data.
        columns: names of your columns.
        dtype: of the weights of reward models.
        device: auto, cpu, cuda, cuda:1, xpu or mps.
        force: replace an existing file.
    """
    from prefopt import durable
    from prefopt.data.audit.clean import check_target
    from prefopt.pair_making import make_pairs

    target = check_target(out, data, force, "--out")
    if reward is not None:
        quiet_transformers()
    made = records(
        make_pairs,
        data,
        split,
        columns,
        rewards=reward,
        reward_weights=reward_weights,
        dtype=dtype,
        device=device,
        **reading.options(),
    )
    with durable.replacing(target) as fd:
        for row in made:
            durable.write_all(fd, json.dumps(row, ensure_ascii=False).encode() + b"\n")
    say(f"pairs:  {target} ({len(made):,})")
    return 0
