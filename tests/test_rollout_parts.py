"""The parts of a rollout engine: its noise, how a token is drawn, when a response ends."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefopt.errors import InputError
from prefopt.rollout import picking
from prefopt.rollout.noise import uniforms
from prefopt.rollout.picking import inverse_cdf
from prefopt.rollout.stops import StopTexts, as_text
from prefopt.rollout.types import Generation, Sample, SamplingParams

# -- noise

GOLDEN = [
    0.6703283700586792,
    0.808328037936001,
    0.7891641536046691,
    0.723207335548255,
    0.7728735376530852,
]


def test_the_noise_is_pinned():
    """A run that is resumed with another version of this library draws on as it began."""
    got = [uniforms(seed, key, sample, 3)[-1] for seed, key, sample in
           ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-5, 2**70, 7))]  # fmt: skip
    assert got == GOLDEN


def test_the_noise_is_uniform_and_every_name_counts():
    rows = [uniforms(seed, key, sample, 500)
            for seed in range(3) for key in range(5) for sample in range(8)]  # fmt: skip
    x = np.stack(rows)
    assert len(np.unique(x)) == x.size and 0 < x.min() and x.max() < 1
    counts = np.histogram(x, bins=50, range=(0, 1))[0]
    expected = x.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 49 + 4 * np.sqrt(2 * 49)
    correlations = np.corrcoef(np.concatenate([x, np.roll(x[:1], 1, 1)]))
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5 / np.sqrt(500)
    assert np.array_equal(uniforms(1, 2, 3, 9), uniforms(1, 2, 3, 4000)[:9])


# -- the inverse of the CDF


WEIGHTS = st.lists(st.sampled_from([0.0, 1e-38, 1e-9, 0.25, 1.0, 3.0]), min_size=1, max_size=30)


@pytest.mark.parametrize("size", [1 << 20, 4], ids=["one level", "blocks"])
@given(
    weights=WEIGHTS.filter(any),
    u=st.one_of(
        st.floats(0, 1),
        st.sampled_from([2.0**-53, 0.5, 1 - 2.0**-53, 1.0, float(np.nextafter(1, 2))]),
    ),
)
def test_inverse_cdf(size, weights, u):
    """The token in whose piece of [0, sum) u times the sum lies; of weight 0 it never is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picking, "BLOCK", size)
        p = torch.tensor([weights, weights[::-1]])
        got = inverse_cdf(p, torch.tensor([u, u], dtype=torch.float64)).tolist()
    for row, token in zip(p.double(), got, strict=True):
        assert row[token] > 0
        edges, wanted = row.cumsum(0), u * row.sum()
        rounding = 1e-12 * row.sum()
        assert edges[token] >= wanted - rounding or token == int(row.nonzero()[-1])
        assert edges[token] - row[token] <= wanted + rounding


def test_inverse_cdf_of_a_large_vocabulary():
    """In two levels it draws what float64 over all words draws."""
    p = torch.randn(64, 5000).mul(3).exp()
    u = torch.rand(64, dtype=torch.float64)
    totals = p.double().cumsum(1)
    want = torch.searchsorted(totals, u[:, None] * totals[:, -1:], right=True)[:, 0]
    assert torch.equal(inverse_cdf(p, u), want)


def test_likeliest():
    p = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])
    kept = [(picking._likeliest(p, *how) > 0).sum(1).tolist() for how in
            ((0.49, 0), (0.51, 0), (0.81, 0), (1.0, 2), (0.79, 1), (1e-9, 0))]  # fmt: skip
    assert kept == [[1, 2], [2, 3], [3, 4], [2, 2], [1, 1], [1, 1]]
    assert picking._likeliest(p, 0.6, 0)[0].tolist() == [0.5, 0, p[0, 2], 0]


# -- stops


@pytest.fixture(scope="module")
def letters():
    """One token is a byte, "</s>", "ab" or "bc "."""
    alphabet = [*pre_tokenizers.ByteLevel.alphabet()]
    words = ["</s>", *sorted(alphabet), "ab", "bcĠ"]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    return tokenizer, {word: i for i, word in enumerate(words)}


def ids_of(known, *words):
    return [known[word] for word in words]


def test_stop_texts_over_token_borders(letters):
    tokenizer, known = letters
    texts = StopTexts(("bc a", "é"), tokenizer)
    words = ids_of(known, "a", "bcĠ", "ab", "c")
    assert [texts.found(words[: i + 1]) for i in range(4)] == [False, False, True, False]
    assert texts.found(ids_of(known, *"x" * 40, "b", "c", "Ġ", "a"))
    assert not texts.found(ids_of(known, "Ã")) and texts.found(ids_of(known, "Ã", "©"))
    assert not StopTexts((), tokenizer).found(words)


def test_the_text_of_a_response(letters):
    tokenizer, known = letters

    def text(words, finish, **params):
        tokens = np.array(ids_of(known, *words), dtype=np.int32)
        sample = Sample(tokens, np.zeros(len(tokens), np.float32), finish)
        return as_text(sample, SamplingParams(**params), (0,), tokenizer)

    assert text(["a", "b", "</s>"], "stop") == Generation("ab", "stop", 2)
    assert text(["a", "b"], "length") == Generation("ab", "length", 2)
    got = text(["x", "bcĠ", "ab"], "stop", stop=("c a", "q"))
    assert got == Generation("xb", "stop", 3)
    # one that a minimal length let pass stays in the text
    assert text([*"axa"], "stop", stop=("a",), min_new_tokens=2).text == "ax"


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"stop": ("a", "")}, "stop is"),
        ({"stop": "a"}, "stop is 'a'"),
    ],
)
def test_parameters_out_of_range(params, reason):
    with pytest.raises(InputError, match=reason):
        SamplingParams(**params)
