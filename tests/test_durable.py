"""Files replaced whole or not at all, whatever fails on the way; safetensors as the library reads
and writes it."""

import errno
import json
import mmap
import os
import stat
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError, durable

CALLS = ("write", "fsync", "replace", "rename")


def fail_at(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The n-th call (from 0) of those that reach the disk finds it full."""
    count = iter(range(10_000))
    for name in CALLS:
        real = getattr(os, name)

        def call(*args, real=real):
            if next(count) == n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        monkeypatch.setattr(os, name, call)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield
    os.umask(old)


def test_a_file_is_written_replaced_and_readable_as_the_umask_says(tmp_path, umask):
    path = tmp_path / "x"
    durable.write_bytes(path, b"old")
    durable.write_bytes(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("n", range(3))  # write, fsync, replace
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, n):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    fail_at(monkeypatch, n)
    with pytest.raises(OSError, match="No space"):
        durable.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    data = bytes(range(256)) * 3
    durable.write_bytes(tmp_path / "x", data)
    assert (tmp_path / "x").read_bytes() == data


def test_json_is_utf8_and_refuses_nan_before_touching_the_file(tmp_path):
    path = tmp_path / "x.json"
    durable.write_json(path, {"π": [1, 0.1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"π": [1, 0.1, None]}
    with pytest.raises(ValueError):
        durable.write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"π": [1, 0.1, None]}


@pytest.mark.parametrize("dtype", durable.DTYPES, ids=str)
def test_tensors_are_the_librarys_own_bytes(tmp_path, dtype):
    tensors = {
        "matrix": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.ones(()).to(dtype),
        "none": torch.zeros(0, 3).to(dtype),
    }
    durable.save_tensors(tmp_path / "x", tensors, {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})
    loaded = durable.load_tensors(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == dtype and loaded[name].shape == value.shape
        assert raw(loaded[name]) == raw(value)


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(durable.DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_any_mix_of_names_dtypes_and_shapes_comes_back(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("mix") / "x"
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    durable.save_tensors(path, tensors)
    loaded = durable.load_tensors(path)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert raw(loaded[name]) == raw(value)


def test_views_parameters_and_shared_memory_are_written_in_full(tmp_path):
    base = torch.nn.Parameter(torch.randn(3, 4))
    tensors = {"a": base, "again": base, "transposed": base.T, "row": base[1]}
    durable.save_tensors(tmp_path / "x", tensors)
    loaded = durable.load_tensors(tmp_path / "x")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_saving_over_a_mapped_file_leaves_the_map_as_it_was(tmp_path):
    path = tmp_path / "x"
    durable.save_tensors(path, {"w": torch.zeros(4096)})
    loaded = durable.load_tensors(path)["w"]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = mapped[:]
        durable.save_tensors(path, {"w": torch.ones(8192)})
        assert mapped[:] == before
    assert loaded.sum() == 0 and durable.load_tensors(path)["w"].sum() == 8192


def test_what_cannot_be_loaded_is_an_input_error_that_names_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(InputError, match=r"weights\.safetensors does not exist"):
        durable.load_tensors(path)
    durable.save_tensors(path, {"w": torch.zeros(64)})
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[:-1], b"\xff" * 100, whole[:20] + b"\0" + whole[21:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"weights\.safetensors is damaged"):
            durable.load_tensors(path)
    with pytest.raises(InputError, match=str(tmp_path)):
        durable.load_tensors(tmp_path)


@pytest.mark.parametrize("one_step", [True, False])
def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path, monkeypatch, umask, one_step):
    if not one_step:  # a system that cannot swap two names
        monkeypatch.setattr(durable, "_exchange", lambda a, b: False)
    final = tmp_path / "model"
    for text in ("first", "second"):
        with durable.new_dir(final) as tmp:
            (tmp / "sub").mkdir()
            (tmp / "sub" / "x").write_text(text)
            (tmp / "sub" / "x").chmod(0o600)  # as safetensors leaves its files
            (tmp / text).touch()
            assert not (final / text).exists()
        assert (final / "sub" / "x").read_text() == text
        assert stat.S_IMODE((final / "sub" / "x").stat().st_mode) == 0o640
        assert stat.S_IMODE(final.stat().st_mode) == 0o750
        assert names(tmp_path) == ["model"]
        assert names(final) == sorted([text, "sub"])


def test_an_error_in_the_body_leaves_the_old_folder(tmp_path):
    final = tmp_path / "model"
    with durable.new_dir(final) as tmp:
        (tmp / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), durable.new_dir(final) as tmp:
        (tmp / "x").write_text("new")
        raise KeyboardInterrupt
    assert (final / "x").read_text() == "old"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("n", range(5))  # fsync file and folder, rename away, rename here
def test_an_error_while_a_folder_is_put_in_place_leaves_one_whole(tmp_path, monkeypatch, n):
    monkeypatch.setattr(durable, "_exchange", lambda a, b: False)
    final = tmp_path / "model"
    final.mkdir()
    (final / "x").write_text("old")
    with monkeypatch.context() as patch:
        fail_at(patch, n)
        with pytest.raises(OSError, match="No space"), durable.new_dir(final) as tmp:
            (tmp / "x").write_text("new")
    # The last fsync only says that the rename may not be durable yet.
    assert (final / "x").read_text() == ("old" if n < 4 else "new")
    assert names(tmp_path) == ["model"]


def test_sweep_removes_what_dead_writers_left_and_nothing_else(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    host = durable._HOST
    dead = [f".tmp-{host}-{child.pid}-00", f".tmp-{host}-{child.pid}-01"]
    alive = [f".tmp-{host}-{os.getpid()}-00", f".tmp-{host}-1-00"]
    others = [f".tmp-{'0' * 8}-{child.pid}-00", ".tmp-notes", "file"]
    for name in dead + alive + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    assert sorted(durable.sweep(tmp_path)) == dead
    assert names(tmp_path) == sorted(alive + others)


def test_remove_takes_files_and_folders(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").touch()
    durable.remove(tmp_path / "a")
    durable.remove(tmp_path / "c")
    assert names(tmp_path) == []
