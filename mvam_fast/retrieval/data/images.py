"""Reading image files."""
from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from ..._optional import require


class UnreadableImage(ValueError):
    """An image file that is missing or cannot be decoded."""


def read_image(source: str | Path | BinaryIO, name: str | None = None):
    """The image as RGB (PIL); UnreadableImage gives the reason and `name`, which is the path if left out."""
    image = require("PIL.Image", extra="train")
    # Besides its own kinds of error, PIL lets through what its decoders stumble on in a damaged file.
    damaged = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, image.DecompressionBombError)
    try:
        with image.open(source) as opened:
            return opened.convert("RGB")
    except damaged as error:
        shown = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "given")
        raise UnreadableImage(f"cannot read the image {shown}: {error}") from error
