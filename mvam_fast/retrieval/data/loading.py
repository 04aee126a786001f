"""Batches for training: decoded, augmented and tokenised, each a function of the seed and the step alone."""
from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .batches import PairBatches
from .captioned import CaptionedImages
from .image_store import CutPreprocess
from .images import UnreadableImage
from .parts import Part, PartLoader
from .tokens import TokenTable, count_truncated

__all__ = ["Batch", "TrainBatches", "count_truncated"]


class Batch(NamedTuple):
    """One process' part of the global batch of a step.

    Fields:
        step: counted from 1.
        images: uint8 [b,3,H,W].
        token_ids: int64 [b,L].
        image_indices: int64 [b], into the data set.
    """

    step: int
    images: Tensor
    token_ids: Tensor
    image_indices: Tensor


class TrainBatches:
    """Iterating yields the `Batch` of each step from start_step + 1 to stop_step, and begins there every time.

    What a step holds is a function of (seed, step): neither the number of processes or workers nor where a run was
    resumed changes a pixel or a caption. Random steps of `preprocess` are seeded by seed, step and place in the global
    batch, whichever of torch's (CPU), Python's and NumPy's global generators they draw from.

    An unreadable image is replaced, so that every process keeps its full part. The image at place p of the global batch
    gives way to one drawn among every batch_size-th of the images outside the batch, beginning with the p-th: no two
    places can choose the same. `siblings` are not kept together there. If no such image exists or none can be read,
    UnreadableImage is raised; so it always is for a batch that holds the whole data set.

    Args:
        dataset: a data set as `open_dataset` makes them.
        preprocess: a torchvision Compose that ends in ToTensor, Normalize; these two are `normalize`.
        tokenizer: strings to token ids [T,L].
        batch_size: images of the global batch; world_size must divide it.
        siblings: images of one family that stand in a batch together; see `PairBatches`.
        start_step: the last step that was done, 0 at first.
        rank, world_size: of b = batch_size / world_size places, this process takes those from rank·b on.
        workers: processes that prepare batches ahead, two each; 0 does everything in this process, when asked for. They
            are started afresh rather than forked, which a process that uses CUDA or threads does not survive: a script
            that trains needs its `if __name__ == "__main__"`.
        cache: keep every decoded image in memory (uint8); only without workers and without random steps.
        strict: raise UnreadableImage instead of replacing.

    Attributes:
        unreadable: name of each unreadable image met so far → reason, also from workers.
        truncated: captions that were cut to the tokenizer's context (of the drawn ones, beyond a million captions).
        steps_per_epoch: steps until every image was seen once, but for a rest that fills no batch.
    """

    def __init__(
        self,
        dataset: CaptionedImages,
        preprocess,
        tokenizer,
        batch_size: int,
        *,
        seed: int = 0,
        siblings: int = 1,
        start_step: int = 0,
        stop_step: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        cache: bool = False,
        strict: bool = False,
    ):
        if world_size < 1 or batch_size % world_size:
            raise ValueError(
                f"world_size is {world_size}; it must be at least 1 and divide batch_size, {batch_size}: every process "
                "takes an equal part of each batch"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be 0 to {world_size - 1}, below world_size")
        if not 0 <= start_step <= stop_step:
            raise ValueError(f"start_step is {start_step}; it must be 0 to {stop_step}, which is stop_step")
        if workers < 0:
            raise ValueError(f"workers is {workers}; it must be at least 0")
        if cache and workers:
            raise ValueError(
                f"cache is True and workers is {workers}; each worker would fill a cache of its own: choose one of them"
            )
        self.dataset, self.workers, self.steps = dataset, workers, range(start_step + 1, stop_step + 1)
        self._pairs = PairBatches(dataset, batch_size, seed=seed, siblings=siblings)
        self.steps_per_epoch = self._pairs.steps_per_epoch
        cut = CutPreprocess(preprocess, cache=cache)
        self.normalize = cut.normalize
        share = batch_size // world_size
        self._loader = PartLoader(dataset, cut, slice(rank * share, (rank + 1) * share), seed, strict, cache)
        self._tokens = TokenTable(tokenizer, [caption for captions in dataset.captions for caption in captions])
        self.unreadable: dict[str, str] = {}

    @property
    def truncated(self) -> int:
        return self._tokens.truncated

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        for part in self._parts():
            self.unreadable |= part.unreadable
            if part.error is not None:
                raise UnreadableImage(part.error)
            captions = part.captions.copy()
            replaced = ~np.isnan(part.drawn)
            captions[replaced] = self._pairs.caption_of(part.indices[replaced], part.drawn[replaced])
            yield Batch(part.step, part.images, self._tokens.rows(captions), torch.from_numpy(part.indices))

    def _parts(self) -> Iterator[Part]:
        plan = _Plan(self._pairs, self.steps)
        if not self.workers:
            return map(self._loader.__getitem__, plan)
        return iter(DataLoader(
            self._loader, batch_size=None, sampler=plan, num_workers=self.workers, collate_fn=_as_it_is,
            multiprocessing_context=self._start_method(), pin_memory=torch.cuda.is_initialized(),
            generator=torch.Generator(),  # else it draws from the global one, and workers would change the dropout
        ))  # fmt: skip

    def _start_method(self) -> str:
        if "forkserver" not in multiprocessing.get_all_start_methods():
            return "spawn"
        # What workers need is imported once, not once by each: that took seconds of processor time a worker.
        modules = {getattr(step, "__module__", __name__) for step in self._loader.cut.geometry}
        multiprocessing.set_forkserver_preload(["__main__", PartLoader.__module__, *sorted(modules)])
        return "forkserver"

    def describe(self, batch: Batch) -> list[str]:
        """For each image of the batch its name and id, for a report on what went wrong with it."""
        return [f"{self.dataset.image_name(i)} (id {self.dataset.image_ids[i]})" for i in batch.image_indices.tolist()]


class _Plan:
    """What each step is made of: (step, images [B], captions [B]), as indices of the global batch."""

    def __init__(self, pairs: PairBatches, steps: range):
        self.pairs, self.steps = pairs, steps

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        return ((step, *self.pairs.batch(step - 1)) for step in self.steps)


def _as_it_is(part: Part) -> Part:
    return part
