"""GRPO with a reward that can be checked: sums, by the tiny model in the package.

    python examples/grpo_math.py [OUT]

The prompts carry their answer in a column, which the reward takes by its name; a response is worth
1 where the first number in it is the answer, else 0. OUT (default runs/grpo-math) has report.html.
"""

import re
import sys

from prefopt import LoraConfig, Policy, PPOConfig, load_prompts, train_ppo
from prefopt.online_config import KLConfig


def right(prompts, responses, answer):
    """1 where the first number of the response is the answer."""
    found = [re.search(r"\d+", text) for text in responses]
    return [float(bool(m) and m[0] == str(a)) for m, a in zip(found, answer, strict=True)]


def sums():
    """All sums and differences of the numbers up to 10, as questions."""
    for a in range(11):
        for b in range(11):
            yield {"prompt": f"What is {a} plus {b}?", "answer": a + b}
            if a >= b:
                yield {"prompt": f"What is {a} minus {b}?", "answer": a - b}


def main(out: str, **changes) -> None:
    policy = Policy.from_pretrained("embedded", lora=LoraConfig(r=16, alpha=32))
    settings = {
        "estimator": "grpo", "samples_per_prompt": 8, "batch_size": 16, "max_steps": 60,
        "max_new_tokens": 32, "lr": 5e-4, "kl": KLConfig("k3", "loss", 0.02), "ppo_epochs": 1,
        "eval_fraction": 0.2, "epochs": 20, "save_every": 0, **changes,
    }  # fmt: skip
    run = train_ppo(policy, load_prompts(list(sums())), right, PPOConfig(out, **settings))
    scores = [row["eval_scores"] for row in run.metrics if "eval_scores" in row]
    print(f"right on held-out sums: {scores[0]:.0%} -> {scores[-1]:.0%}; {run.dir}/report.html")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/grpo-math")
