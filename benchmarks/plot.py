"""Bars of the median times, one panel for each shape and mode."""
from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from mvam_fast.files import atomic

OURS, PEER, OTHER = "#0072b2", "#999999", "#e69f00"


def _color(row: dict) -> str:
    if row["provider"] in ("torch", "triton"):
        return OURS
    return PEER if row["same_work"] else OTHER


def plot(rows: list[dict], path: Path, title: str) -> None:
    """`rows` as throughput.py makes them; rows without a time are written as their reason."""
    panels = list(dict.fromkeys((row["shape"], row["batch"], row["views"], row["mode"]) for row in rows))
    figure = Figure(figsize=(12, 2.5 * ((len(panels) + 1) // 2) + 0.5), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        chosen = [row for row in rows if (row["shape"], row["batch"], row["views"], row["mode"]) == panel]
        times = [row.get("median_ms", 0) for row in chosen]
        axis.barh(range(len(chosen)), times, color=[_color(row) for row in chosen])
        axis.set_yticks(range(len(chosen)), [row["provider"] for row in chosen], fontsize=8)
        axis.invert_yaxis()
        shown = [time for time in times if time]
        if shown:
            axis.set_xscale("log")
            axis.set_xlim(min(shown) / 2, max(shown) * 4)
        for index, row in enumerate(chosen):
            label = f"{row['median_ms']:.2f} ms, {row['ratio']:.2f}×" if "median_ms" in row else row["reason"]
            place = row.get("median_ms", min(shown, default=1) / 2)
            axis.text(place, index, " " + label[:70], va="center", fontsize=8)
        shape, batch, views, mode = panel
        axis.set_title(f"{shape}, batch {batch}, {views} views, {mode}", fontsize=9)
        axis.set_xlabel("median ms (log), and eager's time divided by it", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes):
        axis.set_axis_off()
    with atomic(path) as temporary:
        figure.savefig(temporary, facecolor="white")
