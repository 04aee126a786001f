"""The fused kernel inside packages that AOTInductor compiles for a GPU: a PyTorch operator whose body is the launch.

`triton_op` lets the compiler look into the operator, so that the kernel itself ends up in the package and nothing of
Triton or Python is needed to run it. The layout of the work must not depend on the batch size, which is free there:
one program per sample and group of views, as in TensorRT's plugin, with the launch table's tile.
"""
from __future__ import annotations

import torch
from mvam_fast.export.pool_node import int_mask
from mvam_fast.kernels import tiles
from mvam_fast.kernels.blocks import LOG2_E
from mvam_fast.kernels.plugin_forward import multi_view_pool_plugin
from torch import Tensor
from torch.library import triton_op, wrap_triton


def launch(kernel, tokens: Tensor, codes: Tensor, mask: Tensor, scale: float) -> Tensor:
    """P [B,M,D] of tokens [B,N,D], codes [M,D] and mask [B,N] int32, all contiguous, by `kernel[grid](...)`.

    The launch table's limit of registers is not among the options that the compiler passes on.
    """
    batch, length, width = tokens.shape
    views = codes.shape[0]
    tile = tiles.choose("forward", tokens, views, None)
    pooled = torch.empty(batch, views, width, dtype=tiles.output_dtype(tokens.dtype), device=tokens.device)
    sizes = tile.constants(views, width, width)
    constants = {name: sizes[name] for name in ("M", "MP", "D", "DW", "NC", "NW", "BN", "STAGES", "UPCAST")}
    kernel[(batch * tile.groups(views), 1, 1)](
        tokens, codes, mask, pooled, SCALE=scale * LOG2_E.value, N=length, GROUPS=tile.groups(views), HELD=2,
        **constants, num_warps=tile.num_warps,
    )  # fmt: skip
    return pooled.to(tokens.dtype)


@triton_op("mvam::graph_pool", mutates_args={})
def graph_pool(tokens: Tensor, codes: Tensor, mask: Tensor, scale: float) -> Tensor:
    return launch(wrap_triton(multi_view_pool_plugin), tokens, codes, mask, scale)


class TritonForm:
    """A form for `dispatch.exporting_as`. `found` lists what became of each pooling: "triton", or why not."""

    def __init__(self):
        self.found: list[str] = []

    def __call__(self, tokens: Tensor, codes: Tensor, valid: Tensor | None, scale: float) -> Tensor | None:
        capability = torch.cuda.get_device_capability(tokens.device)
        reason = tiles.obstacle("forward", capability, tokens.dtype, tokens.shape[2], None, codes.shape[0])
        if reason:
            self.found.append(f"plain operators: {reason}")
            return None
        self.found.append("triton")
        return graph_pool(tokens.contiguous(), codes.contiguous(), int_mask(tokens, valid).contiguous(), scale)
