"""The fused kernel inside a TensorRT engine: the node `mvam::MultiViewPool` as a quickly deployable plugin.

    register(90)                    before the ONNX file is parsed; the parser then takes the plugin for the node

The kernel is compiled to PTX while the engine is built (`mvam_fast.kernels.plugin_ptx`) and becomes a part of it:
whoever runs the engine needs neither Python nor Triton. A node has static N, M and D; the batch is the kernel's grid.
Nothing here runs without TensorRT; no engine has been built with it yet.
"""
# No `from __future__ import annotations`: TensorRT reads the annotations below as types.
import torch
from mvam_fast.export.pool_node import DOMAIN, NAME
from mvam_fast.export.trt_library import OLDEST, numbers

from mvam_fast._optional import require

ID = f"{DOMAIN}::{NAME}"
PORTABLE = 80  # whose PTX runs on every GPU from Ampere on, as engines for "ampere+" must

# What `register` was called with last; a process has one plugin of a name.
_target = {"capability": None}


def blocked(version: str) -> str:
    """Why a TensorRT of this version must not be used with the plugin; empty where nothing speaks against it."""
    if numbers(version) < OLDEST:
        return f"TensorRT {version} is older than 10.12, from which on plugins are supported here"
    if numbers(version)[:2] == (10, 14):
        return f"TensorRT {version}: quickly deployable plugins are broken in 10.14; use 10.13, or 10.15 and later"
    return ""


def caution(version: str) -> str:
    """What to know before using the plugin with a TensorRT of this version; empty where nothing is known."""
    if numbers(version) < (11, 1):
        return ""
    return (
        f"TensorRT {version}: 11.1 and 11.2.1 leak GPU memory each time that an execution context with a plugin gets "
        "another shape (NVIDIA/TensorRT#4849), and no later version is known to be free of it; give each batch size a "
        "context of its own"
    )


def register(capability: int, hardware_compatible: bool = False) -> None:
    """Makes the plugin known to TensorRT, for engines of compute capability 10·major + minor.

    `hardware_compatible`: for engines that run on any GPU from Ampere on. A second call changes the target of engines
    that are built afterwards. RuntimeError where this TensorRT must not be used, ImportError where there is none.
    """
    trt = require("tensorrt", extra="trt")
    reason = blocked(trt.__version__)
    if reason:
        raise RuntimeError(reason)
    from mvam_fast.kernels.plugin_ptx import PTX_VERSIONS  # here, because it needs Triton

    if capability not in PTX_VERSIONS:
        known = ", ".join(map(str, PTX_VERSIONS))
        raise ValueError(f"capability is {capability}; the plugin has PTX for {known}")
    trtp = require("tensorrt.plugin", extra="trt")
    if not hasattr(getattr(trtp.op, DOMAIN, None), NAME):
        _define(trt, trtp)
    _target["capability"] = PORTABLE if hardware_compatible else capability


def _define(trt, trtp) -> None:
    from mvam_fast.kernels.plugin_ptx import Ptx, plugin_ptx, tactics

    kinds = {
        trt.DataType.FLOAT: ("FP32", torch.float32),
        trt.DataType.HALF: ("FP16", torch.float16),
        trt.DataType.BF16: ("BF16", torch.bfloat16),
    }

    def compiled(tokens, codes, scale: float) -> dict[int, Ptx]:
        """By TensorRT's number of a tactic, which counts from 1."""
        if tokens.dtype not in kinds:
            raise ValueError(f"{ID} takes tokens in float32, float16 and bfloat16, not in {tokens.dtype}")
        dtype, (_, length, width), (views, _) = kinds[tokens.dtype][1], tokens.shape, codes.shape
        if min(views, length, width) < 1:
            raise ValueError(
                f"{ID}: tokens are {tuple(tokens.shape)} and codes {tuple(codes.shape)}; the batch alone may be free"
            )
        found, refused = {}, []
        for number, tactic in enumerate(tactics(dtype, views, width), 1):
            try:
                found[number] = plugin_ptx(_target["capability"], dtype, views, length, width, scale, tactic)
            except ValueError as error:  # more shared memory than a block has, at a width between the table's
                refused.append(str(error))
        if not found:
            raise ValueError("; ".join(refused))
        return found

    @trtp.register(ID)
    def describe(
        tokens: trtp.TensorDesc, codes: trtp.TensorDesc, mask: trtp.TensorDesc, scale: float
    ) -> trtp.TensorDesc:
        batch, _, width = tokens.shape_expr
        return trtp.from_shape_expr((batch, codes.shape_expr[0], width), dtype=tokens.dtype)

    @trtp.autotune(ID)
    def choices(
        tokens: trtp.TensorDesc,
        codes: trtp.TensorDesc,
        mask: trtp.TensorDesc,
        scale: float,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        wanted = list(compiled(tokens, codes, scale))
        name, _ = kinds[tokens.dtype]
        return [trtp.AutoTuneCombination(f"{name}, {name}, INT32, {name}", "LINEAR", wanted)]

    @trtp.aot_impl(ID)
    def implement(
        tokens: trtp.TensorDesc,
        codes: trtp.TensorDesc,
        mask: trtp.TensorDesc,
        scale: float,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        ptx = compiled(tokens, codes, scale)[tactic]
        launch = trtp.KernelLaunchParams()
        launch.grid_x = tokens.shape_expr[0] * ptx.groups
        launch.block_x = ptx.threads
        launch.shared_mem = ptx.shared_bytes
        return ptx.entry, ptx.text, launch, trtp.SymIntExprs(0)
