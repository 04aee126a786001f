"""What every image-caption data set has in common, whatever its format."""
from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable, Iterable


class CaptionedImages:
    """Images with captions, in a fixed order. Formats derive from this and say how an image is read.

    Attributes:
        source: where the data came from, for people.
        split: the name of the split.
        captions: a list of non-empty strings for each image, at least one.
        image_ids: one for each image, all different.
        families: the scenes' groups of near-duplicates, one number for each image; None where there are none.
        left_out: what was dropped while reading, as a count by reason; empty if nothing was.
    """

    def __init__(
        self,
        source: str,
        split: str,
        captions: list[list[str]],
        image_ids: list[Hashable],
        *,
        families: list[int] | None = None,
        left_out: Counter[str] | None = None,
    ):
        repeated = first_repeated(image_ids)
        if repeated is not None:
            raise ValueError(f"data: {source} has the image id {repeated!r} more than once in the split {split!r}")
        self.source, self.split, self.captions, self.image_ids, self.families = (
            source, split, captions, image_ids, families,
        )  # fmt: skip
        self.left_out: dict[str, int] = {reason: count for reason, count in (left_out or {}).items() if count}

    def __len__(self) -> int:
        return len(self.image_ids)

    def load_image(self, index: int):
        """The image as RGB (PIL); UnreadableImage names it and the reason."""
        raise NotImplementedError

    def image_name(self, index: int) -> str:
        """Where the image is, for people: a path, or a tar file and the name inside it."""
        raise NotImplementedError

    def images_only(self) -> CaptionedImages:
        """A copy that only reads images, light enough to be sent to another process."""
        light = copy.copy(self)
        light.captions, light.image_ids, light.families = [], [], None
        return light


def keep_captions(raw: Iterable[str], limit: int | None, left_out: Counter[str]) -> list[str]:
    """The captions without space around them: the first `limit` that are not empty. Empty ones are counted."""
    stripped = [caption.strip() for caption in raw]
    kept = [caption for caption in stripped if caption]
    left_out["empty captions"] += len(stripped) - len(kept)
    return kept[:limit]


def check_local(data: str) -> None:
    if "://" in data or data.startswith("pipe:"):
        raise ValueError(f"data is {data!r}; it must be a local file: download the data and give its path")


def check_limit(captions_per_image: int | None) -> None:
    if captions_per_image is not None and captions_per_image < 1:
        raise ValueError(f"captions_per_image is {captions_per_image}; it must be at least 1, or None for all")


def first_repeated(values: Iterable[Hashable]) -> Hashable | None:
    """The first value that occurred before; None if all differ."""
    seen = set()
    return next((value for value in values if value in seen or seen.add(value)), None)
