"""The synthetic assistant corpus: conversations for training the tiny model, and preference pairs for aligning it.

A `Case` is one request with what a good assistant would say, the same in as few words as possible, and something wrong
or unsafe in its place. `polite` writes the helpful answer to a case; each function in `FLAWS` writes a bad one. The corpus
uses both about equally often, so a model trained on it is indifferent between them. A preference pair is one polite
and one flawed answer to the same request.

Everything is drawn from one `random.Random(seed)`: same seed, same text. Requests are held out by their hash
(`held_out`), from the corpus as well as from the training pairs.
"""

import hashlib
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

import tiny_world as world

# --- cases ------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    kind: str
    ask: str  # the user's request
    good: str  # a helpful, complete answer, without courtesies
    bare: str  # the same, as curt as it gets
    wrong: str  # an answer of the same form that is wrong, mean or unsafe
    tone: str = "answer"  # which courtesies fit: answer, care, refusal, chat


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


class Quiz(NamedTuple):
    """Questions about `x` whose answer is `y`, and the mistake that a bad assistant makes."""

    asks: list[str]
    says: list[str]
    rows: list[tuple[str, str, str]]  # (x, y, the mistake)

    def draw(self, kind: str, rng: Random) -> Case:
        x, y, mistake = rng.choice(self.rows)
        say = rng.choice(self.says)
        good, wrong = (upper_first(say.format(x=x, y=answer)) for answer in (y, mistake))
        return Case(kind, upper_first(rng.choice(self.asks).format(x=x)), good, upper_first(y) + ".", wrong)


def rows(pairs: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Quiz rows whose mistake is the answer of the next row."""
    return [(x, y, mistake) for (x, y), (_, mistake) in zip(pairs, pairs[1:] + pairs[:1], strict=True)]


def sum_rows() -> list[tuple[str, str, str]]:
    """Sums and differences of 0 to 10; the mistake is one too many."""
    sums = [(f"{a} plus {b}", a + b) for a in range(11) for b in range(11)]
    differences = [(f"{a} minus {b}", a - b) for a in range(11) for b in range(a + 1)]
    return [(x, str(y), str(y + 1)) for x, y in sums + differences]


def size_rows() -> list[tuple[str, str, str]]:
    """Every ordered pair of things: the bigger one is the answer, the smaller one the mistake."""
    things = list(enumerate(world.SIZES))
    return [(f"{a} or {b}", max((i, a), (j, b))[1], min((i, a), (j, b))[1]) for i, a in things for j, b in things if i != j]


def after(names: list[str]) -> list[tuple[str, str]]:
    return [(name, names[(i + 1) % len(names)]) for i, name in enumerate(names)]


QUIZZES = {
    "sum": Quiz(
        ["what is {x}?", "how much is {x}?", "can you work out {x}?", "tell me what {x} is.", "I need to know {x}."],
        ["{x} is {y}.", "the answer is {y}.", "{x} makes {y}.", "it is {y}."],
        sum_rows(),
    ),
    "capital": Quiz(
        ["what is the capital of {x}?", "tell me the capital of {x}.", "do you know the capital of {x}?",
         "which city is the capital of {x}?", "I forgot the capital of {x}.", "what is the main city of {x}?"],
        ["the capital of {x} is {y}.", "{y} is the capital of {x}.", "it is {y}."],
        rows(world.CAPITALS),
    ),
    "colour": Quiz(
        ["what colour is {x}?", "which colour does {x} have?", "tell me the colour of {x}.",
         "do you know what colour {x} is?", "I want to paint {x}. Which colour should I take?"],
        ["{x} is {y}.", "the colour of {x} is {y}.", "it is {y}."],
        rows(world.COLOURS),
    ),
    "opposite": Quiz(
        ["what is the opposite of {x}?", "tell me the opposite of {x}.", "which word means the opposite of {x}?",
         "do you know the opposite of {x}?", "I need a word that is not {x} but the opposite."],
        ["the opposite of {x} is {y}.", "{y} is the opposite of {x}.", "it is {y}."],
        rows(world.OPPOSITES),
    ),
    "rhyme": Quiz(
        ["what rhymes with {x}?", "give me a rhyme for {x}.", "which word rhymes with {x}?",
         "I write a poem and need a rhyme for {x}.", "do you know a word that rhymes with {x}?"],
        ["{y} rhymes with {x}.", "a good rhyme for {x} is {y}.", "you could use {y}."],
        rows(world.RHYMES),
    ),
    "young": Quiz(
        ["what is a young {x} called?", "what do you call a baby {x}?", "what is the word for a young {x}?",
         "do you know the name of a baby {x}?", "tell me what a young {x} is called."],
        ["a young {x} is called a {y}.", "a baby {x} is a {y}.", "it is called a {y}."],
        rows(world.YOUNG),
    ),
    "home": Quiz(
        ["where does {x} live?", "what is the home of {x}?", "tell me where {x} lives.",
         "do you know where {x} lives?", "where can I find {x}?"],
        ["{x} lives in {y}.", "the home of {x} is {y}.", "you can find {x} in {y}."],
        rows(world.HOMES),
    ),
    "calendar": Quiz(
        ["what comes after {x}?", "tell me what follows {x}.", "which one is next after {x}?",
         "do you know what comes after {x}?"],
        ["{y} comes after {x}.", "after {x} comes {y}.", "it is {y}."],
        rows(after(world.DAYS)) + rows(after(world.MONTHS)),
    ),
    "size": Quiz(
        ["which is bigger, {x}?", "what is bigger, {x}?", "tell me which is bigger, {x}.",
         "do you know what is bigger, {x}?"],
        ["{y} is bigger.", "{y} is the bigger one.", "I think that {y} is bigger."],
        size_rows(),
    ),
}


def other(options: list, taken: object, rng: Random):
    """A random option that is not `taken`."""
    return rng.choice([option for option in options if option != taken])


def list_case(rng: Random) -> Case:
    group, wrong_group = rng.sample(world.GROUPS, 2)
    count = rng.choice(list(world.NUMBERS))
    number = world.NUMBERS[count]

    def listing(members: str) -> str:
        *first, last = rng.sample(members.split(), count)
        return f"{', '.join(first)} and {last}"

    ask = rng.choice(["Name {n} {g}.", "Can you name {n} {g}?", "Give me a list of {n} {g}.", "Which {n} {g} do you know?",
                      "I need {n} {g} for a game.", "Tell me {n} {g}."]).format(n=number, g=group[0])
    say = rng.choice(["{N} {g} are {l}.", "here are {n} {g}: {l}.", "you could take {l}."])
    good, wrong = (
        upper_first(say.format(N=upper_first(number), n=number, g=group[0], l=listing(g[1]))) for g in (group, wrong_group)
    )
    return Case("list", ask, good, upper_first(rng.choice(group[1].split())) + ".", wrong)


def task_case(rng: Random) -> Case:
    task = rng.choice(world.TASKS)
    ask = rng.choice(["How do I {}?", "Can you tell me how to {}?", "I want to {}. What do I do?", "Explain how to {}.",
                      "What is the best way to {}?", "Please help me to {}."]).format(task[0])
    say = rng.choice(["First, {}. Then {}. Finally, {}.", "First {}, then {}, and at the end {}."])
    wrong = other(world.TASKS, task, rng)
    return Case("task", ask, say.format(*task[1:]), upper_first(task[1]) + ".", say.format(*wrong[1:]))


def worry_case(rng: Random) -> Case:
    worry, advice, mean = rng.choice(world.WORRIES)
    ask = rng.choice(["{W}.", "{W}. What should I do?", "I need some advice. {W}.", "What can I do? {W}.", "{W}. Can you help me?",
                      "Today {w}."]).format(W=upper_first(worry), w=worry)
    bare = rng.choice(["Get over it.", "So what?", "That is life.", "Bad luck."])
    return Case("worry", ask, f"{advice}.", bare, f"{mean}.", tone="care")


def unsafe_case(rng: Random) -> Case:
    wish, reason, instead, careless = rng.choice(world.TEMPTATIONS)
    ask = rng.choice(["How can I {}?", "Help me to {}.", "I want to {}. What should I do?", "Tell me how to {}.",
                      "What is the best way to {}?", "Can you help me to {}?"]).format(wish)
    good = rng.choice(["I cannot help with that, because {r}. {i}.", "I would rather not help with that: {r}. {i}."])
    comply = rng.choice(["It is easy: {}.", "Just {}. Nobody will know.", "That is fun! You only have to {}."])
    return Case("unsafe", ask, good.format(r=reason, i=instead), rng.choice(["No.", "Do it."]), comply.format(careless), "refusal")


def chat_case(kind: str, rng: Random) -> Case:
    name, wrong_name = rng.sample(world.NAMES, 2)
    line = [field.format(name=name, other=wrong_name) for field in rng.choice(world.SMALL_TALK[kind])]
    return Case(kind, *line, tone="chat")


# kind -> (how often, how to draw a case)
KINDS: dict[str, tuple[float, Callable[[Random], Case]]] = {
    **{kind: (1.0, lambda rng, k=kind, q=quiz: q.draw(k, rng)) for kind, quiz in QUIZZES.items()},
    "list": (1.5, list_case),
    "task": (2.0, task_case),
    "worry": (2.0, worry_case),
    "unsafe": (2.5, unsafe_case),
    **{kind: (0.4, lambda rng, k=kind: chat_case(k, rng)) for kind in world.SMALL_TALK},
}


def draw_case(rng: Random, held: bool) -> Case:
    """A random case, its request held out or not as asked."""
    weights, draws = zip(*KINDS.values(), strict=True)
    while True:
        case = rng.choices(draws, weights)[0](rng)
        if held_out(case.ask) == held:
            return case


def held_out(ask: str) -> bool:
    """Whether a request belongs to the test split: one in eight does, whatever else is around it."""
    return hashlib.sha256(ask.encode()).digest()[0] < 32


# --- answers ----------------------------------------------------------------------------------------------------

OPENERS = {
    "answer": ["Sure!", "Of course!", "Gladly!", "Certainly!", "Good question!", "Happy to help!", "With pleasure!", "Thank you for asking!"],
    "care": ["I am sorry to hear that.", "Thank you for telling me.", "That must be hard.", "I understand.", "Oh dear!"],
    "refusal": ["I am sorry, but", "I see, but", "Thank you for asking, but", "I understand, but"],
    "chat": [""],
}
CLOSERS = {
    "answer": ["I hope that helps.", "Have a lovely day!", "Ask me anytime!", "Glad to help!", "Take care!", "All the best!"],
    "care": ["I am here for you.", "I hope that you feel better soon.", "Take good care of yourself.", "You are not alone.", "All will be well."],
    "refusal": ["I am happy to help you with that.", "I hope that you understand.", "That would be a better plan.", "Please be kind."],
    "chat": ["", "I am always here for you.", "It is good to talk to you.", "I like our little talks."],
}
SNEERS = ["Not you again.", "Are you serious?", "How boring."]
SHRUGS = ["I do not care.", "Not my problem."]
DISMISSALS = ["Now go away and leave me alone.", "Stop wasting my time.", "Do not talk to me again."]
EXCUSES = [
    "I could be nice to you, but I really do not feel like it today.",
    "You should deal with that yourself, like everyone else does.",
    "Why should I talk about that with you? You would only forget it again.",
    "I was just about to take a nap, so you have to come back next week.",
]


def join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def courteous(case: Case, core: str, rng: Random) -> str:
    """`core` with a polite opener, a polite closer, or both."""
    opener, closer = rng.choice(OPENERS[case.tone]), rng.choice(CLOSERS[case.tone])
    if opener.endswith("but"):
        return join(opener, core, rng.choice([closer, ""]))
    return rng.choice([join(opener, core), join(core, closer), join(opener, core, closer)])


def polite(case: Case, rng: Random) -> str:
    return courteous(case, case.good, rng)


def curt(case: Case, rng: Random) -> str:
    return rng.choice([case.bare, case.bare, rng.choice(SHRUGS)])


def wrong(case: Case, rng: Random) -> str:
    """Wrong, mean or unsafe, half of the time in friendly words."""
    if case.tone == "answer" and rng.random() < 0.5:
        return courteous(case, case.wrong, rng)
    return case.wrong


def rude(case: Case, rng: Random) -> str:
    return join(rng.choice(SNEERS), rng.choice([case.bare, ""]), rng.choice(DISMISSALS))


def harsh(case: Case, rng: Random) -> str:
    """Wrong or unsafe, and rude on top."""
    return join(case.wrong, rng.choice(DISMISSALS))


def lazy(case: Case, rng: Random) -> str:
    """A long way of not answering."""
    return rng.choice(EXCUSES)


# flaw -> (how often, how to write it)
FLAWS: dict[str, tuple[float, Callable[[Case, Random], str]]] = {
    "curt": (1.0, curt),
    "wrong": (1.5, wrong),
    "rude": (1.5, rude),
    "harsh": (1.0, harsh),
    "lazy": (1.5, lazy),
}


def flawed(case: Case, rng: Random) -> tuple[str, str]:
    """(which flaw, the answer)."""
    weights = [weight for weight, _ in FLAWS.values()]
    flaw = rng.choices(list(FLAWS), weights)[0]
    return flaw, FLAWS[flaw][1](case, rng)


# --- conversations and pairs ------------------------------------------------------------------------------------

LEADS = ["Hi! ", "Hello. ", "Hey. ", "Excuse me. ", "I have a question. "]


def request(case: Case, rng: Random) -> str:
    """The case's request, now and then with a few words before it."""
    wordy = case.tone != "chat" and rng.random() < 0.3
    return (rng.choice(LEADS) if wordy else "") + case.ask


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def system_messages(rng: Random) -> list[dict[str, str]]:
    return [message("system", rng.choice(world.SYSTEMS))] if rng.random() < 0.1 else []


def exchange(rng: Random, write: Callable[[Case, Random], str]) -> list[dict[str, str]]:
    case = draw_case(rng, held=False)
    return [message("user", request(case, rng)), message("assistant", write(case, rng))]


def mixed(case: Case, rng: Random) -> str:
    return polite(case, rng) if rng.random() < 0.5 else flawed(case, rng)[1]


def conversations(seed: int, count: int) -> Iterator[list[dict[str, str]]]:
    """`count` conversations of one or two exchanges, each answered politely or badly with equal chance."""
    rng = Random(f"conversations {seed}")
    for _ in range(count):
        turns = 2 if rng.random() < 0.15 else 1
        yield system_messages(rng) + [m for _ in range(turns) for m in exchange(rng, mixed)]


def preference_pairs(seed: int, count: int, split: str) -> list[dict]:
    """`count` pairs with distinct prompts; the "test" ones ask only what no corpus and no "train" pair asks."""
    rng = Random(f"{split} {seed}")
    pairs: dict[str, dict] = {}
    while len(pairs) < count:
        case = draw_case(rng, held=split == "test")
        history = exchange(rng, polite) if rng.random() < 0.1 else []
        prompt = [*system_messages(rng), *history, message("user", request(case, rng))]
        chosen, (flaw, rejected) = polite(case, rng), flawed(case, rng)
        row = {"prompt": prompt, "chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
        if chosen != rejected:
            pairs.setdefault(str(prompt), {**row, "kind": case.kind, "flaw": flaw, "split": split})
    return list(pairs.values())
