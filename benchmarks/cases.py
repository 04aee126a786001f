"""One case: every provider, in every mode and setting, on the same inputs, in turns."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gate import Wrong, check, outputs_of, results_of
from machine import clocks
from providers import BASELINES, PROVIDERS, Unavailable
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
    setting: str
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
    backward = Backward(op, work)

    def forward():
        with torch.no_grad():
            return op(*work.leaves.values())

    def both():
        backward.before()
        backward()

    return {FORWARD: forward, BACKWARD: backward, BOTH: both}


def measure(
    case: Case, providers: list[str], settings: list[str], device: torch.device, seconds: float, tick: Callable
) -> list[dict]:
    """The rows of a case. `tick(text)` is called as the work goes on."""
    torch._dynamo.reset()  # what earlier cases compiled
    length, width = SHAPES[case.shape]
    given = works(case.batch, length, width, case.views, DTYPES[case.dtype], device)
    candidates = []
    for setting in settings:
        for provider in providers:
            if setting == "compiled model" and not PROVIDERS[provider].in_model:
                continue
            tick(f"{case.shape} {provider}, {setting}")
            candidates.append(_candidate(provider, setting, given, case.views, device))
    clock, before = Clock(device), clocks(device)
    rows = []
    for setting in settings:
        for mode in SETTINGS[setting]:
            tick(f"{case.shape} {mode}, {setting}")
            chosen = {c.provider: c for c in candidates if c.setting == setting and mode in c.steps}
            steps = {name: candidate.steps[mode] for name, candidate in chosen.items()}
            blocks = clock.interleaved_blocks_ms(steps, seconds=seconds)
            for candidate in (c for c in candidates if c.setting == setting):
                row = {
                    **case.fields(), "provider": candidate.provider, "work": PROVIDERS[candidate.provider].work,
                    "setting": setting, "mode": mode,
                }  # fmt: skip
                if mode in candidate.reasons:
                    rows.append({**row, "reason": candidate.reasons[mode]})
                    continue
                row |= candidate.facts | _times(blocks[candidate.provider])
                row |= _traffic(candidate.work, mode, row["median_ms"])
                row["peak_extra_mb"] = candidate.memory[mode]
                if setting == "eager" and device.type == "cuda" and mode != BACKWARD:
                    row |= _times(clock.call_blocks_ms(steps[candidate.provider], seconds=seconds / 4), "call_")
                rows.append(row)
    found = clocks(device)
    for row in rows:
        row["clocks"] = {name: [before[name], found[name]] for name in before if name in found}
    _add_ratios(rows)
    return rows


def _candidate(provider: str, setting: str, given: dict[str, Work], views: int, device: torch.device) -> Candidate:
    """Made ready and let through the gate; whatever a peer does, the others are still timed."""
    candidate = Candidate(provider, setting)
    modes = SETTINGS[setting]
    began = time.perf_counter()
    try:
        made = PROVIDERS[provider].make(given, views)
        op, work = made.op, made.work
        if setting == "compiled model":
            op, work = torch.compile(around(op, work.name == "norm+pool"), dynamic=False), given["model"]
        candidate.work = work
        errors = check(outputs_of(op, work), work)
        candidate.facts = {"details": made.details, "forward_errors": errors}
    except Exception as error:
        candidate.reasons = dict.fromkeys(modes, _reason(error))
        return candidate
    steps = steps_of(op, work)
    try:
        candidate.facts["errors"] = check(results_of(op, work), work)
        candidate.facts["saved_mb"] = saved_mb(lambda: op(*work.leaves.values()), tuple(work.leaves.values()))
    except Exception as error:  # it has a forward only
        candidate.reasons = {mode: _reason(error) for mode in modes if mode != FORWARD}
    candidate.facts["first_result_s"] = time.perf_counter() - began
    for mode in modes:
        if mode in candidate.reasons:
            continue
        try:
            step = steps[mode]
            candidate.memory[mode] = peak_extra_mb(step, device)
            candidate.steps[mode] = captured(step) if setting == "CUDA graph" else step
        except Exception as error:
            candidate.reasons[mode] = _reason(error)
    return candidate


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    text = str(error) if isinstance(error, (Unavailable, Wrong)) else f"{type(error).__name__}: {error}"
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


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
