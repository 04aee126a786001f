"""Retrieval metrics by the field's protocol: recall at k both ways, RSUM, ranks; any number of captions per image."""
from __future__ import annotations

import torch
from torch import Tensor


def recall_metrics(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor,
    *,
    ks: tuple[int, ...] = (1, 5, 10),
    block: int = 1024,
) -> dict[str, float]:
    """Recall (percent) and ranks (1 is best) of images [I,F] and captions [T,F] by inner product.

    `image_of_text` [T] holds each caption's image. Text to image: the rank of the one right image. Image to text: the
    best rank among the image's own captions, its others not counting against it. A tie counts against the query:
    rank = 1 + wrong items that score at least as high, so a model that gives everything the same score gets 0, not 100.
    Blocks of `block` queries: the full score matrix is never held.

    Returns i2t_r{k}, t2i_r{k}, rsum (their sum), {i2t,t2i}_median_rank, {i2t,t2i}_mean_rank, images, captions.
    """
    images, texts = len(image_features), len(text_features)
    if image_of_text.shape != (texts,):
        raise ValueError(f"image_of_text has shape {tuple(image_of_text.shape)}; it must be [T] = [{texts}]")
    if images == 0 or len(image_of_text.unique()) != images:
        raise ValueError(f"image_of_text names {len(image_of_text.unique())} images of {images}; each needs a caption")
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not features.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values; they must be finite")
    image_features, text_features = image_features.float(), text_features.float()
    image_of_text = image_of_text.to(image_features.device)

    ranks = {"i2t": [], "t2i": []}
    every_image = torch.arange(images, device=image_features.device)
    for start in range(0, images, block):
        scores = image_features[start : start + block] @ text_features.T
        own = image_of_text == every_image[start : start + block, None]
        best = scores.masked_fill(~own, float("-inf")).amax(1, keepdim=True)
        ranks["i2t"].append(1 + ((scores >= best) & ~own).sum(1))
    for start in range(0, texts, block):
        scores = text_features[start : start + block] @ image_features.T
        target = image_of_text[start : start + block, None]
        wrong = every_image != target
        ranks["t2i"].append(1 + ((scores >= scores.gather(1, target)) & wrong).sum(1))

    found: dict[str, float] = {}
    for direction in ranks:
        rank = torch.cat(ranks[direction]).double()
        for k in ks:
            found[f"{direction}_r{k}"] = 100 * (rank <= k).double().mean().item()
    found["rsum"] = sum(found.values())
    for direction in ranks:
        rank = torch.cat(ranks[direction]).double()
        found[f"{direction}_median_rank"] = rank.quantile(0.5).item()
        found[f"{direction}_mean_rank"] = rank.mean().item()
    return found | {"images": images, "captions": texts}


def top_k(queries: Tensor, corpus: Tensor, k: int, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Scores and indices [Q,k] of each query's k best items of the corpus [C,F], blockwise over queries [Q,F]."""
    k = min(k, len(corpus))
    found = [(queries[i : i + block] @ corpus.T).topk(k, dim=1) for i in range(0, len(queries), block)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
