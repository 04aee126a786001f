"""What an engine must pass before its bundle is kept, and how fast it is: on the GPU, with the bundle's own samples."""
from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from mvam_fast.export import samples
from mvam_fast.export.bundle import TOWERS
from mvam_fast.export.verify import Limits, check_parity

from mvam_fast.serving.trt_runner import TrtRunner

# Against PyTorch in float32. What the largest difference is gets reported; the cosine decides.
COSINE = {"fp32": 0.9999, "fp16": 0.9995, "bf16": 0.995}
WARM_UPS, LEAST, MOST = 10, 100, 1000  # repetitions; of 100, the 99th percentile is the second largest
SECONDS = 1.0  # per batch size, after the least number of repetitions


def check_engines(runner: TrtRunner, bundle: Path, manifest: dict) -> dict[str, dict]:
    """{tower: {batch: largest difference, least cosine, ...}}; ExportError where an engine is not what PyTorch is.

    Each profile at its min, opt and max, then every batch size as users run it, with CUDA graphs. Of a batch size that
    is run in several ways, the one that comes out worst is told.
    """
    kept, report = samples.load(bundle), {}
    limits = Limits(math.inf, COSINE[manifest["precision"]], None)
    for tower in TOWERS:
        file, report[tower] = manifest["towers"][tower]["file"], {}

        def run(inputs: np.ndarray, tower=tower, **which) -> np.ndarray:
            front = runner.engines if which else runner
            return front.run(tower, torch.from_numpy(inputs).to(runner.device), **which).cpu().numpy()

        ways = [
            (f"{file}, profile {number}", profile.batches, lambda inputs, number=number: run(inputs, profile=number))
            for number, profile in enumerate(runner.engines.profiles)
        ]
        ways.append((f"{file}, with CUDA graphs", runner.sizes, run))
        for name, batches, way in ways:
            rows = check_parity(name, way, tower, kept, manifest, batches=batches, limits=limits)
            for batch, row in rows.items():
                worst = report[tower].setdefault(batch, row)
                report[tower][batch] = min(worst, row, key=lambda one: one["cosine"])
        report[tower] = dict(sorted(report[tower].items(), key=lambda item: int(item[0])))
    return report


def latency(runner: TrtRunner, bundle: Path, manifest: dict) -> dict[str, dict]:
    """{tower: {batch: {"median_ms", "p99_ms", "embeddings_per_s"}}}: what a caller waits for, input on the GPU."""
    kept, report = samples.load(bundle), {}
    for tower in TOWERS:
        report[tower] = {}
        for batch in runner.sizes:
            inputs = torch.from_numpy(samples.inputs_of(tower, kept, manifest, batch)).to(runner.device)
            taken = _repeat(runner, tower, inputs)
            median = statistics.median(taken)
            report[tower][str(batch)] = {
                "median_ms": round(median, 4),
                "p99_ms": round(statistics.quantiles(taken, n=100, method="inclusive")[-1], 4),
                "embeddings_per_s": round(1000 * batch / median),
            }
    return report


def _repeat(runner: TrtRunner, tower: str, inputs: torch.Tensor) -> list[float]:
    """Milliseconds of single calls, each until its result is there."""
    taken: list[float] = []
    began = None
    for repetition in range(WARM_UPS + MOST):
        torch.cuda.synchronize(runner.device)
        start = time.perf_counter()
        runner.run(tower, inputs)
        torch.cuda.synchronize(runner.device)
        end = time.perf_counter()
        if repetition < WARM_UPS:
            continue
        began = began or start
        taken.append(1000 * (end - start))
        if len(taken) >= LEAST and end - began > SECONDS:
            break
    return taken
