"""Result rows as text tables: one block for each case, setting and mode."""
from __future__ import annotations

from itertools import groupby

from providers import PROVIDERS
from shapes import SHAPES

OWN_WORK = (
    "* does its own work: it projects every token (a more expressive function, for more arithmetic) and returns no "
    "Gram matrix. Its ratio says what changing to learned views saves, not how fast two versions of one function are; "
    "exact conversions of these poolers, for like-for-like rows, do not exist yet."
)
COLUMNS = (
    ("median ms", 11), ("20-80 %", 17), ("x naive", 9), ("ours is", 10), ("GB/s", 9), ("% copy", 8), ("% read", 8),
    ("peak MB", 9), ("saved MB", 10), ("call ms", 9),
)  # fmt: skip


def group_title(row: dict) -> str:
    length, width = SHAPES[row["shape"]]
    return f"{row['shape']}: {row['batch']} x {length} x {width}, {row['views']} views, {row['dtype']}"


def label(row: dict) -> str:
    return PROVIDERS[row["provider"]].label + (" *" if row["work"] == "own" else "")


def cells(row: dict) -> list[str]:
    """The columns of a row that has times."""
    ours = f"{row['ours_ratio']:.2f}x" if "ours_ratio" in row else ""
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    return [
        f"{row['median_ms']:.3f}", f"{row['p20_ms']:.2f} - {row['p80_ms']:.2f}", ratio, ours, f"{row['gb_s']:.1f}",
        f"{row['percent_of_copy']:.1f}", f"{row['percent_of_read']:.1f}", _if(row, "peak_extra_mb", 1),
        _if(row, "saved_mb", 2), _if(row, "call_median_ms", 3),
    ]  # fmt: skip


def _if(row: dict, name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f}" if name in row else ""


def throughput_table(result: dict) -> str:
    about, found = result["machine"], result["ceilings"]
    lines = [
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, commit {about['commit'][:8]}",
        f"copy {found['copy_gb_s']:.1f} GB/s, read {found['read_gb_s']:.1f} GB/s", result["method"], result["bytes"],
    ]  # fmt: skip
    if about["kind"] != "cuda":
        lines.append("On a CPU: small batches, and no Triton kernel.")
    lines += [
        "x naive: the eager PyTorch version's time over this one's. ours is: how much faster mvam_fast's best path is.",
        "peak: memory beyond what was there. saved: what autograd keeps besides the inputs.",
        OWN_WORK,
    ]  # fmt: skip
    heads = "".join(f"{head:>{width}}" for head, width in COLUMNS)
    for title, of_case in groupby(result["rows"], key=group_title):
        lines += ["", title]
        for (setting, mode), group in groupby(of_case, key=lambda row: (row["setting"], row["mode"])):
            lines.append(f"{f'  {mode}, {setting}':44}{heads}")
            for row in group:
                left = f"    {label(row):40}"
                if "reason" in row:
                    lines.append(f"{left}   {row['reason']}")
                else:
                    widths = (width for _, width in COLUMNS)
                    details = f"   {row['details']}" if row.get("details") else ""
                    lines.append(left + "".join(f"{c:>{w}}" for c, w in zip(cells(row), widths, strict=True)) + details)
    return "\n".join(lines)
