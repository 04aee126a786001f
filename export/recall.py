"""What an export costs where it counts: recall on a data set, by PyTorch and by the bundle."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from mvam_fast.export.source import Source

from mvam_fast.preprocess import eval_transform
from mvam_fast.retrieval.data.datasets import ImageStore, KarpathyDataset
from mvam_fast.retrieval.evaluation.evaluate import embed_dataset
from mvam_fast.retrieval.evaluation.metrics import recall_metrics


class RecallData(NamedTuple):
    data: str | Path  # Karpathy JSON
    images: str | Path
    split: str = "test"


def recall_cost(found: Source, bundle: Path, given: RecallData, progress: bool) -> dict:
    """{"data", "split", "metrics": {"PyTorch": ..., "exported": ...}}, each as `recall_metrics` gives them."""
    from mvam_fast.serving import Encoder  # it reads bundles, as this package writes them

    dataset = KarpathyDataset(given.data, given.images, given.split)
    store = ImageStore(dataset, eval_transform(found.preprocess))
    images, texts, owner = embed_dataset(found.model, store, found.tokenizer(), progress=progress)
    captions = [caption for each in dataset.captions for caption in each]
    with Encoder.load(bundle, "onnxruntime-cpu") as encoder:
        exported = (encoder.embed_images(dataset.image_paths), encoder.embed_texts(captions))
    return {
        "data": Path(given.data).name, "split": given.split,
        "metrics": {
            "PyTorch": recall_metrics(images, texts, owner),
            "exported": recall_metrics(*map(torch.from_numpy, exported), owner),
        },
    }  # fmt: skip
