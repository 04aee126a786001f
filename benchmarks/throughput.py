"""Times multi-view pooling on the device at hand, beside every other way of doing it.

    python benchmarks/throughput.py [--quick] [--shapes NAME ...] [--batch N ...] [--out FOLDER] [--resume]

The same work in several ways (eager and compiled PyTorch, SDPA, FlexAttention, mvam_fast's paths, each also with a
LayerNorm in front), and the poolers of open_clip, timm and transformers doing their own, each beside the same one fused
by `fuse_attention_poolers`. Results are checked against float64 on the inputs that are timed, or there is no number.
FOLDER gets throughput.json, written after every case, and plots. On a CPU the batches are small.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import plots  # noqa: E402
import results  # noqa: E402
from arguments import add_run, on_gpu, positive  # noqa: E402
from cases import SETTINGS, Case, measure  # noqa: E402
from machine import machine  # noqa: E402
from providers import BASELINES, PROVIDERS  # noqa: E402
from shapes import DTYPES, SHAPES  # noqa: E402
from tables import throughput_table  # noqa: E402
from timing import ceilings  # noqa: E402

BYTES = (
    "bytes: forward reads the row's inputs (X, C; with a LayerNorm γ, β; in a model W; a pooler's parameters) and "
    "writes its outputs; backward reads the inputs and the outputs' gradients and writes the inputs' gradients; "
    "forward+backward is their sum. Each once: what must be moved where no cache holds it."
)
METHOD = (
    "Providers take turns in five blocks, two repetitions of each for warm-up; last-level cache cold (a buffer of "
    "twice its size is read before each repetition); backward alone is timed after an untimed forward. GPU times are "
    "between events, the launches of a short step already made; call_ms is the wall clock of call and synchronisation "
    "with warm caches. first_call_s holds compilation, with what the compiler had cached."
)
SWEEP_SHAPE = "vit-b-16"


def cases_of(options: argparse.Namespace) -> list[Case]:
    """What was asked for; by default every shape at one batch, and batch and views varied on one shape."""
    gpu = torch.device(options.device).type == "cuda"
    if options.quick:
        shapes, batches, views = ["vit-b-32", "text-512"], [16], [8]
    else:
        shapes, batches, views = list(SHAPES), [256 if gpu else 8], [16]
    found = [
        Case(shape, batch, number, options.dtype)
        for shape in options.shapes or shapes
        for batch in options.batch or batches
        for number in options.views or views
    ]
    if not (options.quick or options.shapes or options.batch or options.views):
        sweep = (1, 4, 16, 32, 64, 256, 1024, 4096) if gpu else (1, 4, 16, 32)
        found += [Case(SWEEP_SHAPE, batch, 16, options.dtype) for batch in sweep]
        found += [Case(SWEEP_SHAPE, found[0].batch, number, options.dtype) for number in (1, 8, 16, 32)]
    return list(dict.fromkeys(found))


def run(options: argparse.Namespace) -> dict:
    device = torch.device(options.device)
    torch._dynamo.config.recompile_limit = 64  # every provider is compiled for inference and for training
    path = options.out / "throughput.json"
    settings = {
        "seconds": options.seconds, "dtype": options.dtype, "quick": options.quick,
        "providers": options.providers, "settings": options.settings,
    }  # fmt: skip
    result = {"machine": machine(device), "settings": settings, "method": METHOD, "bytes": BYTES, "rows": []}
    earlier: list[tuple] = []
    if options.resume and path.exists():
        before = results.resumed(path, "throughput", result)
        result["rows"], earlier = before["rows"], [tuple(case) for case in before["cases"]]
    # An earlier run's cases, done or not, are this one's too: a file is complete when all of them are done.
    asked = [tuple(case.fields().values()) for case in cases_of(options)]
    result["cases"] = list(dict.fromkeys([*earlier, *asked]))
    done = {(row["shape"], row["batch"], row["views"], row["dtype"]) for row in result["rows"]}
    cases = [Case(*case) for case in asked if case not in done]
    print(f"{len(done)} cases done before, {len(cases)} to do", file=sys.stderr)
    if not cases:
        return results.read(path, "throughput")
    result["ceilings"] = ceilings(device)
    with tqdm(total=len(cases), unit="case", file=sys.stderr) as bar:
        for case in cases:
            around, providers = options.settings, options.providers
            if options.quick and tuple(case.fields().values()) != asked[0]:  # compiling takes longest
                around = [name for name in around if name != "compiled model"]
                providers = [name for name in providers if not PROVIDERS[name].compiles]
            rows = measure(case, providers, around, device, options.seconds, bar.set_description)
            for row in rows:
                if "gb_s" in row:
                    for name in ("copy", "read"):  # in the row: a resumed run has measured other ceilings before
                        row[f"{name}_gb_s"] = result["ceilings"][f"{name}_gb_s"]
                        row[f"percent_of_{name}"] = 100 * row["gb_s"] / row[f"{name}_gb_s"]
            result["rows"] += rows
            bar.update()
            done.add(tuple(case.fields().values()))
            results.write(path, "throughput", {**result, "complete": done >= set(result["cases"])})
    return results.read(path, "throughput")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, 8 views; what compiles in the first only")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all, and sweeps over batch and views")
    parser.add_argument("--batch", nargs="+", type=positive, help="default: 256 on a GPU, 8 on a CPU, and a sweep")
    parser.add_argument("--views", nargs="+", type=positive, help="default: 16, and a sweep")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add_run(parser, "runs/throughput")
    options = parser.parse_args(arguments)
    gpu = on_gpu(parser, options.device)
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    in_model = any(PROVIDERS[name].in_model for name in options.providers)  # the naive version alone says nothing
    possible = {"CUDA graph": gpu, "compiled model": in_model}
    options.settings = [name for name in SETTINGS if possible.get(name, True)]
    options.seconds = 0.2 if options.quick else 0.5
    # The ratios are to these.
    baselines = {"naive", *(BASELINES[PROVIDERS[name].work] for name in options.providers)}
    originals = {PROVIDERS[name].original for name in options.providers}
    options.providers = [name for name in PROVIDERS if name in {*options.providers, *baselines, *originals}]
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    result = run(options)
    print(throughput_table(result))
    for path in (options.out / "throughput.json", *plots.draw(result, options.out, "throughput")):
        print(path)


if __name__ == "__main__":
    main()
