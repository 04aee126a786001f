"""A pool of threads that prepares pictures, a batch ahead of the model."""
from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

from .images import ImageRows, decode
from .staging import Staging

DEFAULT_WORKERS = 8


class Decoder:
    """Pictures to batches. Its threads start with the first picture."""

    def __init__(self, rows: ImageRows, staging: Staging, pool: ThreadPoolExecutor):
        self._rows, self._staging, self._pool = rows, staging, pool

    def batches(self, images: Sequence, batch_size: int) -> Iterator[Tensor]:
        """Batches [b, *row] of paths or PIL images, in order, each valid until the next is asked for.

        Two buffers take turns: while the caller uses one batch, the pool fills the next. Close the generator if it is
        not read to its end. Raises UnreadableImage for the first picture of a batch that cannot be read.
        """
        _decode_repeated(images)
        starts = range(0, len(images), batch_size)
        buffers = [self._staging.take(min(batch_size, len(images))) for _ in starts[:2]]
        ahead: deque[tuple[Tensor, list[Future]]] = deque()
        try:
            for number in range(len(starts) + 1):
                if number < len(starts):
                    ahead.append(self._begin(images, starts[number], batch_size, buffers[number % 2]))
                if number:
                    batch, filled = ahead[0]
                    for future in filled:
                        future.result()
                    yield batch
                    ahead.popleft()
        finally:
            left = [future for _, filled in ahead for future in filled]
            for future in left:
                future.cancel()
            wait(left)  # what runs still writes
            for buffer in buffers:
                self._staging.give(buffer)

    def _begin(self, images: Sequence, start: int, size: int, buffer: Tensor) -> tuple[Tensor, list[Future]]:
        batch = buffer[: min(size, len(images) - start)]
        positions = range(start, start + len(batch))
        filled = [
            self._pool.submit(self._rows.fill, images[position], position, row)
            for position, row in zip(positions, batch.numpy(), strict=True)
        ]
        return batch, filled


def make_pool(workers: int | None) -> ThreadPoolExecutor:
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ValueError(f"workers is {workers!r}; it must be at least 1")
    return ThreadPoolExecutor(workers or min(DEFAULT_WORKERS, os.cpu_count() or 1), "mvam-decode")


def _decode_repeated(images: Sequence) -> None:
    """PIL reads a file when first asked for pixels, which two threads must not do at once for one image."""
    seen = set()
    for position, image in enumerate(images):
        if not isinstance(image, (str, Path)):
            if id(image) in seen:
                decode(image, position)
            seen.add(id(image))
