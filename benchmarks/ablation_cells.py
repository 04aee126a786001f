"""What the ablation trains: groups of cells, each a label and how its settings differ from BASE."""
from __future__ import annotations

from dataclasses import dataclass, field

# 256 numbers per image or text, and 64 pairs of near-duplicates in every batch, as in the demo.
BASE = {
    "model": "scenes-ViT-T-16", "views": 8, "embed_dim": 32, "batch_size": 128, "siblings": 2, "steps": 800,
    "warmup": 150, "weight_decay": 0.05, "lr": 1e-3, "diversity_weight": 0.0, "cache_images": True, "device": "cpu",
    "tensorboard": False,
}  # fmt: skip
DATA = {"scenes": 16000, "scenes-2000": 2000}  # folder: training images


@dataclass(frozen=True)
class Cell:
    label: str
    settings: dict  # over BASE
    data: str = "scenes"


@dataclass(frozen=True)
class Group:
    """Cells that one question is asked of. `reference`: the label that the others are set against."""

    title: str
    cells: list[Cell]
    reference: str
    seeds: tuple[int, ...] = field(default=(0, 1, 2))


_SINGLE = {"views": 0, "global_view": True}
_MEAN = {"views": 1, "code_std": 0.0, "train_codes": False}
# Ways of making 256 numbers: what the learning rate is tuned for. MVAM's is that of all its variants.
MVAM = "MVAM, 8 views of 32"
POOLINGS = {
    "class / end token": {**_SINGLE, "embed_dim": 256},
    "mean of the tokens": {**_MEAN, "embed_dim": 256},
    "one learned query": {"views": 1, "embed_dim": 256},
    MVAM: {},
}
RATES = (2.5e-4, 5e-4, 1e-3)
TUNING = {
    (name, rate): Cell(f"{name}, lr {rate:g}", {**settings, "lr": rate})
    for name, settings in POOLINGS.items() for rate in RATES
}  # fmt: skip


def folder_name(settings: dict) -> str:
    """One for each different training: "lr=0.0005,views=16", or "base"."""
    changed = {key: value for key, value in sorted(settings.items()) if BASE.get(key) != value}
    return ",".join(f"{key}={value}" for key, value in changed.items()) or "base"


def rates_of(rows: list[dict]) -> dict[str, float]:
    """For each pooling the learning rate with the best RSUM on the validation split, of rows of TUNING."""
    recall = tuning_recall(rows)
    return {name: max(RATES, key=lambda rate, name=name: recall[name, rate]) for name in POOLINGS}


def tuning_recall(rows: list[dict]) -> dict[tuple[str, float], float]:
    """RSUM on the validation split by pooling and learning rate."""
    found = {
        folder_name(row["settings"]): row["validation"]["rsum"]
        for row in rows if row["seed"] == 0 and row["data"] == "scenes"
    }  # fmt: skip
    return {key: found[folder_name(cell.settings)] for key, cell in TUNING.items()}


def groups(rates: dict[str, float]) -> dict[str, Group]:
    """The ablation, given the learning rate of each pooling."""

    def mvam(label: str, data: str = "scenes", **settings) -> Cell:
        return Cell(label, {"lr": rates[MVAM], **settings}, data)

    def diverse(kind: str, weight: float, label: str = "", **settings) -> Cell:
        label = label or f"{kind}, {weight:g}"
        return mvam(label, **{"diversity_kind": kind, "diversity_weight": weight, **settings})

    def pooling(name: str, **settings) -> Cell:
        return Cell(name, {**POOLINGS[name], "lr": rates[name], **settings})

    return {
        "pooling": Group("How the 256 numbers are made", [pooling(name) for name in POOLINGS], MVAM),
        # The single vector that was best on the validation split at 800 steps.
        "longer": Group("Twice as long", [pooling(name, steps=1600) for name in ("one learned query", MVAM)], MVAM),
        "diversity": Group("The diversity loss, 8 views: kind and weight", [
            mvam("none"), diverse("frobenius", 0.01), diverse("frobenius", 0.1), diverse("norm", 0.03),
            diverse("offdiag", 0.1), diverse("cosine", 0.01), diverse("cosine", 0.1),
        ], "none"),
        "codes": Group("How codes start, and how they score", [
            mvam("standard deviation 1, dot"), mvam("0.02, dot", code_std=0.02),
            mvam("1, dot with a key projection", scoring="projected"), mvam("1, additive", scoring="additive"),
        ], "standard deviation 1, dot"),
        "budget": Group("Views that share 256 numbers", [
            mvam("1 of 256", views=1, embed_dim=256), mvam("2 of 128", views=2, embed_dim=128),
            mvam("4 of 64", views=4, embed_dim=64), mvam("8 of 32"), mvam("16 of 16", views=16, embed_dim=16),
            mvam("32 of 8", views=32, embed_dim=8),
        ], "8 of 32"),
        "views": Group("Views of 32 numbers each", [
            mvam("1, 32 numbers", views=1), mvam("2, 64", views=2), mvam("4, 128", views=4), mvam("8, 256"),
            mvam("16, 512", views=16), mvam("32, 1024", views=32),
        ], "8, 256"),
        "projection": Group("How 8 views come to 32 numbers each", [
            mvam("the encoder's own"),
            mvam("its own to 96, then one for all views", embed_dim=96, projection="shared", view_dim=32),
            mvam("its own to 96, then one for each", embed_dim=96, projection="per_view", view_dim=32),
        ], "the encoder's own"),
        "diversity-many-views": Group("The diversity loss, 16 views of 32", [
            mvam("none", views=16), diverse("frobenius", 0.01, views=16), diverse("cosine", 0.01, views=16),
        ], "none"),
        "diversity-towers": Group("The diversity loss, cosine 0.01: towers and schedule", [
            mvam("none"), diverse("cosine", 0.01, "both"),
            diverse("cosine", 0.01, "images alone", diversity_towers="image"),
            diverse("cosine", 0.01, "texts alone", diversity_towers="text"),
            diverse("cosine", 0.02, "falling from 0.02", diversity_schedule="fall"),
            diverse("cosine", 0.02, "rising to 0.02", diversity_schedule="rise"),
        ], "none"),
        "diversity-few-images": Group("The diversity loss, 2,000 training images", [
            mvam("none", "scenes-2000"), Cell("cosine, 0.01", {
                "lr": rates[MVAM], "diversity_kind": "cosine", "diversity_weight": 0.01}, "scenes-2000"),
        ], "none"),
        "diversity-longer": Group("The diversity loss, 1,600 steps", [
            mvam("none", steps=1600), diverse("cosine", 0.01, steps=1600), diverse("frobenius", 0.01, steps=1600),
        ], "none"),
    }  # fmt: skip
