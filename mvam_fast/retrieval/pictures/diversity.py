"""How much the views of a model differ on a whole split, and which of them are dead."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...version import __version__
from ..data.datasets import ImageStore, UnreadableImage, open_dataset
from ..evaluation.embedding import batched
from ..evaluation.models import load_model
from .diversity_report import write_report
from .measures import entropy_share, mean_to_others, view_cosine
from .patch_overlay import prefix_name
from .words import vocabulary_of

UNIFORM = CONSTANT = DUPLICATE = 0.99
DEFINITIONS = {
    "entropy": "of a view's attention, as a share of ln(tokens that take part); mean over the split, ± its standard "
    "deviation there: 0 is all on one token, 1 the same on all",
    "cosine": "between the attentions of two views to one image or text; mean over the split",
    "constancy": "|mean attention|² / mean |attention|² over the split, by position from the start or from the end, "
    "whichever is more: 1 is the same at every position for every image or text",
    "share": "of a view's attention that falls on tokens which are neither patches nor words; mean over the split",
    "gate": "how far a view is let in beside the global view, where the model has one",
    "dead": f"a view that is uniform (entropy above {UNIFORM}), constant (constancy above {CONSTANT}: it depends on "
    f"position alone) or duplicates a view of a lower number (cosine above {DUPLICATE})",
}


class ViewStatistics:
    """What a tower's views have in common and how they differ, summed up batch by batch, in float64.

    Holds a few numbers per view and position, however many batches there are. Batches may differ in their number of
    positions.
    """

    def __init__(self, views: int):
        self.samples = 0
        self.cosine = torch.zeros(views, views, dtype=torch.float64)
        self.entropy, self.entropy_squared, self.squared = torch.zeros(3, views, dtype=torch.float64)
        self.by_position = {"start": self.cosine.new_zeros(views, 0), "end": self.cosine.new_zeros(views, 0)}
        self.shares: dict[str, Tensor] = {}

    def update(self, attention: Tensor, special: dict[str, Tensor]) -> None:
        """Adds attention [B,M,N]; rows sum to 1, masked positions are exactly 0. `special`: by name the positions [B,N]
        (bool) whose share of the attention is to be told."""
        attention = attention.double().cpu()
        self.samples += len(attention)
        self.cosine += view_cosine(attention).sum(0)
        entropy = entropy_share(attention)
        self.entropy += entropy.sum(0)
        self.entropy_squared += entropy.square().sum(0)
        self.squared += attention.square().sum((0, 2))
        for side, aligned in (("start", attention), ("end", _from_the_end(attention))):
            self.by_position[side] = _added(self.by_position[side], aligned.sum(0))
        for name, where in special.items():
            share = (attention * where[:, None]).sum((0, 2))
            self.shares[name] = self.shares.get(name, 0) + share

    def result(self, gates: Tensor | None = None) -> dict:
        """Everything as numbers that JSON can hold. `gates` [M]: of the views, where there are any."""
        if self.samples == 0:
            raise ValueError("samples is 0; update must have been given attention before")
        n, views = self.samples, len(self.cosine)
        cosine, entropy = self.cosine / n, self.entropy / n
        spread = (self.entropy_squared / n - entropy.square()).clamp_min(0).sqrt()
        means = [total.square().sum(1) / n**2 for total in self.by_position.values()]
        constancy = torch.maximum(*means) / (self.squared / n)
        overlap = mean_to_others(cosine).tolist() if views > 1 else [None]
        gates = [None] * views if gates is None else gates.detach().cpu().tolist()
        attended = (self.by_position["start"] > 0).any(0)
        dead = dead_views(entropy, constancy if n > 1 else torch.zeros_like(constancy), cosine)
        rows = [
            {
                "view": view + 1, "entropy": entropy[view].item(), "entropy_spread": spread[view].item(),
                "cosine_to_others": overlap[view], "constancy": constancy[view].item() if n > 1 else None,
                "share": {name: (total[view] / n).item() for name, total in self.shares.items()},
                "gate": gates[view], "dead": dead[view],
            }
            for view in range(views)
        ]  # fmt: skip
        return {
            "samples": n, "tokens": int(attended.nonzero().max()) + 1 if attended.any() else 0, "views": rows,
            "mean_entropy": entropy.mean().item(),
            "mean_cosine": sum(overlap) / views if views > 1 else None,
            "cosine": cosine.tolist(),
            "dead": [view + 1 for view in range(views) if dead[view]],
        }  # fmt: skip


def dead_views(entropy: Tensor, constancy: Tensor, cosine: Tensor) -> list[list[str]]:
    """For each view the reasons why it is dead, none for one that lives: of entropy [M], constancy [M] and cosine
    [M,M], as `DEFINITIONS` says."""
    reasons: list[list[str]] = [[] for _ in entropy]
    for view, found in enumerate(reasons):
        if entropy[view] > UNIFORM:
            found.append("uniform")
        if constancy[view] > CONSTANT:
            found.append("constant")
        found += [f"duplicates view {other + 1}" for other in range(view) if cosine[view, other] > DUPLICATE]
    return reasons


def _from_the_end(attention: Tensor) -> Tensor:
    """Attention [B,M,N] with the last position that takes part first, the one before it second, and so on."""
    batch, _, positions = attention.shape
    taking_part = (attention > 0).any(1) * torch.arange(1, positions + 1)
    places = taking_part.amax(1)[:, None] - 1 - torch.arange(positions)
    reversed_ = attention.gather(2, places.clamp_min(0)[:, None].expand_as(attention))
    return reversed_ * (places >= 0).view(batch, 1, positions)


def _added(total: Tensor, more: Tensor) -> Tensor:
    """Sums [M,N] of perhaps different N."""
    longest = max(total.shape[1], more.shape[1])
    total, more = (torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in (total, more))
    return total + more


def diversity(
    folder: str | Path,
    data: str | Path,
    images: str | Path | None,
    out: str | Path,
    *,
    split: str = "val",
    batch_size: int = 64,
    device: str = "auto",
    strict: bool = True,
    progress: bool = True,
) -> dict:
    """Measures the views of both towers on all images and captions of a split.

    Writes OUT/diversity.json (what is returned), OUT/diversity.png and OUT/diversity.html, which needs neither of them.
    The data are those of `open_dataset`. `strict`: an unreadable image is an error; otherwise it is left out and
    counted, but not its captions.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    dataset = open_dataset(data, images, split)
    model, transform, tokenizer = load_model(folder, device)
    if model.num_views == 0:
        raise ValueError(f"model: {folder} has num_views = 0: it has no learned views to compare")
    store = ImageStore(dataset, transform, strict=strict)
    parts = {"image": _image_attention(model, store, batch_size, progress),
             "text": _text_attention(model, tokenizer, dataset, batch_size, progress)}  # fmt: skip
    towers = {}
    for name, batches in parts.items():
        towers[name] = _measured(batches, model.num_views, getattr(model, f"{name}_gates"))
    towers["text"]["special_tokens_known"] = vocabulary_of(tokenizer) is not None
    report = {
        "model": str(folder), "data": Path(data).name, "split": split, "unreadable_images": len(store.unreadable),
        "mvam_fast": __version__, "definitions": DEFINITIONS, "towers": towers,
    }  # fmt: skip
    return write_report(report, Path(out))


def _measured(batches: Iterable[tuple[Tensor, dict]], views: int, gates: Tensor | None) -> dict:
    statistics = ViewStatistics(views)
    for attention, special in batches:
        statistics.update(attention, special)
    return statistics.result(gates)


@torch.no_grad()
def _image_attention(model, store: ImageStore, batch_size: int, progress: bool) -> Iterator[tuple[Tensor, dict]]:
    device, prefix = next(model.parameters()).device, model.image_tower.prefix_tokens
    for part in batched(len(store.dataset), batch_size, "images", progress):
        try:
            pixels, _ = store.load(part)
        except UnreadableImage:
            if store.strict or len(store.unreadable) == len(store.dataset):
                raise
            continue
        attention = model.image_attention(store.normalize(pixels.to(device)))
        before = torch.arange(attention.shape[2]).expand(len(attention), -1) < prefix
        yield attention, {prefix_name(prefix): before} if prefix else {}


@torch.no_grad()
def _text_attention(model, tokenizer, dataset, batch_size: int, progress: bool) -> Iterator[tuple[Tensor, dict]]:
    device, vocabulary = next(model.parameters()).device, vocabulary_of(tokenizer)
    captions = [caption for found in dataset.captions for caption in found]
    for part in batched(len(captions), batch_size, "captions", progress):
        token_ids = tokenizer([captions[number] for number in part])
        kinds = [] if vocabulary is None else [vocabulary.kinds(ids) for ids in token_ids.tolist()]
        names = sorted({kind for row in kinds for kind in row if kind is not None}, reverse=True)  # start, ..., end
        special = {name: torch.tensor([[kind == name for kind in row] for row in kinds]) for name in names}
        yield model.text_attention(token_ids.to(device)), special
