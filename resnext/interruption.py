"""Handling of Ctrl-C and SIGTERM, which clusters send: a training finishes its step and saves, then stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """A training was stopped by a signal, and everything up to that step is saved.

    Args:
        number: number of the signal.
        kept: one line that describes what is saved and how to continue.
    """

    def __init__(self, number: int, kept: str) -> None:
        super().__init__(kept)
        self.number = number


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def unheard() -> Iterator[None]:
    """Block the signals in processes started inside; this process receives them afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interruption:
    """Stores the first SIGINT or SIGTERM in ``asked``; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
