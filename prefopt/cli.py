"""The command line: flags from the signatures in commands.py, errors in one sentence.

Exit codes: 0 done, 2 bad input, 1 a defect.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from prefopt import __version__, commands
from prefopt.config import TrainConfig
from prefopt.errors import InputError
from prefopt.nn.lora_linear import LoraConfig

Command = Callable[..., int]
BARE_FLAGS = ("dry_run", "quiet", "gradient_checkpointing")
COMMANDS: dict[str, Command] = {
    "dpo": commands.dpo,
    "eval": commands.evaluate,
    "generate": commands.generate,
    "demo": commands.demo,
    "report": commands.report,
    "env": commands.env,
}
CACHE_COMMANDS: dict[str, Command] = {
    "build": commands.cache_build,
    "info": commands.cache_info,
    "verify": commands.cache_verify,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    logging.basicConfig(format="prefopt: %(message)s", level=logging.WARNING)
    parser = make_parser()
    try:
        args = list(sys.argv[1:] if argv is None else argv)
        if not args:
            parser.print_help()
            return 0
        config = parser.parse_args(args)
        return run(parser, config)
    except ArgumentError as error:
        return fail(argument_message(str(error), parser))
    except InputError as error:
        return fail(str(error))
    except FloatingPointError as error:  # training went wrong, not the program
        return fail(str(error), code=1)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return fail("interrupted", code=130)


def fail(message: str, code: int = 2) -> int:
    print(f"prefopt: {message}", file=sys.stderr)
    return code


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="prefopt",
        description="Preference optimisation for language models.",
        exit_on_error=False,
        version=__version__,
    )
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, function in COMMANDS.items():
        subcommands.add_subcommand(name, command_parser(function), help=first_line(function))
    cache = ArgumentParser(exit_on_error=False)
    subcommands.add_subcommand("cache", cache, help="Reference log-probs on disk.")
    actions = cache.add_subcommands(required=True, dest="action")
    for name, function in CACHE_COMMANDS.items():
        actions.add_subcommand(name, command_parser(function), help=first_line(function))
    return parser


def command_parser(function: Command) -> ArgumentParser:
    """Flags of a command: its parameters and, if it takes one, the fields of TrainConfig."""
    parser = ArgumentParser(exit_on_error=False, description=first_line(function))
    parser.add_argument("--config", action="config", help="YAML file with any of these keys.")
    takes_config = "config" in function.__annotations__
    if takes_config:
        parser.add_class_arguments(TrainConfig)
    parser.add_function_arguments(function, skip={"config"} if takes_config else None)
    for action in parser._actions:
        if action.dest in BARE_FLAGS:  # `--quiet` is `--quiet true`
            action.nargs, action.const = "?", True
    if function is commands.cache_build:  # nothing is written but the cache
        parser.set_defaults(out="unused")
    return parser


def first_line(function: Command) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def run(parser: ArgumentParser, parsed: Namespace) -> int:
    values = parser.instantiate(parsed)
    table, name, chosen = COMMANDS, values.command, values[values.command]
    if name == "cache":
        table, name = CACHE_COMMANDS, chosen.action
        chosen = chosen[name]
    function, arguments = table[name], dict(vars(chosen))
    arguments.pop("config", None)
    if "config" in function.__annotations__:
        fields = TrainConfig.__dataclass_fields__
        arguments["config"] = TrainConfig(**{k: arguments.pop(k) for k in fields})
    return function(**arguments)


# -- errors as sentences


def argument_message(text: str, parser: ArgumentParser) -> str:
    """What the parser found wrong, as one sentence, with the nearest valid name."""
    for pattern, known in (
        (r"unrecognized arguments: -*([^\s=]+)", known_names(parser)),
        (r"(?:[Oo]ption|[Kk]ey) '([^']+)'(?:$| is not (?:accepted|expected))", known_names(parser)),
        (r"argument \w+: invalid choice: '([^']+)'", [*COMMANDS, *CACHE_COMMANDS, "cache"]),
    ):
        unknown = re.search(pattern, text.strip())
        if unknown:
            what = "command" if "choice" in pattern else "option"
            close = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
            return f"there is no {what} {unknown[1]!r}; {hint}"
    missing = re.search(r"arguments are required: (.+)", text)
    if missing:
        return f"--{missing[1].split('.', 1)[-1]} is required"
    key = re.search(r"""Parser key "([^"]+)"|key='([^']+)'""", text)
    nested = re.search(r"NestedArg\(key='([^']+)', val='?([^')]*)", text)
    got = re.search(r"(?:Got value|Given value): (.+)", text)
    wanted = re.search(r"Expected (?:a |type )?(.+?)(?:\. Got|\.|$)", text, re.MULTILINE)
    if key and got:
        name = f"{key[1]}.{nested[1]}" if nested and key[1] else key[1] or key[2]
        value = nested[2] if nested else got[1]
        kind = wanted[1].replace("<class '", "").replace("'>", "") if wanted else "another value"
        return f"--{name} cannot be {value!r}; it takes {kind}"
    return " ".join(text.split())[:400]


def known_names(parser: Any) -> list[str]:
    """Every flag of every command, without dashes."""
    names: set[str] = set()
    stack = [parser]
    while stack:
        current = stack.pop()
        for action in current._actions:
            names.update(flag.lstrip("-") for flag in action.option_strings)
            if isinstance(getattr(action, "choices", None), dict):
                stack += action.choices.values()
    lora = {f"lora.{name}" for name in LoraConfig.__dataclass_fields__}
    return sorted((names | lora) - {"", "h", "help"})


if __name__ == "__main__":
    sys.exit(main())
