"""`prefopt cache build | info | verify`: the reference log-probs on disk."""

from __future__ import annotations

from pathlib import Path

from prefopt.command_groups import Reading, Setup
from prefopt.command_inputs import load_policy
from prefopt.config import TrainConfig, default_cache
from prefopt.errors import InputError
from prefopt.terminal import say
from prefopt.train_commands import load_data


def build(config: TrainConfig, setup: Setup, reading: Reading) -> int:
    """Compute the reference log-probs that `prefopt dpo` with the same flags would need."""
    from prefopt.data.sources import load_preferences
    from prefopt.metrics import Progress
    from prefopt.objectives.dpo import DPO
    from prefopt.prepare import fill_cache, make_plan
    from prefopt.reference import ReferenceCache
    from prefopt.stop import Stopped, StopSignal

    source = load_data(setup, load_preferences, reading)
    policy = load_policy(setup.model, setup.lora, setup.dtype, setup.device, setup.quantize)
    policy.use_float32_masters()
    plan = make_plan(DPO(), policy, source, config)
    cache = ReferenceCache(config.cache or default_cache())
    with Progress(quiet=setup.quiet) as progress, StopSignal() as stop:
        try:
            fill_cache(cache, policy, plan, config, policy.reference_key(), progress, stop)
        except Stopped:
            say("stopped; what was computed is kept")
    if not setup.quiet:
        say(f"{cache.dir}: {cache.hits:,} responses on disk, {cache.misses:,} computed now "
            f"in {cache.forwards:,} forward passes")  # fmt: skip
    return 0


def info(cache: str | None = None) -> int:
    """List the references whose log-probs are on disk, and the size of what is encoded.

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
    chunks = [path.stat().st_size for path in folder.glob("tokens/*/*.tokens")]
    if chunks:
        many, size = "s" * (len(chunks) > 1), sum(chunks) / 1e6
        say(f"tokens  {len(chunks):,} chunk{many} of encoded data, {size:.1f} MB")
