"""The run folder: config.yaml env.json metrics.jsonl samples.jsonl data_report.json
evaluation.json checkpoints/ model/ report.html"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config import TrainConfig
from prefopt.durable import write_bytes, write_json
from prefopt.environment import environment
from prefopt.errors import InputError
from prefopt.online_config import PPOConfig

if TYPE_CHECKING:
    from prefopt.policy import Generation, Policy


class RunDir:
    """Writes the files of one run. Making one checks the folder and writes nothing yet."""

    def __init__(self, dir: Path, *, resuming: bool):
        self.dir = dir
        if dir.exists() and not dir.is_dir():
            raise InputError(f"--out {dir} is a file; name a folder")
        if not resuming and any((dir / name).exists() for name in ("config.yaml", "model")):
            raise InputError(
                f"--out {dir} already holds a run; continue it with --resume auto, or name another "
                "folder"
            )

    @property
    def finished(self) -> bool:
        """The model is written last, and at once."""
        return (self.dir / "model").is_dir()

    def start(
        self, notes: dict[str, Any], config: TrainConfig | PPOConfig, settings: dict[str, Any]
    ) -> None:
        """Write what is known before the first step."""
        import yaml

        self.dir.mkdir(parents=True, exist_ok=True)
        values = {**settings, **dataclasses.asdict(config)}
        values.pop("resume", None)  # how this process began, not what the run is
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_bytes(self.dir / "config.yaml", text.encode())
        write_json(self.dir / "env.json", environment())
        write_json(self.dir / "data_report.json", notes)

    def add_evaluation(self, stage: str, result: dict[str, Any]) -> None:
        """evaluation.json: {"before": ..., "after": ...}"""
        path = self.dir / "evaluation.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**known, stage: result})

    def add_samples(self, step: int, stage: str, prompts: list, answers: list[Generation]) -> None:
        """Answers of one stage; those that a resumed run gives again replace the old ones."""
        path = self.dir / "samples.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["stage"] != stage]
        for prompt, answer in zip(prompts, answers, strict=True):
            text = prompt if isinstance(prompt, str) else "\n\n".join(m.content for m in prompt)
            row = {"step": step, "stage": stage, "prompt": text}
            kept.append(json.dumps({**row, "response": answer.text, "finish": answer.finish}))
        write_bytes(path, "".join(f"{line}\n" for line in kept).encode())

    def save_model(self, policy: Policy) -> None:
        policy.save_pretrained(self.dir / "model")

    def report(self) -> Path:
        from prefopt.report import write_report

        return write_report(self.dir)
