"""Pictures: what the views attend to, what is retrieved, and how training went."""
from __future__ import annotations

import math
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._optional import require
from ..files import atomic
from .datasets import ImageStore, KarpathyDataset
from .evaluate import embed_dataset, load_model
from .metrics import top_k

RIGHT, BAR = "#0072b2", "#e69f00"  # blue and orange that colour-blind readers can tell apart


def words_and_attention(tokenizer, caption: str, attention: Tensor) -> tuple[list[str], Tensor]:
    """A caption's words and each view's attention to them [M,W], from attention over token positions [M,L].

    Pieces of a word are merged and their attention added. Start and end of text take part, as entries of their own.
    """
    ids = tokenizer([caption])[0].tolist()
    words, columns = [], []
    fresh = True
    for position, token in enumerate(ids):
        piece = tokenizer.decoder[token]
        special = piece.startswith("<") and piece.endswith("text>")
        if special:
            words.append("⟨start⟩" if "start" in piece else "⟨end⟩")
        elif fresh:
            words.append(piece.removesuffix("</w>"))
        else:
            words[-1] += piece.removesuffix("</w>")
        columns.append(len(words) - 1)
        fresh = special or piece.endswith("</w>")
        if special and position > 0:
            break
    merged = attention.new_zeros(attention.shape[0], len(words))
    return words, merged.index_add(1, torch.tensor(columns), attention[:, : len(columns)])


def attention_figure(
    image, words: list[str], image_attention: Tensor, text_attention: Tensor, grid: tuple[int, int],
    prefix_tokens: int, path: Path, title: str,
) -> None:  # fmt: skip
    """One panel per view: the image lit where the view looks, and its attention to the words.

    image_attention [M,N] over `prefix_tokens` special tokens and then the patches of `grid` row by row; text_attention
    [M,W] over `words`. Light is relative to the view's brightest patch; the share of the special tokens is written.
    """
    views = len(image_attention)
    columns = 2 if views > 1 else 1
    rows = math.ceil(views / columns)
    height = max(1.9, 0.16 * len(words) + 0.4)
    figure = _figure(5.6 * columns, height * rows + 0.6)
    figure.suptitle("\n".join(textwrap.wrap(title, 56 * columns)), fontsize=11)
    axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.1] * columns)
    for axis in axes.flat:
        axis.set_axis_off()
    largest = float(text_attention.max())
    pixels = np.asarray(image.convert("RGB").resize((224, 224), require("PIL.Image", extra="train").BICUBIC)) / 255
    for view in range(views):
        picture, bars = axes[view // columns, 2 * (view % columns) :][:2]
        patches = image_attention[view, prefix_tokens:].reshape(1, 1, *grid)
        light = torch.nn.functional.interpolate(patches / patches.max(), size=pixels.shape[:2], mode="nearest")
        picture.imshow(pixels * (0.18 + 0.82 * light[0, 0].numpy()[..., None]))
        share = f", class token {100 * image_attention[view, :prefix_tokens].sum():.0f} %" if prefix_tokens else ""
        picture.set_title(f"view {view + 1}{share}", fontsize=9)
        bars.set_axis_on()
        bars.barh(range(len(words)), text_attention[view].numpy(), color=BAR, height=0.75)
        bars.set_yticks(range(len(words)), words, fontsize=8)
        bars.set_xlim(0, largest)
        bars.set_xticks([])
        bars.invert_yaxis()
        bars.spines[["top", "right", "bottom"]].set_visible(False)
        bars.tick_params(left=False)
    _save(figure, path)


def top5_figure(rows: list[dict], names: tuple[str, ...], path: Path) -> None:
    """Queries with the true image and each model's best five, right ones framed and ticked.

    Each row: {"caption", "truth": image, "found": per model a list of (image, score, is_right)}.
    """
    width = 1 + 5 * len(names)
    figure = _figure(1.05 * width + 0.3 * len(names), 1.62 * len(rows) + 0.2)
    # A thin empty column before each model.
    ratios = [1] + ([0.25] + [1] * 5) * len(names)
    for row, strip in zip(rows, np.atleast_1d(figure.subfigures(len(rows), 1)), strict=True):
        strip.suptitle(f"“{row['caption']}”", fontsize=10)
        axes = strip.subplots(1, len(ratios), width_ratios=ratios)
        for axis in axes:
            axis.set_axis_off()
        axes[0].imshow(row["truth"], interpolation="nearest")
        axes[0].set_title("true image", fontsize=8)
        for model, (name, found) in enumerate(zip(names, row["found"], strict=True)):
            for rank, (image, score, right) in enumerate(found):
                axis = axes[2 + 6 * model + rank]
                axis.imshow(image, interpolation="nearest")
                label = f"{name} 1" if rank == 0 else f"{rank + 1}"
                axis.set_title(f"{label}{' ✓' if right else ''}  {score:.2f}", fontsize=8)
                if right:
                    axis.set_axis_on()
                    axis.set_xticks([])
                    axis.set_yticks([])
                    for spine in axis.spines.values():
                        spine.set(color=RIGHT, linewidth=3)
    _save(figure, path)


def curves_figure(runs: dict[str, list[dict]], path: Path) -> None:
    """Loss, validation RSUM and overlap of views over the steps; `runs` maps a label to the rows of metrics.jsonl."""
    figure = _figure(11, 3.2)
    loss, recall, overlap = figure.subplots(1, 3)
    for label, rows in runs.items():
        trained = [row for row in rows if "loss" in row]
        loss.plot([r["step"] for r in trained], [r["contrastive_loss"] for r in trained], label=label)
        tested = [row for row in rows if "rsum" in row]
        recall.plot([r["step"] for r in tested], [r["rsum"] for r in tested], marker="o", label=label)
        for tower, style in (("image", "-"), ("text", "--")):
            seen = [row for row in trained if f"{tower}_view_overlap" in row]
            if seen:
                values = [r[f"{tower}_view_overlap"] for r in seen]
                overlap.plot([r["step"] for r in seen], values, style, label=f"{label}, {tower}")
    recall.set_ylim(bottom=0)
    overlap.set_ylim(0, 1)
    for axis, title in (
        (loss, "contrastive loss"), (recall, "RSUM on validation"), (overlap, "cosine between views' attentions"),
    ):  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    _save(figure, path)


def visualize(
    folder: str | Path, data: str | Path, images: str | Path, out: str | Path, *, split: str = "test",
    baseline: str | Path | None = None, count: int = 4, seed: int = 0, device: str = "auto", progress: bool = True,
) -> list[dict]:  # fmt: skip
    """Draws `count` random samples of the split: attention per view, and the five best images for their captions.

    With a `baseline` model folder its five stand beside. Samples are drawn at random (by `seed`), none is picked for
    its result. Writes OUT/figures/*.png; returns [{"file" (relative to OUT), "title", "caption"}].
    """
    out = Path(out)
    dataset = KarpathyDataset(data, images, split)
    if not 1 <= count <= len(dataset):
        raise ValueError(f"count is {count}; it must be 1 to {len(dataset)}, the images of the split")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(dataset), count, replace=False)
    captions = [int(rng.integers(len(dataset.captions[i]))) for i in chosen]
    loaded = {"MVAM": load_model(folder, device)}
    if baseline is not None:
        loaded = {"baseline": load_model(baseline, device), **loaded}

    found = []
    model, transform, tokenizer = loaded["MVAM"]
    for number, (index, caption) in enumerate(zip(chosen, captions, strict=True)):
        text, image = dataset.captions[index][caption], dataset.load_image(index)
        place = next(model.parameters()).device
        with torch.no_grad():
            image_attention = model.image_attention(transform(image)[None].to(place))[0].cpu()
            text_attention = model.text_attention(tokenizer([text]).to(place))[0].cpu()
        words, text_attention = words_and_attention(tokenizer, text, text_attention)
        file = f"figures/attention-{number}.png"
        tower = model.image_tower
        attention_figure(
            image, words, image_attention, text_attention, tower.grid, tower.prefix_tokens, out / file, text
        )
        found.append({
            "file": file, "title": "What each view looks at",
            "caption": f"“{text}” Lit: where the view's attention lies in the image; bars: in the words.",
        })  # fmt: skip

    best = {}
    for name, (model, transform, tokenizer) in loaded.items():
        store = ImageStore(dataset, transform, strict=True)
        image_features, text_features, owner = embed_dataset(model, store, tokenizer, progress=progress)
        first = torch.searchsorted(owner, torch.as_tensor(chosen))
        queries = text_features[first + torch.tensor(captions)]
        best[name] = top_k(queries, image_features, 5)
    rows = []
    for number, (index, caption) in enumerate(zip(chosen, captions, strict=True)):
        rows.append({
            "caption": dataset.captions[index][caption], "truth": dataset.load_image(index),
            "found": [
                [(dataset.load_image(int(i)), float(s), int(i) == index) for s, i in zip(*pair, strict=True)]
                for pair in ((scores[number], indices[number]) for scores, indices in best.values())
            ],
        })  # fmt: skip
    top5_figure(rows, tuple(best), out / "figures/top5.png")
    top = {
        "file": "figures/top5.png", "title": "Best five images for a caption",
        "caption": f"{' beside '.join(best)}, cosine above each image. Captions drawn at random from the {split} "
        "split; framed and ticked: the caption's own image.",
    }  # fmt: skip
    return [top, *found]


def _figure(width: float, height: float):
    return require("matplotlib.figure", extra="train").Figure(figsize=(width, height), dpi=100, layout="constrained")


def _save(figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, facecolor="white")
