"""Rewards: functions and models that score responses, what is wrong with a score, and how several
become one number."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError, LoraConfig, Message, Policy
from prefopt.nn.heads import ScoreStats
from prefopt.rewards import RewardModel, check_reward, combine, load_reward, score


def ask(text):
    return [Message("user", text)]


PROMPTS = [ask("Tell me about cats."), ask("Tell me about cats."), ask("Why?"), ask("Why?")]
RESPONSES = ["They purr.", "", "Because of the rain, the sea and the sun.", "No!"]


# -- a function


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A folder to work in whose my_rewards.py has the functions below."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, responses):\n    return [len(r) for r in responses]\n"
        "def narrow(responses):\n    return [0.0 for r in responses]\n"
        "def options(prompts, responses, **columns):\n    return [1.0 for r in responses]\n"
        "number = 3\n"
    )
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def test_a_function_by_name(module):
    reward = load_reward("my_rewards:length")
    assert score(reward, "length", PROMPTS, RESPONSES) == [10, 0, 41, 3]
    assert score(load_reward("my_rewards:options"), "o", PROMPTS, RESPONSES) == [1] * 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_rewards:lenght", "reward 'my_rewards:lenght': .*did you mean 'length'"),
        ("my_rewords:length", "reward .* no module 'my_rewords'"),
        ("my_rewards:number", "a int, no function"),
        ("my_rewards:narrow", r"takes \(responses\), and it is called with \(prompts, responses\)"),
        ("no/such/folder", "no model folder"),
    ],
)
def test_a_name_that_cannot_be_loaded(module, spec, message):
    with pytest.raises(InputError, match=message):
        load_reward(spec)


def test_what_is_no_function():
    with pytest.raises(InputError, match="reward 'x' is a float; give a function"):
        check_reward(1.0, "x")
    check_reward(dict, "built-in functions have no signature to look at")


# -- what it returns


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3, 4],
        (1.0, 2.0, 3.0, 4.0),
        np.array([1, 2, 3, 4], dtype=np.float32),
        torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16),
        [torch.tensor(1.0), np.int64(2), 3, torch.tensor([4.0])],
        iter([1, 2, 3, 4]),
    ],
)
def test_any_numbers_will_do(values):
    got = score(lambda prompts, responses: values, "r", PROMPTS, RESPONSES)
    assert got == [1.0, 2.0, 3.0, 4.0] and all(type(x) is float for x in got)


def test_right_and_wrong_are_numbers():
    assert score(lambda p, r: [True, False], "r", PROMPTS[:2], RESPONSES[:2]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (math.nan, "nan (float)"),
        (-math.inf, "-inf (float)"),
        (None, "None (NoneType)"),
        ("0.5", "'0.5'"),
        ([0.5, 1.0], "[0.5, 1.0] (list)"),
        (torch.tensor([0.5, 1.0]), "(Tensor)"),
        (1j, "1j (complex)"),
    ],
)
def test_what_is_no_number_names_its_sample(bad, shown):
    with pytest.raises(InputError) as caught:
        score(lambda p, r: [0.0, 1.0, bad, 2.0], "mine", PROMPTS, RESPONSES)
    text = str(caught.value)
    assert "reward 'mine'" in text and shown in text
    assert "to the prompt 'Why?'" in text and "'Because of the rain" in text


def test_long_texts_are_shortened():
    with pytest.raises(InputError) as caught:
        score(lambda p, r: [math.nan], "mine", [ask("p" * 5000)], ["word \n" * 5000])
    assert len(str(caught.value)) < 400 and "..." in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "returned 1 scores for 4 responses, the first of them for the response 'They purr"),
        ([1.0] * 5, "returned 5 scores for 4 responses"),
        (None, "returned a NoneType; it must return a list with one number per response"),
        (1.0, "returned a float"),
        ("1234", "returned a str"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "returned a dict"),
        (torch.tensor(1.0), "returned a Tensor"),
    ],
)
def test_what_is_no_list_of_scores(values, message):
    with pytest.raises(InputError, match=message):
        score(lambda p, r: values, "mine", PROMPTS, RESPONSES)


def test_an_exception_names_its_sample_and_place():
    def divide(prompts, responses):
        return [1 / len(text) for text in responses]

    with pytest.raises(InputError) as caught:
        score(divide, "mine", PROMPTS, RESPONSES)
    text = str(caught.value)
    assert "reward 'mine' failed for the response '' to the prompt 'Tell me about cats.'" in text
    assert "ZeroDivisionError: division by zero" in text and "test_rewards.py, line" in text
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_that_comes_late_is_one_too():
    def lazily(prompts, responses):
        yield from (1 / len(text) for text in responses)

    with pytest.raises(InputError, match=r"failed for the response '' to .*ZeroDivisionError"):
        score(lazily, "mine", PROMPTS, RESPONSES)
    assert score(lazily, "mine", PROMPTS[:1], RESPONSES[:1]) == [0.1]


def test_an_exception_of_all_samples_together():
    def few(prompts, responses):
        if len(responses) > 2:
            raise MemoryError("too many")
        return [0.0] * len(responses)

    with pytest.raises(InputError, match="failed on 4 samples together, but on none of them alone"):
        score(few, "mine", PROMPTS, RESPONSES)


def test_ctrl_c_inside_a_reward_is_no_error_of_it():
    def interrupted(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted, "mine", PROMPTS, RESPONSES)


# -- several as one

SCORES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)


def test_one_reward_is_left_as_it_is():
    assert combine({"a": [3, 1, 2]}) == [3.0, 1.0, 2.0]
    assert combine({"a": [3, 1, 2]}, {"a": 7}, scales={"a": ScoreStats(1, 2, 9)}) == [3, 1, 2]


def test_several_are_standardised_and_weighed():
    scores = {"a": [0.0, 1.0, 2.0, 3.0], "b": [300.0, 100.0, 100.0, 300.0]}
    a = [(x - 1.5) / math.sqrt(1.25) for x in scores["a"]]
    b = [(x - 200) / 100 for x in scores["b"]]
    assert combine(scores) == pytest.approx([x + y for x, y in zip(a, b, strict=True)])
    want = [2 * x + 0.5 * y for x, y in zip(a, b, strict=True)]
    assert combine(scores, {"a": 2, "b": 0.5}) == pytest.approx(want)


def test_a_known_scale_is_used_and_one_without_spread_is_not():
    scores = {"a": [1.0, 3.0], "b": [0.0, 1.0]}
    scales = {"a": ScoreStats(1.0, 4.0, 100), "b": None}
    assert combine(scores, scales=scales) == pytest.approx([0.0 - 1.0, 0.5 + 1.0])
    scales["a"] = ScoreStats(1.0, 0.0, 100)
    assert combine(scores, scales=scales) == pytest.approx([-2.0, 2.0])


def test_a_constant_reward_adds_nothing():
    assert combine({"a": [5.0, 5.0], "b": [1.0, 2.0]}) == pytest.approx([-1.0, 1.0])


@given(SCORES, st.floats(0.1, 100), st.floats(-100, 100), st.floats(0.1, 10))
def test_scale_and_shift_of_a_reward_do_not_matter(values, scale, shift, weight):
    if np.std(values) < 1e-3:
        return
    other = list(np.linspace(-1, 1, len(values)))
    weights = {"a": weight, "b": 1.0}
    plain = combine({"a": values, "b": other}, weights)
    moved = combine({"a": [scale * x + shift for x in values], "b": other}, weights)
    assert moved == pytest.approx(plain, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1}, "the reward 'b' has no weight"),
        ({"a": 1, "b": 1, "c": 1}, "the reward 'c'.*and the rewards are a, b"),
        ({"a": 1, "b": 0}, "weight of the reward 'b' is 0; give one above 0"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(InputError, match=message):
        combine({"a": [1.0], "b": [2.0]}, weights)


# -- a reward model


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """Reward models of the tiny model: all weights, and an adapter with statistics."""
    root = tmp_path_factory.mktemp("rewards")
    for name, lora in (("full", None), ("adapter", LoraConfig(r=4))):
        torch.manual_seed(3)
        policy = Policy.from_pretrained(tiny_model, head="score", lora=lora, dtype="float32")
        with torch.no_grad():
            for _, p in policy.trainable():
                p.add_(0.1 * torch.randn_like(p))
        policy.score_stats = ScoreStats(0.5, 2.0, 10)
        policy.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_a_reward_model_scores_as_transformers_does(folders, name):
    """Prompts shared or not, alone or together; and by transformers on the same text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reward = load_reward(folders / name)
    assert isinstance(reward, RewardModel) and reward.score_stats == ScoreStats(0.5, 2.0, 10)
    got = score(reward, "rm", PROMPTS, RESPONSES)
    alone = [reward([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert got == pytest.approx(alone, abs=1e-5) and len({round(x, 4) for x in got}) == 4
    assert reward(PROMPTS[::-1], RESPONSES[::-1]) == pytest.approx(got[::-1], abs=1e-5)
    if name == "adapter":
        return
    model = AutoModelForSequenceClassification.from_pretrained(folders / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders / name)
    for prompt, response, ours in zip(PROMPTS, RESPONSES, got, strict=True):
        text = f"\n\nHuman: {prompt[0].content}\n\nAssistant: {response}"
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits.item()
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_batches_do_not_matter(folders):
    whole = RewardModel(folders / "full")(PROMPTS, RESPONSES)
    small = RewardModel(folders / "full", micro_tokens=16)(PROMPTS, RESPONSES)
    assert small == pytest.approx(whole, abs=1e-5)


def test_a_long_response_is_cut_and_a_long_prompt_is_an_error(folders):
    reward = RewardModel(folders / "full", max_length=64)
    long, longer = (reward([ask("Why?")], ["so " * n])[0] for n in (200, 300))
    assert long == longer
    with pytest.raises(
        InputError, match=r"to the prompt 'why .*\.\.\.': .*prompt fills max_length"
    ):
        score(reward, "rm", [ask("why " * 100)], ["No."])
    reason = r"the prompt 'why .*\.\.\.' cannot be scored .* reads 64 tokens: prompt fills max_len"
    with pytest.raises(InputError, match=reason):
        reward([ask("Why?"), ask("why " * 100)], ["So.", "No."])


def test_a_language_model_is_no_reward(tiny_model):
    with pytest.raises(InputError, match="is a language model, which has no score"):
        load_reward(tiny_model)
