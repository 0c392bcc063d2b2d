"""Iterative DPO: sample with the current policy, rank, pair, train, and again.

Round k (1, 2, ...) starts from the policy of round k - 1, which is its reference too. Its folder is
an ordinary run folder and holds besides

    responses.jsonl  responses_scores.jsonl   answers of policy k - 1 to the prompts of the round
    pairs.jsonl                               the pairs it trains on, each with its lineage
    held_out.jsonl   held_out_scores.jsonl    answers of policy k to the held-out prompts

and round-0 the answers of the model before the first round to the held-out prompts. The held-out
pairs of round k are made of the answers of policy k - 1. Everything is a function of (prompts,
rewards, configuration, seed), and every stage leaves a file, so a resumed iteration goes on at the
stage that it had reached.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt import loading
from prefopt.config import TrainConfig
from prefopt.data.pairing import check_pairing
from prefopt.data.prompts import columns_of, load_prompts
from prefopt.data.records import Message, Pair
from prefopt.data.sources import load_preferences
from prefopt.data.split import split_pairs
from prefopt.errors import InputError
from prefopt.metrics import Progress
from prefopt.nn.lora_config import LoraConfig
from prefopt.objectives.dpo import DPO
from prefopt.policy import Policy
from prefopt.rewards import Reward, check_columns, combine, load_rewards
from prefopt.round_files import RoundsFile, described, digest, figures, show, spelled
from prefopt.round_pairs import AsSampled, held_out_batches, judge, pair_rows
from prefopt.sampling import (
    Answers,
    Sampler,
    answer_all,
    prompt_ids,
    promptly,
    write_rows,
)
from prefopt.stop import Stopped, StopSignal
from prefopt.terminal import say
from prefopt.train import train

HELD_OUT, ROUND = 0, 1  # places of seeds
PASSING = ("out", "resume", "cache", "save_every", "keep", "log_every", "parallel")


@dataclasses.dataclass(frozen=True)
class RoundResult:
    """One round: its run folder and its row of rounds.json; ``stopped`` before it was done."""

    round: int
    dir: Path
    row: dict[str, Any]
    stopped: bool = False


def iterate(
    model: str | Path,
    prompts: Any,
    rewards: Reward | str | Mapping[str, Reward | str],
    config: TrainConfig,
    *,
    rounds: int,
    objective: Any = None,
    reward_weights: Mapping[str, float] | None = None,
    samples: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    prompts_per_round: int | None = None,
    pairing: str = "best_worst",
    min_gap: float = 0.0,
    lora: LoraConfig | None = LoraConfig(),  # noqa: B008 - frozen
    quantize: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    quiet: bool = False,
    settings: dict[str, Any] | None = None,
) -> list[RoundResult]:
    """Train ``model`` in ``rounds`` rounds on pairs of its own answers, ranked by ``rewards``.

    ``prompts``: what load_prompts takes. ``rewards``: a callable (prompts, responses, **columns) ->
    scores, a name for load_reward, or several as {name: reward}; several are standardised and added
    with ``reward_weights`` (see rewards.combine). ``objective``: DPO() or another on pairs.
    ``samples`` answers to each prompt are paired by ``pairing`` and ``min_gap`` (see
    data.pairing.pair_up); ``prompts_per_round`` takes so many of the prompts, others in each round.
    A response that was cut at ``max_new_tokens`` is trained on without an end. A reward is called
    with the responses to 32 prompts at a time.

    ``config.out`` gets rounds.json and a run folder per round. With ``config.resume`` "auto" an
    unfinished iteration goes on where it was; a finished one is returned as it is, and may be given
    more rounds. SIGTERM and the first Ctrl-C stop it cleanly; then the last result is ``stopped``.
    Raises InputError for bad input, for settings that a resumed iteration did not have, for rewards
    that give no number, and where no pair can be formed.
    """
    if rounds < 1 or (prompts_per_round is not None and prompts_per_round < 1):
        raise InputError("rounds and prompts_per_round must be at least 1")
    if config.resume not in (None, "auto"):
        raise InputError(f"rounds go on with --resume auto, not with {config.resume!r}")
    objective = objective or DPO()
    if not objective.samples or objective.unit == "dialogues":
        raise InputError("rounds train on pairs: the objective is DPO or KTO")
    sampler = Sampler(samples, temperature, max_new_tokens, config.template, config.seed)
    asked, where = load_prompts(prompts), {"device": device, "dtype": dtype}
    judges = load_rewards(rewards, reward_weights, **where)
    check_columns(judges, asked.names)
    pairs = {"pairing": pairing, "min_gap": min_gap}
    check_pairing(pairing, None, min_gap, "drop")
    recorded = {
        "model": str(model),
        "prompts": digest(asked),
        "objective": described(objective),
        "rewards": {name: spelled(reward) for name, reward in judges.items()},
        "reward_weights": reward_weights,
        "sampler": dataclasses.asdict(sampler),
        "prompts_per_round": prompts_per_round,
        **pairs,
        "lora": lora and dataclasses.asdict(lora),
        **{"quantize": quantize, "dtype": str(dtype)},
        "train": {k: v for k, v in dataclasses.asdict(config).items() if k not in PASSING},
        "given": {k: v for k, v in (settings or {}).items() if k != "rounds"},
    }
    file = RoundsFile(Path(config.out), recorded, resuming=config.resume is not None)
    with StopSignal() as stop:
        work = _Rounds(
            model=model, lora=lora, load={"quantize": quantize, **where}, prompts=asked,
            rewards=judges, weights=reward_weights, config=config, objective=objective,
            sampler=sampler, pairing=pairs, per_round=prompts_per_round, file=file,
            settings=settings or {}, quiet=quiet, stop=stop,
        )  # fmt: skip
        stopped = False
        try:
            work.run(rounds)
        except Stopped:
            stopped = True
    results = [RoundResult(k, work.dir(k), row) for k, row in enumerate(file.rows) if k]
    if stopped:
        k = max(len(file.rows), 1)
        results.append(RoundResult(k, work.dir(k), {}, stopped=True))
        if not quiet:
            say(f"stopped in round {k}; --resume auto goes on there")
    return results[:rounds]


@dataclasses.dataclass(kw_only=True)
class _Rounds:
    model: str | Path
    lora: LoraConfig | None
    load: dict[str, Any]
    prompts: Sequence[list[Message]]
    rewards: Mapping[str, Reward]
    weights: Mapping[str, float] | None
    config: TrainConfig
    objective: Any
    sampler: Sampler
    pairing: dict[str, Any]
    per_round: int | None
    file: RoundsFile
    settings: dict[str, Any]
    quiet: bool
    stop: StopSignal
    policy: Any = None  # that of the last round that is done

    def run(self, rounds: int) -> None:
        """Every round that rounds.json has no row of yet, up to ``rounds``."""
        if len(self.file.rows) <= rounds:
            self.load_policy(max(len(self.file.rows) - 1, 0))
            self.split()
        if not self.file.rows:
            self.file.add()
            self.file.add({"round": 0, **self.notes, "held_out": figures(self.held_out(0))})
        for k in range(len(self.file.rows), rounds + 1):
            self.file.add(self.round(k))
        if not self.quiet:
            show(self.file.rows[: rounds + 1])
            say(f"model:  {self.dir(rounds) / 'model'}")

    def dir(self, k: int) -> Path:
        return Path(self.config.out) / f"round-{k}"

    def load_policy(self, k: int) -> None:
        """The policy after round k; after round 0 the model that everything began with."""
        self.policy = None  # frees the memory of the one before
        path = self.dir(k) if k else self.model
        fresh = loading.resolve(path).adapter is None
        torch.manual_seed(self.config.seed)  # the adapter's A is drawn from it
        with promptly(self.stop):
            lora = self.lora if fresh else None
            self.policy = Policy.from_pretrained(path, lora=lora, **self.load)

    def split(self) -> None:
        """Which prompts are asked in training and which are held out, of those that fit."""
        config, limit = self.config, self.sampler.max_new_tokens
        longest = min(config.max_length, loading.context_length(self.policy.model))
        asked = list(self.prompts)
        ids = prompt_ids(asked, self.policy.tokenizer, config.template)
        fitting = [
            i for i, found in enumerate(ids) if found is not None and len(found) + limit <= longest
        ]
        if not fitting:
            raise InputError(
                f"none of the {len(asked):,} prompts leaves room for {limit} new tokens within "
                f"{longest}; lower max_new_tokens or raise max_length"
            )
        places = [Pair(asked[i], [], []) for i in fitting]
        train_at, held_at = split_pairs(places, config.eval_fraction)
        self.train_on, self.held = ([fitting[i] for i in at] for at in (train_at, held_at))
        self.notes = {
            "prompts": len(self.train_on),
            "held-out prompts": len(self.held),
            "prompts without room": len(asked) - len(fitting),
        }
        if not self.quiet:
            say(f"{len(self.train_on):,} prompts to train on, {len(self.held):,} held out")
            if len(fitting) < len(asked):
                say(
                    f"left out {len(asked) - len(fitting):,}: they leave no room for {limit} new "
                    f"tokens within {longest}"
                )

    # -- one round

    def round(self, k: int) -> dict[str, Any]:
        """Sample, rank, pair and train; the row of rounds.json."""
        if not self.quiet:
            say(f"round {k}", "bold")
        answers, held = self.sampled(k), self.held_out(k - 1)
        rows, dropped = self.pairs(k, answers, held)
        objective = AsSampled(self.objective, rows)
        judged = [row for row in rows if row["lineage"]["held_out"]]
        pairs = load_preferences(self.dir(k) / "pairs.jsonl")
        batches = held_out_batches(objective, self.policy, pairs, rows, self.config, self.stop)
        self.train(k, objective, pairs, bool(judged))
        self.load_policy(k)
        return {
            "round": k,
            "prompts": len(answers),
            "samples": sum(len(a.responses) for a in answers),
            "pairs": len(rows) - len(judged),
            "held_out_pairs": len(judged),
            "dropped": dropped,
            "sampled": figures(answers),
            "evaluation": judge(objective, self.policy, batches, rows, self.stop),
            "held_out": figures(self.held_out(k)),
        }

    def sampled(self, k: int) -> list[Answers]:
        """Answers of the policy before round k to the prompts of the round."""
        numbers, m = self.train_on, self.per_round
        if m is not None and m < len(numbers):
            order = np.random.default_rng((self.config.seed, len(numbers))).permutation(numbers)
            numbers = sorted(order[((k - 1) * m + np.arange(m)) % len(order)].tolist())
        return self._answers(numbers, self.dir(k) / "responses.jsonl", (ROUND, k))

    def held_out(self, k: int) -> list[Answers]:
        """Answers of the policy after round k to the held-out prompts."""
        return self._answers(self.held, self.dir(k) / "held_out.jsonl", (HELD_OUT, k))

    def _answers(self, numbers: list[int], path: Path, place: tuple[int, int]) -> list[Answers]:
        if not numbers:
            return []
        prompts = {number: self.prompts[number] for number in numbers}
        with Progress(quiet=self.quiet) as progress:
            return answer_all(
                self.policy, prompts, self.rewards, self.sampler, path, place, progress, self.stop,
                columns=partial(columns_of, self.prompts),
            )  # fmt: skip

    def pairs(
        self, k: int, answers: list[Answers], held: list[Answers]
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """pairs.jsonl, and why answers made no pair. Rewards are weighed over all these samples."""
        both, n = [*answers, *held], self.sampler.n
        scores = {name: [s for a in both for s in a.scores[name]] for name in self.rewards}
        scales = {name: getattr(r, "score_stats", None) for name, r in self.rewards.items()}
        flat = combine(scores, self.weights, scales=scales)
        combined = [flat[i : i + n] for i in range(0, len(flat), n)]
        lineage = {
            "round": k,
            "model": f"round-{k - 1}" if k > 1 else str(self.model),
            "seed": self.sampler.seed,
            "temperature": self.sampler.temperature,
        }
        rows, dropped = [], {}
        for part, start, out in ((answers, 0, False), (held, len(answers), True)):
            values, about = combined[start : start + len(part)], {**lineage, "held_out": out}
            prompts = {a.prompt: self.prompts[a.prompt] for a in part}
            new, why = pair_rows(part, values, prompts, about, **self.pairing)
            if not out and not new:
                reasons = ", ".join(f"{reason} ({count:,})" for reason, count in why.items())
                raise InputError(
                    f"round {k} has no pair to train on: of {n} answers to each of {len(part):,} "
                    f"prompts, {reasons}; a pair takes two different answers with different "
                    "scores: look at the reward, or raise temperature or samples"
                )
            rows += new
            dropped = dropped if out else dict(why)
        write_rows(self.dir(k) / "pairs.jsonl", rows)
        return rows, dropped

    def train(self, k: int, objective: Any, pairs: Any, held_out: bool) -> None:
        """An ordinary run into the round's folder."""
        config = dataclasses.replace(
            self.config,
            out=str(self.dir(k)),
            resume="auto",
            seed=self.config.seed + k - 1,
            eval_fraction=self.config.eval_fraction if held_out else 0.0,
        )
        start = self.dir(k - 1).absolute() if k > 1 else self.model
        data = self.dir(k).absolute() / "pairs.jsonl"
        about = {"round": k, "model": str(start), "data": str(data), "split": None, "columns": None}
        load = {name: None if value is None else str(value) for name, value in self.load.items()}
        settings = {**self.settings, **about, **load}
        self.stop.check()
        run = train(objective, self.policy, pairs, config, quiet=self.quiet, settings=settings)
        if run.stopped:
            raise Stopped
        self.stop.check()
