"""Features of every image and caption of a data set."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._optional import require
from ..data.image_store import ImageStore
from ..data.images import UnreadableImage


class Embedded(NamedTuple):
    images: Tensor  # [I,F] float32, L2-normalised, on the CPU
    texts: Tensor  # [T,F], likewise
    image_of_text: Tensor  # [T] int64, rows of `images`
    readable: list[int]  # [I], which of the data set's images they are


def embed_dataset(
    model: nn.Module, store: ImageStore, tokenizer, *, batch_size: int = 256, progress: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """L2-normalised float32 features on the CPU: images [I,F], captions [T,F], and each caption's image [T].

    Images that the store skips as unreadable are left out with their captions; `store.unreadable` tells. A caption that
    occurs more than once is embedded once, so that its copies have the very same features and tie.
    """
    return embed(model, store, tokenizer, batch_size=batch_size, progress=progress)[:3]


def embed(
    model: nn.Module, store: ImageStore, tokenizer, *, batch_size: int = 256, progress: bool = True
) -> Embedded:
    """`embed_dataset`, which also tells which images were readable."""
    images, readable = embed_images(model, store, batch_size=batch_size, progress=progress)
    of_image = [store.dataset.captions[index] for index in readable]
    captions = [caption for captions in of_image for caption in captions]
    texts = embed_texts(model, captions, tokenizer, batch_size=batch_size, progress=progress)
    owner = [row for row, captions in enumerate(of_image) for _ in captions]
    return Embedded(images, texts, torch.tensor(owner), readable)


def embed_images(
    model: nn.Module, store: ImageStore, *, batch_size: int = 256, progress: bool = True
) -> tuple[Tensor, list[int]]:
    """`embed` of the images alone: features [I,F], and which of the data set's images they are."""
    count, images, readable = len(store.dataset), None, []
    with _ready(model) as device:
        for part in batched(count, batch_size, "images", progress):
            try:
                batch, kept = store.load(part)
            except UnreadableImage:
                if store.strict:
                    raise
                continue  # every image of the batch, which are counted in store.unreadable
            features = F.normalize(model.encode_image(store.normalize(batch.to(device))).float(), dim=-1)
            if images is None:
                images = torch.empty(count, features.shape[1])
            images[len(readable) : len(readable) + len(kept)] = features.cpu()
            readable += [part[position] for position in kept]
    if images is None:
        name, reason = next(iter(store.unreadable.items()))
        raise UnreadableImage(f"images: none of {count} could be read; of {name}: {reason}")
    return images[: len(readable)], readable


def embed_texts(
    model: nn.Module, captions: Sequence[str], tokenizer, *, batch_size: int = 256, progress: bool = True
) -> Tensor:
    """`embed` of captions alone: features [T,F], those of equal captions the very same."""
    first_row: dict[str, int] = {}
    for row, caption in enumerate(captions):
        first_row.setdefault(caption, row)
    rows, texts = list(first_row.values()), None
    with _ready(model) as device:
        for part in batched(len(rows), batch_size, "captions", progress):
            chosen = rows[part.start : part.stop]
            token_ids = tokenizer([captions[row] for row in chosen])
            features = F.normalize(model.encode_text(token_ids.to(device)).float(), dim=-1)
            if texts is None:
                texts = torch.empty(len(captions), features.shape[1])
            texts[chosen] = features.cpu()
    copies = [row for row, caption in enumerate(captions) if first_row[caption] != row]
    texts[copies] = texts[[first_row[captions[row]] for row in copies]]
    return texts


@contextmanager
def _ready(model: nn.Module) -> Iterator[torch.device]:
    """The model's device, while it is in evaluation mode and keeps no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def batched(count: int, size: int, what: str, progress: bool) -> Iterator[range]:
    """0 to `count` in ranges of at most `size`, with a progress bar that says `what` they are."""
    if size < 1:
        raise ValueError(f"batch_size is {size}; it must be at least 1")
    tqdm = require("tqdm", extra="train").tqdm
    for start in tqdm(range(0, count, size), desc=what, disable=not progress, leave=False):
        yield range(start, min(start + size, count))
