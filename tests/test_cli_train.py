"""`prefopt sft`, `reward` and what is new of `dpo`, as a user runs them."""

import json

import pytest
import yaml

from prefopt.cli import main

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


@pytest.fixture
def flags(tiny_model, tmp_path):
    def call(out, data, *more):
        common = ["--batch_size", "4", "--max_length", "128", "--lr", "1e-2", "--lora.r", "4"]
        common += ["--eval_fraction", "0.25", "--samples", "1", "--sample_tokens", "3"]
        where = ["--out", str(tmp_path / out), "--cache", str(tmp_path / "cache")]
        return ["--model", str(tiny_model), "--data", str(data), *common, *where, *map(str, more)]

    return call


def rows_in(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"Say {w}.", "chosen": f"Gladly: {w}.", "rejected": "No."} for w in WORDS]
    return rows_in(tmp_path / "pairs.jsonl", rows)


def test_sft_from_any_kind_of_text(flags, tmp_path, pairs, capsys):
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"Say {w}."},
                {"role": "assistant", "content": f"Gladly: {w}."},
            ]
        }
        for w in WORDS
    ]
    texts = [{"text": f"Once upon a time there was a {w}."} for w in WORDS]
    kinds = {"talks": talks, "texts": texts}
    files = {name: rows_in(tmp_path / f"{name}.jsonl", rows) for name, rows in kinds.items()}
    for name, file in {**files, "pairs": pairs}.items():
        assert main(["sft", *flags(f"sft-{name}", file, "--epochs", "4")]) == 0
        shown = capsys.readouterr().out
        assert "before: perplexity" in shown and " after: perplexity" in shown, name
        told = json.loads((tmp_path / f"sft-{name}" / "evaluation.json").read_text())
        assert told["after"]["perplexity"] < 0.8 * told["before"]["perplexity"], name
        report = json.loads((tmp_path / f"sft-{name}" / "data_report.json").read_text())
        assert (report["objective"], report["unit"]) == ("sft", "dialogues")
    assert "chosen responses are imitated" in shown


def test_sft_on_pairs_holds_out_what_dpo_does(flags, tmp_path, pairs):
    for command in ("sft", "dpo", "reward"):
        assert main([command, *flags(command, pairs, "--quiet", "--max_steps", "1")]) == 0
    reports = [
        json.loads((tmp_path / name / "data_report.json").read_text())["encoding"]
        for name in ("sft", "dpo", "reward")
    ]
    held = [next(v for k, v in r.items() if k.startswith("held-out")) for r in reports]
    assert held[0] == held[1] == held[2] > 0


def test_a_dry_run_speaks_of_what_there_is(flags, tmp_path, pairs, capsys):
    assert main(["sft", *flags("x", pairs, "--dry_run")]) == 0
    text = capsys.readouterr().out
    assert "dialogues to train on" in text and "reference log-probs" not in text
    assert main(["reward", *flags("x", pairs, "--dry_run")]) == 0
    assert "pairs to train on" in capsys.readouterr().out
    more = ["--rounds", "3", "--reward", "nowhere:f", "--dry_run"]
    assert main(["dpo", *flags("x", pairs, *more)]) == 0
    assert "3 rounds, 4 answers to each of 12 prompts" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_a_reward_model_is_trained_evaluated_and_ranks(flags, tmp_path, pairs, capsys):
    assert main(["reward", *flags("rm", pairs, "--epochs", "4", "--center", "0.01")]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "rm"), "--data", str(pairs), "--held_out", "0.25"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy 100.0%" in shown and "calibration: ECE" in shown and "log pi" not in shown
    assert main(["eval", str(tmp_path / "rm"), "--data", str(pairs), "--reference", "x"]) == 2
    assert "is a reward model, which has no --reference" in capsys.readouterr().err
    settings = yaml.safe_load((tmp_path / "rm" / "config.yaml").read_text())
    assert settings["center"] == 0.01 and "loss" not in settings
    more = ["--rounds", "1", "--reward", tmp_path / "rm", "--new_tokens", "6", "--quiet"]
    assert main(["dpo", *flags("rounds", pairs, *more)]) == 0
    table = json.loads((tmp_path / "rounds" / "rounds.json").read_text())["rounds"]
    assert len(table) == 2


def test_rankings_make_a_reward_model(flags, tmp_path, capsys):
    rows = [{"prompt": f"Say {w}.", "responses": ["No.", f"Gladly: {w}.", f"{w}"],
             "scores": [0, 2, 1]} for w in WORDS]  # fmt: skip
    file = rows_in(tmp_path / "ranked.jsonl", rows)
    assert main(["reward", *flags("rm", file, "--epochs", "4")]) == 0
    shown = capsys.readouterr().out
    assert "best first by 'scores' (more is better)" in shown
    report = json.loads((tmp_path / "rm" / "data_report.json").read_text())
    assert report["unit"] == "rankings" and report["encoding"]["train rankings"] >= 6
    told = json.loads((tmp_path / "rm" / "evaluation.json").read_text())
    assert told["after"]["accuracy"] > 0.9


def test_sources_are_mixed_with_weights_and_told_apart(flags, tmp_path, pairs, capsys):
    rows = [{"prompt": f"Sing {w}.", "chosen": f"La {w} la.", "rejected": "No."} for w in WORDS[:8]]
    other = rows_in(tmp_path / "songs.jsonl", rows)
    both = f"{{words: {pairs}, songs: {other}}}"
    more = ["--data_weights", "{words: 1, songs: 3}", "--epochs", "4"]
    assert main(["dpo", *flags("mixed", both, *more)]) == 0
    told = json.loads((tmp_path / "mixed" / "evaluation.json").read_text())["after"]
    assert set(told["sources"]) == {"words", "songs"}
    assert told["rewards/accuracies/songs"] == told["sources"]["songs"]["accuracy"]
    assert "Accuracy on songs" in (tmp_path / "mixed" / "report.html").read_text()
    assert main(["dpo", *flags("x", pairs, "--data_weights", "{words: 1}")]) == 2
    assert "give --data as {name: file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--loss", "simpo", "--loss.gama", "1"], "takes no 'gama' (did you mean 'gamma'?)"),
        (["--loss", "dpo + 0.2*sfd"], "unknown loss 'sfd'"),
        (["--loss", "nowhere:f"], "there is no module 'nowhere'"),
        (["--loss.beta", "0.3"], "the loss's beta is --beta"),
        (["--loss", "simpo", "--ref_sync_steps", "2"], "moves a reference, and simpo has none"),
        (["--loss", "aot", "--divergence", "forward_kl"], "sorts policy and reference apart"),
        (["--loss", "kto", "--ld_alpha", "0.5"], "kto has none"),
        (["--reward", "m:f"], "say in how many rounds with --rounds"),
        (["--rounds", "2"], "--rounds needs --reward"),
        (["--label_smoothing", "0.1"], "did you mean 'loss.label_smoothing'?"),
        (["--loss_type", "ipo"], "did you mean 'loss'?"),
    ],
)
def test_what_does_not_fit_is_one_sentence(flags, tmp_path, pairs, capsys, more, sentence):
    assert main(["dpo", *flags("x", pairs, *more)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error and not (tmp_path / "x" / "model").exists()


def test_a_loss_of_ones_own(flags, tmp_path, pairs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_losses.py").write_text(
        "def gap(p, *, target=1.0):\n    return (p.margin - target) ** 2\n"
    )
    more = ["--loss", "my_losses:gap + 0.1*sft", "--loss.target", "2", "--max_steps", "2"]
    assert main(["dpo", *flags("own", pairs, *more, "--quiet")]) == 0
    settings = yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())
    assert settings["loss_options"] == {"target": 2}


def test_from_imitation_over_plain_weights_to_a_reward_model(flags, tmp_path, pairs, capsys):
    talks = [{"text": f"\n\nHuman: Say {w}.\n\nAssistant: Gladly: {w}."} for w in WORDS]
    file = rows_in(tmp_path / "talks.jsonl", talks)
    assert main(["sft", *flags("sft", file, "--epochs", "2")]) == 0
    reward = ["--model", str(tmp_path / "sft"), "--data", str(pairs), "--out", str(tmp_path / "rm")]
    assert main(["reward", *reward]) == 2
    assert "merge it first (prefopt merge)" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "sft"), "--out", str(tmp_path / "plain")]) == 0
    verdict = json.loads((tmp_path / "plain" / "merge_report.json").read_text())
    assert verdict["pairs"] == 12 and verdict["accuracy_trained"] == 1.0
    assert verdict["agreement"] == 1.0 and verdict["kl_merged"] < 1e-6
    reward[1] = str(tmp_path / "plain")
    assert main(["reward", *reward, "--max_steps", "1", "--eval_fraction", "0"]) == 0
    assert main(["merge", str(tmp_path / "rm"), "--out", str(tmp_path / "rm-plain")]) == 0
    assert (tmp_path / "rm-plain" / "score_stats.json").is_file()
