"""One picture to one row of a batch: training's evaluation transform, written straight into the row."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from .._optional import require
from ..preprocess import eval_transform
from ..retrieval.data.datasets import UnreadableImage, read_image


class ImageRows:
    """Fills rows in the form that a tower takes, uint8 [H,W,3] or floating point [3,H,W].

    The transform is cut before its ToTensor: what comes before it (resize, crop) makes pixels, and those are a uint8
    tower's input. What ToTensor and Normalize make of a pixel depends on its channel and its value alone, so they are
    run once, on all 256 values, and looked up from then on: bit for bit what they would give, without their copies.
    """

    def __init__(self, preprocess_cfg: dict, row: tuple[int, ...], dtype: np.dtype):
        self._geometry, rest = _cut(eval_transform(preprocess_cfg))
        self._as_pixels = dtype == np.uint8
        self._size = tuple(row[:2] if self._as_pixels else row[1:])
        values = require("PIL.Image", extra="train").fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
        for step in rest:
            values = step(values)
        self._table = values[:, 0].numpy().astype(dtype)  # [3,256]

    def fill(self, image, position: int, row: np.ndarray) -> None:
        """`image`: a path or a PIL image; `position`: where it stands in the user's list, for errors."""
        pixels = self._pixels(image, position)
        if self._as_pixels:
            row[:] = pixels
            return
        for channel, (table, plane) in enumerate(zip(self._table, row, strict=True)):
            # A mode other than "raise" lets numpy write into `plane` directly; a uint8 is never out of range.
            np.take(table, pixels[..., channel], out=plane, mode="clip")

    def _pixels(self, image, position: int) -> np.ndarray:
        if isinstance(image, (str, Path)):
            image = read_image(image)
        else:
            decode(image, position)
        for step in self._geometry:
            image = step(image)
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.shape != (*self._size, 3):
            raise ValueError(
                f"preprocess makes {pixels.dtype} {list(pixels.shape)} of the image at position {position}; "
                f"the tower takes uint8 {[*self._size, 3]}"
            )
        return pixels


def decode(image, position: int) -> None:
    """Has a PIL image that was opened, and no more, read its file."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(f"cannot read the image at position {position}: {error}") from error


def _cut(transform) -> tuple[list, list]:
    """The steps of a torchvision Compose, divided before its ToTensor and Normalize."""
    transforms = require("torchvision.transforms", extra="train")
    steps = list(getattr(transform, "transforms", []))
    expected = (transforms.ToTensor, transforms.Normalize)
    if len(steps) < 2 or not all(isinstance(*pair) for pair in zip(steps[-2:], expected, strict=True)):
        names = [type(step).__name__ for step in steps]
        raise ValueError(f"preprocess has the steps {names}; it must end in ToTensor, Normalize")
    return steps[:-2], steps[-2:]
