"""A transformers model whose parameters have no memory, to be filled tensor by tensor."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.errors import InputError
from prefopt.nn import heads
from prefopt.nn.tensor_files import TensorFiles


def read_config(base: str | Path) -> Any:
    """The configuration of a model folder or hub id; every failure is an InputError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base)
    except Exception as error:  # a damaged file raises whatever its parser likes
        raise InputError(f"cannot read the model config of {base}: {first_line(error)}") from None


def scores_texts(config: Any) -> bool:
    """Whether the weights that the config stands beside are those of a sequence classifier."""
    return any(n.endswith("ForSequenceClassification") for n in config.architectures or ())


def auto_class(config: Any, head: str) -> Any:
    """transformers' loader of models with this kind of head. Where the head of a reward model will
    be a new one, the config is made to ask for one score."""
    import transformers

    if head == heads.LM:
        return transformers.AutoModelForCausalLM
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"transformers has no sequence classification for {config.model_type} models, so they "
            "cannot be reward models; use another base model"
        )
    if not scores_texts(config):
        config.num_labels = 1
        config.problem_type = "regression"  # or pipelines and servers put a sigmoid on the score
    return transformers.AutoModelForSequenceClassification


def empty_model(config: Any, dtype: torch.dtype, head: str = heads.LM) -> Any:
    """The model of `config` in evaluation mode, a language or a reward model: parameters on the
    meta device and tied as the config says, buffers (of positions, mostly) real and initialised.
    The head of a reward model is in float32, and there if the files will not have it."""
    loader, fresh = auto_class(config, head), head == heads.SCORE and not scores_texts(config)
    try:
        with _meta_parameters(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = loader.from_config(config, dtype=dtype)
    except Exception as error:
        raise InputError(
            f"cannot build a {what(head)} of type {config.model_type}: {first_line(error)}"
        ) from None
    if head == heads.SCORE:
        heads.check_score_head(model)
        heads.widen_score(model)
        if fresh:
            model.score.to_empty(device="cpu")
    return model.eval()


def what(head: str) -> str:
    """For messages."""
    return "causal language model" if head == heads.LM else "reward model"


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Inside, a parameter that a module registers moves to the meta device. What torch.empty
    reserved for it was never touched, so it never became memory."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = _like(param, param.detach().to("meta"))
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class Places:
    """Where the tensors of a model's state stand: name -> all names of the very same tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        groups: defaultdict[int, list[str]] = defaultdict(list)
        self.tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        for name, tensor in self.tensors.items():
            groups[id(tensor)].append(name)
        self.names = {name: group for group in groups.values() for name in group}

    def fill(self, name: str, tensor: Tensor, device: torch.device) -> None:
        """Puts `tensor` at `name` and where that is tied to, in the dtype the model has there."""
        path, _, leaf = name.rpartition(".")
        # What is there now: a quantised layer has frozen its bias.
        old = getattr(self.model.get_submodule(path), leaf)
        new = tensor.to(device, old.dtype)
        if isinstance(old, nn.Parameter):
            new = _like(old, new)
        for each in self.names[name]:
            path, _, leaf = each.rpartition(".")
            module = self.model.get_submodule(path)
            if isinstance(new, nn.Parameter):
                module._parameters[leaf] = new
            else:
                module._buffers[leaf] = new


def _like(old: nn.Parameter, data: Tensor) -> nn.Parameter:
    """`data` as a parameter that requires gradients, and has attributes, as `old`."""
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    return new


def mismatch(
    places: Places, names: set[str], files: TensorFiles, *, fresh_head: bool = False
) -> str | None:
    """Why the tensors called `names` in the files are not those of the model one to one; or None.

    Of tied tensors one is enough; two must be equal. What the model class says it does not need
    may be there. fresh_head: the files are a language model's, whose head the model has not.
    """
    if changed := _converted(places.model, names):
        return f"transformers converts {changed} on loading"
    missing = {name for name, group in places.names.items() if names.isdisjoint(group)}
    unknown = names - places.names.keys() - _ignored(places.model, names)
    if fresh_head:
        prefix = f"{places.model.base_model_prefix}."
        missing -= {f"{heads.SCORE}.weight"}
        unknown = {name for name in unknown if name.startswith(prefix)}
    if missing:
        return f"the files lack {min(missing)}"
    if extra := sorted(unknown):
        return f"the model has no {extra[0]}"
    for group in places.names.values():
        both = [name for name in group if name in names]
        if len(both) > 1:
            first, *others = files.read(*both)
            if not all(torch.equal(first, other) for other in others):
                return f"{both[0]} and {both[1]} differ, which the config ties"
    return None


def _ignored(model: Any, names: set[str]) -> set[str]:
    """Of the names those that transformers drops: what old versions saved, or other heads."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    patterns += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _converted(model: Any, names: set[str]) -> str | None:
    """A tensor whose values, not only its name, transformers changes on loading (fused experts)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # not public: names and shapes then decide alone
        return None
    for change in get_model_conversion_mapping(model):
        if isinstance(change, WeightConverter):
            for name in sorted(names):
                if change.rename_source_key(name)[1] is not None:
                    return name
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
