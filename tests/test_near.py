"""Near-duplicates against brute force over sets of shingles, overlap against counting n-grams."""

import random
from string import ascii_lowercase

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.audit import near

WORDS = (
    "the a cat dog tree sings runs slowly under over bright blue water stone house because when "
    "seven people travel across wide quiet rivers und Straße größer"
).split()


def brute_shingles(text: str) -> set[str]:
    """Character 5-grams of lower-case text with single spaces (ASCII and a few letters)."""
    text = " ".join(text.casefold().split())
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))} if text else set()


def brute_jaccard(a: str, b: str) -> float:
    one, two = brute_shingles(a), brute_shingles(b)
    return len(one & two) / len(one | two) if one | two else 0.0


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def edited(text: str, rng: random.Random, edits: int) -> str:
    words = text.split()
    for _ in range(edits):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words)


def neighbours(texts: list[str], held: np.ndarray | None = None) -> dict[int, int]:
    keys = np.array([near.band_keys(text) for text in texts])
    return near.neighbours(keys, texts.__getitem__, held)


# --- similarity --------------------------------------------------------------------------------


@given(st.text(max_size=60), st.text(max_size=60))
def test_jaccard_is_that_of_sets_of_shingles(a, b):
    expected = [
        {tuple(p[i : i + 5]) for i in range(max(1, len(p) - 4))} if p else set()
        for p in map(near.plain, (a, b))
    ]
    union = expected[0] | expected[1]
    share = len(expected[0] & expected[1]) / len(union) if union else 0.0
    assert near.jaccard(near.shingles(a), near.shingles(b)) == pytest.approx(share)


def test_case_white_space_and_unicode_forms_make_no_difference():
    one, two = (
        "Gro\u00dfe  Stra\u00dfe\n\u00e9t\u00e9 \uff21\uff22",
        "grosse strasse e\u0301te\u0301 ab",
    )
    assert near.plain(one) == near.plain(two)
    assert (near.band_keys(one) == near.band_keys(two)).all()
    assert (near.band_keys(one) != near.band_keys(one + "!")).any()


def test_minhash_values_agree_as_often_as_the_sets_overlap():
    """The share of equal MinHash values estimates the Jaccard similarity s, without bias and with
    the variance s (1 - s) / 120 of independent ones. The texts share no words: the values of texts
    that do depend on each other."""
    rng, scores = random.Random(1), []
    for n in range(600):
        words = ["".join(rng.choices(ascii_lowercase, k=rng.randrange(2, 9))) for _ in range(40)]
        other = list(words)
        for _ in range(1 + n % 12):
            other[rng.randrange(40)] = "".join(rng.choices(ascii_lowercase, k=5))
        a, b = " ".join(words), " ".join(other)
        own = [near._grams(near._letters(t), near.SHINGLE) >> np.uint64(32) for t in (a, b)]
        least = [(h.astype(np.uint32)[:, None] * near._FACTORS + near._SHIFTS).min(0) for h in own]
        share = brute_jaccard(a, b)
        agree = (least[0] == least[1]).mean()
        scores.append((agree - share) / np.sqrt(share * (1 - share) / len(least[0])))
    assert abs(np.mean(scores)) < 4 / np.sqrt(600)
    assert abs(np.std(scores) - 1) < 4 / np.sqrt(2 * 600)


def test_a_text_of_many_blocks_has_the_keys_of_its_parts_together(monkeypatch):
    text = sentence(random.Random(2), 400)
    whole = near.band_keys(text)
    monkeypatch.setattr(near, "_BLOCK", 7)
    assert (near.band_keys(text) == whole).all()


# --- which texts are near-duplicates ------------------------------------------------------------


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """800 texts, a third of them edited copies of earlier ones."""
    rng, out = random.Random(3), []
    for n in range(800):
        if n % 3 == 2:
            out.append(edited(out[rng.randrange(len(out))], rng, rng.randrange(5)))
        else:
            out.append(sentence(rng, rng.randrange(3, 60)))
    return out


@pytest.fixture(scope="module")
def similar(texts) -> dict[tuple[int, int], float]:
    """Every two texts at or near the threshold, by brute force: (later, earlier) -> similarity."""
    sets = [brute_shingles(text) for text in texts]
    out = {}
    for i, one in enumerate(sets):
        for j in range(i):
            if 2 * min(len(one), len(sets[j])) > max(len(one), len(sets[j])):
                share = len(one & sets[j]) / len(one | sets[j])
                if share > 0.5:
                    out[i, j] = share
    return out


def test_near_duplicates_are_those_of_brute_force(texts, similar):
    expected = {i for (i, _), share in similar.items() if share >= near.SIMILAR}
    found = neighbours(texts)
    assert len(expected) > 100
    assert all(similar[i, j] >= near.SIMILAR for i, j in found.items())  # never a wrong one
    assert len(expected - found.keys()) <= 0.01 * len(expected)  # hardly ever one overlooked


def test_with_a_held_out_side_only_neighbours_across_count(texts, similar):
    held = np.arange(len(texts)) % 4 == 0
    expected = set()
    for (i, j), share in similar.items():
        if share >= near.SIMILAR and held[i] != held[j]:
            expected.add(j if held[i] else i)
    found = neighbours(texts, held)
    assert len(expected) > 40
    assert all(not held[i] and held[j] for i, j in found.items())
    assert all(similar[max(i, j), min(i, j)] >= near.SIMILAR for i, j in found.items())
    assert len(expected ^ found.keys()) <= 0.01 * len(expected)


def test_many_copies_of_one_text_all_find_the_first():
    copies = ["the very same question about something"] * 300
    assert neighbours(copies) == dict.fromkeys(range(1, 300), 0)
    held = np.arange(300) >= 200
    assert neighbours(copies, held) == dict.fromkeys(range(200), 200)


def test_no_texts_and_empty_texts_have_no_neighbours():
    assert neighbours([]) == {}
    assert neighbours(["", " ", "\n"]) == {}
    assert neighbours(["hi", "HI"]) == {1: 0}


def test_languages_without_spaces_have_near_duplicates_too():
    a = "今日はとても天気が良いので公園を散歩してから図書館で本を読みました。とても楽しかったです"
    texts = [
        a,
        a.replace("公園", "海岸", 1),
        "まったく別の質問をここに書いておきます。何もわかりません",
    ]
    assert brute_jaccard(texts[0], texts[1]) > 0.6
    assert neighbours([a, a + "。"]) == {1: 0}
    assert 2 not in neighbours(texts)


# --- overlap with a benchmark -------------------------------------------------------------------


def brute_overlap(benchmark: list[str], text: str) -> float:
    def grams(words):
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    own = grams(text.casefold().split())
    shares = [len(own & g) / len(g) for b in benchmark if (g := grams(b.casefold().split()))]
    return max(shares, default=0.0)


def test_containment_is_the_share_of_word_8_grams():
    rng = random.Random(5)
    benchmark = [sentence(rng, rng.randrange(2, 40)) for _ in range(60)]
    index, hits = near.Ngrams(benchmark), 0
    for n in range(300):
        inner = benchmark[rng.randrange(60)].split()
        start = rng.randrange(1 + len(inner) // 3)
        inner = inner[start:] if n % 2 else inner
        text = " ".join([sentence(rng, n % 7), *inner, sentence(rng, n % 5)]).strip()
        expected, found = brute_overlap(benchmark, text), index.inside(text)
        if found is None:
            assert expected < near.CONTAINED
        elif not found.exact:
            assert found.share == pytest.approx(expected)
            assert brute_overlap([benchmark[found.item]], text) == pytest.approx(expected)
            hits += 1
    assert hits > 100


def test_equal_word_for_word_is_found_however_short():
    index = near.Ngrams(["What is 2+2?", "", "Tell me a joke, please!"])
    assert index.inside("what is 2 + 2") == (0, 1.0, True)
    assert index.inside("Tell me a JOKE please") == (2, 1.0, True)
    assert index.inside("Tell me a joke please, and another") is None
    assert index.inside("") is None and index.inside("!?") is None


def test_a_benchmark_of_short_texts_only_is_searched_too():
    assert near.Ngrams(["hi"]).inside(sentence(random.Random(0), 30)) is None
    assert near.Ngrams([]).inside("anything at all") is None


def test_characters_are_words_where_no_spaces_separate_them():
    question = "日本の首都はどこですか教えてください"
    assert near.Ngrams([question]).inside(f"質問です。{question}お願いします") is not None
