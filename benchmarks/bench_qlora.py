"""Peak memory of a QLoRA DPO step on 1.5 billion parameters: prefopt against TRL, on CPU.

    PYTHONPATH=.:kernels python benchmarks/bench_qlora.py ../shared/data/hh_harmless.jsonl.gz

The model has the shape of Qwen2.5-1.5B and random weights in bfloat16, in shards as on the hub
(3 GB on disk, written to --work and left there). Each side is a process of its own: it loads the
model, adds LoRA of rank 16 to every linear layer and trains one step on the same pair of real text,
reference pass included, without gradient checkpointing. "4-bit" is NF4 with double quantisation:
prefopt quantises while it reads, TRL gets transformers' BitsAndBytesConfig.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Clock,
    environment,
    peak_rss_bytes,
    report,
    run_worker,
    table,
    versions,
    write_result,
)
from dpo_sides import ALPHA, BETA, LR, RANK, read_pairs, train_tokenizer

SIDES = ("prefopt 4-bit", "prefopt bfloat16", "trl 4-bit", "trl bfloat16")
MAX_LENGTH = 512


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: the model folder, and the first pair of HH with both responses in full."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = Path(job["model"])
    pairs = read_pairs(job["data"])
    tokenizer = train_tokenizer([m["content"] for p in pairs for side in p.values() for m in side])

    def tokens(chat: list[dict[str, str]]) -> int:
        return len(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"])

    lengths = [max(tokens(p["prompt"] + p[side]) for side in ("chosen", "rejected")) for p in pairs]
    at = next(i for i, length in enumerate(lengths) if 200 <= length <= 300)
    (Path(job["work"]) / "pair.json").write_text(json.dumps(pairs[at]))
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        config = Qwen2Config(
            vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
            num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=2048,
            tie_word_embeddings=True, eos_token_id=0, bos_token_id=None, pad_token_id=1,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
        tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"tokens of the longer sequence": lengths[at], "bytes of weights": size}


def prefopt_side(job: dict[str, Any], four_bit: bool) -> dict[str, Any]:
    from dataclasses import replace

    import torch

    import prefopt

    began = time.perf_counter()
    policy = prefopt.Policy.from_pretrained(
        job["model"], lora=prefopt.LoraConfig(r=RANK, alpha=ALPHA), dtype="bfloat16",
        device="cpu", quantize="nf4" if four_bit else None,
    )  # fmt: skip
    loaded, after = time.perf_counter() - began, peak_rss_bytes()
    pairs = prefopt.load_preferences([json.loads((Path(job["work"]) / "pair.json").read_text())])
    encoded = prefopt.encode_pairs(pairs, policy.tokenizer, max_length=MAX_LENGTH)
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=LR, weight_decay=0.0)
    clock = Clock()
    clock.start()
    [batch] = prefopt.pack(encoded, max_tokens=2048, layout=policy.layout)
    with torch.no_grad(), policy.reference():
        batch = replace(batch, ref_logprobs=policy(batch))
    stats = prefopt.optimizer_step(policy, prefopt.DPO(beta=BETA), [batch], optimizer)
    clock.stop()
    return {"load_s": loaded, "load_peak": after, "loss": stats.loss.item()} | clock.figures()


def trl_side(job: dict[str, Any], four_bit: bool) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from trl import DPOConfig, DPOTrainer

    began = time.perf_counter()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    options = {"quantization_config": quantization, "device_map": "cpu"} if four_bit else {}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16, **options)
    loaded, after, clock = time.perf_counter() - began, peak_rss_bytes(), Clock()

    class Timer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            clock.start()

        def on_step_end(self, args, state, control, **kw):
            clock.stop()

    config = DPOConfig(
        output_dir=job["work"] + "/trl", per_device_train_batch_size=1, max_length=MAX_LENGTH,
        max_steps=1, beta=BETA, learning_rate=LR, gradient_checkpointing=False, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", eval_strategy="no", logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    pair = json.loads((Path(job["work"]) / "pair.json").read_text())
    trainer = DPOTrainer(
        model=model,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=Dataset.from_list([pair]),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Timer()],
    )
    trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return {"load_s": loaded, "load_peak": after, "loss": loss} | clock.figures()


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: one side, from loading to the end of its step."""
    import torch

    torch.set_num_threads(job["threads"])
    name, _, weights = job["name"].partition(" ")
    side = prefopt_side if name == "prefopt" else trl_side
    return side(job, weights == "4-bit") | {"peak_rss": peak_rss_bytes()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", help="HH-RLHF pairs: hh_harmless.jsonl.gz")
    add("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    add("--threads", type=int, default=os.cpu_count())
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "prefopt-bench-qlora")
    add("--out", type=Path, default=RESULTS / "bench_qlora.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not Path(args.data).exists():
        print(f"skipped: {args.data} is not there; give the path of hh_harmless.jsonl.gz")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    job = {"work": str(args.work), "threads": args.threads, "model": str(args.work / "model")}
    data = run_worker(
        __file__, job | {"side": "prepare", "data": args.data}, log=args.work / "prepare.log"
    )
    runs = {}
    for name in args.sides:
        log = args.work / f"{name.replace(' ', '-')}.log"
        runs[name] = run_worker(__file__, job | {"side": "measure", "name": name}, log=log)
        print(name, {k: round(v, 4) for k, v in runs[name].items()}, flush=True)
    header = ["", "load s", "peak GB of loading", "step s", "peak GB", "first loss", "others"]
    rows = [
        [
            name, f"{run['load_s']:.1f}", f"{run['load_peak'] / 1e9:.2f}", f"{run['seconds']:.2f}",
            f"{run['peak_rss'] / 1e9:.2f}", f"{run['loss']:.6f}", f"{run['others']:.0%}",
        ]
        for name, run in runs.items()
    ]  # fmt: skip
    print(f"{data}\n{table(header, rows)}")
    packages = versions("torch", "transformers", "trl", "peft", "bitsandbytes")
    result = {"data": data, "runs": runs, "packages": packages, "environment": environment()}
    write_result(args.out, result)
    print(f"written: {args.out}")


WORKERS = {"prepare": prepare, "measure": measure}

if __name__ == "__main__":
    if "--worker" in sys.argv:
        task = json.loads(sys.argv[sys.argv.index("--worker") + 1])
        report(WORKERS[task["side"]](task))
    else:
        main()
