"""A tiny case of online reinforcement learning: a random Llama that knows 32 words, prompts, a
reward, and what a finished run left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from prefopt import LoraConfig, Message, Policy, PPOConfig, train_ppo
from prefopt.durable import load_tensors
from prefopt.experience import Experience
from prefopt.online_loop import Loop
from prefopt.rundir import RunDir

WORDS = 32
EOS = 2
LORA = LoraConfig(r=4, alpha=8)
PROMPTS = [
    [Message("user", " ".join(f"w{3 + (7 * i + j * j) % (WORDS - 3)}" for j in range(1 + i % 5)))]
    for i in range(9)
]
TIMES = ("seconds/", "elapsed_s", "peak_memory", "tokens_per_s")
SETTINGS: dict[str, Any] = {
    "batch_size": 3, "max_new_tokens": 8, "max_length": 32, "eval_fraction": 0.0, "max_steps": 2,
    "lr": 3e-3, "slots": 64, "template": "plain", "save_every": 1, "samples": 2, "stop_ids": [2, 9],
}  # fmt: skip


def write_case(folder: Path, **options: Any) -> Path:
    """A model folder; its weights are so large that its distributions are far from flat."""
    torch.manual_seed(options.pop("seed", 0))
    sizes = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "tie_word_embeddings": False,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn(p.shape))
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": EOS} | {f"w{i}": i for i in range(3, WORDS)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def even_words(prompts: list[list[Message]], responses: list[str]) -> list[float]:
    """More for even words, and something for the number of the prompt's words."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        numbers = [int(word[1:]) for word in response.split() if word[1:].isdigit()]
        even = sum(number % 2 == 0 for number in numbers)
        found.append(even - 0.3 * len(numbers) + 0.1 * len(prompt[0].content.split()))
    return found


def policy_of(base: Path, lora: LoraConfig | None = LORA, **options: Any) -> Policy:
    torch.manual_seed(0)
    return Policy.from_pretrained(base, lora=lora, device="cpu", **options)


def config_of(out: Path, **settings: Any) -> PPOConfig:
    return PPOConfig(out=str(out), **{**SETTINGS, **settings})


def train(base: Path, out: Path, reward: Any = even_words, **given: Any) -> Any:
    """A run from the start, or one that goes on (resume="auto"); the Run."""
    extra = {k: given.pop(k) for k in ("reward_weights", "held_out_reward") if k in given}
    lora, prompts = given.pop("lora", LORA), given.pop("prompts", PROMPTS)
    policy = policy_of(base, lora, **given.pop("load", {}))
    return train_ppo(policy, prompts, reward, config_of(out, **given), quiet=True, **extra)


@dataclass
class Done:
    """What one update did: weights after it by role and name, its samples, its row."""

    weights: dict[str, torch.Tensor]
    exp: Experience
    row: dict[str, float]
    numbers: list[int]


def one_update(base: Path, out: Path, reward: Any = even_words, *, at: int = 1, **settings) -> Done:
    """Of update number ``at``, the last one of a run."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "report", lambda self: None)
        finish = Loop.finish
        patch.setattr(Loop, "finish", lambda loop, u: (seen.append((loop, u)), finish(loop, u)))
        train(base, out, reward, **{"max_steps": at, "save_every": 0, **settings})
    loop, update = seen[-1]
    models = {"policy": loop.policy, "value": loop.learner.critic}
    weights = {
        f"{role}/{name}": p.detach().clone()
        for role, model in models.items() if model is not None
        for name, p in model.trainable(role)
    }  # fmt: skip
    return Done(weights, update.exp, update.figures, update.numbers)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, without what a clock or the machine says."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES) and
             not k.endswith(TIMES)} for row in rows]  # fmt: skip


def left_behind(out: Path) -> dict[str, Any]:
    """All that a run wrote which does not depend on the clock, the last checkpoint too."""
    found: dict[str, Any] = {
        name: rows_of(out / f"{name}.jsonl") for name in ("metrics", "samples", "alarms")
    }
    for file in sorted(out.glob("model/*")) + sorted(out.glob("critic/*")):
        found[str(file.relative_to(out))] = file.read_bytes()
    if (out / "evaluation.json").exists():
        found["evaluation"] = json.loads((out / "evaluation.json").read_text())
    name = (out / "checkpoints" / "latest").read_text().strip()
    last = out / "checkpoints" / name
    found["checkpoint"] = name
    for file in sorted(last.glob("*.safetensors")):
        found[f"checkpoint/{file.name}"] = {
            k: v.numpy().tobytes() for k, v in load_tensors(file).items()
        }
    found["state"] = json.loads((last / "state.json").read_text())
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names under which two `left_behind` differ."""
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))
