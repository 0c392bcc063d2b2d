"""The command line as its users meet it: what it prints, writes and returns, and one sentence for
whatever is wrong with the input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefopt.cli import main
from prefopt.losses import LOSSES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def flags(tiny_model, tiny_data):
    return [
        "--model", str(tiny_model), "--data", str(tiny_data), "--max_steps", "3",
        "--eval_fraction", "0.25", "--sample_tokens", "4", "--lora.r", "4", "--lr", "5e-3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, flags):
    """A finished run, made by the command."""
    out = tmp_path_factory.mktemp("runs") / "hh"
    assert main(["dpo", *flags, "--out", str(out), "--save_every", "2", "--beta", "0.2"]) == 0
    return out


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, flags):
    out = tmp_path_factory.mktemp("runs") / "full"
    assert main(["dpo", *flags, "--lora", "null", "--out", str(out), "--quiet"]) == 0
    return out


def lines(capsys):
    return capsys.readouterr().out.splitlines()


# -- commands


def test_dpo_says_what_it_does_and_where_it_went(flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["dpo", *flags, "--out", str(out)]) == 0
    text, progress = capsys.readouterr()
    parts = [
        "24 of 24 rows kept", "llama, float32 on cpu", "LoRA", "before: policy = reference",
        "after: accuracy", f"model:  {out / 'model'}", f"report: {out / 'report.html'}",
    ]  # fmt: skip
    for part in parts:
        assert part in text, part
    assert "train 3/3  loss" in progress and "reference" in progress
    assert "Loading" not in progress and "Warning" not in progress and "it/s" not in progress
    assert (out / "model" / "adapter_model.safetensors").is_file()


def test_quiet_prints_nothing(flags, tmp_path, capsys):
    assert main(["dpo", *flags, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_shows_the_plan_and_writes_nothing(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    assert main(["dpo", *flags, "--out", str(tmp_path / "run"), "--dry_run"]) == 0
    text = capsys.readouterr().out
    parts = [
        "18 pairs to train on, 6 held out; 3 steps", "template: transcript", "Human: Tell",
        "eos  '</s>'", "not written: --dry_run",
    ]  # fmt: skip
    for part in parts:
        assert part in text, part
    assert not any(tmp_path.iterdir())


def test_config_yaml_repeats_the_run(run, tmp_path, capsys):
    again = tmp_path / "again"
    assert main(["dpo", "--config", str(run / "config.yaml"), "--out", str(again), "--quiet"]) == 0
    adapters = [
        (folder / "model/adapter_model.safetensors").read_bytes() for folder in (run, again)
    ]
    assert adapters[0] == adapters[1]
    first, second = (yaml.safe_load((f / "config.yaml").read_text()) for f in (run, again))
    assert {**first, "out": ""} == {**second, "out": ""} and first["beta"] == 0.2


@pytest.mark.parametrize("order", ["flag first", "file first"])
def test_flags_win_over_the_config_file(order, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 0.25\nbatch_size: 3\nlora:\n  r: 7\n")
    given = [["--lr", "0.5"], ["--config", str(file)]]
    arguments = given[0] + given[1] if order == "flag first" else given[1] + given[0]
    assert main(["dpo", *arguments, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["lr"], config["batch_size"], config["lora"]["r"]) == (0.5, 3, 7)
    assert config["lora"]["alpha"] == 16


def test_print_config_is_a_config_file(flags, tmp_path, capsys):
    assert main(["dpo", *flags, "--lora.targets", "[q_proj, v_proj]", "--print_config"]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["dpo", "--config", str(file), "--print_config"]) == 0
    assert capsys.readouterr().out == text
    config = yaml.safe_load(text)
    assert config["lora"]["targets"] == ["q_proj", "v_proj"] and config["lora"]["r"] == 4


def test_an_adapter_is_trained_further_from_a_frozen_copy(run, flags, tmp_path, capsys):
    out = tmp_path / "more"
    assert main(["dpo", *flags, "--model", str(run), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "the reference is a frozen copy" in text and "before: policy = reference" in text
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_rewards/margins"] == 0
    data = ["--data", yaml.safe_load((run / "config.yaml").read_text())["data"]]
    assert main(["eval", str(out), *data, "--held_out", "0.25", "--out", str(tmp_path / "e")]) == 0
    result = json.loads((tmp_path / "e").read_text())
    assert result["margin_mean"] == pytest.approx(rows[-1]["eval_rewards/margins"], rel=1e-4)


def test_eval_of_a_run_and_of_its_adapter(run, tiny_data, tmp_path, capsys):
    data = ["--data", str(tiny_data), "--held_out", "0.25", "--beta", "0.2"]
    assert main(["eval", "--model", str(run), *data, "--out", str(tmp_path / "a.json")]) == 0
    first = lines(capsys)
    assert main(["eval", str(run / "model"), *data, "--out", str(tmp_path / "b.json")]) == 0
    second = lines(capsys)
    (at,) = (i for i, line in enumerate(first) if line.startswith("accuracy"))
    assert second[-len(first[at:]) :] == first[at:]
    assert "6 pairs, 95% intervals over 6 prompts" in first[at]
    assert first[at + 1].startswith("calibration: ECE") and "of 6" not in first[at + 1]
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    evaluation = json.loads((run / "evaluation.json").read_text())["after"]
    assert a == b
    assert a["margin_mean"] == pytest.approx(evaluation["margin_mean"], rel=1e-4)
    assert a["accuracy"] == evaluation["accuracy"] and a["counts"] == {"truncated": 0}


def test_eval_of_a_fully_trained_run_knows_where_it_began(full_run, tiny_data, tiny_model, capsys):
    assert main(["eval", str(full_run), "--data", str(tiny_data)]) == 0
    known = lines(capsys)
    folder = ["eval", "--model", str(full_run / "model"), "--data", str(tiny_data)]
    assert main(folder) == 2
    assert "name the starting model with --reference" in capsys.readouterr().err
    assert main([*folder, "--reference", str(tiny_model)]) == 0
    assert lines(capsys) == known and any(line.startswith("accuracy") for line in known)
    assert main([*folder, "--reference", str(full_run)]) == 0
    assert "policy = reference" in lines(capsys)[-2]


def test_generate(run, full_run, tiny_model, capsys, monkeypatch):
    def answers(*arguments):
        assert main(["generate", "--max_new_tokens", "6", *map(str, arguments)]) == 0
        return lines(capsys)

    one = answers("--model", run, "--prompt", "Tell me about cats 1.")
    assert one[0] == "> Tell me about cats 1." and len(one) == 3 and one[1]
    assert answers("--model", run / "model", "--prompt", "Tell me about cats 1.") == one
    assert answers("--model", full_run, "--prompt", "Tell me about cats 1.")[0] == one[0]
    both = answers("--model", run, "--prompt", "[Tell me about cats 1., Hello.]")
    assert both[:2] == one[:2] and both[3] == "> Hello."
    drawn = ["--model", tiny_model, "--prompt", "Hello.", "--temperature", "1"]
    assert answers(*drawn, "--seed", "1") == answers(*drawn, "--seed", "1")
    assert answers(*drawn, "--seed", "1") != answers(*drawn, "--seed", "2")
    monkeypatch.setattr(sys, "stdin", ["Tell me about cats 1.\n", "\n"])
    assert answers("--model", run) == one


def test_cache_build_info_verify(flags, tmp_path, capsys):
    where = ["--cache", str(tmp_path / "cache")]
    build = ["cache", "build", *flags, *where]
    assert main(build) == 0
    assert lines(capsys)[-1].endswith("0 responses on disk, 48 computed now in 4 forward passes")
    assert main([*build, "--out", str(tmp_path / "run")]) == 0, "the flags of dpo, as they are"
    assert lines(capsys)[-1].endswith("48 responses on disk, 0 computed now in 0 forward passes")
    assert not (tmp_path / "run").exists()
    assert main(["cache", "info", *where]) == 0
    info = lines(capsys)
    assert info[0].endswith("1 reference") and "float32" in info[1] and "48 responses" in info[1]
    assert info[2].startswith("tokens  1 chunk of encoded data")
    assert main(["cache", "verify", *where]) == 0
    assert lines(capsys) == [*info, "every record is intact"]
    assert main(["dpo", *flags, *where, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    notes = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert notes["reference"]["forward passes"] == 0


def test_report(run, capsys):
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert lines(capsys) == [str(run / "report.html")]
    assert (run / "report.html").read_bytes() == before
    assert main(["report", "--run", str(run)]) == 0


def test_env(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("prefopt", "python", "torch", "transformers"))


def test_demo(tmp_path, capsys, monkeypatch):
    """On the first few of its pairs, for a few steps."""
    import prefopt.demo

    every = prefopt.demo.load_preferences
    monkeypatch.setattr(prefopt.demo, "load_preferences", lambda path: every(every(path)[:40]))
    assert main(["demo", "--out", str(tmp_path / "demo"), "--max_steps", "2"]) == 0
    text, progress = capsys.readouterr()
    stages = ("1. data check", "2. SFT", "3. reward model", "4. DPO", "5. PPO")
    stages += ("6. rewards of the answers",)
    for part in (*stages, "start: ", "perplexity", "is off by", "report: "):
        assert part in text, part
    assert "train 2/2" in progress and "it/s" not in progress
    last = tmp_path / "demo" / "ppo"
    assert text.rstrip().endswith(str(last / "report.html"))
    told = [json.loads(line) for line in (last / "stages.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in told] == [stage[3:] for stage in stages]
    assert all(row["seconds"] >= 0 for row in told)
    assert "The way here" in (last / "report.html").read_text()
    given = [json.loads(line) for line in (last / "samples.jsonl").read_text().splitlines()]
    stages = [row["stage"] for row in given][:: len(given) // 4]
    assert stages == ["before", "SFT", "DPO", "after"]
    for name in ("sft", "reward", "dpo", "ppo"):
        assert (tmp_path / "demo" / name / "model").is_dir()
    assert (tmp_path / "demo" / "reward" / "model" / "score_stats.json").is_file()
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["dpo", "--help"], ["cache", "build", "-h"], []])
def test_help(arguments, capsys):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: prefopt") and "None is" not in text


def test_version(capsys):
    from prefopt import __version__

    assert main(["--version"]) == 0 and __version__ in capsys.readouterr().out


# -- a process of its own


def process(*arguments):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "prefopt", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_output_of_a_process_is_all_its_own(flags, tmp_path):
    """No progress bar or warning of a library, and nothing twice."""
    done = process("dpo", *flags, "--lora", "null", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    phases = ("reference", "evaluate", "sample", "train")
    assert all(line.startswith(phases) for line in done.stderr.splitlines()), done.stderr
    out = done.stdout.splitlines()
    assert len(set(out)) == len(out) and "Warning" not in done.stdout


def test_a_process_says_one_sentence_and_exits_with_2(tmp_path):
    done = process("dpo", "--data", tmp_path / "no.jsonl", "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"prefopt: No file or folder '{tmp_path / 'no.jsonl'}'.\n"


# -- bad input


@pytest.fixture
def bad(flags, tmp_path, capsys):
    """Runs `dpo` with flags changed by (later ones win): the sentence, and no run folder."""

    def call(*arguments, command="dpo"):
        out = tmp_path / "run"
        before = sorted(tmp_path.rglob("*"))
        code = main([command, *flags, "--out", str(out), *map(str, arguments)])
        error = capsys.readouterr().err
        assert code == 2, error
        assert error.startswith("prefopt: ") and error.count("\n") == 1, error
        assert "Traceback" not in error and len(error) < 500, error
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return error.removeprefix("prefopt: ").rstrip("\n")

    return call


@pytest.fixture
def file(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["No file or folder", "pairs.jsonl"]),
        ("", ["pairs.jsonl", "empty"]),
        (ROW + ROW[:20] + "\n", ["pairs.jsonl:2", "not valid JSON"]),
        ('{"question": "a", "good": "b"}\n', ["lack 'chosen' and 'rejected'", "question, good"]),
        ('{"prompt": "a", "chosen": "b"}\n', ["lack 'rejected'", "columns="]),
        (2 * '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', ["All 2 pairs", "identical"]),
    ],
    ids=["missing", "empty", "broken", "other keys", "a key less", "identical"],
)
def test_bad_data(bad, file, tmp_path, text, words):
    path = tmp_path / "pairs.jsonl" if text is None else file("pairs.jsonl", text)
    sentence = bad("--data", path)
    assert all(word in sentence for word in words), sentence


def edited(tiny_model, folder, **changes):
    """A copy of the model folder; `file=None` removes it, `file=dict` drops these keys."""
    shutil.copytree(tiny_model, folder)
    for name, keys in changes.items():
        path = folder / name.replace("__", ".")
        if keys is None:
            path.unlink()
        else:
            known = json.loads(path.read_text())
            path.write_text(json.dumps({k: v for k, v in known.items() if k not in keys}))
    return folder


def test_a_tokenizer_without_eos(bad, tiny_model, tmp_path):
    model = edited(
        tiny_model, tmp_path / "m", tokenizer_config__json=["eos_token"],
        config__json=["eos_token_id"], generation_config__json=["eos_token_id"],
    )  # fmt: skip
    sentence = bad("--model", model)
    assert "no EOS token" in sentence and "tokenizer_config.json" in sentence


def test_a_model_folder_without_weights(bad, tiny_model, tmp_path):
    model = edited(tiny_model, tmp_path / "m", model__safetensors=None)
    sentence = bad("--model", model)
    assert str(model) in sentence and "no weights (model.safetensors" in sentence


def test_a_model_folder_with_cut_weights(bad, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "m")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert f"cannot load a model from {model}" in bad("--model", model)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere/at/all", "there is no model folder"),
        ("pairs.jsonl", "is a file; a model is a folder"),
        ("empty", "has no config.json"),
    ],
)
def test_no_model(bad, file, tmp_path, model, words):
    file("pairs.jsonl", ROW)
    (tmp_path / "empty").mkdir()
    assert words in bad("--model", tmp_path / model)


def test_a_lora_target_that_matches_nothing(bad):
    for targets in ("nothing", "[q_proj, nothing]"):
        sentence = bad("--lora.targets", targets)
        assert "nothing" in sentence and "matches no" in sentence and "q_proj" in sentence


def test_prompts_longer_than_the_maximum(bad):
    sentence = bad("--max_length", "8")
    assert "max_length=8" in sentence and "prompt fills max_length (24)" in sentence
    assert "set max_length well above" in sentence


def test_a_damaged_cache_file(bad, flags, tmp_path, capsys):
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["cache", "build", *flags, *cache, "--quiet"]) == 0
    (part,) = (tmp_path / "cache").glob("*/part-*.bin")
    data = bytearray(part.read_bytes())
    data[50] ^= 1
    part.write_bytes(data)
    sentence = bad(*cache)
    assert str(part) in sentence and "damaged at byte 0; delete it" in sentence
    assert main(["cache", "verify", *cache]) == 2
    assert capsys.readouterr().err == f"prefopt: {sentence}\n"


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("batchsize", "batch_size"), ("epoch", "epochs"), ("betta", "beta"),
        ("learning_rate", "lr"), ("output_dir", "out"), ("lora.rank", "lora.r"),
        ("lora.xyz", "lora.r"), ("lora.lora_alpha", "lora.alpha"),
        ("lora.target_modules", "lora.targets"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(bad, file, flag, nearest):
    expected = f"there is no option {flag!r}; did you mean {nearest!r}?"
    assert bad(f"--{flag}", "8") == expected
    assert bad(f"--{flag}=8") == expected
    path = file("dotted.yaml", f"{flag}: 8\n")
    in_file = expected.replace(f"{flag!r};", f"{flag!r} (in {path});")
    assert bad("--config", path) == in_file
    if "." in flag:
        path = file("nested.yaml", f"lora:\n  {flag[5:]}: 8\n")
        assert bad("--config", path) == in_file.replace("dotted", "nested")


def test_an_unknown_key_like_no_other(bad):
    assert bad("--frobnicate", "1") == (
        "there is no option 'frobnicate'; `prefopt dpo --help` lists them"
    )


@pytest.mark.parametrize(
    ("flag", "value", "takes"),
    [
        ("batch_size", "eight", "a whole number"), ("batch_size", "8.5", "a whole number"),
        ("lr", "fast", "a number or null"), ("max_steps", "many", "a whole number or null"),
        ("beta", "low", "a number or null"), ("dry_run", "maybe", "true or false"),
        ("lora.r", "eight", "a whole number"), ("lora.use_rslora", "3", "true or false"),
        ("schedule", "expo", "one of linear, cosine, constant"),
        ("dtype", "fp8", "one of auto, float32, bfloat16, float16"),
        ("columns", "question", "a mapping such as {prompt: question} or null"),
    ],
)  # fmt: skip
def test_a_wrong_value_says_what_is_taken(bad, file, flag, value, takes):
    assert bad(f"--{flag}", value) == f"--{flag} cannot be {value!r}; it takes {takes}"
    parent, _, leaf = flag.rpartition(".")
    path = file("run.yaml", f"{parent}:\n  {leaf}: {value}\n" if parent else f"{flag}: {value}\n")
    found = bad("--config", path)
    if flag in ("lora.r", "lr", "max_steps"):  # of which the test gives flags, too
        assert found.startswith(f"--{flag} cannot be {value!r}")
    else:
        assert found == f"--{flag} cannot be {value!r} (in {path}); it takes {takes}"


@pytest.mark.parametrize("value", ["none", "None", "false"])
def test_lora_is_switched_off_with_null(bad, value):
    assert "it takes null, which trains all weights" in bad("--lora", value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        (["--lora.r", "0"], "lora.r is 0; it must be a whole number of at least 1"),
        (["--eval_fraction", "1.5"], "eval_fraction is 1.5; it must be in [0, 1)"),
        (["--beta", "0"], "beta is 0.0; it must be above 0 and finite for loss 'dpo'"),
        (
            ["--loss.label_smoothing", "0.7"],
            "label_smoothing is 0.7; it must be in [0, 0.5) for loss 'dpo'",
        ),
        (
            ["--loss", "dpoo"],
            f"unknown loss 'dpoo' (did you mean 'dpo'?); there are: {', '.join(LOSSES)}",
        ),
        (["--device", "gpu"], "device is auto, cpu, cuda, cuda:1, xpu or mps, not 'gpu'"),
        (["--lr"], "--lr needs a value"),
        (["stray"], "'stray' belongs to no option; every value follows its --name"),
    ],
)
def test_other_bad_arguments(bad, arguments, sentence):
    assert bad(*arguments) == sentence


def test_bad_config_files(bad, file, tmp_path):
    missing = tmp_path / "no.yaml"
    assert bad("--config", missing) == f"--config {missing} is not a file that can be read"
    path = file("broken.yaml", "batch_size: [8\nlr: 3")
    assert bad("--config", path).startswith(f"{path}:2: not valid YAML (")
    path = file("list.yaml", "- 8\n- 9\n")
    assert bad("--config", path) == (
        f"{path} does not map option names to values, one `name: value` a line"
    )


def test_out_that_holds_a_run(bad, run, file):
    assert "already holds a run; continue it with --resume auto" in bad("--out", run)
    assert "is a file; name a folder" in bad("--out", file("there", ""))


def test_a_checkpoint_that_is_none(bad, tmp_path):
    assert "manifest.json is missing: not a whole checkpoint" in bad("--resume", tmp_path / "no")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dop"], "there is no command 'dop'; did you mean 'dpo'?"),
        (["cache"], "`prefopt cache` needs a command: build, info, verify"),
        (["cache", "biuld"], "there is no command 'biuld'; did you mean 'build'?"),
        (["dpo"], "--out is required"),
        (["eval"], "--model is required"),
        (["report"], "--run is required"),
        (["report", "nowhere"], "nowhere is not a folder; give the run folder"),
        (["cache", "info", "--cache", "nowhere"], "there is no cache folder nowhere"),
        (["generate", "--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens must be at least"),
        (["generate", "--prompt", "a", "--template", "x"], "is not one of auto, chat, transcript"),
        (["eval", "x", "--held_out", "0"], "held_out is 0.0; it must be between 0 and 1"),
    ],
)
def test_other_commands_explain_themselves_too(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_prompt_from_nowhere(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", [])
    assert main(["generate"]) == 2
    assert "there is no prompt; give --prompt TEXT" in capsys.readouterr().err


def test_a_run_that_diverges_is_a_failure_but_no_crash(flags, tmp_path, capsys):
    code = main(["dpo", *flags, "--out", str(tmp_path / "run"), "--lr", "1e30", "--max_norm", "0"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and error.startswith("prefopt: the ") and "not finite" in error
