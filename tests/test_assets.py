"""The embedded model and preference pairs are what `prefopt/assets/README.md` says they are."""

import gzip
import hashlib
import importlib
import json
import sys
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "prefopt" / "assets"
MODEL = ASSETS / "model"


@cache
def corpus() -> ModuleType:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module("tiny_corpus")
    finally:
        sys.path.pop(0)


@cache
def pairs() -> list[dict]:
    with gzip.open(ASSETS / "preferences.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def split(name: str) -> list[dict]:
    return [pair for pair in pairs() if pair["split"] == name]


@cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@cache
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        MODEL, local_files_only=True, dtype=torch.float32
    ).eval()


def ids(messages: list[dict], prompt: bool = False) -> list[int]:
    return tokenizer().apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=True, return_dict=False
    )


# --- files ---------------------------------------------------------------------------------------


def test_small_and_complete() -> None:
    files = {str(p.relative_to(ASSETS)): p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()}
    expected = {"README.md", "demo_prompts.json", "preferences.jsonl.gz"}
    expected |= {
        f"model/{name}"
        for name in (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    }
    assert set(files) == expected
    assert sum(files.values()) < 4_000_000


def test_gzip_header_carries_no_time() -> None:
    header = (ASSETS / "preferences.jsonl.gz").read_bytes()[:8]
    assert header[:2] == b"\x1f\x8b" and header[3:] == b"\0" * 5


# --- model and tokenizer -------------------------------------------------------------------------


def test_model_loads_with_its_tied_head() -> None:
    loaded = model()
    assert loaded.config.model_type == "llama"
    assert 800_000 < loaded.num_parameters() < 1_300_000
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())


def test_vocabulary_and_special_tokens_agree() -> None:
    config, generation, tok = model().config, model().generation_config, tokenizer()
    assert len(tok) == config.vocab_size == model().get_input_embeddings().num_embeddings
    special = (tok.pad_token_id, tok.bos_token_id, tok.eos_token_id)
    assert len(set(special)) == 3
    for source in (config, generation):
        assert (source.pad_token_id, source.bos_token_id, source.eos_token_id) == special


@pytest.mark.parametrize("text", ["Sure! It is Paris.", " two  spaces\n", "naïve café, 東京 🙂"])
def test_tokenizer_round_trip(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_training_encodes_as_the_chat_template_does() -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        encode = importlib.import_module("train_tiny").encode
    finally:
        sys.path.pop(0)
    for messages in islice(corpus().conversations(7), 50):
        trained, labels = encode(messages, tokenizer().backend_tokenizer)
        assert trained == ids(messages)
        assert all(label in (-100, token) for token, label in zip(trained, labels, strict=True))


def test_a_turn_ends_with_one_eos_and_continues_its_prompt() -> None:
    eos = tokenizer().eos_token_id
    for pair in pairs()[::10]:
        prompt = ids(pair["prompt"], prompt=True)
        assert prompt[0] == tokenizer().bos_token_id
        for answer in ("chosen", "rejected"):
            whole = ids(pair["prompt"] + pair[answer])
            assert whole[: len(prompt)] == prompt
            assert whole[-1] == eos and whole[len(prompt) :].count(eos) == 1


# --- pairs ---------------------------------------------------------------------------------------


def is_conversation(messages: list[dict]) -> bool:
    """An optional system message, then user and assistant in turns, none of them empty."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    alternate = turns == [("user", "assistant")[i % 2] for i in range(len(turns))]
    return alternate and all(message["content"].strip() for message in messages)


def test_every_pair_is_valid() -> None:
    assert len(split("train")) >= 1_500 and len(split("test")) >= 200
    assert len(split("train")) + len(split("test")) == len(pairs())
    for pair in pairs():
        assert pair["chosen"] != pair["rejected"]
        for answer in (pair["chosen"], pair["rejected"]):
            assert len(answer) == 1
            assert is_conversation(pair["prompt"] + answer) and answer[0]["role"] == "assistant"


def test_kinds_and_flaws_are_varied_in_both_splits() -> None:
    for name in ("train", "test"):
        assert {pair["flaw"] for pair in split(name)} == set(corpus().FLAWS)
        assert len({pair["kind"] for pair in split(name)}) >= 12


def test_no_prompt_is_in_both_splits() -> None:
    prompts = {name: {str(pair["prompt"]) for pair in split(name)} for name in ("train", "test")}
    assert sum(map(len, prompts.values())) == len(pairs())
    assert not prompts["train"] & prompts["test"]


def test_no_test_request_is_asked_in_training() -> None:
    asked = {message["content"] for pair in split("train") for message in pair["prompt"]}
    for messages in islice(corpus().conversations(0), 5_000):
        asked |= {message["content"] for message in messages}
    assert not asked & {pair["prompt"][-1]["content"] for pair in split("test")}


def test_length_does_not_give_the_answer_away() -> None:
    for name in ("train", "test"):
        wins = 0.0
        for pair in split(name):
            chosen, rejected = (len(pair[k][0]["content"]) for k in ("chosen", "rejected"))
            wins += (chosen > rejected) + 0.5 * (chosen == rejected)
        assert 0.35 < wins / len(split(name)) < 0.65


def test_untrained_preference_is_near_chance() -> None:
    """The sum of an answer's log-probs prefers neither side."""
    wins = 0
    for pair in split("test")[:64]:
        prompt = len(ids(pair["prompt"], prompt=True))
        chosen, rejected = (answer_logprob(ids(pair["prompt"] + pair[k]), prompt) for k in SIDES)
        wins += chosen > rejected
    assert 0.3 < wins / 64 < 0.7


SIDES = ("chosen", "rejected")


@torch.no_grad()
def answer_logprob(tokens: list[int], prompt: int) -> float:
    inputs = torch.tensor([tokens])
    logprobs = model()(inputs, use_cache=False).logits[0, prompt - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, inputs[0, prompt:, None]).sum().item()


def test_demo_prompts_are_test_prompts() -> None:
    demo = json.loads((ASSETS / "demo_prompts.json").read_text())
    assert 6 <= len(demo) <= 10
    test_prompts = [pair["prompt"] for pair in split("test")]
    assert all(prompt in test_prompts for prompt in demo)


# --- the corpus behind them ----------------------------------------------------------------------


def test_same_seed_same_text() -> None:
    def digest(seed: int) -> str:
        text = json.dumps(list(islice(corpus().conversations(seed), 500)))
        return hashlib.sha256(text.encode()).hexdigest()

    assert digest(3) == digest(3) != digest(4)


def test_stored_pairs_are_what_the_generator_writes() -> None:
    for name in ("train", "test"):
        stored = split(name)
        assert corpus().preference_pairs(0, len(stored), name) == stored


def test_no_quiz_takes_a_right_answer_for_a_mistake() -> None:
    corpus()
    for kind, quiz in sys.modules["tiny_cases"].QUIZZES.items():
        for x, y, mistake in quiz.rows:
            assert y != mistake, (kind, x)
