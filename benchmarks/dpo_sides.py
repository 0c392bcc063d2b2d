"""The two sides of bench_dpo_step.py, and what both are given; each runs in a process of its own.

The model has the Llama shape of SmolLM2-135M with random weights, the tokenizer is trained on the
pairs themselves: no download, the lengths are those of real text, and neither speed nor memory
depends on what the weights are.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Clock, gemm_rate, peak_rss_bytes

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, VOCAB = 576, 1536, 30, 9, 3, 49152
TOKENIZER_VOCAB = 16384
BATCH, MAX_LENGTH, RANK, ALPHA, BETA, LR = 4, 512, 16, 16, 0.1, 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
GEMMS = [(2048, 2048, 2048), (840, HIDDEN, INTER)]
# How TRL is asked for a dtype: (bf16 autocast, dtype of the weights). The first is its default.
TRL_MODES = {
    "float32": {"float32": (False, "float32")},
    "bfloat16": {
        "autocast": (True, "float32"),
        "autocast, bfloat16 weights": (True, "bfloat16"),
        "bfloat16 weights": (False, "bfloat16"),
    },
}
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' }}{{ m.content }}"
    "{% endfor %}{{ '\n\nAssistant:' if add_generation_prompt else eos_token }}"
)


# --- what both sides are given -------------------------------------------------------------------


def messages(transcript: str) -> list[dict[str, str]]:
    """An HH transcript as chat messages."""
    parts = re.split(r"\n\n(Human|Assistant):", transcript)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": text.strip()}
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def read_pairs(data: str) -> list[dict[str, Any]]:
    """Rows {prompt, chosen, rejected} of messages, for the rows whose two contexts agree."""
    pairs = []
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            chosen, rejected = messages(row["chosen"]), messages(row["rejected"])
            last = chosen[-1], rejected[-1]
            if chosen[:-1] != rejected[:-1] or len(chosen) < 2 or last[0] == last[1]:
                continue
            if all(m["role"] == "assistant" and m["content"] for m in last):
                pairs.append({"prompt": chosen[:-1], "chosen": [last[0]], "rejected": [last[1]]})
    return pairs


def train_tokenizer(texts: list[str]):
    """A byte-level BPE on `texts` with EOS, PAD and a chat template that writes HH transcripts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=TOKENIZER_VOCAB, special_tokens=["<eos>", "<pad>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: writes the model folder, and in pairs.json the pairs that fit, shuffled."""
    work, pairs = Path(job["work"]), read_pairs(job["data"])
    tokenizer = train_tokenizer([m["content"] for p in pairs for side in p.values() for m in side])

    def tokens(chat: list[dict[str, str]], **kw: Any) -> int:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **kw)
        return len(tokenizer(text)["input_ids"])

    fitting = []
    for pair in pairs:
        prompt = tokens(pair["prompt"], add_generation_prompt=True)
        lengths = [tokens(pair["prompt"] + pair[side]) - prompt for side in ("chosen", "rejected")]
        if prompt + max(lengths) <= MAX_LENGTH:
            fitting.append({"pair": pair, "prompt": prompt, "responses": lengths})
    random.Random(0).shuffle(fitting)
    (work / "pairs.json").write_text(json.dumps(fitting))
    write_model(work / "model")
    tokenizer.save_pretrained(work / "model")
    return {
        "pairs": len(fitting),
        "pairs longer than max_length": len(pairs) - len(fitting),
        "mean prompt tokens": sum(x["prompt"] for x in fitting) / len(fitting),
        "mean tokens of both responses": sum(sum(x["responses"]) for x in fitting) / len(fitting),
    }


def write_model(folder: Path) -> None:
    """The model, with random weights, stored in bfloat16 as the real one is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=0, bos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def useful_flops(lengths: list[dict[str, Any]]) -> float:
    """What a LoRA DPO step on pairs of these lengths cannot avoid, multiply-adds counted twice.

    Every prompt token once, and every response token but the last (which predicts nothing), through
    the decoder's matrices three times: reference forward, policy forward, gradient with respect to
    the activations (the base is frozen: none for its weights). The head on the N scored tokens
    only: 2NHV for the reference, 4NHV for the policy. Attention scores, LoRA's own products and
    everything elementwise count as nothing.
    """
    qkvo = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * (HIDDEN // HEADS) * KV_HEADS
    decoder = LAYERS * (qkvo + 3 * HIDDEN * INTER)
    scored = sum(sum(x["responses"]) for x in lengths)
    rows = sum(x["prompt"] + sum(x["responses"]) - len(x["responses"]) for x in lengths)
    return 3 * 2.0 * decoder * rows + 6.0 * HIDDEN * VOCAB * scored


def given(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs of this round, with their lengths in tokens: {pair, prompt, responses}."""
    fitting = json.loads((Path(job["work"]) / "pairs.json").read_text())
    size = BATCH * (1 + job["steps"])
    return fitting[(job["round"] - 1) * size : job["round"] * size]


# --- the sides -----------------------------------------------------------------------------------


def timer(clock: Clock):
    """A trainer's callback: the clock runs from the end of the first step to that of the last."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 1:
                clock.start()
            elif state.global_step == state.max_steps:
                clock.stop()

    return Timer()


def trl_side(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: DPOTrainer over the pairs, timed from the end of the first step to the last."""
    import torch

    torch.set_num_threads(job["threads"])
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    autocast, weights = TRL_MODES[job["dtype"]][job["mode"]]
    clock, precompute = Clock(), Clock()
    share = job["steps"] / (1 + job["steps"])  # of the precompute: not the warm-up's pairs

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args, **kw):
            precompute.start()
            dataset = super()._precompute_ref_logps(*args, **kw)
            precompute.stop()
            return dataset

    config = DPOConfig(
        output_dir=job["work"] + "/trl", per_device_train_batch_size=BATCH, max_length=MAX_LENGTH,
        max_steps=1 + job["steps"], beta=BETA, learning_rate=LR,
        lr_scheduler_type="constant", gradient_checkpointing=False, bf16=autocast,
        model_init_kwargs={"dtype": weights}, train_sampling_strategy="sequential",
        precompute_ref_log_probs=job["reference"] == "precompute", use_cpu=True, report_to="none",
        save_strategy="no", eval_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = Timed(
        model=job["model"],
        args=config,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=Dataset.from_list([x["pair"] for x in given(job)]),
        peft_config=lora,
        callbacks=[timer(clock)],
    )
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    rows = trainer.train_dataset
    clock.add(precompute, share)
    return clock.figures() | {
        "peak_rss": peak_rss_bytes(),
        "prompt_tokens": sum(map(len, rows["prompt_ids"])),
        "response_tokens": sum(len(r[k]) for r in rows for k in ("chosen_ids", "rejected_ids")),
        "losses": [row["loss"] for row in log],
        "chosen_logps": log[0]["logps/chosen"],
    }


def prefopt_side(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: prefopt over the pairs, timed from the end of the first step to the last."""
    import torch

    torch.set_num_threads(job["threads"])
    import prefopt

    lora = prefopt.LoraConfig(r=RANK, alpha=ALPHA, targets=TARGETS)
    policy = prefopt.Policy.from_pretrained(
        job["model"], lora=lora, dtype=job["dtype"], device="cpu"
    )
    pairs = prefopt.load_preferences([x["pair"] for x in given(job)])
    encoded = prefopt.encode_pairs(pairs, policy.tokenizer, max_length=MAX_LENGTH)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    objective, clock = prefopt.DPO(loss="dpo", beta=BETA), Clock()
    losses, chosen_logps, profiler = [], [], None

    for start in range(0, len(encoded), BATCH):
        if start == BATCH:
            profiler = start_profiler() if job["profile"] else None
            clock.start()
        groups = encoded[start : start + BATCH]
        with torch.no_grad(), policy.reference():
            batches = [
                replace(batch, ref_logprobs=policy(batch))
                for batch in prefopt.pack(
                    groups, max_tokens=job["micro_tokens"], layout=policy.layout
                )
            ]
        stats = prefopt.optimizer_step(policy, objective, batches, optimizer, max_norm=1.0)
        losses.append(stats.loss.item())
        chosen_logps.append(stats.metrics["logps/chosen"].item() / stats.count)
    clock.stop()
    if profiler is not None:
        profiler.stop()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
    return clock.figures() | {
        "peak_rss": peak_rss_bytes(),
        "prompt_tokens": sum(len(e.prompt) for e in encoded),
        "response_tokens": sum(len(r) for e in encoded for r in e.responses),
        "losses": losses,
        "chosen_logps": chosen_logps[0],
        "layout": policy.layout,
        "attention": policy.attention_class,
    }


def start_profiler():
    """torch's profiler, running: of operators on the CPU."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU])
    profiler.start()
    return profiler


def gemm_side(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: the machine's GEMM rates in `job["dtype"]`, GFLOP/s by shape."""
    import torch

    torch.set_num_threads(job["threads"])
    return {"x".join(map(str, shape)): gemm_rate(*shape, job["dtype"]) for shape in GEMMS}


WORKERS = {"prepare": prepare, "gemm": gemm_side, "trl": trl_side, "prefopt": prefopt_side}
