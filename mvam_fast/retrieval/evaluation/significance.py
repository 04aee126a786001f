"""What changed between two evaluations of the same data, told from chance by a paired bootstrap over images.

The queries are the sample, the gallery is not: each query keeps the rank that it had among all that was searched. An
image and its captions are drawn together, since captions of one image are answered alike. Where a protocol searches in
folds, as many images are drawn of each fold as it has.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..._optional import require
from ...files import read_json, write_json
from .provenance import sha256_of_file

KS = (1, 5, 10)
NAMES = (*(f"i2t_r{k}" for k in KS), *(f"t2i_r{k}" for k in KS))
INTERVAL = 95  # percent
_BLOCK_BYTES = 64 * 2**20
# What must be equal for two results to be of the same queries, by the key under "protocol".
_SAME = {
    "protocols": "protocols", "split": "split", "image_ids_sha256": "images (by their ids)",
    "captions_sha256": "captions", "ties": "rule for ties",
}  # fmt: skip


class Ranks(NamedTuple):
    i2t: np.ndarray  # [I] integers, 1 is best
    t2i: np.ndarray  # [T]
    image_of_text: np.ndarray  # [T]
    fold_of_image: np.ndarray  # [I]


def compare(
    a: str | Path, b: str | Path, *, resamples: int = 10_000, seed: int = 0, out: str | Path | None = None
) -> dict:
    """b − a of RSUM and of each recall, with 95 % intervals.

    Args:
        a, b: JSON files that `evaluate` wrote, with the files of ranks beside them. ValueError says in what they
            differ, if it is more than the model.
        resamples, seed: of the bootstrap; the same ones give the same intervals.
        out: the result is also written there, as JSON.

    Returns:
        {"kind", "a", "b" (the files), "models", "resamples", "seed", "interval" (percent), "by_protocol": {protocol:
        {"rsum", "i2t_r1", ...: {"a", "b", "difference", "low", "high"}}}}. Recalls are in percent.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1")
    results = {"a": _read(a, "a"), "b": _read(b, "b")}
    protocols = [result["protocol"] for result in results.values()]
    differing = [
        f"{what}: {protocols[0].get(key)} and {protocols[1].get(key)}"
        for key, what in _SAME.items()
        if protocols[0].get(key) != protocols[1].get(key)
    ]
    if differing:
        raise ValueError(f"a and b were not measured on the same queries; they differ in {'; '.join(differing)}")
    found = {}
    for name in protocols[0]["protocols"]:
        ranks = [_ranks(path, result, name) for path, result in zip((a, b), results.values(), strict=True)]
        found[name] = bootstrap(*ranks, resamples=resamples, seed=seed)
    comparison = {
        "kind": "retrieval comparison", "a": str(a), "b": str(b),
        "models": [protocol["model"] for protocol in protocols],
        "resamples": resamples, "seed": seed, "interval": INTERVAL, "by_protocol": found,
    }  # fmt: skip
    if out is not None:
        write_json(out, comparison)
    return comparison


def bootstrap(a: Ranks, b: Ranks, *, resamples: int = 10_000, seed: int = 0) -> dict[str, dict[str, float]]:
    """{"rsum", "i2t_r1", ...: {"a", "b", "difference" (b − a), "low", "high"}} of two rankings of the same queries."""
    _, fold = np.unique(a.fold_of_image, return_inverse=True)
    folds = [np.flatnonzero(fold == number) for number in range(fold.max() + 1)]
    counts = np.bincount(a.image_of_text, minlength=len(a.i2t)).astype(float)
    hits = [_hits(ranks) for ranks in (a, b)]
    ones = [np.ones((1, len(images))) for images in folds]
    values = [_recalls(one, counts, folds, ones)[0] for one in hits]
    rng = np.random.default_rng(seed)
    size = max(1, _BLOCK_BYTES // (8 * len(a.i2t)))
    drawn = []
    for start in range(0, resamples, size):
        weights = [_weights(rng, min(size, resamples - start), len(images)) for images in folds]
        drawn.append(_recalls(hits[1] - hits[0], counts, folds, weights))
    low, high = np.percentile(np.concatenate(drawn), [(100 - INTERVAL) / 2, (100 + INTERVAL) / 2], axis=0)
    return {
        name: {
            "a": float(values[0][i]), "b": float(values[1][i]), "difference": float(values[1][i] - values[0][i]),
            "low": float(low[i]), "high": float(high[i]),
        }
        for i, name in enumerate(("rsum", *NAMES))
    }  # fmt: skip


def _hits(ranks: Ranks) -> np.ndarray:
    """[I,6]: for each image, whether it found a caption at each k, and how many of its captions found it."""
    columns = [(ranks.i2t <= k).astype(float) for k in KS]
    columns += [np.bincount(ranks.image_of_text, ranks.t2i <= k, minlength=len(ranks.i2t)) for k in KS]
    return np.stack(columns, 1)


def _weights(rng: np.random.Generator, resamples: int, images: int) -> np.ndarray:
    """How often each image is drawn, [resamples, images]."""
    drawn = rng.integers(images, size=(resamples, images)) + images * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * images).reshape(resamples, images).astype(float)


def _recalls(hits: np.ndarray, counts: np.ndarray, folds: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
    """RSUM and the six recalls [R,7] in percent, of hits [I,6] on images with `counts` captions [I], with weights [R,·]
    for each fold: the mean over folds."""
    recalls = 0
    for images, weight in zip(folds, weights, strict=True):
        found = weight @ hits[images]
        queries = np.repeat(np.stack([weight.sum(1), weight @ counts[images]], 1), len(KS), 1)
        recalls = recalls + 100 * found / queries / len(folds)
    return np.concatenate([recalls.sum(1, keepdims=True), recalls], 1)


def _read(path: str | Path, argument: str) -> dict:
    result = read_json(path, argument)
    if not isinstance(result, dict) or result.get("kind") != "retrieval" or "ranks" not in result:
        raise ValueError(f"{argument}: {path} is no result of mvam-fast evaluate --out; it must be, with ranks")
    ranks = Path(path).parent / result["ranks"]["file"]
    if not ranks.is_file():
        raise FileNotFoundError(f"{argument}: {path} has its ranks in {ranks}, which is not there")
    if sha256_of_file(ranks) != result["ranks"]["sha256"]:
        raise ValueError(f"{argument}: {ranks} is not the file that {path} was written with; evaluate again")
    return result


def _ranks(path: str | Path, result: dict, protocol: str) -> Ranks:
    load_file = require("safetensors.numpy", extra="train").load_file
    tensors = load_file(Path(path).parent / result["ranks"]["file"])
    return Ranks(*(tensors[f"{protocol}.{part}"] for part in Ranks._fields))


def comparison_table(comparison: dict) -> str:
    """For people: a row for each number, and whether its interval holds 0."""
    lines = [f"a: {comparison['a']} ({comparison['models'][0]})", f"b: {comparison['b']} ({comparison['models'][1]})"]
    for name, rows in comparison["by_protocol"].items():
        heading = f"{comparison['interval']} % interval"
        lines += ["", f"{name:12}{'a':>9}{'b':>9}{'b − a':>9}{heading:>20}"]
        for metric, row in rows.items():
            label = "RSUM" if metric == "rsum" else metric.replace("_r", " R@")
            interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
            verdict = "" if row["low"] <= 0 <= row["high"] else "  changed"
            lines.append(f"{label:12}{row['a']:9.2f}{row['b']:9.2f}{row['difference']:+9.2f}{interval:>20}{verdict}")
    lines += ["", f"Paired bootstrap over images, {comparison['resamples']} resamples, seed {comparison['seed']}."]
    return "\n".join(lines)
