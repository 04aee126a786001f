"""Batch sizes: a batch of any size as runs of a few fixed ones, padded up and split."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .runner import Runner

BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class Piece(NamedTuple):
    """`count` rows from `start` on, run as a batch of `size` ≥ count."""

    start: int
    count: int
    size: int


def check_buckets(buckets: Sequence[int] | None) -> tuple[int, ...]:
    """In ascending order, each once; BUCKETS for None."""
    if buckets is None:
        return BUCKETS
    if isinstance(buckets, (str, bytes)) or not isinstance(buckets, Sequence) or not buckets:
        raise TypeError(f"buckets is {buckets!r}; it must be a list of batch sizes")
    wrong = next((size for size in buckets if type(size) is not int or size < 1), None)
    if wrong is not None:
        raise ValueError(f"buckets holds {wrong!r}; it must hold whole numbers of at least 1")
    return tuple(sorted(set(buckets)))


def pieces(rows: int, sizes: Sequence[int]) -> list[Piece]:
    """`rows` rows as pieces of the largest of `sizes` (ascending), the last one of the smallest that holds the rest."""
    starts = range(0, rows, sizes[-1])
    counts = [min(sizes[-1], rows - start) for start in starts]
    return [
        Piece(start, count, next(size for size in sizes if size >= count))
        for start, count in zip(starts, counts, strict=True)
    ]


class Padded:
    """A runner that hands `runner` batches of `sizes` (by tower, ascending) alone, of which the last may be padded.

    What has such a size already is not copied. A tower that `sizes` does not name takes any batch.
    """

    def __init__(self, runner: Runner, sizes: Mapping[str, Sequence[int]]):
        self.device, self._runner, self._sizes = runner.device, runner, sizes

    def run(self, tower: str, inputs: Tensor) -> Tensor:
        if tower not in self._sizes:
            return self._runner.run(tower, inputs)
        found = [
            self._run(tower, inputs[start : start + count], size)
            for start, count, size in pieces(len(inputs), self._sizes[tower])
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _run(self, tower: str, rows: Tensor, size: int) -> Tensor:
        if len(rows) == size:
            return self._runner.run(tower, rows)
        padded = rows.new_zeros((size, *rows.shape[1:]))
        padded[: len(rows)] = rows
        return self._runner.run(tower, padded)[: len(rows)]

    def close(self) -> None:
        self._runner.close()
