"""SFT, then DPO from what came out of it, with the tiny model and data in the package.

    python examples/sft_then_dpo.py [OUT]

SFT moves all weights towards the preferred answers; DPO then trains an adapter, whose reference is
the model that SFT made. Both get the same pairs, so that both hold out the same prompts. OUT
(default runs/sft_then_dpo) has a run folder for each, with report.html.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from prefopt import DPO, SFT, LoraConfig, Policy, Run, TrainConfig, load_preferences, train
from prefopt.loading import EMBEDDED


def evaluation(run: Run, stage: str) -> dict[str, float]:
    """What a run measured on its held-out prompts, "before" or "after" training."""
    return json.loads((run.dir / "evaluation.json").read_text())[stage]


def main(out: Path) -> None:
    pairs = load_preferences(EMBEDDED / "preferences.jsonl.gz")[:1000]
    shared = TrainConfig(str(out), max_steps=40, max_length=256, samples=2, save_every=0)

    policy = Policy.from_pretrained("embedded")
    sft = train(SFT(), policy, pairs, replace(shared, out=str(out / "sft"), lr=1e-4))
    before, after = (evaluation(sft, stage)["perplexity"] for stage in ("before", "after"))
    print(f"SFT: held-out perplexity {before:.3f} -> {after:.3f}")

    policy = Policy.from_pretrained(sft.dir, lora=LoraConfig(r=8))
    dpo = train(DPO(beta=0.1), policy, pairs, replace(shared, out=str(out / "dpo"), lr=1e-3))
    after = evaluation(dpo, "after")
    low, high = after["accuracy_low"], after["accuracy_high"]
    print(f"DPO: held-out accuracy {after['accuracy']:.1%} [{low:.1%}, {high:.1%}]")
    print(f"model: {dpo.dir / 'model'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sft_then_dpo"))
