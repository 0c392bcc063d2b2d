"""The samples of one update, as rows: what was sampled, and what is known of every token.

Shapes: G prompts with n samples each, R = G n responses, sample by sample of each prompt in turn; T
tokens of the longest; rows [R, T] are padded on the right, and ``mask`` says where a token is. A
batch holds the same tokens flat, [N], because both go by prompt, then sample, then token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.data.encoded import Encoded
from prefopt.data.packing import Batch, pack
from prefopt.rollout.types import Sample


@dataclass
class Experience:
    """groups: a prompt and its samples, index = place in the update. stopped [R] bool: ended by
    itself. kept [R] bool: is learnt from. scores [R] float32: what the rewards say, together; ends
    [R] float32: of it, what they say of responses as a whole. worth [R] float32: the score that is
    learnt from, penalised and standardised. bootstrap [R] float32: the value of
    what a cut response would have gone on to. columns: rows [R, T] float32 by name, on the CPU, 0
    where no token is: "sampled" (log-probs from the sampler), "old", "ref", "values",
    "token_scores", "advantages" and "returns" as they become known."""

    groups: list[Encoded]
    mask: Tensor
    stopped: Tensor
    kept: Tensor
    scores: Tensor
    ends: Tensor
    worth: Tensor
    bootstrap: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Samples of each prompt."""
        return len(self.mask) // len(self.groups)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, [R]."""
        return self.mask.sum(1)

    @property
    def group_ids(self) -> Tensor:
        """Place of each response's prompt, [R]."""
        return torch.arange(len(self.mask)) // self.n

    @property
    def learnt(self) -> Tensor:
        """Tokens that are learnt from, [R, T] bool."""
        return self.mask & self.kept[:, None]

    def empty(self) -> Tensor:
        """A row of zeros for each response, [R, T]."""
        return torch.zeros(self.mask.shape)

    def batches(
        self, places: Sequence[int], policy: Any, max_tokens: int, *, ends: bool = False
    ) -> Iterator[Batch]:
        """The groups at ``places``, packed, with all that is known of their tokens."""
        items = (self.groups[place] for place in places)
        flat = {**self.columns, "kept": self.learnt.float()}
        for batch in pack(items, max_tokens=max_tokens, layout=policy.layout, ends=ends):
            rows, mask = self.rows_of(batch)
            yield dataclasses.replace(
                batch, columns={name: values[rows][mask] for name, values in flat.items()}
            )

    def rows_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(rows [r] of a batch's responses, their mask [r, T])."""
        places = torch.tensor([item.index for item in batch.encoded])
        rows = (places[:, None] * self.n + torch.arange(self.n)).flatten()
        return rows, self.mask[rows]

    def record(self, name: str, batch: Batch, values: Tensor) -> None:
        """Write what a forward gave for the tokens of a batch, [N], into the rows of ``name``."""
        rows, mask = self.rows_of(batch)
        part = torch.zeros(mask.shape)
        part[mask] = values.detach().float().cpu()
        self.columns.setdefault(name, self.empty())[rows] = part


def from_samples(prompts: Sequence[np.ndarray], samples: Sequence[Sequence[Sample]]) -> Experience:
    """Prompts [P] and n samples of each, not yet scored."""
    groups = [
        Encoded(prompt, tuple(sample.tokens for sample in some), place)
        for place, (prompt, some) in enumerate(zip(prompts, samples, strict=True))
    ]
    flat = [sample for some in samples for sample in some]
    lengths = torch.tensor([len(sample.tokens) for sample in flat])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    sampled = torch.zeros(mask.shape)
    sampled[mask] = torch.from_numpy(np.concatenate([sample.logprobs for sample in flat]))
    stopped = torch.tensor([sample.finish == "stop" for sample in flat])
    return Experience(
        groups,
        mask,
        stopped,
        torch.ones(len(flat), dtype=torch.bool),
        scores=torch.zeros(len(flat)),
        ends=torch.zeros(len(flat)),
        worth=torch.zeros(len(flat)),
        bootstrap=torch.zeros(len(flat)),
        columns={"sampled": sampled},
    )
