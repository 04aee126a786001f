"""CUDA graphs: a batch size is recorded once, on buffers that stay in place, and replayed from then on."""
from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .buckets import pieces
from .runner import Runner

WARM_UPS = 3  # runs before a capture: libraries make their handles, kernels are loaded, all of which a capture forbids

# (tower, inputs that stay in place) → a function that computes their embeddings anew, always into the same tensor.
# Called on the stream that is current.
Record = Callable[[str, Tensor], Callable[[], Tensor]]


class Recorded(NamedTuple):
    inputs: Tensor
    replay: Callable[[], Tensor]


class Graphed:
    """`runner` by graphs of the batch `sizes` (by tower), each recorded when first needed; others are padded and split.

    All work is on `stream`, one call at a time, between what the callers' streams did before and what they do next. So
    calls from several threads and streams share the buffers.
    """

    def __init__(
        self, runner: Runner, sizes: Mapping[str, Sequence[int]], width: int, stream: torch.cuda.Stream, record: Record
    ):
        self.device, self._runner, self._sizes, self._width = runner.device, runner, sizes, width
        self._stream, self._record = stream, record
        self._lock, self._recorded = threading.Lock(), {}

    def run(self, tower: str, inputs: Tensor) -> Tensor:
        caller = torch.cuda.current_stream(self.device)
        # Memory of the caller's stream, which waits below before it can go on to use or reuse it.
        output = torch.empty(len(inputs), self._width, device=self.device)
        with self._lock, torch.cuda.stream(self._stream):
            self._stream.wait_stream(caller)
            for start, count, size in pieces(len(inputs), self._sizes[tower]):
                slot = self._slot(tower, size, inputs)
                # Rows beyond `count` keep what an earlier batch left there: rows do not depend on each other.
                slot.inputs[:count].copy_(inputs[start : start + count])
                output[start : start + count].copy_(slot.replay()[:count])
            caller.wait_stream(self._stream)
        return output

    def _slot(self, tower: str, size: int, like: Tensor) -> Recorded:
        slot = self._recorded.get((tower, size))
        if slot is None:
            inputs = like.new_zeros((size, *like.shape[1:]))
            try:
                slot = Recorded(inputs, self._record(tower, inputs))
            except Exception as error:
                raise RuntimeError(
                    f"the {tower} tower cannot be recorded as a CUDA graph at batch {size} ({error}); "
                    "load it with graphs=False"
                ) from error
            self._recorded[tower, size] = slot
        return slot

    def close(self) -> None:
        with self._lock:
            self._stream.synchronize()
            self._recorded.clear()
        self._runner.close()


class Capture:
    """A `Record` for what runs on PyTorch's current stream.

    The graphs take their memory from one pool: they never run at the same time, and their outputs stay alive, so that
    one graph can only reuse what another needs while it runs.
    """

    def __init__(self, runner: Runner, stream: torch.cuda.Stream):
        self._run, self._stream, self._pool = runner.run, stream, torch.cuda.graph_pool_handle()

    def __call__(self, tower: str, inputs: Tensor) -> Callable[[], Tensor]:
        for _ in range(WARM_UPS):
            self._run(tower, inputs)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on with theirs, such as allocating memory; only this one is held to what a capture allows.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = self._run(tower, inputs)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
