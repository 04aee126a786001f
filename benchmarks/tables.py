"""Result rows as text tables: one block for each case, setting and mode."""
from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import groupby

from providers import PROVIDERS
from shapes import SHAPES

OWN_WORK = (
    "* does a library's own work: a more expressive function, and no Gram matrix. The original projects every token, "
    "the same pooler fused by `fuse_attention_poolers` only what was pooled. Their ratios to the op say what changing "
    "to learned views saves, not how fast two versions of one function are; that is the ratio of original to fused, "
    "given where both were timed."
)
COLUMNS = (
    ("median ms", 11), ("20-80 %", 17), ("x naive", 9), ("x original", 12), ("ours is", 10), ("GB/s", 9),
    ("% copy", 8), ("% read", 8), ("peak MB", 9), ("saved MB", 10), ("call ms", 9),
)  # fmt: skip
PLACE = ("shape", "batch", "views", "dtype", "setting", "mode")  # of a row: all but who was timed


def group_title(row: dict) -> str:
    length, width = SHAPES[row["shape"]]
    return f"{row['shape']}: {row['batch']} x {length} x {width}, {row['views']} views, {row['dtype']}"


def label(row: dict) -> str:
    return PROVIDERS[row["provider"]].label + (" *" if row["work"] == "own" else "")


def original_of(row: dict, rows: Iterable[dict]) -> dict | None:
    """The row of the pooler that this one is, fused, in the same case, setting and mode; None if there is no time."""
    wanted = {**{name: row[name] for name in PLACE}, "provider": PROVIDERS[row["provider"]].original}
    found = (other for other in rows if all(other[name] == value for name, value in wanted.items()))
    return next((other for other in found if "median_ms" in other), None)


def times_original(row: dict, rows: Iterable[dict]) -> float | None:
    """The original's time over the fused pooler's, which has one; None if it is no such pooler or alone."""
    original = original_of(row, rows)
    return None if original is None else original["median_ms"] / row["median_ms"]


def times_original_by_block(row: dict, original: dict) -> list[float]:
    """The same in each of the blocks in which the two took turns."""
    blocks = zip(original["blocks_ms"], row["blocks_ms"], strict=True)
    return [statistics.median(one) / statistics.median(other) for one, other in blocks]


def cells(row: dict, group: list[dict]) -> list[str]:
    """The columns of a row that has times, one of `group`."""
    ours = f"{row['ours_ratio']:.2f}x" if "ours_ratio" in row else ""
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    original = times_original(row, group)
    return [
        f"{row['median_ms']:.3f}", f"{row['p20_ms']:.2f} - {row['p80_ms']:.2f}", ratio,
        "" if original is None else f"{original:.2f}", ours, f"{row['gb_s']:.1f}",
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
        "x naive: the eager PyTorch version's time over this one's. x original: the same of a fused pooler's original. "
        "ours is: how much faster mvam_fast's best path is.",
        "peak: memory beyond what was there. saved: what autograd keeps besides the inputs.",
        OWN_WORK,
    ]  # fmt: skip
    heads = "".join(f"{head:>{width}}" for head, width in COLUMNS)
    for title, of_case in groupby(result["rows"], key=group_title):
        lines += ["", title]
        for (setting, mode), rows in groupby(of_case, key=lambda row: (row["setting"], row["mode"])):
            group = list(rows)
            lines.append(f"{f'  {mode}, {setting}':46}{heads}")
            for row in group:
                left = f"    {label(row):42}"
                if "reason" in row:
                    lines.append(f"{left}   {row['reason']}")
                else:
                    columns = zip(cells(row, group), COLUMNS, strict=True)
                    details = f"   {row['details']}" if row.get("details") else ""
                    lines.append(left + "".join(f"{cell:>{width}}" for cell, (_, width) in columns) + details)
    return "\n".join(lines)
