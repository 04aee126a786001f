"""Times whole encoders, plain CLIP beside MVAM, as a user meets them: speed, latency, first result, a training step.

    python benchmarks/encoders.py [--quick] [--model NAME] [--batch N ...] [--out FOLDER] [--resume]

Weights are random (nothing is downloaded): the speed is that of trained ones. Embeddings are checked against float64
on the inputs that are timed, gradients against plain PyTorch, or there is no number. FOLDER gets encoders.json,
written after every case, a plot, and the exported bundles. On a CPU the batches are small.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import encoder_cases  # noqa: E402
import encoder_training  # noqa: E402
import plots  # noqa: E402
import results  # noqa: E402
from arguments import add_run, on_gpu, positive  # noqa: E402
from encoder_models import TOWERS, Bundles, Compared  # noqa: E402
from encoder_tables import encoders_table  # noqa: E402
from machine import machine  # noqa: E402
from shapes import DTYPES  # noqa: E402

NOTE = (
    "Random weights: the speed is that of trained ones. Inputs and embeddings lie in the device's memory; reading, "
    "preprocessing, tokenizing and transfer are excluded. Inference: wall clock of call and synchronisation, caches as "
    "the last call left them; the models take turns in five blocks, two calls before each for warm-up; p99 with 100 "
    "repetitions or more, else the largest. First result: from the PyTorch model to the first embeddings, for an "
    "exported model with the whole export (both towers, checked) and load. The compiler's caches are empty; PyTorch, "
    "the compiler and those of our Triton kernels that an earlier row compiled are loaded. Training: forward, loss, "
    "backward and AdamW at learning rate 0, cold last-level cache, models in turns in three blocks; CLIP's loss is "
    "ClipLoss, MVAM's that and the diversity of both towers."
)


def run(options: argparse.Namespace) -> dict:
    device = torch.device(options.device)
    path = options.out / "encoders.json"
    about = machine(device)
    names = ("quick", "model", "views", "batch", "towers", "backends", "train_batch", "dtype", "seconds")
    settings = {name: getattr(options, name) for name in names}
    settings["train_dtype"] = "bfloat16" if device.type == "cuda" else "float32"
    result = {"machine": about, "settings": settings, "note": NOTE, "rows": []}
    if options.resume and path.exists():
        result["rows"] = results.resumed(path, "encoders", result)["rows"]
    compared = Compared(options.model, options.views, device, DTYPES[options.dtype])
    bundles = Bundles(options.out / "bundles", compared, resume=options.resume)
    done = {(row["work"], row.get("backend"), row.get("tower"), row["batch"]) for row in result["rows"]}
    cases = cases_of(options, compared, bundles, settings["train_dtype"])
    left = {case: measure for case, measure in cases.items() if case not in done}
    if left and "compile" in options.backends:
        encoder_cases.load_compiler(device)
    print(f"{len(cases) - len(left)} cases done before, {len(left)} to do", file=sys.stderr)
    with tqdm(total=len(left), unit="case", file=sys.stderr) as bar:
        for case, measure in left.items():
            result["rows"] += measure(bar.set_description)
            bar.update()
            complete = case == list(left)[-1]
            results.write(path, "encoders", {**result, "complete": complete})
    return results.read(path, "encoders")


def cases_of(options, compared: Compared, bundles: Bundles, train_dtype: str) -> dict[tuple, Callable]:
    """What gives the rows of each case, by (work, backend, tower, batch). What takes long to get ready comes last."""
    found: dict[tuple, Callable] = {}
    if options.train_batch:
        found["training", None, None, options.train_batch] = lambda tick: encoder_training.measure(
            compared, options.train_batch, train_dtype, options.seconds, tick
        )
    for backend in (name for name in encoder_cases.BACKENDS if name in options.backends):
        sizes = list(product(options.towers, options.batch))
        # Compiling takes longest: a quick run does it for one case.
        for case in sizes[:1] if options.quick and backend == "compile" else sizes:
            found[("inference", backend, *case)] = lambda tick, backend=backend, case=case: encoder_cases.measure(
                compared, bundles, backend, *case, options.seconds, tick
            )
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="scenes-ViT-T-16, one case compiled; about 90 s on a CPU")
    parser.add_argument("--model", help="open_clip model (default: ViT-B-32; with --quick scenes-ViT-T-16)")
    parser.add_argument("--views", type=positive, default=16, help="of MVAM (default: %(default)s)")
    parser.add_argument("--batch", nargs="+", type=positive, help="default: 1 8 32 128 256 on a GPU, 1 8 on a CPU")
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS), help="of inference; default: both")
    parser.add_argument("--backends", nargs="+", choices=encoder_cases.BACKENDS, default=list(encoder_cases.BACKENDS))
    parser.add_argument("--train-batch", type=int, help="0 is no training; default: 256 on a GPU, 8 on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="of the served model; default: float16 on a GPU, float32 on a "
                        "CPU. Exported graphs are float32, training on a GPU is in bfloat16 autocast")  # fmt: skip
    add_run(parser, "runs/encoders")
    options = parser.parse_args(arguments)
    gpu = on_gpu(parser, options.device)
    options.model = options.model or ("scenes-ViT-T-16" if options.quick else "ViT-B-32")
    options.batch = options.batch or ([1, 8, 32, 128, 256] if gpu and not options.quick else [1, 8])
    if options.train_batch is None:
        options.train_batch = 256 if gpu and not options.quick else 8
    elif options.train_batch < 0:
        parser.error(f"--train-batch {options.train_batch}: it must be at least 0")
    options.dtype = options.dtype or ("float16" if gpu else "float32")
    options.seconds = 0.5 if options.quick else 2.0
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    result = run(options)
    print(encoders_table(result))
    for path in (options.out / "encoders.json", *plots.draw(result, options.out, "encoders")):
        print(path)


if __name__ == "__main__":
    main()
