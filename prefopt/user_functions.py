"""Functions of the user's, spelled ``module:function``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from prefopt.errors import InputError


def user_function(spelled: str, *, role: str) -> Callable[..., Any]:
    """The function ``module:function``, from the import path or the current directory.

    The current directory is searched last, so that no file in it hides an installed module; it
    stays on the path for what the module imports later. role: what it is to be, for errors.
    """
    name, _, attribute = spelled.partition(":")
    what = f"{role} {spelled!r}"
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise _broken(what, name, error) from error
        raise InputError(
            f"{what}: there is no module {missing!r} in {os.getcwd()} or on Python's path; run "
            "from the folder that holds it, or add that folder to PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = "no function" if function is None else f"a {type(function).__name__}, no function,"
        there = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise InputError(
            f"{what}: {getattr(module, '__file__', None) or name} has {found} {attribute!r}"
            f"{nearest(attribute, there)}"
        )
    return function


def _broken(what: str, name: str, error: Exception) -> InputError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    at = "" if isinstance(error, SyntaxError) else f" ({last.filename}, line {last.lineno})"
    return InputError(f"{what}: importing {name!r} failed: {type(error).__name__}: {error}{at}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The words "(did you mean 'dpo'?)", after a space, for what is close to a known name."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
