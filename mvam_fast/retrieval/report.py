"""One self-contained HTML page about a run: what was found first, then how."""
from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from ..files import write_json, write_text

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #0072b2; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.lead { font-size: 1.15rem; border-left: 5px solid var(--good); padding: .3rem .9rem; background: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.strong td { font-weight: 600; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption, .note { opacity: .8; font-size: .92rem; } details { margin: .8rem 0; }
"""
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
        _section("The data", _data(report["data"], out)),
        _section("Pictures", "".join(_picture(figure, out) for figure in report["figures"])),
        _section("Export", _export(report["export"])),
        _section("Speed of the pooling op", _throughput(report["throughput"], out)),
        _section("How it was made", _making(report)),
    ]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(report['title'])}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}"


def _missing(what: str) -> str:
    return f"<p class='note'>{escape(what)}</p>"


def _table(header: list, rows: list[list], strong: int | None = None) -> str:
    def line(cells, tag):
        return "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells)

    body = "".join(
        f"<tr{' class=strong' if index == strong else ''}>{line(row, 'td')}</tr>" for index, row in enumerate(rows)
    )
    return f"<div class='scroll'><table><thead><tr>{line(header, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


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
    return _table(header, rows, strong=len(report["runs"])) + _missing(note)


def _image(path: Path, alt: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{escape(alt, quote=True)}' src='data:image/png;base64,{content}'>"


def _picture(figure: dict, out: Path) -> str:
    caption = f"<figcaption><b>{escape(figure['title'])}.</b> {escape(figure['caption'])}</figcaption>"
    return f"<figure>{_image(out / figure['file'], figure['title'])}{caption}</figure>"


def _data(data: dict, out: Path) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in data["counts"].items())
    preview = {"file": data["preview"], "title": "Families of near-duplicates", "caption": "One row is one family."}
    return f"<p>Images: {escape(counts)}; five captions each.</p>" + _picture(preview, out)


def _export(export: dict | None) -> str:
    if export is None:
        return _missing("Not part of this run.")
    rows = [
        [tower, batch, f"{row['max_abs']:.1e}", f"{row['cosine']:.7f}", f"{row['top5']:.0%}"]
        for tower, report in export["parity"].items() for batch, row in report.items()
    ]  # fmt: skip
    table = _table(["encoder", "batch", "max abs difference", "least cosine", "same top 5"], rows)
    return f"<p>ONNX Runtime against PyTorch. {escape(export['check'])}</p>{table}"


def _throughput(throughput: dict | None, out: Path) -> str:
    if throughput is None:
        return _missing("Not measured in this run: pass --throughput with the JSON of benchmarks/throughput.py.")
    rows = [
        [
            f"{row['shape']} × {row['batch']}", f"{row['mode']}, {row['setting']}", row["provider"],
            *((f"{row['median_ms']:.2f}", f"{row['ratio']:.2f}", f"{row['gb_s']:.1f}") if "median_ms" in row
              else (row["reason"], "", "")),
        ]
        for row in throughput["rows"]
    ]  # fmt: skip
    table = _table(["shape × batch", "mode, setting", "provider", "median ms", "naive ÷ it", "GB/s"], rows)
    plot = {"file": throughput["plot"], "title": "Median time", "caption": throughput["bytes"]}
    return _picture(plot, out) + f"<details><summary>All rows</summary>{table}</details>"


def _making(report: dict) -> str:
    stages = _table(["stage", "seconds"], [[name, f"{value:.0f}"] for name, value in report["seconds"].items()])
    runs = list(report["runs"].values())
    names = list(dict.fromkeys(name for run in runs for name in run["settings"]))
    settings = [[name, *(run["settings"].get(name, "") for run in runs)] for name in names]
    settings += [["parameters", *(f"{run['parameters']:,}" for run in runs)]]
    settings += [["training seconds", *(f"{run['train_seconds']:.0f}" for run in runs)]]
    machine = _table(["machine", ""], [[name, value] for name, value in report["machine"].items()])
    created = f"<p>{escape(report['created'])}</p>"
    return created + stages + _table(["setting", *(run["label"] for run in runs)], settings) + machine
