"""PPO on a story teller: happier stories, at a distance from the start that is chosen beforehand.

    python examples/ppo_stories.py MODEL [OUT]

MODEL is the folder of a causal language model that writes stories, such as stories260K in Hugging
Face's format. The reward counts happy words, up to four, and takes off for words that come twice in
a row; beta follows the KL so that it stays near its target. OUT (default runs/ppo-stories) has
report.html, with the same beginnings continued before, on the way and after.
"""

import itertools
import re
import sys

from prefopt import Policy, PPOConfig, load_prompts, train_ppo
from prefopt.online_config import KLConfig

HAPPY = {
    *("happy", "happily", "smile", "smiled", "smiles", "laugh", "laughed", "fun", "love", "loved"),
    *("hug", "hugged", "friend", "friends", "joy", "proud", "kind", "glad", "excited", "best"),
}
NAMES = ("Lily", "Tom", "Max", "Mia", "Ben", "Anna", "Sam", "Lucy", "Tim", "Sue", "Jack", "Amy")
BEGINNINGS = (
    "Once upon a time, there was a little {who} named {name}.",
    "One day, {name} went to the park.",
    "{name} had a big red ball.",
    "{name} and a dog lived in a small house.",
    "It was a sunny day and {name} was outside.",
    "{name} was sad because it was raining.",
    "One morning, {name} found a box.",
    "{name} wanted to bake a cake.",
)


def happiness(prompts, responses):
    """Happy words, at most four of them different, minus words that repeat the one before."""
    scores = []
    for text in responses:
        words = re.findall(r"[a-z']+", text.lower())
        again = sum(a == b for a, b in itertools.pairwise(words))
        scores.append(min(4, len(HAPPY & set(words))) - again)
    return scores


def beginnings():
    for name in NAMES:
        who = "boy" if name in ("Tom", "Max", "Ben", "Sam", "Tim", "Jack") else "girl"
        for text in BEGINNINGS:
            yield text.format(name=name, who=who)


def main(model: str, out: str, **changes) -> None:
    policy = Policy.from_pretrained(model)
    settings = {
        "kl": KLConfig(beta=0.1, target=6.0, horizon=400), "template": "plain",
        "batch_size": 41, "samples_per_prompt": 2, "max_new_tokens": 64, "max_length": 128,
        "lr": 2e-4, "critic_lr": 5e-3, "max_steps": 80, "epochs": 80, "save_every": 0, **changes,
    }  # fmt: skip
    run = train_ppo(policy, load_prompts(list(beginnings())), happiness, PPOConfig(out, **settings))
    rows = [row for row in run.metrics if "eval_scores" in row]
    print(
        f"happy words on held-out beginnings: {rows[0]['eval_scores']:.2f} -> "
        f"{rows[-1]['eval_scores']:.2f} at {rows[-1]['eval_kl']:.1f} nats; {run.dir}/report.html"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "runs/ppo-stories")
