"""One process' part of a training batch: read, augmented, and with unreadable images replaced. What workers run."""
from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .captioned import CaptionedImages
from .image_store import CutPreprocess
from .images import UnreadableImage

# What a random generator is for, beside the seed; 1 is for captions (`PairBatches`), 3 for dropout (`StepGradients`).
_REPLACEMENT, _AUGMENTATION = 2, 4


class Part(NamedTuple):
    """What a worker hands over of a step.

    Fields:
        images: uint8 [b,3,H,W]; None after an error.
        indices: int64 [b], the images' in the data set.
        captions: int64 [b], the captions planned for these places, into all captions of the split.
        drawn: float64 [b], NaN but where an image was replaced: there it draws the caption (`PairBatches.caption_of`).
        unreadable: name of each unreadable image that was met → reason.
        error: why the step cannot be had; None if all is well.
    """

    step: int
    images: Tensor | None
    indices: np.ndarray
    captions: np.ndarray
    drawn: np.ndarray
    unreadable: dict[str, str]
    error: str | None = None


class PartLoader:
    """A planned step → its `Part`, a function of the seed and the step alone; all that a worker process needs.

    Args:
        places: which places of the global batch are this process' part.
        strict, cache: as of `TrainBatches`.
    """

    def __init__(
        self, dataset: CaptionedImages, cut: CutPreprocess, places: slice, seed: int, strict: bool, cache: bool
    ):
        self.images, self.size = dataset.images_only(), len(dataset)
        self.cut, self.places, self.seed, self.strict = cut, places, seed, strict
        self.cache: dict[int, Tensor] | None = {} if cache else None

    def __getitem__(self, planned: tuple[int, np.ndarray, np.ndarray]) -> Part:
        step, batch, captions = planned
        indices, unreadable, images = batch[self.places].copy(), {}, []
        drawn = np.full(len(indices), np.nan)
        part = Part(step, None, indices, captions[self.places], drawn, unreadable)
        with _generators_restored():
            for row, place in enumerate(range(self.places.start, self.places.stop)):
                try:
                    image = self._load(step, place, batch[place], unreadable)
                    if image is None:
                        indices[row], drawn[row], image = self._replace(step, place, batch, unreadable)
                except UnreadableImage as error:
                    # Told, not raised: from a worker it would come with the worker's own traceback in its text.
                    return part._replace(error=str(error))
                images.append(image)
        return part._replace(images=torch.stack(images))

    def _load(self, step: int, place: int, index: int, unreadable: dict[str, str]) -> Tensor | None:
        """uint8 [3,H,W], or None and an entry of `unreadable`."""
        index = int(index)
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        try:
            image = self.images.load_image(index)
        except UnreadableImage as error:
            if self.strict:
                raise
            unreadable[self.images.image_name(index)] = str(error)
            return None
        _seed_generators(self.seed, _AUGMENTATION, step, place)
        pixels = self.cut.pixels(image)
        if self.cache is not None:
            self.cache[index] = pixels
        return pixels

    def _replace(
        self, step: int, place: int, batch: np.ndarray, unreadable: dict[str, str]
    ) -> tuple[int, float, Tensor]:
        """Another image for this place: its index, what draws its caption, and its pixels."""
        outside = np.setdiff1d(np.arange(self.size), batch)[place :: len(batch)]
        rng = np.random.default_rng((self.seed, _REPLACEMENT, step, place))
        outside = rng.permutation(outside)
        for index, drawn in zip(outside.tolist(), rng.random(len(outside)).tolist(), strict=True):
            image = self._load(step, place, index, unreadable)
            if image is not None:
                return index, drawn, image
        name = self.images.image_name(int(batch[place]))
        raise UnreadableImage(
            f"{unreadable[name]}; and none of the {len(outside)} images kept for its place in step {step} can replace "
            f"it: the data set has {self.size} images, a batch {len(batch)}. Repair it, or leave it out of the data"
        )


def _seed_generators(*entropy: int) -> None:
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:2])
    # Not torch.manual_seed, which seeds the accelerator's generators too.
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))


@contextmanager
def _generators_restored() -> Iterator[None]:
    """The global generators of Python, NumPy and torch (CPU) are afterwards as they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
