"""The retrieval protocols that results are published by: which captions count, and what is searched."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .metrics import DIRECTIONS, metrics_of_ranks, retrieval_ranks


@dataclass(frozen=True)
class Protocol:
    """How a split is measured.

    Args:
        images: how many it must have; None is any number.
        captions: the first so many of each image count, and each must have them; None is all of any number.
        fold: search among so many images and their captions at a time, contiguous ones, and take the mean of the
            metrics over these folds; None is one search among everything.
    """

    name: str
    images: int | None = None
    captions: int | None = None
    fold: int | None = None

    def check(self, captions_of_image: Sequence[int]) -> None:
        """ValueError if a split with so many captions of each image cannot be measured by this protocol."""
        images = len(captions_of_image)
        if self.images is not None and images != self.images:
            raise ValueError(f"protocol is {self.name!r}, which needs {self.images} images; the data has {images}")
        few = [index for index, count in enumerate(captions_of_image) if count < (self.captions or 1)]
        if few:
            raise ValueError(
                f"protocol is {self.name!r}, which needs {self.captions or 1} captions of each image; {len(few)} of "
                f"{images} images have fewer, the first is number {few[0]} with {captions_of_image[few[0]]}"
            )
        if self.fold is not None and (images == 0 or images % self.fold):
            raise ValueError(f"protocol is {self.name!r}, with folds of {self.fold} images; {images} cannot be so cut")


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("full"),
        Protocol("coco-5k", images=5000, captions=5),
        Protocol("coco-1k", images=5000, captions=5, fold=1000),
        Protocol("flickr30k-1k", images=1000, captions=5),
    )
}
GROUPS = {"coco": ("coco-5k", "coco-1k")}
NAMES = (*PROTOCOLS, *GROUPS)


def protocols_of(names: Sequence[str]) -> list[Protocol]:
    """The protocols of these names, each once; "coco" is coco-5k and coco-1k."""
    found = {}
    for name in names:
        if name not in NAMES:
            raise ValueError(f"protocol is {name!r}; it must be one of {', '.join(NAMES)}")
        found |= {member: PROTOCOLS[member] for member in GROUPS.get(name, (name,))}
    if not found:
        raise ValueError(f"protocols is empty; it must name at least one of {', '.join(NAMES)}")
    return list(found.values())


class Measured(NamedTuple):
    metrics: dict[str, float]  # as of `metrics_of_ranks`; the mean over folds, and "folds", how many; counts are sums
    ranks: dict[str, Tensor]  # "i2t" [I], "t2i" [T'] and ties, as of `retrieval_ranks` but on the CPU, within folds
    image_of_text: Tensor  # [T'], of the captions that count
    fold_of_image: Tensor  # [I]


def measure(protocol: Protocol, image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> Measured:
    """Ranks and metrics of images [I,F] and captions [T,F], which may be in any order, by a protocol."""
    images = len(image_features)
    image_of_text = image_of_text.cpu()
    protocol.check(torch.bincount(image_of_text, minlength=images).tolist())
    rows = _first_captions(image_of_text, protocol.captions)
    owner = image_of_text[rows]
    fold = protocol.fold or images
    metrics, ranks = [], {}
    for direction, queries in zip(DIRECTIONS, (images, len(rows)), strict=True):
        ranks[direction], ranks[f"{direction}_ties"] = torch.zeros(2, queries, dtype=torch.int64)
    for start in range(0, images, fold):
        inside = ((owner >= start) & (owner < start + fold)).nonzero().flatten()
        searched = image_features[start : start + fold], _rows(text_features, rows[inside])
        found = retrieval_ranks(*searched, owner[inside] - start)
        metrics.append(metrics_of_ranks(found))
        for name, values in found.items():
            place = slice(start, start + fold) if name.startswith("i2t") else inside
            ranks[name][place] = values.cpu()
    mean = _mean(metrics) if protocol.fold else metrics[0]
    return Measured(mean, ranks, owner, torch.arange(images) // fold)


def _mean(of_folds: list[dict[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for metrics in of_folds:
        for name, value in metrics.items():
            sums[name] += value
    counts = {name for name in sums if isinstance(of_folds[0][name], int)}
    return {
        name: int(value) if name in counts else value / len(of_folds) for name, value in sums.items()
    } | {"folds": len(of_folds)}


def _first_captions(image_of_text: Tensor, count: int | None) -> Tensor:
    """Rows of the first `count` captions of each image, in the order in which they stand."""
    texts = torch.arange(len(image_of_text))
    if count is None:
        return texts
    order = image_of_text.argsort(stable=True)  # image by image
    captions = torch.bincount(image_of_text)
    first = captions.cumsum(0) - captions
    place = torch.empty_like(texts)
    place[order] = texts - first[image_of_text[order]]
    return (place < count).nonzero().flatten()


def _rows(features: Tensor, rows: Tensor) -> Tensor:
    """features[rows]; without a copy where they are contiguous, as they are where captions stand image by image."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    if stop - start == len(rows) and bool((rows.diff() == 1).all()):
        return features[start:stop]
    return features[rows.to(features.device)]
