"""The log of a training: a JSON line per row, and the same for TensorBoard."""
from __future__ import annotations

import json
from pathlib import Path

from ..._optional import require
from ...files import write_text


class MetricsLog:
    """Appends rows {"step": …, name: number} to OUT/metrics.jsonl, and to OUT/tensorboard.

    Rows of steps after `start` are those of a run that was cut short behind its last checkpoint; they are dropped, for
    the run that goes on from there writes them again.
    """

    def __init__(self, out: Path, start: int, *, tensorboard: bool):
        path = out / "metrics.jsonl"
        cut_log(path, start)
        self._writer = None
        if tensorboard:
            writer = require("torch.utils.tensorboard", extra="train").SummaryWriter
            self._writer = writer(out / "tensorboard", purge_step=start + 1)
        self._rows = open(path, "a", encoding="utf-8")

    def write(self, row: dict) -> None:
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        if self._writer is not None:
            group = row.get("split", "train")
            for name, value in row.items():
                if name not in ("step", "split"):
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        self._rows.close()
        if self._writer is not None:
            self._writer.close()


def cut_log(path: Path, step: int) -> None:
    """Drops the rows of a JSON-lines log that belong to steps after `step`, and a row that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
