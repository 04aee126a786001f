"""What the compiler makes of the launch table, without a GPU: registers, spills, shared memory, instructions, bytes.

    python benchmarks/kernel_report.py [--arch 80 90 100] [--dtypes bfloat16 ...] [--out FOLDER]

Kernels: forward, forward-persistent (its layout for short samples), backward, each also with a LayerNorm in front.
The views are the upper ends of the table's rows; fewer views take the same row. The floor time is bytes by formula over
a given bandwidth (--gb-s): a bound, not a measurement.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from mvam_fast.kernels import aot, tiles
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import results  # noqa: E402
from machine import machine  # noqa: E402

WIDTHS = (384, 512, 640, 768, 1024, 1152, 1280, 2048)
VIEWS = (16, 32, 64)
KERNELS = ("forward", "forward-persistent", "backward")
BATCH, LENGTH = 1024, 197


def moved_bytes(
    kernel: str, element: int, views: int, width: int, norm: bool, batch: int = BATCH, length: int = LENGTH
) -> int:
    """In HBM, each byte once.

    Forward: X, C read, P, G, lse written. Backward: X, C, dP, H, δ, lse read, dX, dC written. With a LayerNorm P is
    float32 and two statistics per token are written forward, read backward. With views in groups (M > 32) the logits
    are written and read once.
    """
    tokens, codes = batch * length * width * element, views * width * element
    table = batch * views * width
    small = batch * (views * views + views) * 4 + (batch * length * 8 if norm else 0)
    if kernel == "backward":
        return 2 * tokens + codes + table * element + small + batch * views * 4 + views * width * 4
    logits = 2 * batch * views * length * 4 if views > 32 else 0
    return tokens + codes + table * (4 if norm else element) + small + logits


def row_of(job: tuple) -> dict:
    name, norm, arch, dtype, views, width, gb_s = job
    kernel, _, layout = name.partition("-")
    capability = (arch // 10, arch % 10)
    row = {"kernel": name, "norm": norm, "arch": f"sm_{arch}", "dtype": str(dtype)[6:], "D": width, "M": views}
    reason = tiles.obstacle(kernel, capability, dtype, width, None, views, norm)
    if reason:
        return {**row, "reason": reason}
    tile = tiles.tile_for(kernel, capability, dtype, width, None, views, norm)
    found = aot.compile_kernel(kernel, arch, dtype, views, width, norm=norm, persistent=bool(layout))
    bytes_moved = moved_bytes(kernel, dtype.itemsize, views, width, norm)

    def count(*families):
        return sum(n for name, n in found.instructions.items() if name.split(".")[0] in families)

    return {
        **row, "registers": found.registers, "spill_bytes": found.spill_bytes, "shared_bytes": found.shared_bytes,
        "blocks_per_sm": found.blocks_per_sm, "warps": tile.num_warps, "stages": tile.num_stages,
        "maxnreg": tile.maxnreg, "programs_per_sample": tile.groups(views),
        "matrix_instructions": count("HMMA", "HGMMA", "UTCHMMA"), "asynchronous_loads": count("LDGSTS"),
        "loads": count("LDG"), "bytes": bytes_moved, "floor_us": bytes_moved / gb_s / 1e3,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    names = ("registers", "spill_bytes", "shared_bytes", "blocks_per_sm", "matrix_instructions", "asynchronous_loads")
    heads = ("registers", "spill B", "shared B", "blocks/SM", "matrix", "async loads")
    left = f"{'kernel':24}{'arch':8}{'dtype':10}{'D':>5}{'M':>4}"
    lines = [left + "".join(f"{head:>12}" for head in heads) + f"{'floor us':>11}"]
    for row in rows:
        name = row["kernel"] + (" + norm" if row["norm"] else "")
        left = f"{name:24}{row['arch']:8}{row['dtype']:10}{row['D']:5}{row['M']:4}"
        if "reason" in row:
            lines.append(f"{left}   none: {row['reason']}")
        else:
            lines.append(left + "".join(f"{row[name]:12}" for name in names) + f"{row['floor_us']:11.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = {str(dtype)[6:]: dtype for dtype in tiles.DTYPES}
    parser.add_argument("--arch", nargs="+", type=int, choices=sorted(aot.LIMITS), default=sorted(aot.LIMITS))
    parser.add_argument("--dtypes", nargs="+", choices=names, default=list(names))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--views", nargs="+", type=int, default=list(VIEWS))
    parser.add_argument("--gb-s", type=float, default=4300, help="bandwidth of the floor time (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write kernel_report.json into")
    options = parser.parse_args()
    about = {**machine(torch.device("cpu")), "device": "compiler only", "kind": "static"}
    jobs = [
        (kernel, norm, arch, names[dtype], views, width, options.gb_s)
        for kernel in KERNELS for norm in (False, True) for arch in options.arch for dtype in options.dtypes
        for width in options.widths for views in options.views
        if views == 16 or kernel != "forward-persistent"  # the layout is for every M, its cost is known from one
    ]  # fmt: skip
    # Processes that start afresh: a fork of one that holds torch's threads may stop for ever.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        rows = list(tqdm(pool.map(row_of, jobs, chunksize=4), total=len(jobs), unit="kernel", file=sys.stderr))
    print(table(rows))
    if options.out:
        settings = {"samples": BATCH, "tokens": LENGTH, "gb_s": options.gb_s}
        result = {"machine": about, "settings": settings, "complete": True, "rows": rows}
        results.write(options.out / "kernel_report.json", "kernel_report", result)
        print(options.out / "kernel_report.json")


if __name__ == "__main__":
    main()
