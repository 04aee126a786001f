"""Small trainings, as several test files run them."""
import json

from safetensors.torch import load_file

from mvam_fast.retrieval.training.config import TrainConfig


def config(data, out, **changes):
    values = {
        "data": str(data), "images": str(data.parent / "images"), "out": str(out), "model": "scenes-ViT-T-16",
        "views": 2, "batch_size": 16, "steps": 6, "lr": 1e-3, "warmup": 2, "siblings": 2, "log_every": 1,
        "save_every": 2, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def rows(out):
    """The log without what depends on the clock."""
    parsed = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in parsed]


def weights(out):
    return load_file(out / "model/model.safetensors")
