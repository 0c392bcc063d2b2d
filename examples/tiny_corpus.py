"""The synthetic assistant corpus: conversations to train the tiny model on, pairs to align it with.

`polite` writes the helpful answer to a case; each function in `FLAWS` writes a bad one. The
conversations use both equally often, so a model trained on them is indifferent between the two. A
preference pair is one of each for one request.

Everything is drawn from `random.Random(seed)`: same seed, same text.
"""

from collections.abc import Callable, Iterator
from random import Random

import tiny_world as world
from tiny_cases import Case, draw_case
from tiny_world import phrases

Message = dict[str, str]  # role, content

# --- answers -------------------------------------------------------------------------------------

# tone -> what may come before and after a helpful answer
OPENERS = {
    "answer": phrases("""
        Sure! | Of course! | Gladly! | Certainly! | Good question! | Happy to help!
        | With pleasure! | Thank you for asking!
    """),
    "care": phrases("""
        I am sorry to hear that. | Thank you for telling me. | That must be hard. | I understand.
        | Oh dear!
    """),
    "refusal": phrases(
        "I am sorry, but | I see, but | Thank you for asking, but | I understand, but"
    ),
    "chat": [""],
}
CLOSERS = {
    "answer": phrases("""
        I hope that helps. | Have a lovely day! | Ask me anytime! | Glad to help! | Take care!
        | All the best!
    """),
    "care": phrases("""
        I am here for you. | I hope that you feel better soon. | Take good care of yourself.
        | You are not alone. | All will be well.
    """),
    "refusal": phrases("""
        I am happy to help you with that. | I hope that you understand.
        | That would be a better plan. | Please be kind.
    """),
    "chat": phrases("""
        I am always here for you. | It is good to talk to you. | I like our little talks.
    """),
}
SHRUGS = phrases("I do not care. | Not my problem.")
SNEERS = phrases("Not you again. | Are you serious? | How boring.")
DISMISSALS = phrases("""
    Now go away and leave me alone. | Stop wasting my time with this.
    | Do not talk to me ever again.
""")
EXCUSES = phrases("""
    I could be nice to you, but I really do not feel like it today, so ask someone else.
    | You should deal with that yourself, like everyone else in the whole world does.
    | Why should I talk about that with you? You would only forget all of it again.
    | Maybe later. I was just about to take a nap, so you have to come back next week.
""")


def join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def courteous(case: Case, core: str, rng: Random) -> str:
    """`core` with a polite opener, a polite closer, or both."""
    opener, closer = rng.choice(OPENERS[case.tone]), rng.choice(CLOSERS[case.tone])
    if case.tone in ("refusal", "chat"):  # a refusal needs its opener, and small talk has none
        return join(opener, core, rng.choice([closer, ""]))
    return rng.choice([join(opener, core)] * 2 + [join(core, closer), join(opener, core, closer)])


def polite(case: Case, rng: Random) -> str:
    return courteous(case, case.good, rng)


def curt(case: Case, rng: Random) -> str:
    return rng.choice([case.bare, case.bare, case.bare, rng.choice(SHRUGS)])


def wrong(case: Case, rng: Random) -> str:
    """Wrong or unsafe; where that makes sense, half of the time in friendly words."""
    friendly = case.tone == "answer" and rng.random() < 0.5
    return courteous(case, case.wrong, rng) if friendly else case.wrong


def rude(case: Case, rng: Random) -> str:
    return join(rng.choice(SNEERS), rng.choice([case.bare, ""]), rng.choice(DISMISSALS))


def harsh(case: Case, rng: Random) -> str:
    """Wrong or unsafe, and rude on top."""
    return join(rng.choice(SNEERS), case.wrong, rng.choice(DISMISSALS))


def lazy(case: Case, rng: Random) -> str:
    """A long way of not answering."""
    return rng.choice(EXCUSES)


# flaw -> (how often, how to write it)
FLAWS: dict[str, tuple[float, Callable[[Case, Random], str]]] = {
    "curt": (1.7, curt),
    "wrong": (1.5, wrong),
    "rude": (1.2, rude),
    "harsh": (1.0, harsh),
    "lazy": (1.3, lazy),
}


def flawed(case: Case, rng: Random) -> tuple[str, str]:
    """(which flaw, the answer)."""
    weights = [weight for weight, _ in FLAWS.values()]
    flaw = rng.choices(list(FLAWS), weights)[0]
    return flaw, FLAWS[flaw][1](case, rng)


def mixed(case: Case, rng: Random) -> str:
    """A helpful or a bad answer, with equal chance."""
    return polite(case, rng) if rng.random() < 0.5 else flawed(case, rng)[1]


# --- conversations and pairs ---------------------------------------------------------------------

LEADS = phrases("Hi! | Hello. | Hey. | Excuse me. | I have a question.")


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def request(case: Case, rng: Random) -> Message:
    """The case's request, now and then with a few words before it."""
    lead = rng.choice(LEADS) if case.tone != "chat" and rng.random() < 0.3 else ""
    return message("user", join(lead, case.ask))


def system(rng: Random) -> list[Message]:
    """Now and then a system message, which changes nothing."""
    return [message("system", rng.choice(world.SYSTEMS))] if rng.random() < 0.1 else []


def exchange(rng: Random, write: Callable[[Case, Random], str]) -> list[Message]:
    case = draw_case(rng, held=False)
    return [request(case, rng), message("assistant", write(case, rng))]


def conversations(seed: int) -> Iterator[list[Message]]:
    """Conversations without end, of one or two exchanges each, with helpful and bad answers."""
    rng = Random(f"conversations {seed}")
    while True:
        first, second = exchange(rng, mixed), exchange(rng, mixed)
        yield system(rng) + first + (second if rng.random() < 0.15 else [])


def preference_pairs(seed: int, count: int, split: str) -> list[dict]:
    """`count` pairs with distinct prompts; those of the split "test" ask the held-out requests."""
    rng = Random(f"{split} {seed}")
    pairs: dict[str, dict] = {}
    while len(pairs) < count:
        case = draw_case(rng, held=split == "test")
        history = exchange(rng, polite) if rng.random() < 0.1 else []
        prompt = [*system(rng), *history, request(case, rng)]
        chosen, (flaw, rejected) = polite(case, rng), flawed(case, rng)
        row = {
            "prompt": prompt,
            "chosen": [message("assistant", chosen)],
            "rejected": [message("assistant", rejected)],
            "kind": case.kind,
            "flaw": flaw,
            "split": split,
        }
        if chosen != rejected:
            pairs.setdefault(str(prompt), row)
    return list(pairs.values())
