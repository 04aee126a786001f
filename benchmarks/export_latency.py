"""What the caller of an exported encoder waits for, beside PyTorch and beside ONNX Runtime's bare session."""
from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import torch
from encoder_cases import Candidate, Made, blocks_in_turns, bound, check, eager, timed
from encoder_models import CLIP, FUSED, Compared
from export_cases import Exports, views_subject
from gate import reason
from machine import clocks, clocks_between
from timing import Clock
from torch import Tensor

from mvam_fast import Encoder

PLAIN, INT8 = "fp32 plain", "int8"
# (model, who runs it, form): all of a case take turns.
WAYS = (
    (FUSED, "eager", "fp32"), (FUSED, "session", PLAIN), (FUSED, "encoder", PLAIN), (FUSED, "encoder", INT8),
    (CLIP, "eager", "fp32"), (CLIP, "session", PLAIN),
)  # fmt: skip
BUNDLES = tuple(dict.fromkeys((model, form) for model, runner, form in WAYS if runner != "eager"))
# name: (way, other way): how many times as long as the other it takes
RATIOS = {
    "times_session": [((FUSED, "encoder", PLAIN), (FUSED, "session", PLAIN))],
    "times_eager": [(way, (FUSED, "eager", "fp32")) for way in WAYS if way[:2] == (FUSED, "encoder")],
    "times_clip": [((FUSED, *way[1:]), way) for way in WAYS if way[0] == CLIP],
}


class Latency:
    """Times one model; its bundles are those of `exports`."""

    def __init__(self, name: str, views: int, device: torch.device, exports: Exports):
        self._name, self._views, self._device, self._exports = name, views, device, exports

    @cached_property
    def _compared(self) -> Compared:
        """Three models, one of them in float64: only made when something is timed."""
        return Compared(self._name, self._views, self._device, torch.float32)

    def measure(self, tower: str, batch: int, seconds: float, tick: Callable[[str], object]) -> list[dict]:
        """The rows of a case, every way of encoding the same inputs."""
        inputs = self._compared.inputs(tower, batch)
        exact = {model: self._compared.exact(model, tower, inputs) for model in (CLIP, FUSED)}
        with ExitStack() as opened:
            candidates = {}
            encoders = Encoders(self._device, opened)
            for way in WAYS:
                tick(f"{tower} {batch}: {', '.join(way)}")
                candidates[way] = self._candidate(way, tower, inputs, exact[way[0]], encoders)
            self._exports.let_go()
            tick(f"{tower} {batch}: timing")
            before = clocks(self._device)
            ready = [candidate for candidate in candidates.values() if candidate.step]
            blocks = blocks_in_turns(Clock(self._device), ready, seconds)
            between = clocks_between(before, clocks(self._device))
        rows = []
        for (model, runner, form), candidate in candidates.items():
            row = {"work": "latency", "tower": tower, "batch": batch, "model": model, "runner": runner, "form": form}
            if candidate.reason:
                rows.append(row | {"reason": candidate.reason})
            else:
                rows.append(row | candidate.facts | timed(blocks[candidate.model], batch) | {"clocks": between})
        return with_ratios(rows)

    def _candidate(self, way: tuple, tower: str, inputs: Tensor, exact: Tensor, encoders: Encoders) -> Candidate:
        candidate = Candidate(", ".join(way))
        try:
            made = self._made(way, tower, inputs, encoders)
            found = made.step()
            candidate.facts = {
                "precision": made.precision, "details": made.details(), "errors": check(found, exact, made.precision),
            }  # fmt: skip
            candidate.step = made.step
        except Exception as error:  # whatever one does, the others are still timed
            candidate.reason = reason(error)
        return candidate

    def _made(self, way: tuple, tower: str, inputs: Tensor, encoders: Encoders) -> Made:
        model, runner, form = way
        if runner == "eager":
            return eager(self._compared, None, model, tower, inputs)
        path = self._exports.of(views_subject(self._name, model, self._views), form)
        encoder = encoders.of(path, graphs=runner == "encoder")
        precision = "int8" if form == INT8 else "tf32" if self._device.type == "cuda" else "float32"
        if runner == "session":
            step = bound(encoder, tower, inputs)
        else:
            encode = getattr(encoder, f"encode_{tower}")
            step = lambda: encode(inputs)  # noqa: E731
        return Made(step, precision, lambda: encoder.backend)


class Encoders:
    """Opened once each, and closed with `opened`. On a CPU the bare session is the very one that the Encoder calls."""

    def __init__(self, device: torch.device, opened: ExitStack):
        self._device, self._opened = device, opened
        self._found: dict[tuple, Encoder] = {}

    def of(self, path: Path, *, graphs: bool) -> Encoder:
        """`graphs`: on a GPU, where an Encoder's session that records graphs is no bare session any more."""
        graphs = graphs and self._device.type == "cuda"
        if (path, graphs) not in self._found:
            # As many threads as PyTorch has: left alone, ONNX Runtime would take every core.
            encoder = Encoder.load(
                path, f"onnxruntime-{self._device.type}", threads=torch.get_num_threads(), graphs=graphs
            )  # fmt: skip
            self._found[path, graphs] = self._opened.enter_context(encoder)
        return self._found[path, graphs]


def with_ratios(rows: list[dict]) -> list[dict]:
    """`rows` of one case, with RATIOS: of the medians of each block, which took turns; their median, least and most."""
    timed_rows = {(row["model"], row["runner"], row["form"]): row for row in rows if "median_ms" in row}
    for name, pairs in RATIOS.items():
        for way, other in pairs:
            if way in timed_rows and other in timed_rows:
                timed_rows[way][name] = _ratio(timed_rows[way], timed_rows[other])
    return rows


def _ratio(row: dict, other: dict) -> dict[str, float]:
    pairs = zip(row["blocks_ms"], other["blocks_ms"], strict=True)
    found = [statistics.median(mine) / statistics.median(its) for mine, its in pairs]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}
