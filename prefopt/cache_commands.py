"""`prefopt cache build | info | verify`: the reference log-probs on disk."""

from __future__ import annotations

from pathlib import Path

from prefopt.commands import Dtype, Quantize, load_policy, pairs
from prefopt.config import TrainConfig, default_cache
from prefopt.errors import InputError
from prefopt.nn.lora_config import LoraConfig
from prefopt.terminal import say


def build(
    config: TrainConfig,
    model: str = "embedded",
    data: str = "embedded",
    split: str | None = None,
    columns: dict[str, str | None] | None = None,
    lora: LoraConfig | None = LoraConfig(),  # noqa: B008 - frozen
    quantize: Quantize | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    quiet: bool = False,
) -> int:
    """Compute the reference log-probs that `prefopt dpo` with the same flags would need.

    Args:
        model: as for dpo.
        data: as for dpo.
        split: as for dpo.
        columns: as for dpo.
        lora: as for dpo; with null, 16-bit weights are kept in float32.
        quantize: as for dpo.
        dtype: as for dpo.
        device: as for dpo.
        quiet: print nothing but errors.
    """
    from prefopt.metrics import Progress
    from prefopt.objectives.dpo import DPO
    from prefopt.prepare import fill_cache, make_plan
    from prefopt.reference import ReferenceCache
    from prefopt.stop import Stopped, StopSignal

    source = pairs(data, split, columns, quiet=quiet)
    policy = load_policy(model, lora, dtype, device, quantize)
    policy.use_float32_masters()
    plan = make_plan(DPO(), policy, source, config)
    cache = ReferenceCache(config.cache or default_cache())
    with Progress(quiet=quiet) as progress, StopSignal() as stop:
        try:
            fill_cache(cache, policy, plan, config, policy.reference_key(), progress, stop)
        except Stopped:
            say("stopped; what was computed is kept")
    if not quiet:
        say(f"{cache.dir}: {cache.hits:,} responses on disk, {cache.misses:,} computed now "
            f"in {cache.forwards:,} forward passes")  # fmt: skip
    return 0


def info(cache: str | None = None) -> int:
    """List the references whose log-probs are on disk.

    Args:
        cache: folder of the cache; null is the user's.
    """
    _print_references(cache, verify=False)
    return 0


def verify_all(cache: str | None = None) -> int:
    """Read every stored log-prob and check it; exit code 2 names a damaged file.

    Args:
        cache: folder of the cache; null is the user's.
    """
    _print_references(cache, verify=True)
    say("every record is intact")
    return 0


def _print_references(cache: str | None, *, verify: bool) -> None:
    from prefopt.reference import ReferenceCache

    folder = Path(cache) if cache else default_cache()
    if cache and not folder.is_dir():
        raise InputError(f"there is no cache folder {folder}")
    store = ReferenceCache(folder)
    rows = store.verify()["references"] if verify else store.info()
    say(f"{folder}: {len(rows)} reference{'s' * (len(rows) != 1)}")
    for row in rows:
        key = row["key"]
        say(
            f"{row['folder']}  weights {key['weights'][:12]}, {key['dtype']}, {key['attention']}: "
            f"{row['responses']:,} responses, {row['tokens']:,} tokens, {row['bytes'] / 1e6:.1f} MB"
        )
