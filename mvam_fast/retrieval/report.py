"""One self-contained HTML page about a run: what was found first, then how."""
from __future__ import annotations

from html import escape
from pathlib import Path

from ..files import write_json, write_text
from .page import missing, picture, section, table, whole_page

_RECALLS = tuple(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10))


def build_report(report: dict, out: str | Path) -> Path:
    """Writes OUT/report.json (the content as given) and OUT/report.html (nothing outside it is needed to read it).

    `report`: title, created, sentence (the verdict), data {"counts", "preview"}, runs {name: {"label", "settings",
    "metrics", "train_seconds", "parameters"}}, oracle (metrics or None), figures [{"file", "title", "caption"}], export
    (bundle.json with "check", or None), throughput (throughput.json and the "plot" beside it, or None), seconds
    {stage: s}, machine {}. Files are relative to `out`. A part that is None is said to be missing.
    """
    out = Path(out)
    write_json(out / "report.json", report)
    body = [
        f"<h1>{escape(report['title'])}</h1>",
        f"<p class='lead'>{escape(report['sentence'])}</p>",
        _recall(report),
        section("The data", _data(report["data"], out)),
        section("Pictures", "".join(picture(figure, out) for figure in report["figures"])),
        section("Export", _export(report["export"])),
        section("Speed of the pooling op", _throughput(report["throughput"], out)),
        section("How it was made", _making(report)),
    ]
    write_text(out / "report.html", whole_page(report["title"], body))
    return out / "report.html"


def _recall(report: dict) -> str:
    header = ["", *(key.replace("_r", " R@") for key in _RECALLS), "RSUM", "median rank i2t / t2i"]
    rows = []
    for run in report["runs"].values():
        metrics = run["metrics"]
        ranks = f"{metrics['i2t_median_rank']:.0f} / {metrics['t2i_median_rank']:.0f}"
        rows.append([run["label"], *(f"{metrics[key]:.1f}" for key in (*_RECALLS, "rsum")), ranks])
    if len(report["runs"]) == 2:
        before, after = (run["metrics"] for run in report["runs"].values())
        rows.append(["difference", *(f"{after[key] - before[key]:+.1f}" for key in (*_RECALLS, "rsum")), ""])
    note = "Recall in percent, RSUM is the sum of the six; i2t: image to text, t2i: text to image; ties count against."
    if report["oracle"]:
        rows.append(["perfect reader", *(f"{report['oracle'][key]:.1f}" for key in (*_RECALLS, "rsum")), ""])
        note += " Perfect reader: knows which captions are true of which image, and guesses among those."
    return table(header, rows, strong=len(report["runs"])) + missing(note)


def _data(data: dict, out: Path) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in data["counts"].items())
    preview = {"file": data["preview"], "title": "Families of near-duplicates", "caption": "One row is one family."}
    return f"<p>Images: {escape(counts)}; five captions each.</p>" + picture(preview, out)


def _export(export: dict | None) -> str:
    if export is None:
        return missing("Not part of this run.")
    rows = [
        [tower, batch, f"{row['max_abs']:.1e}", f"{row['cosine']:.7f}", f"{row['top5']:.0%}"]
        for tower, report in export["parity"].items() for batch, row in report.items()
    ]  # fmt: skip
    parity = table(["encoder", "batch", "max abs difference", "least cosine", "same top 5"], rows)
    return f"<p>ONNX Runtime against PyTorch. {escape(export['check'])}</p>{parity}"


def _throughput(throughput: dict | None, out: Path) -> str:
    if throughput is None:
        return missing("Not measured in this run: pass --throughput with the JSON of benchmarks/throughput.py.")
    rows = [
        [
            f"{row['shape']} × {row['batch']}", f"{row['mode']}, {row['setting']}", row["provider"],
            *((f"{row['median_ms']:.2f}", f"{row['ratio']:.2f}", f"{row['gb_s']:.1f}") if "median_ms" in row
              else (row["reason"], "", "")),
        ]
        for row in throughput["rows"]
    ]  # fmt: skip
    every = table(["shape × batch", "mode, setting", "provider", "median ms", "naive ÷ it", "GB/s"], rows)
    plot = {"file": throughput["plot"], "title": "Median time", "caption": throughput["bytes"]}
    return picture(plot, out) + f"<details><summary>All rows</summary>{every}</details>"


def _making(report: dict) -> str:
    stages = table(["stage", "seconds"], [[name, f"{value:.0f}"] for name, value in report["seconds"].items()])
    runs = list(report["runs"].values())
    names = list(dict.fromkeys(name for run in runs for name in run["settings"]))
    settings = [[name, *(run["settings"].get(name, "") for run in runs)] for name in names]
    settings += [["parameters", *(f"{run['parameters']:,}" for run in runs)]]
    settings += [["training seconds", *(f"{run['train_seconds']:.0f}" for run in runs)]]
    machine = table(["machine", ""], [[name, value] for name, value in report["machine"].items()])
    created = f"<p>{escape(report['created'])}</p>"
    return created + stages + table(["setting", *(run["label"] for run in runs)], settings) + machine
