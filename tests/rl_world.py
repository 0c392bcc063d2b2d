"""A world small enough to be enumerated: every response to every prompt, its probability and its
reward, so that the best policy and the distance of any other from it are known exactly.

A random Llama over six tokens, of which one ends the response, answers two prompts with at most
four tokens. A policy pi is worth J = E[reward - beta log(pi / ref)], at the temperature of
sampling. The best one is pi* = ref exp(reward / beta) / Z, worth J* = beta log Z, and
J* - J = beta KL(pi || pi*). Everything here is read off the model's own forward in float64: nothing
is packed, cached or sampled.

Shapes: P prompts, R responses.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from prefopt.data.records import Message

STOP, WORDS = "</s>", ("a", "b", "c", "d", "e")
LONGEST = 4  # tokens of a response
LEFT = 0.005  # of the way to the optimum, where a run is said to have reached it
PROMPTS = ([Message("user", "a b")], [Message("user", "c d")])

# Every response as token ids (0 is the stop token): ended by it, or cut at LONGEST.
RESPONSES = tuple(
    (*words, 0) if len(words) < LONGEST else words
    for n in range(LONGEST + 1)
    for words in itertools.product(range(1, len(WORDS) + 1), repeat=n)
)
TEXTS = tuple(" ".join(WORDS[i - 1] for i in ids if i) for ids in RESPONSES)


class Worth(NamedTuple):
    """What a policy is worth, on average over the prompts, in units of the reward; KL in nats."""

    value: float  # J
    reward: float
    kl: float


def make_world(folder: Path, seed: int) -> Path:
    """Write the model and its tokenizer, whose pad token is the stop token; returns the folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({STOP: 0, **{w: i for i, w in enumerate(WORDS, 1)}}, STOP))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": STOP, "pad_token": STOP}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=6, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, initializer_range=0.03,
        tie_word_embeddings=False, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def reward_table(seed: int) -> Tensor:
    """A reward of every response to every prompt, [P, R] float64, with deviation 0.5.

    Random, from what token stands where and behind which other: a table without any such structure
    asks more of so small a network than of the algorithm that trains it.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    of_place = torch.randn(len(PROMPTS), LONGEST, 6, generator=generator).double()
    of_pair = torch.randn(len(PROMPTS), 6, 6, generator=generator).double()
    zero = torch.zeros(len(PROMPTS)).double()
    rows = [
        sum([of_place[:, t, token] for t, token in enumerate(ids)], zero)
        + sum([of_pair[:, *pair] for pair in itertools.pairwise(ids)], zero)
        for ids in RESPONSES
    ]
    table = torch.stack(rows, 1)
    table = table - table.mean(1, keepdim=True)
    return 0.5 * table / table.std(1, keepdim=True)


class TableReward:
    """The table as a reward of texts, which name responses one to one."""

    def __init__(self, table: Tensor):
        self.table = table
        self.prompts = {prompt[0].content: i for i, prompt in enumerate(PROMPTS)}
        self.responses = {text: i for i, text in enumerate(TEXTS)}

    def __call__(self, prompts: list[list[Message]], responses: list[str]) -> list[float]:
        return [
            self.table[self.prompts[p[0].content], self.responses[r]].item()
            for p, r in zip(prompts, responses, strict=True)
        ]


@torch.no_grad()
def response_logprobs(model: Any, tokenizer: Any, temperature: float) -> Tensor:
    """log pi(response | prompt) of every response to every prompt, [P, R] float64."""
    import copy

    model = copy.deepcopy(model).double().eval()
    model.config._attn_implementation = "eager"
    words = torch.tensor([ids for ids in RESPONSES if 0 not in ids])  # all prefixes are in these
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor(tokenizer(prompt[0].content)["input_ids"]).expand(len(words), -1)
        logits = model(input_ids=torch.cat([ids, words], 1), use_cache=False).logits
        logp = (logits[:, ids.shape[1] - 1 : -1].double() / temperature).log_softmax(-1)
        by_prefix = {
            tuple(row[:t]): logp[i, t]
            for i, row in enumerate(words.tolist())
            for t in range(LONGEST)
        }
        sums = [
            torch.stack([by_prefix[r[:t]][token] for t, token in enumerate(r)]).sum()
            for r in RESPONSES
        ]
        found.append(torch.stack(sums))
    return torch.stack(found)


def worth(logp: Tensor, ref: Tensor, table: Tensor, beta: float) -> Worth:
    """Of a policy with log-probs ``logp`` [P, R] towards the reference ``ref`` [P, R]."""
    p = logp.exp()
    reward, kl = (p * table).sum(1).mean(), (p * (logp - ref)).sum(1).mean()
    return Worth((reward - beta * kl).item(), reward.item(), kl.item())


def best(ref: Tensor, table: Tensor, beta: float) -> Tensor:
    """log pi* [P, R]; its worth is beta log Z."""
    return (ref + table / beta).log_softmax(1)


class Outcome(NamedTuple):
    """What the policy of a run is worth, what it was worth at the start, and what the best is."""

    at_start: Worth
    worth: Worth
    best: Worth

    @property
    def left(self) -> float:
        """Share of the way to the optimum that is not gone: (J* - J) / (J* - J at the start)."""
        return (self.best.value - self.worth.value) / (self.best.value - self.at_start.value)


def learn(
    folder: Path, seed: int, estimator: str, *, beta: float = 0.3, **settings: Any
) -> Outcome:
    """Train on the world of ``seed`` with `train_ppo`, in ``folder``, and measure exactly.

    ``settings`` of PPOConfig go before those here: few updates of many samples, each learnt from
    four times over. The critic's advantages are not whitened: near the optimum they vanish, and
    scaled to deviation 1 would be noise. REINFORCE++ scales them so, and has no baseline but the
    mean of the batch: it gets twice the updates of twice the samples, each learnt from once. A
    small beta asks for a policy too sharp for this network, even with exact gradients. No charts
    are drawn, which would take as long as the run.
    """
    from prefopt import Policy
    from prefopt.online import train_ppo
    from prefopt.online_config import KLConfig, PPOConfig
    from prefopt.rundir import RunDir

    config: dict[str, Any] = {
        "temperature": 0.7, "kl": KLConfig(beta=beta), "lr": 4e-3, "max_steps": 60,
        "batch_size": 16, "samples_per_prompt": 64, "ppo_epochs": 4, "minibatches": 4,
        "micro_tokens": 100_000, "slots": 1024, "max_new_tokens": LONGEST, "max_length": 8,
        "eval_fraction": 0.0, "samples": 0, "save_every": 0, "template": "plain", "seed": seed,
    }  # fmt: skip
    if estimator == "gae":
        config |= {"whiten_advantages": False, "value_coef": 0.5}
    if estimator == "reinforce++":
        config |= {"samples_per_prompt": 128, "slots": 2048, "max_steps": 120, "ppo_epochs": 1}
    config |= settings
    model = make_world(folder / "model", seed)
    policy = Policy.from_pretrained(model, dtype="float32", attention="padded")
    table, tau = reward_table(seed), config["temperature"]
    ref = response_logprobs(policy.model, policy.tokenizer, tau)
    prompts = list(PROMPTS) * (config["batch_size"] // len(PROMPTS))
    config |= {"estimator": estimator, "epochs": config["max_steps"], "out": str(folder / "run")}
    with mock.patch.object(RunDir, "report"):
        train_ppo(policy, prompts, TableReward(table), PPOConfig(**config), quiet=True)
    after = response_logprobs(policy.model, policy.tokenizer, tau)
    return Outcome(*(worth(x, ref, table, beta) for x in (ref, after, best(ref, table, beta))))
