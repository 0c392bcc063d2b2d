"""What the argument parser found wrong, as one sentence with the nearest valid name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from prefopt.nn.lora_config import LoraConfig
from prefopt.online_config import KLConfig

# What the same thing is called elsewhere, and too unlike our name to be found by its letters.
ALIASES = {
    "learning_rate": "lr",
    "output_dir": "out",
    "num_train_epochs": "epochs",
    "dataset_name": "data",
    "model_name_or_path": "model",
    "per_device_train_batch_size": "batch_size",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "max_norm",
    "label_smoothing": "loss.label_smoothing",
    "loss_type": "loss",
    "loss_weights": "loss",
    "simpo_gamma": "loss.gamma",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora.rank": "lora.r",
    "kl_coef": "kl.beta",
    "init_kl_coef": "kl.beta",
    "kl_estimator": "kl.kind",
    "cliprange": "loss.clip",
    "epsilon": "loss.clip",
    "epsilon_high": "loss.clip_high",
    "cliprange_value": "value_clip",
    "vf_coef": "value_coef",
    "num_ppo_epochs": "ppo_epochs",
    "num_mini_batches": "minibatches",
    "num_generations": "samples_per_prompt",
    "response_length": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "missing_eos_penalty": "missing_stop_penalty",
    "reward_funcs": "reward",
    "reward_model_path": "reward",
    "advantage_estimator": "estimator",
    "loss_agg_mode": "aggregation",
}
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict": "a mapping such as {prompt: question}",
    "str": "text",
}


def argument_message(text: str, parser: Any, args: Sequence[str]) -> str:
    """The parser's error about ``args``, as a sentence."""
    text = text.strip()
    for explain in (_unknown, _missing, _config_file, _wrong_value):
        sentence = explain(text, parser, args)
        if sentence:
            return sentence
    return " ".join(text.split())[:400]


def _unknown(text: str, parser: Any, args: Sequence[str]) -> str | None:
    """A command or option that there is not."""
    command = re.search(r"argument \w+: invalid choice: '([^']*)' \(choose from (.+)\)", text)
    if command:
        choices = re.findall(r"[\w.]+", command[2])
        return f"there is no command {command[1]!r}; {_hint(command[1], choices)}"
    stray = re.search(r"unrecognized arguments: (.+)", text)
    if stray and not stray[1].startswith("-"):
        return f"{stray[1]!r} belongs to no option; every value follows its --name"
    option = re.search(r"(?:[Oo]ption|[Kk]ey) '([^']+)'(?:$| is not (?:accepted|expected))", text)
    if not stray and not option:
        return None
    if stray:
        name = re.split(r"[\s=]", stray[1].lstrip("-"))[0]
    else:
        assert option
        name = ".".join([*_keys(text), option[1]])
    known = _flags(parser, args)
    inside = [flag for flag in known if flag.startswith(name.rpartition(".")[0] + ".")]
    where = "" if any(word.startswith(f"--{name}") for word in args) else _in_file(args)
    return f"there is no option {name!r}{where}; {_hint(name, inside or known, args)}"


def _hint(name: str, known: Sequence[str], args: Sequence[str] = ()) -> str:
    alias = [ALIASES[name]] if ALIASES.get(name) in known else []
    close = alias or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(known) <= 12:
        return f"there are: {', '.join(known)}"
    return f"`prefopt {' '.join(_command(args))} --help` lists them"


def _missing(text: str, parser: Any, args: Sequence[str]) -> str | None:
    """A required option, a value or a subcommand that was not given."""
    required = re.search(r"arguments are required: (.+)", text)
    if required:
        return f"--{required[1].split('.', 1)[-1]} is required"
    required = re.search(r"[Kk]ey \"([\w.]+)\" is required", text)
    if required:
        return f"--{required[1].split('.')[-1]} is required"
    value = re.search(r"argument (--[\w.]+): expected one argument", text)
    if value:
        return f"{value[1]} needs a value"
    action = re.search(r"expected \"(?:(\w+)\.)?\w+\" to be one of \{(.+?)\}", text)
    if action:
        return f"`prefopt {action[1] or ''}` needs a command: {action[2].replace(',', ', ')}"
    return None


def _config_file(text: str, parser: Any, args: Sequence[str]) -> str | None:
    file = _config(args)
    if re.search(r"Parser key \"config\": .*(?:not exist|not a file|not readable)", text):
        return f"--config {file} is not a file that can be read"
    if text.startswith("Problems parsing config"):
        line, cause = re.findall(r"line (\d+)", text), re.findall(r"^\S.*", text, re.MULTILINE)
        return f"{file}:{line[-1] if line else 1}: not valid YAML ({cause[-1].strip()})"
    if text.startswith("Unexpected config"):
        return f"{file} does not map option names to values, one `name: value` a line"
    return None


def _wrong_value(text: str, parser: Any, args: Sequence[str]) -> str | None:
    name = ".".join(_keys(text))
    got = re.search(r"(?:Got value|Given value): (.+)", text)
    if not name or not got:
        return None
    if name == "lora":
        return (
            f"--lora cannot be {got[1]!r}; it takes null, which trains all weights, or single "
            "settings such as --lora.r 8"
        )
    literal = re.search(r"Literal\[(.+?)\]", text)
    kinds = re.findall(r"Expected a <class '(\w+)'>", text)
    if literal:
        takes = f"one of {literal[1].replace(chr(39), '')}"
    else:
        takes = KINDS.get(kinds[0], kinds[0]) if kinds else "another value"
    null = " or null" if "NoneType" in kinds and "." not in name else ""
    where = "" if any(word.startswith(f"--{name}") for word in args) else _in_file(args)
    return f"--{name} cannot be {got[1]!r}{where}; it takes {takes}{null}"


def _keys(text: str) -> list[str]:
    """The path to the option that an error is about, from the outside in."""
    return re.findall(r'Parser key "([^"]+)"', text)


def _config(args: Sequence[str]) -> str | None:
    for word, value in zip(args, [*args[1:], ""], strict=True):
        if word.startswith("--config"):
            return word.partition("=")[2] or value
    return None


def _in_file(args: Sequence[str]) -> str:
    file = _config(args)
    return f" (in {file})" if file else ""


def _command(args: Sequence[str]) -> list[str]:
    """The words before the first option: "dpo", or "cache build"."""
    first = next((i for i, word in enumerate(args) if word.startswith("-")), len(args))
    return list(args[: min(first, 2 if args[:1] in (["cache"], ["data"]) else 1)])


def _flags(parser: Any, args: Sequence[str]) -> list[str]:
    """The options of the command in ``args``, without dashes."""
    for word in _command(args):
        tables = (getattr(action, "choices", None) for action in parser._actions)
        table = next((t for t in tables if isinstance(t, dict) and word in t), None)
        parser = table[word] if table else parser
    names = {flag.lstrip("-") for action in parser._actions for flag in action.option_strings}
    if "lora" in names:
        names |= {f"lora.{name}" for name in LoraConfig.__dataclass_fields__}
    if "kl" in names:
        names |= {f"kl.{name}" for name in KLConfig.__dataclass_fields__}
        names |= {"loss.clip", "loss.clip_high", "loss.dual_clip"}
    elif "loss" in names:
        names |= {"loss.label_smoothing", "loss.gamma"}
    hidden = {"h", "help", "lora.help", "kl.help", "print_shtab", "prompt+"}
    return sorted(names - hidden)
