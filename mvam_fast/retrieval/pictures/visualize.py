"""Pictures of a model on a split: where its views look in captions and images, and what it retrieves."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import ImageStore, open_dataset
from ..evaluation.embedding import embed_images, embed_texts
from ..evaluation.metrics import top_k
from ..evaluation.models import load_model
from .geometry import patch_map, patch_size
from .measures import ranked
from .patch_overlay import check_grid, patch_overlay
from .retrieval_sheet import Found, Query, retrieval_sheet
from .word_grid import word_grid
from .words import words_and_attention


class _Sample(NamedTuple):
    """A query and the position of its image in the split; None for a text of the user's own."""

    text: str
    image: int | None


def visualize(
    folder: str | Path,
    data: str | Path,
    images: str | Path | None,
    out: str | Path,
    *,
    split: str = "test",
    baseline: str | Path | None = None,
    count: int = 4,
    seed: int = 0,
    ids: Sequence[str | int] = (),
    texts: Sequence[str] = (),
    k: int = 5,
    device: str = "auto",
    progress: bool = True,
) -> list[dict]:
    """Draws a sheet of what is retrieved for some queries, and for each the views' attention to words and patches.

    Args:
        folder: the model, as training or `save_pretrained` wrote it. It must have learned views and a grid of patches.
        data, images, split: the data set, as for `open_dataset`; its images are what is searched.
        out: pictures go to OUT/figures, as PNG.
        baseline: another model's folder, whose finds stand beside.
        count, seed: so many images of the split, drawn at random and not for their results, each with one caption.
        ids: more images, by their ids in the data set, each with a caption drawn likewise.
        texts: queries of your own. They have no true image; attention to patches is shown on the best image found.
        k: how many images are shown per query.

    Returns [{"file" (relative to OUT), "title", "caption"}], the sheet first.
    """
    out = Path(out)
    dataset = open_dataset(data, images, split)
    samples = _samples(dataset, count, seed, ids, texts)
    if not 1 <= k <= len(dataset):
        raise ValueError(f"k is {k}; it must be 1 to {len(dataset)}, the images of the split")
    loaded = {} if baseline is None else {"baseline": load_model(baseline, device)}
    loaded["MVAM"] = model, transform, tokenizer = load_model(folder, device)
    if model.num_views == 0:
        raise ValueError(f"model: {folder} has num_views = 0: without learned views there is no attention to draw")
    check_grid(model.image_tower)

    queries, best = _search(loaded, dataset, samples, k, progress)
    retrieval_sheet(queries, out / "figures/retrieval.png")
    figures = [{
        "file": "figures/retrieval.png", "title": f"Best {k} images for a caption",
        "caption": f"{' beside '.join(loaded)}. {_origin(count, ids, texts)} from the {split} split. "
        "Ticked, in a green frame: the image that the caption was written for.",
    }]  # fmt: skip
    for number, (sample, found) in enumerate(zip(samples, best, strict=True)):
        names = f"figures/words-{number}.png", f"figures/patches-{number}.png"
        _draw_words(model, tokenizer, sample.text, out / names[0])
        image = dataset.load_image(found if sample.image is None else sample.image)
        on = f"best image for “{sample.text}”" if sample.image is None else f"“{sample.text}”"
        _draw_patches(model, transform, image, out / names[1], on)
        figures += [
            {"file": names[0], "title": "What each view reads", "caption": f"“{sample.text}”"},
            {"file": names[1], "title": "Where each view looks", "caption": on[0].upper() + on[1:]},
        ]
    return figures


def _samples(dataset, count: int, seed: int, ids: Sequence, texts: Sequence[str]) -> list[_Sample]:
    if not 0 <= count <= len(dataset) or (count == 0 and not ids and not texts):
        least = 0 if ids or texts else 1
        raise ValueError(f"count is {count}; it must be {least} to {len(dataset)}, the images of the split")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(dataset), count, replace=False).tolist()
    places = {str(name): place for place, name in enumerate(dataset.image_ids)}
    for name in map(str, ids):
        if name not in places:
            known = ", ".join(list(places)[:3])
            raise ValueError(f"ids has {name}, which is no image of the split {dataset.split!r}; it has {known}, ...")
        chosen.append(places[name])
    drawn = [_Sample(dataset.captions[i][int(rng.integers(len(dataset.captions[i])))], i) for i in chosen]
    blank = [text for text in texts if not text.strip()]
    if blank:
        raise ValueError(f"texts has {blank[0]!r}; a query must have a character")
    return drawn + [_Sample(text, None) for text in texts]


def _origin(count: int, ids: Sequence, texts: Sequence[str]) -> str:
    parts = ["captions drawn at random"] * bool(count) + ["images chosen by id"] * bool(ids)
    parts += ["queries of the user's own"] * bool(texts)
    sentence = ", ".join(parts)
    return sentence[0].upper() + sentence[1:]


def _search(loaded: dict, dataset, samples: list[_Sample], k: int, progress: bool) -> tuple[list[Query], list[int]]:
    """Every query with what each model finds, and the place of the last model's best image for it."""
    found: list[dict[str, Found]] = [{} for _ in samples]
    for name, (model, transform, tokenizer) in loaded.items():
        image_features, _ = embed_images(model, ImageStore(dataset, transform, strict=True), progress=progress)
        queries = embed_texts(model, [sample.text for sample in samples], tokenizer, progress=False)
        scores, places = top_k(queries, image_features, len(dataset))
        for number, sample in enumerate(samples):
            best = zip(places[number, :k].tolist(), scores[number, :k].tolist(), strict=True)
            shown = [(dataset.load_image(place), score, place == sample.image) for place, score in best]
            found[number][name] = Found(shown, _rank(scores[number], places[number], sample.image))
    rows = [
        Query(sample.text, None if sample.image is None else dataset.load_image(sample.image), by_model)
        for sample, by_model in zip(samples, found, strict=True)
    ]
    return rows, places[:, 0].tolist()


def _rank(scores: Tensor, places: Tensor, truth: int | None) -> int | None:
    """Where the true image stands among all, whose scores and places these are; ties count against it, as in the
    recall."""
    if truth is None:
        return None
    return int((scores >= scores[places == truth]).sum())


@torch.no_grad()
def _draw_words(model, tokenizer, text: str, path: Path) -> None:
    attention = model.text_attention(tokenizer([text]).to(_device(model)))[0].cpu()
    word_grid(words_and_attention(tokenizer, text, attention), ranked(attention), path, f"“{text}”")


@torch.no_grad()
def _draw_patches(model, transform, image, path: Path, title: str) -> None:
    tower = model.image_tower
    attention = model.image_attention(transform(image)[None].to(_device(model)))[0].cpu()
    patches = patch_map(transform, image.size, tower.grid, patch_size(tower))
    patch_overlay(image, attention, tower.prefix_tokens, patches, ranked(attention), path, title)


def _device(model) -> torch.device:
    return next(model.parameters()).device
