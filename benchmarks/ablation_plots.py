"""Plots of the ablation: every seed is a dot, so that the spread can be seen."""
from __future__ import annotations

from pathlib import Path
from statistics import mean

from ablation_cells import BASE, POOLINGS, RATES, tuning_recall
from matplotlib.figure import Figure

from mvam_fast.files import atomic

BLUE, GREY, ORANGE = "#0072b2", "#777777", "#e69f00"


def plot_groups(title: str, cells: list, oracle: float, path: Path) -> None:
    """One line per cell: a dot per seed, a bar at the mean."""
    figure = Figure(figsize=(8, 0.48 * len(cells) + 1.3), dpi=100, layout="constrained")
    axis = figure.subplots()
    for line, one in enumerate(cells):
        values = one.test("rsum")
        axis.barh(line, mean(values), color=BLUE, alpha=0.25, height=0.62)
        axis.plot(values, [line] * len(values), "o", color=BLUE, markersize=6)
        axis.annotate(f"{mean(values):.0f}", (max(values), line), xytext=(9, -4), textcoords="offset points")
    axis.axvline(oracle, color="black", linestyle=":", linewidth=1)
    axis.annotate("perfect reader", (oracle, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                  textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    axis.set_yticks(range(len(cells)), [one.cell.label for one in cells])
    axis.invert_yaxis()
    axis.set_xlim(0, max(oracle, *(max(one.test("rsum")) for one in cells)) * 1.06)
    axis.set_xlabel("RSUM, test split")
    _finish(figure, axis, title, path)


def plot_views(title: str, cells: list, path: Path) -> None:
    """RSUM over the number of views."""
    figure = Figure(figsize=(6.4, 3.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    views = [{**BASE, **one.cell.settings}["views"] for one in cells]
    for number, one in zip(views, cells, strict=True):
        axis.plot([number] * len(one.rows), one.test("rsum"), "o", color=BLUE, markersize=5)
    axis.plot(views, [mean(one.test("rsum")) for one in cells], color=BLUE, alpha=0.5)
    axis.set_xscale("log", base=2)
    axis.set_xticks(views, [f"{one.cell.label}" for one in cells], rotation=20, fontsize=8)
    axis.minorticks_off()
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])  # no dot on the edge
    axis.set_ylabel("RSUM, test split")
    axis.grid(axis="y", alpha=0.3)
    _finish(figure, axis, title, path)


def plot_diversity(title: str, cells: list, reference: str, path: Path) -> None:
    """RSUM over the overlap of views, for images and for texts."""
    figure = Figure(figsize=(9.4, 4.2), dpi=100, layout="constrained")
    for place, (axis, tower) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("image", "text"), strict=True)):
        for index, one in enumerate(cells):
            color = "black" if one.cell.label == reference else f"C{index}"
            overlap = [row["views"][tower]["mean_cosine"] for row in one.rows]
            axis.plot(overlap, one.test("rsum"), "o", color=color, markersize=6, label=one.cell.label)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])  # no dot on the edge
        axis.set_xlabel(f"overlap of the {tower} views")
        axis.grid(alpha=0.3)
        if place == 1:
            axis.legend(fontsize=8, loc="lower right")
        else:
            axis.set_ylabel("RSUM, test split")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_rates(result: dict, path: Path) -> None:
    """RSUM on validation over the learning rate, for each pooling."""
    recall = tuning_recall(result["rows"])
    figure = Figure(figsize=(6.4, 3.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    for name, color, marker in zip(POOLINGS, (GREY, "#009e73", ORANGE, BLUE), "s^vo", strict=True):
        values = [recall[name, rate] for rate in RATES]
        axis.plot(RATES, values, marker=marker, color=color, label=name)
    axis.set_xscale("log")
    axis.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axis.minorticks_off()
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])  # no dot on the edge
    axis.set_xlabel("learning rate")
    axis.set_ylabel("RSUM, validation")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _finish(figure, axis, "Learning rate of each pooling, seed 0", path)


def _finish(figure: Figure, axis, title: str, path: Path) -> None:
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, facecolor="white")
