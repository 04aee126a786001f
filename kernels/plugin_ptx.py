"""`plugin_forward.py` as PTX for an engine that launches it without Triton: compiled, reduced to what the engine knows.

TensorRT passes inputs and outputs and nothing else, gives a block 48 KiB of shared memory (whether it would raise that
limit is not documented, and engines for any GPU from Ampere on may not), and assembles PTX itself, by its own version
of the assembler. So what Triton adds is taken away (two scratch pointers that nothing reads, debug information, which
holds paths), the PTX is of the oldest version that its GPU allows, and what is left is checked and assembled once here.
No GPU is needed.
"""
from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import launch_table, tiles
from .blocks import LOG2_E
from .plugin_forward import multi_view_pool_plugin

SHARED_LIMIT = 49152
# The oldest PTX version that has the target: what assembles it may be older than Triton. 9.0 and newer have variants
# ("sm_90a") that run on no other GPU; 8.0's PTX runs on every later one.
PTX_VERSIONS = {80: 78, 86: 78, 87: 78, 89: 78, 90: 80, 100: 86, 103: 88, 120: 87, 121: 88}
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_TENSORS = ("X", "C", "MASK", "P")


class Tactic(NamedTuple):
    """One way to run the kernel: see its constants MP, NW, STAGES and HELD."""

    views: int
    num_warps: int
    num_stages: int
    held: int


class Ptx(NamedTuple):
    entry: str
    text: str  # its parameters are pointers to tokens, codes, mask and output, in this order
    groups: int  # grid: (batch · groups, 1, 1)
    threads: int  # block: (threads, 1, 1)
    shared_bytes: int  # dynamic
    registers: int  # as Triton's assembler has it, like the next; the engine's may differ
    spill_bytes: int


# By bytes per element: tactics by the largest width that they serve. Where the mask is a tensor, one stage goes to its
# own loads: 3 stages buffer one tile, 5 load one ahead, and 1 takes tiles through registers. How much is held, and how
# many views share a read of the tokens, is what 48 KiB leave. At encoders' widths (384 … 1280) 16 views in half
# precision do not spill.
_TABLE = {
    2: {
        256: (Tactic(16, 4, 5, 2), Tactic(16, 4, 3, 2)),
        384: (Tactic(16, 8, 5, 2), Tactic(16, 4, 5, 2)),
        512: (Tactic(16, 8, 3, 2), Tactic(8, 8, 5, 2), Tactic(16, 4, 3, 2)),
        640: (Tactic(16, 4, 3, 2), Tactic(8, 8, 3, 2)),
        768: (Tactic(16, 16, 1, 1), Tactic(8, 8, 3, 2), Tactic(8, 4, 3, 2)),
        1152: (Tactic(16, 8, 1, 1), Tactic(4, 8, 3, 2), Tactic(8, 16, 1, 1)),
        1280: (Tactic(16, 8, 1, 1), Tactic(8, 8, 1, 1), Tactic(8, 16, 1, 1)),
        2048: (Tactic(16, 8, 1, 0), Tactic(8, 8, 1, 0)),
    },
    4: {
        384: (Tactic(16, 8, 1, 0), Tactic(8, 8, 1, 0)),
        512: (Tactic(8, 8, 1, 0), Tactic(4, 8, 1, 0)),
        640: (Tactic(16, 8, 1, 0), Tactic(8, 8, 1, 0)),
        2048: (Tactic(8, 8, 1, 0), Tactic(4, 8, 1, 0)),
    },
}


def tactics(dtype: torch.dtype, views: int, width: int) -> tuple[Tactic, ...]:
    """The table's tactics, with no more views to a program than there are; ValueError for what no kernel takes."""
    reason = tiles.obstacle("forward", None, dtype, width, None, views)
    if reason:
        raise ValueError(f"no plugin for these inputs: {reason}")
    rows = _TABLE[dtype.itemsize]
    padded = tiles.power_of_two(views)
    found = (tactic._replace(views=min(tactic.views, padded)) for tactic in rows[min(w for w in rows if width <= w)])
    return tuple(dict.fromkeys(found))


def constants(dtype: torch.dtype, views: int, length: int, width: int, scale: float, tactic: Tactic) -> dict:
    """The kernel's compile-time arguments; `scale` is the logits' own."""
    tile = _tile(dtype, tactic)
    sizes = tile.constants(views, width, width)
    kept = {name: sizes[name] for name in ("M", "MP", "D", "DW", "NC", "NW", "BN", "STAGES", "UPCAST")}
    return {**kept, "N": length, "GROUPS": tile.groups(views), "SCALE": scale * LOG2_E.value, "HELD": tactic.held}


def _tile(dtype: torch.dtype, tactic: Tactic) -> tiles.Tile:
    maxnreg = 255 if dtype == torch.float32 else None  # as in the launch table: else ptxas gives up on float32
    return tiles.Tile(
        "forward", dtype, launch_table.BLOCK_N, tactic.num_warps, tactic.num_stages, maxnreg, tactic.views
    )


@functools.cache
def plugin_ptx(
    capability: int, dtype: torch.dtype, views: int, length: int, width: int, scale: float, tactic: Tactic
) -> Ptx:
    """PTX for tokens [B,N,D] of `dtype` with N = `length`, D = `width`, M = `views`, and compute capability 10·major +
    minor. ValueError where the kernel does not fit a block's 48 KiB, RuntimeError where Triton's output is not what is
    assumed about it here."""
    if capability not in PTX_VERSIONS:
        known = ", ".join(f"{c // 10}.{c % 10}" for c in PTX_VERSIONS)
        raise ValueError(f"no plugin for compute capability {capability // 10}.{capability % 10}, only for {known}")
    if tiles.interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 replaces Triton's compiler, which the plugin needs: unset it")
    fixed = constants(dtype, views, length, width, scale, tactic)
    types = {name: f"*{_TYPES[dtype]}" for name in _TENSORS} | {"MASK": "*i32"}
    signature = {name: types.get(name, "constexpr") for name in multi_view_pool_plugin.arg_names}
    source = ASTSource(
        fn=multi_view_pool_plugin, signature=signature, constexprs=fixed,
        attrs={(position,): [["tt.divisibility", 16]] for position in range(len(_TENSORS))},
    )  # fmt: skip
    options = {**_tile(dtype, tactic).options(), "ptx_version": PTX_VERSIONS[capability]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata = compiled.metadata
    if metadata.shared > SHARED_LIMIT:
        raise ValueError(
            f"the plugin for {views} views of width {width} in {str(dtype)[6:]} needs {metadata.shared} bytes of "
            f"shared memory as {tactic}; a block of an engine has {SHARED_LIMIT}"
        )
    for name in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, name, 0):
            raise RuntimeError(f"Triton wants {getattr(metadata, name)} bytes of {name}, which an engine does not give")
    text = without_hidden_parameters(without_debug(compiled.asm["ptx"]), metadata.name, len(_TENSORS))
    threads = 32 * tactic.num_warps
    variant = "a" if capability >= 90 else ""
    for line in (f".target sm_{capability}{variant}", f".reqntid {threads}"):
        if not re.search(rf"^{re.escape(line)}$", text, re.MULTILINE):
            raise RuntimeError(f"Triton's PTX lacks the line {line!r}")
    return Ptx(metadata.name, text, fixed["GROUPS"], threads, metadata.shared, *assemble(text, capability))


def without_debug(text: str) -> str:
    """PTX without comments, line numbers and debug sections: they name files of the machine that compiled it."""
    text = re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{.*?\}", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"[ \t]*//.*", "", text)
    text = re.sub(r"^\s*\.(?:loc|file)\s.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def without_hidden_parameters(text: str, entry: str, wanted: int) -> str:
    """PTX whose only entry, `entry`, keeps its first `wanted` parameters; RuntimeError unless these are pointers and
    the others are never read."""
    entries = re.findall(r"\.entry\s+(\w+)", text)
    if entries != [entry]:
        raise RuntimeError(f"Triton's PTX has the entries {entries}, not {entry} alone")
    head = re.search(rf"\.entry\s+{entry}\(([^)]*)\)", text)
    parameters = [parameter.strip() for parameter in head[1].split(",")]
    types = [re.match(r"\.param \.u64(?: \.ptr)?(?: \.\w+)*(?: \.align \d+)? (\w+)$", p) for p in parameters]
    if len(types) < wanted or not all(types):
        raise RuntimeError(f"Triton's PTX has the parameters {parameters}; expected are pointers, {wanted} at least")
    for hidden in types[wanted:]:
        if re.search(rf"\b{hidden[1]}\b", text[head.end() :]):
            raise RuntimeError(f"Triton's PTX reads its hidden parameter {hidden[1]}, which an engine does not pass")
    kept = "".join(f"\n\t{parameter}," for parameter in parameters[:wanted])[:-1]
    return f"{text[: head.start(1)]}{kept}\n{text[head.end(1) :]}"


def assemble(text: str, capability: int) -> tuple[int, int]:
    """Registers, and spilled bytes, per thread, as Triton's ptxas has them; RuntimeError where it refuses the PTX."""
    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "plugin.ptx")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        done = subprocess.run(
            [tool, "-v", f"--gpu-name={target}", path, "-o", os.path.join(folder, "plugin.cubin")],
            capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"ptxas refuses the plugin's PTX: {done.stderr.strip().replace(folder, '')[-500:]}")
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    return registers, int(re.search(r"(\d+) bytes stack frame", done.stderr)[1])
