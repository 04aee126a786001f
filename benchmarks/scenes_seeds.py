"""The demo's comparison over several seeds: single vector against MVAM at the same total width.

    python benchmarks/scenes_seeds.py [--seeds 0 1 2] [--work runs/seeds] [--json FILE]

The scenes are the same for all; a seed sets weights, batches and captions. Writes the JSON and a plot beside it.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine  # noqa: E402

from mvam_fast.files import atomic, read_json, write_json  # noqa: E402
from mvam_fast.retrieval.demo import LABELS, RECIPE, RUNS, train_pair  # noqa: E402
from mvam_fast.retrieval.evaluate import evaluate  # noqa: E402
from mvam_fast.retrieval.scene_truth import oracle_recall  # noqa: E402
from mvam_fast.retrieval.scenes import make_scenes  # noqa: E402


def measure(seeds: list[int], work: Path, steps: int) -> dict:
    data = make_scenes(work / "scenes")
    rows = []
    for seed in seeds:
        folder = work / f"seed-{seed}"
        train_pair(data, folder, steps=steps, seed=seed)
        for name in RUNS:
            metrics = evaluate(folder / name / "model", data, data.parent / "images", progress=False)["metrics"]
            result = read_json(folder / name / "result.json", "work")
            rows.append({"seed": seed, "run": name, "train_seconds": result["seconds"], "metrics": metrics})
    by_run = {name: [row["metrics"]["rsum"] for row in rows if row["run"] == name] for name in RUNS}
    gains = [after - before for before, after in zip(*by_run.values(), strict=True)]
    return {
        "machine": machine(torch.device("cpu")),
        "split": "test, 1,000 images, 5,000 captions",
        "recipe": {**RECIPE, "steps": steps},
        "runs": RUNS,
        "rows": rows,
        "rsum": {name: _spread(values) for name, values in by_run.items()},
        "gain": {"by_seed": gains, **_spread(gains)},
        "oracle": oracle_recall(data, "test"),
    }


def _spread(values: list[float]) -> dict:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_deviation": deviation, "least": min(values), "most": max(values)}


def plot(result: dict, path: Path) -> None:
    figure = Figure(figsize=(7, 3.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    for name, marker, color in (("baseline", "s", "#999999"), ("mvam", "o", "#0072b2")):
        rows = [row for row in result["rows"] if row["run"] == name]
        seeds, values = [row["seed"] for row in rows], [row["metrics"]["rsum"] for row in rows]
        axis.plot(seeds, values, marker, color=color, markersize=9, label=LABELS[name])
        for seed, value in zip(seeds, values, strict=True):
            axis.annotate(f"{value:.0f}", (seed, value), xytext=(9, -3), textcoords="offset points", fontsize=9)
    axis.axhline(result["oracle"]["rsum"], color="black", linestyle=":", linewidth=1)
    axis.annotate("perfect reader", (seeds[0], result["oracle"]["rsum"]), xytext=(0, 4), textcoords="offset points")
    axis.set_xticks(seeds)
    axis.set_xlim(min(seeds) - 0.3, max(seeds) + 0.5)
    axis.set_ylim(0, 600)
    axis.set_xlabel("seed")
    axis.set_ylabel("RSUM, test split")
    axis.set_title(f"Scenes, {result['recipe']['steps']} steps, 256 numbers per image or text", fontsize=10)
    axis.legend(loc="upper right", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("runs/seeds"), help="runs go here; finished ones are reused")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/scenes_seeds.json")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result = measure(options.seeds, options.work, options.steps)
    write_json(options.json, result)
    plot(result, options.json.with_suffix(".png"))
    for name, spread in result["rsum"].items():
        print(f"{LABELS[name]:26} RSUM {spread['mean']:.1f} ({spread['least']:.1f} to {spread['most']:.1f})")
    print(f"{'gain':26} {result['gain']['mean']:.1f} ({result['gain']['least']:.1f} to {result['gain']['most']:.1f})")
    print(options.json)


if __name__ == "__main__":
    main()
