"""Images as uint8 tensors: a CLIP preprocess cut in two, and a store for evaluation."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .captioned import CaptionedImages
from .images import UnreadableImage


class CutPreprocess:
    """A preprocess cut before its ToTensor.

    What comes before (resize, crop) runs once per image on the CPU and leaves uint8; ToTensor and Normalize are a few
    operations on the whole batch, on the model's device. The result is the same float for float.

    Args:
        preprocess: a torchvision Compose that ends in ToTensor, Normalize, as open_clip makes them.
        cache: whether the caller keeps what `pixels` returns. Refused for a preprocess with randomness.
    """

    def __init__(self, preprocess, *, cache: bool = False):
        steps = list(getattr(preprocess, "transforms", []))
        names = [type(step).__name__ for step in steps]
        if names[-2:] not in (["ToTensor", "Normalize"], ["MaybeToTensor", "Normalize"]):
            raise ValueError(f"preprocess has the steps {names}; it must end in ToTensor, Normalize")
        if cache and any("Random" in name or "Jitter" in name for name in names):
            raise ValueError(f"cache is True, but preprocess is random ({names}); a cache would freeze it")
        self.geometry = steps[:-2]
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (steps[-1].mean, steps[-1].std))

    def pixels(self, image) -> Tensor:
        """A PIL image after the geometric half, uint8 [3,H,W]."""
        for step in self.geometry:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 → the floats of the whole preprocess, on the images' device."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return images.float().div_(255).sub_(mean).div_(std)


class ImageStore:
    """Images of a data set as uint8 tensors, after the geometric half of a CLIP preprocess; see `CutPreprocess`.

    Args:
        preprocess: a torchvision Compose that ends in ToTensor, Normalize, as open_clip makes them.
        cache: keep every decoded image in memory (uint8). Only for a preprocess without randomness.
        strict: raise at an unreadable image instead of skipping it; those skipped are in `unreadable`.
        workers: threads that decode, each time that something is loaded; with 0 the caller's own does.
    """

    def __init__(self, dataset: CaptionedImages, preprocess, *, cache=False, strict=False, workers: int = 0):
        if workers < 0:
            raise ValueError(f"workers is {workers}; it must be at least 0")
        self.dataset, self.strict, self.workers = dataset, strict, workers
        self._preprocess = CutPreprocess(preprocess, cache=cache)
        self.unreadable: dict[str, str] = {}
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def load(self, indices) -> tuple[Tensor, list[int]]:
        """uint8 [b,3,H,W] and which positions of `indices` they are: all, less the unreadable ones."""
        numbers = [int(index) for index in indices]
        if self.workers:  # threads of this call alone: starting them costs little beside a batch of images
            with ThreadPoolExecutor(self.workers) as pool:
                images = list(pool.map(self._load_one, numbers))
        else:
            images = [self._load_one(number) for number in numbers]
        kept = [position for position, image in enumerate(images) if image is not None]
        if not kept:
            raise UnreadableImage(f"none of {len(images)} images could be read, first: {self.unreadable}")
        return torch.stack([images[position] for position in kept]), kept

    def _load_one(self, index: int) -> Tensor | None:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        name = self.dataset.image_name(index)
        if name in self.unreadable:
            return None
        try:
            tensor = self._preprocess.pixels(self.dataset.load_image(index))
        except UnreadableImage as error:
            if self.strict:
                raise
            self.unreadable[name] = str(error)
            return None
        if self._cache is not None:
            self._cache[index] = tensor
        return tensor

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 → the floats of the whole preprocess, on the images' device."""
        return self._preprocess.normalize(images)
