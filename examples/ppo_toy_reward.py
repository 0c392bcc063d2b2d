"""PPO with a Python function as the reward: the tiny model in the package learns to be brief.

    python examples/ppo_toy_reward.py [OUT]

The reward is highest for an answer of forty characters. Any function of texts will do: research
code changes `forty` and the line that names it. OUT (default runs/ppo-toy) has report.html.
"""

import sys

from prefopt import LoraConfig, Policy, PPOConfig, load_preferences, load_prompts, train_ppo
from prefopt.loading import EMBEDDED


def forty(prompts, responses):
    """1 for forty characters, less by a fortieth for each that is missing or too many."""
    return [1 - abs(len(text) - 40) / 40 for text in responses]


def main(out: str, **changes) -> None:
    prompts = load_prompts(load_preferences(EMBEDDED / "preferences.jsonl.gz"))
    policy = Policy.from_pretrained("embedded", lora=LoraConfig(r=16, alpha=32))
    settings = {
        "max_new_tokens": 40, "batch_size": 64, "max_steps": 20, "lr": 1e-3, "save_every": 0,
        **changes,
    }  # fmt: skip
    run = train_ppo(policy, prompts, forty, PPOConfig(out, **settings))
    scores = [row["eval_scores"] for row in run.metrics if "eval_scores" in row]
    print(f"score on held-out prompts: {scores[0]:.3f} -> {scores[-1]:.3f}; {run.dir}/report.html")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/ppo-toy")
