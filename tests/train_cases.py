"""Small trainings, as several test files run them."""
import json

import pytest
from safetensors.torch import load_file

from mvam_fast.retrieval.evaluation.metrics import recall_metrics
from mvam_fast.retrieval.training import train as train_module
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


def kit_config(data, out, **changes):
    return config(data, out, **{"save_every": 100, "tensorboard": False, "diversity_weight": 0.1, **changes})


def dying_at(patch, step):
    """Training dies as it takes this step."""
    asked = train_module.rate_at

    def rate(config, now):
        if now == step:
            raise KeyboardInterrupt
        return asked(config, now)

    patch.setattr(train_module, "rate_at", rate)


def falling_recall(patch, values):
    found = iter(values)
    patch.setattr(train_module, "recall_metrics", lambda *features: {**recall_metrics(*features), "rsum": next(found)})


def assert_same_run(out, expected, rtol):
    for row, other in zip(rows(out), rows(expected), strict=True):
        assert row.keys() == other.keys()
        for name in other:
            if "loss" in name or name in ("logit_scale", "lr") or name.endswith("overlap"):
                assert row[name] == pytest.approx(other[name], rel=rtol), (other["step"], name)
