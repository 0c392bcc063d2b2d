"""Several roles on one base: a critic beside the policy, and reward models that share its weights.

A critic is a linear value head [1, D] with a bias on hidden states, V_t = w . h_t + b. There are
three kinds, by what these states are:

    trunk      the policy's own: one forward gives log-probs and values, and the value loss moves
               the policy's weights too
    adapter    those of a LoRA of its own, "value", on the policy's base
    model      those of a model that is nothing but the critic, all of whose training is for it

The policy's log-probs, gradients and reference are with these roles what they are without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefopt import durable, fingerprint, loading
from prefopt.errors import InputError
from prefopt.loading import Source
from prefopt.nn import lora as lora_module
from prefopt.nn.heads import SCORE, ScoreStats
from prefopt.nn.linear import use_onednn
from prefopt.nn.lora import LoraConfig
from prefopt.nn.peft_format import PREFIX, TENSORS, load_adapter, save_adapter
from prefopt.nn.targets import select
from prefopt.policy import ADAPTER, Policy
from prefopt.role_parameters import VALUE

KINDS = ("trunk", "adapter", "model")
HEAD, CRITIC = "value_head.safetensors", "critic.json"


def add_critic(
    policy: Policy,
    *,
    kind: str = "adapter",
    lora: LoraConfig | None = None,
    start: str | Path | None = None,
    scale: ScoreStats | None = None,
) -> None:
    """Give a policy a critic of a ``kind`` above, which says 0 everywhere at first.

    ``lora``: the critic's adapter, by default as the policy's, without dropout. ``start``: the
    folder of a reward model trained as an adapter on the same base, whose adapter and score the
    critic starts from. A reward model that becomes a critic ("model") starts from its own score.
    ``scale``: what the scores are normalised by; the critic then starts with
    w / std and (b - mean) / std. Raises InputError where the policy cannot have such a critic.
    """
    _check_kind(policy, kind)
    if (lora is not None or start is not None) and kind != "adapter":
        raise InputError(f"lora and start are for a critic that is an adapter, not a {kind}")
    if lora is not None and start is not None:
        raise InputError("a critic that starts from a reward model has its adapter: leave out lora")
    head = _new_head(policy)
    if start is not None:
        source = _shared_source(policy, start)
        head = _new_head(policy, _load_role(policy, source, VALUE, trainable=True), scale)
    elif kind == "adapter":
        with torch.random.fork_rng(devices=[]):  # the policy draws what it would have drawn
            lora_module.add_lora(policy.model, lora or _like_the_policy(policy), VALUE)
    elif policy.is_reward_model:
        head = _new_head(policy, policy.model.score.weight.detach(), scale)
    _take(policy, kind, head)


def save_critic(policy: Policy, folder: str | Path) -> None:
    """The critic as a folder, whole or not there: its head, and of an adapter PEFT's files, of a
    model those of ``save_pretrained``."""
    if policy.value_head is None:
        raise InputError(f"{policy.base} has no critic here; roles.add_critic gives it one")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with durable.new_dir(folder) as partial:
        if policy.critic_kind == "model":
            policy.save_pretrained(partial)
        elif policy.critic_kind == "adapter":
            save_adapter(policy.model, partial, VALUE, base_model_name_or_path=policy.base)
        durable.save_tensors(partial / HEAD, dict(policy.value_head.state_dict()))
        durable.write_json(partial / CRITIC, {"kind": policy.critic_kind})


def load_critic(policy: Policy, folder: str | Path) -> None:
    """Give a policy the critic in a folder of ``save_critic``; one that is a model of its own is
    loaded by ``Policy.from_pretrained(folder)`` first. InputError for one that does not fit."""
    folder = Path(folder)
    try:
        kind = json.loads((folder / CRITIC).read_text())["kind"]
    except FileNotFoundError:
        raise InputError(f"{folder} has no {CRITIC}, so it is not the folder of a critic") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CRITIC} is damaged ({error!r}); use another copy") from None
    _check_kind(policy, kind)
    head, tensors = _new_head(policy), durable.load_tensors(folder / HEAD)
    want = {name: tuple(p.shape) for name, p in head.named_parameters()}
    have = {name: tuple(t.shape) for name, t in tensors.items()}
    if want != have:
        raise InputError(f"{folder / HEAD} holds {have}, and the critic of this model has {want}")
    if kind == "adapter":
        with torch.random.fork_rng(devices=[]):
            load_adapter(policy.model, folder, VALUE)
    head.load_state_dict(tensors)
    _take(policy, kind, head)


def make_critic(policy: Policy, config: Any, rewards: Mapping[str, Any]) -> Policy:
    """The policy whose ``values`` is the critic that a PPOConfig asks for: ``policy`` itself, which
    then has one, or a model of its own.

    Without ``config.critic`` it is an adapter where an adapter trains, else a trunk. A folder is a
    critic of its own: it trains as the policy does, all weights or an adapter, and starts from its
    score where it is a reward model. ``config.critic_start`` "reward" starts an adapter from the
    reward model that is the reward. InputError where that cannot be.
    """
    kind = config.critic or ("adapter" if policy.adapter else "trunk")
    scale, start = None, None
    if config.critic_start == "reward":
        start, stats = _only_reward_model(rewards)
        scale = stats if config.normalize_scores == "reference" else None
    if kind in ("trunk", "adapter"):
        add_critic(policy, kind=kind, start=start, scale=scale)
        return policy
    source = loading.resolve(kind)
    lora = None if source.adapter or not policy.adapter else _settings(policy)
    critic = Policy.from_pretrained(
        kind, lora=lora, quantize=policy.kind, dtype=policy.dtype, device=str(policy.device)
    )
    if critic.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise InputError(
            f"the critic {kind} has another vocabulary than the policy, whose tokens it values"
        )
    if critic.layout == "padded" and policy.layout == "shared":
        raise InputError(
            f"the critic {kind} cannot read what is packed for the policy: {critic.layout_reason}; "
            "load the policy with attention='padded'"
        )
    if config.critic_start == "reward" and not critic.is_reward_model:
        raise InputError(f"critic_start is reward, and the critic {kind} is a language model")
    stats = critic.score_stats if config.normalize_scores == "reference" else None
    add_critic(critic, kind="model", scale=stats)
    critic.use_float32_masters()
    return critic


def add_reward_role(policy: Policy, folder: str | Path, name: str = "reward") -> ScoreStats | None:
    """Let ``policy(batch, role=name)`` score responses as the reward model in ``folder`` does.

    The reward model is an adapter on the policy's base, in the same precision; what is added is
    that adapter, frozen, and the score head. Returns the scale of its scores where it is known.
    Raises InputError, and changes nothing, where the two cannot share a base.
    """
    source = _shared_source(policy, folder)
    weight = _load_role(policy, source, name, trainable=False)
    policy.reward_heads[name] = _new_head(policy, weight, bias=False).requires_grad_(False)
    return ScoreStats.read(source.folder)


def why_not_shared(policy: Policy, source: Source) -> str | None:
    """None if a reward model is an adapter on the base that the policy stands on, else why not."""
    if source.adapter is None:
        return f"{source.base} is a full model, not an adapter on the policy's base"
    if source.head != SCORE:
        return f"{source.adapter} is the adapter of a language model, which has no score"
    if policy.is_reward_model:
        return f"{policy.base} is a reward model itself"
    if policy.adapter is None:
        return "the policy trains all weights of its base, and the reward model's stay"
    if not fingerprint.same_files(Path(source.base), Path(policy.base)):
        return f"the reward model stands on {source.base} and the policy on {policy.base}"
    if source.kind != policy.kind:
        kinds = [kind or "as stored" for kind in (source.kind, policy.kind)]
        return "the base of the reward model is {}, and that of the policy {}".format(*kinds)
    return None


# --- the parts -----------------------------------------------------------------------------------


def _check_kind(policy: Policy, kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"the kind of a critic is {', '.join(KINDS)}, not {kind!r}")
    if policy.critic_kind is not None:
        raise InputError(f"{policy.base} has a critic already; load the model again for another")
    if kind != "model" and policy.is_reward_model:
        raise InputError(f"{policy.base} is a reward model; as a critic it is of kind 'model'")
    if kind == "adapter" and policy.adapter is None:
        raise InputError(
            "a critic that is an adapter needs a base that stays, and here all weights train; "
            "train an adapter (--lora.r), or take a trunk or a critic of its own"
        )


def _take(policy: Policy, kind: str, head: nn.Linear) -> None:
    policy.value_head, policy.critic_kind = head, kind
    if kind == "model":
        # Without a gradient they would only be carried along, unless they are the embedding too.
        model, unused = policy.model, policy.model.get_output_embeddings()
        unused = model.score if policy.is_reward_model else unused
        shared = {id(p) for p in model.get_input_embeddings().parameters()}
        for p in unused.parameters() if unused is not None else ():
            p.requires_grad_(p.requires_grad and id(p) in shared)


@torch.no_grad()
def _new_head(
    policy: Policy,
    weight: torch.Tensor | None = None,
    scale: ScoreStats | None = None,
    *,
    bias: bool = True,
) -> nn.Linear:
    """w . h + b in float32: 0, or the score ``weight`` [1, D], normalised by ``scale``."""
    if scale is not None and scale.std == 0:
        raise InputError(f"all {scale.n} reference scores are equal: there is no scale in them")
    config = policy.model.config.get_text_config()
    dtype = torch.promote_types(policy.dtype, torch.float32)
    head = nn.Linear(config.hidden_size, 1, bias=bias, dtype=dtype, device="meta")
    head = head.to_empty(device=policy.device)  # which draws nothing, so nor does the policy else
    nn.init.zeros_(head.weight)
    if weight is not None:
        head.weight.copy_(weight / (scale.std if scale else 1.0))
    if bias:
        nn.init.constant_(head.bias, -scale.mean / scale.std if scale and weight is not None else 0)
    use_onednn(head)
    return head


def _only_reward_model(rewards: Mapping[str, Any]) -> tuple[str, ScoreStats | None]:
    """Folder and scale of the one reward."""
    folders = [getattr(reward, "path", None) for reward in rewards.values()]
    if len(folders) != 1 or folders[0] is None:
        raise InputError(
            "critic_start is reward, which needs a single reward that is a reward model; "
            f"there are: {', '.join(rewards)}"
        )
    return folders[0], next(iter(rewards.values())).score_stats


def _settings(policy: Policy) -> LoraConfig:
    """Those of the policy's adapter, without what it trains in full and without dropout."""
    _, module = lora_module.require(policy.model, ADAPTER)[0]
    return replace(module.configs[ADAPTER], modules_to_save=[], dropout=0.0)


def _like_the_policy(policy: Policy) -> LoraConfig:
    """The policy's own settings, for the layers that lead to the hidden states."""
    config = _settings(policy)
    output = policy.model.get_output_embeddings()
    names = [name for name, m in policy.model.named_modules() if m is output]
    return _without(policy.model, config, names)


def _without(model: Any, config: LoraConfig, names: list[str]) -> LoraConfig:
    """The same settings where these modules are left alone."""
    chosen = [name for name in names if name in select(model, config).lora]
    if not chosen:
        return config
    if isinstance(config.exclude, str):
        pattern = "|".join([f"(?:{config.exclude})", *map(re.escape, chosen)])
        return replace(config, exclude=pattern)
    return replace(config, exclude=[*config.exclude, *chosen])


def _shared_source(policy: Policy, folder: str | Path) -> Source:
    source = loading.resolve(folder)
    if reason := why_not_shared(policy, source):
        raise InputError(f"{folder} cannot share the policy's base: {reason}")
    return source


def _load_role(policy: Policy, source: Source, name: str, *, trainable: bool) -> torch.Tensor:
    """Add the adapter of a reward model, without its dropout; returns its score weight [1, D]."""
    folder = source.folder
    weight = durable.load_tensors(folder / TENSORS).get(f"{PREFIX}{SCORE}.weight")
    width = policy.model.config.get_text_config().hidden_size
    if weight is None or weight.shape != (1, width):
        have = "none" if weight is None else list(weight.shape)
        raise InputError(f"{folder / TENSORS} has {have} for a score of [1, {width}]")
    with torch.random.fork_rng(devices=[]):
        load_adapter(policy.model, folder, name, trainable=trainable, without=SCORE)
    for _, module in lora_module.require(policy.model, name):
        module.configs[name] = replace(module.configs[name], dropout=0.0)
    return weight
