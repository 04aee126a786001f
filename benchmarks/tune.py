"""Measures the candidates of the launch table on the GPU at hand and writes the rows that won.

    python benchmarks/tune.py --out table.json [--widths 768 ...] [--views 16] [--dtypes bfloat16] [--norm]
    MVAM_LAUNCH_TABLE=table.json python train.py

Opt-in: nothing is tuned at run time. A candidate counts only if its results are those of the table's own row to within
rounding. The file says what it was measured on, and is refused on another GPU. What was measured before is kept, so an
interrupted run goes on where it stopped.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from mvam_fast.kernels import launch_table, pool_backward, pool_forward, tiles
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from timing import Clock  # noqa: E402

from mvam_fast.files import write_json

CANDIDATES = [
    launch_table.Row(warps, stages, cap)
    for warps, stages, cap in [
        (4, 3, None), (4, 2, None), (8, 2, None), (8, 3, None), (8, 4, None), (8, 2, 128), (8, 3, 128), (8, 4, 128),
        (8, 1, None), (16, 2, None), (16, 3, None), (16, 4, None),
    ]
]  # fmt: skip
LENGTH = 197
TOKEN_BYTES = 300e6  # beyond every L2 cache


def steps(dtype: torch.dtype, width: int, views: int, norm: bool, device: torch.device) -> dict:
    """kernel → a function that runs it and returns its results, on inputs of some 300 MB."""
    batch = max(int(TOKEN_BYTES / (LENGTH * width * dtype.itemsize)), 1) if device.type == "cuda" else 2
    tokens = torch.randn(batch, LENGTH, width, device=device, dtype=dtype)
    codes = torch.randn(views, width, device=device, dtype=dtype)
    kappa = codes.float().sum(-1) if norm else None
    scale, eps = width**-0.5, 1e-5

    def forward():
        return pool_forward.pool_forward(tokens, codes, None, None, None, scale, True, kappa, eps)

    pooled, gram, lse, stats = forward()
    d_pooled, symmetric = torch.randn_like(pooled), torch.randn_like(gram)
    delta = (d_pooled.float() * pooled.float()).sum(-1) + (symmetric * gram).sum(-1)
    sigma = d_pooled.float().sum(-1) if norm else None

    def backward():
        return pool_backward.pool_backward(
            d_pooled, symmetric, delta, tokens, codes, None, None, None, lse, scale, True, False, kappa, sigma, stats
        )

    return {"forward": forward, "backward": backward}


def measure(kernel: str, step, own: launch_table.Row, key: tuple, clock: Clock, seconds: float) -> dict:
    """The fastest candidate as a row of the table, with every candidate's median or the reason it has none."""
    expected = [t.float() for t in step() if t is not None and t.numel()]
    tried = []
    for candidate in dict.fromkeys([own, *CANDIDATES]):
        with tiles.forced(key, candidate):
            about = candidate._asdict()
            try:
                found = [t.float() for t in step() if t is not None and t.numel()]
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))
                median = statistics.median(clock.block_ms(step, seconds=seconds))
                tried.append({**about, "median_ms": median})
            except Exception as error:  # does not compile, does not fit, is wrong: the others are still measured
                tried.append({**about, "median_ms": math.inf, "reason": str(error).strip().splitlines()[0][:150]})
    best = min(tried, key=lambda one: one["median_ms"])
    for one in tried:  # JSON has no infinity
        one["median_ms"] = None if math.isinf(one["median_ms"]) else one["median_ms"]
    row = {name: best[name] for name in launch_table.Row._fields}
    return {**dict(zip(launch_table.KEY, key, strict=True)), **row, "tried": tried}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = {str(dtype)[6:]: dtype for dtype in tiles.DTYPES}
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtypes", nargs="+", choices=names, default=["bfloat16"])
    parser.add_argument("--widths", nargs="+", type=int, default=[384, 512, 640, 768, 1024, 1152, 1280])
    parser.add_argument("--views", nargs="+", type=int, default=[16])
    parser.add_argument("--norm", action="store_true", help="the kernels with a LayerNorm in front, instead of without")
    parser.add_argument("--seconds", type=float, default=0.2, help="per candidate (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.dtypes = [names[name] for name in options.dtypes]
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available() and not tiles.interpreting():
        sys.exit("tune.py measures on a GPU, and there is none here")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = {"device": launch_table.device_name(), "torch": torch.__version__, "rows": []}
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if before["device"] != table["device"]:
            sys.exit(f"{options.out} was measured on {before['device']}, this is {table['device']}; name another file")
        table["rows"] = before["rows"]
    clock = Clock(device)
    done = {tuple(row[n] for n in launch_table.KEY) for row in table["rows"]}
    cases = [(dtype, width, views) for dtype in options.dtypes for width in options.widths for views in options.views]
    for dtype, width, views in tqdm(cases, unit="case", file=sys.stderr):
        capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
        for kernel, step in steps(dtype, width, views, options.norm, device).items():
            held = tiles.padded_views(kernel, views, width)
            key = (kernel, options.norm, str(dtype)[6:], width, held)
            if key in done:
                continue
            own = launch_table.row(kernel, capability, dtype, width, held, options.norm)
            table["rows"].append(measure(kernel, step, own, key, clock, options.seconds))
            write_json(options.out, table)
            best = table["rows"][-1]
            print(f"{kernel:9} D={width:<5} M<={held:<3} {str(dtype)[6:]:9} {own} -> "
                  f"{launch_table.Row(*(best[n] for n in launch_table.Row._fields))}")  # fmt: skip
    print(options.out)


if __name__ == "__main__":
    main()
