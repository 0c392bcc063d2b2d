"""Sources to canonical pairs: which text is the chosen one, what is dropped, what is said."""

import csv
import gzip
import itertools
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prefopt.data.spool as spool_module
from prefopt.data.files import open_rows, read_rows
from prefopt.data.records import Message, Pair
from prefopt.data.sources import load_preferences
from prefopt.data.split import split_pairs
from prefopt.errors import InputError

SHARED = Path(__file__).parents[2] / "shared"
HH = SHARED / "data" / "hh_harmless.jsonl.gz"

PLAIN = [
    {"prompt": "Capital of France?", "chosen": "Paris. GOOD", "rejected": " Rome. BAD"},
    {"prompt": "Say 'hi', please\n", "chosen": 'hi, "you"\n\nGOOD ', "rejected": "no,\nBAD"},
    {"prompt": "Ünïcode \u2028 line?", "chosen": "\tGOOD 🐟", "rejected": "BAD"},
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"content": text, "role": "assistant"}  # the order of keys does not matter


def hh(*turns):
    """A transcript of alternating turns, Human first."""
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns))


def one(row, **kwargs):
    """The only pair of a one-row source, with nothing dropped."""
    pairs = load_preferences([row], **kwargs)
    assert len(pairs) == 1 and pairs.report.dropped == {}
    return pairs[0]


def simple(prompt, chosen, rejected):
    return Pair(
        [Message("user", prompt)], [Message("assistant", chosen)], [Message("assistant", rejected)]
    )


# --- schemas -----------------------------------------------------------------------------------


def test_transcripts_split_at_the_last_assistant_turn():
    pair = one(
        {
            "chosen": hh("Hi", "Hello!", "Search engines?", "DuckDuckGo is GOOD"),
            "rejected": hh("Hi", "Hello!", "Search engines?", "Duck BAD"),
        }
    )
    assert pair.prompt == [
        Message("user", "Hi"),
        Message("assistant", "Hello!"),
        Message("user", "Search engines?"),
    ]
    # A prefix of characters would have taken "Duck" into the prompt.
    assert pair.chosen == [Message("assistant", "DuckDuckGo is GOOD")]
    assert pair.rejected == [Message("assistant", "Duck BAD")]


def test_transcripts_keep_markers_inside_a_turn_and_all_white_space():
    text = "what does 'Human: x' mean?\nHuman: y  Assistant: z\n"
    pair = one({"chosen": hh(text, "  GOOD \n"), "rejected": hh(text, "")})
    assert pair.prompt == [Message("user", text)]
    assert pair.chosen == [Message("assistant", "  GOOD \n")]  # one space is the marker's
    assert pair.rejected == [Message("assistant", "")]


def test_a_marker_that_repeats_the_speaker_is_text():
    context = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d\n\nHuman: e"
    pair = one({"chosen": context + hh("", "GOOD")[9:], "rejected": context + "\n\nAssistant: BAD"})
    assert pair.prompt == [
        Message("user", "a\n\nHuman: b"),
        Message("assistant", "c\n\nAssistant: d"),
        Message("user", "e"),
    ]
    assert pair.chosen == [Message("assistant", "GOOD")]


def test_transcript_without_leading_blank_line_and_with_preamble():
    bare = {"chosen": "Human: q\n\nAssistant: GOOD", "rejected": "Human: q\n\nAssistant: BAD"}
    assert one(bare) == simple("q", "GOOD", "BAD")
    preamble = {key: "Be kind." + hh("q", key) for key in ("chosen", "rejected")}
    assert one(preamble).prompt == [Message("system", "Be kind."), Message("user", "q")]


def test_transcript_drops_are_counted_with_their_first_position():
    good = {"chosen": hh("q", "GOOD"), "rejected": hh("q", "BAD")}
    rows = [
        good,
        {"chosen": hh("q", "a"), "rejected": hh("another q", "b")},
        {"chosen": hh("q", "same"), "rejected": hh("q", "same")},
        {"chosen": hh("q", ""), "rejected": hh("q", "")},
        {"chosen": hh("q", "a", "thanks"), "rejected": hh("q", "b")},
        {"chosen": "no turns", "rejected": hh("q", "b")},
        {"chosen": None, "rejected": hh("q", "b")},
        {"chosen": hh("q", "b")},
        {"chosen": 3, "rejected": hh("q", "b")},
        {"chosen": hh("q", "\ud83d"), "rejected": hh("q", "b")},
        {
            "chosen": "\n\nAssistant: a\n\nAssistant: b",
            "rejected": "\n\nAssistant: a\n\nAssistant: c",
        },
        good,
    ]
    pairs = load_preferences(rows)
    report = pairs.report
    assert report.schema == "transcripts"
    assert list(pairs) == [simple("q", "GOOD", "BAD")] * 2
    assert report.dropped == {
        "contexts differ": 1,
        "identical": 2,
        "the transcript ends with a human turn": 1,
        "no assistant turn": 1,
        "'chosen' is null": 1,
        "'rejected' is missing": 1,
        "'chosen' is int, not text": 1,
        "text that is not valid Unicode (half a surrogate pair)": 1,
        "the prompt ends with an assistant turn": 1,
    }
    assert report.dropped_at["identical"] == "[2]"
    assert report.rows == len(rows) == report.kept + sum(report.dropped.values())
    assert any("dropped 2: identical (first at [2])" in line for line in report.lines())
    assert json.loads(json.dumps(report.to_dict()))["kept"] == 2


@pytest.mark.parametrize(
    "prompt, reply", [("\n\nHuman: q\n\nAssistant:", " GOOD"), (hh("q", ""), "GOOD")]
)
def test_transcript_as_prompt(prompt, reply):
    row = {"prompt": prompt, "chosen": reply, "rejected": "BAD"}
    assert one(row) == simple("q", "GOOD", "BAD")
    spaced = one({**row, "chosen": " " + reply})  # a space beyond the marker's own is text
    assert spaced == simple("q", " GOOD", "BAD")
    whole = {"prompt": prompt, "chosen": hh("q", "GOOD"), "rejected": hh("q", "BAD")}
    assert one(whole) == simple("q", "GOOD", "BAD")


def test_plain_strings_are_kept_exactly():
    pairs = load_preferences(PLAIN)
    assert list(pairs) == [simple(row["prompt"], row["chosen"], row["rejected"]) for row in PLAIN]
    assert pairs.report.schema == "plain strings"
    assert "3 of the first 3 rows" in pairs.report.reason


def test_system_margin_and_source_columns():
    extra = {"system": "Be brief.", "margin": 2, "source": "me", "id": 7}
    pair = one({**PLAIN[0], **extra})
    assert pair.prompt == [Message("system", "Be brief."), Message("user", "Capital of France?")]
    assert (pair.margin, pair.source) == (2.0, "me")
    assert one({**PLAIN[0], "system": "", "margin": float("nan")}) == simple(*PLAIN[0].values())


SYSTEM = {"role": "system", "content": "S"}
TURNS = [user("q"), assistant("GOOD")]
OTHER = [user("q"), assistant("BAD")]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": TURNS, "rejected": OTHER},
        {"prompt": None, "chosen": TURNS, "rejected": OTHER},
        {"prompt": "q", "chosen": TURNS, "rejected": OTHER},
        {"prompt": " q\n", "chosen": TURNS, "rejected": OTHER},
        {"prompt": [user("q")], "chosen": TURNS, "rejected": OTHER},
        {"prompt": "q", "chosen": TURNS[1:], "rejected": OTHER[1:]},
        {"prompt": [user("q")], "chosen": TURNS[1:], "rejected": OTHER[1:]},
        {"prompt": [user("q")], "chosen": "GOOD", "rejected": "BAD"},
    ],
)
def test_message_lists_with_and_without_the_prompt(row):
    assert one(row) == simple("q", "GOOD", "BAD")


def test_message_lists_of_several_turns():
    context = [SYSTEM, user("a"), assistant("b"), user("c")]
    expected = [Message(m["role"], m["content"]) for m in context]
    rows = [
        {"chosen": [*context, assistant("x")], "rejected": [*context, assistant("y")]},
        {
            "prompt": [SYSTEM],
            "chosen": [*context[1:], assistant("x")],
            "rejected": [*context[1:], assistant("y")],
        },
        {
            "prompt": "c",
            "chosen": [*context, assistant("x")],
            "rejected": [*context, assistant("y")],
        },
        # A reply of two messages, the first of which both share: the prompt still ends with c.
        {
            "chosen": [*context, assistant("w"), assistant("x")],
            "rejected": [*context, assistant("w"), assistant("y")],
        },
    ]
    pairs = load_preferences(rows)
    assert [pair.prompt for pair in pairs] == [expected] * 4
    assert [pair.chosen[-1].content for pair in pairs] == ["x"] * 4
    assert [pair.rejected[-1].content for pair in pairs] == ["y"] * 4
    assert len(pairs[3].chosen) == 2


def test_message_list_drops():
    rows = [
        {"chosen": TURNS, "rejected": OTHER},
        {"chosen": TURNS, "rejected": [user("other q"), assistant("BAD")]},
        {"chosen": [user("a"), *TURNS], "rejected": OTHER},
        {
            "chosen": [*TURNS, user("thanks"), assistant("x")],
            "rejected": [*OTHER, user("thanks"), assistant("x")],
        },
        {"chosen": [user("q")], "rejected": OTHER},
        {"chosen": [], "rejected": OTHER},
        {"chosen": TURNS[1:], "rejected": OTHER[1:]},
        {"prompt": "unrelated", "chosen": TURNS, "rejected": OTHER},
        {"chosen": TURNS, "rejected": TURNS},
        {"chosen": [{"role": "robot", "content": ""}], "rejected": OTHER},
        {"chosen": [{"from": "human", "value": ""}], "rejected": OTHER},
        {"chosen": [{"from": "human", "text": ""}], "rejected": OTHER},
        {"chosen": [user("q"), assistant(None)], "rejected": OTHER},
        {"chosen": 1, "rejected": OTHER},
    ]
    pairs = load_preferences(rows)
    first, early = pairs
    assert first == simple("q", "GOOD", "BAD")
    # They part in the first reply: what follows it stays, with the turn of the user between.
    assert early.prompt == [Message("user", "q")]
    assert [m.content for m in early.chosen] == ["GOOD", "thanks", "x"]
    assert [m.content for m in early.rejected] == ["BAD", "thanks", "x"]
    assert pairs.report.dropped == {
        "contexts differ": 2,
        "no assistant turn": 3,
        "no prompt": 1,
        "the prompt column is not in the conversation": 1,
        "identical": 1,
        "unknown role 'robot'": 1,
        "a message lacks 'role' or 'content'": 1,
        "a message's content is NoneType, not text": 1,
        "a conversation is int, not a list of messages": 1,
    }


def test_one_bad_first_row_does_not_decide_the_schema():
    pairs = load_preferences([{"prompt": None, "chosen": 1, "rejected": None}, *PLAIN])
    assert pairs.report.schema == "plain strings" and len(pairs) == 3
    assert pairs.report.dropped == {"'prompt' is null": 1}


def test_one_empty_response_is_kept_and_said():
    pairs = load_preferences([{**PLAIN[0], "rejected": ""}])
    assert pairs[0] == simple("Capital of France?", "Paris. GOOD", "")
    assert pairs.report.notes == ["kept although one response is empty: 1"]


# --- columns -----------------------------------------------------------------------------------


def test_columns_win_over_what_is_there():
    row = {
        "question": "q",
        "good": "GOOD",
        "bad": "BAD",
        "prompt": "p",
        "chosen": "c",
        "rejected": "r",
    }
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert one(row, columns=columns) == simple("q", "GOOD", "BAD")
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert one(row, columns=swapped) == simple("p", "r", "c")
    transcripts = {"prompt": "noise", "chosen": TURNS, "rejected": OTHER}
    assert one(transcripts, columns={"prompt": None}) == simple("q", "GOOD", "BAD")


def test_ambiguous_columns_are_refused_and_columns_settle_it():
    row = {**PLAIN[0], "response_a": "A", "response_b": "B"}
    assert one(row) == simple(*PLAIN[0].values())  # two responses without a verdict tell nothing
    row["winner"] = "a"
    with pytest.raises(InputError, match=r"columns=\{'chosen': 'chosen', 'rejected': 'rejected'\}"):
        load_preferences([row])
    columns = {"chosen": "chosen", "rejected": "rejected"}
    assert one(row, columns=columns) == simple(*PLAIN[0].values())
    with pytest.raises(InputError, match="'chosen': 'response_j', 'rejected': 'response_k'"):
        load_preferences([{**PLAIN[0], "response_j": "A", "response_k": "B"}])


@pytest.mark.parametrize(
    "rows, kwargs, words",
    [
        ([{"instruction": "q", "response_j": "a", "response": "b"}], {}, [
            "lack 'chosen' and 'rejected'", "found instruction, response_j, response;",
            "columns={'chosen': '...', 'rejected': '...'}",
        ]),
        ([{"ask": "q", "chosen": "a", "rejected": "b"}], {}, [
            "lack 'prompt'", "columns={'prompt': '...'}",
        ]),
        ([{"question": "q", "context": "c", "chosen": "a", "rejected": "b"}], {}, [
            "'question' and 'context' may both hold", "columns={'prompt': 'context'}",
        ]),
        ([{"text": "a"}], {}, ["found text", "'prompt', 'chosen' and 'rejected'"]),
        ([{"chosen": "a", "rejected": "b"}], {}, ["lack 'prompt'"]),
        ([{"prompt": "q", "chosen": 1, "rejected": 2}], {}, ["'chosen' is int"]),
        ([PLAIN[0]], {"columns": {"chosen": "chosn"}}, ["'chosn'", "nearest: 'chosen'"]),
        ([PLAIN[0]], {"columns": {"promt": "prompt"}}, ["'promt'", "nearest: 'prompt'"]),
        ([PLAIN[0]], {"ties": "maybe"}, ["drop, soft, keep"]),
        ([{"prompt": "q", "chosen": "x", "rejected": "x"}] * 5, {}, ["All 5 pairs", "identical"]),
        ([{"chosen": hh("q", "a"), "rejected": hh("r", "a")}] * 3, {}, ["contexts differ (3)"]),
        ([PLAIN[0], {"chosen": TURNS, "rejected": OTHER}], {}, [
            "list of rows", "plain strings and messages",
        ]),
        ([], {}, ["empty"]),
        ([3, 4], {}, ["[0]", "int"]),
        ({"prompt": ["q"]}, {}, ["dict"]),
        (3, {}, ["int"]),
    ],
)  # fmt: skip
def test_unusable_rows_are_one_clear_error(rows, kwargs, words):
    with pytest.raises(InputError) as error:
        load_preferences(rows, **kwargs)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# --- files -------------------------------------------------------------------------------------


def write_all_kinds(folder):
    """The same rows in every kind of file."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PLAIN).encode()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\n", 1))
    (folder / "lines.json").write_bytes(lines)
    (folder / "array.json").write_text(json.dumps(PLAIN, indent=1))
    (folder / "object.json").write_text(json.dumps({"version": 1, "data": PLAIN}))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.json.xz").write_bytes(lzma.compress(json.dumps(PLAIN).encode()))
    with open(folder / "d.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(PLAIN[0]))
        writer.writeheader()
        writer.writerows(PLAIN)
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(PLAIN)
    pq.write_table(table, folder / "e.parquet")
    with pa.ipc.new_stream(folder / "f.arrow", table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(folder / "g.arrow", table.schema) as file:
        file.write_table(table)
    return sorted(folder.iterdir())


def test_every_kind_of_file_gives_the_same_pairs(tmp_path):
    expected = list(load_preferences(PLAIN))
    files = write_all_kinds(tmp_path)
    assert len(files) == 10
    for path in files:
        pairs = load_preferences(path)
        assert list(pairs) == expected, path.name
        assert pairs.report.source == str(path)
    assert list(load_preferences(str(tmp_path))) == expected * len(files)


def test_zst(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    try:
        import zstandard
    except ImportError:
        path.write_bytes(b"\x28\xb5\x2f\xfd")
        with pytest.raises(InputError, match="pip install zstandard"):
            load_preferences(path)
        return
    data = "".join(json.dumps(row) + "\n" for row in PLAIN).encode()
    path.write_bytes(zstandard.compress(data))
    assert list(load_preferences(path)) == list(load_preferences(PLAIN))
    path.write_bytes(zstandard.compress(data)[:-20])
    with pytest.raises(InputError, match=r"a\.jsonl\.zst"):
        load_preferences(path)


def test_positions_name_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(PLAIN[0]) + "\n\n" + json.dumps(PLAIN[1]))
    assert [where for where, _ in read_rows(path)] == [f"{path}:2", f"{path}:4"]


def test_message_lists_from_parquet_and_datasets(tmp_path):
    import datasets

    rows = [{"prompt": "q", "chosen": TURNS, "rejected": OTHER}] * 2
    expected = [simple("q", "GOOD", "BAD")] * 2
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    both = datasets.DatasetDict({"train": data, "test": data.select([0])})
    both.save_to_disk(tmp_path / "both")
    assert list(load_preferences(tmp_path / "a.parquet")) == expected
    assert list(load_preferences(tmp_path / "saved")) == expected
    assert list(load_preferences(data)) == expected
    assert list(load_preferences(data.to_iterable_dataset())) == expected
    for source in (both, tmp_path / "both"):
        pairs = load_preferences(source)
        assert list(pairs) == expected and pairs.report.source.endswith("[train]")
        assert len(load_preferences(source, split="test")) == 1
    with pytest.raises(InputError, match="one of train, test"):
        load_preferences(both, split="validation")


def test_folder_takes_the_training_files_and_the_split_asked_for(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("no data")
    for name, row in zip(("train_0", "train_1", "test_0"), PLAIN, strict=True):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(row))
    pairs = load_preferences(tmp_path)
    assert [pair.prompt[0].content for pair in pairs] == [row["prompt"] for row in PLAIN[:2]]
    assert pairs.report.source == f"{tmp_path} [train]"
    (only,) = load_preferences(tmp_path, split="test")
    assert only.prompt[0].content == PLAIN[2]["prompt"]
    with pytest.raises(InputError, match="data/test_0"):
        load_preferences(tmp_path, split="dev")
    with pytest.raises(InputError, match="single file"):
        load_preferences(tmp_path / "data" / "train_0.jsonl", split="test")


BROKEN = {
    "empty.jsonl": (b"", ["empty"]),
    "blank.jsonl": (b"\n \n", ["empty"]),
    "empty.json": (b"", ["empty"]),
    "none.json": (b"[]", ["empty"]),
    "header.csv": (b"prompt,chosen,rejected\n", ["empty"]),
    "cut.jsonl": (b'{"prompt": "a"}\n{"prompt": "b"\n', ["cut.jsonl:2:", "not valid JSON"]),
    "cut.json": (b'[\n{"prompt": "a"},\n{"prompt" "b"}]', ["cut.json:3:", "not valid JSON"]),
    "lines.json": (b'{"prompt": "a"}\n{"prompt": \n', ["lines.json:2:", "not valid JSON"]),
    "list.jsonl": (b"[1]\n[2]\n", ["list.jsonl:1:", "list"]),
    "array.jsonl": (b'[\n{"prompt": "a"}\n]', ["array.jsonl:1:", ".json file"]),
    "number.json": (b"3", ["int"]),
    "numbers.json": (b"[3]", ["row 1", "int"]),
    "latin.jsonl": (b'{"a": 1}\n{"prompt": "\xe9"}\n', ["latin.jsonl:2:", "UTF-8"]),
    "not.jsonl.gz": (b'{"prompt": "a"}\n', ["not.jsonl.gz", "gzip"]),
    "cut.jsonl.gz": (
        gzip.compress(json.dumps(PLAIN[0]).encode())[:-9],
        ["cut.jsonl.gz", "cut short"],
    ),
    "not.jsonl.xz": (b'{"prompt": "a"}\n', ["not.jsonl.xz", "damaged"]),
    "not.parquet": (b"PAR1 no", ["not.parquet", "damaged"]),
    "not.arrow": (b"no", ["not.arrow", "damaged"]),
    "wide.csv": (b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", ["wide.csv:3", "quote"]),
    "open.csv": (b'prompt,chosen,rejected\na,b,"c\n', ["open.csv:", "CSV"]),
    "what.txt": (b"", ["no known kind", ".jsonl"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_say_where(tmp_path, name):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_preferences(tmp_path / name)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_flipped_byte_in_a_gzip_is_noticed(tmp_path):
    data = bytearray(gzip.compress("".join(json.dumps(row) + "\n" for row in PLAIN * 50).encode()))
    data[-6] ^= 1  # the checksum
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz"):
        load_preferences(tmp_path / "a.jsonl.gz")


def test_missing_files_name_the_path_and_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "harmless.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_preferences("harmles.jsonl")
    assert str(tmp_path / "harmles.jsonl") in str(error.value)
    assert "did you mean 'harmless.jsonl'" in str(error.value)
    with pytest.raises(InputError, match="does not exist either"):
        load_preferences("nowhere/pairs.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="no data file"):
        load_preferences("folder")
    with pytest.raises(InputError, match="No file or folder"):
        load_preferences("folder/pairs")  # not taken for a hub id: the folder is here


def test_hub_ids_go_to_load_dataset(monkeypatch, tmp_path):
    import datasets

    monkeypatch.chdir(tmp_path)
    calls = []

    def fake(name, split=None):
        calls.append((name, split))
        if name != "org/name":
            raise ConnectionError("cannot reach the hub\nlong trace")
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(PLAIN)})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    pairs = load_preferences("org/name")
    assert len(pairs) == 3 and pairs.report.source == "org/name [train]"
    with pytest.raises(InputError, match=r"hub failed \(cannot reach the hub\)"):
        load_preferences("org/other")
    for path in ("org/data.jsonl", "/org/name", "name", "a/b/c"):
        with pytest.raises(InputError, match="No file or folder"):
            load_preferences(path)
    assert calls == [("org/name", None), ("org/other", None)]


def test_rows_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PLAIN[0]) + "\n{broken\n")
    name, rows = open_rows(path)
    assert name == str(path) and next(rows)[1] == PLAIN[0]  # before the broken line is met
    rows.close()


# --- Preferences -------------------------------------------------------------------------------


@pytest.mark.parametrize("spool", [1, 1 << 20])
def test_preferences_is_a_sequence_on_disk_or_in_memory(monkeypatch, spool):
    monkeypatch.setattr(spool_module, "SPOOL_BYTES", spool)
    pairs = load_preferences(PLAIN)
    expected = [simple(row["prompt"], row["chosen"], row["rejected"]) for row in PLAIN]
    assert len(pairs) == 3 and list(pairs) == expected and pairs[-1] == expected[2]
    assert pairs[1:] == expected[1:] and list(reversed(pairs)) == expected[::-1]
    assert isinstance(pairs[0].prompt[0], Message)
    with pytest.raises(IndexError):
        pairs[3]
    assert load_preferences(pairs) is pairs


def test_list_of_pairs_is_checked():
    good = simple("q", "GOOD", "BAD")
    bad = Pair([("user", "q")], good.chosen, good.rejected)
    pairs = load_preferences(
        [good, simple("q", "x", "x"), bad, {}, Pair([], good.chosen, good.rejected)]
    )
    assert list(pairs) == [good]
    assert sorted(pairs.report.dropped.values()) == [1, 1, 1, 1]


# --- real data ---------------------------------------------------------------------------------


@pytest.mark.skipif(not HH.exists(), reason=f"needs {HH}")
def test_hh_rlhf():
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    # Independent of the parser: cut both at the last marker by position.
    marker = "\n\nAssistant: "
    expected = Counter()
    texts = []
    for row in rows:
        cut = [row[key].rfind(marker) for key in ("chosen", "rejected")]
        context = [row[key][:at] for key, at in zip(("chosen", "rejected"), cut, strict=True)]
        reply = [
            row[key][at + len(marker) :]
            for key, at in zip(("chosen", "rejected"), cut, strict=True)
        ]
        reason = "contexts differ" if context[0] != context[1] else None
        reason = reason or ("identical" if reply[0] == reply[1] else "kept")
        expected[reason] += 1
        if reason == "kept":
            texts.append((context[0], *reply))
    pairs = load_preferences(HH)
    assert pairs.report.rows == 1500 and pairs.report.kept == len(pairs) == expected.pop("kept")
    assert pairs.report.dropped == dict(expected) == {"contexts differ": 1}
    assert pairs.report.dropped_at["contexts differ"].endswith("hh_harmless.jsonl.gz:1255")
    for pair, (context, chosen, rejected) in zip(pairs, texts, strict=True):
        assert pair.prompt[-1].role == "user"
        roles = [message.role for message in pair.prompt]
        assert all(a != b for a, b in itertools.pairwise(roles))
        assert pair.chosen == [Message("assistant", chosen)]
        assert pair.rejected == [Message("assistant", rejected)]
        speakers = {"user": "Human", "assistant": "Assistant"}
        assert "".join(f"\n\n{speakers[r]}: {text}" for r, text in pair.prompt) == context


# --- split -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "system"]), st.text(max_size=3)), max_size=30),
    st.floats(0.0, 0.999),
)
def test_split_shares_no_prompt_and_leaves_no_side_empty(prompts, fraction):
    reply = [Message("assistant", "x")]
    pairs = [Pair([Message(*prompt)], reply, []) for prompt in prompts]
    train, held_out = split_pairs(pairs, fraction)
    assert sorted(train + held_out) == list(range(len(pairs)))
    assert {prompts[i] for i in train}.isdisjoint(prompts[i] for i in held_out)
    distinct = len(set(prompts))
    assert bool(held_out) == (fraction > 0 and distinct > 1)
    assert bool(train) == (distinct > 0)
    # Order and repetition of rows change no row's side.
    again, _ = split_pairs(pairs[::-1] * 2, fraction)
    assert {prompts[::-1][i % len(pairs)] for i in again} == {prompts[i] for i in train}


def test_split_fraction_is_about_right_and_checked():
    pairs = [simple(str(i), "a", "b") for i in range(2000)]
    _, held_out = split_pairs(pairs, 0.1)
    assert 140 < len(held_out) < 260
    more = [*pairs, *(simple(f"new {i}", "a", "b") for i in range(50))]
    assert split_pairs(more, 0.1)[1][: len(held_out)] == held_out  # rows keep their side
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match=r"\[0, 1\)"):
            split_pairs(pairs, fraction)


def test_a_stray_column_does_not_hide_what_the_others_have():
    rows = [{"question": f"q{i}", "chosen": "GOOD", "rejected": "BAD"} for i in range(30)]
    rows[3] = {**rows[3], "prompt": "stray"}
    pairs = load_preferences(rows)
    assert len(pairs) == 30 and pairs[3] == simple("q3", "GOOD", "BAD")


def test_a_data_frame_is_a_source():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(PLAIN)
    assert list(load_preferences(frame)) == list(load_preferences(PLAIN))
