"""What the ablation trains: groups of cells, each a name and how its settings differ from BASE."""
from __future__ import annotations

SEEDS = (0, 1, 2)
# As in the demo: 256 numbers per image or text, 64 pairs of near-duplicates in every batch.
BASE = {
    "model": "scenes-ViT-T-16", "views": 8, "embed_dim": 32, "batch_size": 128, "siblings": 2, "steps": 500,
    "warmup": 80, "weight_decay": 0.05, "lr": 1e-3, "diversity_weight": 0.0, "cache_images": True, "device": "cpu",
    "tensorboard": False,
}  # fmt: skip

_SINGLE = {"views": 0, "global_view": True}
_MEAN = {"views": 1, "code_std": 0.0, "train_codes": False}
# Every way of making 256 numbers of one kind of pooling, and MVAM's: what the learning rate is tuned for.
POOLINGS = {
    "class / end token": {**_SINGLE, "embed_dim": 256},
    "mean of tokens": {**_MEAN, "embed_dim": 256},
    "one learned query": {"views": 1, "embed_dim": 256},
    "8 views of 32": {},
}
RATES = (5e-4, 1e-3, 2e-3)
TUNING = {f"{name}, lr {rate:g}": {**cell, "lr": rate} for name, cell in POOLINGS.items() for rate in RATES}


def _weights(kind: str, *weights: float, **more) -> dict[str, dict]:
    suffix = "".join(f", {value}" for value in more.values())
    return {f"{kind} {w:g}{suffix}": {"diversity_kind": kind, "diversity_weight": w, **more} for w in weights}
