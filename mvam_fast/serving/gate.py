"""Closing what several threads use."""
from __future__ import annotations

import threading


class Gate:
    """`with gate:` around every use. `close` refuses new uses and waits for those that are under way."""

    def __init__(self, name: str):
        self._name, self._inside, self._closed = name, 0, False
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError(f"this {self._name} is closed")
            self._inside += 1

    def __exit__(self, *_) -> None:
        with self._changed:
            self._inside -= 1
            if self._closed:
                self._changed.notify_all()

    def close(self) -> bool:
        """Whether it was open. It returns at once where it was not."""
        with self._changed:
            if self._closed:
                return False
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)
            return True
