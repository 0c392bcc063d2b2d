"""Iterative DPO with a Python function as the reward: two rounds on the tiny model in the package.

    python examples/iterative_dpo.py [OUT]

Each round samples answers to the prompts, pairs the best with the worst by the reward, trains on
the pairs, and goes on from what came out. OUT (default runs/iterative) has rounds.json, and a run
folder per round with report.html and pairs.jsonl, whose rows say where each pair came from.
"""

import sys

from prefopt import TrainConfig, load_preferences
from prefopt.data.prompts import load_prompts
from prefopt.loading import EMBEDDED
from prefopt.rounds import iterate

POLITE = ("please", "glad", "happy", "thank", "sure", "of course", "welcome", "sorry")


def politeness(prompts, responses):
    """How many polite words a response has, at most two: a reward without a limit is gamed."""
    return [min(2, sum(word in text.lower() for word in POLITE)) for text in responses]


def main(out: str) -> None:
    pairs = load_preferences(EMBEDDED / "preferences.jsonl.gz")
    prompts = load_prompts(pairs[:160])
    config = TrainConfig(
        out, lr=3e-3, epochs=2, max_length=256, eval_fraction=0.25, save_every=0, samples=0
    )
    rounds = iterate(
        "embedded", prompts, politeness, config, rounds=2, samples=4, max_new_tokens=32
    )
    for result in rounds:
        print(result.dir, result.row["held_out"]["rewards"] if not result.stopped else "stopped")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/iterative")
