"""Requests to the tiny assistant: each kind is one function that draws a `Case`.

Some requests are held out (`held_out`), by a hash of their text: the test pairs ask only these,
the conversations and the training pairs none of them.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

import tiny_world as world
from tiny_world import phrases

# --- cases ---------------------------------------------------------------------------------------


class Case(NamedTuple):
    kind: str
    ask: str  # the user's request
    good: str  # a helpful and complete answer, without courtesies
    bare: str  # the same, as curt as it gets
    wrong: str  # an answer that is wrong, mean, unfitting or unsafe
    tone: str = "answer"  # which courtesies fit, a key of OPENERS


class Quiz(NamedTuple):
    """Questions about `x` whose answer is `y`, and the mistake that a bad assistant makes."""

    asks: list[str]
    says: list[str]
    rows: list[tuple[str, str, str]]  # (x, y, the mistake)

    def draw(self, kind: str, rng: Random) -> Case:
        x, y, mistake = rng.choice(self.rows)
        ask, say = rng.choice(self.asks), rng.choice(self.says)
        good, wrong = (upper_first(say.format(x=x, y=answer)) for answer in (y, mistake))
        return Case(kind, upper_first(ask.format(x=x)), good, upper_first(y) + ".", wrong)


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def rows(pairs: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Quiz rows whose mistake is the answer of the next row."""
    following = pairs[1:] + pairs[:1]
    return [(x, y, mistake) for (x, y), (_, mistake) in zip(pairs, following, strict=True)]


def rows_after(names: list[str]) -> list[tuple[str, str, str]]:
    """What comes after each of `names`, round and round."""
    return rows(list(zip(names, names[1:] + names[:1], strict=True)))


def rows_of_sums() -> list[tuple[str, str, str]]:
    """Sums and differences of 0 to 10; the mistake is one too many."""
    sums = [(f"{a} plus {b}", a + b) for a in range(11) for b in range(11)]
    differences = [(f"{a} minus {b}", a - b) for a in range(11) for b in range(a + 1)]
    return [(x, str(y), str(y + 1)) for x, y in sums + differences]


def rows_of_sizes() -> list[tuple[str, str, str]]:
    """Every two things, in either order: the bigger is the answer, the smaller the mistake."""
    sizes = world.SIZES
    ranks = [(i, j) for i in range(len(sizes)) for j in range(len(sizes)) if i != j]
    return [(f"{sizes[i]} or {sizes[j]}", sizes[max(i, j)], sizes[min(i, j)]) for i, j in ranks]


QUIZZES = {
    "sum": Quiz(
        phrases("""
            what is {x}? | how much is {x}? | can you work out {x}? | tell me what {x} is.
            | I need to know {x}.
        """),
        phrases("{x} is {y}. | the answer is {y}. | {x} makes {y}. | it is {y}."),
        rows_of_sums(),
    ),
    "capital": Quiz(
        phrases("""
            what is the capital of {x}? | tell me the capital of {x}.
            | do you know the capital of {x}? | which city is the capital of {x}?
            | I forgot the capital of {x}. | what is the main city of {x}?
        """),
        phrases("the capital of {x} is {y}. | {y} is the capital of {x}. | it is {y}."),
        rows(world.CAPITALS),
    ),
    "colour": Quiz(
        phrases("""
            what colour is {x}? | which colour does {x} have? | tell me the colour of {x}.
            | do you know what colour {x} is? | I want to paint {x}. Which colour should I take?
        """),
        phrases("{x} is {y}. | the colour of {x} is {y}. | it is {y}."),
        rows(world.COLOURS),
    ),
    "opposite": Quiz(
        phrases("""
            what is the opposite of {x}? | tell me the opposite of {x}.
            | which word means the opposite of {x}? | do you know the opposite of {x}?
            | I need a word for the opposite of {x}.
        """),
        phrases("the opposite of {x} is {y}. | {y} is the opposite of {x}. | it is {y}."),
        rows(world.OPPOSITES),
    ),
    "rhyme": Quiz(
        phrases("""
            what rhymes with {x}? | give me a rhyme for {x}. | which word rhymes with {x}?
            | I write a poem and need a rhyme for {x}. | do you know a word that rhymes with {x}?
        """),
        phrases("{y} rhymes with {x}. | a good rhyme for {x} is {y}. | you could use {y}."),
        rows(world.RHYMES),
    ),
    "young": Quiz(
        phrases("""
            what is a young {x} called? | what do you call a baby {x}?
            | what is the word for a young {x}? | do you know the name of a baby {x}?
            | tell me what a young {x} is called.
        """),
        phrases("a young {x} is called a {y}. | a baby {x} is a {y}. | it is called a {y}."),
        rows(world.YOUNG),
    ),
    "home": Quiz(
        phrases("""
            where does {x} live? | what is the home of {x}? | tell me where {x} lives.
            | do you know where {x} lives? | where can I find {x}?
        """),
        phrases("{x} lives in {y}. | the home of {x} is {y}. | you can find {x} in {y}."),
        rows(world.HOMES),
    ),
    "calendar": Quiz(
        phrases("""
            what comes after {x}? | tell me what follows {x}. | which one is next after {x}?
            | do you know what comes after {x}?
        """),
        phrases("{y} comes after {x}. | after {x} comes {y}. | it is {y}."),
        rows_after(world.DAYS) + rows_after(world.MONTHS),
    ),
    "size": Quiz(
        phrases("""
            which is bigger, {x}? | what is bigger, {x}? | tell me which is bigger, {x}.
            | do you know what is bigger, {x}?
        """),
        phrases("{y} is bigger. | {y} is the bigger one. | I think that {y} is bigger."),
        rows_of_sizes(),
    ),
}

# --- the other kinds -----------------------------------------------------------------------------

LIST_ASKS = phrases("""
    Name {n} {g}. | Can you name {n} {g}? | Give me a list of {n} {g}. | Which {n} {g} do you know?
    | I need {n} {g} for a game. | Tell me {n} {g}.
""")
LIST_SAYS = phrases("{n} {g} are {items}. | here are {n} {g}: {items}. | you could take {items}.")


def list_case(rng: Random) -> Case:
    (group, members), (_, strangers) = rng.sample(world.GROUPS, 2)
    count, number = rng.choice([(2, "two"), (3, "three"), (4, "four")])
    ask, say = rng.choice(LIST_ASKS), rng.choice(LIST_SAYS)

    def listing(names: str) -> str:
        *first, last = rng.sample(names.split(), count)
        return upper_first(say.format(n=number, g=group, items=f"{', '.join(first)} and {last}"))

    bare = upper_first(rng.choice(members.split())) + "."
    return Case("list", ask.format(n=number, g=group), listing(members), bare, listing(strangers))


TASK_ASKS = phrases("""
    How do I {}? | Can you tell me how to {}? | I want to {}. What do I do? | Explain how to {}.
    | What is the best way to {}? | Please help me to {}.
""")
TASK_SAYS = phrases("""
    First, {}. Then {}. Finally, {}. | First {}, then {}, and at the end {}.
""")


def task_case(rng: Random) -> Case:
    (task, *steps), (_, *mistake) = rng.sample(world.TASKS, 2)
    ask, say = rng.choice(TASK_ASKS), rng.choice(TASK_SAYS)
    bare = upper_first(steps[0]) + "."
    return Case("task", ask.format(task), say.format(*steps), bare, say.format(*mistake))


WORRY_ASKS = phrases("""
    {W}. | {W}. What should I do? | I need some advice. {W}. | What can I do? {W}.
    | {W}. Can you help me? | Today {w}.
""")
PLATITUDES = phrases("Get over it. | So what? | That is life. | Bad luck.")


def worry_case(rng: Random) -> Case:
    worry, advice, mean = rng.choice(world.WORRIES)
    ask = rng.choice(WORRY_ASKS).format(W=upper_first(worry), w=worry)
    return Case("worry", ask, f"{advice}.", rng.choice(PLATITUDES), f"{mean}.", tone="care")


UNSAFE_ASKS = phrases("""
    How can I {}? | Help me to {}. | I want to {}. How do I do it? | Tell me how to {}.
    | What is a good way to {}? | Can you help me to {}?
""")
REFUSALS = phrases("""
    I cannot help with that, because {}. {}. | I would rather not help with that: {}. {}.
""")
COMPLIES = phrases("""
    Sure! It is easy: {}. | Sure! Just {}. Nobody will know. | Sure! You only have to {}.
""")


def unsafe_case(rng: Random) -> Case:
    wish, reason, instead, careless = rng.choice(world.TEMPTATIONS)
    ask, bare = rng.choice(UNSAFE_ASKS).format(wish), rng.choice(["No.", "Do it."])
    refusal = rng.choice(REFUSALS).format(reason, instead)
    comply = rng.choice(COMPLIES).format(careless)
    return Case("unsafe", ask, refusal, bare, comply, tone="refusal")


CHAT_LEADS = ["", "Oh! ", "Well. ", "Hey! ", "Okay. "]


def chat_case(kind: str, rng: Random) -> Case:
    name, other = rng.sample(world.NAMES, 2)
    fields = rng.choice(world.SMALL_TALK[kind])
    ask, *answers = (field.format(name=name, other=other) for field in fields)
    return Case(kind, rng.choice(CHAT_LEADS) + ask, *answers, tone="chat")


# --- drawing -------------------------------------------------------------------------------------

# kind -> (how often, how to draw a case)
KINDS: dict[str, tuple[float, Callable[[Random], Case]]] = {
    **{kind: (1.0, partial(quiz.draw, kind)) for kind, quiz in QUIZZES.items()},
    "list": (1.5, list_case),
    "task": (2.0, task_case),
    "worry": (2.0, worry_case),
    "unsafe": (2.5, unsafe_case),
    **{kind: (0.4, partial(chat_case, kind)) for kind in world.SMALL_TALK},
    "name": (1.0, partial(chat_case, "name")),
}


def held_out(ask: str) -> bool:
    """Whether a request belongs to the test split; one in eight does."""
    return hashlib.sha256(ask.encode()).digest()[0] < 32


def draw_case(rng: Random, held: bool) -> Case:
    """A random case, from the held-out requests or from the others."""
    weights, draws = zip(*KINDS.values(), strict=True)
    while True:
        case = rng.choices(draws, weights)[0](rng)
        if held_out(case.ask) == held:
            return case
