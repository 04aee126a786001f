"""The whole job on data that it makes itself: train, compare, draw, export, report."""
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from ..export.to_onnx import export_bundle
from ..files import read_json
from ..serving import Encoder
from ..version import __version__
from .data.datasets import KarpathyDataset
from .evaluation.evaluate import evaluate, load_model, recall_table
from .pictures.curves import curves_figure
from .pictures.diversity import diversity
from .pictures.visualize import visualize
from .report import build_report
from .scene_truth import oracle_recall
from .scenes import make_scenes
from .training.config import TrainConfig, flags_of

THRESHOLD = 50  # RSUM points that MVAM must gain over the baseline for its claim to count as shown

# One recipe for both, with the learning rate that was best for each (docs/results.md); 256 numbers per image or text
# in both: 8 views of 32, or one vector of 256.
RECIPE = {
    "model": "scenes-ViT-T-16", "batch_size": 128, "siblings": 2, "lr": 5e-4, "warmup": 150, "weight_decay": 0.05,
    "diversity_weight": 0.0, "cache_images": True, "eval_every": 200, "save_every": 400, "resume": True,
    "device": "cpu",
}  # fmt: skip
RUNS = {
    "baseline": {"views": 0, "global_view": True, "embed_dim": 256},
    "mvam": {"views": 8, "embed_dim": 32},
}
LABELS = {"baseline": "single vector (CLS/EOT)", "mvam": "MVAM, 8 views"}


def config_of(name: str, data: Path, out: Path, *, steps: int, seed: int) -> TrainConfig:
    """The training of "baseline" or "mvam" on the scenes in `data`."""
    paths = {"data": str(data), "images": str(data.parent / "images"), "out": str(out)}
    return TrainConfig(**paths, **RECIPE, **RUNS[name], steps=steps, seed=seed)


def train_pair(data: Path, out: Path, *, steps: int, seed: int) -> None:
    """Trains both runs side by side, one thread each, as processes of their own. What is finished is not done again."""
    processes = {}
    for line, name in enumerate(RUNS):  # each bar has a line of its own
        config = config_of(name, data, out / name, steps=steps, seed=seed)
        command = [sys.executable, "-m", "mvam_fast.cli", "train", *flags_of(config)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_POSITION": str(line)}
        processes[name] = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    failed = [name for name, process in processes.items() if process.wait()]
    if failed:
        raise RuntimeError(f"the training of {', '.join(failed)} failed; its message is above")


def demo(
    out: str | Path, *, seed: int = 0, steps: int = 800, train_images: int = 16000, throughput: str | Path | None = None
) -> Path:
    """Runs every stage in `out` and returns the path of report.html; prints the recall table.

    Stages that are finished there are not repeated. `throughput`: JSON of benchmarks/throughput.py, for the report.
    """
    out = Path(out)
    timed = None if throughput is None else _read_throughput(Path(throughput), out)
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    with clock("scenes"):
        data = make_scenes(out / "scenes", train=train_images, seed=seed)
    with clock("training, both"):
        train_pair(data, out, steps=steps, seed=seed)
    with clock("evaluation"):
        images = data.parent / "images"
        metrics = {
            name: evaluate(out / name / "model", data, images, out=out / name / "test.json", progress=False)["metrics"]
            for name in RUNS
        }
        oracle = oracle_recall(data, "test")
    with clock("pictures"):
        logs = {LABELS[name]: _rows(out / name / "metrics.jsonl") for name in RUNS}
        curves_figure(logs, out / "figures/curves.png")
        figures = [{
            "file": "figures/curves.png", "title": "Training",
            "caption": "Both runs share data, seed, schedule and total width.",
        }]  # fmt: skip
        folder, baseline = out / "mvam/model", out / "baseline/model"
        figures += visualize(folder, data, images, out, baseline=baseline, count=4, seed=seed, progress=False)
        views = diversity(folder, data, images, out / "diversity", progress=False)
        figures.append({
            "file": "diversity/diversity.png", "title": "Diversity of views on the val split",
            "caption": " ".join(tower["sentence"] for tower in views["towers"].values()),
        })  # fmt: skip
    with clock("export"):
        bundle = export_bundle(folder, out / "bundle")
        export = {**bundle, "check": _check_encoder(out / "bundle", folder, data)}

    gain = metrics["mvam"]["rsum"] - metrics["baseline"]["rsum"]
    report = {
        "title": "MVAM on fine-grained scenes",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sentence": verdict(gain),
        "data": {"counts": read_json(data, "data")["config"], "preview": "scenes/preview.png"},
        "runs": {name: _describe(name, out, metrics[name]) for name in RUNS},
        "comparison": {"rsum_gain": gain, "threshold": THRESHOLD, "holds": gain >= THRESHOLD},
        "oracle": oracle,
        "figures": figures,
        "export": export,
        "throughput": timed,
        "seconds": seconds,
        "machine": {
            "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
            "torch": torch.__version__, "mvam_fast": __version__,
        },
    }  # fmt: skip
    report["data"]["counts"] = {split: report["data"]["counts"][split] for split in ("train", "val", "test")}
    path = build_report(report, out)
    print(recall_table({**{LABELS[name]: metrics[name] for name in RUNS}, "perfect reader": oracle}))
    print(report["sentence"])
    print(f"report: {path}")
    return path


def verdict(gain: float) -> str:
    """What the run shows, computed from its numbers."""
    if gain >= THRESHOLD:
        return f"MVAM gains {gain:.0f} RSUM points over a single vector of the same total width, trained the same way."
    return (
        f"This run does not show the claim: MVAM's RSUM is {gain:+.0f} points from that of a single vector of the same "
        f"total width, where at least +{THRESHOLD} was expected."
    )


def _describe(name: str, out: Path, metrics: dict) -> dict:
    config, result = read_json(out / name / "config.json", "out"), read_json(out / name / "result.json", "out")
    shown = ("views", "global_view", "embed_dim", "steps", "batch_size", "siblings", "lr", "warmup", "weight_decay")
    shown += ("diversity_weight", "diversity_kind", "seed")
    return {
        "label": LABELS[name], "settings": {key: config[key] for key in shown}, "metrics": metrics,
        "validation": result["validation"], "train_seconds": result["seconds"], "parameters": result["parameters"],
    }  # fmt: skip


def _read_throughput(path: Path, out: Path) -> dict:
    """Read before anything is trained, so that a wrong file costs seconds. Its plot's place is relative to `out`."""
    timed = read_json(path, "throughput")
    plot = path.with_name("throughput-times.png")
    if not isinstance(timed, dict) or timed.get("kind") != "throughput" or not plot.is_file():
        raise ValueError(f"throughput: {path} is no throughput.json with plots beside it; make it with "
                         "benchmarks/throughput.py --out FOLDER")
    return {**timed, "plot": os.path.relpath(plot, out)}


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _check_encoder(bundle: Path, folder: Path, data: Path) -> str:
    """Retrieves with the exported encoders and with PyTorch; a sentence that says whether the five best agree."""
    dataset = KarpathyDataset(data, data.parent / "images", "test")
    paths, texts = dataset.image_paths[:200], [captions[0] for captions in dataset.captions[:50]]
    encoder = Encoder.load(bundle)
    exported = encoder.embed_texts(texts) @ encoder.embed_images(paths).T
    model, transform, tokenizer = load_model(folder, "cpu")
    with torch.no_grad():
        pictures = torch.stack([transform(dataset.load_image(i)) for i in range(len(paths))])
        scores = model.encode_text(tokenizer(texts), normalize=True) @ model.encode_image(pictures, normalize=True).T
    best = np.argsort(-exported, axis=1)[:, :5]
    agree = int((best == np.argsort(-scores.numpy(), axis=1)[:, :5]).all(1).sum())
    return (
        f"The bundle ({encoder.backend}) ranks the same five of {len(paths)} images first as PyTorch for {agree} of "
        f"{len(texts)} captions."
    )


class _Clock:
    """Announces a stage and records its seconds."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def __call__(self, name: str) -> _Clock:
        self.name = name
        return self

    def __enter__(self) -> None:
        print(f"— {self.name}", file=sys.stderr, flush=True)
        self.began = time.monotonic()

    def __exit__(self, *_) -> None:
        self.seconds[self.name] = time.monotonic() - self.began
