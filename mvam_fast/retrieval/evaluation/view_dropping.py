"""Which learned views of a trained model can go, and what that costs.

An embedding is its views' vectors, one after another, normalised as a whole. Without some of the views it is the rest,
normalised anew: exactly what `MVAM.select_views` gives, so one pass of the encoders is enough to try everything.
"""
from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._optional import require
from ...files import atomic, write_json
from ...model import MVAM
from ...version import __version__
from ..data.captioned import CaptionedImages
from ..data.datasets import ImageStore, open_dataset
from .embedding import Embedded, embed
from .metrics import DIRECTIONS, SCORE_MEMORY, image_ranks, metrics_of_ranks, query_blocks, recall_metrics, text_ranks
from .models import load_model
from .provenance import sha256_of_value


def drop_views(
    model: str | Path,
    data: str | Path,
    images: str | Path | None,
    *,
    out: str | Path,
    keep: Sequence[int] | None = None,
    save: Sequence[int] = (),
    choose_on: str = "val",
    choose_data: str | Path | None = None,
    choose_images: str | Path | None = None,
    split: str = "test",
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> dict:
    """Drops one view after another, the one whose loss costs least RSUM on `choose_on`, and measures on `split`.

    ValueError if these have images in common: what was chosen on an image must not be measured on it.

    Args:
        model: folder of a model with learned views. Its global view, if it has one, always stays.
        keep: numbers of learned views to measure; all by default, from all of them down to 1 (0 with a global view).
        save: numbers of learned views, of which OUT/model-K is written, a model that has only these.
        data, images, split: what is measured on, as for `open_dataset`.
        choose_on, choose_data, choose_images: likewise what is chosen on. By default another split of `data`; data
            without splits, as tables and tar files are, needs a `choose_data` of its own.
        workers: threads that decode images; with 0 the one that does everything else.
        out: folder of drop_views.json, drop_views.png and the models.

    Returns:
        {"kind", "model", "num_views", "global_view", "data": {"choose" and "measure": {"data", "images_from", "split",
        "images" and "captions" (how many), their hashes}}, "dropped": the views in the order in which they went,
        "sizes": [{"views", "kept" (their numbers), "width", "chosen_rsum" (on what was chosen on), "metrics" (on what
        is measured on), "rsum_change" (against all views), "model" (folder, if saved)}], most views first}.
    """
    out = Path(out)
    loaded, preprocess, tokenizer = load_model(model, device)
    smallest = 0 if loaded.global_view else 1
    if loaded.num_views <= smallest:
        raise ValueError(f"model: {model} has {loaded.num_views} learned views; there is none that could be dropped")
    sizes = range(loaded.num_views, smallest - 1, -1)
    for name, numbers, least in (("keep", keep or (), smallest), ("save", save, 1)):
        for number in numbers:
            if not least <= number <= loaded.num_views:
                raise ValueError(f"{name} is {number}; it must be {least} to {loaded.num_views}, the learned views")
    sizes = sorted({*(sizes if keep is None else keep), *save}, reverse=True)
    if choose_data is None and choose_images is not None:
        raise ValueError(f"choose_images is {str(choose_images)!r}, but choose_data, whose images it has, is not given")
    choose_from = (data, images) if choose_data is None else (choose_data, choose_images)
    sources = {"choose": (*choose_from, choose_on), "measure": (data, images, split)}
    datasets = {name: open_dataset(*source) for name, source in sources.items()}
    shared = shared_images(datasets["choose"], datasets["measure"])
    if shared:
        raise ValueError(
            f"choose_on is {choose_on!r}, and {shared} of its {len(datasets['choose'])} images in {choose_from[0]} are "
            f"among those of the split {split!r} of {data}: views would be chosen on what they are measured on; give "
            "another split as choose_on (--choose-on), or, as tables and tar files have none, other data as "
            "choose_data (--choose-data)"
        )
    found = {
        name: embed(loaded, ImageStore(dataset, preprocess, strict=True, workers=workers), tokenizer,
                    batch_size=batch_size, progress=progress)
        for name, dataset in datasets.items()
    }  # fmt: skip
    place = next(loaded.parameters()).device
    columns = view_columns(loaded, found["measure"].images.shape[1])
    steps = eliminate(*_on(place, found["choose"]), columns, progress=progress)
    dropped = [view for view, _ in steps if view is not None]
    tested = _on(place, found["measure"])
    everything = recall_metrics(*tested)
    rows = []
    for number in sizes:
        kept = sorted(set(range(loaded.num_views)) - set(dropped[: loaded.num_views - number]))
        width = sum(len(columns[view]) for view in (None, *kept))
        metrics = everything if number == loaded.num_views else recall_metrics(*without(tested, columns, kept))
        row = {
            "views": number, "kept": kept, "width": width, "chosen_rsum": steps[loaded.num_views - number][1],
            "metrics": metrics, "rsum_change": metrics["rsum"] - everything["rsum"],
        }  # fmt: skip
        if number in save:
            row["model"] = str(_save(loaded, kept, Path(model), out / f"model-{number}"))
        rows.append(row)
    result = {
        "kind": "view dropping", "model": str(model), "num_views": loaded.num_views,
        "global_view": loaded.global_view,
        "data": {name: _describe(*sources[name], dataset) for name, dataset in datasets.items()},
        "dropped": dropped, "sizes": rows, "mvam_fast": __version__,
    }  # fmt: skip
    write_json(out / "drop_views.json", result)
    _plot(result, out / "drop_views.png")
    return result


def shared_images(one: CaptionedImages, other: CaptionedImages) -> int:
    """How many images of `one` are in `other` too: lie in the same place, or have the same id and captions.

    An id alone does not tell: two files may both count from 0, two folders have shards of the same names.
    """
    places = {other.image_name(index) for index in range(len(other))}
    contents = {(name, tuple(captions)) for name, captions in zip(other.image_ids, other.captions, strict=True)}
    return sum(
        one.image_name(index) in places or (name, tuple(captions)) in contents
        for index, (name, captions) in enumerate(zip(one.image_ids, one.captions, strict=True))
    )


def view_columns(model: MVAM, width: int) -> dict[int | None, range]:
    """Which of an embedding's `width` numbers each learned view has; under None those of the global view (or none)."""
    view_width = model.view_dim or width // model.num_vectors
    first = width - model.num_views * view_width
    columns: dict[int | None, range] = {None: range(first)}
    return columns | {
        view: range(first + view * view_width, first + (view + 1) * view_width) for view in range(model.num_views)
    }


def without(
    features: tuple[Tensor, Tensor, Tensor], columns: dict[int | None, range], kept: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Images [I,F], captions [T,F] and each caption's image, with the columns of the global view and the `kept` views
    alone, normalised anew."""
    images, texts, image_of_text = features
    chosen = torch.tensor([column for view in (None, *kept) for column in columns[view]], device=images.device)
    return F.normalize(images[:, chosen], dim=-1), F.normalize(texts[:, chosen], dim=-1), image_of_text


def eliminate(
    images: Tensor, texts: Tensor, image_of_text: Tensor, columns: dict[int | None, range], *, progress: bool = True
) -> list[tuple[int | None, float]]:
    """Greedy backward elimination: [(None, RSUM of all views), (view dropped first, RSUM without it), ...].

    Down to one learned view, or to none beside a global one. Of views whose loss costs the same, the first goes.
    """
    kept = [view for view in columns if view is not None]
    steps: list[tuple[int | None, float]] = [(None, recall_metrics(images, texts, image_of_text)["rsum"])]
    rounds = len(kept) if columns[None] else len(kept) - 1
    for _ in require("tqdm", extra="train").tqdm(range(rounds), desc="dropping", disable=not progress, leave=False):
        rsums = rsums_without_each(images, texts, image_of_text, columns, kept)
        dropped = max(kept, key=rsums.get)
        kept.remove(dropped)
        steps.append((dropped, rsums[dropped]))
    return steps


def rsums_without_each(
    images: Tensor, texts: Tensor, image_of_text: Tensor, columns: dict[int | None, range], kept: Sequence[int]
) -> dict[int, float]:
    """The RSUM without each of the `kept` views (and without all that are not kept).

    A score is the sum of the views' own inner products, over the norms: those are computed once for all candidates.
    """
    parts = [view for view in (None, *kept) if columns[view]]
    image_of_text = image_of_text.to(images.device)
    norms = {}
    for name, features in (("images", images), ("texts", texts)):
        squares = {view: _part(features, columns[view]).square().sum(1) for view in parts}
        whole = sum(squares.values())
        norms[name] = {view: (whole - squares[view]).clamp_min(1e-12).sqrt() for view in kept}
    ranks = {view: {name: [] for way in DIRECTIONS for name in (way, f"{way}_ties")} for view in kept}
    for way, queries, gallery, gallery_norms in (
        ("i2t", images, texts, norms["texts"]), ("t2i", texts, images, norms["images"]),
    ):  # fmt: skip
        size = max(1, SCORE_MEMORY // ((4 * len(parts) + 14) * len(gallery)))
        for start, stop in query_blocks(len(queries), size):
            scores = {
                view: _part(queries[start:stop], columns[view]) @ _part(gallery, columns[view]).T for view in parts
            }
            whole = sum(scores.values())
            for view in kept:
                rest = (whole - scores[view]).div_(gallery_norms[view])  # the query's own norm changes no rank
                answer = image_of_text - start if way == "i2t" else image_of_text[start:stop]
                for name, piece in zip((way, f"{way}_ties"), _RANKS[way](rest, answer), strict=True):
                    ranks[view][name].append(piece)
    return {
        view: metrics_of_ranks({name: torch.cat(pieces) for name, pieces in of_view.items()})["rsum"]
        for view, of_view in ranks.items()
    }


_RANKS = {"i2t": image_ranks, "t2i": text_ranks}


def _part(features: Tensor, columns: range) -> Tensor:
    return features[:, columns.start : columns.stop]


def _on(place: torch.device, found: Embedded) -> tuple[Tensor, Tensor, Tensor]:
    return found.images.to(place), found.texts.to(place), found.image_of_text


def _describe(data: str | Path, images: str | Path | None, split: str, dataset: CaptionedImages) -> dict:
    return {
        "data": str(data), "images_from": None if images is None else str(images), "split": split,
        "images": len(dataset), "captions": sum(map(len, dataset.captions)),
        "image_ids_sha256": sha256_of_value(dataset.image_ids), "captions_sha256": sha256_of_value(dataset.captions),
    }  # fmt: skip


def _save(model: MVAM, kept: list[int], source: Path, folder: Path) -> Path:
    model.select_views(kept).save_pretrained(folder)
    for path in source.iterdir():  # what save_pretrained leaves to the user: tokenizer and image processor
        if path.is_file() and not (folder / path.name).exists():
            shutil.copy2(path, folder / path.name)
    return folder


def _plot(result: dict, path: Path) -> None:
    """RSUM over the embedding's width."""
    figure = require("matplotlib.figure", extra="train").Figure(figsize=(6, 3.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    rows = result["sizes"]
    axis.plot([row["width"] for row in rows], [row["metrics"]["rsum"] for row in rows], marker="o", color="#0072b2")
    for row in rows:
        place = (row["width"], row["metrics"]["rsum"])
        axis.annotate(str(row["views"]), place, xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center")
    axis.set_xlabel("numbers per image or text; at each point, how many learned views", fontsize=9)
    chosen, measured = (_named(result["data"][name]) for name in ("choose", "measure"))
    axis.set_ylabel(f"RSUM on {measured}", fontsize=9, parse_math=False)
    axis.set_title(f"Views dropped by RSUM on {chosen}", fontsize=10, parse_math=False)
    axis.margins(y=0.15)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, facecolor="white")


def _named(described: dict) -> str:
    return f"{Path(described['data']).name} ({described['split']})"


def dropping_table(result: dict) -> str:
    """For people: a row for each number of views."""
    lines = [f"{'views':>5}{'width':>7}{'RSUM':>9}{'change':>9}{'i2t R@1':>9}{'t2i R@1':>9}  kept"]
    for row in result["sizes"]:
        metrics = row["metrics"]
        names = (["global"] if result["global_view"] else []) + [str(view) for view in row["kept"]]
        kept = "all" if row["views"] == result["num_views"] else " ".join(names)
        lines.append(
            f"{row['views']:5}{row['width']:7}{metrics['rsum']:9.1f}{row['rsum_change']:+9.1f}"
            f"{metrics['i2t_r1']:9.1f}{metrics['t2i_r1']:9.1f}  {kept}"
        )
    chosen, measured = (_named(result["data"][name]) for name in ("choose", "measure"))
    lines.append(f"measured on {measured}; chosen on {chosen}")
    lines += [f"{row['views']} views: {row['model']}" for row in result["sizes"] if "model" in row]
    return "\n".join(lines)
