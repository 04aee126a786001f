"""Which captions are true of which scenes, and how well a perfect reader of them could retrieve."""
from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np

from ..files import read_json
from .scenes import quadrant, relation_holds


def is_true(claims: dict, scene: dict) -> bool:
    """Whether distinct objects of the scene satisfy every claim of a caption at once."""
    if claims.get("count", len(scene["objects"])) != len(scene["objects"]):
        return False
    if any(scene[name] != claims.get(name, scene[name]) for name in ("background", "gradient")):
        return False
    wanted = claims["objects"]
    fits = [[item for item in scene["objects"] if _matches(claim, item)] for claim in wanted]
    if not all(fits):
        return False
    for chosen in permutations(scene["objects"], len(wanted)):
        if all(item in fit for item, fit in zip(chosen, fits, strict=True)):
            if "relation" not in claims or relation_holds(claims["relation"], *chosen):
                return True
    return False


def _matches(claim: dict, item: dict) -> bool:
    return all((quadrant(item) if name == "quadrant" else item[name]) == value for name, value in claim.items())


def _truth_table(captions: list[dict], scenes: list[dict]) -> np.ndarray:
    """`is_true` of every caption and scene [captions, scenes], asked only where each object has a match of its own."""
    matches: dict[tuple, np.ndarray] = {}
    table = np.zeros((len(captions), len(scenes)), bool)
    for row, claims in enumerate(captions):
        possible = np.ones(len(scenes), bool)
        for claim in claims["objects"]:
            key = tuple(sorted(claim.items()))
            if key not in matches:
                matches[key] = np.array([any(_matches(claim, item) for item in scene["objects"]) for scene in scenes])
            possible &= matches[key]
        for column in np.flatnonzero(possible):
            table[row, column] = is_true(claims, scenes[column])
    return table


def oracle_recall(dataset_json: str | Path, split: str = "test") -> dict[str, float]:
    """Expected recall (percent) of a reader that knows which captions are true of which image and guesses among them.

    The keys are those of `metrics.recall_metrics`. Not a strict bound: what a caption leaves unsaid is a hint as well.
    """
    images = [row for row in read_json(dataset_json, "dataset_json")["images"] if row["split"] == split]
    claims = [sentence["claims"] for row in images for sentence in row["sentences"]]
    owner = np.array([index for index, row in enumerate(images) for _ in row["sentences"]])
    true = _truth_table(claims, [row["scene"] for row in images])
    recalls = {}
    per_caption = true.sum(1)
    for k in (1, 5, 10):
        recalls[f"t2i_r{k}"] = 100 * float(np.minimum(1, k / per_caption).mean())
    for k in (1, 5, 10):
        hits = []
        for image in range(len(images)):
            total, own = int(true[:, image].sum()), int((owner == image).sum())
            # The chance that k draws without replacement from the true captions miss all of the image's own.
            miss = np.prod([max(total - own - i, 0) / max(total - i, 1) for i in range(min(k, total))])
            hits.append(1 - miss)
        recalls[f"i2t_r{k}"] = 100 * float(np.mean(hits))
    return {**recalls, "rsum": sum(recalls.values())}
