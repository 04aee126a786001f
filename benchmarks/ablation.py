"""What multi-view pooling and the diversity loss do, and what of them does it: trainings on the scenes, 3 seeds each.

    python benchmarks/ablation.py [--work runs/ablation] [--jobs N] [--groups NAME ...] [--json FILE]

Hours on a CPU. What the JSON has is not trained again (--fresh does), nor what is finished in --work; a run that was
cut short goes on from its last checkpoint. The learning rate of each way of pooling is the best of several on the
validation split; everything else is one recipe. Writes the JSON after every run, so that nothing is lost, and at the
end the plots and the tables of docs/results.md (`python benchmarks/ablation_page.py` alone does that again).
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ablation_cells import BASE, DATA, TUNING, Cell, folder_name, groups, rates_of  # noqa: E402
from ablation_page import PAGE, build  # noqa: E402
from inserts import between  # noqa: E402
from machine import machine  # noqa: E402

from mvam_fast.files import read_json, write_json  # noqa: E402
from mvam_fast.retrieval.evaluation.evaluate import evaluate  # noqa: E402
from mvam_fast.retrieval.pictures.diversity import diversity  # noqa: E402
from mvam_fast.retrieval.scene_truth import oracle_recall  # noqa: E402
from mvam_fast.retrieval.scenes import make_scenes  # noqa: E402
from mvam_fast.retrieval.training.config import TrainConfig  # noqa: E402
from mvam_fast.retrieval.training.train import train  # noqa: E402

RESULT = Path(__file__).parent / "results/ablation/ablation.json"


Key = tuple[str, str, int]


def key_of(row: dict) -> Key:
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
    result, about = read_json(out / "result.json", "work"), machine(torch.device("cpu"))
    row = {
        "settings": cell.settings, "data": cell.data, "seed": seed, "parameters": result["parameters"],
        "embedding_width": found["protocol"]["embedding_width"], "validation": result["validation"],
        "test": found["metrics"], "train_seconds": result["seconds"], "warnings": result["warnings"],
        "measured": {name: about[name] for name in ("device", "torch", "commit", "date")},
    }  # fmt: skip
    if config.views:
        report = diversity(model, data, images, out / "diversity", split="val", progress=False)
        row["views"] = {
            tower: {name: of[name] for name in ("mean_cosine", "mean_entropy", "dead")}
            for tower, of in report["towers"].items()
        }
    write_json(out / "row.json", row)
    return row


def run_all(cells: dict[Key, tuple[Cell, int]], work: Path, jobs: int, done: Callable[[dict], None]) -> None:
    """Every cell with its seed, in `jobs` processes of one thread each; `done(row)` after each."""
    # Spawned, not forked: this process holds threads of torch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = [pool.submit(run_one, cell, seed, work) for cell, seed in cells.values()]
        try:
            for number, future in enumerate(as_completed(running), 1):
                row = future.result()
                done(row)
                print(f"{number}/{len(cells)}  RSUM {row['test']['rsum']:5.1f}  {folder_name(row['settings'])}, "
                      f"seed {row['seed']}", file=sys.stderr, flush=True)  # fmt: skip
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise


def load_rows(path: Path, fresh: bool) -> dict[Key, dict]:
    """What earlier runs measured, by key; ValueError where they had another recipe."""
    if fresh or not path.exists():
        return {}
    result = read_json(path, "json")
    changed = [name for name in {**BASE, **result["base"]} if BASE.get(name) != result["base"].get(name)]
    if changed:
        raise ValueError(
            f"json: {path} was measured with another recipe ({', '.join(changed)}); pass --fresh to measure all again"
        )
    return {key_of(row): row for row in result["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="runs go here; finished are reused")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at once, one thread each")
    parser.add_argument("--groups", nargs="+", help="these alone, and the tuning; what the JSON has of others stays")
    parser.add_argument("--fresh", action="store_true", help="as if there were no JSON")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    between(PAGE)  # that the page can take the tables is better known before the hours of work
    rows = load_rows(options.json, options.fresh)
    for name, images in DATA.items():
        make_scenes(options.work / name, train=images)
    result = {
        "kind": "ablation", "machine": machine(torch.device("cpu")), "base": BASE,
        "oracle": oracle_recall(options.work / "scenes/dataset_scenes.json", "test"),
    }  # fmt: skip

    def done(row: dict) -> None:
        rows[key_of(row)] = row
        write_json(options.json, {**result, "rows": list(rows.values())})

    def run(cells: list[tuple[Cell, int]]) -> None:
        by_key = {(folder_name(cell.settings), cell.data, seed): (cell, seed) for cell, seed in cells}
        run_all({key: pair for key, pair in by_key.items() if key not in rows}, options.work, options.jobs, done)

    run([(cell, 0) for cell in TUNING.values()])
    chosen = groups(rates_of(list(rows.values())))
    unknown = set(options.groups or ()) - set(chosen)
    if unknown:
        parser.error(f"--groups: there is no {', '.join(unknown)}; there are {', '.join(chosen)}")
    wanted = [chosen[name] for name in options.groups or chosen]
    run([(cell, seed) for group in wanted for cell in group.cells for seed in group.seeds])  # groups share cells
    print("\n".join(map(str, build(options.json))))


if __name__ == "__main__":
    main()
