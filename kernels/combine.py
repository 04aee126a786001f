"""Puts the results of token splits together. Every token lies in one split, so there are no cross terms:

    lse_i = log Σ_s exp lse_si        w_si = exp(lse_si − lse_i)
    P_i = Σ_s w_si P_si               G_ij = Σ_s w_si w_sj G_sij

lse_si = +inf is a split without a valid token; it has no weight.
"""
import triton
import triton.language as tl

from . import tiles


@triton.jit
def combine_kernel(
    P_SPLIT,  # [B, S, M, D] float32
    G_SPLIT,  # [B, S, M, M] float32, GRAM
    LSE_SPLIT,  # [B, S, M]  float32
    P,  # [B, M, D] out
    G,  # [B, M, M] out, float32, GRAM
    LSE,  # [B, M]  out, float32
    D,
    S: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    BD: tl.constexpr,
    GRAM: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    views = tl.arange(0, MP)
    view_ok = views < M
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = view_ok[:, None] & (columns < D)[None, :]
    pairs = view_ok[:, None] & view_ok[None, :]

    top = tl.full([MP], float("-inf"), tl.float32)
    for s in range(S):
        lse = tl.load(LSE_SPLIT + (b * S + s) * M + views, mask=view_ok, other=float("inf"))
        top = tl.maximum(top, tl.where(lse == float("inf"), float("-inf"), lse))
    occupied = top > float("-inf")
    top = tl.where(occupied, top, 0.0)

    total = tl.zeros([MP], tl.float32)
    pooled = tl.zeros([MP, BD], tl.float32)
    gram = tl.zeros([MP, MP], tl.float32)
    for s in range(S):
        row = b * S + s
        lse = tl.load(LSE_SPLIT + row * M + views, mask=view_ok, other=float("inf"))
        w = tl.where(lse == float("inf"), 0.0, tl.exp(lse - top))
        total += w
        part = tl.load(P_SPLIT + row * M * D + views[:, None] * D + columns[None, :], mask=inside, other=0.0)
        pooled += w[:, None] * part
        if GRAM:
            part_gram = tl.load(G_SPLIT + row * M * M + views[:, None] * M + views[None, :], mask=pairs, other=0.0)
            gram += w[:, None] * w[None, :] * part_gram
    inverse = tl.where(occupied, 1.0 / tl.where(occupied, total, 1.0), 0.0)
    tl.store(
        P + b * M * D + views[:, None] * D + columns[None, :],
        (pooled * inverse[:, None]).to(P.dtype.element_ty), mask=inside,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        if GRAM:
            gram = gram * inverse[:, None] * inverse[None, :]
            tl.store(G + b * M * M + views[:, None] * M + views[None, :], gram, mask=pairs)
        lse = tl.where(occupied, top + tl.log(tl.where(occupied, total, 1.0)), float("inf"))
        tl.store(LSE + b * M + views, lse, mask=view_ok)


def combine_splits(pooled, gram, lse, dtype):
    """P [B,M,D] in `dtype`, G [B,M,M] (None without `gram`), lse [B,M] of pooled [B,S,M,D], gram and lse likewise."""
    batch, splits, views, width = pooled.shape
    padded = tiles.power_of_two(views)
    block = 128 if padded <= 32 else 64
    out = pooled.new_empty(batch, views, width, dtype=dtype)
    gram_out = None if gram is None else gram.new_empty(batch, *gram.shape[2:])
    lse_out = lse.new_empty(batch, views)
    combine_kernel[(batch, triton.cdiv(width, block))](
        pooled, gram, lse, out, gram_out, lse_out, width,
        S=splits, M=views, MP=padded, BD=block, GRAM=gram is not None and gram.numel() > 0,
    )  # fmt: skip
    return out, gram_out, lse_out
