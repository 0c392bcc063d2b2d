"""Pairs of responses that the data, or a reward, says are the better and the worse ones.

Every pair knows what it was made of: the row, the schema and rule, which two of the responses, and
what their scores are.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from prefopt.data.audit.clean import pair_row
from prefopt.data.columns import Columns
from prefopt.data.detect import SCHEMAS
from prefopt.data.pairing import Choice, check_pairing, notes_of, pair_items, why_none
from prefopt.data.records import Candidates, Message, Pair
from prefopt.data.schemas.base import RATED, TREES, Item
from prefopt.data.schemas.grouped import UNRATED_ROWS
from prefopt.data.schemas.lists import UNRATED_LIST
from prefopt.data.sources import read_items
from prefopt.data.spool import Lines, Spool
from prefopt.metrics import Progress
from prefopt.rewards import Reward, RewardModel, combine, load_rewards, score
from prefopt.round_files import spelled
from prefopt.sampling import prompt_ids

Row = dict[str, Any]
CHUNK = 32  # prompts whose responses a reward is called with at a time
# Where a reward judges, responses need no scores.
JUDGED = [
    *(schema for schema in SCHEMAS if schema.level <= RATED or schema.level == TREES),
    UNRATED_LIST,
    UNRATED_ROWS,
]


def make_pairs(
    source: Any,
    rewards: Reward | str | Mapping[str, Reward | str] | None = None,
    *,
    reward_weights: Mapping[str, float] | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    pairing: str = "best_worst",
    max_pairs: int | None = None,
    min_gap: float = 0.0,
    ties: str = "drop",
    empty: str = "keep",
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    quiet: bool = False,
) -> Spool[Row]:
    """Rows of preference pairs, as load_preferences reads them, each with its ``lineage``.

    Without ``rewards`` the data says how good the responses are, in any schema of load_preferences.
    With them they do: a callable (prompts, responses, **columns) -> scores, a name for load_reward,
    or several as {name: reward}, which are standardised over all responses and added with
    ``reward_weights`` (see rewards.combine). Then rows may be a prompt with a list of responses,
    rows with one response each, or preferences of any kind, whose own labels do not count.

    The other arguments are those of load_preferences. ``lineage`` holds `data`, `where` (file and
    line), `schema`, `pairing`, `picks` (which two of the different responses to the
    prompt, from 0) and `scores`, two numbers by name (`data`, or the rewards), with rewards also
    `rewards` (what each is) and their `combined` scores. ``.report`` counts rows
    and reasons. Raises InputError for what cannot be read, rewards that fail, and where no pair is
    left.
    """
    check_pairing(pairing, max_pairs, min_gap, ties, empty)
    policy = {"max_pairs": max_pairs, "min_gap": min_gap, "ties": ties, "empty": empty}
    if rewards is None:
        report, items = read_items(source, split, columns)
        judges, scores = {}, None
    else:
        judges = load_rewards(rewards, reward_weights, dtype=dtype, device=device)
        report, items = read_items(source, split, columns, JUDGED)
        items, scores = _judged(items, judges, reward_weights, quiet)
    about: Row = {"data": report.source, "schema": report.schema, "pairing": pairing}
    if judges:
        about["rewards"] = {name: spelled(reward) for name, reward in judges.items()}
    out = Spool[Row](report, lambda fields: fields[0])
    others, noted = Counter[str](), Counter[str]()
    for item, choices, reasons in pair_items(items, pairing=pairing, **policy):
        rows: list[list[Row]] = []
        for choice in choices:
            lineage = {**about, "where": item.where, "picks": list(choice.picks)}
            lineage |= scores(item, choice) if scores else _own_scores(choice)
            rows.append([{**pair_row(choice.pair), "lineage": lineage}])
        if out.take(item.where, rows or why_none(reasons), item.rows):
            others.update(reasons)
            noted.update([item.note] if item.note else [])
    report.notes += notes_of(others, noted)
    out.check("pair")
    return out


def _own_scores(choice: Choice) -> Row:
    """What the data says of the two responses."""
    if isinstance(choice.record, Pair):
        return {"scores": {}}
    return {"scores": {"data": [choice.record.scores[i] for i in choice.picks]}}


# --- what rewards say --------------------------------------------------------------------------


def _judged(
    items: Iterable[Item],
    judges: Mapping[str, Reward],
    weights: Mapping[str, float] | None,
    quiet: bool,
) -> tuple[Iterator[Item], Callable[[Item, Choice], Row]]:
    """(the items with what the rewards say as scores, in `scores` and `combined` of a choice).

    The responses wait on a temporary file until all are scored: memory holds their scores.
    """
    lines, scores = Lines(), {name: array("d") for name in judges}
    items = iter(items)
    with Progress(quiet=quiet) as progress:
        progress.phase("rewards", None)
        while chunk := list(islice(items, CHUNK)):
            prompts, texts, rests = [], [], []
            for item in chunk:
                record = item.record if isinstance(item.record, str) else _responses(item.record)
                record = _no_room(record, judges) or record
                lines.append(json.dumps([item.where, item.rows, record]).encode())
                for prompt, responses, _ in [] if isinstance(record, str) else record:
                    prompts += [prompt + turns[:-1] for turns in responses]
                    texts += [turns[-1].content for turns in responses]
                    rests += [item.rest or {}] * len(responses)
            columns = {key: [rest.get(key) for rest in rests] for rest in rests for key in rest}
            for name, reward in judges.items() if texts else ():
                scores[name].extend(score(reward, name, prompts, texts, columns))
            progress.update(len(lines))
    known = any(map(len, scores.values()))
    scales = {name: getattr(reward, "score_stats", None) for name, reward in judges.items()}
    combined = array("d", combine(scores, weights, scales=scales) if known else [])
    starts = dict[int, int]()  # of the records of the item at hand

    def rated() -> Iterator[Item]:
        at = 0
        for i in range(len(lines)):
            where, rows, record = json.loads(lines[i])
            starts.clear()
            made: list[Candidates] = []
            for fields in [] if isinstance(record, str) else record:
                prompt, responses, source = fields
                turns = [[Message(*turn) for turn in side] for side in (prompt, *responses)]
                end = at + len(responses)
                made.append(Candidates(turns[0], turns[1:], combined[at:end].tolist(), source))
                starts[id(made[-1])], at = at, end
            yield Item(where, record if isinstance(record, str) else made, rows)

    def about(item: Item, choice: Choice) -> Row:
        at = [starts[id(choice.record)] + pick for pick in choice.picks]
        said = {name: [values[i] for i in at] for name, values in scores.items()}
        return {"scores": said, "combined": [combined[i] for i in at]}

    return rated(), about


def _no_room(records: list[Any] | str, judges: Mapping[str, Reward]) -> str | None:
    """Why a reward model cannot read what it is to judge, or None."""
    models = [judge for judge in judges.values() if isinstance(judge, RewardModel)]
    for prompt, responses, _ in records if models and not isinstance(records, str) else ():
        befores = {json.dumps(turns[:-1]): prompt + turns[:-1] for turns in responses}
        for model in models:
            for ids in prompt_ids(list(befores.values()), model.policy.tokenizer, "auto"):
                if ids is None:
                    return "the template of a reward model refuses the prompt"
                if len(ids) >= model.max_length:
                    return f"no room for a response in the {model.max_length:,} tokens of a reward"
    return None


def _responses(record: Pair | Candidates | list[Candidates]) -> list[Any]:
    """[prompt, responses, source] of each record."""
    if isinstance(record, Pair):
        return [[record.prompt, [record.chosen, record.rejected], record.source]]
    records = record if isinstance(record, list) else [record]
    return [[one.prompt, one.responses, one.source] for one in records]
