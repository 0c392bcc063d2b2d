"""Iterative DPO: it learns what is rewarded, every pair can be traced, and an iteration that was
stopped or killed anywhere ends up exactly where it would have."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefopt import DPO, InputError, LoraConfig, Message, Policy, TrainConfig, load_preferences
from prefopt import sampling as sampling_module
from prefopt.data.encode import encode_pairs
from prefopt.data.prompts import load_prompts
from prefopt.data.split import split_pairs
from prefopt.loading import EMBEDDED
from prefopt.metrics import Progress
from prefopt.nn.heads import ScoreStats
from prefopt.objectives.kto import KTO
from prefopt.objectives.sft import SFT
from prefopt.round_files import figures, repeated, show, table
from prefopt.round_pairs import AsSampled
from prefopt.rounds import iterate
from prefopt.rundir import RunDir
from prefopt.sampling import Answers, Sampler, read_rows

ASKED = [f"Tell me about {thing} {n}." for thing in ("cats", "dogs", "trees") for n in range(6)]
SAMPLES = 3


def es(prompts, responses):
    """How many times a response has the letter e."""
    return [float(text.count("e")) for text in responses]


def no_es(prompts, responses):
    return [-float(text.count("e")) for text in responses]


class Bench:
    """Iterations on one tiny model and one cache."""

    def __init__(self, root, model):
        self.root, self.model = root, model

    def run(self, out, rewards=es, *, rounds=2, prompts=ASKED, resume=None, train=None, **options):
        config = TrainConfig(
            str(self.root / out), batch_size=4, micro_tokens=600, max_length=128, lr=2e-2,
            eval_fraction=0.25, save_every=2, samples=0, resume=resume,
            cache=str(self.root / "cache"), **(train or {}),
        )  # fmt: skip
        defaults = {"samples": SAMPLES, "max_new_tokens": 8, "lora": LoraConfig(r=4, dropout=0.1)}
        options = {**defaults, "quiet": True, "dtype": "float32", **options}
        return iterate(self.model, prompts, rewards, config, rounds=rounds, **options)

    def dir(self, out):
        return self.root / out


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several chunks of few prompts each, and no report.html."""
    monkeypatch.setattr(sampling_module, "CHUNK", 6)
    monkeypatch.setattr(RunDir, "report", lambda self: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("rounds")


@pytest.fixture(scope="module")
def whole(root, tiny_model):
    """Two rounds, uninterrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_module, "CHUNK", 6)
        patch.setattr(RunDir, "report", lambda self: None)
        bench = Bench(root, tiny_model)
        results = bench.run("whole")
    return bench.dir("whole"), results


@pytest.fixture
def bench(tmp_path, tiny_model):
    return Bench(tmp_path, tiny_model)


def rounds_of(out):
    return json.loads((out / "rounds.json").read_text())["rounds"]


def weights(out, k):
    return load_file(out / f"round-{k}" / "model" / "adapter_model.safetensors")


def check_same(out, whole):
    """The same pairs byte for byte, the same weights bit for bit, the same figures."""
    for k in (1, 2):
        for name in ("pairs.jsonl", "responses.jsonl", "held_out.jsonl", "held_out_scores.jsonl"):
            a, b = (folder / f"round-{k}" / name for folder in (out, whole))
            assert a.read_bytes() == b.read_bytes(), a
        a, b = weights(out, k), weights(whole, k)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert rounds_of(out) == rounds_of(whole)


# -- what an iteration does


def test_what_is_rewarded_becomes_more(tmp_path):
    """On the embedded model, whose answers are polite or rude: the reward counts polite words."""

    def polite(prompts, responses):
        words = ("please", "glad", "happy", "thank", "sure", "of course", "welcome", "sorry")
        return [min(2, sum(word in text.lower() for word in words)) for text in responses]

    prompts = load_prompts(load_preferences(EMBEDDED / "preferences.jsonl.gz")[:64])
    config = TrainConfig(
        str(tmp_path / "out"), lr=5e-3, epochs=2, batch_size=4, max_length=256, save_every=0,
        eval_fraction=0.25, samples=0, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    iterate("embedded", prompts, polite, config, rounds=2, max_new_tokens=24, quiet=True)
    told = [row["held_out"]["rewards"]["reward"] for row in rounds_of(tmp_path / "out")]
    error = max(reward["standard_error"] for reward in told)
    assert told[2]["mean"] > told[0]["mean"] + 4 * error, told


def test_the_results_are_the_rows(whole):
    out, results = whole
    assert [r.round for r in results] == [1, 2] and not any(r.stopped for r in results)
    assert [r.dir for r in results] == [out / "round-1", out / "round-2"]
    assert [r.row for r in results] == rounds_of(out)[1:]


def test_the_figures_are_those_of_the_files(whole):
    out, _ = whole
    for k, row in enumerate(rounds_of(out)):
        answers = read_rows(out / f"round-{k}" / "held_out.jsonl")
        told = row["held_out"]
        assert told["prompts"] == len(answers) and told["responses"] == SAMPLES * len(answers)
        means = [np.mean(es(None, a["responses"])) for a in answers]
        assert told["rewards"]["reward"]["mean"] == pytest.approx(np.mean(means))
        error = np.std(means, ddof=1) / np.sqrt(len(means))
        assert told["rewards"]["reward"]["standard_error"] == pytest.approx(error)
        assert told["tokens"] == pytest.approx(np.mean([a["tokens"] for a in answers]))
        ended = np.mean([[f == "stop" for f in a["finish"]] for a in answers])
        assert told["ended"] == pytest.approx(ended)


def test_every_pair_can_be_traced(whole, tiny_model):
    out, _ = whole
    for k in (1, 2):
        asked = {a["prompt"]: a for a in read_rows(out / f"round-{k}" / "responses.jsonl")}
        held = {a["prompt"]: a for a in read_rows(out / f"round-{k - 1}" / "held_out.jsonl")}
        assert not asked.keys() & held.keys() and len(asked) + len(held) == len(ASKED)
        rows = read_rows(out / f"round-{k}" / "pairs.jsonl")
        assert rows
        for row in rows:
            about = row["lineage"]
            assert about["round"] == k and about["seed"] == 0 and about["temperature"] == 1.0
            assert about["model"] == (str(tiny_model) if k == 1 else "round-1")
            answer = (held if about["held_out"] else asked)[about["prompt"]]
            scores = es(None, answer["responses"])
            for i, side in enumerate(("chosen", "rejected")):
                text = answer["responses"][about[side]]
                assert row[side] == [{"role": "assistant", "content": text}]
                assert about["finish"][i] == answer["finish"][about[side]]
                assert about["scores"]["reward"][i] == about["combined"][i] == text.count("e")
            assert row["prompt"] == [{"role": "user", "content": ASKED[about["prompt"]]}]
            assert about["combined"] == [max(scores), min(scores)]
            assert row["margin"] == max(scores) - min(scores) > 0
        counts = rounds_of(out)[k]
        assert counts["pairs"] == sum(not row["lineage"]["held_out"] for row in rows)
        assert counts["held_out_pairs"] == len(rows) - counts["pairs"]
        assert counts["pairs"] + sum(counts["dropped"].values()) == counts["prompts"] == len(asked)


def test_pairs_are_a_data_set_like_any_other(whole):
    out, _ = whole
    path = out / "round-1" / "pairs.jsonl"
    pairs = load_preferences(path)
    assert pairs.report.dropped == {} and len(pairs) == len(read_rows(path))
    assert pairs[0].margin == read_rows(path)[0]["margin"]


def test_the_held_out_prompts_are_those_that_training_holds_out(whole):
    out, _ = whole
    for k in (1, 2):
        path = out / f"round-{k}" / "pairs.jsonl"
        rows, pairs = read_rows(path), load_preferences(path)
        _, held = split_pairs(pairs, 0.25)
        assert held == [i for i, row in enumerate(rows) if row["lineage"]["held_out"]]
        told = json.loads((out / f"round-{k}" / "evaluation.json").read_text())["after"]
        row = rounds_of(out)[k]["evaluation"]
        assert row["n"] == told["n"] == len(held)
        assert row["accuracy"] == told["accuracy"] == row["rewards"]["reward"]["accuracy"]
        assert row["margin_mean"] == pytest.approx(told["margin_mean"], abs=1e-6)


def test_every_round_starts_from_the_one_before_which_is_its_reference(whole):
    out, _ = whole
    before = json.loads((out / "round-2" / "evaluation.json").read_text())["before"]
    assert before["ties"] == before["n"] > 0
    config = yaml.safe_load((out / "round-2" / "config.yaml").read_text())
    assert config["model"] == str(out.absolute() / "round-1") and config["round"] == 2
    policies = [Policy.from_pretrained(out / f"round-{k}") for k in (1, 2)]
    assert policies[0].base == policies[1].base and policies[1].has_reference_copy
    assert any(not torch.equal(weights(out, 1)[n], weights(out, 2)[n]) for n in weights(out, 1))


def test_a_finished_iteration_is_returned_as_it_is(whole, root, tiny_model, monkeypatch):
    results = whole[1]
    monkeypatch.setattr(Policy, "from_pretrained", None)
    again = Bench(root, tiny_model).run("whole", resume="auto")
    assert again == results


def test_a_finished_iteration_may_go_on(whole, bench):
    shutil.copytree(whole[0], bench.dir("more"))
    results = bench.run("more", rounds=3, resume="auto")
    assert [r.round for r in results] == [1, 2, 3] and len(rounds_of(bench.dir("more"))) == 4
    assert results[:2] == [
        dataclasses.replace(r, dir=bench.dir("more") / r.dir.name) for r in whole[1]
    ]


# -- stopped and killed


class Crash(Exception):
    pass


@contextlib.contextmanager
def at(phase, count, act):
    """``act()`` as a phase begins for the ``count``-th time; with "step": when a step is done."""
    seen, real_phase, real_update = [], Progress.phase, Progress.update

    def began(self, name, total):
        seen.append(name)
        if name == phase and seen.count(name) == count:
            act()
        real_phase(self, name, total)

    def updated(self, step, metrics=None):
        if phase == f"{seen[-1]} update" and step == count:
            act()
        real_update(self, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "phase", began)
        patch.setattr(Progress, "update", updated)
        yield


def crash():
    raise Crash


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


STAGES = [
    ("sample update", 6), ("score update", 6), ("reference", 1), ("train update", 3),
    ("sample", 4), ("sample", 5),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "count"), STAGES)
def test_killed_anywhere_it_ends_up_where_it_would_have(bench, whole, phase, count):
    with pytest.raises(Crash), at(phase, count, crash):
        bench.run("out")
    for path in bench.dir("out").glob("round-*/*responses*.jsonl"):
        if not (path.parent / "model").exists():  # as a power cut may leave a file
            path.write_bytes(path.read_bytes()[:-7])
    bench.run("out", resume="auto")
    check_same(bench.dir("out"), whole[0])


@pytest.mark.parametrize(("phase", "count"), [("sample", 2), ("train update", 1)])
def test_sigterm_anywhere_stops_cleanly(bench, whole, phase, count, capsys):
    with at(phase, count, terminate):
        results = bench.run("out", quiet=False)
    assert "stopped in round 1; --resume auto" in capsys.readouterr().out
    assert results[-1].stopped and len(results) == 1
    handler = signal.getsignal(signal.SIGTERM)
    again = bench.run("out", resume="auto")
    assert signal.getsignal(signal.SIGTERM) is handler
    check_same(bench.dir("out"), whole[0])
    assert [r.row for r in again] == [r.row for r in whole[1]]


def test_a_signal_in_the_last_moments_of_a_run_stops_the_rounds(bench, whole, monkeypatch):
    """train() is beyond the point where it would look for it, and returns as if nothing was."""
    real = RunDir.save_model

    def saved(self, policy):
        terminate()
        real(self, policy)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save_model", saved)
        results = bench.run("out")
    assert [r.stopped for r in results] == [True] and len(rounds_of(bench.dir("out"))) == 1
    bench.run("out", resume="auto")
    check_same(bench.dir("out"), whole[0])


def test_nothing_is_sampled_or_scored_twice(bench, whole):
    asked = []

    def counting(prompts, responses):
        asked.extend(responses)
        return es(prompts, responses)

    counting.__module__, counting.__qualname__ = es.__module__, es.__qualname__
    with pytest.raises(Crash), at("reference", 1, crash):
        bench.run("out", counting)
    first = len(asked)
    assert first == len(ASKED) * SAMPLES  # the round's and, before it, the held-out ones
    bench.run("out", counting, resume="auto")
    held = rounds_of(whole[0])[0]["held_out"]["responses"]
    assert len(asked) - first == first + held
    check_same(bench.dir("out"), whole[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 4}, "started with sampler.n = 3 and this call has 4"),
        ({"prompts": ASKED[1:]}, "started with prompts = '18 prompts"),
        ({"rewards": no_es}, "started with rewards.reward"),
        ({"lora": LoraConfig(r=8)}, r"started with lora\.(alpha|dropout|r)"),
        ({"train": {"warmup": 0.5}}, "train.warmup = 0.1"),
        ({"objective": DPO("ipo")}, r"objective\.(name|loss) = "),
        ({"objective": DPO(label_smoothing=0.1)}, r"objective\.loss = \[\[1.0, 'dpo', \{.*0.1"),
        ({"settings": {"split": "test"}}, r"given(.split)? = "),
    ],
)
def test_changed_settings_are_refused(whole, root, tiny_model, changes, message):
    with pytest.raises(InputError, match=message):
        Bench(root, tiny_model).run("whole", resume="auto", **changes)
    assert len(rounds_of(whole[0])) == 3


# -- rewards


def test_a_score_that_is_no_number_names_its_sample_and_loses_nothing(bench, whole):
    def broken(prompts, responses):
        bad = [i for i, p in enumerate(prompts) if p[-1].content == ASKED[9]]
        return [float("nan") if i in bad[1:2] else x for i, x in enumerate(es(None, responses))]

    broken.__module__, broken.__qualname__ = es.__module__, es.__qualname__
    with pytest.raises(InputError) as caught:
        bench.run("out", broken)
    assert "reward 'reward' gave nan" in str(caught.value) and ASKED[9] in str(caught.value)
    folder = bench.dir("out") / "round-1"
    assert len(read_rows(folder / "responses.jsonl")) == rounds_of(whole[0])[0]["prompts"]
    assert len(read_rows(folder / "responses_scores.jsonl")) in (0, 6)  # whole chunks
    assert not (folder / "pairs.jsonl").exists() and not (folder / "model").exists()
    bench.run("out", es, resume="auto")
    check_same(bench.dir("out"), whole[0])


@pytest.mark.parametrize("heavy", ["more", "less"])
def test_of_two_opposite_wishes_the_weights_decide(bench, heavy):
    weights = {"more": 1.0, "less": 1.0, heavy: 3.0}
    (result,) = bench.run("out", {"more": es, "less": no_es}, rounds=1, reward_weights=weights)
    rows = read_rows(result.dir / "pairs.jsonl")
    for row in rows:
        more, less = row["lineage"]["scores"]["more"], row["lineage"]["scores"]["less"]
        assert more == [-x for x in less]
        assert (more[0] > more[1]) == (heavy == "more")
    told = result.row["evaluation"]
    assert told["rewards"][heavy]["accuracy"] == told["accuracy"]
    light = next(name for name in weights if name != heavy)
    assert told["rewards"][light]["accuracy"] == pytest.approx(1 - told["accuracy"])
    means = result.row["held_out"]["rewards"]
    assert means["more"]["mean"] == -means["less"]["mean"]


def test_wishes_that_cancel_make_no_pair(bench):
    with pytest.raises(InputError, match=r"round 1 has no pair to train on.*tie \(14\)"):
        bench.run("out", {"more": es, "less": no_es})


def test_a_constant_reward_says_so_and_trains_nothing(bench):
    with pytest.raises(InputError) as caught:
        bench.run("out", lambda prompts, responses: [1.0] * len(responses))
    text = str(caught.value)
    assert "of 3 answers to each of" in text and ", tie (" in text and "reward" in text
    assert not (bench.dir("out") / "round-1" / "model").exists()


def test_a_reward_model_ranks(bench, tmp_path):
    torch.manual_seed(0)
    policy = Policy.from_pretrained(bench.model, head="score", dtype="float32")
    policy.score_stats = ScoreStats(0.0, 0.5, 9)
    policy.save_pretrained(tmp_path / "rm")
    (result,) = bench.run("out", {"rm": str(tmp_path / "rm"), "e": es}, rounds=1)
    settings = json.loads((bench.dir("out") / "rounds.json").read_text())["settings"]
    assert settings["rewards"]["rm"] == str(tmp_path / "rm")
    answers = [
        row
        for name in ("round-1/responses", "round-0/held_out")
        for row in read_rows(bench.dir("out") / f"{name}_scores.jsonl")
    ]
    e = np.array([x for row in answers for x in row["scores"]["e"]])
    for row in read_rows(result.dir / "pairs.jsonl"):
        scores, combined = row["lineage"]["scores"], row["lineage"]["combined"]
        for i in (0, 1):  # the model by its own scale, the function by that of these samples
            want = scores["rm"][i] / 0.5 + (scores["e"][i] - e.mean()) / e.std()
            assert combined[i] == pytest.approx(want)


# -- options


def test_samples_follow_from_seed_and_place(tiny_model):
    policy = Policy.from_pretrained(tiny_model, dtype="float32")
    prompts = [[Message("user", text)] for text in ASKED[:2]]

    def answers(seed, place, temperature=1.0):
        sampler = Sampler(3, temperature, 6, "auto", seed)
        return [row["responses"] for row in sampler.answer(policy, prompts, place)]

    first = answers(0, (1, 1, 0))
    assert [len(texts) for texts in first] == [3, 3] and len(set(first[0])) > 1
    assert answers(0, (1, 1, 0)) == first
    others = [(1, (1, 1, 0)), (0, (0, 1, 0)), (0, (1, 2, 0)), (0, (1, 1, 1))]
    assert all(answers(*other) != first for other in others)
    nearly_greedy = answers(0, (1, 1, 0), 1e-4)
    assert all(len(set(texts)) == 1 for texts in nearly_greedy)


def test_other_prompts_in_every_round(bench):
    bench.run("out", prompts_per_round=5, rounds=2)
    asked = [
        {row["prompt"] for row in read_rows(bench.dir("out") / f"round-{k}" / "responses.jsonl")}
        for k in (1, 2)
    ]
    assert [len(numbers) for numbers in asked] == [5, 5] and not asked[0] & asked[1]
    assert [row["held_out"]["prompts"] for row in rounds_of(bench.dir("out"))] == [4, 4, 4]


def test_all_weights_kto_and_every_pair(bench):
    results = bench.run("out", lora=None, pairing="all", objective=KTO())
    for result in results:
        assert (result.dir / "model" / "config.json").is_file()
        assert result.row["pairs"] > result.row["prompts"]
        tries = 3 * result.row["prompts"]
        assert result.row["pairs"] + sum(result.row["dropped"].values()) == tries
        assert result.row["evaluation"]["n"] == result.row["held_out_pairs"]
    before = json.loads((results[1].dir / "evaluation.json").read_text())["before"]
    assert before["ties"] == before["n"] > 0  # the model of round 1 is the reference of round 2


def test_a_4_bit_base_stays_one(bench):
    results = bench.run("out", quantize="nf4")
    kind = json.loads((results[1].dir / "model" / "base_quantization.json").read_text())
    assert kind == {"kind": "nf4"}
    before = json.loads((results[1].dir / "evaluation.json").read_text())["before"]
    assert before["ties"] == before["n"] > 0


def test_without_held_out_prompts(bench):
    config = TrainConfig(
        str(bench.dir("out")), batch_size=4, max_length=128, lr=1e-2, eval_fraction=0.0,
        samples=0, save_every=0, cache=str(bench.dir("cache")),
    )  # fmt: skip
    options = {"samples": 2, "max_new_tokens": 6, "quiet": True}
    (result,) = iterate(bench.model, ASKED[:8], es, config, rounds=1, **options)
    assert result.row["held_out"] == {} == result.row["evaluation"]
    assert rounds_of(bench.dir("out"))[0]["held-out prompts"] == 0
    assert "reward" not in str(table(rounds_of(bench.dir("out"))).title)


def test_held_out_prompts_that_make_no_pair_hold_nothing_out(bench, whole):
    """Then every pair is trained on, where split_pairs alone would hold one out."""
    held = {ASKED[a["prompt"]] for a in read_rows(whole[0] / "round-0" / "held_out.jsonl")}

    def blind(prompts, responses):
        pairs = zip(prompts, es(None, responses), strict=True)
        return [0.0 if prompt[-1].content in held else x for prompt, x in pairs]

    (result,) = bench.run("out", blind, rounds=1)
    assert result.row["held_out_pairs"] == 0 and result.row["evaluation"] == {}
    assert not (result.dir / "evaluation.json").exists()
    report = json.loads((result.dir / "data_report.json").read_text())["encoding"]
    assert report["train pairs"] == result.row["pairs"] > 3


def test_an_answer_that_was_cut_has_no_end(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [
        {"prompt": "p", "chosen": "a good answer", "rejected": "a bad one"},
        {"prompt": "q", "chosen": "a good answer", "rejected": "a bad one"},
    ]
    cut = [["stop", "length"], ["length", "stop"]]
    objective = AsSampled(DPO(), [{"lineage": {"finish": f}} for f in cut])
    options = {"max_length": 64, "template": "auto"}
    given = objective.encode(load_preferences(rows), tokenizer, **options)
    usual = encode_pairs(load_preferences(rows), tokenizer, max_length=64)
    for item, plain, finish in zip(given, usual, cut, strict=True):
        for ids, whole, how in zip(item.responses, plain.responses, finish, strict=True):
            assert whole[-1] == tokenizer.eos_token_id
            assert ids.tolist() == (whole if how == "stop" else whole[:-1]).tolist()
    assert objective.beta == 0.1 and objective.unit == "pairs"


def test_prompts_that_leave_no_room(bench):
    long = [*ASKED[:8], "word " * 60]
    bench.run("out", prompts=long, rounds=1)
    assert rounds_of(bench.dir("out"))[0]["prompts without room"] == 1
    with pytest.raises(InputError, match="none of the 2 prompts leaves room for 8 new tokens"):
        bench.run("other", prompts=["word " * 60, "word " * 70])
    assert not bench.dir("other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds and prompts_per_round must be at least 1"),
        ({"prompts_per_round": 0}, "at least 1"),
        ({"samples": 1}, "samples is 1; a pair needs at least 2"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"pairing": "worst"}, "pairing is 'worst'"),
        ({"min_gap": -1}, "min_gap is -1"),
        ({"objective": SFT()}, "the objective is DPO or KTO"),
        ({"rewards": {}}, "there is no reward"),
        ({"rewards": {"a": es}, "reward_weights": {"b": 1}}, "the reward 'b'"),
        ({"rewards": "no/such/folder"}, "no model folder"),
        ({"rewards": 3}, "reward 'reward' is a int"),
        ({"resume": "somewhere"}, "rounds go on with --resume auto"),
        ({"prompts": [""]}, "the prompt is empty"),
    ],
)
def test_bad_input_writes_nothing(bench, changes, message):
    with pytest.raises(InputError, match=message):
        bench.run("out", **changes)
    assert not bench.dir("out").exists()


def test_folders_that_hold_something_else(whole, root, tiny_model, tmp_path):
    with pytest.raises(InputError, match="already holds rounds; continue them with --resume auto"):
        Bench(root, tiny_model).run("whole")
    with pytest.raises(InputError, match="holds a run without rounds"):
        Bench(whole[0], tiny_model).run("round-1", resume="auto")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Bench(tmp_path, tiny_model).run("file")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "rounds.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        Bench(tmp_path, tiny_model).run("bad", resume="auto")


# -- figures


def test_repeated_text():
    assert repeated("a b c d") == 0 == repeated("") == repeated("one two three four five six")
    assert repeated("no no no no no no") == pytest.approx(1 - 1 / 3)
    assert repeated("a b c d a b c d") == pytest.approx(1 - 4 / 5)


def test_figures_of_answers():
    answers = [
        Answers(0, ["a", "a", "b"], ["stop", "length", "stop"], [1, 2, 3], {"r": [0.0, 1.0, 2.0]}),
        Answers(1, ["x", "y", "z"], ["stop"] * 3, [3, 3, 6], {"r": [3.0, 3.0, 3.0]}),
    ]
    assert figures(answers) == {
        "prompts": 2,
        "responses": 6,
        "rewards": {"r": {"mean": 2.0, "standard_error": pytest.approx(1.0)}},
        "tokens": 3.0,
        "ended": pytest.approx(5 / 6),
        "repeated": 0.0,
        "distinct": pytest.approx((2 / 3 + 1) / 2),
    }
    assert figures(answers[:1])["rewards"]["r"]["standard_error"] is None
    assert figures([]) == {}


def test_the_table_shows_every_figure_in_full(whole, capsys):
    """Of many rounds too, in a terminal of 80 columns."""
    rows = rounds_of(whole[0])
    show([*rows, *rows, *rows, *rows])
    printed = capsys.readouterr().out
    for row in rows[1:]:
        reward = row["held_out"]["rewards"]["reward"]
        assert f"{reward['mean']:.3f} ± {reward['standard_error']:.3f}" in printed
        assert f"{row['evaluation']['margin_mean']:.3f}" in printed
        assert f"{row['evaluation']['accuracy']:.0%}" in printed
    assert "…" not in printed and "sees it" not in printed


def test_the_table_of_several_rewards_says_what_each_prefers(capsys):
    told = {"rewards": {n: {"mean": m, "standard_error": None} for n, m in (("a", 1), ("b", -2))}}
    each = {"a": {"accuracy": 0.75, "n": 4}, "b": {"accuracy": None, "n": 0}}
    row = {"round": 1, "pairs": 1234, "held_out": told}
    show([row | {"evaluation": {"accuracy": 0.5, "margin_mean": 0.25, "rewards": each}}])
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    want = {"pairs 1,234", "a 1.000", "b -2.000", "accuracy 50%", "margin 0.250"}
    assert want | {"as a sees it 75%", "as b sees it"} <= lines


def test_prompts_may_be_conversations(bench):
    talk = [[Message("user", a), Message("assistant", "Yes?"), Message("user", a)] for a in ASKED]
    (result,) = bench.run("out", prompts=talk[:8], rounds=1)
    (row, *_) = read_rows(result.dir / "pairs.jsonl")
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user"]
