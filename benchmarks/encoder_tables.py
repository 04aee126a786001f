"""The rows of encoders.py as text tables."""
from __future__ import annotations

from itertools import groupby

INFERENCE = (
    ("per s", 10), ("p50 ms", 10), ("20-80 %", 17), ("p99 ms", 11), ("x CLIP", 8), ("first s", 9), ("off by", 9),
    ("precision", 10),
)  # fmt: skip
TRAINING = (
    ("per s", 10), ("step ms", 10), ("20-80 %", 20), ("x CLIP", 8), ("first s", 9), ("peak MB", 10), ("saved MB", 10),
    ("loss", 9), ("off by", 9), ("precision", 10),
)  # fmt: skip


def encoders_table(result: dict) -> str:
    about, settings = result["machine"], result["settings"]
    lines = [
        f"{about['device']}, {about['threads']} PyTorch threads, {about['cores']} cores, torch {about['torch']}, "
        f"commit {about['commit'][:8]}",
        f"{settings['model']}, {settings['views']} views, served in {settings['dtype']}", result["note"],
    ]  # fmt: skip
    if about["kind"] != "cuda":
        lines.append("On a CPU: small batches, no Triton kernel; ONNX Runtime takes every core, PyTorch its threads.")
    lines += [
        "x CLIP: this one's time over that of plain CLIP on the same backend. first: seconds to the first result.",
        "off by: distance of the worst embedding from float64 (unit vectors); in training, of all gradients from those "
        "of plain PyTorch in float32, relative. * the largest: fewer than 100 repetitions have no p99.",
    ]
    for (work, tower, batch), rows in groupby(sorted(result["rows"], key=_case), key=_case):
        inference = work == "inference"
        title = f"{tower}, batch {batch}" if inference else f"training, batch {batch}"
        columns = INFERENCE if inference else TRAINING
        lines += ["", f"{title:26}" + "".join(f"{head:>{width}}" for head, width in columns)]
        for row in rows:
            left = f"  {row['model'] + (', ' + row['backend'] if inference else ''):24}"
            if "reason" in row:
                lines.append(f"{left}  {row['reason']}")
                continue
            cells = _inference(row) if inference else _training(row)
            padded = (f"{cell:>{width}}" for cell, (_, width) in zip(cells, columns, strict=True))
            lines.append((left + "".join(padded) + f"  {row['details']}").rstrip())
    return "\n".join(lines)


def _case(row: dict) -> tuple:
    return row["work"], row.get("tower", ""), row["batch"]


def _inference(row: dict) -> list[str]:
    late = f"{row['p99_ms']:.2f}" if "p99_ms" in row else f"{row['max_ms']:.2f}*"
    return [
        f"{row['per_s']:.1f}", f"{row['median_ms']:.3f}", _spread(row), late, _ratio(row),
        f"{row['first_result_s']:.2f}", f"{row['errors']['distance']:.1e}", row["precision"],
    ]  # fmt: skip


def _training(row: dict) -> list[str]:
    return [
        f"{row['per_s']:.1f}", f"{row['median_ms']:.2f}", _spread(row), _ratio(row), f"{row['first_step_s']:.2f}",
        f"{row['peak_extra_mb']:.1f}", f"{row['saved_mb']:.1f}", f"{row['loss']:.4f}",
        f"{row['errors']['gradients']:.1e}", row["precision"],
    ]  # fmt: skip


def _spread(row: dict) -> str:
    return f"{row['p20_ms']:.2f} - {row['p80_ms']:.2f}"


def _ratio(row: dict) -> str:
    return f"{row['times_clip']:.2f}" if "times_clip" in row else ""
