"""Processes that encode chunks, one chunk at a time each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from prefopt.data.recipe import Chunk, Encode, Recipe
from prefopt.data.tokens import TextTokenizer

ROWS = 20_000  # fewer are done before processes have started
MOST = 4  # each holds a tokenizer and transformers in memory
KILLED = "a process that encodes was killed; is memory short?"


def worth_it(records: Any, tokenizer: Any) -> int:
    """How many processes to encode in; 0: in this one."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    few = not isinstance(records, Sized) or len(records) < ROWS
    # A daemon may start no process; what is defined in the running script is not found by another.
    alone = multiprocessing.current_process().daemon or type(tokenizer).__module__ == "__main__"
    return 0 if cores < 2 or few or alone else min(cores, MOST)


class Worker:
    """A process that encodes; between `send` and `result` it is busy with one chunk."""

    def __init__(self, encode: Encode, tokenizer: Any, recipe: Recipe):
        context = multiprocessing.get_context("spawn")  # a fork would share the tokenizer's locks
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, encode, tokenizer, recipe), daemon=True
        )
        with _no_main():
            self.process.start()
        theirs.close()

    def send(self, records: Sequence[Any]) -> None:
        """Have these encoded; RuntimeError where the process is gone."""
        try:
            self.pipe.send(records)
        except OSError:
            raise RuntimeError(KILLED) from None

    def result(self) -> Chunk:
        """The chunk of the records sent last; RuntimeError where the process failed."""
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError(KILLED) from None
        if isinstance(result, str):
            raise RuntimeError(f"a process that encodes failed: {result}")
        return result

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()
        self.process.close()


def _serve(pipe: Connection, encode: Encode, tokenizer: Any, recipe: Recipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked will tell
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = TextTokenizer(tokenizer, recipe.template)
    while True:
        try:
            records = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(encode(records, texts, recipe))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


@contextmanager
def _no_main() -> Iterator[None]:
    """A process that is spawned imports the running script, which without a guard would run again.
    Nothing of it is needed there."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
