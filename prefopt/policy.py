"""Policy: one module whose forward goes from a Batch to per-token log-probs, or to scores.

Hidden states become either inside this forward and nowhere else, because DDP and FSDP only
synchronise what runs inside a module's own forward.

Shapes: T tokens, N scored tokens, R responses, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt import attention, fingerprint, loading, moving, role_parameters, saving, sharing
from prefopt.attention import NAME, Runs
from prefopt.data.encode import encode_prompts
from prefopt.data.packing import Batch, Layout
from prefopt.data.records import Message
from prefopt.errors import InputError
from prefopt.nn import heads, padding
from prefopt.nn import lora as lora_module
from prefopt.nn.heads import ScoreStats
from prefopt.nn.linear import use_onednn
from prefopt.nn.lora import LoraConfig, LoraLinear
from prefopt.nn.peft_format import load_adapter
from prefopt.nn.quantize import QuantReport
from prefopt.nn.rmsnorm import use_lean_rmsnorm
from prefopt.nn.swiglu import use_lean_swiglu
from prefopt.role_parameters import VALUE
from prefopt.rollout.stops import as_text, stop_ids
from prefopt.rollout.torch_engine import TorchEngine
from prefopt.rollout.types import Generation, SamplingParams

ADAPTER, REFERENCE = "default", "reference"


class Policy(nn.Module):
    """A causal language model or a reward model, its tokenizer, and what it takes to score with it.

    A reward model is one with a linear layer ``score`` on the hidden state of a text's last token.
    ``reference()`` switches to the starting policy: the base with its adapters off if the adapter
    started at zero, a frozen copy of the adapter if it did not. ``roles`` gives a policy a critic,
    and reward models that share its base.
    """

    def __init__(self, model: Any, tokenizer: Any, *, base: str, attention: str = "auto"):
        super().__init__()
        self.model, self.tokenizer, self.base = model, tokenizer, base
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype: torch.dtype = next(floating)  # what it computes in: 4-bit weights are uint8
        self.kind: str | None = None  # "nf4" or "fp4" where dense weights were quantised on loading
        self.quant_report: QuantReport | None = None
        self.autocast: torch.dtype | None = None
        self.adapter: str | None = None
        self.moved: dict[str, Tensor] | None = None  # weights of a reference that follows (TR-DPO)
        self.lora_report = None
        self.critic_kind: str | None = None  # "trunk", "adapter" or "model" (see roles.add_critic)
        self.value_head: nn.Linear | None = None
        self.reward_heads = nn.ModuleDict()  # of reward models on this base, by their adapters
        self._switched: tuple[list[Any], str] | None = None  # modules and the role they have now
        loading.remove_dropout(model)
        use_lean_swiglu(model)
        use_lean_rmsnorm(model)
        if next(model.parameters()).device.type == "cpu":
            use_onednn(model)
        own = model.config._attn_implementation
        self._own_attention = "sdpa" if own == NAME else own  # a model that was a policy's before
        self.attend(self._own_attention)
        self.is_reward_model = hasattr(model, heads.SCORE)
        self.score_stats: ScoreStats | None = None  # of a reward model, on reference responses
        self._head_options: dict[str, Any] = {}
        self.new_padding = False  # whether the tokenizer pads in another way than its files say
        if self.is_reward_model:
            heads.check_score_head(model)
            heads.widen_score(model)
            self.new_padding = padding.set_padding(model, tokenizer)
            heads.check_scores(model)
        else:
            self._head_options = heads.head_options(model)
        self.head_size = 0  # of the largest attention head
        self.layout_reason: str | None = None
        if attention not in ("auto", "padded"):
            raise InputError(f"attention is 'auto' or 'padded', not {attention!r}")
        asked = "attention='padded' was asked for" if attention == "padded" else None
        self.layout_reason = asked or sharing.why_not(self)
        if self.layout_reason:
            self.attend(self._own_attention)
        self._key_cache: tuple[int, dict[str, str]] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        head: str | None = None,
        lora: LoraConfig | None = None,
        quantize: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        attention: str = "auto",
    ) -> Policy:
        """Load a model folder, an adapter folder, a run folder, a hub id or "embedded".

        ``head``: "score" makes a reward model of a language model, whose new head is drawn from
        torch's generator and always trains; None is what the folder holds. ``lora`` adds a fresh
        adapter; an adapter folder is loaded as a trainable one. ``quantize``: "nf4" or "fp4" makes
        the linear layers 4-bit while they are read; None leaves them as they are stored, under an
        adapter as they were when it was trained, and "none" dense under that too. ``dtype`` and
        ``device``: see ``loading``. ``attention``: "auto" shares prompts where the model allows it,
        "padded" never. Raises InputError for anything that cannot be loaded.
        """
        source, where = loading.resolve(path), loading.pick_device(device)
        if source.adapter is not None and lora is not None:
            raise InputError(f"{path} is an adapter already; give lora=None to train it further")
        kind = source.kind if quantize is None else quantize
        kind = None if kind in (None, "none") else loading.check_kind(kind)
        dense = loading.pick_dtype(dtype, where)
        head = loading.pick_head(source, head)
        model, tokenizer, report = loading.load_model(source.base, dense, where, kind, head)
        policy = cls(model, tokenizer, base=loading.absolute(source.base), attention=attention)
        policy.quant_report = report
        policy.kind = kind if report else None  # no report: the folder says it itself
        if source.adapter is not None:
            load_adapter(model, source.adapter, ADAPTER)
            policy._adapter_added()
        elif lora is not None:
            if policy.is_reward_model:
                lora = heads.with_score(lora)
            policy.lora_report = lora_module.add_lora(model, lora, ADAPTER)
            policy._adapter_added()
        if policy.is_reward_model:
            policy.score_stats = ScoreStats.read(source.folder)
        return policy

    def _adapter_added(self) -> None:
        self.adapter = ADAPTER
        head = self.model.get_output_embeddings()
        if isinstance(head, LoraLinear) and ADAPTER in head.m:
            raise InputError(
                "DoRA on the output head is not supported; take lm_head out of lora.targets, or "
                "train the head in full with lora.modules_to_save"
            )
        if not lora_module.is_zero_adapter(self.model, ADAPTER):
            lora_module.copy_adapter(self.model, ADAPTER, REFERENCE)

    # -- what runs

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def layout(self) -> Layout:
        return "shared" if self.layout_reason is None else "padded"

    @property
    def attention_class(self) -> str:
        """What attention computes with; part of the key of cached reference log-probs."""
        if self.layout == "padded":
            return f"padded-{self._own_attention}"
        probe = torch.empty(0, self.head_size, dtype=self.autocast or self.dtype)
        obstacle = attention.varlen_obstacle(probe.to(self.device))
        return "shared-runs" if obstacle else "shared-varlen"

    def forward(
        self,
        batch: Batch,
        *,
        collisions: bool = False,
        temperature: float = 1.0,
        entropy: bool = False,
        values: bool = False,
        role: str | None = None,
        closed: tuple[int, tuple[int, ...]] | None = None,
    ) -> Any:
        """Log-probs of ``batch.targets`` under the active adapter, [N] float32; of a reward model
        the scores of the responses, [R] float32.

        ``temperature`` divides the logits. ``closed`` (m, ids): among the first m tokens of a
        response these ids have probability 0 (SamplingParams.min_new_tokens). With ``entropy``
        also the entropy of each of these tokens' distributions in nats, [N]; with ``collisions``
        log sum_v pi(v)^2, [N] float32 without gradient: how probable it is that two draws agree;
        with ``values`` (last) what the
        critic expects before each of these tokens, [N] float32. Of a ``role`` instead: "value",
        (these values, [N]; those behind each response, [R], or None without ``batch.end_rows``);
        the name of a reward model on this base, its scores [R].
        """
        device = self.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            if role == VALUE:
                return self._values(batch, self._states(batch, role))
            if role is not None:
                rows = _rows_of_ends(batch)
                hidden = self._states(batch, role).index_select(0, _round_up(rows, 16))
                return heads.scores(self.reward_heads[role], hidden)[: len(rows)]
            return self._own(batch, collisions, temperature, entropy, values, closed)

    def _own(
        self,
        batch: Batch,
        collisions: bool,
        temperature: float,
        entropy: bool,
        values: bool,
        closed: tuple[int, tuple[int, ...]] | None,
    ) -> Any:
        """What forward gives under the active adapter."""
        rows, n = batch.score_rows, len(batch.targets)
        if self.is_reward_model:
            rows = _rows_of_ends(batch)
        states = self._states(batch)
        hidden = states.index_select(0, _round_up(rows, 16))
        if self.is_reward_model:
            return heads.scores(self.model.score, hidden)[: len(rows)]
        targets = _round_up(batch.targets, 16)
        options = {**self._head_options, "temperature": temperature}
        found = heads.word_logprobs(self.model, hidden, targets, options, collisions, entropy)
        columns = [column[:n] for column in found]
        if closed is not None:
            early = batch.places < closed[0]
            rest = heads.log_rest(self.model, hidden[:n][early], closed[1], options)
            columns[0] = columns[0].index_put((early,), columns[0][early] - rest)
        if values:
            own = states if self.critic_kind != "adapter" else self._states(batch, VALUE)
            columns.append(self._values(replace(batch, end_rows=None), own)[0])
        return tuple(columns) if len(columns) > 1 else columns[0]

    def _states(self, batch: Batch, role: str | None = None) -> Tensor:
        """Last hidden states, [rows * row length, D], under the adapter of a role or the active
        one."""
        if role is None or (role == VALUE and self.critic_kind != "adapter"):
            return self._hidden(batch).flatten(0, -2)
        with lora_module.adapters(self.model, role) as modules:
            self._switched = modules, role
            try:
                return self._hidden(batch).flatten(0, -2)
            finally:
                self._switched = None

    def _values(self, batch: Batch, states: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.value_head is None:
            raise InputError(f"{self.base} has no critic here; roles.add_critic gives it one")
        n, ends = len(batch.score_rows), batch.end_rows
        rows = batch.score_rows if ends is None else torch.cat([batch.score_rows, ends])
        hidden = states.index_select(0, _round_up(rows, 16))
        found = heads.scores(self.value_head, hidden)[: len(rows)]
        return found[:n], None if ends is None else found[n:]

    def values(self, batch: Batch, *, ends: bool = False) -> Any:
        """What the critic expects before each of ``batch.targets``, [N] float32; with ``ends`` also
        behind the last token of each response, [R], of a batch packed with ``ends=True``."""
        if ends:
            _rows_of_ends(batch)
        found = self(batch, role=VALUE)
        return found if ends else found[0]

    def scores(self, batch: Batch) -> Tensor:
        """Scores of the responses of a reward model, [R] float32; the batch is packed with
        ``ends=True``."""
        if not self.is_reward_model:
            raise InputError(f"{self.base} is a language model; load it with head='score'")
        return self(batch)

    def normalised(self, scores: Tensor) -> Tensor:
        """Scores with mean 0 and standard deviation 1 on the reference responses."""
        if self.score_stats is None:
            raise InputError(f"{self.base} has no {heads.STATS}: its scores have no known scale")
        return self.score_stats.apply(scores)

    def _hidden(self, batch: Batch) -> Tensor:
        """Last hidden states, [rows, row length, D]."""
        backbone = heads.backbone(self.model)
        ids = batch.input_ids.view(batch.shape)
        if batch.layout == "shared":
            if self.layout == "padded":
                raise InputError(f"this model needs pack(layout='padded'): {self.layout_reason}")
            self.attend(NAME)
            runs = Runs(batch.segments, ids.device)
            ids, positions = (_round_up(x, 32)[None] for x in (batch.input_ids, batch.position_ids))
            out = backbone(ids, position_ids=positions, segments=runs, use_cache=False)
            return out.last_hidden_state
        # Padding stands behind each row, where causal attention never looks: no mask is needed.
        self.attend(self._own_attention)
        return backbone(ids, use_cache=False).last_hidden_state

    def attend(self, implementation: str) -> None:
        """Compute attention so from now on: not switched back after a forward, because gradient
        checkpointing runs it again in backward."""
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, under the roles they had in forward."""
        model = self.model  # whose method transformers 5.23 renamed
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": self._in_and_again})

    def _in_and_again(self) -> tuple[Any, Any]:
        """The contexts of a forward and of its repetition in backward."""
        nothing, now = contextlib.nullcontext(), self._switched
        return nothing, nothing if now is None else lora_module.switched(*now)

    @contextlib.contextmanager
    def plain_attention(self) -> Iterator[None]:
        """transformers' own attention and masks, for what is not a Batch."""
        before = self.model.config._attn_implementation
        self.attend(self._own_attention)
        try:
            yield
        finally:
            self.attend(before)

    # -- the reference

    @property
    def has_reference_copy(self) -> bool:
        """Whether the reference is a frozen copy of the adapter, not the base without it."""
        return REFERENCE in lora_module.adapter_names(self.model)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, forward computes the starting policy; dropout is off."""
        training = self.training
        self.eval()
        with contextlib.ExitStack() as stack:
            if self.moved is not None:
                stack.enter_context(moving.swapped(self.trainable(), self.moved))
            elif self.adapter is not None:
                name = REFERENCE if self.has_reference_copy else None
                stack.enter_context(lora_module.adapters(self.model, name))
            try:
                yield
            finally:
                self.train(training)

    def reference_key(self) -> dict[str, str]:
        """What a reference log-prob depends on: weights (and a non-zero adapter), dtype, attention.

        Hashed again only after an in-place change of a weight.
        """
        version = sum(t._version for _, t in fingerprint.tensors(self.model, REFERENCE))
        if self._key_cache is None or self._key_cache[0] != version:
            autocast = f" autocast {self.autocast}" if self.autocast else ""
            key = {
                "weights": fingerprint.digest(self.model, REFERENCE),
                "dtype": f"{self.dtype}{autocast}".replace("torch.", ""),
                "attention": self.attention_class,
            }
            self._key_cache = (version, key)
        return dict(self._key_cache[1])

    # -- training, generating, saving

    def trainable(self, role: str = "policy") -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of what an optimizer moves: the adapter, or every weight. The role
        "value" is the critic, the head and what it has to itself."""
        named = role_parameters.named(self, role)
        return [(name, p) for name, p in named if p.requires_grad]

    def resumable(self, role: str = "policy") -> list[tuple[str, nn.Parameter]]:
        """What a checkpoint holds: what trains, and where PiSSA started, which another machine's
        singular vectors would not give to the bit."""
        starts = (f".A0.{ADAPTER}", f".B0.{ADAPTER}", f".A0.{VALUE}", f".B0.{VALUE}")
        named = role_parameters.named(self, role)
        return [(name, p) for name, p in named if p.requires_grad or name.endswith(starts)]

    def parameter_groups(
        self, lr: float, lora_plus: float = 1.0, *, role: str = "policy"
    ) -> list[dict[str, Any]]:
        """What an optimizer takes; with ``lora_plus``, LoRA's B learns so many times as fast as A.

        InputError where there is nothing to train: 4-bit weights without an adapter.
        """
        return role_parameters.groups(self, lr, lora_plus, role)

    def use_float32_masters(self) -> None:
        """For full fine-tuning in 16 bits: float32 weights, computed with under autocast.

        A learning rate of 1e-6 moves a bfloat16 weight by less than its last bit.
        """
        if self.adapter is None and self.dtype.itemsize == 2:
            self.autocast = self.dtype
            self.model.float()
            self._key_cache = None

    def generate(
        self,
        prompts: Sequence[str | list[Message]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        n: int = 1,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: str | Sequence[str] = (),
        min_new_tokens: int = 0,
        batch_size: int = 64,
        template: str = "auto",
    ) -> list[Generation]:
        """n responses per prompt, those of one prompt side by side. A prompt is a string (one user
        turn) or messages. Temperature 0: greedy. ``batch_size``: how many are written at a time,
        which changes nothing else; the rest is told at SamplingParams."""
        if self.is_reward_model:
            raise InputError(f"{self.base} is a reward model: it scores text and cannot write any")
        turns = [[Message("user", p)] if isinstance(p, str) else p for p in prompts]
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )
        ids = encode_prompts(turns, self.tokenizer, template)
        engine = TorchEngine(self, slots=batch_size)
        stops = stop_ids(params, self.model, self.tokenizer)
        samples = engine.generate(ids, params, n=n, seed=seed)
        return [as_text(s, params, stops, self.tokenizer) for group in samples for s in group]

    def save_pretrained(self, folder: str | Path) -> None:
        """A PEFT adapter folder, or of a model without adapter a folder for transformers and vLLM.

        Of a reward model one for AutoModelForSequenceClassification. Written beside and renamed, so
        that a folder of this name is whole or not there.
        """
        saving.save_policy(self, Path(folder))


def _rows_of_ends(batch: Batch) -> Tensor:
    if batch.end_rows is None:
        raise InputError(
            "what is read at the last token of each response, as the scores of a reward model are, "
            "needs batches of pack(..., ends=True)"
        )
    return batch.end_rows


def _round_up(x: Tensor, multiple: int) -> Tensor:
    """On the CPU, x padded with zeros to a multiple: oneDNN compiles (milliseconds) and keeps
    (megabytes) a kernel for every new number of rows. What is added is neither seen nor scored."""
    extra = -len(x) % multiple if x.device.type == "cpu" else 0
    return torch.nn.functional.pad(x, (0, extra)) if extra else x
