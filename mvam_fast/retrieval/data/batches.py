"""Which images and captions stand in which training batch."""
from __future__ import annotations

import numpy as np

from .captioned import CaptionedImages


class PairBatches:
    """An endless stream of batches: distinct images, one caption drawn for each. A function of (seed, step) alone.

    Every epoch is a permutation; what does not fill a batch at its end is left out. Since no state is kept, a run that
    resumes at step k asks for batch k and has what an uninterrupted run had.

    Args:
        siblings: that many images of one family stand in a batch together, as near-duplicates of each other: hard
            negatives. 1 ignores families.
    """

    def __init__(self, dataset: CaptionedImages, batch_size: int, *, seed: int = 0, siblings: int = 1):
        if siblings > 1 and dataset.families is None:
            raise ValueError(f"siblings is {siblings}, but {dataset.source} has no families; it must be 1")
        if siblings < 1 or batch_size % siblings:
            raise ValueError(f"siblings is {siblings}; it must be at least 1 and divide the batch size {batch_size}")
        if not 1 <= batch_size <= len(dataset):
            raise ValueError(f"batch_size is {batch_size}; it must be 1 to {len(dataset)}, the images of the split")
        self.batch_size, self.seed, self.siblings = batch_size, seed, siblings
        self.counts = np.array([len(captions) for captions in dataset.captions])
        self.first_caption = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        if siblings > 1:
            _, group = np.unique(dataset.families, return_inverse=True)
            self.members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
        usable = len(self._epoch(0))
        if usable < batch_size:  # of siblings: a family's rest that fills no group is left out
            raise ValueError(
                f"siblings is {siblings} and batch_size {batch_size}, but of the {len(dataset)} images of "
                f"{dataset.source} only {usable} are left in full groups of {siblings} of a family; batch_size must be "
                "at most that, or siblings fewer"
            )
        self.steps_per_epoch = usable // batch_size

    def _epoch(self, epoch: int) -> np.ndarray:
        """All images in the order of this epoch, families cut into groups of `siblings`."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.siblings == 1:
            return rng.permutation(np.arange(len(self.counts))[:, None]).reshape(-1)
        groups = []
        for members in self.members:
            members = rng.permutation(members)
            whole = len(members) - len(members) % self.siblings
            groups.append(members[:whole].reshape(-1, self.siblings))
        return rng.permutation(np.concatenate(groups)).reshape(-1)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the images [B] and of their captions [B] (into all captions of the split, in order)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if getattr(self, "_cached", (None,))[0] != epoch:
            self._cached = (epoch, self._epoch(epoch))
        images = self._cached[1][position * self.batch_size : (position + 1) * self.batch_size]
        drawn = np.random.default_rng((self.seed, 1, step)).random(len(images))
        return images, self.caption_of(images, drawn)

    def caption_of(self, images: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Of each image the caption at the place `drawn`, in [0, 1), among its own: indices into all captions."""
        return self.first_caption[images] + (drawn * self.counts[images]).astype(np.int64)
