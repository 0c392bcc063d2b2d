"""The report of an online run: headline, alarms, curves, samples side by side."""

import json
import math

import numpy as np
import pytest
import yaml

from prefopt.metrics import MetricsLog
from prefopt.online_checks import Watch
from prefopt.online_findings import CHECKS
from prefopt.report import charts, online_charts, write_report
from prefopt.report.online import measured, online_cards, online_samples
from prefopt.report.online_health import TITLES, WRONG, online_notes
from prefopt.report.record import RunRecord, _flat, read_run
from prefopt.report.view import about
from tests.test_report import Page, page_of

CONFIG = """estimator: gae
loss: ppo
kl:
  kind: k1
  placement: reward
  beta: 0.1
  target: 6.0
model: hub/tiny-model
data: data/prompts.jsonl
reward: runs/kind-words/model
lora:
  r: 16
"""


def rows(updates, critic=True, watched=False):
    rng = np.random.default_rng(0)
    for step in range(1, updates + 1):
        done = (step - 1) / updates
        row = {
            "step": step,
            "epoch": step / updates,
            "episodes": 128 * step,
            "loss": 0.01,
            "objective/scores": 0.5 + done + rng.normal(0, 0.1),
            "objective/scores_std": 0.9,
            "objective/kl": 5.4 * done,
            "objective/kl_token": 0.1 * done,
            "objective/kl_k3": 5.4 * done,
            "objective/kl_coef": 0.1 * 0.99**step,
            "objective/entropy": 1.5 - 0.3 * done,
            "policy/approxkl": 0.002,
            "policy/clipfrac": 0.1,
            "grad_norm": 0.7,
            "learning_rate": 1e-4 * (1 - done),
            "lengths/mean": 50.0,
            "lengths/max": 64.0,
            "lengths/stop_rate": 0.8,
            "groups/zero_variance": 0.2,
            "repetition": 0.03,
            "generate_tokens_per_s": 4000.0,
            "train_tokens_per_s": 9000.0,
            "seconds/generate": 2.0,
            "seconds/score": 1.0,
            "seconds/train": 1.0,
            "elapsed_s": 4.0 * step,
            "peak_memory_bytes": 3 << 30,
        }
        if critic:
            row |= {"loss/value": 0.3, "value/explained_variance": 0.5 * done}
        if watched:
            row["objective/held_out_scores"] = 2 - 3 * done + rng.normal(0, 0.05)
        yield row


def online_run(parent, updates=40, config=CONFIG, **kinds):
    folder = parent / "online run"
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    log, alarms = MetricsLog(folder / "metrics.jsonl"), MetricsLog(folder / "alarms.jsonl")
    watch = Watch(kl_target=6.0)
    evaluations = {}
    for row in [{"step": 0}, *rows(updates, **kinds)]:
        if row["step"]:
            log.write(row)
            for finding in watch.update(row):
                alarms.write(finding._asdict())
        if row["step"] in (0, updates // 2, updates):
            done = row["step"] / updates
            held = {"n": 20, "scores": 0.4 + done, "kl": 5.2 * done, "lengths": 48.0}
            held |= {"stop_rate": 0.85, "scores_low": 0.2 + done, "scores_high": 0.6 + done}
            evaluations[row["step"]] = held
            log.write({"step": row["step"], **{f"eval_{k}": v for k, v in held.items()}})
    stages = {"before": evaluations[0], "after": evaluations[updates]}
    (folder / "evaluation.json").write_text(json.dumps(stages))
    samples = []
    for step, stage, answer in (
        (0, "before", "Dunno."),
        (1, "train", "A sample of an update."),
        (updates // 2, "during", "It falls."),
        (updates, "after", "Gladly & <b>politely</b>!"),
    ):
        for prompt in ["Something else?"] if stage == "train" else ["What is <i>rain</i>?", "Why?"]:
            cells = {"score": step / 20, "kl": 0.1 * step, "tokens": 7, "finish": "length"}
            samples.append(
                {"step": step, "stage": stage, "prompt": prompt, "response": answer} | cells
            )
    write_lines(folder / "samples.jsonl", samples)
    notes = {"source": "data/prompts.jsonl", "rows": 90, "kept": 90}
    notes |= {"objective": "ppo", "unit": "prompts"}
    (folder / "data_report.json").write_text(json.dumps(notes))
    return folder


def write_lines(path, objects):
    path.write_text("".join(json.dumps(row) + "\n" for row in objects))


@pytest.fixture
def no_charts(monkeypatch):
    """Drawing is most of the time of a report; tests of the words do without."""
    monkeypatch.setattr(online_charts, "online_charts", lambda run: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return page_of(online_run(tmp_path_factory.mktemp("online"), watched=True))


# ---------------------------------------------------------------- a finished run


def test_tells_what_was_learned_how_far_it_went_and_what_it_cost(finished):
    text = Page(finished).text
    for expected in (
        "tiny-model, trained on answers of its own to the prompts of prompts.jsonl, judged by "
        "kind-words, by the ppo loss with gae, KL in the reward (k1, beta 0.1, target 6 nats), "
        "LoRA of rank 16.",
        "0.4 → 1.4",
        "The mean reward of answers to 20 held-out prompts is 1.400 (95% interval 1.200 to 1.600); "
        "before training it was 0.400 (0.200 to 0.600).",
        "The policy is 5.06 nats per response away from its reference, 16% below its target of 6; ",
        "on held-out prompts 5.20. Beta went from 0.099 to 0.0669.",
        "40 updates from 5,120 samples; of the time, 50% generating, 25% scoring and log-probs, "
        "25% training.",
        "2 min 40 s",
        "Prompts read 90",
        "Updates 40 (1 epoch)",
        "Generating 4000 tokens/s",
        "Training 9000 tokens/s",
        "Score, mean (95% interval) 0.400 (0.200 to 0.600) 1.400 (1.200 to 1.600)",
        "Ends by itself 85.0% 85.0%",
    ):
        assert expected in text, expected
    assert "Held-out reward, mean" not in text, "it was not measured on held-out prompts"
    assert "Preference accuracy" not in text and "hosen answer" not in text
    assert "damaged" not in text


def test_has_a_curve_of_everything_that_matters(finished):
    page = Page(finished)
    assert page.tags.count("svg") == 9 and len(page.ids) == len(set(page.ids))
    svgs = finished.split("<figure")[1:]
    for title, *words in (
        ("Score", "held-out reward", "95% interval"),
        ("Distance from the reference", "target 6", ">beta</text>", "held-out prompts"),
        ("Entropy", "training"),
        ("Length of the responses", "ends by itself", "longest"),
        ("Size of the updates", "clipped", "approximate KL"),
        ("Critic", "value loss", "explained variance"),
        ("Sameness", "repeated 4-grams", "groups alike"),
        ("Speed", "generating", "training"),
        ("Learning rate and gradient norm", "gradient norm"),
    ):
        (svg,) = (svg for svg in svgs if f"<h3>{title}</h3>" in svg)
        for word in words:
            assert word in svg, f"{title}: {word}"
        assert "optimizer step" not in svg and ">update<" in svg
    assert all(value.startswith("#") for value in page.loads)


def test_the_alarms_stand_in_it_in_words(finished):
    text = Page(finished).text
    assert "Problem The reward is exploited (update " in text
    assert "while the held-out reward fell from" in text
    assert '<span class="nowrap">--kl.beta</span>' in finished
    assert "Nothing unusual" not in text


def test_what_an_alarm_says_is_text(tmp_path, no_charts):
    folder = online_run(tmp_path, updates=3)
    message = "Give --kl.beta <script>alert(1)</script> & more."
    write_lines(folder / "alarms.jsonl", [{"step": 1, "name": "ratio", "message": message}])
    html = page_of(folder)
    assert "<script" not in html and message in Page(html).text


def test_the_same_prompts_early_midway_and_late(finished):
    text = Page(finished).text
    assert (
        "What is <i>rain</i>? Before score 0 · 0.0 nats · 7 tokens · cut off Dunno. "
        "Update 20 score 1 · 2.0 nats · 7 tokens · cut off It falls. "
        "After score 2 · 4.0 nats · 7 tokens · cut off Gladly & <b>politely</b>!" in text
    )
    assert "A sample of an update" not in text, "of a prompt that was not asked again"


def test_the_same_files_give_the_same_bytes(tmp_path):
    folder = online_run(tmp_path, updates=12)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


# ---------------------------------------------------------------- other runs


def test_without_a_critic_there_is_no_curve_of_one(tmp_path):
    html = page_of(online_run(tmp_path, updates=12, critic=False))
    assert "<h3>Critic</h3>" not in html and "Nothing unusual" in html
    assert Page(html).tags.count("svg") == 8


def test_a_fixed_beta_has_no_curve(tmp_path):
    folder = online_run(tmp_path, updates=12)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    fixed = [row | {"objective/kl_coef": 0.1} if "loss" in row else row for row in lines]
    write_lines(folder / "metrics.jsonl", fixed)
    assert "Beta went" not in online_cards(read_run(folder))[1][3]
    kl = next(
        chart for chart in online_charts.online_charts(read_run(folder)) if "KL" in chart.about
    )
    assert "beta" not in kl.svg and "beta" not in kl.about


def test_of_online_dpo_the_loss_is_named(tmp_path, no_charts):
    config = CONFIG.replace("loss: ppo", "loss: dpo").replace("  target: 6.0\n", "")
    text = Page(page_of(online_run(tmp_path, updates=12, config=config))).text
    assert "judged by kind-words, with online dpo (beta 0.1), LoRA of rank 16." in text


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("reward: my_rewards:length", "judged by my_rewards:length,"),
        ("reward: http://host:8000/score", "judged by http://host:8000/score,"),
        ("reward: {kind: a/b, short: c}", "judged by kind and short,"),
        ("reward: null", "of prompts.jsonl, by the ppo loss"),
    ],
)
def test_the_reward_is_named_as_it_was_given(reward, words):
    settings = CONFIG.replace("reward: runs/kind-words/model", reward)
    config = dict(_flat(yaml.safe_load(settings), ""))
    assert words in about(RunRecord("x", config=config))


def test_nothing_but_metrics_is_enough(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    write_lines(folder / "metrics.jsonl", list(rows(5)))
    text = Page(page_of(folder)).text
    assert "A model, trained on answers of its own to prompts." in text
    assert "none was held out" in text and "not finished" in text


@pytest.mark.parametrize(
    "keep", ["config.yaml", "samples.jsonl", "data_report.json", "metrics.jsonl"]
)
def test_each_file_alone_is_no_error(tmp_path, keep):
    folder = online_run(tmp_path, updates=3)
    for path in folder.iterdir():
        if path.is_file() and path.name != keep:
            path.unlink()
    assert Page(page_of(folder)).text


def test_rows_of_nonsense_are_no_error(tmp_path):
    folder = online_run(tmp_path, updates=3)
    nonsense = [None, "text", math.inf, -1e300, [], {}, True]
    row = next(rows(1))
    lines = [dict.fromkeys(row, value) | {"step": i} for i, value in enumerate(nonsense)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for name in ("metrics.jsonl", "alarms.jsonl", "samples.jsonl"):
        (folder / name).write_text(text + '{"cut')
    (folder / "evaluation.json").write_text('{"before": [], "after": {"scores": "x", "n": null}}')
    (folder / "config.yaml").write_text("kl: 3\nestimator: [1]\nloss: 7\n")
    assert "damaged line" in Page(page_of(folder)).text


def test_other_runs_are_not_taken_for_online(tmp_path):
    assert RunRecord("x").kind == "pairs"
    assert RunRecord("x", data={"objective": "sft"}).kind == "sft"
    assert RunRecord("x", config={"estimator": "gae"}, data={"objective": "dpo"}).kind == "online"
    assert charts.draw_charts is not online_charts.online_charts


def test_a_kl_below_0_is_no_distance():
    row = next(rows(1)) | {"objective/kl": -0.0123}
    title, _, value, text = online_cards(RunRecord("x", train=[row]))[1]
    assert (title, value) == ("KL", "about 0") and "−0.012 nats per response" in text


# ---------------------------------------------------------------- findings


def test_every_check_has_a_title():
    assert set(TITLES) == set(CHECKS) and set(WRONG) < set(CHECKS)


def test_an_alarm_said_again_is_one_note_with_its_updates():
    again = [
        {"step": step, "name": "ratio", "message": f"Off by {step}.", "remedy": "Look."}
        for step in (3, 40)
    ]
    run = RunRecord("x", True, train=list(rows(2)), alarms=[*again, {"name": "new_thing"}])
    bad, other = online_notes(run)
    assert bad.level == "bad" and bad.title.endswith("(update 3, 40)") and bad.text == "Off by 40."
    assert other.title == "New thing" and other.text == ""


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((0.5, 0.4, 0.6), (0.7, 0.65, 0.75), None),
        ((0.5, 0.4, 0.6), (0.65, 0.55, 0.75), None),
        ((0.5, 0.4, 0.6), (0.63, 0.53, 0.73), "within their noise"),
        ((0.5, 0.4, 0.6), (0.3, 0.2, 0.4), "It fell from 0.500 to 0.300"),
        ((0.5, None, None), (0.3, 0.2, 0.4), None),
    ],
)
def test_a_held_out_score_that_does_not_clearly_rise_is_said(before, after, words):
    names = ("scores", "scores_low", "scores_high")
    stages = {"before": dict(zip(names, before, strict=True))}
    stages["after"] = dict(zip(names, after, strict=True))
    notes = online_notes(RunRecord("x", True, evaluation=stages))
    found = [note.text for note in notes if "held-out score" in note.title]
    assert (found == []) if words is None else (words in found[0])


# ---------------------------------------------------------------- what was measured, and sampled


def test_evaluations_in_the_metrics_stand_in_for_a_missing_file():
    evals = [{"step": step, "eval_scores": step / 10} for step in (0, 10, 20)]
    assert [row["scores"] for row in measured(RunRecord("x", evals=evals))] == [0, 2]
    assert measured(RunRecord("x", evals=evals[1:])) == ({}, {"step": 20, "scores": 2.0})


def test_without_held_out_prompts_those_that_come_again_are_shown():
    samples = [
        {"step": step, "stage": "train", "prompt": prompt, "response": f"{prompt}{step}"}
        for step, prompt in ((1, "a"), (2, "b"), (3, "a"), (4, "c"), (5, "a"), (6, "a"))
    ]
    (group,) = online_samples(RunRecord("x", samples=samples))
    sides = [group[place]["response"] for place in ("before", "middle", "after")]
    assert sides == ["a1", "a5", "a6"] and [cell["response"] for cell in group["between"]] == ["a3"]
    assert group["before"]["title"] == "Update 1"


def test_stages_of_another_name_keep_it():
    """As `prefopt demo` writes them: what came before PPO stands between."""
    samples = [
        {"step": step, "stage": stage, "prompt": "a", "response": stage}
        for step, stage in enumerate(("before", "SFT", "DPO", "after"))
    ]
    (group,) = online_samples(RunRecord("x", samples=samples))
    assert group["middle"]["title"] == "DPO" and group["between"][0]["title"] == "SFT"
