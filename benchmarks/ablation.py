"""What multi-view pooling and the diversity loss do, and what of them does it: trainings on the scenes, 3 seeds each.

    python benchmarks/ablation.py [--work runs/ablation] [--jobs N] [--groups NAME ...] [--json FILE]

Hours on a CPU. What the JSON has is not trained again (--fresh does), nor what is finished in --work; a run that was
cut short goes on from its last checkpoint. The learning rate of each way of pooling is the best of several on the
validation split; everything else is one recipe. Writes the JSON after every run, so that nothing is lost, and at the
end the plots and the tables of docs/results.md (`python benchmarks/ablation_page.py` alone does that again).
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ablation_cells import BASE, DATA, TUNING, Cell, folder_name, groups, rates_of  # noqa: E402
from machine import machine  # noqa: E402

from mvam_fast.files import read_json, write_json  # noqa: E402
from mvam_fast.retrieval.config import TrainConfig  # noqa: E402
from mvam_fast.retrieval.diversity import diversity  # noqa: E402
from mvam_fast.retrieval.evaluate import evaluate  # noqa: E402
from mvam_fast.retrieval.scene_truth import oracle_recall  # noqa: E402
from mvam_fast.retrieval.scenes import make_scenes  # noqa: E402
from mvam_fast.retrieval.train import train  # noqa: E402

RESULT = Path(__file__).parent / "results/ablation/ablation.json"


def _key(row: dict) -> tuple[str, str, int]:
    return folder_name(row["settings"]), row["data"], row["seed"]


def run_one(cell: Cell, seed: int, work: Path) -> dict:
    """Trains a cell with one seed, if that was not done, and measures it; its row of the result."""
    of_data = "" if cell.data == "scenes" else f"@{cell.data}"
    out = work / (folder_name(cell.settings) + of_data) / f"seed-{seed}"
    data = work / cell.data / "dataset_scenes.json"
    images = data.parent / "images"
    config = TrainConfig(
        data=str(data), images=str(images), out=str(out), seed=seed, resume=True, **{**BASE, **cell.settings}
    )
    model = train(config, progress=False)
    if (out / "row.json").exists():
        return read_json(out / "row.json", "work")
    found = evaluate(model, data, images, out=out / "test.json", progress=False)
    result = read_json(out / "result.json", "work")
    row = {
        "settings": cell.settings, "data": cell.data, "seed": seed, "parameters": result["parameters"],
        "embedding_width": found["protocol"]["embedding_width"], "validation": result["validation"],
        "test": found["metrics"], "train_seconds": result["seconds"], "warnings": result["warnings"],
    }  # fmt: skip
    if config.views:
        report = diversity(model, data, images, out / "diversity", split="val", progress=False)
        row["views"] = {
            tower: {name: of[name] for name in ("mean_cosine", "mean_entropy", "dead")}
            for tower, of in report["towers"].items()
        }
    write_json(out / "row.json", row)
    return row


def run_all(cells: list[tuple[Cell, int]], work: Path, jobs: int, done) -> None:
    """Every (cell, seed) as a process of its own, `jobs` at once with one thread each; `done(row)` after each."""

    def start(cell: Cell, seed: int) -> dict:
        command = [sys.executable, __file__, "--work", str(work), "--one", json.dumps([cell.settings, cell.data, seed])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"{folder_name(cell.settings)}, seed {seed}: {finished.stderr.strip()[-2000:]}")
        return json.loads(finished.stdout.splitlines()[-1])

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(start, cell, seed) for cell, seed in cells]
        try:
            for number, future in enumerate(as_completed(running), 1):
                row = future.result()
                done(row)
                print(f"{number}/{len(cells)}  RSUM {row['test']['rsum']:5.1f}  {folder_name(row['settings'])}, "
                      f"seed {row['seed']}", file=sys.stderr, flush=True)  # fmt: skip
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="runs go here; finished are reused")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at once, one thread each")
    parser.add_argument("--groups", nargs="+", help="these alone, and the tuning; what the JSON has of others stays")
    parser.add_argument("--fresh", action="store_true", help="as if there were no JSON")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # how the processes of run_all are started
    options = parser.parse_args()
    if options.one:
        settings, data, seed = json.loads(options.one)
        print(json.dumps(run_one(Cell("", settings, data), seed, options.work)))
        return

    for name, images in DATA.items():
        make_scenes(options.work / name, train=images)
    rows = {}
    if options.json.exists() and not options.fresh:
        rows = {_key(row): row for row in read_json(options.json, "json")["rows"]}

    def missing(cells: list[tuple[Cell, int]]) -> list[tuple[Cell, int]]:
        return [(cell, seed) for cell, seed in cells if (folder_name(cell.settings), cell.data, seed) not in rows]

    run_all(missing([(cell, 0) for cell in TUNING.values()]), options.work, options.jobs,
            lambda row: rows.update({_key(row): row}))  # fmt: skip
    rates = rates_of(list(rows.values()))
    chosen = groups(rates)
    unknown = set(options.groups or ()) - set(chosen)
    if unknown:
        parser.error(f"--groups: there is no {', '.join(unknown)}; there are {', '.join(chosen)}")
    result = {
        "kind": "ablation", "machine": machine(torch.device("cpu")), "base": BASE, "rates": rates,
        "oracle": oracle_recall(options.work / "scenes/dataset_scenes.json", "test"),
    }  # fmt: skip

    def done(row: dict) -> None:
        rows[_key(row)] = row
        write_json(options.json, {**result, "rows": list(rows.values())})

    wanted = {  # by key: groups share cells
        (folder_name(cell.settings), cell.data, seed): (cell, seed)
        for name in options.groups or chosen for cell in chosen[name].cells for seed in chosen[name].seeds
    }  # fmt: skip
    run_all(missing(list(wanted.values())), options.work, options.jobs, done)
    write_json(options.json, {**result, "rows": list(rows.values())})
    from ablation_page import build

    print("\n".join(map(str, build(options.json))))


if __name__ == "__main__":
    main()
