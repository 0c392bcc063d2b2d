"""DPO with nothing but the functional core: your model, your loop, two functions of prefopt.

    python examples/dpo_by_hand.py --model path/to/a/causal/model

`token_logprobs` goes from hidden states to log-probs without ever holding the logits, `losses.dpo`
from log-probs to a loss. Everything else here is plain torch and transformers.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefopt

PAIRS = [  # prompt, better, worse
    ("Hi! Tell me the capital of Peru.", "Certainly! It is Lima.", "Look it up."),
    ("Can you work out 2 minus 1?", "Gladly! It is 1.", "Not you again."),
    ("My plant is dying.", "I am sorry. You could give it more light.", "So what."),
]


def summed_logprobs(model, prompt, response):
    """log pi(response | prompt), []: the hidden state before each token predicts that token."""
    ids = torch.tensor([prompt + response])
    hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
    return prefopt.token_logprobs(hidden, model.lm_head.weight, torch.tensor(response)).sum()


def pair_logps(policy, reference, pairs):
    """What every preference loss takes: log-probs of both responses under both models, [B] each."""
    rows = []
    for prompt, better, worse in pairs:
        logps = [summed_logprobs(policy, prompt, r) for r in (better, worse)]
        with torch.no_grad():
            logps += [summed_logprobs(reference, prompt, r) for r in (better, worse)]
        rows.append(torch.stack([*logps, *map(torch.tensor, (len(better), len(worse)))]))
    return prefopt.PairLogps(*torch.stack(rows, 1))


def main():
    embedded = Path(prefopt.__file__).parent / "assets" / "model"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded))
    path = parser.parse_args().model

    tokenizer = AutoTokenizer.from_pretrained(path)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    end = [tokenizer.eos_token_id]
    pairs = [
        (tokenizer(prompt).input_ids, *(tokenizer(x).input_ids + end for x in responses))
        for prompt, *responses in PAIRS
    ]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    for step in range(10):
        p = pair_logps(policy, reference, pairs)
        loss = prefopt.losses.dpo(p, beta=0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.4f}  margin {0.1 * p.margin.mean().item():.4f}")


if __name__ == "__main__":
    main()
