"""A trained reward model as a reward: text rendered by its tokenizer, scored at its end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from prefopt import loading, roles
from prefopt.data.encode import Group, encode_groups
from prefopt.data.encoded import EncodedSet
from prefopt.data.packing import pack
from prefopt.data.recipe import Recipe
from prefopt.data.records import Message
from prefopt.errors import InputError
from prefopt.loading import context_length
from prefopt.nn.heads import ScoreStats
from prefopt.policy import Policy


class RewardModel:
    """A reward model as a reward; ``score_stats`` is the scale of its scores, where it is known.

    With ``share`` it becomes a role of that policy where it is an adapter on the same base, so that
    memory holds the base once; ``not_shared`` says why it did not.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        max_length: int | None = None,
        micro_tokens: int = 4096,
        share: Policy | None = None,
    ):
        self.path, self.role = str(path), None
        self.not_shared = None if share is None else self._join(share)
        if self.role is None:
            self.policy = Policy.from_pretrained(path, device=device, dtype=dtype)
            if not self.policy.is_reward_model:
                raise InputError(
                    f"{path} is a language model, which has no score; a reward is a reward model's "
                    "folder (prefopt reward makes one) or module:function"
                )
            self.policy.eval()
            self.score_stats = self.policy.score_stats
        context = context_length(self.policy.model)
        self.max_length = min(max_length or context, context)
        self.micro_tokens = micro_tokens

    def _join(self, share: Policy) -> str | None:
        """Become a role of a policy, or say why not."""
        source = loading.resolve(self.path)
        if reason := roles.why_not_shared(share, source):
            return reason
        number = len(share.reward_heads)
        role = f"reward-{number + 1}" if number else "reward"
        try:
            self.score_stats: ScoreStats | None = roles.add_reward_role(share, self.path, role)
        except InputError as error:  # a base that is tied to an output head, say
            return str(error)
        self.policy, self.role = share, role
        return None

    @torch.no_grad()
    def __call__(self, prompts: list[list[Message]], responses: list[str]) -> list[float]:
        """The score of each response [R], read at its end; InputError for too long a prompt."""
        policy = self.policy
        items = encode_responses(prompts, responses, policy.tokenizer, max_length=self.max_length)
        batches = pack(items, max_tokens=self.micro_tokens, layout=policy.layout, ends=True)
        scores = [policy(batch.to(policy.device), role=self.role).cpu() for batch in batches]
        return torch.cat(scores).tolist()


def encode_responses(
    prompts: Sequence[list[Message]], responses: Sequence[str], tokenizer: Any, *, max_length: int
) -> EncodedSet:
    """Every response behind its prompt, by the rules of data.encode, in order and none left out.

    Neighbours with the same prompt share it. A response is cut to fit ``max_length``; a prompt that
    leaves no room for one, or that the template refuses, is an InputError.
    """
    groups = [
        Group(prompt, [[Message("assistant", text)] for _, text in part], {})
        for prompt, part in groupby(zip(prompts, responses, strict=True), key=itemgetter(0))
    ]
    encoded = encode_groups(groups, tokenizer, Recipe("prompt", "auto", max_length))
    missing = set(range(len(groups))) - set(encoded.indices.tolist())
    if missing:
        why = next(key for key in encoded.counts if key.startswith("dropped: "))
        raise InputError(
            f"the prompt {shortened(groups[min(missing)].prompt[-1].content)} cannot be scored by "
            f"a model that reads {max_length:,} tokens: {why.removeprefix('dropped: ')}"
        )
    return encoded


SHOWN = 120  # characters of a text in an error


def shortened(text: str) -> str:
    """A text in an error: on one line, in quotes."""
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= SHOWN else f"{flat[: SHOWN - 3]}...")
