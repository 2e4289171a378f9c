"""SIGTERM, SIGINT and SIGUSR1 end a run after the step it is in; a second SIGINT ends it at once."""

import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal's Ctrl-C reaches every process, and torchrun sends each of its own a second one a moment later.
_DUPLICATE_SECONDS = 1.0


class StopSignals:
    """Within the block, `received` is the first of the signals that came, as a number, and 0 before.

    A thread looks out for the second SIGINT: the main one may be inside a long operation, where Python runs no handler,
    and it must not wait for its end. Does nothing in a thread other than the main one, where Python lets nobody handle
    signals.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "StopSignals":
        self._handling = threading.current_thread() is threading.main_thread()
        if self._handling:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._previous: dict[int, Any] = {number: signal.signal(number, self._handle) for number in _STOPPING}
            self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="ibft-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._handling:
            signal.set_wakeup_fd(self._previous_fd)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._writer.close()  # which ends the thread

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number

    def _listen(self) -> None:
        interrupted_at: float | None = None
        with self._reader:
            while arrived := self._reader.recv(1):
                if arrived[0] != signal.SIGINT:
                    continue
                now = time.monotonic()
                if interrupted_at is None:
                    interrupted_at = now
                elif now - interrupted_at > _DUPLICATE_SECONDS:
                    os._exit(128 + signal.SIGINT)
