"""The house rules that a reader can rely on, checked on the source: imports point down, gradients
are taken in one place, collectives run in three, the functional core needs torch alone, nothing is
pickled."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Bottom first. A module imports from layers below its own, and from its own as long as no circle
# closes. A package stands for all its modules.
LAYERS = (
    ("errors", "durable"),
    (
        *("logprobs", "folding", "tiles", "rl", "rl_losses", "dispatch"),
        *("losses", "loss_names", "shaping", "ranking", "user_functions"),
    ),
    (
        *("data", "nn", "optim", "distributed", "config", "metrics", "stats", "environment"),
        *("stop", "online_history", "online_findings", "online_checks", "online_table"),
    ),
    (
        *("attention", "fingerprint", "loading", "sharing", "policy", "reference", "moving"),
        *("rollout", "checkpoint", "saving", "roles", "role_parameters"),
        *("online_config", "experience"),
    ),
    ("step",),
    ("objectives", "evaluate", "flops", "rewards", "reward_model", "http_reward", "scoring"),
    (
        *("train", "prepare", "rundir", "report", "export", "plan", "terminal"),
        *("rounds", "round_files", "round_pairs", "sampling", "pair_making"),
        *("online", "online_loop", "online_plan", "online_state", "collect", "learner"),
    ),
    ("demo",),
    (
        *("command_inputs", "command_groups", "commands", "cache_commands", "train_commands"),
        *("weight_commands", "data_commands", "data_report", "pair_commands"),
        "online_commands",
    ),
    ("cli", "usage"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Tighter than their layer: all that they may import, besides the standard library.
ONLY = {
    "errors": set(),
    "losses": {"torch", "prefopt.errors"},
    "loss_names": {"torch", "prefopt.errors", "prefopt.losses", "prefopt.user_functions"},
    "user_functions": {"prefopt.errors"},
    "tiles": {"torch"},
    "folding": {"torch", "prefopt.dispatch", "prefopt.tiles"},
    "logprobs": {"torch", "prefopt.dispatch", "prefopt.folding", "prefopt.tiles"},
    "rl": {"torch", "prefopt.errors"},
    "rl_losses": {"torch", "prefopt.errors", "prefopt.rl", "prefopt.user_functions"},
}
DATA_MAY_IMPORT = ("errors", "durable", "data")
COLLECTIVES_IN = ("distributed", "step", "metrics")
KERNELS_IN = ("dispatch",)
SLOW_TO_IMPORT = {"transformers", "datasets", "matplotlib", "triton"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


class Import(NamedTuple):
    target: str  # absolute dotted name, a module of prefopt where it is one
    line: int
    on_load: bool  # runs when the module is imported, not when a function of it is called


def imports_of(tree: ast.AST, module: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    """Every import of a module, those inside functions too. `from prefopt import losses` counts as
    prefopt.losses, `from . import x` as the sibling."""
    in_function = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        on_load = node not in in_function
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, on_load)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parent = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parent, base] if base else parent)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name == "prefopt.__version__":
                    continue  # there without loading anything
                is_module = name in known or name == "torch.distributed"
                yield Import(name if is_module else base, node.lineno, on_load)


def room(module: str) -> str:
    """prefopt.data.records -> data"""
    return module.split(".")[1] if "." in module else "prefopt"


def import_faults(module: str, imports: list[Import]) -> Iterator[str]:
    here = room(module)
    if here not in LEVEL:
        yield f"{module} has no layer: place {here!r} in LAYERS of tests/test_layering.py"
        return
    for target, line, on_load in imports:
        at = f"{module}:{line} imports {target}"
        top = target.split(".")[0]
        if target == "prefopt":
            yield f"{at}: a name of the public facade; import it from the module that defines it"
        elif top == "prefopt" and room(target) not in LEVEL:
            yield f"{at}, which has no layer"
        elif top == "prefopt" and LEVEL[room(target)] > LEVEL[here]:
            yield f"{at}, which stands above it"
        if here == "data" and top == "prefopt" and room(target) not in DATA_MAY_IMPORT:
            yield f"{at}: data sees no model, only {', '.join(DATA_MAY_IMPORT)}"
        if here in ONLY and top not in sys.stdlib_module_names and top not in ONLY[here]:
            if target not in ONLY[here]:
                yield f"{at}: it may import {sorted(ONLY[here])} and the standard library"
        if target.startswith("torch.distributed") and here not in COLLECTIVES_IN:
            yield f"{at}: collectives run in {', '.join(COLLECTIVES_IN)}"
        if top == "prefopt_kernels" and here not in KERNELS_IN:
            yield f"{at}: kernels are reached through prefopt.dispatch"
        if top in SLOW_TO_IMPORT and on_load:
            yield f"{at} at its top: import it in the function that needs it"
        if top in PICKLES:
            yield f"{at}: nothing is pickled here, files are safetensors and JSON"


def dotted(node: ast.AST) -> str:
    """torch.distributed.all_reduce -> the same as a string; anything but plain names -> ''"""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def use_faults(module: str, tree: ast.AST) -> Iterator[str]:
    here = room(module)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        at, name = f"{module}:{node.lineno}", dotted(node)
        if node.attr == "backward" and here != "step":
            yield f"{at} takes .backward: only prefopt.step does"
        if name == "torch.distributed" and here not in COLLECTIVES_IN:
            yield f"{at} uses torch.distributed: collectives run in {', '.join(COLLECTIVES_IN)}"
        if name in ("torch.load", "torch.save"):
            yield f"{at} uses {name}, which pickles: files are safetensors and JSON"


def faults(sources: dict[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """All broken rules in `sources`, module name -> text; `packages`: those with an __init__."""
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, text in sources.items():
        if module == "prefopt":
            continue  # the facade names everything, and imports nothing until asked
        tree = ast.parse(text)
        imports = list(imports_of(tree, module, module in packages, set(sources)))
        graph[module] = {i.target for i in imports if i.target in sources} - {module, "prefopt"}
        found += [*import_faults(module, imports), *use_faults(module, tree)]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a circle of imports: {' <- '.join(error.args[1])}")
    return found


def read_package() -> tuple[dict[str, str], frozenset[str]]:
    sources, packages = {}, set()
    for path in sorted((ROOT / "prefopt").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
            packages.add(".".join(parts))
        sources[".".join(parts)] = path.read_text(encoding="utf-8")
    return sources, frozenset(packages)


def test_the_house_rules_hold():
    sources, packages = read_package()
    assert len(sources) > 10, "the package was not found"
    assert not (broken := faults(sources, packages)), "\n".join(broken)


def test_every_folder_with_modules_is_a_package():
    """A folder without __init__.py works in a checkout and is missing from the wheel."""
    sources, packages = read_package()
    assert {name.rpartition(".")[0] for name in sources} - {""} <= packages


def test_the_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels" / "prefopt_kernels").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tops = {i.target.split(".")[0] for i in imports_of(tree, "prefopt_kernels.x", False, set())}
        assert tops <= {"torch", "triton", "prefopt_kernels"} | sys.stdlib_module_names, path.name


def test_kernels_is_no_package_and_no_file_takes_a_librarys_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for folder in ("benchmarks", "examples", "tests"):
        for name in ("kernels", "datasets", "triton", "profile", "tokenizers"):
            assert not (ROOT / folder / f"{name}.py").exists(), "transformers would import it"


@pytest.mark.parametrize(
    ("module", "text", "fault"),
    [
        ("losses", "import prefopt.train", "stands above"),
        ("losses", "def f():\n    from prefopt.policy import Policy", "stands above"),
        ("losses", "import numpy", "it may import"),
        ("logprobs", "from prefopt import durable", "it may import"),
        ("folding", "from prefopt import losses", "it may import"),
        ("data.encode", "from ..policy import Policy", "stands above"),
        ("data.encode", "from prefopt.nn import lora", "data sees no model"),
        ("step", "from prefopt import train", "stands above"),
        ("step", "from prefopt import Policy", "public facade"),
        ("policy", "import prefopt.novelty", "has no layer"),
        ("novelty", "import torch", "place 'novelty' in LAYERS"),
        ("train", "def f(x):\n    x.sum().backward()", "only prefopt.step"),
        ("train", "import torch.distributed as dist", "collectives run in"),
        ("train", "from torch import distributed", "collectives run in"),
        ("train", "import torch\ntorch.distributed.barrier()", "collectives run in"),
        ("policy", "def f():\n    import prefopt_kernels.nf4", "through prefopt.dispatch"),
        ("policy", "from transformers import AutoModel", "at its top"),
        ("checkpoint", "import pickle", "nothing is pickled"),
        ("checkpoint", "import torch\ndef f(p):\n    return torch.load(p)", "which pickles"),
    ],
)
def test_the_checker_catches(module, text, fault):
    known = dict.fromkeys(
        ("prefopt.train", "prefopt.policy", "prefopt.durable", "prefopt.nn.lora"), ""
    )
    found = faults(known | {f"prefopt.{module}": text})
    assert any(fault in line for line in found), found


def test_the_checker_catches_a_circle_and_lets_siblings_be():
    both = {"prefopt.policy": "import prefopt.attention", "prefopt.attention": ""}
    assert faults(both) == []
    both["prefopt.attention"] = "def f():\n    from prefopt import policy"
    assert any("circle" in line for line in faults(both))


def test_the_checker_lets_good_code_be():
    good = {
        "prefopt.errors": "import os",
        "prefopt.losses": "from torch.nn import functional\nfrom .errors import InputError",
        "prefopt.step": "import torch.distributed as dist\ndef f(x):\n    x.backward()",
        "prefopt.policy": "class F:\n    def backward(ctx, g):\n        import transformers",
        "prefopt.data.files": "import gzip\nfrom prefopt.errors import InputError",
    }
    assert faults(good) == []
