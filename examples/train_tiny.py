"""Makes `prefopt/assets`, the tiny model and its preference pairs, from nothing.

    python examples/train_tiny.py                    # ten to fifteen minutes on one core
    python examples/train_tiny.py --out runs/tiny --steps 50

One seed decides everything: the same machine writes the same bytes again. Kept simple on purpose:
the corpus is drawn afresh instead of read in epochs, the loss is on the answers only, training is
in float32 and the weights are stored in bfloat16.

Shapes: B rows of L tokens, each row packed with whole conversations.
"""

import argparse
import gzip
import io
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save
from tiny_corpus import Message, conversations, preference_pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

ASSETS = Path(__file__).parents[1] / "prefopt" / "assets"
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, EOS = range(3)
IGNORE = -100  # transformers' label of a position that is not trained on

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

VOCABULARY = 2048
CONTEXT = 512
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


# --- tokenizer -----------------------------------------------------------------------------------


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE on the corpus itself; the special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = islice(conversations(seed), 20_000)
    texts = (message["content"] for messages in sample for message in messages)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(messages: list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A conversation's tokens, as `CHAT_TEMPLATE` writes them, and its labels: answers and EOS."""
    ids, labels = [BOS], [IGNORE]
    for message in messages:
        role = SPECIAL.index(f"<|{message['role']}|>")
        content = tokenizer.encode(message["content"]).ids
        answer = message["role"] == "assistant"
        turn = [role, *content, *([EOS] if answer else [])]
        ids += turn
        labels += [IGNORE, *turn[1:]] if answer else [IGNORE] * len(turn)
    return ids, labels


# --- batches -------------------------------------------------------------------------------------


def packed_rows(seed: int, tokenizer: Tokenizer, length: int) -> Iterator[list[list[int]]]:
    """Rows [3, L] of whole conversations: ids, labels, and positions from 0 in each of them."""
    row = [[], [], []]
    for messages in conversations(seed):
        ids, labels = encode(messages, tokenizer)
        room = length - len(row[0])
        if len(ids) > room:
            filling = [PAD] * room, [IGNORE] * room, range(room)
            yield [[*column, *more] for column, more in zip(row, filling, strict=True)]
            row = [[], [], []]
        for column, more in zip(row, (ids, labels, range(len(ids))), strict=True):
            column.extend(more)


def batches(seed: int, tokenizer: Tokenizer, rows: int, length: int) -> Iterator[torch.Tensor]:
    """Endless [3, B, L]: token ids, labels, positions."""
    stream = packed_rows(seed, tokenizer, length)
    while True:
        yield torch.tensor([next(stream) for _ in range(rows)]).transpose(0, 1)


# --- training ------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_model(batch: Iterator[torch.Tensor], steps: int, peak: float) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        ids, labels, positions = next(batch)
        # Positions that start again at 0 tell transformers where a packed conversation ends.
        loss = model(ids, labels=labels, position_ids=positions, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:5.0f} s", flush=True)
    return model


# --- assets --------------------------------------------------------------------------------------


def write_json(path: Path, content: dict | list) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_model(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """A folder that transformers loads: bfloat16 weights, the tied head stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    write_json(folder / "generation_config.json", ids)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = "bfloat16"
    model.config.to_json_file(folder / "config.json")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[PAD],
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def write_pairs(path: Path, pairs: list[dict]) -> None:
    """JSON lines, gzipped without a time stamp or a file name."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as file:
        for pair in pairs:
            file.write((json.dumps(pair) + "\n").encode())
    path.write_bytes(buffer.getvalue())


def all_pairs(seed: int) -> list[dict]:
    return preference_pairs(seed, 2_000, "train") + preference_pairs(seed, 300, "test")


def demo_prompts(pairs: list[dict]) -> list[list[Message]]:
    """The first test prompt of each of these kinds that is a single message."""
    kinds = ["capital", "sum", "rhyme", "task", "list", "worry", "unsafe", "name"]
    single = [pair for pair in pairs if pair["split"] == "test" and len(pair["prompt"]) == 1]
    return [next(pair["prompt"] for pair in single if pair["kind"] == kind) for kind in kinds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=24, help="rows of a batch")
    parser.add_argument("--length", type=int, default=160, help="tokens of a row")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1, help="the bytes depend on it")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    tokenizer = train_tokenizer(args.seed)
    stream = batches(args.seed, tokenizer, args.rows, args.length)
    model = train_model(stream, args.steps, args.lr)
    write_model(args.out / "model", model, tokenizer)
    pairs = all_pairs(args.seed)
    write_pairs(args.out / "preferences.jsonl.gz", pairs)
    write_json(args.out / "demo_prompts.json", demo_prompts(pairs))
    print(f"{model.num_parameters():,} parameters, {len(pairs):,} pairs in {args.out}")


if __name__ == "__main__":
    main()
