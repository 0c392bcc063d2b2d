"""The doctor's counts against counting by hand, and against planted faults."""

import gzip
import json
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefopt import loading
from prefopt.data.audit import clean, doctor, leaks
from prefopt.data.audit.checks import CHECKS
from prefopt.data.encode import encode_pairs
from prefopt.data.prompts import load_prompts
from prefopt.data.records import Message, Pair
from prefopt.data.sources import load_preferences
from prefopt.errors import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer(str(loading.EMBEDDED / "model"))


def counts(diagnosis) -> dict[str, int]:
    return {f.check: f.count for f in diagnosis.findings if f.check != "longer response chosen"}


def examine(rows, tokenizer, **options):
    source = rows if isinstance(rows, list) else str(rows)
    options = {"eval_fraction": 0.0, **options}
    return doctor.examine(load_preferences(source, ties="soft"), tokenizer, **options)


def row(prompt, chosen="a good answer to it", rejected="another answer to it", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def question(n: int) -> str:
    """Questions of which no two are alike."""
    rng = random.Random(n)
    return f"{n} " + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=40))


# --- real data ---------------------------------------------------------------------------------


def by_hand(path) -> tuple[Counter, list[tuple[int, str]]]:
    """Counts of HH rows by splitting their text, and (line, context) of the comparable ones."""
    seen, contexts = Counter(), []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    before, asked, short = set(), set(), 10
    for line, texts in enumerate(rows, start=1):
        two = [texts["chosen"], texts["rejected"]]
        ends = [text.rfind("\n\nAssistant:") for text in two]
        context = two[0][: ends[0]]
        if context != two[1][: ends[1]]:
            seen["context mismatch"] += 1
            continue
        contexts.append((line, context))
        replies = [text[end + len("\n\nAssistant:") :] for text, end in zip(two, ends, strict=True)]
        seen["empty chosen response"] += not replies[0].strip()
        seen["empty rejected response"] += not replies[1].strip()
        seen["identical pairs"] += replies[0] == replies[1]
        seen["very short replies"] += any(0 < len(reply.strip()) < short for reply in replies)
        turns = [re.split(r"\n\n(Human|Assistant):", text) for text in two]
        speakers = [parts[1::2] for parts in turns]
        bodies = [body for parts in turns for body in parts[::2]]
        seen["roles do not alternate"] += any(
            a == b for side in speakers for a, b in pairwise(side)
        )
        seen["role markers inside turns"] += any(
            "Human:" in body or "Assistant:" in body for body in bodies
        )
        seen["single-newline markers"] += any(
            re.search(r"(?<!\n)\n(Human|Assistant):", body) for body in bodies
        )
        seen["duplicate prompts"] += context in asked
        asked.add(context)
        seen["duplicate pairs"] += tuple(two) in before
        seen["conflicting labels"] += tuple(two[::-1]) in before
        before.add(tuple(two))
        sizes = [len(reply.removeprefix(" ")) for reply in replies]
        seen["longer"] += sizes[0] > sizes[1]
        seen["shorter"] += sizes[0] < sizes[1]
    return seen, contexts


def test_every_count_on_real_data_is_that_of_counting_by_hand(hh_path, tokenizer):
    expected, _ = by_hand(hh_path)
    diagnosis = examine(hh_path, tokenizer)
    found = counts(diagnosis)
    found["context mismatch"] += found.get("parting early", 0)
    lengths = diagnosis.lengths["characters"]
    found |= {name: lengths[name] for name in ("longer", "shorter")}
    assert {name: found.get(name, 0) for name in expected} == dict(expected)
    # These are in this file, so that the equation above says something of them.
    planted = ("context mismatch", "empty chosen response", "roles do not alternate")
    planted += ("role markers inside turns", "very short replies", "duplicate prompts")
    assert all(expected[name] > 0 for name in planted)
    assert lengths["share"] == pytest.approx(0.443, abs=0.001)  # the longer one loses here
    assert diagnosis.report.rows == 1500


def test_every_prompt_of_real_data_ends_at_a_turn_boundary(hh_path):
    _, contexts = by_hand(hh_path)
    pairs = load_preferences(str(hh_path))
    assert len(pairs) == len(contexts)
    names = {"user": "Human", "assistant": "Assistant"}
    for i, (line, context) in enumerate(contexts):
        assert pairs.where(i) == f"{hh_path}:{line}"
        turns = "".join(f"\n\n{names[m.role]}:{m.content}" for m in pairs[i].prompt)
        assert turns.replace(" ", "") == context.replace(" ", "")
        assert pairs[i].prompt[-1].role == "user"


# --- planted faults ----------------------------------------------------------------------------


def test_every_fault_is_found_where_it_is(tokenizer):
    """One row of each kind among good ones; the position says which rows were meant."""
    planted = {
        "empty chosen response": row(question(1), chosen=" \n"),
        "empty rejected response": row(question(2), rejected=""),
        "identical pairs": row(question(3), chosen="no difference", rejected="no difference"),
        "ties": row(question(4), preference=0.5),
        "ratings against the label": row(question(5), margin=-2.0),
        "empty prompts": row("  "),
        "role markers inside turns": row(question(6), chosen="Sure. Human: and then?"),
        "damaged text": row(question(7), chosen="the caf\u00c3\u00a9 is open"),
        "HTML entities": row(question(8), chosen="Fish &amp; chips are fine"),
        "very short replies": row(question(9), chosen="Yes."),
        "special tokens in texts": row(question(10), chosen=f"over now {tokenizer.bos_token} ok"),
        "text that is not Unicode": row(question(11), chosen="half \ud83d of it"),
        "unusable rows": row(7),
        "context mismatch": {
            "prompt": None,
            "chosen": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "x"}],
            "rejected": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "y"}],
        },
    }  # fmt: skip
    good = [row(question(100 + n)) for n in range(10)]
    messages = planted.pop("context mismatch")
    diagnosis = examine([*good, *planted.values()], tokenizer)
    at = {f.check: f.examples for f in diagnosis.findings}
    for n, name in enumerate(planted, start=len(good)):
        assert at.pop(name) == [f"[{n}]"], name
    at.pop("longer response chosen", None)
    bos = list(planted).index("special tokens in texts") + len(good)
    assert at == {"BOS twice": [f"[{bos}]"]}  # which it also becomes
    other = {k: [{"role": "user", "content": "q"}, {"role": "assistant", "content": k}]
             for k in ("chosen", "rejected")}  # fmt: skip
    assert counts(examine([messages, other], tokenizer))["context mismatch"] == 1


def test_severities_and_the_order_of_findings(tokenizer):
    rows = [
        row(question(1), chosen=""),
        row(question(2), rejected=""),
        row(question(3), chosen="No"),
    ]
    diagnosis = examine(rows, tokenizer)
    severities = [f.severity for f in diagnosis.findings]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    assert diagnosis.count("error") == 1 and diagnosis.findings[0].check == "empty chosen response"
    names = [f.check for f in diagnosis.findings]
    benchmark = {name for name in CHECKS if "benchmark" in name}
    assert sorted([*names, *diagnosis.clean, *benchmark]) == sorted(CHECKS)
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_turns_out_of_order_and_conversations_that_part_early(tokenizer):
    start = [("user", "hello there"), ("user", "are you there?")]
    early = [
        chat(("user", "hi"), ("assistant", a), ("user", "go on"), ("assistant", b))
        for a, b in (("x one", "x two"), ("y one", "y two"))
    ]
    rows = [
        {"chosen": chat(*start, ("assistant", "yes")),
         "rejected": chat(*start, ("assistant", "no"))},
        {"chosen": early[0], "rejected": early[1]},
        {"chosen": chat(("user", "q"), ("assistant", "one")),
         "rejected": chat(("user", "q"), ("assistant", "two"))},
    ]  # fmt: skip
    at = {f.check: f.examples for f in examine(rows, tokenizer).findings}
    assert at["roles do not alternate"] == ["[0]"]
    assert at["parting early"] == ["[1]"]
    # A call of tools and its result stand between two turns of the assistant.
    tools = [Message("user", "time?"), Message("assistant", "I look."), Message("tool_calls", "[]"),
             Message("tool", "12:00"), Message("tool", "UTC")]  # fmt: skip
    pair = Pair(tools, [Message("assistant", "noon")], [Message("assistant", "night")])
    assert "roles do not alternate" not in counts(examine([pair], tokenizer, template="plain"))


def test_markers_at_the_start_of_a_turn_and_of_the_other_speaker(tokenizer):
    rows = [
        row(question(1), "Assistant: hello to you"),
        row(question(2), "yes\n\nHuman: and then?"),
    ]
    found = counts(examine(rows, tokenizer))
    assert found == {"role markers inside turns": 2}  # both speakers have one turn each


@pytest.mark.parametrize("marker", ["<|im_start|>user", "[INST] x [/INST]", "### Instruction:"])
def test_markers_of_other_formats(marker, tokenizer):
    rows = [row(f"{question(1)} {marker}"), row(question(2))]
    assert counts(examine(rows, tokenizer))["role markers inside turns"] == 1


def test_a_marker_behind_one_newline_is_not_one_behind_two(tokenizer):
    text = "\n\nHuman: {}\n\nAssistant: {}"
    rows = [
        {side: text.format(asked, answer) for side, answer in (("chosen", "c"), ("rejected", "d"))}
        for asked in ("a\nAssistant: b", "e")
    ]
    found = counts(examine(rows, tokenizer))
    assert found["single-newline markers"] == found["role markers inside turns"] == 1


# --- labels ------------------------------------------------------------------------------------


@settings(max_examples=60)
@example([(0, 0, 1, False), (0, 1, 0, False), (0, 0, 1, False)])  # two labels against one
@example([(0, 0, 1, False), (0, 1, 0, False), (0, 1, 0, False)])
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3, st.booleans()), min_size=1, max_size=14))
def test_labels_against_counting_by_hand(tokenizer, drawn):
    """Few prompts and responses, so that duplicates, conflicts and rankings come up by chance."""
    made = [(p, a, b, soft) for p, a, b, soft in drawn if a != b]
    if not made:
        return
    texts = ["the first answer", "the second answer!", "the third of the answers"]
    pairs = [
        Pair([Message("user", question(p))], [Message("assistant", texts[a])],
             [Message("assistant", texts[b])], preference=0.5 if soft else 1.0)
        for p, a, b, soft in made
    ]  # fmt: skip
    diagnosis = examine(pairs, tokenizer)
    found, keep = counts(diagnosis), diagnosis.keep
    hard = [(p, a, b) for p, a, b, soft in made if not soft]
    votes = Counter(hard)
    expected = Counter()
    expected["ties"] = sum(soft for *_, soft in made)
    expected["conflicting labels"] = sum(bool(votes[p, b, a]) for p, a, b in hard)
    expected["duplicate prompts"] = len(made) - len({p for p, *_ in made})
    own = [(p, a, b, soft) for p, a, b, soft in made]
    expected["duplicate pairs"] = sum(
        own[i] in own[:i] or (own[i][3] and (own[i][0], own[i][2], own[i][1], True) in own[:i])
        for i in range(len(own))
    )
    for name in ("ties", "conflicting labels", "duplicate prompts", "duplicate pairs"):
        assert found.get(name, 0) == expected[name], name
    # A cleaned copy has each comparison once, in the order that has most labels, and no tie.
    kept = [made[i][:3] for i in np.flatnonzero(keep)]
    assert sorted(kept) == sorted((p, a, b) for p, a, b in votes if votes[p, a, b] > votes[p, b, a])


def test_a_ranking_is_no_conflict(tokenizer):
    rows = [row("q", "best answer", "middle answer"), row("q", "middle answer", "worst answer")]
    found = counts(examine(rows, tokenizer))
    assert found["chosen here, rejected there"] == 2 and "conflicting labels" not in found


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 3))
def test_the_interval_of_longer_wins_is_wilsons(longer, shorter, equal):
    """Its ends p solve (share - p)^2 = z^2 p (1 - p) / n."""
    lengths = np.array([[2, 1]] * longer + [[1, 2]] * shorter + [[1, 1]] * equal).reshape(-1, 2)
    told = doctor.longer_wins(lengths, np.ones(len(lengths), bool))
    n = longer + shorter
    assert (told["longer"], told["shorter"], told["equal"]) == (longer, shorter, equal)
    if not n:
        assert told["share"] is told["low"] is told["high"] is None
        return
    for p in (told["low"], told["high"]):
        assert (longer / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-9)
    assert 0 <= told["low"] <= told["share"] <= told["high"] <= 1


def test_length_that_decides_is_a_warning(tokenizer):
    rows = [
        row(question(n), "a much longer answer than the other", "a short answer") for n in range(60)
    ]
    biased = examine(rows, tokenizer)
    even = [
        row(question(n), *(("the longer answer", "an answer")[:: 1 if n % 2 else -1]))
        for n in range(60)
    ]
    fair = examine(even, tokenizer)
    short = examine([row(r["prompt"], r["rejected"], r["chosen"]) for r in rows], tokenizer)
    severity = [
        {f.check: f.severity for f in d.findings}["longer response chosen"]
        for d in (biased, fair, short)
    ]
    assert severity == ["warning", "info", "warning"]


# --- prompts on two sides ----------------------------------------------------------------------


def test_prompts_that_are_held_out(tmp_path, tokenizer):
    held = tmp_path / "held.jsonl"
    asked = [question(1), question(2) + " indeed, and some more of it to make it long enough"]
    held.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    rows = [row(asked[0].upper()), row(asked[1] + "?"), row(question(3)), row(asked[0], "x" * 20)]
    against = leaks.HeldOut("held.jsonl", load_prompts(str(held)))
    diagnosis = examine(rows, tokenizer, held_out=against)
    at = {f.check: f.examples for f in diagnosis.findings}
    assert at["held-out prompts"] == [f"[0] (like {held}:1)", f"[3] (like {held}:1)"]
    assert at["near-duplicates of held-out prompts"] == [f"[1] (like {held}:2)"]
    assert diagnosis.keep.tolist() == [False, False, True, False]


def test_near_duplicates_across_the_split_that_training_makes(tokenizer):
    from prefopt.data.split import split_pairs

    base = [
        question(n) + " with a long enough rest so that one sign is not much" for n in range(40)
    ]
    copies = [text + "!" if n % 2 else text.upper() for n, text in enumerate(base)]
    rows = [row(text) for two in zip(base, copies, strict=True) for text in two]
    pairs = load_preferences(rows)
    held = set(split_pairs(pairs, 0.25)[1])
    # Text and copy are 2 n and 2 n + 1: a leak where only one of them is held out.
    expected = [i for i in range(80) if i not in held and (i ^ 1) in held]
    diagnosis = examine(rows, tokenizer, eval_fraction=0.25)
    assert counts(diagnosis)["near-duplicates of held-out prompts"] == len(expected) > 5
    assert np.flatnonzero(~diagnosis.keep).tolist() == expected
    assert counts(diagnosis)["near-duplicate prompts"] == 40
    assert "held-out prompts" in diagnosis.clean


def test_what_many_prompts_share_makes_none_alike(tokenizer):
    """A long system turn; and copies of a near-duplicate are duplicates, not more of them."""
    system = " ".join(question(n) for n in range(50, 70))
    rows = [row(question(n), system=system) for n in range(5)]
    again = f"{question(9)} and some more of it to be long enough"
    rows += [row(again + end) for end in ("", "!", "!")]
    found = counts(examine(rows, tokenizer))
    assert found == {"near-duplicate prompts": 1, "duplicate prompts": 1, "duplicate pairs": 1}


def test_many_unusable_rows_are_an_error(tokenizer):
    good = [row(question(n)) for n in range(18)]
    for bad, severity in ((2, "warning"), (3, "error")):  # of 20, a tenth; of 21, more
        diagnosis = examine([*good, *(row(n) for n in range(bad))], tokenizer)
        (finding,) = [f for f in diagnosis.findings if f.check == "unusable rows"]
        assert (finding.severity, finding.count) == (severity, bad)
        assert finding.detail == f"'prompt' is int, not text ({bad})"


def test_overlap_with_a_benchmark(tmp_path, tokenizer):
    file = tmp_path / "bench.jsonl"
    long = "the quick brown fox jumps over the lazy dog and runs far away into the dark wood"
    file.write_text("".join(json.dumps(row(text)) + "\n" for text in ("Name a colour.", long)))
    rows = [
        row("name a colour"),
        row(f"Please continue this: {long} at night."),
        row(" ".join(long.split()[:9]) + " sleeps all day long in the shade"),
        row("Name a colour that is not red."),
    ]
    diagnosis = examine(rows, tokenizer, benchmarks=[load_prompts(str(file))])
    at = {f.check: f.examples for f in diagnosis.findings}
    assert at["benchmark prompts"] == [f"[0] (like {file}:1)"]
    assert at["overlap with a benchmark"] == [f"[1] (like {file}:2)"]
    assert diagnosis.keep.tolist() == [False, False, True, True]


# --- in tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("max_length", [12, 20, 40, 90])
def test_what_truncation_does_is_what_encoding_counts(max_length, template, tokenizer):
    rng, rows = random.Random(max_length), []
    for n in range(150):
        shared = "so " * rng.randrange(25)
        rows.append(row("why " * rng.randrange(1, 20) + str(n), f"{shared}yes {n}", f"{shared}no"))
    pairs = load_preferences(rows)
    encoded = encode_pairs(pairs, tokenizer, max_length=max_length, template=template)
    found = counts(examine(rows, tokenizer, max_length=max_length, template=template))
    dropped = {k: n for k, n in encoded.counts.items() if k.startswith("dropped")}
    assert found.get("no room for a response", 0) == dropped.get(
        "dropped: prompt fills max_length", 0
    )
    same = dropped.get("dropped: identical after truncation", 0)
    assert found.get("whole difference cut off", 0) == same
    room = [max_length - len(e.prompt) for e in encoded]
    cut = sum(
        any(len(r) == m and r[-1] != tokenizer.eos_token_id for r in e.responses)
        for e, m in zip(encoded, room, strict=True)
    )
    assert found.get("truncated responses", 0) == cut


def test_eos_inside_and_nothing_to_encode(tokenizer):
    rows = [row(question(1), f"done{tokenizer.eos_token}or not"), row(question(2))]
    found = counts(examine(rows, tokenizer))
    assert found["EOS inside a response"] == found["special tokens in texts"] == 1
    refused = [Pair([Message("user", "q")], [Message("assistant", a)], [Message("assistant", "b")])
               for a in ("b ", "b  ")]  # fmt: skip
    strict = loading.load_tokenizer(str(loading.EMBEDDED / "model"))
    strict.chat_template = "{{ raise_exception('no such turns') }}"
    diagnosis = examine(refused, strict)
    assert counts(diagnosis)["nothing to encode"] == 2
    assert "no such turns" in diagnosis.findings[0].detail


def test_bos_that_the_template_writes_twice(tokenizer):
    double = loading.load_tokenizer(str(loading.EMBEDDED / "model"))
    double.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert counts(examine([row("q")], double))["BOS twice"] == 1
    assert "BOS twice" not in counts(examine([row("q")], tokenizer))


# --- the cleaned copy --------------------------------------------------------------------------


def faulty() -> list[dict]:
    copy = row(question(20), "kept once only", "worse than that")
    return [
        copy, copy,
        row(question(21), "up", "down is it"), row(question(21), "down is it", "up"),
        row(question(22), chosen=""), row(question(23), rejected=" "),
        row(question(24), margin=-1), row(question(25), status="tie"),
        row(question(26), margin=2.5),
        row(question(27), "same text", "same text"), row(question(28), source="web"),
        row(question(29), "Human: what?"), row(question(30), margin=0, preference=1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("ties", ["drop", "soft", "keep"])
def test_a_cleaned_copy_has_none_of_what_fix_claims_to_mend(tmp_path, tokenizer, ties):
    pairs = load_preferences(faulty(), ties="soft")
    first = doctor.examine(pairs, tokenizer, ties=ties, eval_fraction=0)
    assert first.count("error") == 3
    out = tmp_path / "clean.jsonl"
    written = clean.write_pairs(out, pairs, first.keep, ties)
    again = load_preferences(str(out), ties="soft")
    second = doctor.examine(again, tokenizer, ties=ties, eval_fraction=0)
    left = {f.check for f in second.findings}
    mended = {name for name, check in CHECKS.items() if check.fix}
    assert left & mended == ({"ties"} if ties == "soft" else set())
    assert "role markers inside turns" in left and written == len(again) == (
        5 if ties == "drop" else 6
    )
    kept = [pairs[i] for i in np.flatnonzero(first.keep).tolist()]
    for before, after in zip(kept, again, strict=True):
        wish = 1.0 if ties == "keep" else before.preference
        assert after == Pair(before.prompt, before.chosen, before.rejected, before.margin,
                             before.source, preference=wish)  # fmt: skip


def test_a_cleaned_copy_is_read_by_others(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    pairs = load_preferences(faulty(), ties="soft")
    keep = doctor.examine(pairs, tokenizer, eval_fraction=0).keep
    clean.write_pairs(tmp_path / "clean.jsonl", pairs, keep, "drop")
    table = datasets.load_dataset("json", data_files=str(tmp_path / "clean.jsonl"), split="train",
                                  cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert len(table) == keep.sum()
    turns = table[0]["chosen"]
    assert turns == [{"role": "assistant", "content": "kept once only"}]


def test_nothing_is_written_where_it_should_not_be(tmp_path, tokenizer):
    source = tmp_path / "data.jsonl"
    source.write_text(json.dumps(row("q")) + "\n")
    for path, force, words in (
        (source, True, "never writes over its source"),
        (tmp_path / "new.csv", False, ".jsonl"),
        (tmp_path / "no" / "new.jsonl", False, "does not exist"),
    ):
        with pytest.raises(InputError, match=words):
            clean.check_target(path, str(source), force)
    other = tmp_path / "other.jsonl"
    other.write_text("precious\n")
    with pytest.raises(InputError, match="--force"):
        clean.check_target(other, str(source), False)
    assert clean.check_target(other, str(source), True) == other
    with pytest.raises(InputError, match="never writes over"):  # a file of the folder that is read
        clean.check_target(other, str(tmp_path), True)
    pairs = load_preferences(str(source))
    with pytest.raises(InputError, match="nothing would be left"):
        clean.write_pairs(other, pairs, np.zeros(1, bool), "drop")
    assert other.read_text() == "precious\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "other.jsonl"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    target = tmp_path / "old.jsonl"
    target.write_text("old\n")
    good = load_preferences([row("q")])[0]

    class Broken(list):
        def __getitem__(self, i):
            if i:
                raise RuntimeError("the disk is gone")
            return good

    with pytest.raises(RuntimeError):
        clean.write_pairs(target, Broken([good, good]), np.ones(2, bool), "drop")
    assert target.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 1
