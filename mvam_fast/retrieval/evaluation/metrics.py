"""Ranks of the right answers by inner product, and the recalls made of them; any number of captions per image."""
from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

DIRECTIONS = ("i2t", "t2i")  # image to text, text to image
SCORE_MEMORY = 256 * 2**20  # bytes for a block of scores and what is computed of it, beside the features
_BYTES_PER_SCORE = 10  # a float32, its comparison, the int32 that it is counted as


def retrieval_ranks(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, *, block: int | None = None
) -> dict[str, Tensor]:
    """The rank (1 is best) of the right answer to each query: images [I,F] and captions [T,F] by inner product.

    Text to image: the rank of the caption's one image. Image to text: the best rank among the image's own captions,
    its others not counting against it. A tie counts against the query: rank = 1 + wrong items that score at least as
    high, so a model that gives everything the same score gets the last rank, not the first.

    Args:
        image_of_text: [T] integers, each caption's image; every image must have one.
        block: queries at a time. By default as many as need about SCORE_MEMORY bytes; the whole score matrix is never
            held. Features that are not float32 are converted first, which takes a float32 copy of them.

    Returns:
        "i2t" [I] and "t2i" [T], int64 on the features' device; "i2t_ties" [I] and "t2i_ties" [T], how many wrong items
        score exactly as high as the right one. rank − ties is the rank if ties counted for the query.
    """
    images, texts = len(image_features), len(text_features)
    _check(image_features, text_features, image_of_text)
    image_features, text_features = image_features.float(), text_features.float()
    image_of_text = image_of_text.to(image_features.device)
    pieces: dict[str, list[Tensor]] = {"i2t": [], "i2t_ties": [], "t2i": [], "t2i_ties": []}
    for start, stop in query_blocks(images, block or _queries(texts)):
        scores = image_features[start:stop] @ text_features.T
        for name, piece in zip(("i2t", "i2t_ties"), image_ranks(scores, image_of_text - start), strict=True):
            pieces[name].append(piece)
    for start, stop in query_blocks(texts, block or _queries(images)):
        scores = text_features[start:stop] @ image_features.T
        for name, piece in zip(("t2i", "t2i_ties"), text_ranks(scores, image_of_text[start:stop]), strict=True):
            pieces[name].append(piece)
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def image_ranks(scores: Tensor, row_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks and ties [b] of b images from their scores [b,T] with all captions. `row_of_text` [T]: the row of each
    caption's image; captions of images that are not among the b have a number outside of 0 to b − 1."""
    own = ((row_of_text >= 0) & (row_of_text < len(scores))).nonzero().flatten()
    row = row_of_text[own]
    score = scores[row, own]
    best = scores.new_full((len(scores),), -math.inf).scatter_reduce(0, row, score, "amax")
    above, equal = _above_and_equal(scores, best)
    equal -= torch.zeros_like(equal).scatter_add(0, row, (score == best[row]).long())
    return 1 + above + equal, equal


def text_ranks(scores: Tensor, image_of_row: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks and ties [b] of b captions from their scores [b,I] with all images. `image_of_row` [b]: the right ones."""
    above, equal = _above_and_equal(scores, scores.gather(1, image_of_row[:, None]).flatten())
    return above + equal, equal - 1  # the right image is one of the equal


def _above_and_equal(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """How many scores [b,C] are above the right one's [b], and how many are equal to it."""
    above = (scores > right[:, None]).sum(1, dtype=torch.int32).long()
    return above, (scores >= right[:, None]).sum(1, dtype=torch.int32).long() - above


def metrics_of_ranks(ranks: dict[str, Tensor], ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Of what `retrieval_ranks` found: i2t_r{k} and t2i_r{k} (recall at k, percent), rsum (their sum),
    {i2t,t2i}_median_rank, {i2t,t2i}_mean_rank, {i2t,t2i}_tied_queries (whose rank would be better if ties counted for
    the query), rsum_if_ties_count_for, images, captions."""
    found: dict[str, float] = {}
    optimistic = 0.0
    for direction in DIRECTIONS:
        rank, ties = ranks[direction], ranks[f"{direction}_ties"]
        for k in ks:
            found[f"{direction}_r{k}"] = _percent(rank <= k)
            optimistic += _percent(rank - ties <= k)
    found["rsum"] = sum(found.values())
    for direction in DIRECTIONS:
        rank = ranks[direction].double()
        found[f"{direction}_median_rank"] = rank.quantile(0.5).item()
        found[f"{direction}_mean_rank"] = rank.mean().item()
    for direction in DIRECTIONS:
        found[f"{direction}_tied_queries"] = int((ranks[f"{direction}_ties"] > 0).sum())
    found["rsum_if_ties_count_for"] = optimistic
    return found | {"images": len(ranks["i2t"]), "captions": len(ranks["t2i"])}


def recall_metrics(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor,
    *,
    ks: tuple[int, ...] = (1, 5, 10),
    block: int | None = None,
) -> dict[str, float]:
    """`metrics_of_ranks` of `retrieval_ranks`, with the arguments of both."""
    return metrics_of_ranks(retrieval_ranks(image_features, text_features, image_of_text, block=block), ks)


def query_blocks(queries: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of at most `size` queries, as equal as can be: a matrix product of few rows may add in
    another order than one of many, and equal vectors should have equal scores."""
    count = max(1, math.ceil(queries / size))
    for index in range(count):
        yield index * queries // count, (index + 1) * queries // count


def top_k(queries: Tensor, corpus: Tensor, k: int, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Scores and indices [Q,k] of each query's k best items of the corpus [C,F], blockwise over queries [Q,F]."""
    k = min(k, len(corpus))
    found = [(queries[i : i + block] @ corpus.T).topk(k, dim=1) for i in range(0, len(queries), block)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _queries(candidates: int) -> int:
    return max(1, SCORE_MEMORY // (_BYTES_PER_SCORE * candidates))


def _percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def _check(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> None:
    images, texts = len(image_features), len(text_features)
    if image_features.ndim != 2 or image_features.shape[1:] != text_features.shape[1:]:
        raise ValueError(
            f"image_features has shape {tuple(image_features.shape)} and text_features {tuple(text_features.shape)}; "
            "they must be [I,F] and [T,F]"
        )
    if image_of_text.shape != (texts,):
        raise ValueError(f"image_of_text has shape {tuple(image_of_text.shape)}; it must be [T] = [{texts}]")
    named = image_of_text.unique()
    if len(named) and not 0 <= int(named[0]) <= int(named[-1]) < images:
        raise ValueError(f"image_of_text goes from {named[0]} to {named[-1]}; it must lie in 0 to {images - 1}")
    if images == 0 or len(named) != images:
        raise ValueError(f"image_of_text names {len(named)} images of {images}; each needs a caption")
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        rows = max(1, SCORE_MEMORY // (8 * max(1, features.shape[1])))  # isfinite makes copies
        bad = sum(int((~part.isfinite()).any(1).sum()) for part in features.split(rows))
        if bad:
            raise ValueError(f"{name} holds NaN or infinite values in {bad} of {len(features)} rows")
