"""What must hold for any rows: what stands in the padding, how wide it is and in which order the
samples come makes no difference; float32 is near float64; nothing overflows. TRL's losses agree."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefopt.rl import (
    ESTIMATORS,
    advantages,
    explained_variance,
    kl_estimate,
    shape_rewards,
    whiten,
)
from prefopt.rl_losses import (
    MODES,
    POLICY_LOSSES,
    aggregate,
    importance_weights,
    kl_loss,
    policy_loss_from,
    ppo_value_loss,
    ratio_statistics,
)

few = settings(max_examples=25)
Given = dict[str, Tensor]


def rows(seed: int, dtype: torch.dtype = torch.float64) -> Given:
    """Rows of six samples in three groups, with gaps and padding."""
    generator = torch.Generator().manual_seed(seed)
    known = {
        name: torch.randn(6, 8, generator=generator, dtype=torch.float64)
        for name in ("logp", "old", "ref", "values", "old_values", "returns", "rewards", "adv")
    }
    for name in ("logp", "old", "ref"):
        known[name] = known[name] / 3 - 2
    lengths = torch.randint(1, 9, (6, 1), generator=generator)
    mask = (torch.arange(8) < lengths) & (torch.rand(6, 8, generator=generator) < 0.8)
    mask[:, 0] = True
    scores = torch.randn(6, generator=generator, dtype=torch.float64)
    known |= {"scores": scores, "bootstrap": scores.flip(0)}
    known = {name: x.to(dtype) for name, x in known.items()}
    return known | {"mask": mask, "ids": torch.tensor([0, 1, 0, 2, 1, 2])}


def results(g: Given) -> Iterator[tuple[str, Tensor]]:
    """Everything that is computed on rows, by name; [S, T] rows, [S] or scalars."""
    mask = g["mask"]
    kl = kl_estimate(g["old"], g["ref"])
    rewards = shape_rewards(g["scores"], kl, mask, beta=0.1, token_scores=g["rewards"])
    yield "rewards", rewards
    for name in ESTIMATORS:
        found = advantages(
            rewards, mask, estimator=name, group_ids=g["ids"], values=g["values"],
            bootstrap=g["bootstrap"], gamma=0.9, lam=0.8,
        )  # fmt: skip
        yield from ((f"{name} {i}", x) for i, x in enumerate(found) if x is not None)
    yield "whiten", whiten(g["rewards"], mask)
    yield "whiten, mean kept", whiten(g["rewards"], mask, center=False)
    explained = explained_variance(g["values"], g["returns"], mask)
    yield "explained", torch.tensor(explained, dtype=g["values"].dtype)
    for kind in ("truncate", "mask", "sequence-mask"):
        yield kind, importance_weights(g["logp"], g["old"], mask, kind=kind)
    statistics = ratio_statistics(g["logp"], g["old"], g["adv"], mask)
    yield from statistics.items()
    for name in POLICY_LOSSES:
        logp = g["logp"].clone().requires_grad_()
        loss = policy_loss_from(name)(logp, g["old"], g["adv"], mask)
        yield name, loss.detach()
        for mode in MODES:
            mean = aggregate(loss, mask, mode=mode, denom=9.0)
            yield f"{name} {mode}", mean.detach()
            slope = torch.autograd.grad(mean, logp, retain_graph=True)[0]
            yield f"{name} {mode} gradient", slope.masked_fill(~mask, 0.0)
    values = g["values"].clone().requires_grad_()
    loss = aggregate(ppo_value_loss(values, g["old_values"], g["returns"]), mask)
    yield "value", loss.detach()
    yield "value gradient", torch.autograd.grad(loss, values)[0].masked_fill(~mask, 0.0)
    yield "kl loss", aggregate(kl_loss(g["logp"], g["old"], g["ref"], kind="k3"), mask)


def compare(one: Given, other: Given, same: Callable[[str, Tensor, Tensor], bool]) -> None:
    for (name, a), (_, b) in zip(results(one), results(other), strict=True):
        assert same(name, a, b), (name, a, b)


def per_token(g: Given) -> list[str]:
    return [name for name, x in g.items() if x.ndim == 2 and name != "mask"]


@few
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e30, math.nan, math.inf, -math.inf]))
def test_garbage_outside_the_mask_changes_nothing(seed: int, garbage: float) -> None:
    g = rows(seed, torch.float32)
    dirty = g | {name: g[name].masked_fill(~g["mask"], garbage) for name in per_token(g)}
    compare(g, dirty, lambda _, a, b: torch.equal(a, b) or bool(a.isnan() & b.isnan()))


@few
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_wider_padding_changes_nothing(seed: int, width: int) -> None:
    """Of rows nothing at all; of sums the rounding, as they are taken over other blocks."""
    g = rows(seed)
    pad = torch.nn.functional.pad
    wide = g | {name: pad(g[name], (0, width)) for name in (*per_token(g), "mask")}

    def same(_: str, a: Tensor, b: Tensor) -> bool:
        if a.ndim == 2:
            assert (b[:, 8:] == 0).all()
            b = b[:, :8]
        return torch.allclose(a, b, rtol=1e-13, atol=1e-14, equal_nan=True)

    compare(g, wide, same)


@few
@given(st.integers(0, 10_000))
def test_the_order_of_samples_is_only_their_order(seed: int) -> None:
    g = rows(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    compare(
        g,
        {name: x[order] for name, x in g.items()},
        lambda _, a, b: torch.allclose(a[order] if a.ndim else a, b, atol=1e-12, equal_nan=True),
    )


@few
@given(st.integers(0, 10_000))
def test_float32_is_near_float64_and_stays_float32(seed: int) -> None:
    def same(name: str, a: Tensor, b: Tensor) -> bool:
        if a.dtype.is_floating_point:
            assert (a.dtype, b.dtype) == (torch.float64, torch.float32), name
        return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True)

    compare(rows(seed), rows(seed, torch.float32), same)


@pytest.mark.parametrize("far", [1e2, 1e4])
def test_far_policies_and_large_rewards_stay_finite(far: float) -> None:
    g = rows(0, torch.float32)
    g["logp"], g["old"], g["ref"] = (g[name] * far for name in ("logp", "old", "ref"))
    g["scores"] = g["scores"] * 1e6
    assert not [name for name, x in results(g) if not x.isfinite().all()]
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(g["logp"], g["ref"], kind=kind).isfinite().all()


# -- TRL

TRL_LOSSES = {
    # ours with its options and average, and what TRL calls it
    "grpo": ("ppo", {"clip_high": 0.28}, "seq-mean-token-mean", {"loss_type": "grpo"}),
    "dr_grpo": ("ppo", {"clip_high": 0.28}, "token-sum-const", {"loss_type": "dr_grpo"}),
    "dapo": ("ppo", {"clip_high": 0.28}, "token-mean", {"loss_type": "dapo"}),
    "cispo": ("cispo", {"clip_high": 0.28}, "token-mean",
              {"loss_type": "cispo", "epsilon_high": 1.28}),
    "gspo": ("gspo", {"clip": 0.2, "clip_high": 0.28}, "seq-mean-token-mean",
             {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_losses_and_gradients_are_those_of_trl(name: str) -> None:
    """The code of its GRPOTrainer, given log-probs instead of a model."""
    trl = pytest.importorskip("trl")
    ours, options, mode, theirs = TRL_LOSSES[name]
    g = rows(3)
    lengths = g["mask"].sum(1)
    mask = torch.arange(8) < lengths[:, None]  # it knows no gaps where it counts
    adv, logp = g["adv"][:, 0], g["logp"].clone().requires_grad_()
    trainer = MagicMock(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
        **{
            "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "beta": 0.0, "use_vllm": False,
            "off_policy_mask_threshold": None, "importance_sampling_level": "token",
            "epsilon_low": 0.2, "epsilon_high": 0.28, "max_completion_length": 9,
            "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
            "args": SimpleNamespace(delta=None, steps_per_generation=1),
            "accelerator": MagicMock(num_processes=1, gather=lambda x: x),
        } | theirs,
    )  # fmt: skip
    ids = torch.zeros(6, 8, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids,
        "completion_mask": mask.long(), "advantages": adv,
        "old_per_token_logps": g["old"], "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    want = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    slope = torch.autograd.grad(want, logp)[0]

    spread = adv[:, None].expand(6, 8)
    loss = policy_loss_from(ours, **options)(logp, g["old"], spread, mask)
    got = aggregate(loss, mask, mode=mode, denom=9.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, logp)[0], slope, rtol=1e-12, atol=1e-12)
    assert slope.abs().sum() > 0
