"""What the compiler makes of the launch table, without a GPU: registers, spills, shared memory, instructions, bytes.

    python benchmarks/kernel_report.py [--arch 80 90 100] [--dtypes bfloat16 ...] [--json FILE]

The floor time is bytes by formula over a given bandwidth (--gb-s): a bound, not a measurement.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from mvam_fast.kernels import aot, tiles
from tqdm import tqdm

from mvam_fast.files import write_json

WIDTHS = (384, 512, 640, 768, 1024, 1152, 1280, 2048)
VIEWS = (1, 8, 16, 32, 64)
BATCH, LENGTH = 1024, 197


def moved_bytes(kernel: str, element: int, views: int, width: int) -> int:
    """For 1,024 samples of 197 tokens. Forward: X, C, P, G, lse. Backward: X, C, dP, H, δ, lse read, dX, dC written."""
    tokens, table = BATCH * LENGTH * width * element, BATCH * views * width * element
    small = BATCH * (views * views + views) * 4
    codes = views * width * element
    if kernel == "forward":
        return tokens + codes + table + small
    return 2 * tokens + codes + table + small + BATCH * views * 4 + views * width * 4


def row_of(kernel: str, arch: int, dtype: torch.dtype, views: int, width: int, gb_s: float) -> dict:
    capability = (arch // 10, arch % 10)
    row = {"kernel": kernel, "arch": f"sm_{arch}", "dtype": str(dtype)[6:], "D": width, "M": views}
    reason = tiles.obstacle(kernel, capability, dtype, width, None, views)
    if reason:
        return {**row, "reason": reason}
    tile = tiles.tile_for(kernel, capability, dtype, width, None, views)
    found = aot.compile_kernel(kernel, arch, dtype, views, width)
    bytes_moved = moved_bytes(kernel, dtype.itemsize, views, width)

    def count(*families):
        return sum(n for name, n in found.instructions.items() if name.split(".")[0] in families)

    return {
        **row, "registers": found.registers, "spill_bytes": found.spill_bytes, "shared_bytes": found.shared_bytes,
        "blocks_per_sm": found.blocks_per_sm, "warps": tile.num_warps, "stages": tile.num_stages,
        "matrix_instructions": count("HMMA", "HGMMA", "UTCHMMA"), "asynchronous_loads": count("LDGSTS"),
        "loads": count("LDG"), "bytes": bytes_moved, "floor_us": bytes_moved / gb_s / 1e3,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    names = ("registers", "spill_bytes", "shared_bytes", "blocks_per_sm", "matrix_instructions", "asynchronous_loads")
    heads = ("registers", "spill B", "shared B", "blocks/SM", "matrix", "async loads")
    left = f"{'kernel':10}{'arch':8}{'dtype':10}{'D':>5}{'M':>4}"
    lines = [left + "".join(f"{head:>12}" for head in heads) + f"{'floor us':>11}"]
    for row in rows:
        left = f"{row['kernel']:10}{row['arch']:8}{row['dtype']:10}{row['D']:5}{row['M']:4}"
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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jobs = [
        (kernel, arch, names[dtype], views, width, options.gb_s)
        for kernel in tiles.KERNELS for arch in options.arch for dtype in options.dtypes
        for width in options.widths for views in options.views
    ]  # fmt: skip
    rows = [row_of(*job) for job in tqdm(jobs, unit="kernel", file=sys.stderr)]
    print(table(rows))
    if options.json:
        write_json(options.json, {"triton": aot.triton.__version__, "samples": BATCH, "tokens": LENGTH, "rows": rows})
        print(options.json)


if __name__ == "__main__":
    main()
