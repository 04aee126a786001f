"""Host buffers in which batches are put together, kept for the next call."""
from __future__ import annotations

import threading

import torch
from torch import Tensor


class Staging:
    """Buffers [n, *row] on the CPU. `pinned`: in memory from which a GPU copies directly, which is slow to get."""

    def __init__(self, row: tuple[int, ...], dtype: torch.dtype, *, pinned: bool):
        self._row, self._dtype, self._pinned = row, dtype, pinned
        self._lock, self._free = threading.Lock(), []

    def take(self, rows: int) -> Tensor:
        """A buffer of at least `rows` rows, for the caller alone until it is given back."""
        with self._lock:
            self._free.sort(key=len)
            for position, buffer in enumerate(self._free):
                if len(buffer) >= rows:
                    return self._free.pop(position)
            del self._free[:1]  # the one made below takes the place of the smallest
        return torch.empty((rows, *self._row), dtype=self._dtype, pin_memory=self._pinned)

    def give(self, buffer: Tensor) -> None:
        with self._lock:
            self._free.append(buffer)
