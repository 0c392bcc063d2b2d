"""`prefopt data inspect` and `prefopt data doctor`: what they print and write, and how they end."""

import json
import re

import numpy as np
import pytest

from prefopt import data_commands, loading
from prefopt.command_groups import Reading
from prefopt.data.audit.overview import as_seen, overview
from prefopt.data.encode import encode_pairs
from prefopt.data.records import Message, Pair
from prefopt.data.sources import load_preferences
from prefopt.errors import InputError

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer(str(loading.EMBEDDED / "model"))


@pytest.fixture
def file(tmp_path):
    """A file with faults, and texts that a terminal should not obey."""
    rows: list[dict[str, object]] = [
        {"prompt": f"question {n} {'word ' * n}", "chosen": "yes " * (n + 2), "rejected": "no " * 5}
        for n in range(12)
    ]
    rows[3]["chosen"] = ""
    rows[4] |= {"chosen": "\x1b[31mred\x07 \u202eback", "source": "web\x1b[2J"}
    rows[5] |= {"margin": 1.5, "chosen": "x" * 500}
    rows += [{"prompt": "p", "chosen": 7, "rejected": "b"}]
    path = tmp_path / "a folder with a rather long name" / "pairs.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def inspect(data, **options) -> int:
    return data_commands.inspect(Reading(), str(data), **options)


def doctor(data, reading=Reading(), **options) -> int:  # noqa: B008 - frozen
    return data_commands.doctor(reading, str(data), **options)


# --- what the terminal shows -------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", [inspect, doctor])
def test_no_line_is_wider_than_the_terminal_and_colour_changes_nothing(
    command, width, file, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.delenv("NO_COLOR", raising=False)
    command(file, max_length=60)
    plain = capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    command(file, max_length=60)
    coloured = capsys.readouterr().out
    assert "\x1b[" not in plain and "\x1b[3" in coloured
    assert ESCAPE.sub("", coloured) == plain
    assert max(map(len, plain.splitlines())) <= width
    assert "\x07" not in plain and "\u202e" not in plain and "\x1b" not in ESCAPE.sub("", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    command(file, max_length=60)
    assert not re.search(r"\x1b\[[0-9;]*3\d", capsys.readouterr().out)


def test_the_verdict_is_the_last_line(file, tmp_path, capsys):
    assert doctor(file) == 1
    out = capsys.readouterr().out
    assert out.rstrip().rpartition("verdict: ")[2].startswith("1 error, 1 warning: look at them")
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps({"prompt": "q", "chosen": "an answer", "rejected": "no answer"}))
    assert doctor(good) == 0
    assert capsys.readouterr().out.rstrip().endswith("verdict: no error, no warning")


def test_exit_codes(file, tmp_path):
    assert doctor(file, fail_on="never") == 0
    assert doctor(file, fail_on="warning") == 1
    assert doctor(file, fix=str(tmp_path / "fixed.jsonl")) == 0  # its only error is mended
    assert doctor(tmp_path / "fixed.jsonl") == 0
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(b'{"prompt": "\xff"}')
    for command in (inspect, doctor):
        with pytest.raises(InputError, match=r"broken\.jsonl:1"):
            command(broken)


def test_inspect_shows_the_schema_the_columns_and_the_lengths(file, capsys):
    inspect(file, rows=1)
    out = capsys.readouterr().out
    assert "12 of 13 rows kept" in out and "read as plain strings" in out
    assert "columns: prompt, chosen, rejected, source, margin" in out
    assert "sources: web\\x1b[2J 1" in out
    assert "margins: pairs 1, least 1.5" in out
    assert "template chat: the tokenizer's own chat template" in out
    assert out.count("pairs.jsonl:1:") == 1


def test_a_row_is_found_by_the_number_that_doctor_prints(file, capsys):
    inspect(file, row=6)
    out = capsys.readouterr().out
    assert "pairs.jsonl:6:" in out and "xxxx" in out and "pairs.jsonl:1:" not in out
    with pytest.raises(InputError, match="no pair is made of row 13"):
        inspect(file, row=13)


# --- JSON --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [inspect, doctor])
def test_json_alone_on_standard_output_and_in_a_file(command, file, tmp_path, capsys):
    code = command(file, json="-")
    printed = json.loads(capsys.readouterr().out)
    out = tmp_path / "result.json"
    assert command(file, json=str(out)) == code
    assert "read as" in capsys.readouterr().out
    assert json.loads(out.read_text()) == printed
    assert printed.get("exit_code", 0) == code == (command is doctor)
    assert printed["data"]["rows"] == 13
    with pytest.raises(InputError, match="folder of --json"):
        command(file, json=str(tmp_path / "none" / "x.json"))


def test_json_of_the_doctor(file, tmp_path, capsys):
    fixed = tmp_path / "fixed.jsonl"
    doctor(file, json="-", fix=str(fixed))
    told = json.loads(capsys.readouterr().out)
    (error,) = [check for check in told["checks"] if check["severity"] == "error"]
    assert error["check"] == "empty chosen response"
    assert error["examples"] == [f"{file}:4"] and error["share"] == pytest.approx(1 / 12)
    assert (told["errors"], told["exit_code"], told["written"]) == (1, 0, 11)
    assert len(fixed.read_text().splitlines()) == 11


# --- the other side ----------------------------------------------------------------------------


def test_the_other_split_of_a_folder_is_held_out(tmp_path, capsys):
    row = {"chosen": "an answer", "rejected": "no answer"}
    for split, prompts in (("train", "abc"), ("test", "cd")):
        texts = (json.dumps({"prompt": f"question {p * 9}", **row}) for p in prompts)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(texts))
    assert doctor(tmp_path, json="-") == 1
    told = json.loads(capsys.readouterr().out)
    (leak,) = [check for check in told["checks"] if check["check"] == "held-out prompts"]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    assert leak["examples"] == [f"{train}:3 (like {test}:1)"]
    assert told["held_out"] == "test, 2 prompts"
    for held_out in ("test", str(test)):
        assert doctor(tmp_path, json="-", held_out=held_out) == 1
        assert json.loads(capsys.readouterr().out)["checks"] == told["checks"]
    assert doctor(train, json="-") == 0  # a single file: no other split
    assert "by their hash" in json.loads(capsys.readouterr().out)["held_out"]


def test_a_benchmark_file(file, tmp_path, capsys):
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps([{"prompt": "Question 7 word word word word word word word"}]))
    assert doctor(file, against=str(bench), json="-") == 1
    told = json.loads(capsys.readouterr().out)
    (hit,) = [check for check in told["checks"] if check["check"] == "benchmark prompts"]
    assert hit["examples"] == [f"{file}:8 (like {bench} row 1)"]
    # RewardBench 2 has lists of responses beside its prompts.
    lists = {"prompt": "question 3 word word word", "chosen": ["a"], "rejected": ["b", "c"]}
    other = tmp_path / "bench2.jsonl"
    other.write_text(json.dumps(lists))
    assert doctor(file, against=[str(bench), str(other)], json="-") == 1
    told = json.loads(capsys.readouterr().out)
    (hit,) = [check for check in told["checks"] if check["check"] == "benchmark prompts"]
    assert hit["examples"] == [f"{file}:4 (like {other}:1)", f"{file}:8 (like {bench} row 1)"]
    with pytest.raises(InputError, match=r"none\.jsonl"):
        doctor(file, against=str(tmp_path / "none.jsonl"))


# --- a pair as the model sees it ---------------------------------------------------------------


@pytest.mark.parametrize("max_length", [1024, 25, 18, 16, 12, 10, 3])
def test_the_preview_shows_every_token_and_what_is_cut_off(max_length, tokenizer):
    pair = Pair(
        [Message("user", "how are you?")],
        [Message("assistant", "I am very well today, thank you.")],
        [Message("assistant", "I am very unhappy, and it is your fault.")],
    )
    (whole,) = encode_pairs([pair], tokenizer)
    text = [tokenizer.decode(ids.tolist()) for ids in (whole.prompt, *whole.responses)]
    says, segments = as_seen(pair, tokenizer, max_length=max_length)
    assert segments[0] == ("prompt", text[0])
    assert "".join(part for _, part in segments[1:]) == text[1] + text[2]
    room = max(max_length - len(whole.prompt), 0)
    cut = [part for kind, part in segments if kind == "cut off"]
    assert cut == [tokenizer.decode(r[room:].tolist()) for r in whole.responses if len(r) > room]
    same = next(i for i, (a, b) in enumerate(zip(*whole.responses, strict=False)) if a != b)
    assert same > 1 and ("left out" in says) == (room <= same)
    assert says.startswith(f"{len(whole.prompt)} + {len(whole.responses[0])} and ")


def test_the_preview_tells_turns_that_are_not_scored(tokenizer):
    prompt = [Message("user", "hello")]
    chosen, rejected = (
        [Message("assistant", a), Message("user", "go on"), Message("assistant", b)]
        for a, b in (("good day", "as you like"), ("what?", "go away"))
    )
    _, segments = as_seen(Pair(prompt, chosen, rejected), tokenizer)
    kinds = [kind for kind, _ in segments]
    assert kinds.count("prompt") == 3 and kinds.count("eos") == 2
    given = [text for kind, text in segments if kind == "prompt"]
    assert "go on" in given[1] and "go on" in given[2]
    said = {side: "".join(t for k, t in segments if k == side) for side in ("chosen", "rejected")}
    assert "as you like" in said["chosen"] and "what?" in said["rejected"]


def test_lengths_and_histogram(file, tokenizer):
    pairs = load_preferences(str(file))
    about = overview(pairs, tokenizer)
    encoded = encode_pairs(pairs, tokenizer, max_length=2**20)
    tokens = np.array([[len(e.prompt), *map(len, e.responses)] for e in encoded])
    for k, side in enumerate(("prompt", "chosen", "rejected")):
        told = about["lengths"]["tokens"][side]
        assert told["mean"] == pytest.approx(tokens[:, k].mean())
        assert told["max"] == tokens[:, k].max()
        counts = about["histogram"]["counts"][side]
        assert sum(counts) == len(tokens)
        for label, count in zip(about["histogram"]["bins"], counts, strict=True):
            low, _, high = label.replace(",", "").partition(" to ")
            inside = (tokens[:, k] >= int(low)) & (tokens[:, k] <= int(high or low))
            assert count == inside.sum()
    assert about["lengths"]["characters"]["chosen"]["max"] == 500


@pytest.mark.parametrize("max_length", [16, 24, 40, 1024])
def test_what_becomes_of_the_pairs_is_what_encoding_counts(max_length, file, tokenizer):
    pairs = load_preferences(str(file))
    told = overview(pairs, tokenizer, max_length=max_length)["encoding"]
    encoded = encode_pairs(pairs, tokenizer, max_length=max_length)
    assert told["kept"] == len(encoded)
    filled = encoded.counts.get("dropped: prompt fills max_length", 0)
    assert told.get("left out, the prompt fills max_length", 0) == filled
    same = encoded.counts.get("dropped: identical after truncation", 0)
    assert told.get("left out, the difference is cut off", 0) == same
    cut = told.get("with a truncated response", 0)
    assert cut <= encoded.counts["truncated"] <= 2 * cut


def test_inspect_of_pairs_that_all_fall_to_max_length(file, capsys):
    inspect(file, max_length=2, json="-")
    told = json.loads(capsys.readouterr().out)
    assert told["encoding"] == {"max_length": 2, "left out, the prompt fills max_length": 12}
    assert all("left out, the prompt fills" in shown["says"] for shown in told["pairs_shown"])


def test_settings_that_make_no_sense(file):
    with pytest.raises(InputError, match="max_length=1 leaves no room"):
        inspect(file, max_length=1)
    with pytest.raises(InputError, match="rows is -1"):
        inspect(file, rows=-1)
    with pytest.raises(InputError, match="what --data reads already"):
        doctor(file, held_out="train")
    with pytest.raises(InputError, match="split='test'"):
        doctor(file, held_out="test")
    with pytest.raises(InputError, match="held-out fraction"):
        doctor(file, eval_fraction=1.5)
