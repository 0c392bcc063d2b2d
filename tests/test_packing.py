"""Packing: whatever the layout and the budget, the same responses in the same order, each behind
its own prompt, at its own positions."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.encode import Encoded
from prefopt.data.packing import Batch, pack

tokens = st.integers(0, 99)
arrays = st.lists(tokens, min_size=1, max_size=8).map(lambda x: np.array(x, np.int32))
responses = st.lists(arrays, min_size=1, max_size=4).map(tuple)
groups = st.builds(Encoded, arrays, responses, st.integers(0, 9), st.sampled_from([1.0, 0.5, 2.0]))
many = st.lists(groups, max_size=7)
layouts = st.sampled_from(["shared", "padded"])
budgets = st.integers(1, 60)


def visible(batch: Batch, row: int) -> list[int]:
    """The rows that row ``row`` attends to, in order, ending with itself."""
    for start, end, p0, p1 in batch.segments.tolist():
        if start <= row < end:
            return [*range(p0, p1), *range(start, row + 1)]
    raise AssertionError(f"no run covers row {row}")


def size_of(items: list[Encoded], layout: str) -> int:
    """Tokens of a batch, padding included, by the definition."""
    if layout == "shared":
        return sum(len(e.prompt) + sum(len(r) - 1 for r in e.responses) for e in items)
    rows = [len(e.prompt) + len(r) - 1 for e in items for r in e.responses]
    return len(rows) * max(rows)


@given(many, budgets, layouts)
def test_every_scored_token_is_predicted_from_its_prompt_and_what_it_follows(items, budget, layout):
    """What the row that predicts a target sees is the prompt and the response so far, at positions
    0, 1, 2, ...; so a model computes what it would for the sequence alone."""
    sequences = [
        (item, np.concatenate([item.prompt, response]), len(item.prompt))
        for item in items
        for response in item.responses
    ]
    seen = []
    for batch in pack(items, max_tokens=budget, layout=layout):
        ids, positions = batch.input_ids.tolist(), batch.position_ids.tolist()
        for n, (row, target) in enumerate(zip(batch.score_rows, batch.targets, strict=True)):
            rows = visible(batch, int(row))
            assert [positions[r] for r in rows] == list(range(len(rows)))
            seen.append([ids[r] for r in rows] + [int(target)])
            assert 0 <= batch.response_ids[n] < batch.num_responses
    want = [
        whole[: end + 1].tolist()
        for _, whole, prompt in sequences
        for end in range(prompt, len(whole))
    ]
    assert seen == want


@given(many, budgets, layouts)
def test_groups_stay_whole_and_in_order_within_the_budget(items, budget, layout):
    batches = list(pack(items, max_tokens=budget, layout=layout))
    assert [e for b in batches for e in b.encoded] == items
    for batch in batches:
        rows, width = batch.shape
        assert rows * width == len(batch.input_ids) == size_of(list(batch.encoded), layout)
        assert rows * width <= budget or batch.num_groups == 1
        assert batch.num_responses == sum(len(e.responses) for e in batch.encoded)
        lengths = torch.bincount(batch.response_ids, minlength=batch.num_responses).tolist()
        assert lengths == [len(r) for e in batch.encoded for r in e.responses]
        assert batch.response_ids.tolist() == sorted(batch.response_ids.tolist())
    for a, b in pairwise(batches):  # nothing more would have fitted
        assert size_of([*a.encoded, b.encoded[0]], layout) > budget


@given(many, budgets)
def test_layouts_hold_the_same_responses_in_the_same_order(items, budget):
    a, b = (list(pack(items, max_tokens=budget, layout=x)) for x in ("shared", "padded"))
    assert [t for x in a for t in x.targets.tolist()] == [t for x in b for t in x.targets.tolist()]
    whole = [next(pack(items, max_tokens=1 << 20, layout=x), None) for x in ("shared", "padded")]
    if items:
        for name in ("targets", "response_ids"):
            assert torch.equal(getattr(whole[0], name), getattr(whole[1], name))
        assert whole[0].num_responses == whole[1].num_responses
    else:
        assert whole == [None, None]


@given(many.filter(len), budgets, budgets, layouts)
def test_split_keeps_everything(items, budget, smaller, layout):
    """Reference log-probs and weights go along with their responses."""
    for batch in pack(items, max_tokens=budget, layout=layout):
        ref = torch.arange(len(batch.targets), dtype=torch.float32)
        own = torch.arange(batch.num_responses, dtype=torch.float32)
        parts = replace(batch, ref_logprobs=ref, weights=own).split(smaller)
        assert torch.equal(torch.cat([part.weights for part in parts]), own)
        parts = replace(batch, ref_logprobs=ref).split(smaller)
        for name in ("targets", "ref_logprobs"):
            got = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(got, ref if name == "ref_logprobs" else batch.targets)
        weights = [torch.ones(p.num_responses) if p.weights is None else p.weights for p in parts]
        want = [item.weight for item in batch.encoded for _ in item.responses]
        assert torch.cat(weights).tolist() == want
        assert [e for part in parts for e in part.encoded] == list(batch.encoded)
        for part, again in zip(
            parts, pack(batch.encoded, max_tokens=smaller, layout=layout), strict=True
        ):
            assert part.layout == layout and part.shape == again.shape
            assert torch.equal(part.segments, again.segments)
        assert all(p.ref_logprobs is None for p in batch.split(smaller))


def test_the_layout_of_the_documentation():
    """Two responses behind one prompt; what the last token of each would predict is never asked."""
    item = Encoded(np.array([10, 11, 12], np.int32), (np.array([20, 21, 1], np.int32),
                   np.array([30, 31, 32, 1], np.int32)), 0)  # fmt: skip
    (batch,) = pack([item], max_tokens=100)
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 30, 31, 32]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert batch.segments.tolist() == [[0, 3, 0, 0], [3, 5, 0, 3], [5, 8, 0, 3]]
    assert batch.score_rows.tolist() == [2, 3, 4, 2, 5, 6, 7]
    assert batch.targets.tolist() == [20, 21, 1, 30, 31, 32, 1]
    assert batch.response_ids.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert (batch.num_responses, batch.num_groups, batch.shape) == (2, 1, (1, 8))
    (padded,) = pack([item], max_tokens=100, layout="padded")
    assert padded.input_ids.view(padded.shape).tolist() == [
        [10, 11, 12, 20, 21, 0], [10, 11, 12, 30, 31, 32],
    ]  # fmt: skip
    assert padded.segments.tolist() == [[0, 5, 0, 0], [6, 12, 6, 6]]
    assert padded.score_rows.tolist() == [2, 3, 4, 8, 9, 10, 11]


def test_a_response_of_one_token_is_scored_and_never_an_input():
    item = Encoded(np.array([5, 6], np.int32), (np.array([1], np.int32),) * 2, 0)
    (batch,) = pack([item], max_tokens=100)
    assert batch.input_ids.tolist() == [5, 6] and batch.segments.tolist() == [[0, 2, 0, 0]]
    assert batch.score_rows.tolist() == [1, 1] and batch.targets.tolist() == [1, 1]


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_types(layout):
    item = Encoded(np.array([5, 6], np.int32), (np.array([7, 1], np.int32),) * 2, 0, weight=2)
    batch = next(pack([item], max_tokens=100, layout=layout)).to("cpu")
    for name in ("input_ids", "position_ids", "score_rows", "targets", "response_ids"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.segments.dtype == torch.int32 and batch.segments.shape[1] == 4
    assert batch.weights.dtype == torch.float32 and batch.weights.tolist() == [2, 2]
    assert next(pack([replace(item, weight=1.0)], max_tokens=9, layout=layout)).weights is None


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="'shared' or 'padded'"):
        next(pack([], max_tokens=10, layout="packed"))


@pytest.mark.gpu
def test_the_run_table_stays_on_the_cpu():
    item = Encoded(np.array([5, 6], np.int32), (np.array([7, 1], np.int32),), 0)
    batch = next(pack([item], max_tokens=100)).to("cuda")
    assert batch.input_ids.is_cuda and batch.segments.device.type == "cpu"
