"""One case: every provider, in every mode and setting, on the same inputs, in turns."""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gate import check, outputs_of, reason, results_of
from machine import clocks, clocks_between
from providers import BASELINES, PROVIDERS
from shapes import DTYPES, SHAPES
from timing import Clock, captured, peak_extra_mb, saved_mb, summary
from work import Op, Work, around, works

FORWARD, BACKWARD, BOTH = MODES = ("forward", "backward", "forward+backward")
# What surrounds the call: nothing; a CUDA graph; the rest of a tower, all of it compiled by torch.compile.
SETTINGS = {"eager": MODES, "CUDA graph": (FORWARD, BOTH), "compiled model": (FORWARD, BOTH)}


@dataclass(frozen=True)
class Case:
    shape: str
    batch: int
    views: int
    dtype: str

    def fields(self) -> dict:
        return dict(vars(self))


@dataclass
class Candidate:
    """A provider in one setting: its steps by mode, or why a mode has none, and what its rows say besides times."""

    provider: str
    work: Work | None = None
    steps: dict[str, Callable] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


class Backward:
    """The backward alone: the forward that it needs runs before each repetition, untimed."""

    def __init__(self, op: Op, work: Work):
        self.op, self.work, self.outputs = op, work, ()

    def before(self) -> None:
        self.outputs = self.op(*self.work.leaves.values())

    def __call__(self) -> None:
        outputs, self.outputs = self.outputs, ()
        gradients = [g.to(o.dtype) for g, o in zip(self.work.d_outputs.values(), outputs, strict=True)]
        torch.autograd.grad(outputs, list(self.work.leaves.values()), gradients, allow_unused=True)


def steps_of(op: Op, work: Work) -> dict[str, Callable]:
    """What is timed, by mode. Forward, and both, return their results by name."""
    return {
        FORWARD: lambda: outputs_of(op, work), BACKWARD: Backward(op, work), BOTH: lambda: results_of(op, work),
    }  # fmt: skip


def measure(
    case: Case, providers: list[str], settings: list[str], device: torch.device, seconds: float, tick: Callable
) -> list[dict]:
    """The rows of a case. `tick(text)` is called as the work goes on."""
    torch._dynamo.reset()  # what earlier cases compiled
    length, width = SHAPES[case.shape]
    given = works(case.batch, length, width, case.views, DTYPES[case.dtype], device)
    clock, rows = Clock(device), []
    for setting in settings:
        candidates = []  # of one setting at a time: each graph holds memory of its own
        for provider in providers:
            if setting != "compiled model" or PROVIDERS[provider].in_model:
                tick(f"{case.shape} {provider}, {setting}")
                candidates.append(_candidate(provider, setting, given, case.views, device))
        for mode in SETTINGS[setting]:
            tick(f"{case.shape} {mode}, {setting}")
            rows += _rows(case, setting, mode, candidates, clock, seconds)
    _add_ratios(rows)
    return rows


def _rows(
    case: Case, setting: str, mode: str, candidates: list[Candidate], clock: Clock, seconds: float
) -> list[dict]:
    steps = {c.provider: c.steps[mode] for c in candidates if mode in c.steps}
    before = clocks(clock.device)
    blocks, failed = clock.interleaved_blocks_ms(steps, seconds=seconds)
    calls: dict[str, list[list[float]]] = {}
    if setting == "eager" and clock.device.type == "cuda" and mode != BACKWARD:
        calls = {name: clock.call_blocks_ms(steps[name], seconds=seconds / 4) for name in blocks}
    after = clocks(clock.device)
    rows = []
    for candidate in candidates:
        name = candidate.provider
        row = {
            **case.fields(), "provider": name, "work": PROVIDERS[name].work, "setting": setting, "mode": mode,
            "clocks": clocks_between(before, after),
        }  # fmt: skip
        if name not in blocks:
            rows.append({**row, "reason": reason(failed[name]) if name in failed else candidate.reasons[mode]})
            continue
        row |= candidate.facts | _times(blocks[name])
        row |= _traffic(candidate.work, mode, row["median_ms"])
        row |= {"peak_extra_mb": candidate.memory[mode]} if mode in candidate.memory else {}
        row |= _times(calls[name], "call_") if name in calls else {}
        rows.append(row)
    return rows


def _candidate(provider: str, setting: str, given: dict[str, Work], views: int, device: torch.device) -> Candidate:
    """Made ready and let through the gate; whatever a peer does, the others are still timed."""
    candidate = Candidate(provider)
    modes = SETTINGS[setting]
    began = time.perf_counter()
    try:
        op, work, details = PROVIDERS[provider].make(given, views)
        if setting == "compiled model":
            op, work = torch.compile(around(op, work.name == "norm+pool"), dynamic=False), given["model"]
        found = outputs_of(op, work)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        candidate.facts = {"details": details, "first_call_s": time.perf_counter() - began}
        candidate.work, candidate.facts["forward_errors"] = work, check(found, work)
    except Exception as error:
        candidate.reasons = dict.fromkeys(modes, reason(error))
        return candidate
    steps = steps_of(op, work)
    try:
        candidate.facts["errors"] = check(results_of(op, work), work)
        candidate.facts["saved_mb"] = saved_mb(lambda: op(*work.leaves.values()), tuple(work.leaves.values()))
    except Exception as error:  # it has a forward only
        candidate.reasons = {mode: reason(error) for mode in modes if mode != FORWARD}
    for mode in modes:
        if mode in candidate.reasons:
            continue
        try:
            if setting == "CUDA graph":  # what it holds is its own pool, not what the eager step needs
                candidate.steps[mode] = _replay(steps[mode], work)
            else:
                candidate.memory[mode] = peak_extra_mb(steps[mode], device)
                candidate.steps[mode] = steps[mode]
        except Exception as error:
            candidate.reasons[mode] = reason(error)
    return candidate


def _replay(step: Callable, work: Work) -> Callable:
    """`step` as a CUDA graph, whose replay has written every result anew, and rightly."""
    replay, kept = captured(step)
    for tensor in kept.values():
        tensor.fill_(math.nan)
    replay()
    check(kept, work)
    return replay


def _times(blocks: list[list[float]], prefix: str = "") -> dict:
    statistics = summary([time for block in blocks for time in block])
    return {f"{prefix}blocks_ms": blocks, **{prefix + name: value for name, value in statistics.items()}}


def _traffic(work: Work, mode: str, milliseconds: float) -> dict:
    found = {"bytes": work.moved_bytes(mode)}
    found["gb_s"] = found["bytes"] / milliseconds / 1e6
    if work.flops(mode) is not None:
        found |= {"flops": work.flops(mode), "gflop_s": work.flops(mode) / milliseconds / 1e6}
    return found


def _add_ratios(rows: list[dict]) -> None:
    """`ratio`: the baseline's time over this one's; `ours_ratio`: this one's over our best for the same work."""
    timed = {(row["setting"], row["mode"], row["provider"]): row for row in rows if "median_ms" in row}
    for (setting, mode, _), row in timed.items():
        in_model = setting == "compiled model"
        baseline = timed.get((setting, mode, "naive" if in_model else BASELINES[row["work"]]))
        if baseline is not None:
            row["ratio"] = baseline["median_ms"] / row["median_ms"]
            row["ratio_of_minima"] = baseline["min_ms"] / row["min_ms"]
        works_compared = {"pool", "norm+pool"} if in_model else {"pool" if row["work"] == "own" else row["work"]}
        ours = [
            other["median_ms"] for (s, m, name), other in timed.items()
            if (s, m) == (setting, mode) and PROVIDERS[name].ours and other["work"] in works_compared
        ]  # fmt: skip
        if ours and not PROVIDERS[row["provider"]].ours:
            row["ours_ratio"] = row["median_ms"] / min(ours)
