"""Which modules of a model an adapter goes to, and why not to the others."""

from collections import defaultdict
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor, nn

from prefopt.errors import InputError
from prefopt.nn.adapted import Adapted, base_modules
from prefopt.nn.lora_config import ALL_LINEAR, LoraConfig, name_matches, pattern_matches
from prefopt.nn.lora_embedding import LoraEmbedding, why_not_embedding
from prefopt.nn.lora_linear import LoraLinear, dense_shape, is_conv1d
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.nn.saved_module import SavedModule, why_not_saved


@dataclass(frozen=True)
class Selection:
    """Module names in the order of the model: for LoRA, trained whole, and left out with why."""

    lora: list[str]
    saved: list[str]
    skipped: dict[str, str]


def select(model: nn.Module, config: LoraConfig) -> Selection:
    """The modules that a configuration selects.

    InputError for a name or pattern without a match, and for a match that cannot be adapted: of
    another kind, with weights shared with another module, or unfit for the other settings.
    """
    modules = dict(base_modules(model))
    shared = _shared_weights(model)
    saved = _saved(modules, shared, config.modules_to_save)
    names: list[str] = []
    skipped: dict[str, str] = {}
    for name in _chosen(modules, config.targets):
        module = modules[name]
        unwanted = _why_unwanted(name, config, saved, module is _head(model))
        cannot = why_not_adaptable(module)
        if cannot is None and name in shared:
            cannot = f"it shares its weight with {shared[name]}"
        if unwanted or (cannot and (config.targets == ALL_LINEAR or _is_container(module))):
            skipped[name] = unwanted or cannot or ""
        elif cannot:
            raise InputError(f"LoRA cannot adapt {name}: {cannot}; take it out of lora.targets")
        else:
            names.append(name)
    if not names:
        raise InputError(
            f"lora.targets {config.targets!r} matches no linear layer; {_known(modules)}"
        )
    _check_excludes(config.exclude, modules, skipped)
    _check_patterns(config, names)
    _check_fit(config, modules, names)
    return Selection(names, saved, skipped)


def why_not_linear(module: nn.Module) -> str | None:
    """None for a linear layer that can be adapted (or is), else the reason."""
    if isinstance(module, LoraLinear | NF4Linear):
        return None
    kind = type(module).__name__
    if isinstance(module, SavedModule):
        return "another adapter trains it in full"
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return f"a module of class {kind} is not a linear layer"
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return f"its weight is quantised ({kind})"
    return None


def why_not_adaptable(module: nn.Module) -> str | None:
    """None for a linear layer or an embedding that can be adapted (or is), else the reason."""
    if isinstance(module, LoraEmbedding):
        return None
    return why_not_embedding(module) if isinstance(module, nn.Embedding) else why_not_linear(module)


def _chosen(modules: dict[str, nn.Module], targets: str | list[str]) -> list[str]:
    if targets == ALL_LINEAR:
        return [name for name, module in modules.items() if why_not_linear(module) is None]
    if not isinstance(targets, str):
        for target in targets:
            if not any(name_matches([target], name) for name in modules):
                raise InputError(
                    f'LoRA target "{target}" matches no module; {_known(modules, target)}'
                )
    return [name for name in modules if name_matches(targets, name)]


def _saved(modules: dict[str, nn.Module], shared: dict[str, str], wanted: list[str]) -> list[str]:
    for entry in wanted:
        if not any(name_matches([entry], name) for name in modules):
            raise InputError(
                f'lora.modules_to_save "{entry}" matches no module; '
                f"{_nearest(entry, {name.rpartition('.')[2] for name in modules})}"
                "check the names of the model's modules"
            )
    names = [name for name in modules if name_matches(list(wanted), name)]
    for name in names:
        module = modules[name]
        reason = None if isinstance(module, SavedModule) else why_not_saved(module)
        for inner, other in shared.items():
            if f"{inner}.".startswith(f"{name}.") and not f"{other}.".startswith(f"{name}."):
                reason = f"it shares its weight with {other}"
        if any(name.startswith(f"{outer}.") for outer in names):
            reason = "it lies in another one of them"
        if reason is not None:
            raise InputError(
                f"{name} cannot be trained in full: {reason}; take it out of lora.modules_to_save"
            )
    return names


def _why_unwanted(name: str, config: LoraConfig, saved: list[str], is_head: bool) -> str | None:
    """Why a module that could be adapted is left out, if it is."""
    if config.exclude and name_matches(config.exclude, name):
        return "it is in lora.exclude"
    if any(f"{name}.".startswith(f"{module}.") for module in saved):
        return "it is in lora.modules_to_save"
    if is_head and config.targets == ALL_LINEAR:
        return "it is the output embedding"
    return None


def _check_excludes(
    exclude: str | list[str], modules: dict[str, nn.Module], skipped: dict[str, str]
) -> None:
    """A name that keeps nothing out is a mistake in writing."""
    for entry in [exclude] if isinstance(exclude, str) else exclude:
        names: str | list[str] = entry if isinstance(exclude, str) else [entry]
        if not any(name_matches(names, name) for name in skipped):
            leaves = {name.rpartition(".")[2] for name in modules}
            raise InputError(
                f'lora.exclude "{entry}" keeps no target out; {_nearest(entry, leaves)}'
                "take it out or correct it"
            )


def _check_patterns(config: LoraConfig, names: list[str]) -> None:
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, setting):
            if not any(pattern_matches(key, name) for name in names):
                leaves = {name.rpartition(".")[2] for name in names}
                raise InputError(
                    f'lora.{setting} "{key}" matches no adapted layer; {_nearest(key, leaves)}'
                    f"the adapted layers are {', '.join(sorted(leaves))}"
                )


def _check_fit(config: LoraConfig, modules: dict[str, nn.Module], names: list[str]) -> None:
    for name in names:
        module = modules[name]
        if isinstance(module, nn.Embedding | LoraEmbedding):
            if config.use_dora:
                raise InputError(
                    f"lora.use_dora does not go with the embedding {name}: the length of a row of "
                    "the whole vocabulary would be taken in each step; leave one of them out"
                )
        elif config.init == "pissa" and config.rank(name) > min(dense_shape(module)):
            raise InputError(
                f'lora.init "pissa" takes at most {min(dense_shape(module))} singular values of '
                f"{name}, and its rank is {config.rank(name)}; lower lora.r or set a rank_pattern"
            )


def _is_container(module: nn.Module) -> bool:
    """A block or a dropout, which a regular expression may happen to match."""
    own = next(module.parameters(recurse=False), None)
    return own is None and not isinstance(module, Adapted)


def _head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_output_embeddings", lambda: None)()


def _known(modules: dict[str, nn.Module], target: str = "") -> str:
    """What could have been meant: the nearest name first, then all."""
    linear = (name for name, module in modules.items() if why_not_linear(module) is None)
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    return f"{_nearest(target, leaves)}the model's linear layers are {', '.join(leaves) or 'none'}"


def _nearest(name: str, known: set[str] | list[str]) -> str:
    near = get_close_matches(name, sorted(known), n=1)
    return f'did you mean "{near[0]}"? ' if near else ""


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Module name -> the name of another module with the very same weight."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    return {
        name: names[1] if name == names[0] else names[0]
        for names in owners.values()
        if len(names) > 1
        for name in names
    }
