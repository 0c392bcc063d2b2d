"""prefopt: preference optimisation for language models in plain PyTorch.

Every public name is importable from here and loaded on first use, so that `import prefopt` costs
nothing: `prefopt.token_logprobs` imports `prefopt.logprobs`, and only that.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it (a name equal to its module's own is the module itself)
_MODULE_OF = {
    "InputError": "errors",
    "token_logprobs": "logprobs",
    "token_logprobs_and_reference": "logprobs",
    "shard_statistics": "logprobs",
    "join_shards": "logprobs",
    "gather_logprobs": "logprobs",
    "sequence_logprobs": "logprobs",
    "losses": "losses",
    "PairLogps": "losses",
    "LOSSES": "losses",
    "REFERENCE_FREE": "losses",
    "WHOLE_BATCH": "losses",
    "loss_from": "loss_names",
    "f_divergence": "shaping",
    "desensitised": "shaping",
    "wpo_weights": "shaping",
    "bradley_terry": "ranking",
    "plackett_luce": "ranking",
    "Message": "data.records",
    "Pair": "data.records",
    "Dialogue": "data.records",
    "Ranking": "data.records",
    "Feedback": "data.records",
    "Candidates": "data.records",
    "DataReport": "data.records",
    "load_preferences": "data.sources",
    "load_dialogues": "data.dialogues",
    "load_rankings": "data.rankings",
    "load_feedback": "data.feedback",
    "load_prompts": "data.prompts",
    "mix": "data.mixing",
    "make_pairs": "pair_making",
    "encode_pairs": "data.encode",
    "encode_dialogues": "data.encode_dialogues",
    "encode_rankings": "data.encode_rankings",
    "encode_feedback": "data.encode",
    "Batch": "data.packing",
    "pack": "data.packing",
    "LoraConfig": "nn.lora_config",
    "add_lora": "nn.lora",
    "adapters": "nn.lora",
    "merge_lora": "nn.merge",
    "unmerge": "nn.merge",
    "quantize_nf4": "nn.nf4",
    "dequantize_nf4": "nn.nf4",
    "Packed4": "nn.nf4",
    "NF4Linear": "nn.nf4_linear",
    "quantize_model": "nn.quantize",
    "save_bnb": "nn.bnb_format",
    "load_bnb": "nn.bnb_format",
    "save_adapter": "nn.peft_format",
    "load_adapter": "nn.peft_format",
    "TrainConfig": "config",
    "Policy": "policy",
    "ReferenceCache": "reference",
    "optimizer_step": "step",
    "DPO": "objectives.dpo",
    "KTO": "objectives.kto",
    "SFT": "objectives.sft",
    "Reward": "objectives.reward",
    "evaluate": "evaluate",
    "train": "train",
    "load_reward": "rewards",
    "train_ppo": "online",
    "PPOConfig": "online_config",
    "KLConfig": "online_config",
    "PPO": "objectives.ppo",
    "gae": "rl",
    "group_advantages": "rl",
    "advantages": "rl",
    "ESTIMATORS": "rl",
    "kl_estimate": "rl",
    "shape_rewards": "rl",
    "whiten": "rl",
    "moments": "rl",
    "RunningMoments": "rl",
    "AdaptiveKL": "rl",
    "ppo_policy_loss": "rl_losses",
    "gspo_policy_loss": "rl_losses",
    "cispo_policy_loss": "rl_losses",
    "reinforce_policy_loss": "rl_losses",
    "policy_loss_from": "rl_losses",
    "POLICY_LOSSES": "rl_losses",
    "ppo_value_loss": "rl_losses",
    "kl_loss": "rl_losses",
    "importance_weights": "rl_losses",
    "aggregate": "rl_losses",
    "SamplingParams": "rollout.types",
    "Sample": "rollout.types",
    "RolloutEngine": "rollout.types",
    "TorchEngine": "rollout.torch_engine",
    "ContinuousEngine": "rollout.continuous",
    "add_critic": "roles",
    "add_reward_role": "roles",
    "iterate": "rounds",
    "Run": "train",
}
_FUNCTIONS_NAMED_LIKE_THEIR_MODULE = ("evaluate", "train")

# `X as X`, because that is how a type checker knows a re-export; a test keeps both lists equal.
if TYPE_CHECKING:
    from prefopt import evaluate as evaluate
    from prefopt import losses as losses
    from prefopt import train as train
    from prefopt.config import TrainConfig as TrainConfig
    from prefopt.data.dialogues import load_dialogues as load_dialogues
    from prefopt.data.encode import encode_feedback as encode_feedback
    from prefopt.data.encode import encode_pairs as encode_pairs
    from prefopt.data.encode_dialogues import encode_dialogues as encode_dialogues
    from prefopt.data.encode_rankings import encode_rankings as encode_rankings
    from prefopt.data.feedback import load_feedback as load_feedback
    from prefopt.data.mixing import mix as mix
    from prefopt.data.packing import Batch as Batch
    from prefopt.data.packing import pack as pack
    from prefopt.data.prompts import load_prompts as load_prompts
    from prefopt.data.rankings import load_rankings as load_rankings
    from prefopt.data.records import Candidates as Candidates
    from prefopt.data.records import DataReport as DataReport
    from prefopt.data.records import Dialogue as Dialogue
    from prefopt.data.records import Feedback as Feedback
    from prefopt.data.records import Message as Message
    from prefopt.data.records import Pair as Pair
    from prefopt.data.records import Ranking as Ranking
    from prefopt.data.sources import load_preferences as load_preferences
    from prefopt.errors import InputError as InputError
    from prefopt.logprobs import gather_logprobs as gather_logprobs
    from prefopt.logprobs import join_shards as join_shards
    from prefopt.logprobs import sequence_logprobs as sequence_logprobs
    from prefopt.logprobs import shard_statistics as shard_statistics
    from prefopt.logprobs import token_logprobs as token_logprobs
    from prefopt.logprobs import token_logprobs_and_reference as token_logprobs_and_reference
    from prefopt.loss_names import loss_from as loss_from
    from prefopt.losses import LOSSES as LOSSES
    from prefopt.losses import REFERENCE_FREE as REFERENCE_FREE
    from prefopt.losses import WHOLE_BATCH as WHOLE_BATCH
    from prefopt.losses import PairLogps as PairLogps
    from prefopt.nn.bnb_format import load_bnb as load_bnb
    from prefopt.nn.bnb_format import save_bnb as save_bnb
    from prefopt.nn.lora import adapters as adapters
    from prefopt.nn.lora import add_lora as add_lora
    from prefopt.nn.lora_config import LoraConfig as LoraConfig
    from prefopt.nn.merge import merge_lora as merge_lora
    from prefopt.nn.merge import unmerge as unmerge
    from prefopt.nn.nf4 import Packed4 as Packed4
    from prefopt.nn.nf4 import dequantize_nf4 as dequantize_nf4
    from prefopt.nn.nf4 import quantize_nf4 as quantize_nf4
    from prefopt.nn.nf4_linear import NF4Linear as NF4Linear
    from prefopt.nn.peft_format import load_adapter as load_adapter
    from prefopt.nn.peft_format import save_adapter as save_adapter
    from prefopt.nn.quantize import quantize_model as quantize_model
    from prefopt.objectives.dpo import DPO as DPO
    from prefopt.objectives.kto import KTO as KTO
    from prefopt.objectives.ppo import PPO as PPO
    from prefopt.objectives.reward import Reward as Reward
    from prefopt.objectives.sft import SFT as SFT
    from prefopt.online import train_ppo as train_ppo
    from prefopt.online_config import KLConfig as KLConfig
    from prefopt.online_config import PPOConfig as PPOConfig
    from prefopt.pair_making import make_pairs as make_pairs
    from prefopt.policy import Policy as Policy
    from prefopt.ranking import bradley_terry as bradley_terry
    from prefopt.ranking import plackett_luce as plackett_luce
    from prefopt.reference import ReferenceCache as ReferenceCache
    from prefopt.rewards import load_reward as load_reward
    from prefopt.rl import ESTIMATORS as ESTIMATORS
    from prefopt.rl import AdaptiveKL as AdaptiveKL
    from prefopt.rl import RunningMoments as RunningMoments
    from prefopt.rl import advantages as advantages
    from prefopt.rl import gae as gae
    from prefopt.rl import group_advantages as group_advantages
    from prefopt.rl import kl_estimate as kl_estimate
    from prefopt.rl import moments as moments
    from prefopt.rl import shape_rewards as shape_rewards
    from prefopt.rl import whiten as whiten
    from prefopt.rl_losses import POLICY_LOSSES as POLICY_LOSSES
    from prefopt.rl_losses import aggregate as aggregate
    from prefopt.rl_losses import cispo_policy_loss as cispo_policy_loss
    from prefopt.rl_losses import gspo_policy_loss as gspo_policy_loss
    from prefopt.rl_losses import importance_weights as importance_weights
    from prefopt.rl_losses import kl_loss as kl_loss
    from prefopt.rl_losses import policy_loss_from as policy_loss_from
    from prefopt.rl_losses import ppo_policy_loss as ppo_policy_loss
    from prefopt.rl_losses import ppo_value_loss as ppo_value_loss
    from prefopt.rl_losses import reinforce_policy_loss as reinforce_policy_loss
    from prefopt.roles import add_critic as add_critic
    from prefopt.roles import add_reward_role as add_reward_role
    from prefopt.rollout.continuous import ContinuousEngine as ContinuousEngine
    from prefopt.rollout.torch_engine import TorchEngine as TorchEngine
    from prefopt.rollout.types import RolloutEngine as RolloutEngine
    from prefopt.rollout.types import Sample as Sample
    from prefopt.rollout.types import SamplingParams as SamplingParams
    from prefopt.rounds import iterate as iterate
    from prefopt.shaping import desensitised as desensitised
    from prefopt.shaping import f_divergence as f_divergence
    from prefopt.shaping import wpo_weights as wpo_weights
    from prefopt.step import optimizer_step as optimizer_step
    from prefopt.train import Run as Run

__all__ = list(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULE_OF[name]}")
    value = (
        module if name == _MODULE_OF[name] and not hasattr(module, name) else getattr(module, name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


class _Package(ModuleType):
    """Importing a submodule binds it as an attribute of its package, so `prefopt.train` would turn
    from the function into the module once anything ran `import prefopt.train`. Here the function
    stays; the module is `sys.modules["prefopt.train"]`: `from prefopt.train import ...` works."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FUNCTIONS_NAMED_LIKE_THEIR_MODULE and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
