"""The reference cache: nothing is computed twice, nothing stale or damaged is used, and a killed
build keeps every batch that was complete."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError, ReferenceCache, reference

ROOT = Path(__file__).resolve().parents[1]
HEADER = 28


@dataclass
class Batch:
    """What the cache needs of a batch: the groups it was packed from, and what it scores."""

    encoded: tuple
    targets: torch.Tensor

    def to(self, device):
        return self


def group(prompt, *responses):
    return SimpleNamespace(
        prompt=np.array(prompt, np.int32),
        responses=tuple(np.array(r, np.int32) for r in responses),
        scored=None,
    )


def batch(*groups):
    responses = [r for g in groups for r in g.responses]
    return Batch(groups, torch.from_numpy(np.concatenate(responses).astype(np.int64)))


def expected(one, weights="base"):
    """A log-prob per response token that depends on the weights and every token up to it."""
    values = []
    for g in one.encoded:
        for response in g.responses:
            state = sum(map(ord, weights))
            for token in g.prompt.tolist():
                state = (state * 31 + token + 1) % 65537
            for token in response.tolist():
                state = (state * 31 + token + 1) % 65537
                values.append(-(state + 1) / 7000)
    return torch.tensor(values, dtype=torch.float32)


class Policy:
    """Counts its forwards, and computes the reference only when and as it is asked to."""

    device = torch.device("cpu")

    def __init__(self, weights="base", dtype="float32", attention="sdpa-runs"):
        self.key = {"weights": weights, "dtype": dtype, "attention": attention}
        self.forwards = 0
        self.in_reference = False

    def reference_key(self):
        return self.key

    @contextmanager
    def reference(self):
        self.in_reference = True
        yield
        self.in_reference = False

    def __call__(self, one):
        assert self.in_reference and not torch.is_grad_enabled()
        self.forwards += 1
        return expected(one, self.key["weights"])


def pairs(start, count):
    """`count` batches of two pairs each, with responses of one to four tokens."""
    return [
        batch(
            group([1, i, 3], [i, 2, 5, 7], [i, 9]),
            group([1, i], [i], [4, i, 2]),
        )
        for i in range(start, start + count)
    ]


def run(cache, policy, batches, **options):
    found = list(cache.logprobs(policy, batches, **options))
    for values, one in zip(found, batches, strict=True):
        assert values.dtype == torch.float32 and values.device.type == "cpu"
        assert torch.equal(values, expected(one, policy.key["weights"]))
    return found


def parts(cache):
    return sorted(cache.dir.glob("*/part-*.bin"))


# What is a hit


def test_a_second_run_makes_no_forward(tmp_path):
    cache, policy, batches = ReferenceCache(tmp_path / "a" / "cache"), Policy(), pairs(0, 5)
    run(cache, policy, batches)
    assert (policy.forwards, cache.forwards, cache.hits, cache.misses) == (5, 5, 0, 20)
    run(cache, policy, batches)
    assert (policy.forwards, cache.forwards, cache.hits, cache.misses) == (5, 5, 20, 20)
    again, other = ReferenceCache(tmp_path / "a" / "cache"), Policy()
    run(again, other, batches)
    assert (other.forwards, again.forwards, again.hits, again.misses) == (0, 0, 20, 0)


def test_packing_and_order_change_nothing(tmp_path):
    batches = pairs(0, 4)
    run(ReferenceCache(tmp_path), Policy(), batches)
    groups = [g for one in reversed(batches) for g in reversed(one.encoded)]
    alone = [group(g.prompt, *reversed(g.responses)) for g in groups]
    policy = Policy()
    run(ReferenceCache(tmp_path), policy, [batch(*alone[:3]), batch(*alone[3:])])
    assert policy.forwards == 0


@pytest.mark.parametrize("change", ["weights", "dtype", "attention"])
def test_another_reference_is_a_miss_and_does_not_disturb_the_first(tmp_path, change):
    batches = pairs(0, 2)
    run(ReferenceCache(tmp_path), Policy(), batches)
    other = Policy(**{change: "other"})
    run(ReferenceCache(tmp_path), other, batches)
    assert other.forwards == 2
    for known in (Policy(), Policy(**{change: "other"})):
        run(ReferenceCache(tmp_path), known, batches)
        assert known.forwards == 0


def test_the_key_given_by_the_caller_counts(tmp_path):
    policy, batches = Policy(), pairs(0, 2)
    run(ReferenceCache(tmp_path), policy, batches, key={"a": "1", "b": "2"})
    run(ReferenceCache(tmp_path), policy, batches, key={"b": "2", "a": "1"})
    assert policy.forwards == 2
    run(ReferenceCache(tmp_path), policy, batches, key={"a": "1", "b": "3"})
    assert policy.forwards == 4


def test_weights_that_are_trained_on_the_way_are_no_reference(tmp_path):
    """Full fine-tuning has no second copy: the reference must be complete before the first step."""
    cache, policy, batches = ReferenceCache(tmp_path), Policy(), pairs(0, 3)
    values = cache.logprobs(policy, batches)
    next(values)
    policy.key = policy.key | {"weights": "trained"}
    with pytest.raises(RuntimeError, match="weights changed"):
        next(values)
    assert [entry["responses"] for entry in cache.info()] == [4]


@pytest.mark.parametrize(
    "changed",
    [
        group([1, 2, 4], [5, 6, 7]),  # a prompt token
        group([1, 2, 3], [5, 6, 8]),  # a response token
        group([1, 2, 3], [5, 6]),  # a shorter response
        group([1, 2], [3, 5, 6, 7]),  # the boundary alone
        group([1, 2, 3, 5], [6, 7]),
    ],
)
def test_any_other_token_is_a_miss(tmp_path, changed):
    run(ReferenceCache(tmp_path), Policy(), [batch(group([1, 2, 3], [5, 6, 7]))])
    policy = Policy()
    run(ReferenceCache(tmp_path), policy, [batch(changed)])
    assert policy.forwards == 1


def test_a_partly_known_batch_is_forwarded_whole_and_only_the_rest_is_written(tmp_path):
    g, h = group([1], [2, 3], [4]), group([1], [4], [5, 6, 7])  # the response [4] is in both
    cache, policy = ReferenceCache(tmp_path), Policy()
    run(cache, policy, [batch(g)])
    size = parts(cache)[0].stat().st_size
    assert size == 2 * HEADER + 3 * 4
    seen = []
    run(cache, policy, [batch(h), batch(g)], on_batch=lambda one, f: seen.append((one, f)))
    assert policy.forwards == 2
    assert (cache.hits, cache.misses) == (3, 3)
    assert [len(one.targets) for one, _ in seen] == [4, 3]
    assert [forwarded for _, forwarded in seen] == [True, False]
    assert parts(cache)[0].stat().st_size == size + HEADER + 3 * 4


def test_what_is_on_disk_is_what_comes_back_even_where_a_forward_would_round_differently(tmp_path):
    """Or a resumed run would see other numbers than the run that it continues."""

    class Rounding(Policy):
        def __call__(self, one):
            return super().__call__(one) + torch.arange(len(one.targets)) * 1e-3

    g, h = group([1], [2, 3]), group([1], [4, 5, 6])
    cache = ReferenceCache(tmp_path)
    (alone,) = cache.logprobs(Rounding(), [batch(g)])
    (both,) = cache.logprobs(Rounding(), [batch(h, g, h)])
    assert torch.equal(both[3:5], alone)
    assert torch.equal(both[:3], both[5:]), "equal responses have equal log-probs"
    (again,) = ReferenceCache(tmp_path).logprobs(Rounding(), [batch(h, g, h)])
    assert torch.equal(again, both)


def test_real_batches_in_both_layouts(tmp_path):
    encode = pytest.importorskip("prefopt.data.encode")
    packing = pytest.importorskip("prefopt.data.packing")
    rng = np.random.default_rng(0)

    def tokens(least):
        return rng.integers(0, 99, rng.integers(least, 9)).astype(np.int32)

    items = [encode.Encoded(tokens(1), (tokens(1), tokens(1)), i) for i in range(20)]
    policy = Policy()
    run(ReferenceCache(tmp_path), policy, list(packing.pack(items, max_tokens=40)))
    forwards = policy.forwards
    assert forwards > 3
    padded = list(packing.pack(items, max_tokens=60, layout="padded"))
    run(ReferenceCache(tmp_path), policy, padded)
    assert policy.forwards == forwards


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.lists(st.integers(0, 3), min_size=1, max_size=3),
                st.lists(
                    st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=3
                ),
            ),
            min_size=1,
            max_size=3,
        ),
        max_size=6,
    )
)
def test_any_batches_come_back_and_only_the_new_is_computed(tmp_path_factory, description):
    folder = tmp_path_factory.mktemp("cache")
    batches = [batch(*(group(p, *rs) for p, rs in groups)) for groups in description]
    policy = Policy()
    half = len(batches) // 2
    run(ReferenceCache(folder), policy, batches[:half])
    run(ReferenceCache(folder), policy, batches)
    run(ReferenceCache(folder), policy, batches[::-1])
    seen, forwards = set(), 0
    for one in batches:
        here = {(*g.prompt, -1, *r) for g in one.encoded for r in g.responses}
        forwards += not here <= seen
        seen |= here
    assert policy.forwards == forwards
    cache = ReferenceCache(folder)
    assert sum(entry["responses"] for entry in cache.info()) == len(seen)


# What is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_log_prob_that_is_not_finite_is_never_written(tmp_path, bad):
    class Broken(Policy):
        def __call__(self, one):
            values = super().__call__(one)
            if len(values) == 3:
                values[1] = bad
            return values

    cache = ReferenceCache(tmp_path)
    good, broken = batch(group([1], [2])), batch(group([1], [2, 77, 3]))
    with pytest.raises(InputError, match=r"gives -?(nan|inf) as log-prob of token 77"):
        list(cache.logprobs(Broken(), [good, broken]))
    assert cache.verify()["references"][0]["responses"] == 1


def test_a_full_disk_leaves_a_whole_part(tmp_path, monkeypatch):
    cache, batches = ReferenceCache(tmp_path), pairs(0, 3)
    run(cache, Policy(), batches[:1])
    real = os.write

    def half_then_full(fd, data):
        if len(data) > 20:
            return real(fd, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "write", half_then_full)
        list(cache.logprobs(Policy(), batches))
    assert cache.info()[0]["responses"] == 4
    run(cache, Policy(), batches)  # the same cache goes on once there is room
    assert ReferenceCache(tmp_path).info()[0] | {"parts": 0} == {
        "folder": parts(cache)[0].parent.name,
        "key": Policy().key,
        "responses": 12,
        "tokens": 30,
        "bytes": 12 * HEADER + 30 * 4,
        "parts": 0,
        "incomplete": 0,
    }


def test_any_flipped_bit_is_damage_or_a_miss_and_never_a_wrong_number(tmp_path):
    batches = [batch(group([1, 2], [3], [4, 5])), batch(group([1, 2], [6, 7]))]
    run(ReferenceCache(tmp_path), Policy(), batches)
    (part,) = parts(ReferenceCache(tmp_path))
    whole = part.read_bytes()
    starts = [0, HEADER + 4, 2 * HEADER + 12]
    assert len(whole) == starts[-1] + HEADER + 8
    for at in range(len(whole)):
        for bit in range(8):
            part.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            start = max(s for s in starts if s <= at)
            try:
                policy = Policy()
                run(ReferenceCache(tmp_path), policy, batches)
            except InputError as error:
                assert str(error).startswith(f"the cache file {part} is damaged at byte {start};")
            else:  # the length of the last record: looks like one cut by a kill
                assert starts[-1] + 20 <= at < starts[-1] + 24 and policy.forwards == 1
                for extra in set(part.parent.glob("part-*.bin")) - {part}:
                    extra.unlink()
    for call in (ReferenceCache.info, ReferenceCache.verify):
        part.write_bytes(whole[:40] + b"\0" + whole[41:])
        with pytest.raises(InputError, match=r"delete it: its values will be computed again"):
            call(ReferenceCache(tmp_path))
    part.unlink()
    policy = Policy()
    run(ReferenceCache(tmp_path), policy, batches)
    assert policy.forwards == 2


def test_a_part_cut_anywhere_keeps_its_whole_records(tmp_path):
    batches = [batch(group([1, 2], [3], [4, 5])), batch(group([1, 2], [6, 7]))]
    run(ReferenceCache(tmp_path / "whole"), Policy(), batches)
    data = parts(ReferenceCache(tmp_path / "whole"))[0].read_bytes()
    ends = [HEADER + 4, 2 * HEADER + 12, 3 * HEADER + 20]
    for length in range(len(data)):
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        cache = ReferenceCache(tmp_path / "cut")
        parts(cache)[0].write_bytes(data[:length])
        (info,) = cache.info()
        assert info["responses"] == sum(end <= length for end in ends)
        assert info["incomplete"] == (length not in (0, *ends))
        run(cache, Policy(), batches)
        run(ReferenceCache(tmp_path / "cut"), policy := Policy(), batches)
        assert policy.forwards == 0, "what was cut is computed once"
        shutil.rmtree(tmp_path / "cut")


def test_damage_that_comes_while_in_use_is_seen_too(tmp_path):
    cache, batches = ReferenceCache(tmp_path), pairs(0, 1)
    run(cache, Policy(), batches)
    (part,) = parts(cache)
    whole = part.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), whole[4:]):
        part.write_bytes(damaged)
        with pytest.raises(InputError, match=r"is damaged at byte"):
            list(cache.logprobs(Policy(), batches))
    part.unlink()
    with pytest.raises(InputError, match=r"was removed while in use; start again"):
        list(cache.logprobs(Policy(), batches))


def test_a_lost_damaged_or_foreign_key_is_an_input_error(tmp_path):
    cache, batches = ReferenceCache(tmp_path), pairs(0, 1)
    run(cache, Policy(), batches)
    file = parts(cache)[0].parent / "key.json"
    good = json.loads(file.read_text())
    assert good == Policy().key
    file.write_text("{")
    with pytest.raises(InputError, match=r"key\.json is damaged; delete its folder"):
        list(ReferenceCache(tmp_path).logprobs(Policy(), batches))
    file.write_text(json.dumps(good | {"dtype": "bfloat16"}))
    with pytest.raises(InputError, match=r"is not the key that its folder is named for"):
        list(ReferenceCache(tmp_path).logprobs(Policy(), batches))
    file.unlink()
    with pytest.raises(InputError, match=r"nobody can tell whose log-probs these are"):
        ReferenceCache(tmp_path).info()


# Looking into it


def test_info_and_verify(tmp_path):
    cache, batches = ReferenceCache(tmp_path / "absent"), pairs(0, 3)
    assert cache.info() == []
    assert cache.verify(Policy(), batches) == {
        "references": [],
        "compared": 0,
        "max_abs_difference": None,
    }
    assert not cache.dir.exists()
    run(cache, Policy(), batches)
    run(cache, Policy(dtype="bfloat16"), batches[:1])
    (tmp_path / "absent" / "notes").mkdir()
    entries = cache.info()
    assert sorted(
        (e["key"]["dtype"], e["responses"], e["tokens"], e["parts"]) for e in entries
    ) == [
        ("bfloat16", 4, 10, 1),
        ("float32", 12, 30, 1),
    ]
    assert cache.verify() == {"references": entries, "compared": 0, "max_abs_difference": None}

    class Drifted(Policy):
        def __call__(self, one):
            values = super().__call__(one)
            values[-1] += 0.25
            return values

    report = cache.verify(Policy(), batches, samples=5)
    assert (report["compared"], report["max_abs_difference"]) == (8, 0.0)
    report = cache.verify(Drifted(), pairs(7, 1) + batches, samples=100)
    assert (report["compared"], report["max_abs_difference"]) == (12, 0.25)


# More than one process


PROCESSES = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_reference import Policy, ReferenceCache, pairs, parts, run

def child(body):
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        finally:
            os._exit(3)
    return pid

def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_in_the_forward(root):
    class Killed(Policy):
        def __call__(self, one):
            if self.forwards == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(one)
    assert code(child(lambda: run(ReferenceCache(root), Killed(), pairs(0, 6)))) == -signal.SIGKILL
    cache, policy = ReferenceCache(root), Policy()
    assert cache.info()[0]["responses"] == 3 * 4 and cache.info()[0]["incomplete"] == 0
    run(cache, policy, pairs(0, 6))
    assert policy.forwards == 3

def killed_in_a_write(root):
    '''After every number of bytes of the third batch's write.'''
    size = 4 * 28 + 10 * 4
    for cut in range(0, size + 1, 13):
        folder = root / str(cut)
        def body():
            real, writes = os.write, []
            def write(fd, data):
                writes.append(len(data))
                if writes.count(size) == 3:
                    real(fd, data[:cut])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(fd, data)
            os.write = write
            run(ReferenceCache(folder), Policy(), pairs(0, 6))
        assert code(child(body)) == -signal.SIGKILL
        cache, policy = ReferenceCache(folder), Policy()
        (info,) = cache.info()
        assert 2 * 4 <= info["responses"] < 3 * 4, info
        assert len(parts(cache)) == 1
        run(cache, policy, pairs(0, 6))
        assert policy.forwards == 4
        again = Policy()
        run(ReferenceCache(folder), again, pairs(0, 6))
        assert again.forwards == 0

def side_by_side(root):
    '''Two builders of overlapping data, and one that forks in the middle of its work.'''
    first = child(lambda: run(ReferenceCache(root), Policy(), pairs(0, 30)))
    second = child(lambda: run(ReferenceCache(root), Policy(), pairs(20, 30)))
    cache = ReferenceCache(root)
    run(cache, Policy(), pairs(100, 2))
    third = child(lambda: run(cache, Policy(), pairs(102, 20)))
    run(cache, Policy(), pairs(110, 20))
    assert [code(pid) for pid in (first, second, third)] == [0, 0, 0]
    policy = Policy()
    run(ReferenceCache(root), policy, pairs(0, 50) + pairs(100, 30))
    assert policy.forwards == 0
    (info,) = ReferenceCache(root).verify()["references"]
    assert info["responses"] == 80 * 4 and info["parts"] == 4 and info["incomplete"] == 0

root = Path(sys.argv[2])
killed_in_the_forward(root / "forward")
killed_in_a_write(root / "write")
side_by_side(root / "side")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_and_concurrent_builders(tmp_path):
    """One interpreter that forks the builders: importing torch for each would take a minute."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, str(Path(__file__).parent), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_file_format_is_what_the_header_says(tmp_path):
    """Written out by hand once: older caches must stay readable, or the magic must change."""
    import hashlib
    import struct
    import zlib

    one = batch(group([10, 11], [12, 13, 14]))
    cache = ReferenceCache(tmp_path)
    run(cache, Policy(), [one])
    key = hashlib.blake2b(struct.pack("<7i", 2, 3, 10, 11, 12, 13, 14), digest_size=16).digest()
    values = struct.pack("<3f", *expected(one).tolist())
    crc = zlib.crc32(key + struct.pack("<I", 3) + values)
    record = b"PRC1" + key + struct.pack("<II", 3, crc) + values
    (part,) = parts(cache)
    assert part.read_bytes() == record
    text = '{"attention": "sdpa-runs", "dtype": "float32", "weights": "base"}'
    assert part.parent.name == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert reference._HEADER.size == HEADER
