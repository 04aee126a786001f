"""The rows of exports.py as text tables; `export_section.py` makes Markdown of the same cells."""
from __future__ import annotations

from collections.abc import Iterable, Iterator

from encoder_models import CLIP, FUSED, TOWERS
from export_cases import CHECKPOINT, POOLER

EXPORT_COLUMNS = (
    ("seconds", 9), ("MB", 8), ("nodes", 11), ("image off by", 14), ("image 1 - cosine", 18), ("text off by", 13),
    ("text 1 - cosine", 17), ("same top 5", 12), ("fp16: 1 - cosine", 18),
)  # fmt: skip
LATENCY_COLUMNS = (
    ("p50 ms", 10), ("20-80 %", 17), ("p99 ms", 10), ("per s", 9), ("x session", 18), ("x eager", 18), ("x CLIP", 18),
    ("off by", 9),
)  # fmt: skip
LEGEND = (
    "off by: the largest difference of a component from PyTorch in float32; fp16: 1 - cosine: of PyTorch's own fp16. "
    "x session, x eager, x CLIP: this one's time over that of the bare session with the same bundle, of eager MVAM, of "
    "plain CLIP run the same way: the median of the blocks' ratios, and the least and the most. off by there: distance "
    "of the worst embedding from float64. * the largest: fewer than 100 repetitions have no p99."
)
VARIANTS = {CLIP: "plain CLIP", FUSED: "MVAM", POOLER: "attention pooler fused", CHECKPOINT: "checkpoint"}
RUNNERS = {"eager": "eager PyTorch", "session": "bare session", "encoder": "Encoder"}


def exports_table(result: dict) -> str:
    about = result["machine"]
    lines = [
        f"{about['device']}, {about['threads']} threads, {about['cores']} cores, torch {about['torch']}, "
        f"commit {about['commit'][:8]}",
        result["note"], LEGEND,
    ]  # fmt: skip
    for title, columns, rows in groups(result):
        lines += ["", title, f"  {'':28}" + "".join(f"{head:>{width}}" for head, width in columns)]
        for row in rows:
            left = f"  {name(row):28}"
            if "reason" in row:
                lines.append(f"{left}  {row['reason']}")
                continue
            padded = (f"{cell:>{width}}" for cell, (_, width) in zip(cells(row), columns, strict=True))
            lines.append((left + "".join(padded)).rstrip())
    return "\n".join(lines)


def groups(result: dict) -> Iterator[tuple[str, tuple, list[dict]]]:
    """(title, columns, rows) of each table: one for each exported model, then one for each case of latency."""
    cases = list(dict.fromkeys(map(_case, result["rows"])))  # a case's rows need not have been measured in one go
    exported_first = sorted(cases, key=lambda case: case[0] != "export")
    for work, *case in exported_first:
        rows = [row for row in result["rows"] if _case(row) == (work, *case)]
        if work == "export":
            yield _exported_title(*case, result["settings"]["views"]), EXPORT_COLUMNS, rows
        else:
            yield f"{result['settings']['latency']}, {case[0]}, batch {case[1]}", LATENCY_COLUMNS, rows


def _case(row: dict) -> tuple:
    names = ("model", "variant") if row["work"] == "export" else ("tower", "batch")
    return row["work"], *(row[name] for name in names)


def _exported_title(model: str, variant: str, views: int) -> str:
    return f"{model}, {VARIANTS[variant]}" + (f", {views} views" if variant == FUSED else "")


def name(row: dict) -> str:
    if row["work"] == "export":
        return row["form"]
    return f"{row['model']}, {RUNNERS[row['runner']]}" + ("" if row["runner"] == "eager" else f", {row['form']}")


def cells(row: dict) -> list[str]:
    """The columns of a row that has numbers."""
    return _exported(row) if row["work"] == "export" else _timed(row)


def _exported(row: dict) -> list[str]:
    towers = [row["towers"][tower] for tower in TOWERS]
    accuracy = []
    for tower in towers:
        batches = tower["parity"].values()
        accuracy += [f"{max(found['max_abs'] for found in batches):.1e}", _below_one(batches)]
    half = [tower["half_arithmetic"] for tower in towers if "half_arithmetic" in tower]
    same = min(tower["parity"][max(tower["parity"], key=int)]["top5"] for tower in towers)
    nodes = " + ".join(str(tower["nodes"]) for tower in towers if "nodes" in tower)
    return [
        f"{row['seconds']:.1f}", f"{row['bytes'] / 1e6:.1f}", nodes, *accuracy, f"{same:.0%}",
        _below_one(half) if half else "",
    ]  # fmt: skip


def _below_one(found: Iterable[dict]) -> str:
    """1 - cosine, worst of all; rounding may bring a cosine above 1."""
    return f"{max(0.0, 1 - min(one['cosine'] for one in found)):.1e}"


def _timed(row: dict) -> list[str]:
    late = f"{row['p99_ms']:.2f}" if "p99_ms" in row else f"{row['max_ms']:.2f}*"
    ratios = [_times(row[name]) if name in row else "" for name in ("times_session", "times_eager", "times_clip")]
    return [
        f"{row['median_ms']:.3f}", f"{row['p20_ms']:.2f} - {row['p80_ms']:.2f}", late, f"{row['per_s']:.1f}", *ratios,
        f"{row['errors']['distance']:.1e}",
    ]  # fmt: skip


def _times(ratio: dict) -> str:
    return f"{ratio['median']:.3f} ({ratio['least']:.2f}-{ratio['most']:.2f})"
