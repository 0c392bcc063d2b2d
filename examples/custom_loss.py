"""A preference loss of your own: a function of a few lines, in Python and on the command line.

    python examples/custom_loss.py
    cd examples && prefopt dpo --loss custom_loss:squared --loss.target 2 --out runs/squared
    cd examples && prefopt dpo --loss "custom_loss:squared + 0.2*sft" --out runs/both

Anything from `PairLogps` to one number per pair is a loss. Its keyword arguments are its options.
"""

import tempfile

import prefopt


def squared(p, *, beta=0.1, target=1.0):
    """(beta m - target)^2 [B]: pull every margin to one size, neither less nor more."""
    return (beta * p.margin - target) ** 2


def likelier(p):
    """-log pi(y_w) / |y_w| + log pi(y_l) / |y_l| [B]: without a reference."""
    return -p.chosen / p.chosen_len + p.rejected / p.rejected_len


likelier.reference_free = True  # so no reference log-probs are computed


def main():
    pairs = prefopt.load_preferences(
        [
            {"prompt": f"Add {i} and 1.", "chosen": f"Gladly! It is {i + 1}.", "rejected": "No."}
            for i in range(40)
        ]
    )
    for loss in (squared, likelier, "0.5*dpo + 0.5*ipo"):
        policy = prefopt.Policy.from_pretrained("embedded", lora=prefopt.LoraConfig(r=4))
        with tempfile.TemporaryDirectory() as folder:
            config = prefopt.TrainConfig(folder, epochs=3, lr=1e-3, samples=0, save_every=0)
            run = prefopt.train(prefopt.DPO(loss), policy, pairs, config, quiet=True)
            first, *_, last = (row["loss"] for row in run.metrics if "loss" in row)
        print(f"{getattr(loss, '__name__', loss):>18}: loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
