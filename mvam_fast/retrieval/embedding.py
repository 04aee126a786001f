"""Features of every image and caption of a data set."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._optional import require
from .image_store import ImageStore
from .images import UnreadableImage


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


@torch.no_grad()
def embed(
    model: nn.Module, store: ImageStore, tokenizer, *, batch_size: int = 256, progress: bool = True
) -> Embedded:
    """`embed_dataset`, which also tells which images were readable."""
    tqdm = require("tqdm", extra="train").tqdm
    dataset, device = store.dataset, next(model.parameters()).device
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    was_training = model.training
    model.eval()
    images, readable = None, []
    for start in tqdm(range(0, len(dataset), batch_size), desc="images", disable=not progress, leave=False):
        try:
            batch, kept = store.load(range(start, min(start + batch_size, len(dataset))))
        except UnreadableImage:
            if store.strict:
                raise
            continue  # every image of the batch, which are counted in store.unreadable
        features = F.normalize(model.encode_image(store.normalize(batch.to(device))).float(), dim=-1)
        if images is None:
            images = torch.empty(len(dataset), features.shape[1])
        images[len(readable) : len(readable) + len(kept)] = features.cpu()
        readable += [start + position for position in kept]
    if images is None:
        name, reason = next(iter(store.unreadable.items()))
        raise UnreadableImage(f"images: none of {len(dataset)} could be read; of {name}: {reason}")
    captions = [caption for index in readable for caption in dataset.captions[index]]
    owner = [row for row, index in enumerate(readable) for _ in dataset.captions[index]]
    first_row: dict[str, int] = {}
    for row, caption in enumerate(captions):
        first_row.setdefault(caption, row)
    rows = list(first_row.values())
    texts = images.new_empty(len(captions), images.shape[1])
    for start in tqdm(range(0, len(rows), batch_size), desc="captions", disable=not progress, leave=False):
        chosen = rows[start : start + batch_size]
        features = model.encode_text(tokenizer([captions[row] for row in chosen]).to(device))
        texts[chosen] = F.normalize(features.float(), dim=-1).cpu()
    copies = [row for row, caption in enumerate(captions) if first_row[caption] != row]
    texts[copies] = texts[[first_row[captions[row]] for row in copies]]
    model.train(was_training)
    return Embedded(images[: len(readable)], texts, torch.tensor(owner), readable)
