"""The picture of a caption: what every view attends to in its words."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from ..._optional import require
from .drawing import GREY, legible, missing_note, new_figure, save, text_width, wrapped
from .measures import Ranked
from .words import WordAttention

# In inches: a row of cells, the words above them, the columns at the left for name, entropy and overlap of a view.
_ROW, _HEAD, _LEFT, _PAD, _WIDEST = 0.22, 0.3, (0.62, 1.3, 1.9), 0.14, 11.0
_LETTERS, _NUMBERS = 9.5, 7.0  # in points
_LONGEST = 24  # letters of a word that are shown
_NUMBERED = 0.05  # cells from this share of attention on have it written into them


def word_grid(words: WordAttention, views: Ranked, path: Path, title: str) -> None:
    """Writes a PNG with a row per view, in the order of `views`, and a column per word; long captions go on in bands
    below. Shade and number are the share of the view's attention; all cells of a picture have one scale."""
    labels = [_shortened(word) for word in words.words]
    widths = [max(text_width(label, _LETTERS), 0.2) + _PAD for label in labels]
    bands = _bands(widths, _WIDEST - _LEFT[-1])
    notes = [
        f"numbers: % of the view's attention, from {100 * _NUMBERED:.0f} on; views sorted, the most focused first; "
        "entropy in % of the largest possible; cosine: mean to other views"
    ]
    if not words.named:
        notes.append("this tokenizer tells no words: the columns are positions of tokens, from 1")
    notes += filter(None, [missing_note(title, *words.words)])
    band_height = _HEAD + _ROW * len(views.order) + 0.16
    width = max(_LEFT[-1] + max(sum(widths[i] for i in band) for band in bands), 8.2) + 0.2
    heading = wrapped(title, 11, width - 0.3)
    top = 0.12 + 0.2 * len(heading) + 0.12
    height = top + band_height * len(bands) + 0.16 * len(notes) + 0.12
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()

    def write(x, y, text, size=_NUMBERS, **style):
        axes.text(x, y, text, size=size, parse_math=False, **{"va": "center", **style})

    for line, text in enumerate(heading):
        write(0.15, 0.2 + 0.2 * line, text, 11)
    shares = words.attention[views.order].tolist()
    strongest = max(max(row) for row in shares)
    for band in bands:
        _band(axes, write, [(labels[i], widths[i], words.special[i], [row[i] for row in shares]) for i in band],
              views, top, strongest)  # fmt: skip
        top += band_height
    for line, note in enumerate(notes):
        write(0.15, top + 0.04 + 0.16 * line, note, 7.5, color=GREY)
    save(figure, path, dpi=130)


def _shortened(word: str) -> str:
    word = legible(word)
    return word if len(word) <= _LONGEST else word[: _LONGEST - 1] + "…"


def _bands(widths: list[float], room: float) -> list[range]:
    """Columns cut into bands that fit into the room."""
    starts, used = [0], 0.0
    for index, width in enumerate(widths):
        if used and used + width > room:
            starts.append(index)
            used = 0.0
        used += width
    return [range(*pair) for pair in zip(starts, [*starts[1:], len(widths)], strict=True)]


def _band(axes, write, columns: list, views: Ranked, top: float, strongest: float) -> None:
    """One band of the grid: `columns` are (word, width, whether it is none, share by view)."""
    shade = require("matplotlib", extra="train").colormaps["Blues"]
    for x, text in zip(_LEFT, ("", "entropy", "cosine"), strict=True):
        write(x - 0.1, top + 0.5 * _HEAD, text, color=GREY, ha="right")
    first = top + _HEAD
    for row, label in enumerate(views.labels()):
        for x, text in zip(_LEFT, label, strict=True):
            write(x - 0.1, first + (row + 0.5) * _ROW, text, 8, ha="right")
    across = np.cumsum([_LEFT[-1], *(width for _, width, _, _ in columns)])
    down = first + _ROW * np.arange(len(views.order) + 1)
    # The root lets weak attention be seen beside strong.
    relative = (np.array([shares for *_, shares in columns]).T / strongest) ** 0.5
    axes.pcolormesh(across, down, shade(relative), edgecolors="white", linewidth=1)
    for (word, _, special, shares), middle, strength in zip(
        columns, (across[1:] + across[:-1]) / 2, relative.T, strict=True
    ):
        style = {"color": GREY, "style": "italic"} if special else {}
        write(middle, top + 0.55 * _HEAD, word, _LETTERS, ha="center", **style)
        for row, share in enumerate(shares):
            if share >= _NUMBERED:
                ink = "white" if strength[row] > 0.6 else "black"
                write(middle, first + (row + 0.5) * _ROW, f"{100 * share:.0f}", ha="center", color=ink)
