"""Pairs per second from JSON lines to packed batches, against TRL's preparation of the same rows.

    PYTHONPATH=.:kernels python benchmarks/bench_data.py ../shared/data/hh_harmless.jsonl.gz

Rows of the size of UltraFeedback's (prompts of about 150 tokens, responses of 250), put together
from turns of HH-RLHF: messages through a ChatML template, and plain strings. Tokenizers: byte-level
BPE of 32,000 tokens at most, trained on the same file, and the embedded model's of 2,048; for plain
strings also that of stories260K, a SentencePiece model, whose text has no words to remember.

prefopt: load_preferences, encode_pairs, pack. TRL: load_dataset, DPOTrainer's preparation, its
collator over all rows in batches of 8 (the trainer itself is made before, on a few rows); with
datasets' processes (dataset_num_proc=2) in another run. Each (side, case, round) is a process of
its own, the sides in turn, with a fresh cache, then with the cache of the first ("again"). Token
ids are compared on the first rows, or nothing is. Memory: the peak of a process that does the same
with 5,000, 20,000 and 60,000 rows (prefopt only), beyond what it had after 500 rows. From 20,000
rows on it starts processes that encode, which are not counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    Clock,
    environment,
    peak_rss_bytes,
    report,
    reset_peak,
    run_worker,
    spread,
    table,
    versions,
    write_result,
)  # fmt: skip

MAX_LENGTH, PACKED, TRL_BATCH, COMPARED = 1024, 8192, 8, 100
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CASES = ("large chat", "large plain", "tiny chat", "tiny plain", "sentencepiece plain")
SIDES = ("trl", "trl 2 processes", "prefopt")


# --- what is compared ----------------------------------------------------------------------------


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: the tokenizers, the rows, and a model of nothing for TRL's trainer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    work = Path(job["work"])
    with gzip.open(job["data"], "rt", encoding="utf-8") as file:
        texts = [text for line in file for text in _sides(json.loads(line))]
    turns = [
        t for text in texts for t in re.split(r"\n\n(?:Human|Assistant): ?", text) if t.strip()
    ]
    _train(texts).save_pretrained(work / "large")
    sources = {"tiny": ROOT / "prefopt/assets/model", "sentencepiece": Path(job["sentencepiece"])}
    for name, source in sources.items():
        if source.exists():
            AutoTokenizer.from_pretrained(source).save_pretrained(work / name)
    tokenizers = {}
    for folder in (work / name for name in ("large", *sources)):
        if not folder.exists():
            continue
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizers[folder.name] = len(tokenizer)
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, **shape)
        LlamaForCausalLM(config).save_pretrained(folder)
    for form in ("chat", "plain"):
        with (work / f"{form}.jsonl").open("w") as file:
            for row in _rows(turns, job["rows"], form):
                file.write(json.dumps(row) + "\n")
    return {"rows": job["rows"], "vocabularies": tokenizers}


def _sides(row: dict[str, str]) -> tuple[str, str]:
    return row["chosen"], row["rejected"]


def _train(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _rows(turns: list[str], number: int, form: str) -> Any:
    chance = random.Random(0)

    def some(tokens: float) -> str:
        out: list[str] = []
        while sum(map(len, out)) < 4.3 * tokens:
            out.append(chance.choice(turns))
        return " ".join(out)

    for _ in range(number):
        prompt = some(130 * chance.lognormvariate(-0.2, 0.6))
        sides = [some(230 * chance.lognormvariate(-0.15, 0.5)) for _ in range(2)]
        names = ("prompt", "chosen", "rejected")
        row = dict(zip(names, (prompt, *sides), strict=True))
        if form == "chat":
            roles = dict(zip(names, ("user", "assistant", "assistant"), strict=True))
            yield {k: [{"role": roles[k], "content": text}] for k, text in row.items()}
        else:
            yield row


# --- the sides -----------------------------------------------------------------------------------


def trl_side(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: load_dataset, DPOTrainer's preparation, its collator over all rows."""
    os.environ.pop("TOKENIZERS_PARALLELISM", None)  # what a user would have
    os.environ["HF_DATASETS_CACHE"] = job["cache"]
    import torch

    torch.set_num_threads(1)
    from datasets import Dataset, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = DPOConfig(
        output_dir=job["work"] + "/trl", max_length=MAX_LENGTH, use_cpu=True, report_to="none",
        dataset_num_proc=job["processes"],
    )  # fmt: skip
    with open(job["rows"]) as file:
        few = [json.loads(line) for line, _ in zip(file, range(8), strict=False)]
    trainer = DPOTrainer(
        model=job["tokenizer"], args=config, train_dataset=Dataset.from_list(few),
        processing_class=tokenizer,
    )  # fmt: skip
    clock = Clock()
    clock.start()
    data = load_dataset("json", data_files=job["rows"], split="train")
    data = trainer._prepare_dataset(data, tokenizer, config, "train")
    for start in range(0, len(data), TRL_BATCH):
        last = min(start + TRL_BATCH, len(data))
        trainer.data_collator(data.__getitems__(list(range(start, last))))
    clock.stop()
    ids = [
        [(row["prompt_ids"] + row[f"{side}_ids"])[:MAX_LENGTH] for side in ("chosen", "rejected")]
        for row in data.select(range(COMPARED))
    ]
    return clock.figures() | {"kept": len(data), "peak_rss": peak_rss_bytes(), "ids": ids}


def prefopt_side(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: load_preferences, encode_pairs, pack."""
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    import torch

    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    from prefopt import encode_pairs, load_preferences, pack

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    template = "chat" if job["form"] == "chat" else "plain"
    options = {"max_length": MAX_LENGTH, "template": template, "cache": Path(job["cache"])}

    def run(path: str, **options: Any) -> Any:
        encoded = encode_pairs(load_preferences(path), tokenizer, **options)
        for _ in pack(encoded, max_tokens=PACKED):
            pass
        return encoded

    few = Path(job["work"]) / "few.jsonl"
    with open(job["rows"]) as file:
        few.write_text("".join(line for line, _ in zip(file, range(500), strict=False)))
    run(str(few), **options | {"cache": None})
    before = reset_peak()
    clock = Clock()
    clock.start()
    encoded = run(job["rows"], **options)
    clock.stop()
    items = {item.index: item for item in encoded[: COMPARED + 50]}
    ids = [
        [[*items[i].prompt.tolist(), *r.tolist()] for r in items[i].responses]
        if i in items
        else None
        for i in range(COMPARED)
    ]
    tokens = float(encoded.sizes.mean())
    facts = {"kept": len(encoded), "tokens": tokens, "ids": ids, "counts": encoded.counts}
    peak = peak_rss_bytes()
    return clock.figures() | facts | {"peak_rss": peak, "grown": peak - before}


WORKERS = {"prepare": prepare, "trl": trl_side, "prefopt": prefopt_side}


# --- the comparison ------------------------------------------------------------------------------


def timed(args: argparse.Namespace, case: str, side: str, number: int) -> list[dict[str, Any]]:
    """The first run and the one with its cache."""
    name, form = case.split()
    cache = args.work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    job = {
        "side": side.split()[0], "work": str(args.work), "cache": str(cache), "threads": 1,
        "tokenizer": str(args.work / name), "rows": str(args.work / f"{form}.jsonl"),
        "form": form, "processes": 2 if "processes" in side else None,
    }  # fmt: skip
    runs = []
    for again in (False, True):
        run = run_worker(__file__, job, log=args.work / f"{side.split()[0]}.log")
        run |= {"case": case, "side": side, "round": number, "again": again}
        run["pairs_per_s"] = args.rows / run["seconds"]
        runs.append(run)
        print(
            f"round {number} {case:20} {side:16} {'again' if again else 'first'}"
            f" {run['pairs_per_s']:8.0f} pairs/s, {1e6 * run['cpu_seconds'] / args.rows:6.0f} us of"
            f" own CPU a pair, others {run['others']:.0%}",
            flush=True,
        )
    return runs


def check_ids(case: str, ours: list[Any], theirs: list[Any]) -> int:
    """How many of the first rows have the same ids on both sides; SystemExit unless all have.

    TRL keeps the line break that a template writes behind the last EOS, and drops other rows.
    """
    same = 0
    theirs_left = iter(theirs)
    for mine in ours:
        if mine is None:
            continue
        for other in theirs_left:
            if all(
                b[: len(a)] == a and len(b) - len(a) < 2 for a, b in zip(mine, other, strict=True)
            ):
                same += 1
                break
    if same < sum(mine is not None for mine in ours) * 0.95:
        raise SystemExit(f"{case}: the token ids differ, {same} of {len(ours)} rows are the same")
    return same


def run_rounds(args: argparse.Namespace) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    for number in range(1, args.rounds + 1):
        for case in args.cases:
            own = [run for side in SIDES for run in timed(args, case, side, number)]
            ids = {run["side"]: run.pop("ids") for run in own}
            same = check_ids(case, ids["prefopt"], ids["trl"])
            runs += [run | {"rows_compared": same} for run in own]
    return runs


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks over the number of rows: the rows of the comparison, again and again, numbered."""
    found = []
    lines = (args.work / "chat.jsonl").read_text().splitlines()
    for rows in args.memory_rows:
        path = args.work / "many.jsonl"
        with path.open("w") as file:
            for i in range(rows):
                row = json.loads(lines[i % len(lines)])
                row["chosen"][0]["content"] += f" {i}"
                file.write(json.dumps(row) + "\n")
        shutil.rmtree(args.work / "cache", ignore_errors=True)
        job = {
            "side": "prefopt", "work": str(args.work), "cache": str(args.work / "cache"),
            "tokenizer": str(args.work / "large"), "rows": str(path), "form": "chat", "threads": 1,
        }  # fmt: skip
        run = run_worker(__file__, job, log=args.work / "memory.log")
        figures = {key: run[key] for key in ("peak_rss", "grown", "seconds")} | {"rows": rows}
        found.append(figures | {"file_bytes": path.stat().st_size})
        path_mb = path.stat().st_size / 1e6
        path.unlink()
        print(
            f"{rows:,} rows, {path_mb:.0f} MB: peak {run['peak_rss'] / 1e6:.0f} MB,"
            f" {run['grown'] / 1e6:.0f} MB beyond that of 500 rows",
            flush=True,
        )
    return found


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per case each side's pairs/s, and prefopt over each TRL in the same round, medians."""
    summary: dict[str, Any] = {}
    for case in dict.fromkeys(run["case"] for run in runs):
        part = summary[case] = {}
        for again in (False, True):
            own = [run for run in runs if (run["case"], run["again"]) == (case, again)]
            sides = {side: [r for r in own if r["side"] == side] for side in SIDES}
            name = "again" if again else "first"
            part[name] = {
                side: spread([r["pairs_per_s"] for r in rounds]) for side, rounds in sides.items()
            }
            for theirs in SIDES[:2]:
                part[name][f"prefopt over {theirs}"] = statistics.median(
                    a["pairs_per_s"] / b["pairs_per_s"]
                    for a, b in zip(sides["prefopt"], sides[theirs], strict=True)
                )
    return summary


def show(summary: dict[str, Any]) -> None:
    rows = [
        [
            f"{case}, {name}",
            *(f"{part[side]['median']:.0f}" for side in SIDES),
            *(f"{part[f'prefopt over {side}']:.1f}x" for side in SIDES[:2]),
        ]
        for case, parts in summary.items()
        for name, part in parts.items()
    ]
    print(table(["pairs/s", *SIDES, "over trl", "over trl 2 processes"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", help="HH-RLHF pairs: hh_harmless.jsonl.gz")
    add("--rows", type=int, default=4000)
    add("--rounds", type=int, default=3)
    add("--cases", nargs="+", default=list(CASES), choices=CASES)
    add("--memory_rows", nargs="*", type=int, default=[5_000, 20_000, 60_000])
    add("--sentencepiece", default=str(ROOT.parent / "shared" / "models" / "stories260K"))
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "prefopt-bench-data")
    add("--out", type=Path, default=RESULTS / "bench_data.json")
    args = parser.parse_args()
    if not Path(args.data).exists():
        print(f"skipped: {args.data} is not there; give the path of hh_harmless.jsonl.gz")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    job = {"side": "prepare", "work": str(args.work), "data": args.data, "rows": args.rows}
    job |= {"threads": 1, "sentencepiece": args.sentencepiece}
    data = run_worker(__file__, job, log=args.work / "prepare.log")
    args.cases = [case for case in args.cases if case.split()[0] in data["vocabularies"]]
    runs = run_rounds(args)
    summary = summarise(runs)
    show(summary)
    peaks = memory(args)
    settings = {k: v for k, v in vars(args).items() if k in ("rows", "rounds", "cases")}
    packages = versions("transformers", "tokenizers", "trl", "datasets", "torch")
    result = {"settings": settings, "data": data, "summary": summary, "memory": peaks, "runs": runs}
    write_result(args.out, result | {"packages": packages, "environment": environment()})
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        order = json.loads(sys.argv[sys.argv.index("--worker") + 1])
        report(WORKERS[order["side"]](order))
    else:
        main()
