"""The picture of a training: loss, recall and overlap of views over its steps."""
from __future__ import annotations

from pathlib import Path

from .drawing import new_figure, save


def curves_figure(runs: dict[str, list[dict]], path: Path) -> None:
    """Loss, validation RSUM and overlap of views over the steps; `runs` maps a label to the rows of metrics.jsonl."""
    figure = new_figure(11, 3.2, layout="constrained")
    loss, recall, overlap = figure.subplots(1, 3)
    for label, rows in runs.items():
        trained = [row for row in rows if "loss" in row]
        loss.plot([r["step"] for r in trained], [r["contrastive_loss"] for r in trained], label=label)
        tested = [row for row in rows if "rsum" in row]
        recall.plot([r["step"] for r in tested], [r["rsum"] for r in tested], marker="o", label=label)
        for tower, style in (("image", "-"), ("text", "--")):
            seen = [row for row in trained if f"{tower}_view_overlap" in row]
            if seen:
                values = [r[f"{tower}_view_overlap"] for r in seen]
                overlap.plot([r["step"] for r in seen], values, style, label=f"{label}, {tower}")
    recall.set_ylim(bottom=0)
    overlap.set_ylim(0, 1)
    for axis, title in (
        (loss, "contrastive loss"), (recall, "RSUM on validation"), (overlap, "cosine between views' attentions"),
    ):  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save(figure, path)
