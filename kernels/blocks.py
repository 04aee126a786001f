"""Building blocks of the kernels: a token tile in chunks, and the dot product they all use.

The width D is viewed as [NC, NW, DW] with NW = the number of warps: chunk k of a tile of BN tokens is [NW, BN, DW], and
in every batched `tl.dot` over it warp w owns slice w. So no warp reads another's part of the tile, S needs one
reduction across warps, and D needs no padding when it is a multiple of 16 NW.
"""
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, accumulator, UPCAST: tl.constexpr):
    """accumulator + a b, in float32. IEEE for float32 operands: TF32 would cost three digits."""
    if UPCAST:  # the interpreter multiplies the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def load_rows(
    base, rows, columns, stride, row_ok, WIDTH: tl.constexpr, PADDED: tl.constexpr, LAST: tl.constexpr = False
):
    """Chunk [NW, R, DW] of a row-major matrix; rows [R] that are not ok, and columns [NW,DW] ≥ WIDTH, are 0.

    LAST: the chunk is not read again, so caches may drop it.
    """
    pointers = base + rows[None, :, None] * stride + columns[:, None, :]
    ok = row_ok[None, :, None]
    if PADDED:
        ok = ok & (columns < WIDTH)[:, None, :]
    return tl.load(pointers, mask=ok, other=0.0, eviction_policy="evict_first" if LAST else "")


@triton.jit
def store_rows(base, rows, columns, stride, row_ok, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The store that matches `load_rows`, in the pointer's dtype."""
    pointers = base + rows[None, :, None] * stride + columns[:, None, :]
    ok = row_ok[None, :, None]
    if PADDED:
        ok = ok & (columns < WIDTH)[:, None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=ok)
