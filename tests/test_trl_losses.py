"""Loss and gradient of all parameters against TRL: the same weights and token ids in its trainers,
called on batches that they collated themselves, and in the objectives here.

Where a term of TRL's is the mean over all tokens of a batch (its NLL), pairs are compared one by
one: on a batch of a single pair it is the mean over that pair's tokens, as here.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from prefopt import DPO, Policy, losses, pack
from prefopt.data.encode import BASELINE, DESIRABLE, UNDESIRABLE, Encoded
from prefopt.objectives.kto import KTO
from prefopt.objectives.reward import Reward

trl = pytest.importorskip("trl")

# transformers 5.23 warns of what trl 1.16 sets itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning"
)

# Short, and the models in float64: TRL's log-probs are float32 all the same, and of 200 nats that
# is too little to compare gradients by.
ROWS = [
    {"prompt": "Tell me about cats.", "chosen": " Gladly.", "rejected": " No"},
    {"prompt": "Tell me about rain.", "chosen": " It helps.", "rejected": " No. Really"},
    {"prompt": "Please help.", "chosen": " I will", "rejected": " I will not"},
    {"prompt": "Music?", "chosen": " Fine", "rejected": " About what"},
]
PAIRS = len(ROWS)
ARGUMENTS = {
    "per_device_train_batch_size": PAIRS, "max_length": 128, "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True,
}  # fmt: skip


class Sides:
    """Two models of transformers and two policies of ours; both pairs with the same two weights."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(folder)
        self.reference = Policy.from_pretrained(folder, dtype=torch.float64)
        self.policy = Policy.from_pretrained(folder, dtype=torch.float64)
        self.their_reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for p in self.policy.model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))

    def model(self):
        """A new one, because a trainer patches the forward pass of its own."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float64)
        model.load_state_dict(self.policy.model.state_dict())
        return model.eval()

    def rows(self, groups):
        """The groups packed, with the log-probs of the reference."""
        (batch,) = pack(groups, max_tokens=100_000, layout=self.policy.layout)
        with torch.no_grad():
            return replace(batch, ref_logprobs=self.reference(batch))

    def ours(self, objective, groups):
        """(mean loss, gradients by name)."""
        total, count, _ = objective(self.policy, self.rows(groups))
        named = dict(self.policy.model.named_parameters())
        return total / count, gradients(total / count, named)


def gradients(loss, named):
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, grads, strict=True))


def mean(parts):
    """Of (loss, gradients) pairs."""
    values, grads = zip(*parts, strict=True)
    return sum(values) / len(values), {k: sum(g[k] for g in grads) / len(grads) for k in grads[0]}


def assert_same(ours, theirs, bound=1e-5):
    (value, grads), (their_value, their_grads) = ours, theirs
    assert value.item() == pytest.approx(their_value.item(), rel=bound)
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        assert their_grads[name].norm() > 0, name
        assert (grad - their_grads[name]).norm() <= bound * their_grads[name].norm(), name


def group(prompt, *responses, index=0, **fields):
    as_ids = [np.asarray(x, dtype=np.int32) for x in (prompt, *responses)]
    return Encoded(as_ids[0], tuple(as_ids[1:]), index, **fields)


def split(ids, attention, answer):
    """(prompt, response) of one row."""
    real = attention.bool()
    return ids[real][~answer[real].bool()], ids[real][answer[real].bool()]


@pytest.fixture(scope="module")
def sides(tiny_model):
    return Sides(tiny_model)


def dataset(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


# -- DPOTrainer


class Dpo:
    def __init__(self, sides, rows, folder):
        self.sides, self.model = sides, sides.model()
        config = trl.DPOConfig(str(folder), use_weighting=True, **ARGUMENTS)
        self.trainer = trl.DPOTrainer(
            self.model, sides.their_reference, config,
            train_dataset=dataset(rows), processing_class=sides.tokenizer,
        )  # fmt: skip
        self.inputs = next(iter(self.trainer.get_train_dataloader()))
        self.model.eval()
        self.groups = [self.group(i) for i in range(PAIRS)]

    def group(self, i):
        keys = ("input_ids", "attention_mask", "completion_mask")
        prompt, chosen = split(*(self.inputs[k][i] for k in keys))
        same, rejected = split(*(self.inputs[k][i + PAIRS] for k in keys))
        assert torch.equal(prompt, same)
        return group(prompt, chosen, rejected, index=i)

    def loss(self, inputs, types, **settings):
        names = {
            "loss_weights": [1.0] * len(types), "beta": 0.1, "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "ld_alpha": None,
            "use_weighting": False, **settings,
        }  # fmt: skip
        self.trainer.loss_types = types
        self.trainer.args.discopop_tau = names.pop("discopop_tau", 0.05)
        for name, value in names.items():
            assert hasattr(self.trainer, name)
            setattr(self.trainer, name, value)
        loss = self.trainer.compute_loss(self.model, dict(inputs))
        return loss, gradients(loss, dict(self.model.named_parameters()))

    def check(self, objective, types, one_by_one=False, **settings):
        if one_by_one:
            parts = [{k: v[[i, i + PAIRS]] for k, v in self.inputs.items()} for i in range(PAIRS)]
            theirs = mean([self.loss(part, types, **settings) for part in parts])
        else:
            theirs = self.loss(self.inputs, types, **settings)
        assert_same(self.sides.ours(objective, self.groups), theirs)


@pytest.fixture(scope="module")
def dpo(sides, tmp_path_factory):
    return Dpo(sides, ROWS, tmp_path_factory.mktemp("dpo"))


TYPES = {
    "sigmoid": "dpo",
    **{name: name for name in ("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair")},
    **{name: name for name in ("sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")},
    **{name: name for name in ("discopop", "sft", "sigmoid_norm")},
}
# TRL's ipo is the mean per token. With discopop's own tau of 0.05 the slope bends so much that the
# float32 of TRL's log-probs shows (1.2e-5 at beta 0.1).
OPTIONS = {"ipo": {"average": True}, "discopop": {"tau": 0.2}}
SMOOTHED = {"exo_pair": 0.05, "robust": 0.2, "aot": 0.1, "aot_unpaired": 0.1}


def test_these_are_all_losses_of_dpo_trainer(dpo):
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        dpo.loss(dpo.inputs, ["nothing"])
    listed = str(error.value).partition("one of ")[2]
    assert sorted(re.findall(r"'(\w+)'", listed)) == sorted(TYPES)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name", TYPES)
def test_every_loss_of_dpo_trainer(dpo, name, beta):
    options = dict(OPTIONS.get(name, {}))
    if name in SMOOTHED:
        options["label_smoothing"] = SMOOTHED[name]
    settings = {
        "label_smoothing": SMOOTHED.get(name, 0.0),
        "discopop_tau": options.get("tau", 0.05),
    }
    objective = DPO(TYPES[name], beta=None if name == "sft" else beta, **options)
    dpo.check(objective, [name], one_by_one=name == "sft", beta=beta, **settings)


def test_mpo_sums_losses(dpo):
    objective = DPO("0.8*dpo + 0.2*bco_pair + sft", beta=0.3)
    weights = [0.8, 0.2, 1.0]
    dpo.check(objective, ["sigmoid", "bco_pair", "sft"], True, loss_weights=weights, beta=0.3)
    dpo.check(DPO("dpo + apo_down"), ["sigmoid", "apo_down"])


# The losses whose margin TRL shapes; the others it leaves on plain log-ratios.
SHAPED = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences(dpo, name, kind):
    options = OPTIONS.get(name, {}) | {"label_smoothing": SMOOTHED.get(name, 0.0)}
    options = {k: v for k, v in options.items() if v}
    objective = DPO(TYPES[name], 0.3, divergence=kind, divergence_alpha=0.3, **options)
    # its coefficient is 1 - alpha of the paper
    settings = {"f_divergence_type": kind, "f_alpha_divergence_coef": 0.7, "beta": 0.3}
    settings |= {"label_smoothing": SMOOTHED.get(name, 0.0)}
    dpo.check(objective, [name], discopop_tau=options.get("tau", 0.05), **settings)


@pytest.mark.parametrize("name", ["sigmoid", "bco_pair", "apo_down", "aot"])
def test_ld_alpha(dpo, name):
    dpo.check(DPO(TYPES[name], 0.3, ld_alpha=0.4), [name], beta=0.3, ld_alpha=0.4)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sppo_hard", "nca_pair"])
def test_use_weighting(dpo, name):
    objective = DPO(TYPES[name], 0.3, wpo=True, **OPTIONS.get(name, {}))
    dpo.check(objective, [name], beta=0.3, use_weighting=True)


# -- CPOTrainer and ORPOTrainer


def without_reference(loss, **options):
    """A loss of log-ratios with the reference's log-probs at 0."""

    def free(p):
        zero = torch.zeros_like(p.chosen)
        return loss(p._replace(ref_chosen=zero, ref_rejected=zero), **options)

    free.reference_free = True
    return free


def chosen_and_rejected(inputs):
    """The groups of a batch of CPOTrainer or ORPOTrainer."""
    groups = []
    for i in range(len(inputs["chosen_input_ids"])):
        halves = []
        for side in ("chosen", "rejected"):
            ids, attention, labels = (
                inputs[f"{side}_{key}"][i] for key in ("input_ids", "attention_mask", "labels")
            )
            halves.append(split(ids, attention, labels != -100))
        (prompt, chosen), (same, rejected) = halves
        assert torch.equal(prompt, same)
        groups.append(group(prompt, chosen, rejected, index=i))
    return groups


@pytest.fixture(scope="module")
def cpo(sides, tmp_path_factory):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOConfig(str(tmp_path_factory.mktemp("cpo")), **ARGUMENTS)
    return CPOTrainer(
        sides.model(), config,
        train_dataset=dataset(ROWS), processing_class=sides.tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "objective"),
    [
        ("sigmoid", {"beta": 0.3, "cpo_alpha": 0.7}, DPO("cpo", 0.3, alpha=0.7)),
        ("sigmoid", {"beta": 0.3, "cpo_alpha": 0.0}, DPO("cpo", 0.3, alpha=0.0)),
        (
            "sigmoid",
            {"beta": 0.3, "cpo_alpha": 1.0, "label_smoothing": 0.2},
            DPO("cpo", 0.3, label_smoothing=0.2),
        ),
        (
            "simpo",
            {"beta": 2.5, "simpo_gamma": 1.2, "cpo_alpha": 0.0},
            DPO("simpo", 2.5, gamma=1.2),
        ),
        (
            "simpo",
            {"beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.3, "label_smoothing": 0.1},
            DPO("simpo + 0.3*sft", label_smoothing=0.1),
        ),
        (
            "hinge",
            {"beta": 0.02, "cpo_alpha": 0.0},
            DPO(without_reference(losses.hinge, beta=0.02)),
        ),
        (
            "ipo",
            {"beta": 0.3, "cpo_alpha": 0.0},
            DPO(without_reference(losses.ipo, beta=0.3, average=True)),
        ),
    ],
    ids=["cpo", "cpo without nll", "cpo smoothed", "simpo", "simpo with nll", "hinge", "ipo"],
)
def test_losses_of_cpo_trainer(sides, cpo, name, settings, objective):
    inputs = next(iter(cpo.get_train_dataloader()))
    cpo.loss_type = name
    for key, value in {"label_smoothing": 0.0, **settings}.items():
        setattr(cpo, key, value)
    model, parts = cpo.model.eval(), []
    for i in range(PAIRS):  # its NLL is a mean over all tokens of the batch
        one = {k: v[i : i + 1] for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        loss, _ = cpo.get_batch_loss_metrics(model, one)
        parts.append((loss, gradients(loss, dict(model.named_parameters()))))
    assert_same(sides.ours(objective, chosen_and_rejected(inputs)), mean(parts))


def test_the_odds_ratio_of_orpo_trainer(sides, tmp_path):
    """Its NLL is of the prompt too, where the paper's is of the response: what is compared is the
    loss less that term."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model = sides.model()
    trainer = ORPOTrainer(
        model, ORPOConfig(str(tmp_path), beta=0.3, **ARGUMENTS),
        train_dataset=dataset(ROWS), processing_class=sides.tokenizer,
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    model.eval()
    loss, _ = trainer.get_batch_loss_metrics(model, inputs)
    *_, nll = trainer.concatenated_forward(model, inputs)
    theirs = loss - nll, gradients(loss - nll, dict(model.named_parameters()))

    def odds_ratio(p):
        return losses.orpo(p, beta=0.3) - losses.sft(p)

    odds_ratio.reference_free = True
    assert_same(sides.ours(DPO(odds_ratio), chosen_and_rejected(inputs)), theirs)


# -- KTOTrainer


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.7)])
def test_kto_trainer(sides, tmp_path, weights):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(ROWS, ("chosen", "rejected", "chosen", "chosen"), strict=False)
    ]
    config = trl.KTOConfig(
        str(tmp_path),
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        **ARGUMENTS,
    )
    trainer = trl.KTOTrainer(
        sides.model(), sides.their_reference, config,
        train_dataset=dataset(rows), processing_class=sides.tokenizer,
    )  # fmt: skip
    inputs, model = next(iter(trainer.get_train_dataloader())), trainer.model.eval()
    loss = trainer.compute_loss(model, dict(inputs))
    theirs = loss, gradients(loss, dict(model.named_parameters()))
    groups = []
    for i in range(PAIRS):
        keys = ("input_ids", "attention_mask", "completion_mask")
        prompt, completion = split(*(inputs[k][i] for k in keys))
        same, mismatched = split(*(inputs[f"KL_{k}"][i] for k in keys))
        assert torch.equal(prompt, same)
        labels = (DESIRABLE if inputs["label"][i] else UNDESIRABLE, BASELINE)
        groups.append(group(prompt, completion, mismatched, index=i, labels=labels))
    objective = KTO(0.3, desirable_weight=weights[0], undesirable_weight=weights[1])
    read, _ = objective.read(sides.policy, sides.rows(groups))
    assert read.logratios[read.labels == BASELINE].mean() > 0.01, "the baseline is cut off at 0"
    assert_same(sides.ours(objective, groups), theirs)


# -- RewardTrainer


@pytest.mark.parametrize(("margins", "center"), [(False, 0.0), (True, 0.0), (True, 0.05)])
def test_reward_trainer(tiny_model, tmp_path, margins, center):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    policy = Policy.from_pretrained(tiny_model, head="score", dtype=torch.float64)
    policy.save_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", dtype=torch.float64
    )
    rows = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        | ({"margin": 0.5 * i - 0.2} if margins else {})
        for i, row in enumerate(ROWS)
    ]
    config = trl.RewardConfig(
        str(tmp_path / "out"), center_rewards_coefficient=center or None, **ARGUMENTS
    )
    trainer = trl.RewardTrainer(
        model, config, train_dataset=dataset(rows),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model.eval(), dict(inputs))
    theirs = loss, gradients(loss, dict(model.named_parameters()))

    groups = []
    for i in range(PAIRS):
        sequences = [
            inputs["input_ids"][j][inputs["attention_mask"][j].bool()] for j in (i, i + PAIRS)
        ]
        assert sequences[0][0] == sequences[1][0]
        margin = inputs["margin"][i].item() if margins else None
        responses = [ids[1:] for ids in sequences]
        groups.append(group(sequences[0][:1], *responses, index=i, margin=margin))
    (batch,) = pack(groups, max_tokens=100_000, layout=policy.layout, ends=True)
    total, count, _ = Reward(margin=1.0, center=center)(policy, batch)
    ours = total / count, gradients(total / count, dict(policy.model.named_parameters()))
    assert_same(ours, theirs)
