"""The picture of retrieval: what each model finds first for a query, and where the true image is."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .drawing import GREEN, GREY, missing_note, new_figure, save, small, wrapped

_CELL, _GAP, _BETWEEN = 1.05, 0.07, 0.3  # inches: a thumbnail, between two of them, between blocks
_BESIDE = 5  # up to so many images of each model stand beside those of another, more below them


class Found(NamedTuple):
    """What a model found: its best `images` as (PIL image, cosine, whether it is the true one), best first, and the
    `rank` of the true image among all (from 1; None for a query without one)."""

    images: list[tuple]
    rank: int | None


class Query(NamedTuple):
    """A query with its true image (PIL), or None, and what each model, by name, found."""

    text: str
    truth: object | None
    found: dict[str, Found]


def retrieval_sheet(queries: list[Query], path: Path) -> None:
    """Writes a PNG: for every query the true image, and beside it each model's best, where it is framed and ticked."""
    names = list(queries[0].found)
    k = max(len(found.images) for found in queries[0].found.values())
    block = k * (_CELL + _GAP)
    beside = k <= _BESIDE
    width = 0.3 + _CELL + (_BETWEEN + block) * (len(names) if beside else 1)
    titles = [wrapped(f"“{query.text}”", 10.5, width - 0.3) for query in queries]
    line = 0.42 + _CELL + (0 if beside else 0.12)  # of thumbnails with what is written above them
    blocks = line * (1 if beside else len(names))
    heights = [0.2 * len(title) + 0.05 + blocks + 0.16 for title in titles]
    note = " ".join(filter(None, [
        "✓ and green frame: the image that the caption was written for. Above: place and cosine with the query.",
        missing_note(*(query.text for query in queries)),
    ]))  # fmt: skip
    height = 0.12 + sum(heights) + 0.25
    figure = new_figure(width, height)

    def write(x, y, text, size, **style):
        figure.text(x / width, 1 - y / height, text, size=size, va="center", parse_math=False, **style)

    def thumbnail(x, y, image, label, right):
        axes = figure.add_axes((x / width, 1 - (y + _CELL) / height, _CELL / width, _CELL / height))
        axes.imshow(np.asarray(small(image, 256)), interpolation="nearest" if max(image.size) < 128 else "antialiased")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=GREEN if right else "#cccccc", linewidth=4 if right else 0.6)
        write(x + _CELL / 2, y - 0.1, label, 8, ha="center", color=GREEN if right else "black",
              weight="bold" if right else "normal")  # fmt: skip

    top = 0.12
    for query, title, tall in zip(queries, titles, heights, strict=True):
        for number, text in enumerate(title):
            write(0.15, top + 0.1 + 0.2 * number, text, 10.5)
        first = top + 0.2 * len(title) + 0.05
        if query.truth is None:
            write(0.15 + _CELL / 2, first + 0.42 + _CELL / 2, "free query,\nno true image", 8, color=GREY, ha="center")
        else:
            thumbnail(0.15, first + 0.42, query.truth, "true image", False)
        for number, (name, found) in enumerate(query.found.items()):
            x = 0.15 + _CELL + _BETWEEN + (number * (block + _BETWEEN) if beside else 0)
            y = first + (0 if beside else number * line)
            rank = "" if found.rank is None else f", true image at rank {found.rank}"
            write(x, y + 0.12, f"{name}{rank}", 8.5, weight="bold")
            for place, (image, score, right) in enumerate(found.images):
                label = f"{'✓ ' if right else ''}{place + 1} · {score:.2f}"
                thumbnail(x + place * (_CELL + _GAP), y + 0.42, image, label, right)
        top += tall
    write(0.15, height - 0.14, note, 7.5, color=GREY)
    save(figure, path)
