"""Plots of results: the op's times, roofline, times over the batch, memory; the encoders' latency."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from providers import PROVIDERS
from shapes import SHAPES
from tables import group_title, label, times_original

from mvam_fast.files import atomic

OURS, PLAIN, OTHER = "#0072b2", "#777777", "#e69f00"
# Marks and colours in plots of all providers; with a LayerNorm the same, and dashed; of a pooler fused, and dotted.
STYLES = {
    "naive": ("o", "#000000"), "compile": ("s", "#777777"), "sdpa": ("D", "#009e73"), "flex": ("^", "#cc79a7"),
    "torch": ("v", "#56b4e9"), "triton": ("P", OURS), "attentional-pooler": ("D", "#e69f00"),
    "attention-pool-latent": ("d", "#d55e00"), "siglip-head": ("X", "#b8860b"),
    "attention-pool2d": ("p", "#882255"), "attention-pool2d-timm": ("h", "#aa4499"),
}  # fmt: skip


def _style(provider: str) -> tuple[str, str]:
    return STYLES.get(provider.removeprefix("norm-").removeprefix("fused-"), ("*", "#999999"))


def _line(row: dict) -> str:
    if PROVIDERS[row["provider"]].original:
        return ":"
    return "--" if row["work"] == "norm+pool" else "-"


def draw(result: dict, folder: Path, stem: str) -> list[Path]:
    """Writes the plots that these rows allow; each carries the result's seal, so that a stale one can be told."""
    timed = [row for row in result["rows"] if "median_ms" in row]
    found = []
    for name, make in DRAWN[result["kind"]].items():
        figure = make(result, timed) if timed else None
        if figure is not None:
            path = folder / f"{stem}-{name}.png"
            foot = 0.16 / figure.get_figheight()
            figure.get_layout_engine().set(rect=(0, foot, 1, 1 - foot))
            figure.text(0.995, 0.005, _footer(result), ha="right", va="bottom", fontsize=7, color="#555555")
            with atomic(path) as temporary:
                figure.savefig(temporary, facecolor="white", metadata={"Source": result["seal"]})
            found.append(path)
    return found


def _footer(result: dict) -> str:
    about = result["machine"]
    return f"{about['device']}, torch {about['torch']}, {about['commit'][:8]}, {about['date'][:10]}"


def _color(row: dict) -> str:
    if PROVIDERS[row["provider"]].ours:
        return OURS
    return OTHER if row["work"] == "own" else PLAIN


def _fullest_case(timed: list[dict]) -> list[dict]:
    """The case that was measured most fully, the largest of several."""
    cases: dict[str, list[dict]] = {}
    for row in timed:
        cases.setdefault(group_title(row), []).append(row)
    return max(cases.values(), key=lambda rows: (len(rows), rows[0]["bytes"]))


def _dots(axis, rows: list[dict], value: Callable[[dict], float], text: Callable[[dict], str]) -> None:
    """A dot for each row on a logarithmic axis, where the length of a bar would mean nothing."""
    values = [value(row) for row in rows]
    axis.hlines(range(len(rows)), min(values) / 2, values, color="#dddddd", lw=1)
    axis.scatter(values, range(len(rows)), color=[_color(row) for row in rows], s=36, zorder=2)
    axis.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 2, max(values) * 6)
    for index, row in enumerate(rows):
        axis.text(values[index] * 1.08, index, text(row), va="center", fontsize=8)
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _panels(panels: list[tuple[str, list[dict]]], title: str, xlabel: str, value, text) -> Figure:
    heights = [max(len(rows), 3) for _, rows in panels]
    figure = Figure(figsize=(10, 0.22 * sum(heights) + 0.7 * len(panels) + 0.9), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flat
    for axis, (name, rows) in zip(axes, panels, strict=True):
        _dots(axis, rows, value, text)
        axis.set_title(name, fontsize=9, loc="left")
    axis.set_xlabel(xlabel, fontsize=8)
    return figure


def times(result: dict, timed: list[dict]) -> Figure:
    """The median times of the case that was measured most fully."""
    rows = _fullest_case(timed)
    panels: dict[str, list[dict]] = {}
    for row in rows:
        panels.setdefault(f"{row['mode']}, {row['setting']}", []).append(row)
    title = f"{group_title(rows[0])}\nblue: mvam_fast; grey: the same work; orange *: a library's own, costlier work"
    if any(times_original(row, rows) for row in rows):
        title += ", by mvam_fast where it is fused"
    return _panels(list(panels.items()), title, "median ms (log)", lambda row: row["median_ms"], partial(_time, rows))


def _time(rows: list[dict], row: dict) -> str:
    """A fused pooler beside its original, others beside the naive version."""
    text = f"{row['median_ms']:.2f} ms"
    if (ratio := times_original(row, rows)) is not None:
        return text + f", {ratio:.2f}× original"
    return text + (f", {row['ratio']:.2f}× naive" if "ratio" in row else "")


def memory(result: dict, timed: list[dict]) -> Figure | None:
    """The memory that forward + backward needs at its peak."""
    rows = [row for row in timed if row["mode"] == "forward+backward" and row["setting"] == "eager"]
    if not rows:
        return None
    rows = _fullest_case(rows)
    title = f"{group_title(rows[0])}\npeak memory of forward + backward beyond the inputs, the gradients included"
    return _panels(
        [("", rows)], title, "MB (log)", lambda row: row["peak_extra_mb"],
        lambda row: f"{row['peak_extra_mb']:.1f} MB" + (f", {row['saved_mb']:.2f} kept" if "saved_mb" in row else ""),
    )  # fmt: skip


def roofline(result: dict, timed: list[dict]) -> Figure | None:
    """Least arithmetic per second over least arithmetic per byte, below what this device was measured to reach."""
    rows = [r for r in timed if r["work"] == "pool" and r["setting"] == "eager" and r["mode"] != "backward"]
    dtypes = {row["dtype"] for row in rows}
    peak, read = (result["ceilings"].get(name) for name in (f"{'+'.join(dtypes)}_gflop_s", "read_gb_s"))
    if not rows or peak is None:  # products are measured in the precisions that the device is meant for
        return None
    figure = Figure(figsize=(10, 5), dpi=100, layout="constrained")
    axis = figure.subplots()
    intensities = [row["flops"] / row["bytes"] for row in rows]
    span = [min(*intensities, peak / read) / 3, max(*intensities, peak / read) * 3]
    xs = [span[0], peak / read, span[1]]
    axis.plot(xs, [min(x * read, peak) for x in xs], color="black", lw=1)
    axis.text(span[0], span[0] * read, f"  read {read:.0f} GB/s", fontsize=8, va="top")
    axis.text(span[1], peak, f"matrix product {peak:.0f} GFLOP/s ", fontsize=8, ha="right", va="bottom")
    for provider in dict.fromkeys(row["provider"] for row in rows):
        for mode, filled in (("forward", False), ("forward+backward", True)):
            chosen = [row for row in rows if (row["provider"], row["mode"]) == (provider, mode)]
            if chosen:
                mark, color = _style(provider)
                axis.scatter(
                    [row["flops"] / row["bytes"] for row in chosen], [row["gflop_s"] for row in chosen], s=26,
                    alpha=0.8, marker=mark, edgecolors=color, facecolors=color if filled else "none",
                    label=label(chosen[0]) if filled else None,
                )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte, least of both", ylabel="GFLOP/s")
    axis.set_title("Roofline, every case; hollow: forward, filled: forward + backward", fontsize=10)
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def over_batch(result: dict, timed: list[dict]) -> Figure | None:
    """Median time per sample over the batch, for the shape with most batches."""
    shapes: dict[tuple, set[int]] = {}
    for row in timed:
        shapes.setdefault((row["shape"], row["views"]), set()).add(row["batch"])
    chosen = max(shapes, key=lambda key: (len(shapes[key]), *SHAPES[key[0]]))
    if len(shapes[chosen]) < 2:
        return None
    rows = [row for row in timed if (row["shape"], row["views"]) == chosen]
    panels = list(dict.fromkeys((r["setting"], r["mode"]) for r in rows if r["mode"] != "backward"))
    figure = Figure(figsize=(5 * min(len(panels), 2), 4 * ((len(panels) + 1) // 2)), dpi=100, layout="constrained")
    figure.suptitle(f"{chosen[0]}, {chosen[1]} views: time per sample over the batch", fontsize=10)
    axes = list(figure.subplots((len(panels) + 1) // 2, min(len(panels), 2), squeeze=False).flat)
    for axis, (setting, mode) in zip(axes, panels, strict=False):
        of_panel = [row for row in rows if (row["setting"], row["mode"]) == (setting, mode)]
        for provider in dict.fromkeys(row["provider"] for row in of_panel):
            mark, color = _style(provider)
            line = sorted((row for row in of_panel if row["provider"] == provider), key=lambda row: row["batch"])
            axis.plot(
                [row["batch"] for row in line], [row["median_ms"] / row["batch"] for row in line], ms=4, lw=1,
                ls=_line(line[0]), marker=mark, color=color, label=label(line[0]),
                alpha=0.8,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms per sample")
        axis.set_xticks(sorted({row["batch"] for row in of_panel}), minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_title(f"{mode}, {setting}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


MODEL_COLORS = {"clip": PLAIN, "mvam naive": OTHER, "mvam": OURS}


def latency(result: dict, timed: list[dict]) -> Figure | None:
    """What a caller of an encoder waits for: median, with the p99 (or the largest) as a whisker."""
    rows = [row for row in timed if row["work"] == "inference"]
    panels = sorted({(row["tower"], row["batch"]) for row in rows})
    if not panels:
        return None
    groups = {panel: [row for row in rows if (row["tower"], row["batch"]) == panel] for panel in panels}
    heights = [len(group) for group in groups.values()]
    figure = Figure(figsize=(10, 0.22 * sum(heights) + 0.7 * len(panels) + 0.9), dpi=100, layout="constrained")
    settings = result["settings"]
    figure.suptitle(
        f"{settings['model']}, {settings['views']} views, {settings['dtype']}: milliseconds per call; whisker: p99, or "
        "the largest of fewer than 100", fontsize=10,
    )  # fmt: skip
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flat
    for axis, ((tower, batch), group) in zip(axes, groups.items(), strict=True):
        for index, row in enumerate(group):
            late = row.get("p99_ms", row.get("max_ms"))
            axis.plot([row["median_ms"], late], [index, index], color="#bbbbbb", lw=2, zorder=1)
            axis.scatter(row["median_ms"], index, color=MODEL_COLORS[row["model"]], s=36, zorder=2)
            text = f"{row['median_ms']:.1f} ms, {row['per_s']:.0f}/s, first result {row['first_result_s']:.1f} s"
            axis.text(late, index, "  " + text, va="center", fontsize=8)
        axis.set_yticks(range(len(group)), [f"{row['model']}, {row['backend']}" for row in group], fontsize=8)
        axis.set_ylim(len(group) - 0.5, -0.5)
        axis.set_xlim(0, 1.5 * max(row.get("p99_ms", row.get("max_ms")) for row in group))
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(f"{tower}, batch {batch}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


# kind of result: what is drawn of it, in the order of the page
DRAWN = {
    "throughput": {"times": times, "roofline": roofline, "batch": over_batch, "memory": memory},
    "encoders": {"latency": latency},
}
