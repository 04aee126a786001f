"""How long something takes on the device at hand, how much memory, and how fast that device can be at all."""
from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from machine import cache_bytes
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]
WARM_UPS = 3  # runs ahead of a capture
HEAD_START = 2_000_000  # clock cycles that the GPU waits while the host launches: about a millisecond
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler reports a missing GPU as an error, once per process


def _nothing() -> None:
    pass


class Clock:
    """Times single repetitions, each with a cold last-level cache.

    Before each, a buffer of twice the cache's size is *read*: overwriting it would leave dirty lines that the step
    then pays to write back. GPU times are between events on the stream, which is kept busy until the host has launched
    all of a short step: they show what the device does; what the host needs is in `call_blocks_ms`. A step may have a
    method `before`, which runs ahead of each repetition and is not timed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._buffer = torch.ones(2 * cache_bytes(device) // 4, device=device)

    def repetition_ms(self, step: Step) -> float:
        getattr(step, "before", _nothing)()
        self._buffer.sum()
        if self.device.type != "cuda":
            start = time.perf_counter()
            step()
            return round(1000 * (time.perf_counter() - start), 6)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        start.record()
        step()
        end.record()
        end.synchronize()
        return round(start.elapsed_time(end), 6)

    def block_ms(self, step: Step, *, seconds: float, least: int = 3, most: int = 100) -> list[float]:
        """At least `least` repetitions after two for warm-up, then until `seconds` are spent."""
        for _ in range(2):
            self.repetition_ms(step)
        found: list[float] = []
        began = time.perf_counter()
        while len(found) < least or (time.perf_counter() - began < seconds and len(found) < most):
            found.append(self.repetition_ms(step))
        return found

    def interleaved_blocks_ms(
        self, steps: dict[str, Step], *, seconds: float, rounds: int = 5
    ) -> tuple[dict[str, list[list[float]]], dict[str, Exception]]:
        """`rounds` blocks of each step, in turns: what else the machine does meanwhile meets all of them alike.

        The second result has the steps that failed; the others are timed all the same.

        In blocks, not one by one: after another step has freed its memory, the first repetitions pay for page faults.
        `seconds` is for each step, over all rounds.
        """
        found: dict[str, list[list[float]]] = {name: [] for name in steps}
        failed: dict[str, Exception] = {}
        for _ in range(rounds):
            for name, step in steps.items():
                if name in failed:
                    continue
                try:
                    found[name].append(self.block_ms(step, seconds=seconds / rounds))
                except Exception as error:
                    failed[name] = error
        return {name: blocks for name, blocks in found.items() if name not in failed}, failed

    def call_blocks_ms(self, step: Step, *, seconds: float, rounds: int = 5) -> list[list[float]]:
        """What a caller waits for: wall clock of step and synchronisation, caches as the last call left them."""
        found = []
        for _ in range(rounds):
            block: list[float] = []
            began = time.perf_counter()
            while len(block) < 5 or (time.perf_counter() - began < seconds / rounds and len(block) < 200):
                start = time.perf_counter()
                step()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                block.append(round(1000 * (time.perf_counter() - start), 6))
            found.append(block)
        return found


def summary(repetitions: list[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile, and the least."""
    if len(repetitions) < 2:
        return dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "min_ms"), repetitions[0])
    fifths = statistics.quantiles(repetitions, n=5, method="inclusive")
    middle, least = statistics.median(repetitions), min(repetitions)
    return {"median_ms": middle, "p20_ms": fifths[0], "p80_ms": fifths[3], "min_ms": least}


def captured(step: Step) -> tuple[Step, object]:
    """The replay of `step` as a CUDA graph, captured after WARM_UPS runs on a stream of its own; and what `step`
    returned while it was captured, which every replay fills anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = step()
    return graph.replay, kept


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device reaches now: copy (bytes read + written) and read-only bandwidth, and matrix products.

    Tensors are beyond every cache; the best of five blocks' medians, since a limit is what can be reached.
    """
    clock = Clock(device)
    gpu = device.type == "cuda"
    source = torch.ones(1 << (28 if gpu else 25), device=device)
    target = torch.empty_like(source)
    size = source.numel() * 4
    copy_ms = _best(clock, lambda: target.copy_(source))
    read_ms = min(_best(clock, reduce) for reduce in (source.sum, source.amax))
    found = {"copy_gb_s": 2 * size / copy_ms / 1e6, "read_gb_s": size / read_ms / 1e6}
    side = 8192 if gpu else 1024
    for dtype in (torch.float32, *((torch.float16, torch.bfloat16) if gpu else ())):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        found[f"{str(dtype)[6:]}_gflop_s"] = 2 * side**3 / _best(clock, lambda a=a, b=b: a @ b) / 1e6
    return found


def _best(clock: Clock, step: Step) -> float:
    return min(statistics.median(clock.block_ms(step, seconds=0.1)) for _ in range(5))


def saved_mb(outputs: Callable[[], object], leaves: tuple[torch.Tensor, ...]) -> float:
    """What autograd keeps for the backward besides the inputs, 10⁶ bytes."""
    inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = outputs()  # or its addresses could be used again
    del alive
    return sum(kept.values()) / 1e6


def peak_extra_mb(step: Step, device: torch.device) -> float:
    """Memory (10⁶ bytes) that a step needs at its peak beyond what is there: tensors, as the allocator counts them."""
    getattr(step, "before", _nothing)()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6
