"""Ctrl-C, and the SIGTERM that clusters send: a training ends its step and keeps it before it stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Interrupted(Exception):
    """Training stopped because a signal asked for it; everything up to here is kept.

    Args:
        number: of the signal.
        kept: what is kept, and how to go on, in a line.
    """

    def __init__(self, number: int, kept: str) -> None:
        super().__init__(kept)
        self.number = number


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def unheard() -> Iterator[None]:
    """Processes that are started inside never hear of the signals; this one does when it leaves."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interruption:
    """While it is entered, the first SIGINT or SIGTERM is noted in ``asked``; a second one acts at once."""

    def __init__(self) -> None:
        self.asked = 0
        self.before: dict[int, object] = {}

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
