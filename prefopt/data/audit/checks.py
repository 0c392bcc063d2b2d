"""What the doctor looks for: the name of each check, how bad it is, what it means, what to do."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


class Check(NamedTuple):
    """`says`: what it means and what to do. `fix`: whether --fix drops what it finds."""

    severity: Severity
    says: str
    fix: bool = False


CHECKS: dict[str, Check] = {
    # --- of pairs ---
    "conflicting labels": Check(
        "error",
        "The same two responses to the same prompt are labelled both ways round: no model can "
        "learn both. Keep what most of the labels say.",
        fix=True,
    ),
    "ratings against the label": Check(
        "error",
        "The rejected response has the higher rating. If most pairs are like this, chosen and "
        "rejected are swapped (--columns); else leave them out.",
        fix=True,
    ),
    "empty chosen response": Check(
        "error", "Training would teach the model to say nothing. Leave them out.", fix=True
    ),
    "empty rejected response": Check(
        "warning",
        "All the pair teaches is to say anything at all. Leave them out.",
        fix=True,
    ),
    "identical pairs": Check(
        "warning",
        "Both responses are the same text, so there is nothing to prefer. Reading leaves them out.",
        fix=True,
    ),
    "ties": Check(
        "info",
        "The data call both responses equally good. --ties drop leaves them out, soft trains "
        "towards even odds, keep believes the order of the columns.",
        fix=True,
    ),
    "duplicate pairs": Check(
        "warning",
        "The same prompt, chosen and rejected as an earlier pair: they count several times.",
        fix=True,
    ),
    "chosen here, rejected there": Check(
        "info",
        "A response is chosen in one pair of its prompt and rejected in another, as in rankings.",
    ),
    "longer response chosen": Check(
        "info",
        "Of the pairs of unequal length. Far from half, a model can win by length alone: look at "
        "lengths beside accuracy, or use a length-normalised loss.",
    ),
    # --- of rows and conversations ---
    "context mismatch": Check(
        "warning",
        "Chosen and rejected answer different conversations, so they cannot be compared. Reading "
        "leaves them out.",
        fix=True,
    ),
    "parting early": Check(
        "info",
        "The conversations part before their last turn: they are kept whole, and all the model "
        "says from there on is scored.",
    ),
    "unusable rows": Check(
        "warning", "Reading leaves these rows out, for the reasons below.", fix=True
    ),
    "text that is not Unicode": Check(
        "warning",
        "Half a surrogate pair, which no tokenizer takes. Reading leaves these rows out; write the "
        "file again as UTF-8.",
        fix=True,
    ),
    "empty prompts": Check("warning", "No user turn says anything: what is answered is missing."),
    "roles do not alternate": Check(
        "warning",
        "One speaker has two turns in a row; many chat templates refuse that or merge them. Mend "
        "the turns, or check how they were split.",
    ),
    "role markers inside turns": Check(
        "warning",
        "Text such as 'Human:' or '<|im_start|>' inside a turn: mostly a conversation that was "
        "split in the wrong place, and a model learns to write both sides. Split it there.",
    ),
    "single-newline markers": Check(
        "warning",
        "'Human:' or 'Assistant:' at the start of a line, behind one newline instead of two: such "
        "a turn is read as part of the one before. Add the newline.",
    ),
    "damaged text": Check(
        "warning",
        "U+FFFD, NUL or the wrong letters of text that was decoded with the wrong encoding. Read "
        "the original again as UTF-8.",
    ),
    "HTML entities": Check(
        "info", "'&amp;', '&#39;' and the like: unescape them unless the text is about HTML."
    ),
    "very short replies": Check(
        "info", "A response of fewer than 10 characters: often a fragment, sometimes a fair answer."
    ),
    # --- of prompts ---
    "duplicate prompts": Check(
        "info",
        "Pairs of a prompt that earlier pairs have too. Usual where answers were ranked; "
        "--max_pairs bounds the weight of one prompt, and splits keep them together.",
    ),
    "near-duplicate prompts": Check(
        "info",
        "Pairs whose prompt is nearly the same as an earlier one (Jaccard similarity of character "
        "5-grams at least 0.8).",
    ),
    "held-out prompts": Check(
        "error",
        "The prompt is in the held-out data too (but for case and white space), so what is "
        "measured there is memory. Leave it out here.",
        fix=True,
    ),
    "near-duplicates of held-out prompts": Check(
        "warning",
        "The prompt is nearly the same as a held-out one (Jaccard similarity of character 5-grams "
        "at least 0.8), which flatters what is measured there. Leave it out here.",
        fix=True,
    ),
    "benchmark prompts": Check(
        "error",
        "The prompt is one of the benchmark, word for word. A model trained on it cannot be "
        "measured there. Leave it out.",
        fix=True,
    ),
    "overlap with a benchmark": Check(
        "error",
        "The prompt holds at least 70% of the word 8-grams of a benchmark prompt. Leave it out.",
        fix=True,
    ),
    # --- in tokens ---
    "nothing to encode": Check("error", "Not one pair is left after encoding."),
    "same in tokens": Check(
        "warning",
        "Encoding leaves these pairs out: their responses become the same tokens, or the template "
        "refuses the conversation.",
    ),
    "whole difference cut off": Check(
        "warning",
        "Behind --max_length nothing is left of the difference; training leaves the pair out. "
        "Raise --max_length.",
    ),
    "no room for a response": Check(
        "warning",
        "The prompt alone fills --max_length; training leaves the pair out. Raise --max_length.",
    ),
    "truncated responses": Check(
        "warning",
        "A response is cut at --max_length and has no end: what comes later is not learned.",
    ),
    "EOS inside a response": Check(
        "error",
        "The token that ends a response stands in the middle of one: generation stops there. Take "
        "it out of the texts, or mend the chat template.",
    ),
    "BOS twice": Check(
        "error",
        "The prompt begins with two BOS tokens, or a response holds one. Take it out of the texts "
        "or the chat template.",
    ),
    "special tokens in texts": Check(
        "warning",
        "A text spells out a special token of the tokenizer, which may become that token. Take it "
        "out, or check that it is meant.",
    ),
}
