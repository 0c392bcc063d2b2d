"""How losses are spelled: ``dpo``, ``0.8*dpo + 0.2*bco_pair + sft``, ``my_module:my_loss``."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from prefopt.errors import InputError

_TERM = re.compile(
    r"\s*(?:(?P<weight>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*)?"
    r"\s*(?P<name>[^\W\d][\w.]*(?::[^\W\d]\w*)?)\s*(?P<end>\+|$)"
)


def weighted_names(text: str) -> list[tuple[float, str]]:
    """``0.8*dpo + sft`` -> [(0.8, "dpo"), (1.0, "sft")]. Raises InputError for anything else."""
    terms, at, end = [], 0, "+"
    while end == "+":
        found = _TERM.match(text, at)
        if found is None:
            raise InputError(
                f"loss {text!r} cannot be read from {text[at:]!r} on; write a name, or a sum such "
                "as '0.8*dpo + 0.2*bco_pair + sft'"
            )
        weight, name, end = float(found["weight"] or 1), found["name"], found["end"]
        if not 0 < weight < math.inf:
            raise InputError(f"loss {text!r} gives {name!r} the weight {weight}; write one above 0")
        terms.append((weight, name))
        at = found.end()
    return terms


def user_function(spelled: str) -> Callable[..., Any]:
    """The function ``module:function``, from the import path or the current directory.

    The current directory is searched last, so that no file in it hides an installed module; it
    stays on the path for what the module imports later.
    """
    name, _, attribute = spelled.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise _broken(spelled, name, error) from error
        raise InputError(
            f"loss {spelled!r}: there is no module {error.name!r} in {os.getcwd()} or on Python's "
            "path; run from the folder that holds it, or add that folder to PYTHONPATH"
        ) from error
    except Exception as error:
        raise _broken(spelled, name, error) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        what = "no function" if function is None else f"a {type(function).__name__}, no function,"
        there = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise InputError(
            f"loss {spelled!r}: {getattr(module, '__file__', None) or name} has {what} "
            f"{attribute!r}{nearest(attribute, there)}"
        )
    return function


def _broken(spelled: str, name: str, error: Exception) -> InputError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    at = "" if isinstance(error, SyntaxError) else f" ({last.filename}, line {last.lineno})"
    return InputError(
        f"loss {spelled!r}: importing {name!r} failed: {type(error).__name__}: {error}{at}"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'dpo'?)" for what is close to a known name, else ""."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
