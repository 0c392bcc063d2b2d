"""The command line: flags from the signatures in commands.py, errors in one sentence.

Exit codes: 0 done, 2 bad input, 1 a defect, of the program or (`data doctor`) in the data.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from prefopt import (
    __version__,
    cache_commands,
    commands,
    data_commands,
    online_commands,
    pair_commands,
    train_commands,
    weight_commands,
)
from prefopt.command_groups import Reading, Sampling, Setup
from prefopt.config import TrainConfig
from prefopt.errors import InputError
from prefopt.nn.lora_config import LoraConfig
from prefopt.online_config import KLConfig, PPOConfig
from prefopt.usage import argument_message

Command = Callable[..., int]
BARE_FLAGS = ("dry_run", "quiet", "gradient_checkpointing", "force", "wpo")
# Parameters that stand for many flags.
GROUPS = {
    "setup": Setup,
    "config": TrainConfig,
    "online": PPOConfig,
    "sampling": Sampling,
    "reading": Reading,
}
NESTED = {"lora": LoraConfig, "kl": KLConfig}  # fields that hold flags of their own
SUBJECT = {  # what a first word without a flag is: `prefopt report runs/hh`
    "report": "--run",
    "eval": "--model",
    "merge": "--model",
    "data inspect": "--data",
    "data doctor": "--data",
    "data pairs": "--data",
}
COMMANDS: dict[str, Command] = {
    "sft": train_commands.sft,
    "reward": train_commands.reward,
    "dpo": train_commands.dpo,
    "ppo": online_commands.ppo,
    "eval": commands.evaluate_model,
    "generate": commands.generate,
    "demo": commands.demo,
    "quantize": weight_commands.quantize,
    "merge": weight_commands.merge,
    "report": commands.report,
    "env": commands.env,
}
# `prefopt cache build`: families of commands, each with what it is about.
FAMILIES: dict[str, tuple[str, dict[str, Command]]] = {
    "data": (
        "Preference data: what is in it, what is wrong with it, pairs out of it.",
        {
            "inspect": data_commands.inspect,
            "doctor": data_commands.doctor,
            "pairs": pair_commands.pairs,
        },
    ),
    "cache": (
        "Reference log-probs on disk.",
        {
            "build": cache_commands.build,
            "info": cache_commands.info,
            "verify": cache_commands.verify_all,
        },
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    logging.basicConfig(format="prefopt: %(message)s", level=logging.WARNING)
    logging.getLogger("prefopt").setLevel(logging.INFO)
    parser = make_parser()
    args = arranged(sys.argv[1:] if argv is None else argv)
    try:
        if not args:
            parser.print_help()
            return 0
        return run(parser.parse_args(args))
    except ArgumentError as error:
        return fail(argument_message(str(error), parser, args))
    except InputError as error:
        return fail(str(error))
    except FloatingPointError as error:  # training went wrong, not the program
        return fail(str(error), code=1)
    except SystemExit as done:  # --help, --version, --print_config
        return int(done.code or 0)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return fail("interrupted", code=130)


def fail(message: str, code: int = 2) -> int:
    print(f"prefopt: {message}", file=sys.stderr)
    return code


def arranged(argv: Sequence[str]) -> list[str]:
    """--config first, so that flags win over it wherever they stand; a bare run folder as --run;
    --loss.gamma as an option of the loss."""
    args = [re.sub(r"^--loss\.", "--loss_options.", word) for word in argv]
    size = 2 if args[:1] and args[0] in FAMILIES else 1
    subject = SUBJECT.get(" ".join(args[:size]))
    if subject and len(args) > size and not args[size].startswith("-"):
        args.insert(size, subject)
    start = next((i for i, word in enumerate(args) if word.startswith("-")), len(args))
    files, rest, words = [], [], iter(args[start:])
    for word in words:
        if word == "--config":
            files += [word, *(value for value in [next(words, None)] if value is not None)]
        else:
            (files if word.startswith("--config=") else rest).append(word)
    return [*args[:start], *files, *rest]


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="prefopt",
        description="Preference optimisation for language models.",
        exit_on_error=False,
        allow_abbrev=False,  # also of every command below
        version=__version__,
    )
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, function in COMMANDS.items():
        subcommands.add_subcommand(name, command_parser(function), help=first_line(function))
    for family, (what, table) in FAMILIES.items():
        group = ArgumentParser(exit_on_error=False, allow_abbrev=False)
        subcommands.add_subcommand(family, group, help=what)
        actions = group.add_subcommands(required=True, dest="action")
        for name, function in table.items():
            actions.add_subcommand(name, command_parser(function), help=first_line(function))
    return parser


def command_parser(function: Command) -> ArgumentParser:
    """Flags of a command: its parameters, and the fields of those that are groups of flags."""
    parser = ArgumentParser(exit_on_error=False, description=first_line(function))
    parser.add_argument("--config", action="config", help="YAML file with any of these keys.")
    groups = _groups(function)
    for name in groups:
        parser.add_class_arguments(GROUPS[name])
    parser.add_function_arguments(function, skip=set(groups) or None)
    for action in parser._actions:
        if action.dest in BARE_FLAGS:  # `--quiet` is `--quiet true`
            action.nargs, action.const = "?", True
        if action.dest == "out" and function is cache_commands.build:
            action.required, action.default = False, ""
            action.help = "not written; taken, so that the flags of dpo can stay."
    return parser


def first_line(function: Command) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def run(parsed: Namespace) -> int:
    table, name, chosen = COMMANDS, parsed.command, parsed[parsed.command]
    if name in FAMILIES:
        (_, table), name = FAMILIES[name], chosen.action
        chosen = chosen[name]
    function, arguments = table[name], dict(vars(chosen))
    arguments.pop("config", None)
    for key, kind in NESTED.items():
        if isinstance(arguments.get(key), Namespace):
            arguments[key] = kind(**vars(arguments[key]))
    for name in _groups(function):
        group: Any = GROUPS[name]
        arguments[name] = group(**{k: arguments.pop(k) for k in group.__dataclass_fields__})
    return function(**arguments)


def _groups(function: Command) -> list[str]:
    return [name for name in GROUPS if name in function.__annotations__]


if __name__ == "__main__":
    sys.exit(main())
