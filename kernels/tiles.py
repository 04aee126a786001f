"""Launch table: which tile each kernel uses for an architecture, dtype, width and number of views.

Chosen ahead of time from what the compiler makes of it (registers, spills, shared memory: `aot.py`), not yet tuned on a
GPU; never tuned at run time, so that results and speed do not change between runs or between the ranks of a job.
"""
from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import torch

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

    def constants(self, views: int, width: int, key_width: int) -> dict:
        """The kernel's compile-time sizes."""
        dw, chunks = chunking(width, self.num_warps)
        key_dw, key_chunks = chunking(key_width, self.num_warps)
        return {
            "M": views, "MP": padded_views(self.kernel, views),
            "D": width, "DW": dw, "NC": chunks,
            "DK": key_width, "DKW": key_dw, "NCK": key_chunks,
            "NW": self.num_warps, "BN": self.block_n, "STAGES": self.num_stages,
            "UPCAST": interpreting() and self.dtype == torch.bfloat16,
        }  # fmt: skip

    def options(self) -> dict:
        """The launch options; the interpreter takes none of them."""
        if interpreting():
            return {}
        options = {"num_warps": self.num_warps}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def padded_views(kernel: str, views: int) -> int:
    padded = 1 << (views - 1).bit_length()
    return max(padded, 16) if kernel == "backward" else padded


def chunking(width: int, num_warps: int) -> tuple[int, int]:
    """(DW, NC): the widest slice per warp that needs no padding of D; 16 where every one does."""
    for dw in (64, 32, 16):
        if width % (num_warps * dw) == 0:
            return dw, width // (num_warps * dw)
    return 16, -(-width // (num_warps * 16))


def tile_for(
    kernel: str, capability, dtype: torch.dtype, width: int, key_width: int | None, views: int, norm: bool = False
) -> Tile:
    """The table. `capability` (major, minor) sets the shared memory there is; None is the interpreter, without limit.

    BN = 16 everywhere: registers grow with BN · D / NW, and 16 is the least that a product over tokens can take. Eight
    warps unless D is small, or so large that a forward with sixteen avoids spills and fills the multiprocessor better.
    Three stages keep one tile in flight while one is computed; two where shared memory is short.
    """
    wide = max(width, key_width or 0)
    num_warps = 8
    if wide <= 256 and views <= 16:
        num_warps = 4
    elif kernel == "forward" and views <= 16 and 768 < wide <= 1280 and dtype != torch.float32 and not norm:
        num_warps = 16
    # At 128 registers two blocks of eight warps share a multiprocessor; what fits without spills is told so.
    small = kernel == "forward" and views <= 16 and wide <= (384 if norm else 768) and key_width is None
    maxnreg = 128 if small and num_warps == 8 else None
    if dtype == torch.float32:  # left alone, ptxas gives up on the largest float32 kernels and spills all but 32
        maxnreg = 255
    tile = Tile(kernel, dtype, 16, num_warps, 3, maxnreg)
    if norm and kernel == "backward":  # registers are short: a shallower pipeline is what avoids spills
        tile = tile._replace(num_stages=1 if wide >= 1024 else 2)
    if shared_bytes(tile, width, key_width, views) > shared_limit(capability):
        tile = tile._replace(num_stages=min(tile.num_stages, 2))
    return tile


def shared_bytes(tile: Tile, width: int, key_width: int | None, views: int) -> int:
    """Upper bound of the shared memory that the compiler asks for; a test holds it against what the compiler does.

    Codes (and, backward, dP) stay for the whole program, tiles of tokens (and keys) are buffered for the pipeline, S is
    reduced across warps, and the backward holds H and A.
    """
    element = tile.dtype.itemsize
    rows = padded_views(tile.kernel, views)
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
    capability = torch.cuda.get_device_capability(tokens.device) if tokens.is_cuda else None
    reason = obstacle(kernel, capability, tokens.dtype, tokens.shape[2], key_width, views, norm)
    if reason:
        raise ValueError(f"no {kernel} kernel for these inputs: {reason}")
    return tile_for(kernel, capability, tokens.dtype, tokens.shape[2], key_width, views, norm)


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
    need, limit = shared_bytes(tile, width, key_width, views), shared_limit(capability)
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


def backward_programs(device: torch.device) -> int:
    """Programs of the backward: two per multiprocessor, a constant of the device so that sums repeat bit for bit."""
    if device.type == "cuda":
        return 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return 4
