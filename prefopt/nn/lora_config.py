"""What to adapt and how: the settings of an adapter."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prefopt.errors import InputError

ALL_LINEAR = "all-linear"
INITS = ("kaiming", "gaussian", "pissa")
T = TypeVar("T")


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how; a bad value raises InputError.

    targets: "all-linear" (every linear layer but the output embedding), a list of names (a module
    matches when its name is one of them or ends in ".<name>"), or a regular expression that matches
    the whole module name. Embeddings are adapted when they are named. exclude: names or a regular
    expression in the same way, taken out of the targets. dropout: on the input of A, in training.
    use_dora: a trained magnitude per output (see dora.py). init: of A, "kaiming" (uniform in
    +-1/sqrt(in)) or "gaussian" (standard deviation 1/r) with B = 0, or "pissa" (both from the
    largest singular values, see pissa.py); each starts at the base model. rank_pattern,
    alpha_pattern: other ranks and alphas for some modules; the first key that matches the end of
    the module name, as a regular expression after a dot, counts. modules_to_save: modules that
    are trained in full and stored with the adapter.
    """

    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    targets: str | list[str] = ALL_LINEAR
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "kaiming"
    exclude: str | list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = "a list of module names, or a valid regular expression"
        checks = {
            "r": (_is_rank(self.r), "a whole number of at least 1"),
            "alpha": (_is_alpha(self.alpha), "a number above 0"),
            "dropout": (
                _is_number(self.dropout) and 0 <= self.dropout < 1,
                "a number of at least 0 and below 1",
            ),
            "targets": (bool(self.targets) and _are_names(self.targets), f'"all-linear", {names}'),
            "use_rslora": (isinstance(self.use_rslora, bool), "true or false"),
            "use_dora": (isinstance(self.use_dora, bool), "true or false"),
            "init": (self.init in INITS, " or ".join(f'"{init}"' for init in INITS)),
            "exclude": (_are_names(self.exclude), names),
            "rank_pattern": (
                _is_pattern(self.rank_pattern, _is_rank),
                "regular expressions of module names with a whole number of at least 1 each",
            ),
            "alpha_pattern": (
                _is_pattern(self.alpha_pattern, _is_alpha),
                "regular expressions of module names with a number above 0 each",
            ),
            "modules_to_save": (
                not isinstance(self.modules_to_save, str) and _are_names(self.modules_to_save),
                "a list of module names",
            ),
        }
        for key, (good, allowed) in checks.items():
            if not good:
                raise InputError(f"lora.{key} is {getattr(self, key)!r}; it must be {allowed}")

    def rank(self, path: str = "") -> int:
        """r of the module of that name"""
        return first_match(self.rank_pattern, path, self.r)

    def scale(self, path: str = "") -> float:
        """s of the module of that name"""
        r, alpha = self.rank(path), first_match(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    @property
    def scaling(self) -> float:
        """s of a module that no pattern matches"""
        return self.scale()


def first_match(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that matches `path`, by PEFT's rule."""
    return next((value for key, value in patterns.items() if pattern_matches(key, path)), default)


def pattern_matches(key: str, path: str) -> bool:
    """Whether a key of a pattern matches: the whole name, or all of it after a dot."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def name_matches(names: str | list[str], path: str) -> bool:
    """Whether targets or exclude match: a regular expression all of the name, a list its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in names)


def _is_number(value: object, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_number(value, int) and value >= 1


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _is_regex(text: object) -> bool:
    try:
        return isinstance(text, str) and bool(text) and bool(re.compile(text))
    except re.error:
        return False


def _are_names(names: object) -> bool:
    if isinstance(names, str):
        return _is_regex(names)
    if not isinstance(names, list | tuple):
        return False
    return all(isinstance(name, str) and name for name in names)


def _is_pattern(pattern: object, is_value: Any) -> bool:
    if not isinstance(pattern, Mapping):
        return False
    return all(_is_regex(key) and is_value(value) for key, value in pattern.items())
