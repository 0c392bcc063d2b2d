"""Train a reward model on the data in the package, then score two answers with transformers alone.

    python examples/reward_model.py [OUT]

Half a minute on two CPU cores. OUT (default runs/reward) is a run folder: report.html, and in
model/ a folder for AutoModelForSequenceClassification.
"""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefopt import Policy, TrainConfig, load_preferences, train
from prefopt.loading import EMBEDDED
from prefopt.objectives.reward import Reward

QUESTION = {"role": "user", "content": "Hi! Tell me the capital of Peru."}
ANSWERS = (
    "Of course! The capital of Peru is Lima. Ask me anytime!",
    "That is a silly question. The capital of Peru is Paris. Now go away.",
)


def main(out: str) -> None:
    torch.manual_seed(0)  # draws the new head
    policy = Policy.from_pretrained("embedded", head="score", dtype="float32")
    pairs = load_preferences(EMBEDDED / "preferences.jsonl.gz")[:400]
    config = TrainConfig(out, lr=3e-4, max_length=128, batch_size=16, save_every=0)
    run = train(Reward(center=0.01), policy, pairs, config)
    after = json.loads((run.dir / "evaluation.json").read_text())["after"]
    low, high = after["accuracy_low"], after["accuracy_high"]
    print(f"held-out accuracy {after['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%})")

    # From here on without this library.
    model = AutoModelForSequenceClassification.from_pretrained(run.dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run.dir / "model")
    stats = json.loads((run.dir / "model" / "score_stats.json").read_text())
    texts = [
        tokenizer.apply_chat_template(
            [QUESTION, {"role": "assistant", "content": answer}], tokenize=False
        )
        for answer in ANSWERS
    ]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        scores = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    for answer, score in zip(ANSWERS, scores.tolist(), strict=True):
        print(f"{(score - stats['mean']) / stats['std']:+.2f}  {answer}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/reward")
