"""How much memory the weights of four roles take beside one base.

    PYTHONPATH=.:kernels python benchmarks/bench_roles.py [STORIES260K]

Policy, reference, critic and reward model: three LoRA adapters (r 16 on every linear layer, in
float32) on one base, the reference being the base itself. Bytes are those of all parameters and
buffers, each storage once; "one base" is that model without adapters. The models have the shapes
of SmolLM2-135M and of Qwen2.5-1.5B and random weights; the third is real, a model folder (default
../shared/models/stories260K), left out where there is none. Checked beside it: a shared reward
model scores what it scores alone, and the policy's log-probs are bitwise those without other roles.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, environment, table, write_result

from prefopt import LoraConfig, Message, Policy, pack
from prefopt.data.encode import Encoded
from prefopt.reward_model import RewardModel
from prefopt.roles import add_critic

LORA = LoraConfig(r=16, alpha=16)
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "Qwen2.5-1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    },
}  # fmt: skip
CASES = [("float32", None), ("bfloat16", None), ("bfloat16", "nf4")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    stories = ROOT.parent / "shared" / "models" / "stories260K"
    parser.add_argument("stories", nargs="?", type=Path, default=stories)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        folders = {"stories260K": args.stories} if args.stories.is_dir() else {}
        for name in [*folders, *SHAPES]:
            folder = folders.get(name) or write_model(Path(work) / name, SHAPES[name])
            for dtype, quantize in CASES:
                if not (name == "Qwen2.5-1.5B" and dtype == "float32"):  # 6 GB, and nothing new
                    rows.append({"model": name, **measure(folder, dtype, quantize, Path(work))})
            if name in SHAPES:
                shutil.rmtree(folder)
    write_result(RESULTS / "bench_roles.json", {"environment": environment(), "rows": rows})
    shown = [
        [f"{r['model']}, {r['weights']}", *(f"{r[key] / 1e6:,.2f}" for key in ("one", "four")),
         f"{r['four'] / r['one']:.3f}", f"{r['difference']:.2g}"]
        for r in rows
    ]  # fmt: skip
    print(table(["", "one base, MB", "four roles, MB", "times", "score difference"], shown))


def write_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A Llama of this shape with random weights in bfloat16, and the embedded tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prefopt.loading import EMBEDDED

    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = LlamaConfig(**shape, **ids, tie_word_embeddings=True, max_position_embeddings=2048)
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    AutoTokenizer.from_pretrained(EMBEDDED / "model").save_pretrained(folder)
    return folder


def measure(folder: Path, dtype: str, quantize: str | None, work: Path) -> dict[str, Any]:
    """Bytes of one base and of four roles; how far a score is from that of the model alone."""
    options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "device": "cpu"}
    one = size(Policy.from_pretrained(folder, **options))
    torch.manual_seed(0)
    trained = Policy.from_pretrained(folder, head="score", lora=LORA, **options)
    disturb(trained, "policy")
    shutil.rmtree(work / "reward", ignore_errors=True)
    trained.save_pretrained(work / "reward")
    del trained
    alone = RewardModel(work / "reward", device="cpu", dtype=dtype)
    want = alone(*samples())
    del alone

    policy = Policy.from_pretrained(folder, lora=LORA, **options)
    disturb(policy, "policy")
    batch = a_batch(policy)
    with torch.no_grad():
        before = policy(batch)
    add_critic(policy)
    shared = RewardModel(work / "reward", share=policy)
    assert shared.policy is policy, shared.not_shared
    disturb(policy, "value")
    with torch.no_grad():
        assert torch.equal(policy(batch), before) and policy.values(batch).any()
    difference = max(abs(a - b) for a, b in zip(shared(*samples()), want, strict=True))
    return {
        "weights": quantize or dtype, "one": one, "four": size(policy), "difference": difference,
    }  # fmt: skip


def size(policy: Policy) -> int:
    """Bytes of all weights, each storage once."""
    tensors = [*policy.parameters(), *policy.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@torch.no_grad()
def disturb(policy: Policy, role: str) -> None:
    """Away from the start, where an adapter does nothing."""
    torch.manual_seed(1)
    for _, p in policy.trainable(role):
        p.add_(0.01 * torch.randn(p.shape))


def a_batch(policy: Policy):
    ids = torch.arange(3, 40).numpy().astype("int32")
    [batch] = pack([Encoded(ids[:9], (ids[9:20], ids[20:]), 0)], max_tokens=1000)
    return batch


def samples() -> tuple[list[list[Message]], list[str]]:
    prompts = [[Message("user", "Once upon a time")]] * 2
    return prompts, ["there was a little dog.", "the sun shone, and the little girl ran home."]


if __name__ == "__main__":
    main()
