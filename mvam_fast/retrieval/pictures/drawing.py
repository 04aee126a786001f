"""What all pictures share: colours, figures without global state, and texts that any font can show."""
from __future__ import annotations

import functools
import textwrap
from pathlib import Path

from ..._optional import require
from ...files import atomic

# Told apart by colour-blind readers, too.
GREEN, ORANGE, BLUE, GREY = "#009e73", "#e69f00", "#0072b2", "#777777"
_MISSING = "□"


def new_figure(width: float, height: float, **options):
    """A matplotlib Figure of `width` × `height` inches at 100 dots per inch, unknown to pyplot."""
    return require("matplotlib.figure", extra="train").Figure(figsize=(width, height), dpi=100, **options)


def save(figure, path: Path, **options) -> None:
    """Writes the picture to `path`, whole or not at all. `options`: of matplotlib's savefig."""
    with atomic(path) as temporary:
        figure.savefig(temporary, facecolor="white", **options)


@functools.cache
def _font():
    fonts = require("matplotlib.font_manager", extra="train")
    return fonts.get_font(fonts.findfont("DejaVu Sans"))


@functools.cache
def _drawable() -> frozenset[int]:
    """Code points that the font of the pictures has."""
    return frozenset(_font().get_charmap())


def text_width(text: str, points: float) -> float:
    """Inches that a `legible` text takes in letters of that size."""
    font = _font()
    font.set_size(points, 72)
    font.set_text(text)
    return font.get_width_height()[0] / 64 / 72


def legible(text: str) -> str:
    """`text` on one line, with □ for each character that the pictures' font lacks."""
    return "".join(c if ord(c) in _drawable() else _MISSING for c in " ".join(text.split()))


def wrapped(text: str, points: float, room: float) -> list[str]:
    """`text`, made legible, in lines of about `room` inches."""
    text = legible(text)
    letters = len(text) * room / max(text_width(text, points), 0.01)
    return textwrap.wrap(text, max(int(0.95 * letters), 8))


def missing_note(*texts: str) -> str:
    """A sentence for the reader if any of the texts has characters that had to be replaced, else nothing."""
    return "□: a character that this picture's font lacks." if any(_MISSING in legible(t) for t in texts) else ""


def small(image, side: int = 512):
    """A PIL image as RGB, shrunk to at most `side` pixels per side: more than a picture's panel can show."""
    image = image.convert("RGB")
    image.thumbnail((side, side), require("PIL.Image", extra="train").LANCZOS)
    return image
