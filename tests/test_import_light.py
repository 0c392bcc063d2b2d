"""`import prefopt` stays light, and its lazy names are the right objects in any import order."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefopt

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"triton", "datasets", "matplotlib", "transformers", "peft", "pandas", "pyarrow"}
COMMAND_LINE = {"rich", "jsonargparse", "jinja2"}


def run(code: str) -> str:
    """The output of `code` in a fresh interpreter that sees the checkout."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def loaded_by(code: str) -> set[str]:
    """Top-level names of the modules that `code` loads beyond what `import torch` does."""
    program = f"import sys, torch, json\nbefore = set(sys.modules)\n{code}\n"
    program += "print(json.dumps(sorted(set(sys.modules) - before)))"
    return {name.split(".")[0] for name in json.loads(run(program))}


def test_import_loads_nothing_of_the_house_but_the_front_door():
    # An editable install adds a finder of another top-level name.
    program = "import sys, prefopt; print([m for m in sys.modules if m.split('.')[0] == 'prefopt'])"
    assert run(program).strip() == "['prefopt']"
    assert "torch" not in run(
        "import sys, prefopt; print([m for m in sys.modules if m == 'torch'])"
    )


def test_the_functional_core_loads_torch_only():
    names = loaded_by("from prefopt import token_logprobs, losses, loss_from, PairLogps")
    assert "prefopt" in names
    assert names <= {"prefopt"} | sys.stdlib_module_names, names


def test_no_public_name_loads_a_heavy_library():
    names = loaded_by("from prefopt import *\nassert callable(train) and callable(Policy)")
    assert not names & (HEAVY | COMMAND_LINE), names


@pytest.mark.parametrize("name", prefopt.__all__)
def test_every_public_name_resolves(name):
    value = getattr(prefopt, name)
    home = f"prefopt.{prefopt._MODULE_OF[name]}"
    assert value is (sys.modules[home] if name == "losses" else getattr(sys.modules[home], name))
    assert name in dir(prefopt)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "prefopt" / "__init__.py").read_text(encoding="utf-8"))
    [block] = [
        n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    ]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names:
            assert alias.asname == alias.name
            module = (
                alias.name if node.module == "prefopt" else node.module.removeprefix("prefopt.")
            )
            seen[alias.name] = module
    assert seen == prefopt._MODULE_OF


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        prefopt.no_such_thing  # noqa: B018


FIRST_IMPORTS = (
    "import prefopt",
    "import prefopt.{name}",
    "from prefopt import {name}",
    "from prefopt.{name} import {name}",
    "import prefopt.cli",
    "import importlib; importlib.import_module('prefopt.{name}')",
)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_functions_win_over_modules_of_their_name(name):
    check = f"""
from prefopt import {name}
assert isinstance({name}, types.FunctionType), {name}
import prefopt.{name}
assert prefopt.{name} is {name}
from prefopt.{name} import {name} as defined
assert defined is {name}
assert isinstance(sys.modules["prefopt.{name}"], types.ModuleType)
"""
    # One process for all orders, as each would import torch anew; prefopt is forgotten between.
    program = f"""
import sys, types, torch
for first in {FIRST_IMPORTS!r}:
    for module in [m for m in sys.modules if m.split(".")[0] == "prefopt"]:
        del sys.modules[module]
    exec(first.format(name={name!r}) + {check!r}, {{"sys": sys, "types": types}})
    print(first)
"""
    assert len(run(program).splitlines()) == len(FIRST_IMPORTS)


def test_help_loads_no_torch():
    """The parser reads the signatures of all commands; none of them may pull the library in."""
    code = "import sys\nfrom prefopt.cli import main\nmain(['--help'])\nprint(list(sys.modules))"
    assert "'torch'" not in run(code)
