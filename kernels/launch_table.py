"""The launch table: architecture family × kernel × LayerNorm × element size × views × width → warps, stages, registers.

Chosen ahead of time from what the compiler makes of each row (`benchmarks/kernel_report.py` prints that), never tuned
at run time, so that results and speed do not change between runs or between the ranks of a job. Reasons:

BN = 16 everywhere: registers grow with BN · D / NW, and 16 is the least that a product over tokens can take.
Stages: 3 keep one tile in flight while one is computed. The backward with a LayerNorm has no registers left for that.
128 registers: with these, two blocks of eight warps share a multiprocessor. 255 for float32: left alone, ptxas gives
up on the largest of those kernels and spills all but 32.

A row measured on the GPU at hand takes precedence: `benchmarks/tune.py` writes a file of them, the environment variable
MVAM_LAUNCH_TABLE names it.
"""
from __future__ import annotations

import functools
import json
import os
from typing import NamedTuple

import torch

BLOCK_N = 16


class Row(NamedTuple):
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# What a row that was measured is known by.
KEY = ("kernel", "norm", "dtype", "D", "views")
# Rows that a tuner is trying: these come first.
forced_rows: dict[tuple, Row] = {}
# (kernel, with LayerNorm, bytes per element, views up to): rows by the largest width that they serve.
_TABLE = {
    ("forward", False, 2, 16): {256: Row(4, 3), 768: Row(8, 3, 128), 1280: Row(16, 3), 2048: Row(8, 3)},
    ("forward", False, 2, 32): {2048: Row(8, 3)},
    ("forward", False, 4, 16): {256: Row(4, 3, 255), 2048: Row(8, 3, 255)},
    ("forward", False, 4, 32): {2048: Row(8, 3, 255)},
    ("forward", True, 2, 16): {256: Row(4, 3), 512: Row(16, 3), 2048: Row(8, 3)},
    ("forward", True, 2, 32): {2048: Row(8, 3)},
    ("forward", True, 4, 16): {256: Row(4, 3, 255), 2048: Row(8, 3, 255)},
    ("forward", True, 4, 32): {2048: Row(8, 3, 255)},
    ("backward", False, 2, 16): {256: Row(4, 3), 2048: Row(8, 3)},
    ("backward", False, 2, 64): {2048: Row(8, 3)},
    ("backward", False, 4, 16): {256: Row(4, 3, 255), 2048: Row(8, 3, 255)},
    ("backward", False, 4, 64): {2048: Row(8, 3, 255)},
    ("backward", True, 2, 16): {256: Row(4, 2), 1023: Row(8, 2), 2048: Row(8, 1)},
    ("backward", True, 2, 64): {1023: Row(8, 2), 2048: Row(8, 1)},
    ("backward", True, 4, 16): {256: Row(4, 2, 255), 1023: Row(8, 2, 255), 2048: Row(8, 1, 255)},
    ("backward", True, 4, 64): {1023: Row(8, 2, 255), 2048: Row(8, 1, 255)},
}
# Where a family's compiler does better with another row: (family, kernel, with LayerNorm, bytes, views up to, width).
_FAMILY = {
    (80, "backward", False, 2, 16, 384): Row(16, 3),
    (80, "backward", True, 2, 16, 512): Row(8, 1),
    (80, "backward", True, 2, 16, 768): Row(8, 1),
}
# Of the widths encoders have, at up to 16 views in half precision, these spill, up to so many bytes per thread, on one
# architecture or with a mask: they want more than the 255 registers there are (the forward at 768: than the 128 that
# let two blocks share a multiprocessor). A shallower pipeline avoids it, at the price of not loading ahead.
SPILLS = {
    ("forward", False, 768): 8,
    ("forward", True, 1024): 40,
    ("forward", True, 1280): 32,
    ("backward", False, 1024): 64,
    ("backward", False, 1152): 16,
    ("backward", False, 1280): 32,
    ("backward", True, 1280): 8,
}


def family(capability) -> int:
    """The architecture whose rows serve a GPU: 80 (Ampere, Ada), 90 (Hopper), 100 (Blackwell)."""
    major = 9 if capability is None else capability[0]
    return {8: 80, 9: 90}.get(major, 100)


def row(kernel: str, capability, dtype: torch.dtype, width: int, views: int, norm: bool) -> Row:
    """The row for tokens (and keys) of at most this width, and a program that holds `views` views."""
    key = (kernel, norm, str(dtype)[6:], width, views)
    found = forced_rows.get(key) or _measured(os.environ.get("MVAM_LAUNCH_TABLE")).get(key)
    if found is not None:
        return found
    by_views = [key for key in _TABLE if key[:3] == (kernel, norm, dtype.itemsize) and views <= key[3]]
    key = min(by_views, key=lambda key: key[3])
    bound = min(bound for bound in _TABLE[key] if width <= bound)
    return _FAMILY.get((family(capability), *key, width), _TABLE[key][bound])


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


@functools.cache
def _measured(path: str | None) -> dict[tuple, Row]:
    """The rows of a file that `benchmarks/tune.py` wrote; {} without one. A file of another GPU is an error."""
    if not path:
        return {}
    with open(path, encoding="utf-8") as file:
        table = json.load(file)
    if table["device"] != device_name():
        raise ValueError(
            f"MVAM_LAUNCH_TABLE={path} was measured on {table['device']}, this is {device_name()}; tune again here"
        )
    return {
        tuple(row[name] for name in KEY): Row(*(row[name] for name in Row._fields)) for row in table["rows"]
    }
