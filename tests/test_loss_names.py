"""Losses by name: their options, weighted sums, a user's own, and what is said about mistakes."""

import math
import os
import sys

import pytest
import torch

from prefopt import LOSSES, InputError, PairLogps, loss_from, loss_names, losses
from prefopt.loss_names import weighted_names


def some_pairs(count=6):
    generator = torch.Generator().manual_seed(0)
    a, b, ra, rb = -60 * torch.rand(4, count, generator=generator)
    na, nb = torch.randint(1, 50, (2, count), generator=generator)
    return PairLogps(a, b, ra, rb, na, nb)


P = some_pairs()


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    """Writes a module of the user's into the current directory, under a name of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = []

    def write(text):
        names.append(f"user_losses_{tmp_path.name}_{len(names)}".replace("-", "_"))
        (tmp_path / f"{names[-1]}.py").write_text(text)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


# -- a name and its options


def test_options_are_bound():
    bound = loss_from("dpo", beta=0.7, label_smoothing=0.2)
    assert torch.equal(bound(P), losses.dpo(P, beta=0.7, label_smoothing=0.2))
    assert torch.equal(loss_from("dpo")(P), losses.dpo(P, beta=0.1))
    assert LOSSES["dpo"] is losses.dpo


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_name_is_its_function_bit_for_bit(name):
    loss = loss_from(name, beta=None)
    assert torch.equal(loss(P), LOSSES[name](P)) and loss.name == name
    assert loss.reference_free == (name in losses.REFERENCE_FREE)
    assert loss.whole_batch == (name in losses.WHOLE_BATCH)
    assert loss.beta == (2.0 if name == "simpo" else 0.1)


def test_beta_is_the_bound_one():
    assert loss_from("simpo", beta=2.5).beta == 2.5
    assert loss_from("sft + simpo", beta=None).beta == 2.0
    assert loss_from("dpo + simpo").beta == 0.1
    assert loss_from("sft").beta == 0.1


def test_the_losses_are_those_of_the_papers():
    assert list(LOSSES) == [
        *("dpo", "robust", "ipo", "hinge", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
        *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
        *("simpo", "cpo", "orpo"),
    ]
    assert {"sft", "simpo", "cpo", "orpo"} == losses.REFERENCE_FREE
    assert {"aot", "aot_unpaired"} == losses.WHOLE_BATCH


def test_an_unknown_loss_names_the_nearest_and_all():
    with pytest.raises(InputError, match=r"unknown loss 'dpoo' \(did you mean 'dpo'\?\).*: dpo"):
        loss_from("dpoo")
    with pytest.raises(InputError, match="there are: ") as error:
        loss_from("quartic")
    assert all(name in str(error.value) for name in LOSSES)
    assert "did you mean" not in str(error.value)
    with pytest.raises(InputError, match="unknown loss 'hinje'"):
        loss_from("dpo + hinje")


def test_an_unknown_option_names_what_the_loss_takes():
    with pytest.raises(InputError) as error:
        loss_from("dpo", beta=0.1, label_smooting=0.1)
    assert "'label_smooting'" in str(error.value)
    assert "did you mean 'label_smoothing'" in str(error.value)
    assert "it takes: beta, label_smoothing" in str(error.value)
    with pytest.raises(InputError, match="'sft' takes no 'beta'; it takes: no options"):
        loss_from("sft", beta=0.1)
    with pytest.raises(InputError, match=r"takes no 'gama' \(did you mean 'gamma'\?\)"):
        loss_from("simpo + sft", gama=1.0)


NAN = math.nan


@pytest.mark.parametrize(
    ("name", "option", "value", "said"),
    [
        *(("dpo", "beta", x, "above 0") for x in (0, 0.0, -1, NAN, math.inf, True, "0.1")),
        *(("dpo", "label_smoothing", x, r"in \[0, 0.5\)") for x in (-0.1, 0.5, 1, NAN)),
        *(("robust", "label_smoothing", x, r"in \[0, 0.5\)") for x in (-0.1, 0.5, NAN)),
        *(("exo_pair", "label_smoothing", x, r"in \(0, 0.5\)") for x in (0, 0.0, 0.5, NAN)),
        *(("cpo", "alpha", x, "0 or more") for x in (-1, NAN, math.inf)),
        *(("simpo", "gamma", x, "finite") for x in (NAN, math.inf)),
        *(("discopop", "tau", x, r"in \(0, 1\]") for x in (0, 1.5, NAN)),
        *(("ipo", "average", x, "true or false") for x in (1, "yes")),
    ],
)
def test_options_out_of_range(name, option, value, said):
    with pytest.raises(InputError, match=f"^{option} is .*; it must be {said}.* loss '{name}'$"):
        loss_from(name, **{option: value})


def test_exo_in_a_sum_keeps_its_own_range():
    with pytest.raises(InputError, match="'exo_pair'"):
        loss_from("dpo + exo_pair", label_smoothing=0.0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_option_has_a_range(name):
    for option, default in loss_names._defaults(LOSSES[name]).items():
        assert loss_from(name, **{option: default}).terms[0].options[option] == default
        with pytest.raises(InputError, match=f"^{option} is"):
            loss_from(name, **{option: NAN})


# -- sums


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("dpo", [(1.0, "dpo")]),
        (" dpo ", [(1.0, "dpo")]),
        ("0.8*dpo + 0.2*bco_pair + sft", [(0.8, "dpo"), (0.2, "bco_pair"), (1.0, "sft")]),
        ("1e-3*dpo+2E+1 * sft", [(1e-3, "dpo"), (20.0, "sft")]),
        (".5*a.b:c+2.*d", [(0.5, "a.b:c"), (2.0, "d")]),
        ("ipo1e+e2", [(1.0, "ipo1e"), (1.0, "e2")]),
    ],
)
def test_sums_are_read(text, terms):
    assert weighted_names(text) == terms


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("", ""), ("dpo +", ""), ("+ dpo", "+ dpo"), ("dpo - sft", "dpo - sft"), ("0.5", "0.5"),
        ("dpo*0.5", "dpo*0.5"), ("dpo + 0.5 sft", " 0.5 sft"), ("0.5*", "0.5*"), ("a:b:c", "a:b:c"),
        ("nan*dpo", "nan*dpo"), ("dpo sft", "dpo sft"), ("dpo ++ sft", "+ sft"), ("-dpo", "-dpo"),
    ],
)  # fmt: skip
def test_what_is_no_sum(text, rest):
    with pytest.raises(InputError) as error:
        loss_from(text)
    assert f"{text!r} cannot be read from {rest!r} on; write a name, or" in str(error.value)


@pytest.mark.parametrize("weight", ["0", "0.0", "1e999"])
def test_weights_are_above_zero(weight):
    with pytest.raises(InputError, match=r"'dpo' the weight .*; write one above 0"):
        loss_from(f"{weight}*dpo")


def test_a_sum_is_the_sum_of_its_terms():
    mpo = loss_from("0.8*dpo + 0.2*bco_pair + sft", beta=0.3)
    want = 0.8 * losses.dpo(P, beta=0.3) + 0.2 * losses.bco_pair(P, beta=0.3) + losses.sft(P)
    torch.testing.assert_close(mpo(P), want, rtol=1e-6, atol=1e-6)
    assert mpo.beta == 0.3 and mpo.name == "0.8*dpo + 0.2*bco_pair + sft"
    assert not mpo.reference_free and not mpo.whole_batch
    assert loss_from("simpo + 0.1*sft").reference_free
    assert loss_from("dpo + 0.1*aot").whole_batch


def test_options_go_to_every_term_that_takes_them():
    both = loss_from("dpo + 0.5*simpo", beta=0.4, gamma=0.9)
    want = losses.dpo(P, beta=0.4) + 0.5 * losses.simpo(P, beta=0.4, gamma=0.9)
    torch.testing.assert_close(both(P), want, rtol=1e-6, atol=1e-6)


# -- a user's own


def test_a_function_of_the_current_directory(my_module):
    name = my_module(
        "import torch\n"
        "def squared(p, *, beta=0.25, goal=2.0):\n"
        "    return (beta * p.margin - goal) ** 2\n"
        "def likely(p):\n"
        "    return -p.chosen\n"
        "likely.reference_free = True\n"
        "def ranked(p):\n"
        "    return p.margin.sort().values\n"
        "ranked.whole_batch = True\n"
    )
    loss = loss_from(f"{name}:squared", goal=3.0)
    torch.testing.assert_close(loss(P), (0.25 * P.margin - 3) ** 2)
    assert (loss.beta, loss.reference_free, loss.whole_batch) == (0.25, False, False)
    assert loss_from(f"{name}:squared", beta=0.5).beta == 0.5
    assert loss_from(f"{name}:likely").reference_free
    assert loss_from(f"{name}:likely + simpo").reference_free
    assert loss_from(f"{name}:ranked").whole_batch
    mixed = loss_from(f"0.5*{name}:squared + dpo", beta=0.2)
    want = 0.5 * (0.2 * P.margin - 2) ** 2 + losses.dpo(P, beta=0.2)
    torch.testing.assert_close(mixed(P), want)
    with pytest.raises(InputError, match=r"takes no 'gaol' \(did you mean 'goal'\?\)"):
        loss_from(f"{name}:squared", gaol=1.0)
    with pytest.raises(InputError, match="beta is -1; it must be above 0"):
        loss_from(f"{name}:squared", beta=-1)


def test_what_a_users_function_returns_is_checked(my_module):
    name = my_module("def mean(p):\n    return p.margin.mean()\ndef number(p):\n    return 3.0\n")
    for loss, said in (("mean", r"shape \(\)"), ("number", "3.0")):
        for text in (f"{name}:{loss}", f"dpo + {name}:{loss}"):
            with pytest.raises(InputError, match=f"{name}:{loss}' returned {said} for 6 pairs"):
                loss_from(text)(P)


def test_no_such_module_or_function(my_module):
    with pytest.raises(InputError, match="there is no module 'no_such_module' in ") as error:
        loss_from("no_such_module:loss")
    assert os.getcwd() in str(error.value) and "PYTHONPATH" in str(error.value)
    with pytest.raises(InputError, match=r"there is no module 'prefopt\.nothing'"):
        loss_from("prefopt.nothing:loss")
    name = my_module("def margin_loss(p):\n    return p.margin\nbeta = 3\n")
    with pytest.raises(InputError, match=r"\.py has no function 'margin_los'") as error:
        loss_from(f"{name}:margin_los")
    assert "did you mean 'margin_loss'" in str(error.value)
    with pytest.raises(InputError, match=r"\.py has a int, no function, 'beta'"):
        loss_from(f"{name}:beta")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def loss(p:\n", r"SyntaxError: .*\.py, line 1"),
        (
            "import no_such_thing\n",
            r"ModuleNotFoundError: No module named 'no_such_thing' .*line 1",
        ),
        ("\n1 / 0\n", r"ZeroDivisionError: division by zero \(.*\.py, line 2\)"),
    ],
)
def test_a_module_that_fails_says_where(my_module, text, said):
    name = my_module(text)
    with pytest.raises(InputError, match=f"importing '{name}' failed: {said}"):
        loss_from(f"{name}:loss")


def test_a_function_that_cannot_be_called_on_pairs(my_module):
    name = my_module("def needs(p, *, tau):\n    return p.margin\ndef nothing():\n    return 1\n")
    with pytest.raises(InputError, match=r"cannot be called on pairs: missing .*'tau'"):
        loss_from(f"{name}:needs")
    assert torch.equal(loss_from(f"{name}:needs", tau=1)(P), P.margin)
    with pytest.raises(InputError, match="cannot be called on pairs: too many positional"):
        loss_from(f"{name}:nothing")


def test_no_file_of_the_current_directory_hides_an_installed_module(
    my_module, tmp_path, monkeypatch
):
    (tmp_path / "colorsys.py").write_text("raise RuntimeError\n")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    name = my_module("import colorsys\ndef loss(p):\n    return p.margin\n")
    assert torch.equal(loss_from(f"{name}:loss")(P), P.margin)
    assert sys.path[-1] == str(tmp_path)
