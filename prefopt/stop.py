"""SIGTERM and Ctrl-C: finish the step, save, leave with exit code 0."""

from __future__ import annotations

import signal
import threading


class Stopped(Exception):  # noqa: N818 - not an error
    """Raised at a safe point after a signal asked the run to stop."""


class StopSignal:
    """Context manager that turns SIGTERM and the first SIGINT into ``Stopped`` at ``check()``.

    A second Ctrl-C interrupts at once. Outside the main thread, where Python allows no handlers,
    it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
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

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        if self.asked:
            raise Stopped
