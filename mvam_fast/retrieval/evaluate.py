"""Retrieval evaluation of a model folder on one split of a data set."""
from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import hf_files
from .._optional import require
from ..files import write_json
from ..model import MVAM, get_tokenizer
from ..preprocess import eval_transform
from ..version import __version__
from .datasets import ImageStore, KarpathyDataset
from .metrics import recall_metrics


def pick_device(device: str = "auto") -> torch.device:
    """ "auto" is the GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load_model(folder: str | Path, device: str = "auto"):
    """(model, evaluation transform, tokenizer) of a folder that training or `save_pretrained` wrote."""
    model = MVAM.from_pretrained(folder, device=pick_device(device))
    known = model.open_clip_config
    preprocess = known["preprocess_cfg"] if known else hf_files.preprocess_cfg(folder)
    return model, eval_transform(preprocess), get_tokenizer(folder)


@torch.no_grad()
def embed_dataset(
    model: nn.Module, store: ImageStore, tokenizer, *, batch_size: int = 256, progress: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """L2-normalised float32 features on the CPU: images [I,F], captions [T,F], and each caption's image [T].

    Images that the store skips as unreadable are left out with their captions; `store.unreadable` tells.
    """
    tqdm = require("tqdm", extra="train").tqdm
    dataset, device = store.dataset, next(model.parameters()).device
    was_training = model.training
    model.eval()
    images, readable = [], []
    for start in tqdm(range(0, len(dataset), batch_size), desc="images", disable=not progress, leave=False):
        batch, kept = store.load(range(start, min(start + batch_size, len(dataset))))
        features = model.encode_image(store.normalize(batch.to(device)))
        images.append(F.normalize(features.float(), dim=-1).cpu())
        readable += [start + position for position in kept]
    captions = [caption for index in readable for caption in dataset.captions[index]]
    owner = [row for row, index in enumerate(readable) for _ in dataset.captions[index]]
    texts = []
    for start in tqdm(range(0, len(captions), batch_size), desc="captions", disable=not progress, leave=False):
        features = model.encode_text(tokenizer(captions[start : start + batch_size]).to(device))
        texts.append(F.normalize(features.float(), dim=-1).cpu())
    model.train(was_training)
    return torch.cat(images), torch.cat(texts), torch.tensor(owner)


def evaluate(
    folder: str | Path,
    data: str | Path,
    images: str | Path,
    *,
    split: str = "test",
    captions_per_image: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    strict: bool = True,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Recall at 1, 5, 10 both ways, RSUM and ranks, with the protocol that they were measured by.

    `strict`: an unreadable image is an error; otherwise it is left out, and counted under "protocol". The result is
    also written to `out` if given. Metrics: see `recall_metrics`, also for how ties are counted.
    """
    model, preprocess, tokenizer = load_model(folder, device)
    dataset = KarpathyDataset(data, images, split, captions_per_image=captions_per_image)
    store = ImageStore(dataset, preprocess, strict=strict)
    features = embed_dataset(model, store, tokenizer, batch_size=batch_size, progress=progress)
    result = {
        "metrics": recall_metrics(*features),
        "protocol": {
            "model": str(folder),
            "data": Path(data).name,
            "split": split,
            "captions_per_image": captions_per_image or "all",
            "image_ids_sha256": hashlib.sha256(repr(dataset.image_ids).encode()).hexdigest(),
            "unreadable_images": len(store.unreadable),
            "ties": "count against the query",
            "embedding_width": features[0].shape[1],
            "mvam_fast": __version__,
        },
    }
    if out is not None:
        write_json(out, result)
    return result


def recall_table(metrics_by_name: dict[str, dict]) -> str:
    """A table for people: one row per model, recall both ways, RSUM and median ranks."""
    keys = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]
    width = max(map(len, metrics_by_name)) + 2
    names = "".join(f"{key.replace('_r', ' R@'):>10}" for key in keys)
    lines = [f"{'':{width}}{names}{'RSUM':>9}{'median rank':>14}"]
    for name, metrics in metrics_by_name.items():
        ranks = ""
        if "i2t_median_rank" in metrics:
            ranks = f"{metrics['i2t_median_rank']:.0f} / {metrics['t2i_median_rank']:.0f}"
        cells = "".join(f"{metrics[key]:10.1f}" for key in keys)
        lines.append(f"{name:{width}}{cells}{metrics['rsum']:9.1f}{ranks:>14}")
    return "\n".join(lines)
