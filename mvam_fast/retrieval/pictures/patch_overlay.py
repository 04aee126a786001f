"""The picture of an image: where every view looks in it, on the part of the original that the model saw."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from torch import Tensor

from ..._optional import require
from .drawing import GREY, ORANGE, missing_note, new_figure, save, wrapped
from .geometry import PatchMap
from .measures import Ranked

_WIDEST, _GAP, _HEAD, _LABEL = 12.9, 0.14, 0.4, 2.2  # inches: figure, between panels, above one, width of its label


def patch_overlay(
    image, attention: Tensor, prefix_tokens: int, patches: PatchMap, views: Ranked, path: Path, title: str
) -> None:
    """Writes a PNG with the original at the left and a panel per view in the order of `views`.

    image: PIL, as `patches` describes it. attention [M,N] over `prefix_tokens` tokens that are no patches, and then the
    patches row by row. A panel is lit where the view looks, relative to its brightest patch; an orange line surrounds
    the fewest patches that hold half of what falls on patches. Without light and hatched: not seen by the model.
    """
    grid = len(patches.rows) - 1, len(patches.columns) - 1
    tokens = attention.shape[-1]
    if tokens != prefix_tokens + grid[0] * grid[1]:
        raise ValueError(
            f"attention is over {tokens} tokens; it must be over {prefix_tokens} and then a grid of {grid[0]} × "
            f"{grid[1]} patches, as the image tower states"
        )
    window, whole = patches.around(0.12), (0.0, 0.0, *map(float, image.size))
    columns, panel, tall = _arrangement(len(views.order), _aspect(window))
    rows = math.ceil(len(views.order) / columns)
    cell, line = max(panel, _LABEL) + _GAP, tall + _HEAD + _GAP
    wide = min(_LABEL, rows * line / _aspect(whole))  # of the original
    width = 0.3 + _LABEL + columns * cell
    heading, notes = wrapped(title, 11, width - 0.3), _notes(patches, title)
    top = 0.22 + 0.2 * len(heading)
    height = top + max(rows * line, _HEAD + wide * _aspect(whole)) + 0.17 * len(notes) + 0.1
    figure = new_figure(width, height)
    pixels = {part: _cut(image, part) for part in {window, whole}}

    def write(y, text, size, **style):
        figure.text(0.15 / width, 1 - y / height, text, size=size, va="center", parse_math=False, **style)

    def panel_at(x, y, size, part, label):
        box = (x / width, 1 - (y + size * _aspect(part)) / height, size / width, size * _aspect(part) / height)
        axes = figure.add_axes(box)
        left, upper, right, lower = part
        axes.imshow(pixels[part], extent=(left, right, lower, upper), aspect="auto", interpolation="nearest")
        axes.set(xlim=(left, right), ylim=(lower, upper), xticks=[], yticks=[])
        axes.set_title(label, fontsize=8, pad=3)
        _hatch_unseen(axes, patches)
        return axes

    for number, text in enumerate(heading):
        write(0.2 + 0.2 * number, text, 11)
    size = f"original, {image.size[0]} × {image.size[1]}\npatches: {grid[0]} × {grid[1]}"
    panel_at(0.15 + (_LABEL - wide) / 2, top + _HEAD, wide, whole, size)
    for place, (view, label) in enumerate(zip(views.order, views.labels(), strict=True)):
        light = attention[view, prefix_tokens:].reshape(grid).double().numpy()
        elsewhere = {prefix_name(prefix_tokens): float(attention[view, :prefix_tokens].sum())} if prefix_tokens else {}
        if patches.padding.any():
            elsewhere["padding"] = float(light[patches.padding].sum())
        x = 0.15 + _LABEL + _GAP + (place % columns) * cell + (cell - _GAP - panel) / 2
        y = top + _HEAD + (place // columns) * line
        axes = panel_at(x, y, panel, window, _panel_title(label, light.max(), elsewhere))
        _veil(axes, patches, light)
        _surround(axes, patches, half_of_it(light) & ~patches.padding)
    for number, note in enumerate(notes):
        write(height - 0.12 - 0.17 * (len(notes) - 1 - number), note, 7.5, color=GREY)
    save(figure, path, dpi=110)


def _notes(patches: PatchMap, title: str) -> list[str]:
    notes = ["light: attention relative to the view's brightest patch (peak); inside the orange line: half of it"]
    if patches.is_cut:
        notes[0] += "; hatched: cut off, not seen by the model"
    notes += ["views sorted, the most focused first; entropy in % of the largest possible; cosine: mean to other views"]
    return [*notes, *filter(None, [missing_note(title)])]


def _aspect(part: tuple[float, float, float, float]) -> float:
    left, top, right, bottom = part
    return (bottom - top) / (right - left)


def _cut(image, part: tuple[float, float, float, float]) -> np.ndarray:
    """The pixels of a part of the image, whose borders may lie within pixels, at a size that a panel can show."""
    resampling = require("PIL.Image", extra="train").Resampling
    left, top, right, bottom = part
    shrink = min(1.0, 512 / max(right - left, bottom - top))
    size = (max(round((right - left) * shrink), 1), max(round((bottom - top) * shrink), 1))
    # Small pictures keep their pixels; large ones are averaged.
    how = resampling.LANCZOS if shrink < 1 else resampling.NEAREST
    return np.asarray(image.convert("RGB").resize(size, how, box=part))


def check_grid(tower) -> None:
    """ValueError unless the patches of an image tower lie on a grid."""
    if tower.grid is None:
        raise ValueError(
            f"model: its image tower ({type(tower).__name__}) has no grid of patches, so its attention cannot be laid "
            "over a picture; mvam-fast diversity needs none"
        )


def half_of_it(light: np.ndarray) -> np.ndarray:
    """The fewest patches that hold half of the attention [R,C]: a mask. Equals of the weakest of them belong too."""
    falling = np.sort(light, axis=None)[::-1]
    last = np.searchsorted(np.cumsum(falling), 0.5 * light.sum())
    return light >= falling[min(last, falling.size - 1)] * (1 - 1e-6)


def _arrangement(views: int, aspect: float) -> tuple[int, float, float]:
    """Columns of panels, and a panel's width and height in inches: about the largest that leave the figure a handy
    shape, and of these the arrangement with the fewest rows."""
    panels = {}
    for columns in range(1, views + 1):
        room = (_WIDEST - 0.3 - _LABEL) / columns - _GAP
        # Of very many views, the figure grows: panels are no less tall than can be seen.
        tall = max(8.5 / math.ceil(views / columns) - _HEAD - _GAP, 0.5)
        if room >= _LABEL:
            panels[columns] = min(room, tall / aspect, 2.6)
    columns = max(columns for columns, panel in panels.items() if panel >= 0.9 * max(panels.values()))
    panel = max(panels[columns], 0.1)  # of a very narrow image
    return columns, panel, panel * aspect


def prefix_name(prefix_tokens: int) -> str:
    """What the tokens before the patches are called."""
    return "class token" if prefix_tokens == 1 else "prefix tokens"


def _panel_title(label: tuple[str, str, str], peak: float, elsewhere: dict[str, float]) -> str:
    name, entropy, overlap = label
    first = [name, f"entropy {entropy}"] + ([f"cosine {overlap}"] if overlap else [])
    second = [f"peak {100 * peak:.0f} %", *(f"{where} {100 * share:.0f} %" for where, share in elsewhere.items())]
    return f"{' · '.join(first)}\n{' · '.join(second)}"


def _veil(axes, patches: PatchMap, light: np.ndarray) -> None:
    """Darkens each patch by how little attention it has. Vectors, so borders are where they are, at any resolution."""
    strength = 0.8 * (1 - light / max(light.max(), 1e-30))
    veil = np.zeros((*light.shape, 4))
    veil[..., :3], veil[..., 3] = 0.12, strength
    axes.pcolormesh(patches.columns, patches.rows, veil, edgecolors="none", antialiased=False, linewidth=0)


def _hatch_unseen(axes, patches: PatchMap) -> None:
    if not patches.is_cut:
        return
    rectangle = require("matplotlib.patches", extra="train").Rectangle
    (width, height), (left, top, right, bottom) = patches.size, patches.seen
    style = {"facecolor": (0.5, 0.5, 0.5, 0.75), "edgecolor": (1, 1, 1, 0.9), "hatch": "////", "linewidth": 0}
    for x, y, right_end, bottom_end in (
        (0, 0, width, top), (0, bottom, width, height), (0, top, left, bottom), (right, top, width, bottom),
    ):  # fmt: skip
        if right_end > x and bottom_end > y:
            axes.add_patch(rectangle((x, y), right_end - x, bottom_end - y, **style))


def _surround(axes, patches: PatchMap, inside: np.ndarray) -> None:
    """A line around the patches that are inside, between each of them and a neighbour that is not."""
    lines = require("matplotlib.collections", extra="train").LineCollection
    (width, height), columns, rows = patches.size, patches.columns.clip(0), patches.rows.clip(0)
    columns, rows = columns.clip(max=width), rows.clip(max=height)
    padded = np.pad(inside, 1)
    segments = [
        [(columns[c], rows[r]), (columns[c + 1], rows[r])]
        for r, c in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    ] + [
        [(columns[c], rows[r]), (columns[c], rows[r + 1])]
        for r, c in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    ]
    axes.add_collection(lines(segments, colors=ORANGE, linewidths=1.6, capstyle="round", clip_on=False))
