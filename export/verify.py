"""The numerical gates: an exported encoder gives the vectors that PyTorch gives in float32, or it is refused."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from mvam_fast.export import samples
from mvam_fast.export.bundle import ExportError

BATCHES = (1, 3, 8, 17)
GALLERY = 256


class Limits(NamedTuple):
    """What a precision may cost, on vectors of length 1: largest difference of a component, least cosine.

    `tie`: neighbours whose scores differ by less may change places, in standard deviations of the scores (1/√F); None
    where the five nearest may change.
    """

    max_abs: float
    cosine: float
    tie: float | None


LIMITS = {
    "fp32": Limits(1e-5, 0.9999, 1e-3),
    "fp16": Limits(5e-3, 0.9999, 0.05),
    "bf16": Limits(4e-2, 0.999, 0.2),
    "int8": Limits(0.5, 0.9, None),  # its cost is told, not promised
}


def check_parity(
    name: str, run: Callable[[np.ndarray], np.ndarray], tower: str, kept: dict, manifest: dict, *,
    batches: tuple[int, ...] = BATCHES, limits: Limits | None = None,
) -> dict[str, dict]:  # fmt: skip
    """`run` (inputs [b,...] → embeddings [b,F]) against the samples `kept` in a bundle, at each of `batches`.

    Per batch size: largest absolute difference, least cosine, and the share of embeddings that have the same five
    nearest neighbours in a fixed random gallery. ExportError, which calls the encoder `name`, beyond `limits`, by
    default those of the manifest's precision.
    """
    limits = limits or LIMITS[manifest["precision"]]
    report = {}
    for batch in batches:
        expected = samples.expected(tower, kept, batch)
        found = run(samples.inputs_of(tower, kept, manifest, batch))
        if found.shape != expected.shape:
            raise ExportError(f"{name}: output is {found.shape}, PyTorch gives {expected.shape}")
        report[str(batch)] = compare(found, expected, limits.tie)
    bad = {
        batch: row for batch, row in report.items()
        if not (
            row["max_abs"] <= limits.max_abs and row["cosine"] >= limits.cosine
            and (limits.tie is None or row["top5"] == 1)
        )
    }  # fmt: skip
    if bad:
        same = "" if limits.tie is None else ", the same top 5"
        raise ExportError(
            f"{name} disagrees with PyTorch: {bad}; "
            f"allowed are max_abs ≤ {limits.max_abs}, cosine ≥ {limits.cosine}{same}"
        )
    return report


def compare(found: np.ndarray, expected: np.ndarray, tie: float | None) -> dict[str, float]:
    """The measures of `check_parity` for embeddings [n,F]."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    cosine = (found * expected).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1))
    gallery = np.random.default_rng(0).standard_normal((GALLERY, expected.shape[1]))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    scale = expected.shape[1] ** -0.5
    return {
        "max_abs": float(np.abs(found - expected).max()),
        "cosine": float(cosine.min()),
        "top5": float(_same_neighbours(found @ gallery.T, expected @ gallery.T, (tie or 0) * scale).mean()),
    }


def _same_neighbours(found: np.ndarray, expected: np.ndarray, tie: float, k: int = 5) -> np.ndarray:
    """[n] whether the k best by `found` [n,G] are the k best by `expected`, up to ties."""
    chosen = np.take_along_axis(expected, np.argsort(-found, 1)[:, :k], 1)
    best = -np.sort(-expected, 1)[:, :k]
    return (np.abs(-np.sort(-chosen, 1) - best) <= tie).all(1)


def check_half_arithmetic(tower, name: str, kept: dict, manifest: dict, *, batch: int = 3) -> dict[str, float]:
    """PyTorch itself in half precision, every operation rounded, on a few samples; ExportError where that overflows.

    ONNX Runtime's CPU computes half precision in float32, so its parity does not see a range that is exceeded.
    """
    inputs = torch.from_numpy(samples.inputs_of(name, kept, _as_float(manifest), batch))
    with torch.no_grad():
        found = tower(inputs).numpy()
    row = compare(found, samples.expected(name, kept, batch), LIMITS[manifest["precision"]].tie)
    if not row["cosine"] >= LIMITS[manifest["precision"]].cosine:
        raise ExportError(
            f"the {name} encoder in {manifest['precision']}: PyTorch's own arithmetic gives {row} against float32; "
            f"allowed is cosine ≥ {LIMITS[manifest['precision']].cosine}. Use another precision"
        )
    return row


def _as_float(manifest: dict) -> dict:
    """The manifest of the same encoder with normalised images as its input."""
    image = manifest["towers"]["image"] | {"input": {"dtype": "float32"}}
    return {**manifest, "towers": {**manifest["towers"], "image": image}}
