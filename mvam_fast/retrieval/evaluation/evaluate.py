"""Retrieval evaluation on one split of a data set: of a model folder, or of an open_clip model as it is."""
from __future__ import annotations

from pathlib import Path

import torch

from ..._optional import require
from ...files import atomic, write_json
from ...model_folder import WEIGHTS
from ...version import __version__
from ..data.datasets import ImageStore, open_dataset
from .embedding import embed, embed_dataset
from .models import load_model, pick_device
from .protocols import Measured, measure, protocols_of
from .provenance import code_sha256, sha256_of_file, sha256_of_value
from .published import beside

__all__ = ["embed_dataset", "evaluate", "load_model", "pick_device", "recall_table", "report_of"]


def evaluate(
    model: str | Path,
    data: str | Path,
    images: str | Path | None,
    *,
    pretrained: str | None = None,
    protocols: tuple[str, ...] | list[str] = ("full",),
    split: str = "test",
    captions_per_image: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
    strict: bool = True,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Recall at 1, 5, 10 both ways, RSUM and ranks, with all that says how they were measured.

    Args:
        model, pretrained: see `load_model`.
        protocols: names of `protocols.PROTOCOLS`, or "coco" for two of them, all measured on one pass of the encoders.
            Data that does not fit one is an error.
        captions_per_image: keep the first so many; for the protocol "full" alone, the others have their own number.
        workers: threads that decode images; with 0 the one that does everything else.
        strict: an unreadable image is an error; otherwise it is left out, and counted under "protocol". Protocols with
            a number of images need them all.
        out: the result is also written there, and the rank of every query beside it (OUT.json → OUT.ranks.safetensors),
            which `significance.compare` reads.

    Returns:
        "metrics": those of the first protocol (`metrics_of_ranks`; there also how ties are counted); "by_protocol":
        {name: metrics}; "published": {name: `published.beside`} where something is known of the model, its numbers only
        on the data that they are of; "protocol": the data, the model and the code; "ranks": the file of ranks, if `out`
        is given.
    """
    wanted = protocols_of(protocols)
    fixed = [protocol for protocol in wanted if protocol.captions is not None]
    if captions_per_image is not None and fixed:
        raise ValueError(
            f"captions_per_image is {captions_per_image}, but the protocol {fixed[0].name!r} takes {fixed[0].captions}"
        )
    if not strict and fixed:
        raise ValueError(f"strict is False (--skip-unreadable), but the protocol {fixed[0].name!r} needs every image")
    if len(fixed) == len(wanted):
        captions_per_image = max(protocol.captions for protocol in fixed)
    dataset = open_dataset(data, images, split, captions_per_image=captions_per_image)
    for protocol in wanted:  # before the work, not after it
        protocol.check([len(captions) for captions in dataset.captions])
    loaded, preprocess, tokenizer = load_model(model, device, pretrained=pretrained)
    store = ImageStore(dataset, preprocess, strict=strict, workers=workers)
    found = embed(loaded, store, tokenizer, batch_size=batch_size, progress=progress)
    place = next(loaded.parameters()).device
    features = found.images.to(place), found.texts.to(place)
    measured = {protocol.name: measure(protocol, *features, found.image_of_text) for protocol in wanted}
    published = {}
    if pretrained is not None:
        published = {
            name: beside(one.metrics, str(model), pretrained, name, data=data, split=split)
            for name, one in measured.items()
        }
    result = {
        "kind": "retrieval",
        "metrics": measured[wanted[0].name].metrics,
        "by_protocol": {name: one.metrics for name, one in measured.items()},
        "published": {name: row for name, row in published.items() if row is not None},
        "protocol": {
            "protocols": list(measured),
            "model": str(model),
            "pretrained": pretrained,
            "weights_sha256": _weights_sha256(model, pretrained),
            "embedding_width": found.images.shape[1],
            "num_views": loaded.num_views,
            "global_view": loaded.global_view,
            "data": Path(data).name,
            "split": split,
            "captions_per_image": captions_per_image or "all",
            "image_ids_sha256": sha256_of_value([dataset.image_ids[index] for index in found.readable]),
            "captions_sha256": sha256_of_value([dataset.captions[index] for index in found.readable]),
            "unreadable_images": len(store.unreadable),
            "left_out": dataset.left_out,
            "ties": "count against the query",
            "mvam_fast": __version__,
            "code_sha256": code_sha256(),
            "torch": torch.__version__,
            "device": place.type,
        },
    }
    if out is not None:
        result["ranks"] = _write_ranks(Path(out).with_suffix(".ranks.safetensors"), measured)
        write_json(out, result)
    return result


def _weights_sha256(model: str | Path, pretrained: str | None) -> str | None:
    """Of the file of weights; None for a tag, which open_clip fetches from wherever it keeps it."""
    path = Path(model) / WEIGHTS if pretrained is None else Path(pretrained)
    return sha256_of_file(path) if path.is_file() else None


def _write_ranks(path: Path, measured: dict[str, Measured]) -> dict[str, str]:
    """The ranks of every query by each protocol, and what a comparison must know of the queries."""
    save_file = require("safetensors.torch", extra="train").save_file
    tensors = {}
    for name, one in measured.items():
        parts = {**one.ranks, "image_of_text": one.image_of_text, "fold_of_image": one.fold_of_image}
        tensors |= {f"{name}.{part}": values.int() for part, values in parts.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary)
    return {"file": path.name, "sha256": sha256_of_file(path)}


def recall_table(metrics_by_name: dict[str, dict]) -> str:
    """A table for people: one row per model, recall both ways, RSUM and median ranks."""
    keys = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]
    width = max(map(len, metrics_by_name)) + 2
    names = "".join(f"{key.replace('_r', ' R@'):>10}" for key in keys)
    lines = [f"{'':{width}}{names}{'RSUM':>9}{'median rank':>14}"]
    for name, metrics in metrics_by_name.items():
        ranks = ""
        if "i2t_median_rank" in metrics:
            ranks = f"{metrics['i2t_median_rank']:.0f} / {metrics['t2i_median_rank']:.0f}"
        cells = "".join(f"{metrics[key]:10.1f}" for key in keys)
        lines.append(f"{name:{width}}{cells}{metrics['rsum']:9.1f}{ranks:>14}")
    return "\n".join(lines)


def report_of(result: dict) -> str:
    """What `evaluate` found, for people: a row per protocol, what was published below it, ties, what was left out."""
    rows = {}
    for name, metrics in result["by_protocol"].items():
        rows[name] = metrics
        if result["published"].get(name, {}).get("recognised"):
            rows[f"{name}, published"] = result["published"][name]["metrics"]
            rows[f"{name}, difference"] = result["published"][name]["difference"]
    lines = [recall_table(rows)]
    for name, metrics in result["by_protocol"].items():
        if metrics["i2t_tied_queries"] or metrics["t2i_tied_queries"]:
            lines.append(
                f"{name}: {metrics['i2t_tied_queries']} images and {metrics['t2i_tied_queries']} captions have a wrong "
                "answer that ties with the right one, which counts against them; RSUM if ties counted for them: "
                f"{metrics['rsum_if_ties_count_for']:.1f}"
            )
    for name, row in result["published"].items():
        if row["recognised"]:
            told = "measured there, not here; that the data is the same is told by the names of file and split alone"
        else:
            said = result["protocol"]
            told = f"left out, for {said['data']}, split {said['split']!r}, cannot be recognised as that"
        lines.append(f"{name}, published: by others, {row['source']}, on {row['of']}; {told}")
    unreadable = result["protocol"]["unreadable_images"]
    lines += [f"left out as unreadable: {unreadable} images"] if unreadable else []
    lines += [f"left out of the data: {count} {reason}" for reason, count in result["protocol"]["left_out"].items()]
    return "\n".join(lines)
