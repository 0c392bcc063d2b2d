"""Encoded groups -> Batch: the one layout of every objective.

A *group* is one prompt with its K responses (SFT 1, pairs 2, sampled groups G). In the shared
layout the prompt is written once and each response continues it from its own position:

    tokens     p0 p1 p2 | a0 a1 | b0 b1 b2          one group of two responses
    positions   0  1  2 |  3  4 |  3  4  5

The last token of a response predicts nothing, so it is a target but no input, unless its hidden
state is asked for (`ends`: a reward model reads its score there). In the padded layout every
response is a row of its own behind a copy of its prompt, for models whose attention cannot follow
the shared one. Both hold the same responses in the same order.

Shapes: T input tokens, S runs, N scored tokens, R responses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prefopt.data.encoded import Encoded

Layout = Literal["shared", "padded"]


@dataclass(frozen=True)
class Batch:
    """One packed forward pass.

    input_ids, position_ids [T]; score_rows, targets, response_ids [N], ordered by group, then
    response, then token; row ``score_rows[i]`` of the hidden states predicts ``targets[i]``.
    segments [S, 4] int32, always on the CPU: (start, end, prefix_start, prefix_end); the queries
    start..end see the whole prefix and, causally, their own run. ``shape`` is (1, T) in the shared
    layout and (rows, row length) in the padded one, where whatever no run covers is padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    score_rows: Tensor
    targets: Tensor
    response_ids: Tensor
    num_responses: int
    layout: Layout
    shape: tuple[int, int]
    encoded: tuple[Encoded, ...]  # the groups it was packed from: cache keys, splitting
    ref_logprobs: Tensor | None = None  # [N] float32
    weights: Tensor | None = None  # [R] float32, None when all are 1
    margins: Tensor | None = None  # [groups] float32, 0 where not known; None when none is
    preferences: Tensor | None = None  # [groups] float32, None when all are 1
    labels: Tensor | None = None  # [R] int64, of Encoded.labels
    end_rows: Tensor | None = None  # [R] hidden row of each response's last token, with `ends`
    columns: dict[str, Tensor] | None = None  # [N] each: what an RL update knows of its tokens

    @property
    def num_groups(self) -> int:
        return len(self.encoded)

    @property
    def places(self) -> Tensor:
        """Place of each scored token among those of its response, [N] int64."""
        lengths = torch.bincount(self.response_ids, minlength=self.num_responses)
        starts = lengths.cumsum(0) - lengths
        return torch.arange(len(self.targets), device=lengths.device) - starts[self.response_ids]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; the run table stays on the CPU, so no sync later."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "segments"
        }
        if self.columns is not None:
            moved["columns"] = {
                name: value.to(device, non_blocking=True) for name, value in self.columns.items()
            }
        return replace(self, **moved)

    def split(self, max_tokens: int) -> list[Batch]:
        """The same groups in smaller batches of at most ``max_tokens`` tokens."""
        ends = self.end_rows is not None
        parts = pack(self.encoded, max_tokens=max_tokens, layout=self.layout, ends=ends)
        result, token, response = [], 0, 0
        for part in parts:
            tokens = slice(token, token := token + len(part.targets))
            responses = slice(response, response := response + part.num_responses)
            part = replace(
                part.to(self.input_ids.device),
                ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[tokens],
                weights=None if self.weights is None else self.weights[responses],
                columns=None
                if self.columns is None
                else {name: value[tokens] for name, value in self.columns.items()},
            )
            result.append(part)
        return result


def pack(
    encoded: Iterable[Encoded], *, max_tokens: int, layout: Layout = "shared", ends: bool = False
) -> Iterator[Batch]:
    """Pack groups, in order, into batches of at most ``max_tokens`` tokens (padding included).

    A group is never cut: one that is larger than ``max_tokens`` gets a batch of its own. ``ends``:
    the last token of every response is an input too, and its row is in ``end_rows``.
    """
    if layout not in ("shared", "padded"):
        raise ValueError(f"layout is 'shared' or 'padded', not {layout!r}")
    held: list[Encoded] = []
    rows = width = 0  # what the batch measures so far: (1, tokens) or (responses, longest)
    for item in encoded:
        new_rows, new_width = _grow(item, rows, width, layout, ends)
        if held and new_rows * new_width > max_tokens:
            yield _build(held, layout, ends)
            held, (new_rows, new_width) = [], _grow(item, 0, 0, layout, ends)
        held.append(item)
        rows, width = new_rows, new_width
    if held:
        yield _build(held, layout, ends)


def preferences_of(items: Sequence[Encoded]) -> Tensor | None:
    """[groups] float32, None when all are 1: no loss then looks at the other order."""
    found = [float(item.preference) for item in items]
    return None if all(p == 1 for p in found) else torch.tensor(found)


def _grow(item: Encoded, rows: int, width: int, layout: Layout, ends: bool) -> tuple[int, int]:
    prompt, inputs = len(item.prompt), [len(r) - (not ends) for r in item.responses]
    if layout == "shared":
        return 1, width + prompt + sum(inputs)
    return rows + len(inputs), max(width, prompt + max(inputs))


def _masks(item: Encoded) -> tuple[np.ndarray | None, ...]:
    """Which tokens of each response are scored, None: all."""
    return item.scored or (None,) * len(item.responses)


def _build(items: list[Encoded], layout: Layout, ends: bool) -> Batch:
    rows, width = 0, 0
    for item in items:
        rows, width = _grow(item, rows, width, layout, ends)
    ids = np.zeros(rows * width, np.int64)
    positions = np.zeros(rows * width, np.int64)
    runs: list[tuple[int, int, int, int]] = []
    score_rows, targets, lengths, end_rows = [], [], [], []

    def place(tokens: np.ndarray, at: int, position: int) -> int:
        ids[at : at + len(tokens)] = tokens
        positions[at : at + len(tokens)] = np.arange(position, position + len(tokens))
        return at + len(tokens)

    cursor = 0
    for item in items:
        prompt = len(item.prompt)
        prompt_start = cursor
        if layout == "shared":
            cursor = place(item.prompt, cursor, 0)
            runs.append((prompt_start, cursor, prompt_start, prompt_start))
        for response, mask in zip(item.responses, _masks(item), strict=True):
            if layout == "padded":
                prompt_start, row_start = cursor, cursor
                cursor = place(item.prompt, cursor, 0)
            start, cursor = cursor, place(response if ends else response[:-1], cursor, prompt)
            end_rows.append(start + len(response) - 1)
            if layout == "padded":
                runs.append((row_start, cursor, row_start, row_start))
                cursor = row_start + width
            elif cursor > start:
                runs.append((start, cursor, prompt_start, prompt_start + prompt))
            # The last prompt row predicts the first token, then each token its successor.
            scored = slice(None) if mask is None else mask
            predicting = np.arange(start - 1, start + len(response) - 1)
            predicting[0] = prompt_start + prompt - 1
            score_rows.append(predicting[scored])
            targets.append(response[scored])
            lengths.append(len(targets[-1]))

    weights = [float(item.weight) for item in items for _ in item.responses]
    margins = [item.margin for item in items]
    labels = [label for item in items for label in item.labels or ()]
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=torch.tensor(runs, dtype=torch.int32),
        score_rows=torch.from_numpy(np.concatenate(score_rows).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        response_ids=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        num_responses=len(lengths),
        layout=layout,
        shape=(rows, width),
        encoded=tuple(items),
        weights=None if all(w == 1 for w in weights) else torch.tensor(weights),
        margins=None
        if margins.count(None) == len(items)
        else torch.tensor([m or 0.0 for m in margins]),
        preferences=preferences_of(items),
        labels=torch.tensor(labels) if labels else None,
        end_rows=torch.tensor(end_rows) if ends else None,
    )
