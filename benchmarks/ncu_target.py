"""What Nsight Compute looks at: one forward and one backward of the op, between the marks that it waits for.

    python benchmarks/ncu_target.py SHAPE [--norm]

Prints, as its last line, what the two launches move by the formula. Not yet run on a GPU.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from kernel_report import moved_bytes  # noqa: E402
from shapes import SHAPES  # noqa: E402

from mvam_fast import multi_view_pool  # noqa: E402

VIEWS, DTYPE, TOKEN_BYTES = 16, torch.bfloat16, 300e6  # beyond every L2 cache


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--norm", action="store_true", help="with a LayerNorm in front")
    options = parser.parse_args(arguments)
    length, width = SHAPES[options.shape]
    batch = int(TOKEN_BYTES / (length * width * DTYPE.itemsize))
    leaves = {"tokens": torch.randn(batch, length, width, device="cuda", dtype=DTYPE)}
    leaves["codes"] = torch.randn(VIEWS, width, device="cuda", dtype=DTYPE)
    if options.norm:
        leaves |= {"norm_weight": torch.ones(width, device="cuda"), "norm_bias": torch.zeros(width, device="cuda")}
    for leaf in leaves.values():
        leaf.requires_grad_()

    def step(marked: bool):
        if marked:
            torch.cuda.profiler.start()
        outputs = multi_view_pool(**leaves, backend="triton")
        torch.autograd.grad(outputs, list(leaves.values()), [torch.randn_like(output) for output in outputs])
        torch.cuda.synchronize()
        if marked:
            torch.cuda.profiler.stop()

    for _ in range(3):  # compiles
        step(False)
    step(True)
    by_formula = {
        kernel: moved_bytes(kernel, DTYPE.itemsize, VIEWS, width, options.norm, batch, length)
        for kernel in ("forward", "backward")
    }
    case = {"shape": options.shape, "batch": batch, "views": VIEWS, "dtype": str(DTYPE)[6:], "norm": options.norm}
    print(json.dumps({"case": case, "bytes_by_formula": by_formula}))


if __name__ == "__main__":
    main()
