"""Image-caption data in Karpathy's format (COCO, Flickr30K, scenes), and batches of it for training."""
from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._optional import require
from ..files import read_json


class UnreadableImage(ValueError):
    """An image file that is missing or cannot be decoded."""


def read_image(path: str | Path):
    """The image as RGB (PIL); UnreadableImage names the file and the reason."""
    image = require("PIL.Image", extra="train")
    try:
        with image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(f"cannot read the image {path}: {error}") from error


class KarpathyDataset:
    """One split of a `dataset_*.json` in Karpathy's format.

    Args:
        json_path: dataset_coco.json, dataset_flickr30k.json, or what `mvam-fast scenes` wrote.
        image_root: the images' folder: IMAGE_ROOT/filepath/filename (COCO, scenes) or IMAGE_ROOT/filename (Flickr30K).
        split: "train", "val" or "test". "train" takes "restval" too, as the literature does on COCO.
        captions_per_image: keep the first this many; 5 is the protocol of COCO 5K (25,010 captions become 25,000).

    Attributes:
        image_ids, image_paths: one per image; captions: a list of strings per image; families: the scenes' groups of
        near-duplicates, or None.
    """

    def __init__(
        self, json_path: str | Path, image_root: str | Path, split: str, *, captions_per_image: int | None = None
    ):
        self.json_path, self.split = Path(json_path), split
        root = Path(image_root)
        if not root.is_dir():
            raise FileNotFoundError(f"image_root: no such folder: {root}")
        if captions_per_image is not None and captions_per_image < 1:
            raise ValueError(f"captions_per_image is {captions_per_image}; it must be at least 1, or None for all")
        content = read_json(json_path, "json_path")
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise ValueError(f"json_path: {json_path} has no list 'images'; it must be in Karpathy's format")
        wanted = ("train", "restval") if split == "train" else (split,)
        rows = [row for row in content["images"] if row["split"] in wanted]
        if not rows:
            present = ", ".join(f"{name} ({n})" for name, n in Counter(r["split"] for r in content["images"]).items())
            raise ValueError(f"split is {split!r}; {json_path} has {present or 'no images'}")
        self.captions = [[s["raw"].strip() for s in row["sentences"]][:captions_per_image] for row in rows]
        bare = next((row for row, captions in zip(rows, self.captions, strict=True) if not captions), None)
        if bare is not None:
            raise ValueError(f"json_path: {json_path} has no sentence for the image {bare['filename']}")
        self.image_paths = [root / row.get("filepath", "") / row["filename"] for row in rows]
        self.image_ids = [row.get("cocoid", row.get("imgid", index)) for index, row in enumerate(rows)]
        self.families = [row["family"] for row in rows] if all("family" in row for row in rows) else None

    def __len__(self) -> int:
        return len(self.image_paths)

    def load_image(self, index: int):
        """The image as RGB (PIL)."""
        return read_image(self.image_paths[index])


class PairBatches:
    """An endless stream of batches: distinct images, one caption drawn for each. A function of (seed, step) alone.

    Every epoch is a permutation; what does not fill a batch at its end is left out. Since no state is kept, a run that
    resumes at step k asks for batch k and has what an uninterrupted run had.

    Args:
        siblings: that many images of one family stand in a batch together, as near-duplicates of each other: hard
            negatives. 1 ignores families.
    """

    def __init__(self, dataset: KarpathyDataset, batch_size: int, *, seed: int = 0, siblings: int = 1):
        if siblings > 1 and dataset.families is None:
            raise ValueError(f"siblings is {siblings}, but {dataset.json_path} has no families; it must be 1")
        if siblings < 1 or batch_size % siblings:
            raise ValueError(f"siblings is {siblings}; it must be at least 1 and divide the batch size {batch_size}")
        if not 1 <= batch_size <= len(dataset):
            raise ValueError(f"batch_size is {batch_size}; it must be 1 to {len(dataset)}, the images of the split")
        self.batch_size, self.seed, self.siblings = batch_size, seed, siblings
        self.counts = np.array([len(captions) for captions in dataset.captions])
        self.first_caption = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        families = np.arange(len(dataset)) if siblings == 1 else np.asarray(dataset.families)
        _, group = np.unique(families, return_inverse=True)
        self.members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
        self.steps_per_epoch = len(self._epoch(0)) // batch_size

    def _epoch(self, epoch: int) -> np.ndarray:
        """All images in the order of this epoch, families cut into groups of `siblings`."""
        rng = np.random.default_rng((self.seed, epoch))
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
        return images, self.first_caption[images] + (drawn * self.counts[images]).astype(np.int64)


class ImageStore:
    """Images of a dataset as uint8 tensors, after the geometric half of a CLIP preprocess.

    A preprocess is cut before its ToTensor: what comes before (resize, crop) runs once per image on the CPU and may be
    kept in memory; ToTensor and Normalize are a few operations on the whole batch, on the model's device. The result is
    the same float for float.

    Args:
        preprocess: a torchvision Compose that ends in ToTensor, Normalize, as open_clip makes them.
        cache: keep every decoded image in memory (uint8). Only for a preprocess without randomness.
        strict: raise at an unreadable image instead of skipping it; those skipped are in `unreadable`.
        workers: threads that decode.
    """

    def __init__(self, dataset: KarpathyDataset, preprocess, *, cache=False, strict=False, workers: int = 0):
        steps = list(getattr(preprocess, "transforms", []))
        names = [type(step).__name__ for step in steps]
        if names[-2:] not in (["ToTensor", "Normalize"], ["MaybeToTensor", "Normalize"]):
            raise ValueError(f"preprocess has the steps {names}; it must end in ToTensor, Normalize")
        if cache and any("Random" in name or "Jitter" in name for name in names):
            raise ValueError(f"cache is True, but preprocess is random ({names}); a cache would freeze it")
        self.dataset, self.geometry, self.strict = dataset, steps[:-2], strict
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (steps[-1].mean, steps[-1].std))
        self.unreadable: dict[str, str] = {}
        self._cache: dict[int, Tensor] | None = {} if cache else None
        self._pool = ThreadPoolExecutor(workers) if workers else None

    def load(self, indices) -> tuple[Tensor, list[int]]:
        """uint8 [b,3,H,W] and which positions of `indices` they are: all, less the unreadable ones."""
        images = list((self._pool.map if self._pool else map)(self._load_one, [int(i) for i in indices]))
        kept = [position for position, image in enumerate(images) if image is not None]
        if not kept:
            raise UnreadableImage(f"none of {len(images)} images could be read, first: {self.unreadable}")
        return torch.stack([images[position] for position in kept]), kept

    def _load_one(self, index: int) -> Tensor | None:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        path = self.dataset.image_paths[index]
        if str(path) in self.unreadable:
            return None
        try:
            image = self.dataset.load_image(index)
        except UnreadableImage as error:
            if self.strict:
                raise
            self.unreadable[str(path)] = str(error)
            return None
        for step in self.geometry:
            image = step(image)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if self._cache is not None:
            self._cache[index] = tensor
        return tensor

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 → the floats of the whole preprocess, on the images' device."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return images.float().div_(255).sub_(mean).div_(std)
