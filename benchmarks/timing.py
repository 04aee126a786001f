"""How long something takes on the device at hand, and how fast that device copies."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def repetitions_ms(
    step: Callable[[], object], device: torch.device, *, seconds: float, least: int = 5, most: int = 200
) -> list[float]:
    """Milliseconds of each repetition, after warm-up: at least `least`, until `seconds` are spent.

    On a GPU by events, with a cold L2 cache: a buffer of twice its size is overwritten before each repetition.
    """
    for _ in range(2):
        step()
    found: list[float] = []
    began = time.perf_counter()
    flush = None
    if device.type == "cuda":
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(size, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
    while len(found) < least or (time.perf_counter() - began < seconds and len(found) < most):
        if flush is None:
            start = time.perf_counter()
            step()
            found.append(1000 * (time.perf_counter() - start))
        else:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
    return found


def interleaved_ms(
    steps: dict[str, Callable[[], object]], device: torch.device, *, seconds: float, rounds: int = 5
) -> dict[str, list[float]]:
    """`repetitions_ms` of each step, in turns: what else the machine does in the meantime meets all of them alike.

    In blocks, not one by one: after another step has freed its memory, the first repetitions pay for page faults.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name] += repetitions_ms(step, device, seconds=seconds / rounds, least=3)
    return found


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


def summary(repetitions: list[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile, and the least."""
    if len(repetitions) < 2:
        return dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "min_ms"), repetitions[0])
    fifths = statistics.quantiles(repetitions, n=5, method="inclusive")
    middle, least = statistics.median(repetitions), min(repetitions)
    return {"median_ms": middle, "p20_ms": fifths[0], "p80_ms": fifths[3], "min_ms": least}


def copy_gb_s(device: torch.device) -> float:
    """Bytes read plus written per second (10⁹) by copying a tensor that no cache holds."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = repetitions_ms(lambda: target.copy_(source), device, seconds=0.5)
    return 2 * source.numel() / statistics.median(times) / 1e6


def peak_extra_mb(step: Callable[[], object], device: torch.device) -> float | None:
    """Memory (10⁶ bytes) that a step needs beyond what is there; None where it cannot be told (CPU)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6
