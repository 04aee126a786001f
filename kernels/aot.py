"""Compile a kernel ahead of time, without a GPU, and read what the assembler made of it.

Triton ships NVIDIA's `ptxas` and `cuobjdump`, so registers, spills, shared memory and instructions of every entry of
the launch table are known before a GPU sees it. Tests hold the table to these facts.
"""
from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import schedule, tiles
from .pool_backward import pool_backward_kernel
from .pool_forward import pool_forward_kernel

_KERNELS = {"forward": pool_forward_kernel, "backward": pool_backward_kernel}
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_POINTERS = {"LENGTHS": "i32", "MASK": "i32", "G": "fp32", "H": "fp32", "DELTA": "fp32", "LSE": "fp32", "DC": "fp32"}
_POINTERS |= {"LOGITS": "fp32", "KAPPA": "fp32", "SIGMA": "fp32", "STATS": "fp32"}
_FLOATS = ("scale", "log2_scale", "eps")

# Per multiprocessor: (shared memory of all blocks, of one block, threads); every one has 65,536 registers.
LIMITS = {80: (167936, 166912, 2048), 90: (233472, 232448, 2048), 100: (233472, 232448, 2048)}


class Resources(NamedTuple):
    registers: int
    spill_bytes: int  # stack per thread
    shared_bytes: int
    blocks_per_sm: int
    instructions: dict[str, int]


def compile_kernel(
    kernel: str,
    capability: int,
    dtype: torch.dtype,
    views: int,
    width: int,
    key_width: int | None = None,
    *,
    masking: int = 0,
    norm: bool = False,
    persistent: bool = False,
    tile: tiles.Tile | None = None,
) -> Resources:
    """Compiles `kernel` ("forward" or "backward", all outputs) for sm_`capability` with its tile of the table."""
    separate = key_width is not None
    tile = tile or tiles.tile_for(kernel, (capability // 10, capability % 10), dtype, width, key_width, views, norm)
    constants = {
        **tile.constants(views, width, key_width or width),
        "SEPARATE": separate, "MASKING": masking, "GRAM": True, "NORM": norm, "UPCAST": False,
    }  # fmt: skip
    groups = tile.groups(views)
    if kernel == "forward":
        constants |= {"GROUPS": groups, "GRAM": 1 if groups == 1 else 2}
        constants |= {"PERSISTENT": persistent, "SAMPLES": schedule.MOST_SAMPLES, "HELD": 2}
    if kernel == "backward":
        precision = "ieee" if dtype == torch.float32 else "tf32"
        constants |= {"NEED_DX": True, "NEED_DK": separate, "H_PRECISION": precision}
    unused = [name for name, used in (("LENGTHS", masking == 1), ("MASK", masking == 2)) if not used]
    unused += [] if norm else ["KAPPA", "SIGMA", "STATS"]
    unused += [] if groups > 1 else ["LOGITS"]

    function = _KERNELS[kernel]
    constants |= {name: None for name in unused if name in function.arg_names}
    pointers = {**_POINTERS, "P": "fp32"} if norm else _POINTERS
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.isupper() and name not in ("B", "N"):
            signature[name] = f"*{pointers.get(name, _TYPES[dtype])}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
            if name.startswith("stride"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=tile.options())
    return _resources(compiled, capability, tile.num_warps)


def _resources(compiled, capability: int, num_warps: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = _cuobjdump("-res-usage", cubin.name), _cuobjdump("-sass", cubin.name)
    registers, stack = (int(value) for value in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    opcode = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)")
    counts = collections.Counter(match[1] for match in map(opcode.match, sass.splitlines()) if match)
    shared = compiled.metadata.shared
    all_blocks, _, threads = LIMITS[capability]
    per_warp = (registers * 32 + 255) // 256 * 256  # registers are handed out to warps in units of 256
    blocks = min(65536 // (per_warp * num_warps), all_blocks // (shared + 1024), threads // (32 * num_warps))
    return Resources(registers, stack, shared, blocks, dict(counts))


def _cuobjdump(flag: str, path: str) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
