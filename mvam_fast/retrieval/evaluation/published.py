"""Zero-shot recall that others published, to hold beside what is measured here."""
from __future__ import annotations

from pathlib import Path

from ...files import read_json

FILE = Path(__file__).with_name("published.json")
PROTOCOLS = ("flickr30k-1k", "coco-5k")
_DATA = {"flickr30k": ("Flickr30K", "dataset_flickr30k.json"), "coco": ("COCO", "dataset_coco.json")}


def published(model: str, pretrained: str | None, protocol: str) -> dict[str, float] | None:
    """Recall of an open_clip model name and tag by a protocol, in the keys of `recall_metrics`, with rsum computed
    here; None if nothing was published that is known here."""
    table = read_json(FILE, "published")
    for row in table["rows"]:
        if (row["model"], row["pretrained"]) == (model.replace("/", "-"), pretrained) and protocol in row:
            recalls = dict(zip(table["columns"], row[protocol], strict=True))
            return recalls | {"rsum": round(sum(recalls.values()), 2)}
    return None


def beside(
    metrics: dict[str, float], model: str, pretrained: str | None, protocol: str, *, data: str | Path, split: str
) -> dict | None:
    """What was published, if what was measured is the split of the data that it is of; None if nothing is known.

    Numbers of images tell no data set from another, so the split's name has to be "test" and the file's that of
    Karpathy's; its content is not looked at.

    Returns:
        {"source", "of" (the data, in words), "recognised" (whether these are the data)}, and if so "metrics" (as
        published) and "difference" (measured − published).
    """
    found = published(model, pretrained, protocol)
    if found is None:
        return None
    name, file = _DATA[protocol.partition("-")[0]]
    row = {
        "source": read_json(FILE, "published")["source"], "of": f"{name}, test of Karpathy's split ({file})",
        "recognised": split == "test" and Path(data).name == file,
    }  # fmt: skip
    if row["recognised"]:
        row |= {"metrics": found, "difference": {name: metrics[name] - value for name, value in found.items()}}
    return row


def markdown_table() -> str:
    """The whole file as the table of docs/evaluation.md."""
    lines = [
        "| model | weights | protocol | image → text R@1, 5, 10 | text → image R@1, 5, 10 | RSUM |",
        "|---|---|---|---|---|---|",
    ]
    for row in read_json(FILE, "published")["rows"]:
        for protocol in PROTOCOLS:
            found = published(row["model"], row["pretrained"], protocol)
            i2t, t2i = (
                ", ".join(f"{found[f'{way}_r{k}']:.2f}" for k in (1, 5, 10)) for way in ("i2t", "t2i")
            )
            lines.append(f"| {row['model']} | {row['pretrained']} | {protocol} | {i2t} | {t2i} | {found['rsum']:.2f} |")
    return "\n".join(lines)
