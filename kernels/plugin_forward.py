"""The forward as one kernel of four tensors, for engines that embed its PTX: P = softmax(scale · C Xᵀ) X, masked.

The math is that of `pool_forward.py`, whose kernel this calls with everything fixed that a graph fixes: contiguous
tensors, a mask, shared codes, one split, no Gram matrix and no lse. What TensorRT hands to a kernel is inputs, then
int32 numbers, then outputs; there are no numbers here, because N, M, D and the scale are compiled in and B is the grid.

    grid = (B · GROUPS, 1, 1)
"""
import triton
import triton.language as tl

from .pool_forward import pool_forward_kernel


@triton.jit
def multi_view_pool_plugin(
    X,  # [B, N, D]  tokens
    C,  # [M, D]     view codes
    MASK,  # [B, N]  int32, nonzero: the token takes part
    P,  # [B, M, D]  out: pooled views
    SCALE: tl.constexpr,  # of the logits, times log2(e)
    N: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    DW: tl.constexpr,
    NC: tl.constexpr,
    NW: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    HELD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pool_forward_kernel(
        X, None, C, None, MASK, P, None, None, None, None, None,
        B=0, N=N, span=(N + BN - 1) // BN * BN,
        stride_xb=N * D, stride_xn=D, stride_kb=0, stride_kn=0, stride_cb=0, stride_kappa=0,
        scale=SCALE, eps=0.0,
        M=M, MP=MP, GROUPS=GROUPS, D=D, DW=DW, NC=NC, DK=D, DKW=DW, NCK=NC, NW=NW, BN=BN, STAGES=STAGES,
        PERSISTENT=False, SAMPLES=1, SEPARATE=False, MASKING=2, GRAM=0, NORM=False, UPCAST=UPCAST, HELD=HELD,
    )  # fmt: skip
