"""SIGTERM and Ctrl-C: finish the step, save, leave with exit code 0."""

from __future__ import annotations

import signal
import threading


class Stopped(BaseException):
    """A signal asked to stop. No error, and so, like KeyboardInterrupt, no Exception."""


class StopSignal:
    """Context manager that turns SIGTERM and the first SIGINT into ``Stopped`` at ``check()``.

    ``at_once``: wherever the program is, for phases that leave nothing behind. A second Ctrl-C
    interrupts at once. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.asked, self.at_once = False, at_once
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        outer = getattr(self._previous.get(number), "__self__", None)
        if isinstance(outer, StopSignal):  # what goes on when this one is done has to stop too
            outer.asked = True
        if self.at_once:
            raise Stopped

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        if self.asked:
            raise Stopped
