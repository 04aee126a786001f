"""The Gram matrix when the views were shared out to several programs, from the logits that those have written:

    G = A Aᵀ        a_in = 2^(s_in − log2(e) lse_i), rounded as the forward rounds what it multiplies

The logits are 2M/D of the tokens' bytes (float32 beside half precision tokens), and are read once.
"""
import torch
import triton
import triton.language as tl

from . import tiles
from .blocks import LOG2_E, dot


@triton.jit
def group_gram_kernel(
    LOGITS,  # [B, M, N] float32, base 2, -inf where a token takes no part; unset beyond the length
    LENGTHS,  # [B] int32 or None
    LSE,  # [B, M] float32
    G,  # [B, M, M] out, float32
    N,
    M: tl.constexpr,
    MP: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,  # None, or the dtype that A is rounded to
    UPCAST: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    views = tl.arange(0, MP)
    view_ok = views < M
    lse = tl.load(LSE + b * M + views, mask=view_ok, other=float("inf")) * LOG2_E
    gram = tl.zeros([MP, MP], tl.float32)
    count = N
    if LENGTHS is not None:
        count = tl.minimum(tl.maximum(tl.load(LENGTHS + b), 0), N)
    for n0 in range(0, count, BN):
        n = n0 + tl.arange(0, BN)
        ok = view_ok[:, None] & (n < count)[None, :]
        s = tl.load(LOGITS + b * M * N + views[:, None] * N + n[None, :], mask=ok, other=float("-inf"))
        a = tl.where(s == float("-inf"), 0.0, tl.exp2(s - lse[:, None]))
        if HALF is not None:
            a = a.to(HALF)
        gram = dot(a, tl.trans(a), gram, UPCAST)
    pairs = view_ok[:, None] & view_ok[None, :]
    tl.store(G + b * M * M + views[:, None] * M + views[None, :], gram, mask=pairs)


_HALVES = {torch.float32: None, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def group_gram(logits, lengths, lse, dtype):
    """G [B,M,M] float32 from logits [B,M,N], lengths [B] int32 or None, lse [B,M]; `dtype` is that of the tokens."""
    batch, views, length = logits.shape
    gram = lse.new_empty(batch, views, views)
    group_gram_kernel[(batch,)](
        logits, lengths, lse, gram, length,
        M=views, MP=tiles.power_of_two(views), BN=32, HALF=_HALVES[dtype],
        UPCAST=tiles.interpreting() and dtype == torch.bfloat16,
    )  # fmt: skip
    return gram
