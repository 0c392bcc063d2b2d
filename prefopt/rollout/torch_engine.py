"""The default rollout engine: the model itself, with a slot of cache for each response.

Every forward reads one token of each live response and, where slots are or will soon be free, the
prompts of the next ones: a prompt once for all its samples. A slot that is done is given to the
next response; when there is none left, the last one moves there, so that no work is done for empty
slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefopt.errors import InputError
from prefopt.nn import heads
from prefopt.rollout import plain, slots
from prefopt.rollout.drafts import Drafts, Request
from prefopt.rollout.lean import lean
from prefopt.rollout.picking import Picker
from prefopt.rollout.slots import Prefix, Slots, Step
from prefopt.rollout.stops import StopTexts, stop_ids
from prefopt.rollout.types import Sample, SamplingParams, check_prompts, evaluating

AHEAD = 4  # a quarter of the slots: how many responses wait with their prompt read
Reader = Callable[[Tensor, Tensor, Step], Tensor]
# On the CPU rows come in multiples of this. oneDNN compiles (milliseconds) and keeps (megabytes) a
# kernel for every new number of rows; and a row has the same bits among any number of others from 4
# on, so that what is sampled does not depend on the slots.
EVEN = 8
PROMPT_TOKENS = 2048  # of prompts that one forward reads, unless a single one has more


class TorchEngine:
    """Samples from a policy as it is now: its active adapter, its weights, its dtype.

    ``slots``: most responses that are written at the same time, on the CPU rounded up to a multiple
    of 8. Models that cannot share prompts
    (policy.layout_reason) go through their own cache, prompts of one length at a time, with the
    same sampling. A RolloutEngine; log-probs are those of ``policy(batch, temperature=...)``.
    """

    def __init__(self, policy: Any, *, slots: int = 64):
        if slots < 1:
            raise InputError(f"slots is {slots}; at least one response has to be written at a time")
        self.policy, self.slots = policy, slots

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        params: SamplingParams,
        *,
        n: int = 1,
        seed: int = 0,
        keys: Sequence[int] | None = None,
        on_sample: Callable[[int], None] | None = None,
    ) -> list[list[Sample]]:
        """See RolloutEngine. InputError for parameters out of range and for a prompt that leaves no
        room in the model's context."""
        policy = self.policy
        keys = range(len(prompts)) if keys is None else keys
        check_prompts(policy.model, prompts, params, n, keys)
        if not len(prompts):
            return []
        stops = stop_ids(params, policy.model, policy.tokenizer)
        texts = StopTexts(params.stop, policy.tokenizer)
        found: dict[Request, Sample] = {}

        def done(request: Request, sample: Sample) -> None:
            found[request] = sample
            if on_sample is not None:
                on_sample(len(found))

        rows = min(self.slots, n * len(prompts))
        if policy.device.type == "cpu":
            rows += -rows % EVEN
        write = plain.write if policy.layout_reason else _write
        dtype = policy.autocast
        autocast = torch.autocast(policy.device.type, dtype, enabled=dtype is not None)
        with evaluating(policy), autocast:
            drafts = Drafts(rows, params, stops, texts)
            pick = Picker(policy.model, policy._head_options, params, stops)
            write(policy, _Work(prompts, n, seed, keys), drafts, pick, done)
        return [[found[Request(p, s)] for s in range(n)] for p in range(len(prompts))]


class _Work(NamedTuple):
    prompts: Sequence[np.ndarray]
    n: int
    seed: int
    keys: Sequence[int]

    def start(self, drafts: Drafts, request: Request) -> int:
        prompt, key = self.prompts[request.prompt], self.keys[request.prompt]
        return drafts.start(request, prompt, self.seed, key)


def _write(
    policy: Any,
    work: _Work,
    drafts: Drafts,
    pick: Picker,
    done: Callable[[Request, Sample], None],
) -> None:
    rows = len(drafts.requests)
    cache = Slots(rows)
    todo = deque(range(len(work.prompts)))
    waiting: deque[tuple[Request, Prefix]] = deque()
    policy.attend(slots.register())
    read = _reader(policy, work, drafts.params)
    longest = max(map(len, work.prompts))
    cache.reserve(longest + min(drafts.params.max_new_tokens, 128))
    while todo or waiting or drafts.live:
        while waiting and drafts.live < rows:
            request, prefix = waiting.popleft()
            cache.put(work.start(drafts, request), prefix)
        free = rows - drafts.live
        new = _next_prompts(work, todo, free + rows // AHEAD) if len(waiting) <= free else []
        hidden, prefixes = _forward(
            read, cache, drafts, [work.prompts[i] for i in new], policy.device
        )
        for number, prefix in zip(new, prefixes, strict=True):
            waiting += [(Request(number, sample), prefix) for sample in range(work.n)]
        if drafts.live:
            _extend(cache, drafts, pick, hidden, done)


def _next_prompts(work: _Work, todo: deque[int], wanted: int) -> list[int]:
    """The prompts of the next ``wanted`` responses, as far as one forward can read them."""
    read: list[int] = []
    tokens = 0
    while todo and len(read) * work.n < wanted:
        tokens += len(work.prompts[todo[0]])
        if read and tokens > PROMPT_TOKENS:
            break
        read.append(todo.popleft())
    return read


def _reader(policy: Any, work: _Work, params: SamplingParams) -> Reader:
    """(ids [T], places [T], step) -> last hidden states [T, D]: lean, or through the modules."""
    longest = max(map(len, work.prompts)) + params.max_new_tokens
    found = lean(policy, longest)
    if found is not None:
        return found
    backbone = heads.backbone(policy.model)

    def read(ids: Tensor, places: Tensor, step: Step) -> Tensor:
        out = backbone(ids[None], position_ids=places[None], slots=step, use_cache=False)
        return out.last_hidden_state[0]

    return read


def _forward(read: Reader, cache: Slots, drafts: Drafts, prompts: list[np.ndarray], device):
    """Last hidden states of the live responses [live, D], and the prompts' keys and values."""
    live = _even(drafts.live, device)
    position = drafts.position[:live]
    cache.reserve(int(position.max(initial=0)) + 1)
    step = Step(cache, position.copy(), [len(prompt) for prompt in prompts], device)
    ids = np.concatenate([drafts.last[:live], *prompts]).astype(np.int64)
    places = np.concatenate([position, *(np.arange(len(prompt)) for prompt in prompts)])
    extra = -len(ids) % 32 if prompts and device.type == "cpu" else 0
    ids, places = (torch.from_numpy(np.pad(x, (0, extra))).to(device) for x in (ids, places))
    hidden = read(ids, places, step)
    if step.brought and not cache.blocks:
        cache.lay_out(step.brought)
    prefixes = cache.prefixes(step.brought, step.bounds) if prompts else []
    return hidden[:live], prefixes


def _even(live: int, device: torch.device) -> int:
    """How many rows are computed; those behind the live ones read token 0 at place 0."""
    return live + (-live % EVEN if device.type == "cpu" else 0)


def _extend(cache: Slots, drafts: Drafts, pick: Picker, hidden: Tensor, done) -> None:
    """One more token of each live response; those that are done make room."""
    live = drafts.live
    uniform, early = (torch.from_numpy(x).to(hidden.device) for x in drafts.draws(len(hidden)))
    tokens, logprobs = pick(hidden, uniform, early)
    for row, finish in drafts.add(tokens[:live].cpu().numpy(), logprobs[:live].cpu().numpy()):
        request, sample = drafts.requests[row], drafts.take(row, finish)
        length, last = int(drafts.position[drafts.live - 1]), drafts.drop(row)
        if last != row:
            cache.move(last, row, length)
        done(request, sample)
