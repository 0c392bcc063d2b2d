"""Chunks: whatever computes them, in whatever process, found on disk or not, the result is one."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from prefopt import loading
from prefopt.data import chunks, token_cache
from prefopt.data.encode import encode_feedback, encode_pairs
from prefopt.data.encode_dialogues import encode_dialogues
from prefopt.data.encode_rankings import encode_rankings
from prefopt.data.records import Dialogue, Feedback, Message, Pair, Ranking
from tests.chat_tokenizers import CHATML_PROMPT, chat_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 8)


def pair(i):
    return Pair(
        [Message("user", f"question {i}" * (30 if i % 7 == 5 else 1))],
        [Message("assistant", "yes " * (i % 3 + 1))],
        [Message("assistant", "no" if i % 2 else "yes ")],
        margin=i / 3 if i % 2 else None,
        source=f"file {i % 2}",
        weight=1 + i % 3,
    )


PAIRS = [pair(i) for i in range(40)]
TOKENIZER = chat_tokenizer("chatml")


def facts(encoded):
    """All there is to a set: its groups byte for byte."""
    encoded._file.seek(0)
    return (
        encoded.indices.tolist(),
        encoded.digests.tolist(),
        encoded._file.read(),
        encoded.counts,
        encoded.template,
    )


EXPECTED = facts(encode_pairs(PAIRS, TOKENIZER, max_length=40))


def files(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.tokens")}


def counting(monkeypatch):
    """How many records are encoded from here on."""
    seen = []
    module = sys.modules["prefopt.data.encode"]
    original = module.encode_chunk

    def encode_chunk(records, *rest):
        seen.extend(records)
        return original(records, *rest)

    encode_chunk.__module__ = original.__module__
    monkeypatch.setattr(module, "encode_chunk", encode_chunk)
    return seen


def test_dropped_rows_are_counted_over_all_chunks():
    indices, _, _, counts, _ = EXPECTED
    dropped = sum(n for key, n in counts.items() if key.startswith("dropped"))
    assert len(indices) + dropped == len(PAIRS) and dropped > 8
    assert encode_pairs(iter(PAIRS), TOKENIZER, max_length=40).indices.tolist() == indices


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_processes_change_nothing(workers, tmp_path):
    for cache in (None, tmp_path / "tokens", tmp_path / "tokens"):
        made = encode_pairs(PAIRS, TOKENIZER, max_length=40, workers=workers, cache=cache)
        assert facts(made) == EXPECTED


def test_processes_are_for_many_rows(monkeypatch):
    from prefopt.data import workers

    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(3), raising=False)
    many = range(workers.ROWS)
    assert workers.worth_it(many, TOKENIZER) == 3
    assert workers.worth_it(many[1:], TOKENIZER) == workers.worth_it(iter(many), TOKENIZER) == 0
    script = type("OfTheScript", (), {"__module__": "__main__"})()
    assert workers.worth_it(many, script) == 0
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(99), raising=False)
    assert workers.worth_it(many, TOKENIZER) == workers.MOST
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert workers.worth_it(many, TOKENIZER) == 0


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "from prefopt.data.encode import encode_pairs\n"
        "from prefopt.data.records import Message, Pair\n"
        "from tests.chat_tokenizers import chat_tokenizer\n"
        "sides = [[Message('assistant', x)] for x in 'ab']\n"
        "pairs = [Pair([Message('user', 'q')], *sides)] * 3\n"
        "print(len(encode_pairs(pairs, chat_tokenizer('chatml'), workers=2)))\n"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "once\n3\n"), done.stderr


def test_a_worker_that_dies_is_an_error_and_leaves_no_process(monkeypatch):
    from prefopt.data import workers

    made = []
    start = workers.Worker.__init__

    def init(self, *args):
        start(self, *args)
        made.append(self.process)
        if len(made) == 2:
            self.process.kill()

    monkeypatch.setattr(workers.Worker, "__init__", init)
    with pytest.raises(RuntimeError, match="was killed"):
        encode_pairs(PAIRS, TOKENIZER, workers=2)
    for process in made:
        with pytest.raises(ValueError, match="closed"):
            process.is_alive()


def test_what_was_encoded_is_found_again(tmp_path, monkeypatch):
    cache = tmp_path / "a" / "tokens"
    assert facts(encode_pairs(PAIRS, TOKENIZER, max_length=40, cache=cache)) == EXPECTED
    before = files(cache)
    assert len(before) == 5
    seen = counting(monkeypatch)
    for workers in (0, 2):
        again = encode_pairs(PAIRS, TOKENIZER, max_length=40, cache=cache, workers=workers)
        assert facts(again) == EXPECTED
    assert not seen and files(cache) == before


def test_rows_at_the_end_leave_the_earlier_chunks_as_they_are(tmp_path, monkeypatch):
    encode_pairs(PAIRS[:21], TOKENIZER, max_length=40, cache=tmp_path)
    before, seen = files(tmp_path), counting(monkeypatch)
    assert facts(encode_pairs(PAIRS, TOKENIZER, max_length=40, cache=tmp_path)) == EXPECTED
    assert len(seen) == 40 - 16
    assert before.items() <= files(tmp_path).items() and len(files(tmp_path)) == 3 + 3


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(5))
def test_a_killed_run_goes_on_where_it_stopped(after, tmp_path, monkeypatch):
    def rows():
        for i, row in enumerate(PAIRS):
            if i == 8 * after + 3:
                raise Killed
            yield row

    with pytest.raises(Killed):
        encode_pairs(rows(), TOKENIZER, max_length=40, cache=tmp_path)
    assert len(files(tmp_path)) == after
    seen = counting(monkeypatch)
    assert facts(encode_pairs(PAIRS, TOKENIZER, max_length=40, cache=tmp_path)) == EXPECTED
    assert len(seen) == 40 - 8 * after


def test_a_run_killed_while_a_chunk_is_written_leaves_no_half_of_it(tmp_path, monkeypatch):
    def write_all(fd, data):
        os.write(fd, bytes(data)[: len(data) // 2])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("prefopt.durable.write_all", write_all)
        with pytest.raises(Killed):
            encode_pairs(PAIRS, TOKENIZER, max_length=40, cache=tmp_path)
    assert not files(tmp_path)
    assert facts(encode_pairs(PAIRS, TOKENIZER, max_length=40, cache=tmp_path)) == EXPECTED


def test_damage_anywhere_is_noticed_and_made_good(tmp_path, caplog):
    encode_pairs(PAIRS[:8], TOKENIZER, max_length=40, cache=tmp_path)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    expected = facts(encode_pairs(PAIRS[:8], TOKENIZER, max_length=40))
    harm = [whole[:n] for n in (0, 3, 11, 40, len(whole) - 1)] + [whole + b"x"]
    for at in (0, 4, 8, 13, 60, len(whole) // 2, len(whole) - 1):
        harm.append(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    for damaged in harm:
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "prefopt"):
            again = encode_pairs(PAIRS[:8], TOKENIZER, max_length=40, cache=tmp_path)
        assert facts(again) == expected and path.read_bytes() == whole
        assert f"{path} is damaged" in caplog.text


def test_a_cache_that_cannot_be_written_is_said_once_and_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "prefopt"):
        made = encode_pairs(PAIRS, TOKENIZER, max_length=40, cache=tmp_path / "file")
    assert facts(made) == EXPECTED and len(caplog.records) == 1


def names(tmp_path, pairs=PAIRS[:8], tokenizer=TOKENIZER, encode=encode_pairs, **options):
    """The files that are made, in a folder of their own."""
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    encode(pairs, tokenizer, cache=folder, **{"max_length": 99, **options})
    return {path.name for path in files(folder)}


def changed_tokenizer(**changes):
    core = json.loads(TOKENIZER.backend_tokenizer.to_str())
    core |= changes
    made = PreTrainedTokenizerFast(
        tokenizer_object=type(TOKENIZER.backend_tokenizer).from_str(json.dumps(core)),
        bos_token="<s>", eos_token="<|im_end|>",
    )  # fmt: skip
    made.chat_template = TOKENIZER.chat_template
    return made


def test_all_that_decides_the_tokens_is_in_the_name(tmp_path, monkeypatch):
    first = names(tmp_path)
    assert names(tmp_path) == first == names(tmp_path, tokenizer=changed_tokenizer())
    padded = changed_tokenizer()
    padded.backend_tokenizer.enable_padding(length=64)
    padded.backend_tokenizer.enable_truncation(9)
    assert names(tmp_path, tokenizer=padded) == first
    other = [names(tmp_path, max_length=98), names(tmp_path, template="plain")]
    normalized = changed_tokenizer(normalizer={"type": "Lowercase"})
    other.append(names(tmp_path, tokenizer=normalized))
    merges = json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]
    other.append(
        names(
            tmp_path, tokenizer=changed_tokenizer(model=merges | {"merges": merges["merges"][:-1]})
        )
    )
    added = changed_tokenizer()
    added.add_tokens(["question"])
    worded, ended = changed_tokenizer(), changed_tokenizer()
    worded.chat_template += " "
    ended.eos_token = "<s>"
    other += [names(tmp_path, tokenizer=x) for x in (added, worded, ended)]
    for change in ("margin", "source", "weight", "preference"):
        value = "x" if change == "source" else 0.25
        changed = [replace(PAIRS[0], **{change: value}), *PAIRS[1:8]]
        other.append(names(tmp_path, changed))
    other.append(names(tmp_path, [PAIRS[1], PAIRS[0], *PAIRS[2:8]]))
    monkeypatch.setattr(token_cache, "RULES", 2)
    other.append(names(tmp_path))
    everything = [first, *other]
    assert all(len(made) == 1 for made in everything)
    assert len(set().union(*everything)) == len(everything)


def test_a_template_that_writes_the_date_is_of_that_day(tmp_path, monkeypatch):
    class Tomorrow(token_cache.date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    dated = changed_tokenizer()
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + TOKENIZER.chat_template
    first, plain = names(tmp_path, tokenizer=dated), names(tmp_path)
    monkeypatch.setattr(token_cache, "date", Tomorrow)
    assert names(tmp_path, tokenizer=dated) != first and names(tmp_path) == plain


def test_every_kind_of_record(tmp_path):
    prompt, a, b = (
        [Message(r, t)] for r, t in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
    )
    dialogue = Dialogue([*prompt, *a])
    kinds = {
        encode_feedback: [Feedback(prompt, a, True), Feedback(prompt, a, False)],
        encode_rankings: [Ranking(prompt, [a, b])],
        encode_dialogues: [
            dialogue,
            Dialogue([], "text alone"),
            Dialogue([*prompt, *a], context=1),
        ],
    }
    made = []
    for encode, records in kinds.items():
        expected = facts(encode(records, TOKENIZER))
        for workers in (0, 1):
            for _ in range(2):
                found = encode(records, TOKENIZER, cache=tmp_path, workers=workers)
                assert facts(found) == expected
        made += [names(tmp_path, [record], encode=encode) for record in records]
    assert len(set().union(*made)) == 6
    alone = encode_dialogues([Dialogue([], "text alone")], TOKENIZER, cache=tmp_path)
    assert alone.template == "none: text without speakers"
    assert names(tmp_path, [dialogue], encode=encode_dialogues, loss_on="all") not in made


def test_a_tokenizer_in_python_has_no_cache(tmp_path):
    class InPython:
        """What the encoder asks of a tokenizer, a token a byte."""

        def __init__(self):
            self.eos_token_id, self.bos_token_id, self.unk_token_id = 256, None, None
            self.all_special_ids, self.all_special_tokens = [256], ["<eos>"]
            self.added_tokens_decoder, self.chat_template = {}, None

        def __call__(self, texts, add_special_tokens, **options):
            return {"input_ids": [list(text.encode()) for text in texts]}

        def decode(self, ids, **options):
            return bytes(i for i in ids if i < 256).decode()

    encoded = encode_pairs(PAIRS[:4], InPython(), cache=tmp_path)
    assert bytes(encoded[0].prompt.tolist()) == b"\n\nHuman: question 1\n\nAssistant:"
    assert not files(tmp_path)


def test_a_chat_template_of_another_name_for_tools_is_in_the_name(tmp_path):
    both = changed_tokenizer()
    both.chat_template = {"default": TOKENIZER.chat_template, "tool_use": CHATML_PROMPT}
    assert names(tmp_path, tokenizer=both) != names(tmp_path)


def test_whoever_changes_what_is_encoded_raises_the_version_of_the_rules():
    """Else chunks that were kept before would be taken for what is encoded now."""
    tokenizer = loading.load_tokenizer(loading.resolve("embedded").base)
    parted = Pair(
        [Message("user", "one")],
        [Message("assistant", "a"), Message("user", "two"), Message("assistant", "b <|eos|> c")],
        [Message("assistant", "d"), Message("user", "two"), Message("assistant", "e " * 60)],
        margin=1.5, source="s", weight=2.0, preference=0.5,
    )  # fmt: skip
    encoded = encode_pairs([*PAIRS, parted], tokenizer, max_length=60)
    digest = blake2b(repr(facts(encoded)).encode(), digest_size=8).hexdigest()
    assert (token_cache.RULES, digest) == (1, "9a94eb4132759aa2")
