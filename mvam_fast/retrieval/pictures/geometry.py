"""Which part of the original picture each patch of a model covers, derived from the steps of its preprocess."""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import nn

from ..._optional import require

_RESIZES = ("Resize", "ResizeKeepRatio")
_CROPS = ("CenterCrop", "CenterCropOrPad")
_COLOURS = ("MaybeConvertMode", "ToTensor", "MaybeToTensor", "Normalize")  # these move no pixel


class PatchMap(NamedTuple):
    """Where the patches of a model's input lie on the original picture, in its pixels; (0, 0) is the upper left corner.

    `size` (width, height) of the original; `columns` [C+1] and `rows` [R+1] float64, ascending: the borders between
    patches. Patch (r, c) covers columns[c] to columns[c+1] and rows[r] to rows[r+1]. What lies outside of the picture
    is padding; what of the picture lies outside of the borders the model has not seen.
    """

    size: tuple[int, int]
    columns: np.ndarray
    rows: np.ndarray

    @property
    def seen(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the part of the picture that the model's patches cover."""
        (width, height), columns, rows = self.size, self.columns, self.rows
        return max(columns[0], 0.0), max(rows[0], 0.0), min(columns[-1], float(width)), min(rows[-1], float(height))

    @property
    def is_cut(self) -> bool:
        """Whether any of the picture lies outside of the patches; half a pixel is rounding, and no cut."""
        left, top, right, bottom = self.seen
        return left > 0.5 or top > 0.5 or self.size[0] - right > 0.5 or self.size[1] - bottom > 0.5

    @property
    def padding(self) -> np.ndarray:
        """Which patches [R,C] hold nothing of the picture."""
        width, height = self.size
        across, down = np.diff(np.clip(self.columns, 0, width)), np.diff(np.clip(self.rows, 0, height))
        return (down <= 0)[:, None] | (across <= 0)

    def around(self, margin: float) -> tuple[float, float, float, float]:
        """`seen` with more of the picture around it: on each side up to `margin` times the longer side of it."""
        left, top, right, bottom = self.seen
        more = margin * max(right - left, bottom - top)
        return (max(left - more, 0.0), max(top - more, 0.0),
                min(right + more, float(self.size[0])), min(bottom + more, float(self.size[1])))  # fmt: skip

    def box(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of one patch, less what of it is padding. Without area if all of it is."""
        left, right = np.clip(self.columns[column : column + 2], 0, self.size[0])
        top, bottom = np.clip(self.rows[row : row + 2], 0, self.size[1])
        return float(left), float(top), float(right), float(bottom)


def patch_map(
    preprocess, size: tuple[int, int], grid: tuple[int, int], patch: tuple[int, int] | None = None
) -> PatchMap:
    """The `PatchMap` of a picture of `size` (width, height).

    Args:
        preprocess: a torchvision Compose as open_clip makes them for evaluation: resizes by the shortest or the longest
            side or to a fixed shape, a crop from the centre, or padding around it.
        grid: (rows, columns) of the model's patches.
        patch: (height, width) of a patch in the model's input. Without it the grid divides the input evenly. Where the
            patches end before the input does, the rest at the right and at the bottom is unseen.
    """
    steps = getattr(preprocess, "transforms", None)
    if steps is None:
        raise ValueError(f"preprocess is a {type(preprocess).__name__}; it must be a torchvision Compose")
    if min(*size, *grid) < 1:
        raise ValueError(f"size is {size} and grid {grid}; all four numbers must be at least 1")
    now, scale, shift = np.array(size), np.ones(2), np.zeros(2)  # x here = scale · x in the original + shift
    for step in steps:
        name = type(step).__name__
        if name in _RESIZES:
            # How a library rounds the new size is its own matter: it is asked, with a picture without content.
            blank = require("PIL.Image", extra="train").new("L", tuple(int(side) for side in now))
            ratio = np.array(step(blank).size) / now
            now, scale, shift = np.array(step(blank).size), scale * ratio, shift * ratio
        elif name in _CROPS:
            target = np.array(_width_height(step.size))
            # Padding goes before cropping, side by side: each axis has one of them.
            shift = shift + np.where(target > now, (target - now) // 2, -np.round((now - target) / 2))
            now = target
        elif name not in _COLOURS:
            known = ", ".join(_RESIZES + _CROPS + _COLOURS)
            raise ValueError(f"preprocess has the step {name}, whose geometry is unknown; it may have {known}")
    rows, columns = grid
    patch_width, patch_height = (now[0] / columns, now[1] / rows) if patch is None else (patch[1], patch[0])
    borders = (np.arange(count + 1) * side for count, side in ((columns, patch_width), (rows, patch_height)))
    columns, rows = ((line - shift[axis]) / scale[axis] for axis, line in enumerate(borders))
    return PatchMap((int(size[0]), int(size[1])), columns, rows)


def _width_height(size) -> tuple[int, int]:
    """torchvision's crop size, a number or (height, width)."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[0]) if len(size) == 1 else (size[1], size[0])


def patch_size(tower: nn.Module) -> tuple[int, int] | None:
    """(height, width) in pixels of the patches of an image tower, where its library states it; None elsewhere."""
    encoder = getattr(tower, "tower", None)
    embed = getattr(getattr(encoder, "trunk", None), "patch_embed", None)
    for owner in (encoder, embed, getattr(encoder, "config", None)):
        found = owner.get("patch_size") if isinstance(owner, Mapping) else getattr(owner, "patch_size", None)
        if found is not None:
            return (found, found) if isinstance(found, int) else tuple(found)
    return None
