"""Checkpoints that survive a crash at any moment and load without pickle.

    root/step-000120/  <group>.safetensors ...   tensors: weights, optimizer, RNG
                       state.json                everything else
                       manifest.json             written last: format version, sizes, sha256
    root/latest                                  text: the name of the newest folder

A folder is built as `.tmp-*`, fsynced and renamed, then `latest` is replaced, and only then are
older folders removed: at every moment one whole checkpoint exists, and `latest` names a whole one.
What damage can happen afterwards (a bad disk, a cut copy) is found by the manifest.
"""

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.durable import (
    load_tensors,
    new_dir,
    remove,
    save_tensors,
    sweep,
    write_bytes,
    write_json,
)
from prefopt.errors import InputError

FORMAT = 1
_log = logging.getLogger("prefopt")
# How the update is computed, not what it is: these stay as the running optimizer has them.
_IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int | None = 3,
) -> Path:
    """Writes `root/step-NNNNNN` and points `latest` at it; returns the folder.

    `tensors` maps a group's name (its file's name) to its tensors, `state` is anything JSON holds.
    When the new one is durable, the oldest before it are removed until `keep` are left (None: all
    stay); folders of later steps, which another run may have left here, stay. Raises InputError
    when the disk has no room, OSError when writing fails; the earlier ones are then untouched.
    """
    assert keep is None or keep >= 1, keep
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    _check_room(root, tensors)
    final = root / f"step-{step:06d}"
    with new_dir(final) as tmp:
        for group, values in tensors.items():
            save_tensors(tmp / f"{group}.safetensors", values)
        write_json(tmp / "state.json", state)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(tmp.iterdir())
        }
        write_json(tmp / "manifest.json", {"format": FORMAT, "files": files})
    write_bytes(root / "latest", f"{final.name}\n".encode())
    if keep is not None:
        earlier = [path for path in _folders(root) if _step(path) < step]
        for path in earlier[keep - 1 :]:
            remove(path)
    return final


def verify_checkpoint(path: Path) -> None:
    """Reads every byte of a checkpoint; InputError names the file that is missing or damaged."""
    path = Path(path)
    for name, entry in _manifest(path).items():
        file = path / name
        if not file.is_file():
            raise InputError(f"{file} is missing from the checkpoint; use another checkpoint")
        size = file.stat().st_size
        if size != entry["size"]:
            raise InputError(
                f"{file} has {size} bytes where {entry['size']} were written, it is cut or "
                "damaged; use another checkpoint"
            )
        if _sha256(file) != entry["sha256"]:
            raise InputError(
                f"{file} does not have the sha256 in manifest.json, it is damaged; use another "
                "checkpoint"
            )


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by group and name, on the CPU; state) of a checkpoint, verified first."""
    path = Path(path)
    verify_checkpoint(path)
    groups = [Path(name) for name in _manifest(path) if name.endswith(".safetensors")]
    tensors = {name.stem: load_tensors(path / name) for name in groups}
    return tensors, json.loads((path / "state.json").read_bytes())


def check_shapes(
    path: Path, saved: Mapping[str, Tensor], ours: Iterable[tuple[str, Tensor]]
) -> None:
    """InputError unless a checkpoint holds tensors of these names and shapes."""
    theirs = {name: tuple(value.shape) for name, value in saved.items()}
    wanted = {name: tuple(p.shape) for name, p in ours}
    if theirs != wanted:
        name = min(n for n in theirs | wanted if theirs.get(n) != wanted.get(n))
        raise InputError(
            f"{path} has {name} in shape {theirs.get(name)} and this run in {wanted.get(name)}; "
            "resume with the LoRA settings of the checkpoint"
        )


def latest_checkpoint(root: Path) -> Path | None:
    """The good checkpoint to resume from: the one `latest` names, or else the newest good one.

    Every damaged one passed over is a warning of the logger `prefopt`. None: there is no good one.
    """
    root = Path(root)
    folders = _folders(root)
    pointer = root / "latest"
    if pointer.is_file():
        named = root / pointer.read_text(errors="replace").strip()
        if named in folders:
            # Later steps than the named one are another run's: the last to be tried.
            at = folders.index(named)
            folders = folders[at:] + folders[:at]
        else:
            _log.warning("%s names %s, which is not there", pointer, named.name)
    for path in folders:
        try:
            verify_checkpoint(path)
        except (InputError, OSError) as error:
            _log.warning("passing over the damaged checkpoint %s: %s", path.name, error)
            continue
        return path
    return None


def rng_state() -> dict[str, Tensor]:
    """The state of torch's (CPU, CUDA), numpy's legacy and Python's generators as tensors."""
    version, words, gauss = random.getstate()
    assert version == 3, version
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict) and legacy["bit_generator"] == "MT19937", legacy
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(
            [*legacy["state"]["key"].tolist(), legacy["state"]["pos"], legacy["has_gauss"]]
        ),
        "numpy.gauss": torch.tensor([legacy["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        for index, generator in enumerate(torch.cuda.get_rng_state_all()):
            state[f"cuda.{index}"] = generator
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Puts the generators back where `rng_state` found them; CUDA ones where the device exists."""
    torch.set_rng_state(state["torch"])
    gauss = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *key, pos, has_gauss = state["numpy"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, dtype=np.uint32), "pos": pos},
            "has_gauss": has_gauss,
            "gauss": state["numpy.gauss"].item(),
        }
    )
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{index}"], index)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state: tensors by "<entry>/<parameter name>", and the rest for JSON.

    `names` are the parameters' names in the optimizer's order, over all its groups.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, param in _named(optimizer, names).items():
        for entry, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{entry}/{name}"] = value
            else:
                values.setdefault(name, {})[entry] = value
    left = iter(names)
    groups = [
        {
            "names": [next(left) for _ in group["params"]],
            **{k: _plain(v) for k, v in group.items() if k not in _IMPLEMENTATION},
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "values": values}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Puts back what `optimizer_tensors` gave, to the bit; InputError when the parameters differ.

    `Optimizer.load_state_dict` would cast float32 moments to the parameter's dtype.
    """
    params = _named(optimizer, names)
    _check_groups(optimizer, names, state["groups"])
    optimizer.state.clear()
    for name, entries in state["values"].items():
        optimizer.state[params[name]].update(entries)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        param = params[name]
        group = group_of[id(param)]
        # torch keeps the step counter on the CPU unless the update runs on the device as a whole.
        on_cpu = entry == "step" and not (group.get("capturable") or group.get("fused"))
        device = torch.device("cpu") if on_cpu else param.device
        optimizer.state[param][entry] = value.to(device, copy=True)
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        for key in saved.keys() - {"names"}:
            group[key] = _like(group.get(key), saved[key])


def _check_groups(
    optimizer: torch.optim.Optimizer, names: Sequence[str], saved: Sequence[Mapping[str, Any]]
) -> None:
    """InputError when the groups of the checkpoint do not hold the parameters of this optimizer."""
    theirs = [name for group in saved for name in group["names"]]
    differing = sorted(set(theirs) ^ set(names))
    if differing:
        where = "the checkpoint" if differing[0] in theirs else "this run"
        raise InputError(
            f"the checkpoint's optimizer holds {len(theirs)} parameters and this run trains "
            f"{len(names)}, {differing[0]} only in {where}; resume with the model and LoRA "
            "settings of the checkpoint"
        )
    sizes = [len(group["names"]) for group in saved]
    if theirs != list(names) or sizes != [len(g["params"]) for g in optimizer.param_groups]:
        raise InputError(
            "the checkpoint's optimizer groups its parameters in another way than this run; resume "
            "with the optimizer settings of the checkpoint"
        )


def _named(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(set(names)) == len(params), f"{len(names)} names for {len(params)} parameters"
    return dict(zip(names, params, strict=True))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _like(current: Any, saved: Any) -> Any:
    """JSON's `saved` in the type that the optimizer holds now: a tuple, a tensor, or as it is."""
    if isinstance(current, Tensor):
        return torch.full_like(current, saved)
    return tuple(saved) if isinstance(saved, list) else saved


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """File name -> size and sha256."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
        version = manifest["format"]
        files = {
            name: {"size": entry["size"], "sha256": entry["sha256"]}
            for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        raise InputError(f"{file} is missing: not a whole checkpoint; use another one") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file} is damaged; use another checkpoint") from None
    if version != FORMAT:
        raise InputError(
            f"{file} has format {version!r} and this version reads {FORMAT}; load it with the "
            "version that wrote it"
        )
    return files


def _check_room(root: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    sizes = (t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    need = sum(sizes) + (1 << 20)
    free = shutil.disk_usage(root).free
    if free < need:
        raise InputError(
            f"a checkpoint needs {need / 1e6:,.0f} MB and the disk of {root} has {free / 1e6:,.0f} "
            "MB free; make room, or write to another disk"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _folders(root: Path) -> list[Path]:
    """The step-NNNNNN folders in `root`, whole or not, the latest step first."""
    found = [p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step, reverse=True)
