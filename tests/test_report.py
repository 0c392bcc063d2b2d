"""The report: complete, self-contained, deterministic, and made from whatever files there are."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefopt.environment import environment
from prefopt.errors import InputError
from prefopt.metrics import MetricsLog
from prefopt.report import charts, write_report
from prefopt.report.charts import draw_charts
from prefopt.report.drawing import MAX_POINTS, smooth, thin
from prefopt.report.health import CHECKS, health_notes
from prefopt.report.record import FILES, RunRecord, ends, read_run, series
from prefopt.report.view import page as whole_page
from prefopt.stats import preference_summary

CONFIG = "model: hub/tiny-model\ndata: data/pairs.jsonl\nloss: dpo\nbeta: 0.1\nlora:\n  r: 16\n"


def training_rows(steps):
    for step in range(1, steps + 1):
        done = (step - 1) / steps
        yield {
            "step": step,
            "epoch": step / steps,
            "loss": math.log(2) - 0.2 * done,
            "rewards/chosen": 0.2 * done,
            "rewards/rejected": -0.3 * done,
            "rewards/margins": 0.5 * done,
            "rewards/accuracies": 0.0 if step == 1 else 0.5 + 0.3 * done,
            "logps/chosen": -50 + 2 * done,
            "logps/rejected": -52 - 3 * done,
            "grad_norm": 1.5,
            "learning_rate": 1e-4 * (1 - done),
            "tokens_per_s": 15000.0,
            "elapsed_s": 2.0 * step,
            "peak_memory_bytes": 3 << 30,
        }


@pytest.fixture
def run_dir(tmp_path):
    return finished_run(tmp_path)


@pytest.fixture(scope="module")
def finished_page(tmp_path_factory):
    return page_of(finished_run(tmp_path_factory.mktemp("finished")))


@pytest.fixture
def no_charts(monkeypatch):
    """Drawing is most of the time of a report; tests of the words do without."""
    monkeypatch.setattr(charts, "draw_charts", lambda run: [])


def finished_run(parent):
    folder = parent / "my run"
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    log = MetricsLog(folder / "metrics.jsonl")
    for row in training_rows(40):
        log.write(row)
        if row["step"] % 20 == 0:
            held = {"loss": 0.6, "rewards/accuracies": 0.7, "rewards/margins": 0.3}
            held |= {"accuracy_low": 0.6, "accuracy_high": 0.8}
            log.write({"step": row["step"]} | {f"eval_{k}": v for k, v in held.items()})
    prompts, lengths = np.arange(30), np.arange(30) % 7
    before, after = (
        preference_summary(scale * (prompts - 6.5), lengths, 6 - lengths, prompts)
        for scale in (0.0, 0.1)
    )
    write_json(folder / "evaluation.json", {"before": before, "after": after})
    samples = [
        {"step": step, "stage": stage, "prompt": prompt, "response": answer, "finish": finish}
        for step, stage, answer, finish in (
            (0, "before", "Dunno.", "length"),
            (40, "after", "Gladly & <b>politely</b>!", "stop"),
        )
        for prompt in ("What is <i>rain</i>?", "Why?")
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    write_json(
        folder / "data_report.json",
        {
            "source": "data/pairs.jsonl",
            "schema": "strings",
            "reason": "columns prompt, chosen, rejected",
            "rows": 320,
            "kept": 300,
            "dropped": {"chosen equals rejected": 20},
            "dropped_at": {"chosen equals rejected": "pairs.jsonl:17"},
            "notes": ["290 different prompts"],
            "encoded": {"truncated": 11},
        },
    )
    write_json(folder / "env.json", environment() | {"cpu": "Some CPU", "git": None})
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value))


def page_of(folder):
    return write_report(folder).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, attributes that load something, and the text."""

    VOID = ("meta", "link", "br", "img", "input", "hr", "use", "path", "rect", "line")

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.loads, self.words, self.tags = [], [], [], [], []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.loads.append(value)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> does not match"

    def handle_data(self, data):
        self.words.append(data)


# ---------------------------------------------------------------- a finished run


def test_tells_what_was_trained_and_how_it_went(finished_page):
    text = Page(finished_page).text
    for expected in (
        "my run",
        "finished",
        "tiny-model, trained on pairs.jsonl with the dpo loss (beta 0.1), LoRA of rank 16.",
        "Training loss went from 0.6931 to 0.5",
        "The chosen answer has the higher reward in 76.7% (95% interval",
        "of 30 held-out pairs; before training every pair was a tie",
        "1 min 20 s",
        "15k",
        "3.00 GiB",
        "40 (1 epoch)",
        "chosen equals rejected 20 6.2% pairs.jsonl:17",
        "290 different prompts",
        "truncated 11",
        "Some CPU",
        "r: 16",
    ):
        assert expected in text, expected
    order = [text.index(h) for h in ("Curves", "before and after", "Configuration", "Environment")]
    assert order == sorted(order)
    assert "damaged" not in text


def test_is_one_file_that_loads_nothing(finished_page):
    html, page = finished_page, Page(finished_page)
    assert all(value.startswith("#") for value in page.loads), page.loads
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "http" not in html and "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert page.tags.count("svg") == 6


def test_ids_are_unique_and_every_reference_resolves(finished_page):
    html = finished_page
    ids = Page(html).ids
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert references and set(references) <= set(ids)


def test_colours_follow_the_page(finished_page):
    svg = "".join(re.findall(r"<svg.*?</svg>", finished_page, re.DOTALL))
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", svg)) == set(), "a colour dark mode cannot change"
    assert {"var(--train)", "var(--held)", "var(--chosen)", "var(--rejected)"} <= set(
        re.findall(r"var\(--\w+\)", svg)
    )


def test_model_text_is_escaped(finished_page):
    html = finished_page
    assert "Gladly &amp; &lt;b&gt;politely&lt;/b&gt;!" in html and "<b>politely" not in html
    assert "What is &lt;i&gt;rain" in html


@pytest.mark.parametrize("name", ["config.yaml", "data_report.json", "env.json", "metrics.jsonl"])
def test_text_of_every_file_is_escaped(run_dir, name, no_charts):
    attack = "</pre><script>alert(1)</script>"
    content = {
        "config.yaml": f"model: '{attack}'\nloss: '{attack}'\n",
        "data_report.json": json.dumps({"schema": attack, "dropped": {attack: 1}, attack: attack}),
        "env.json": json.dumps({"cpu": attack, "packages": {attack: attack}}),
        "metrics.jsonl": json.dumps({"step": 1, "loss": None, "non_finite": {attack: "nan"}}),
    }
    (run_dir / name).write_text(content[name])
    html = page_of(run_dir)
    assert "<script" not in html and "&lt;script&gt;" in html


def test_same_files_same_bytes(run_dir, finished_page):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    assert path.read_text(encoding="utf-8") == finished_page, "another folder, another moment"


def test_samples_stand_side_by_side(finished_page):
    text = Page(finished_page).text
    why = text[text.index("Why?") :]
    assert why.index("Dunno.") < why.index("Gladly & <b>politely</b>!")
    assert "cut at the length limit" in text


def test_samples_without_stages_are_told_apart_by_step(run_dir, no_charts):
    rows = [{"step": s, "prompt": "p", "response": f"answer {s}"} for s in (5, 1, 9)]
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(page_of(run_dir)).text
    places = [text.index(word) for word in ("answer 1", "answer 9", "In between", "answer 5")]
    assert places == sorted(places)


# ---------------------------------------------------------------- an unfinished run


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_piece_is_said_to_be_missing(run_dir, missing, no_charts):
    assert "not recorded" not in page_of(run_dir)
    (run_dir / missing).unlink()
    assert "not recorded" in Page(page_of(run_dir)).text


@pytest.mark.parametrize("only", FILES)
def test_one_file_is_enough(run_dir, only, no_charts):
    for name in FILES:
        if name != only:
            (run_dir / name).unlink()
    (run_dir / "model").rmdir()
    text = Page(page_of(run_dir)).text
    assert "not finished" in text and "not recorded" in text


def test_without_an_evaluation_the_held_out_rows_serve(run_dir, no_charts):
    (run_dir / "evaluation.json").unlink()
    text = Page(page_of(run_dir)).text
    assert (
        "higher reward in 70.0% (95% interval 60.0% to 80.0%) of held-out pairs; at step 20" in text
    )


def test_without_held_out_rows_the_training_rows_serve(run_dir, no_charts):
    (run_dir / "evaluation.json").unlink()
    log = run_dir / "metrics.jsonl"
    log.write_text("".join(line for line in open_lines(log) if "eval_" not in line))
    assert (
        "of training pairs; at the first step every pair was a tie" in Page(page_of(run_dir)).text
    )


def open_lines(path):
    return path.read_text().splitlines(keepends=True)


def test_a_cut_last_line_is_skipped_and_counted(run_dir, no_charts):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "los')
    text = Page(page_of(run_dir)).text
    assert "metrics.jsonl: 1 damaged line was skipped" in text
    assert "40 (1 epoch)" in text


def test_no_run_folder(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"none of config\.yaml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
known_keys = st.sampled_from(
    """step loss grad_norm learning_rate rewards/margins rewards/accuracies rewards/chosen
    rewards/rejected logps/chosen eval_loss eval_logps/chosen eval_rewards/accuracies
    eval_accuracy_low eval_accuracy_high non_finite elapsed_s peak_memory_bytes epoch tokens_per_s
    prompt response stage finish before after accuracy margin_quantiles ties n rows kept dropped
    dropped_at notes gpus packages git beta lora model""".split()
)
objects = st.dictionaries(known_keys, json_values, max_size=8)
numbers = st.integers(-3, 60) | st.floats(-1e3, 1e3) | st.floats() | st.just(10**400)
rows = st.lists(st.dictionaries(known_keys, numbers | json_values, max_size=8), max_size=30)


ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@ONE_FOLDER
@given(rows, rows, objects, objects, objects, objects | st.text(max_size=40))
def test_no_content_of_the_files_stops_the_report(
    tmp_path, no_charts, metrics, samples, data, evaluation, env, config
):
    for name, lines in (("metrics", metrics), ("samples", samples)):
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for name, value in (("data_report", data), ("evaluation", evaluation), ("env", env)):
        write_json(tmp_path / f"{name}.json", value)
    (tmp_path / "config.yaml").write_text(
        config if isinstance(config, str) else json.dumps(config), encoding="utf-8"
    )
    Page(page_of(tmp_path))


@settings(max_examples=12)
@given(rows)
def test_no_numbers_stop_the_charts(metrics):
    metrics = [row | {"step": i} for i, row in enumerate(metrics)]
    assert len(draw_charts(RunRecord("x", train=metrics, evals=metrics))) == 7


@ONE_FOLDER
@given(st.sampled_from(FILES), st.binary(max_size=60))
def test_bytes_that_are_no_text_do_not_stop_the_report(tmp_path, no_charts, name, junk):
    (tmp_path / name).write_bytes(junk)
    Page(page_of(tmp_path))


# ---------------------------------------------------------------- curves


def test_a_chart_needs_data():
    assert [chart.svg for chart in draw_charts(RunRecord("x"))] == [""] * 7
    one = RunRecord("x", train=[{"step": 1, "loss": 0.69}])
    assert [bool(chart.svg) for chart in draw_charts(one)] == [True] + [False] * 6


def test_the_start_is_not_an_accuracy_of_zero():
    rows = [
        {"step": s, "rewards/margins": m, "rewards/accuracies": a}
        for s, m, a in [(1, 0.0, 0.0), (2, 0.1, 0.6), (3, 0.2, 0.7)]
    ]
    with_tie, without = (draw_charts(RunRecord("x", train=t))[2].svg for t in (rows, rows[1:]))
    assert with_tie == without


@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(3, 300))
def test_smoothing_keeps_a_straight_line(slope, start, count):
    line = start + slope * np.arange(count)
    np.testing.assert_allclose(smooth(line), line, rtol=1e-6, atol=1e-6)


def test_smoothing_reduces_noise_and_leaves_gaps():
    noise = np.random.default_rng(0).normal(size=400)
    noise[100] = math.nan
    trend = smooth(noise)
    assert np.isnan(trend).tolist() == np.isnan(noise).tolist()
    assert np.nanstd(trend) < 0.4


def test_thinning_keeps_the_ends_and_the_spike():
    y = np.random.default_rng(0).normal(size=50_000)
    y[31_234], y[777] = 40.0, math.nan
    x, thinned = thin(np.arange(len(y)), y)
    assert len(thinned) <= MAX_POINTS + 2 and (np.diff(x) > 0).all()
    assert thinned[0] == y[0] and thinned[-1] == y[-1] and np.nanmax(thinned) == 40.0


def test_series_and_ends():
    rows = [{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": None}, {"a": 4.0}]
    steps, values = series(rows, "a")
    assert steps.tolist() == [1, 3] and values[0] == 2.0 and math.isnan(values[1])
    assert ends(np.arange(100.0)) == (0.0, 94.5)
    assert ends(np.array([3.0])) == (3.0, 3.0)
    assert ends(np.array([])) is None


# ---------------------------------------------------------------- health


def healthy(steps=60, **changes):
    run = RunRecord("x", finished=True, train=list(training_rows(steps)), config={"beta": 0.1})
    for key, values in changes.items():
        for row, value in zip(run.train, np.broadcast_to(values, steps), strict=True):
            row[key.replace("__", "/")] = None if value is None else float(value)
    return run


def titles(run):
    return [note.title for note in health_notes(run)]


def test_a_healthy_run_gets_a_clean_bill():
    (note,) = health_notes(healthy())
    assert note.level == "good" and str(len(CHECKS)) in note.text


UP, DOWN = np.linspace(0, 1, 60), np.linspace(0, -1, 60)
HELD = [{"step": s, "eval_loss": v} for s, v in ((0, 0.69), (30, 0.55), (60, 0.65))]
CUT = [
    {"step": s, "stage": stage, "prompt": "p", "response": "r", "finish": finish}
    for s, stage, finish in ((0, "before", "stop"), (60, "after", "length"))
]
SICK = {
    "Values that are no numbers": lambda: with_row(healthy(), non_finite={"loss": "nan"}),
    "The policy did not move": lambda: healthy(rewards__margins=0.0),
    "The loss says nothing was learned": lambda: healthy(loss=math.log(2) + 0.05 * UP),
    "Not distinguishable from guessing": lambda: with_held(
        [{"step": 60, "eval_accuracy_low": 0.45, "eval_accuracy_high": 0.6}]
    ),
    "Learned by heart": lambda: with_held(
        [{"step": 60, "eval_rewards/accuracies": 0.7}], rewards__accuracies=1.0
    ),
    "The best point was earlier": lambda: with_held(HELD),
    "Both answers became less likely": lambda: healthy(
        rewards__chosen=2 * DOWN, rewards__rejected=4 * DOWN
    ),
    "The loss is used up": lambda: healthy(loss=0.69 * (1 - UP) ** 4, rewards__margins=9 * UP),
    "Gradient spikes": lambda: healthy(grad_norm=np.where(np.arange(60) == 30, 100, 1)),
    "Answers no longer end": lambda: with_samples(CUT),
    "Many rows were not used": lambda: with_data({"rows": 100, "kept": 60}),
    "This run has not finished": lambda: unfinished(),
}


def with_row(run, **fields):
    run.train[40] |= fields
    return run


def with_held(rows, **changes):
    run = healthy(**changes)
    run.evals = rows
    return run


def with_samples(samples):
    run = healthy()
    run.samples = samples
    return run


def with_data(data):
    run = healthy()
    run.data = data
    return run


def unfinished():
    run = healthy()
    run.finished = False
    return run


@pytest.mark.parametrize("title", SICK)
def test_each_illness_is_named_with_a_remedy(title):
    notes = {note.title: note for note in health_notes(SICK[title]())}
    assert title in notes and notes[title].remedy
    assert notes.keys() - {title} <= {"Nothing unusual"}, "one illness, one finding"


def test_every_check_has_a_case():
    assert len(SICK) == len(CHECKS)


def test_displacement_is_judged_on_the_same_pairs_where_possible():
    """Training batches differ, so their log-probs say little; held-out pairs stay the same."""
    held = [
        {"step": s, "eval_logps/chosen": -50.0 - c, "eval_logps/rejected": -52.0 - r}
        for s, c, r in ((0, 0, 0), (60, 20, 35))
    ]
    assert "Both answers became less likely" in titles(with_held(held))
    (note,) = (n for n in health_notes(with_held(held)) if n.level == "warn")
    assert "fell by 20.0 nats" in note.text and "35.0" in note.text
    still = [row | {"eval_logps/chosen": -50.0} for row in held]
    falling = {"logps__chosen": -50 + 30 * DOWN, "logps__rejected": -50 + 30 * DOWN}
    assert "Both answers became less likely" not in titles(with_held(still, **falling))


def test_null_alone_is_not_called_non_finite(run_dir):
    """A memory figure that the system does not give is null too."""
    log = run_dir / "metrics.jsonl"
    MetricsLog(log).write({"step": 41, "loss": 0.5, "peak_memory_bytes": None})
    assert "Values that are no numbers" not in titles(read_run(run_dir))


def test_findings_come_worst_first():
    run = with_data({"rows": 100, "kept": 1})
    run.finished = False
    run.train[3]["non_finite"] = {"loss": "nan"}
    assert [note.level for note in health_notes(run)] == ["bad", "warn", "info"]


# -- other kinds of runs


def told(n=40, right=0.75):
    bins = [{"low": 0.5, "high": 0.6, "n": n, "confidence": 0.55, "accuracy": right}]
    return {"ece": abs(right - 0.55), "brier": 0.2, "log_loss": 0.6, "bins": bins}


def kind(tmp_path, objective, unit, evaluation, metrics=()):
    (tmp_path / "data_report.json").write_text(json.dumps({"objective": objective, "unit": unit}))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return read_run(tmp_path)


def test_a_run_of_imitation_has_a_perplexity(tmp_path):
    stages = {
        stage: {"n": 50, "tokens": 4000, "loss": loss, "perplexity": math.exp(loss),
                "perplexity_low": math.exp(loss) - 1, "perplexity_high": math.exp(loss) + 1}
        for stage, loss in (("before", 3.0), ("after", 2.0))
    }  # fmt: skip
    rows = [{"step": 0, "eval_loss": 3.0, "eval_perplexity": 20.09}]
    rows += [{"step": i, "loss": 3 - i / 10} for i in range(1, 11)]
    run = kind(tmp_path, "sft", "dialogues", stages, rows)
    text = whole_page(run)
    assert "20.09 →" in text and "7.39" in text and "over 50 dialogues" in text
    assert "Perplexity (95% interval)" in text and "Preference accuracy" not in text
    assert [chart.title for chart in draw_charts(run)][:2] == ["Loss", "Perplexity"]
    assert all(chart.svg for chart in draw_charts(run)[:2])


def test_a_reward_model_has_scores_and_writes_no_samples(tmp_path):
    after = {"n": 40, "accuracy": 0.75, "margin_mean": 0.4, "ties": 0, "calibration": told()}
    after["sources"] = {"helpful": {"accuracy": 0.8}, "harmless": {"accuracy": 0.7}}
    run = kind(tmp_path, "reward", "pairs", {"after": after})
    text = whole_page(run)
    assert "The same prompts" not in text and "under the reference" not in text
    assert "Score margin" in text and "Log-probabilities" not in text
    assert "Calibration error (ECE)" in text and "20.0%" in text
    assert "Accuracy on helpful" in text and "80.0%" in text


def test_calibration_is_drawn_where_pairs_were_told_apart(tmp_path):
    def drawn(evaluation):
        charts = {c.title: c.svg for c in draw_charts(kind(tmp_path, "dpo", "pairs", evaluation))}
        return bool(charts["Calibration"])

    assert drawn({"after": {"n": 40, "ties": 0, "calibration": told()}})
    assert not drawn({"after": {"n": 40, "ties": 40, "calibration": told()}})
    assert not drawn({"after": {"n": 40, "ties": 0, "calibration": {"bins": []}}})
    assert not drawn({"after": {"n": 40, "ties": 0}}) and not drawn({})


def test_the_stages_before_a_run_are_told_with_their_time(tmp_path):
    rows = [{"stage": "SFT", "seconds": 61.2, "result": "perplexity <3>"}, {"stage": "DPO"}]
    (tmp_path / "stages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = whole_page(read_run(tmp_path))
    assert "The way here" in text and "1 min 01 s" in text and "perplexity &lt;3&gt;" in text
    (tmp_path / "stages.jsonl").unlink()
    assert "The way here" not in whole_page(read_run(tmp_path))
