"""Which tile each kernel uses, and what stands in the way of one: the launch table, applied to the GPU at hand."""
from __future__ import annotations

import contextlib
import functools
import os
from typing import NamedTuple

import torch

from . import launch_table

KERNELS = ("forward", "backward")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 2048
MAX_VIEWS = 64


class Tile(NamedTuple):
    kernel: str
    dtype: torch.dtype
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None
    views: int  # views that a program holds: M padded to a power of two, or the size of a group

    def groups(self, views: int) -> int:
        """Programs that share out the views of a sample."""
        return -(-views // self.views)

    def constants(self, views: int, width: int, key_width: int) -> dict:
        """The kernel's compile-time sizes."""
        dw, chunks = chunking(width, self.num_warps)
        key_dw, key_chunks = chunking(key_width, self.num_warps)
        return {
            "M": views, "MP": self.views,
            "D": width, "DW": dw, "NC": chunks,
            "DK": key_width, "DKW": key_dw, "NCK": key_chunks,
            "NW": self.num_warps, "BN": self.block_n, "STAGES": self.num_stages,
            "UPCAST": interpreting() and self.dtype == torch.bfloat16,
        }  # fmt: skip

    def options(self) -> dict:
        """The launch options."""
        options = {"num_warps": self.num_warps}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs through its interpreter, which it decides once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def power_of_two(views: int) -> int:
    """The least power of two that holds so many views: axes of a kernel's tables are powers of two."""
    return 1 << (views - 1).bit_length()


def padded_views(kernel: str, views: int, wide: int) -> int:
    """Views of a program. The backward needs all of them (H mixes them), the forward takes at most 32 at a time."""
    padded = power_of_two(views)
    if kernel == "backward":
        return max(padded, 16)
    return min(padded, 32 if wide <= 1280 else 16)


def chunking(width: int, num_warps: int) -> tuple[int, int]:
    """(DW, NC): the widest slice per warp that needs no padding of D; 16 where every one does."""
    for dw in (64, 32, 16):
        if width % (num_warps * dw) == 0:
            return dw, width // (num_warps * dw)
    return 16, -(-width // (num_warps * 16))


def tile_for(
    kernel: str, capability, dtype: torch.dtype, width: int, key_width: int | None, views: int, norm: bool = False
) -> Tile:
    """The tile for `capability` (major, minor); None is the interpreter, which has no limits."""
    wide = max(width, key_width or 0)
    held = padded_views(kernel, views, wide)
    row = launch_table.row(kernel, capability, dtype, wide, held, norm)
    if key_width is not None and row.maxnreg == 128:  # two kinds of tiles do not fit the registers of two blocks
        row = row._replace(maxnreg=None)
    tile = Tile(kernel, dtype, launch_table.BLOCK_N, *row, held)
    while tile.num_stages > 2 and shared_bytes(tile, width, key_width) > shared_limit(capability):
        tile = tile._replace(num_stages=tile.num_stages - 1)
    return tile


def shared_bytes(tile: Tile, width: int, key_width: int | None) -> int:
    """Upper bound of the shared memory that the compiler asks for; a test holds it against what the compiler does.

    Codes (and, backward, dP) stay for the whole program, tiles of tokens (and keys) are buffered for the pipeline, S is
    reduced across warps, and the backward holds H and A.
    """
    element = tile.dtype.itemsize
    rows = tile.views
    padded = _padded(width, tile.num_warps)
    key_padded = 0 if key_width is None else _padded(key_width, tile.num_warps)
    scored = padded if key_width is None else key_padded
    backward = tile.kernel == "backward"
    kept = rows * (scored + (padded if backward else 0)) * element
    buffers = max(tile.num_stages - 1, 1) * tile.block_n * (padded + key_padded) * element
    across_warps = tile.num_warps * tile.block_n * 4
    scratch = across_warps * rows
    if tile.dtype == torch.float32:  # products run on the CUDA cores, with operands passed through shared memory
        scratch = across_warps * max((3 if backward else 2) * rows, chunking(scored, tile.num_warps)[0])
    if not backward:  # the layout that P is written in, once per sample
        scratch = max(scratch, tile.num_warps * rows * chunking(width, tile.num_warps)[0] * 4)
    tables = (rows * rows + rows * tile.block_n) * 4 if backward else 0
    return kept + buffers + scratch + tables + 256


def _padded(width: int, num_warps: int) -> int:
    per_warp, chunks = chunking(width, num_warps)
    return per_warp * chunks * num_warps


# Shared memory that one block may have, by compute capability (CUDA programming guide, table of compute capabilities).
_SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, 9: 227, 10: 227, 11: 227, 12: 99}


def shared_limit(capability) -> float:
    if capability is None:
        return float("inf")
    return _SHARED_KIB.get(tuple(capability), _SHARED_KIB.get(capability[0], 99)) * 1024


def choose(kernel: str, tokens: torch.Tensor, views: int, key_width: int | None, norm: bool = False) -> Tile:
    """The tile for these tokens [B,N,D]; ValueError where there is none."""
    return _choose(kernel, tokens.device, tokens.dtype, tokens.shape[2], key_width, views, norm)


def forget() -> None:
    """After a change of the launch table: tiles that were chosen before are chosen again."""
    _choose.cache_clear()


@contextlib.contextmanager
def forced(key: tuple, candidate: launch_table.Row):
    """While it lasts, `candidate` is the row for `key` (launch_table.KEY): how the tuner tries one."""
    launch_table.forced_rows[key] = candidate
    forget()
    try:
        yield
    finally:
        del launch_table.forced_rows[key]
        forget()


@functools.cache
def _choose(kernel: str, device: torch.device, dtype: torch.dtype, width: int, key_width, views: int, norm: bool):
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    reason = obstacle(kernel, capability, dtype, width, key_width, views, norm)
    if reason:
        raise ValueError(f"no {kernel} kernel for these inputs: {reason}")
    return tile_for(kernel, capability, dtype, width, key_width, views, norm)


def obstacle(
    kernel: str, capability, dtype: torch.dtype, width: int, key_width: int | None, views: int, norm: bool = False
) -> str:
    """Why this kernel (with a LayerNorm in front if `norm`) cannot run here with these inputs; empty if it can."""
    wide = max(width, key_width or 0)
    if dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if wide > MAX_WIDTH:
        return f"the kernels take widths up to {MAX_WIDTH}, not {wide}"
    if views > MAX_VIEWS:
        return f"the kernels take up to {MAX_VIEWS} views, not {views}"
    if capability is not None and capability[0] < 8:
        return f"the kernels need compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    tile = tile_for(kernel, capability, dtype, width, key_width, views, norm)
    need, limit = shared_bytes(tile, width, key_width), shared_limit(capability)
    if need > limit:
        return (
            f"{views} views of width {wide} in {str(dtype)[6:]} need {need // 1024} KiB of shared memory, "
            f"compute capability {capability[0]}.{capability[1]} has {limit // 1024}"
        )
    return ""


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The interpreter truncates float32 to bfloat16 where a GPU rounds: there the launcher rounds, afterwards."""
    return torch.float32 if interpreting() and dtype == torch.bfloat16 else dtype


def device_of(tensor: torch.Tensor):
    """Launch on the tensor's own GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
