"""Image-caption data as a table, a row for each caption: the CSV that open_clip trains on."""
from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .captioned import CaptionedImages, check_limit, keep_captions
from .images import read_image


class CaptionTable(CaptionedImages):
    """A CSV or TSV (UTF-8) with a header and one caption in each row; the attributes are those of `CaptionedImages`.

    Rows of one image need not stand together. Images are in the order of their first rows, and their ids are their
    paths as the table has them.

    Args:
        path: the table.
        images: the folder that relative paths start from; the table's own if left out.
        split: what to call the data; a table has no splits.
        captions_per_image: keep the first this many of each image.
        image_column, caption_column: names in the header.
        separator: between columns; if left out a tab, or a comma where the header has no tab.

    ValueError names the row (the header is row 1) that cannot be read, or the image that has only empty captions. A
    column that begins with a quote must end with one; where the quote closes in a later row, as that of a caption which
    merely begins with one may, the rows between them would be lost, and that is an error too.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        split: str = "train",
        *,
        captions_per_image: int | None = None,
        image_column: str = "filepath",
        caption_column: str = "title",
        separator: str | None = None,
    ):
        check_limit(captions_per_image)
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"data: no such file: {path}")
        root = path.parent if images is None else Path(images)
        if not root.is_dir():
            raise FileNotFoundError(f"images: no such folder: {root}")
        spelled: dict[Path, str] = {}
        raw: dict[Path, list[str]] = {}
        for name, caption in _rows(path, separator, image_column, caption_column):
            # Two spellings of one path are one image.
            place = Path(os.path.normpath(root / name))
            spelled.setdefault(place, name)
            raw.setdefault(place, []).append(caption)
        if not raw:
            raise ValueError(f"data: {path} has no rows below a header")
        left_out: Counter[str] = Counter()
        captions = [keep_captions(row, captions_per_image, left_out) for row in raw.values()]
        bare = next((name for name, kept in zip(spelled.values(), captions, strict=True) if not kept), None)
        if bare is not None:
            raise ValueError(f"data: {path} has no caption for the image {bare}")
        self.image_paths = list(raw)
        super().__init__(str(path), split, captions, list(spelled.values()), left_out=left_out)

    def load_image(self, index: int):
        return read_image(self.image_paths[index])

    def image_name(self, index: int) -> str:
        return str(self.image_paths[index])


def _rows(path: Path, separator: str | None, image_column: str, caption_column: str) -> Iterator[tuple[str, str]]:
    """(path of the image, caption) of each row."""
    number = 0
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            if separator is None:
                separator = "\t" if "\t" in file.readline() else ","
                file.seek(0)
            for row in csv.reader(file, delimiter=separator, strict=True):
                number += 1
                if number == 1:
                    width = len(row)
                    image, caption = _columns(row, separator, image_column, caption_column)
                elif row and len(row) != width:
                    raise ValueError(f"it has {len(row)} columns, the header {width}")
                elif row and not row[image]:
                    raise ValueError(f"its column {image_column!r} is empty")
                elif any(_holds_rows(text, place, width, separator) for place, text in enumerate(row)):
                    raise ValueError(
                        "a quote at the start of a column closes in a later row, and what lies between looks like rows "
                        "of their own; a quote that belongs to the text must be doubled, in a quoted column"
                    )
                elif row:  # a line without anything, as at the end of some files, is none
                    yield row[image], row[caption]
        except csv.Error as error:  # in the row that did not come
            raise ValueError(f"data: {path}, row {number + 1}: {error}") from error
        except UnicodeDecodeError as error:  # somewhere in what is read ahead
            raise ValueError(f"data: {path}, after row {number}: {error}") from error
        except ValueError as error:
            raise ValueError(f"data: {path}, row {number}: {error}") from error


def _holds_rows(text: str, place: int, width: int, separator: str) -> bool:
    """Whether the text of the column at `place` has swallowed the end of its row and the start of another, by the
    separators before its first and after its last line end."""
    lines = re.split(r"[\r\n]+", text)
    return (
        len(lines) > 1 and lines[0].count(separator) >= width - 1 - place and lines[-1].count(separator) >= place
    )


def _columns(header: list[str], separator: str, *names: str) -> list[int]:
    """Where in the header the names are."""
    if any(header.count(name) != 1 for name in names):
        raise ValueError(
            f"the header is {header}, separated by {separator!r}; it must have each of {', '.join(names)} once"
        )
    return [header.index(name) for name in names]
