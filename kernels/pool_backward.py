"""Backward of multi-view attention pooling: one read of the tokens, one write of their gradient, no atomics.

Given dP, H = dG + dGᵀ and δ_i = ⟨dP_i, P_i⟩ + Σ_j H_ij G_ij (tiny, computed before the launch), per tile of tokens:

    a_in  = exp(s_in − lse_i)                    recomputed; 0 where token n takes no part
    t_in  = ⟨dP_i, x_n⟩
    da    = t + H a
    ds    = scale · a ∘ (da − δ)
    dX_n  = Σ_i a_in dP_i  (+ Σ_i ds_in c_i when the keys are the tokens, else that is dK_n)
    dC_i += Σ_n ds_in k_n

With a LayerNorm in front (NORM; see the forward) codes and gradient come folded, c' = γ ∘ c and p' = γ ∘ dP, with
κ_i = Σ_d c'_id and σ_i = Σ_d p'_id, and P̂ stands for P in δ. Then s and t are taken of x̂ as in the forward, and

    h_n  = Σ_i a_in p'_i + ds_in c'_i                              the gradient of x̂_n
    u_n  = Σ_i a_in σ_i + ds_in κ_i = Σ_d h_nd                     v_n = Σ_i a_in t_in + ds_in s_in = ⟨h_n, x̂_n⟩
    dX_n = r_n (h_n − u_n / D − x̂_n v_n / D)                       dC'_i = Σ_n ds_in x̂_n

so that the LayerNorm's own two reductions over D come from the small tables.

A program walks over samples pid, pid + programs, ... and keeps dC in registers; the partial sums [programs, M, DK] are
then added in a fixed order, so results repeat bit for bit. With per-sample codes there is one program per sample and
its partial sum is that sample's gradient. For few samples several programs share a sample's tokens (`schedule.py`):
dX needs nothing more then, dC has more partial sums.
"""
import functools

import torch
import triton
import triton.language as tl

from . import schedule, tiles
from .blocks import LOG2_E, dot, load_rows, store_rows
from .launch import Configuration, Launcher
from .pool_forward import masking, rows_contiguous


@triton.jit
def pool_backward_kernel(
    X,  # [B, N, D]   tokens
    K,  # [B, N, DK]  keys; X itself when not SEPARATE
    C,  # [M, DK] or [B, M, DK]  view codes, contiguous
    LENGTHS,  # [B] int32, MASKING == 1
    MASK,  # [B, N] int32, MASKING == 2, contiguous
    DP,  # [B, M, D]  gradient of the pooled views, contiguous
    H,  # [B, M, M]   dG + dGᵀ, float32, contiguous; GRAM only
    DELTA,  # [B, M]  float32
    LSE,  # [B, M]    float32
    KAPPA,  # [M] or [B, M]  float32, NORM
    SIGMA,  # [B, M]  float32, NORM
    STATS,  # [B, N, 2]  m and r, float32, NORM
    DX,  # [B, N, D]  out, contiguous
    DKEYS,  # [B, N, DK]  out when SEPARATE, contiguous
    DC,  # [programs, splits, M, DK]  out: partial sums, float32
    B,
    N,
    span,  # tokens per split, a multiple of BN
    stride_xb, stride_xn,
    stride_kb, stride_kn,
    stride_cb,  # 0 when the codes are shared
    stride_kappa,  # likewise
    scale,
    log2_scale,  # scale · log2(e)
    M: tl.constexpr,
    MP: tl.constexpr,  # M padded to a power of two ≥ 16: views are the inner dimension of two products
    D: tl.constexpr,
    DW: tl.constexpr,
    NC: tl.constexpr,
    DK: tl.constexpr,
    DKW: tl.constexpr,
    NCK: tl.constexpr,
    NW: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    SEPARATE: tl.constexpr,
    MASKING: tl.constexpr,
    GRAM: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DK: tl.constexpr,
    NORM: tl.constexpr,
    UPCAST: tl.constexpr,
    H_PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    zero = pid.to(tl.int64) * 0
    part = zero + pid * tl.num_programs(1) + tl.program_id(1)
    first = tl.program_id(1) * span
    views = tl.arange(0, MP)
    view_ok = views < M
    pairs = view_ok[:, None] & view_ok[None, :]
    columns = tl.arange(0, NW)[:, None] * DW + tl.arange(0, DW)[None, :]
    key_columns = tl.arange(0, NW)[:, None] * DKW + tl.arange(0, DKW)[None, :]
    dtype: tl.constexpr = X.dtype.element_ty

    codes = ()
    d_codes = ()
    for k in tl.static_range(NCK):
        # Per-sample codes come with one program per sample, so pid is the sample.
        codes = codes + (
            load_rows(
                C + (zero + pid) * stride_cb, views, k * NW * DKW + key_columns, DK, view_ok, DK, NCK * NW * DKW != DK
            ),
        )
        d_codes = d_codes + (tl.zeros([NW, MP, DKW], tl.float32),)
    if NORM:
        kappa = tl.load(KAPPA + pid * stride_kappa + views, mask=view_ok, other=0.0)
        offset_parts = tl.zeros([MP, BN], tl.float32)  # Σ ds r m, to be taken off dC'

    for sample in tl.range(pid, B, tl.num_programs(0), num_stages=1):
        b = zero + sample
        delta = tl.load(DELTA + b * M + views, mask=view_ok, other=0.0)
        # Padded views get lse = +inf: their attention is 0 and so is all that follows from it.
        lse = tl.load(LSE + b * M + views, mask=view_ok, other=float("inf")) * LOG2_E
        if NORM:
            sigma = tl.load(SIGMA + b * M + views, mask=view_ok, other=0.0)
        if GRAM:
            h = tl.load(H + b * M * M + views[:, None] * M + views[None, :], mask=pairs, other=0.0)
        d_pooled = ()
        for k in tl.static_range(NC):
            d_pooled = d_pooled + (
                load_rows(DP + b * M * D, views, k * NW * DW + columns, D, view_ok, D, NC * NW * DW != D),
            )
        count = N
        if MASKING == 1:
            count = tl.minimum(tl.maximum(tl.load(LENGTHS + b), 0), N)
        # Over all tokens of the split, since those that take no part need their zeros written; they are not read.
        for n0 in tl.range(first, tl.minimum(first + span, N), BN, num_stages=STAGES):
            n = tl.arange(0, BN)
            inside = n0 + n < N
            ok = n0 + n < count
            if MASKING == 2:
                ok = tl.load(MASK + b * N + n0 + n, mask=ok, other=0) != 0
            x_tile = X + b * stride_xb + (zero + n0) * stride_xn
            k_tile = K + b * stride_kb + (zero + n0) * stride_kn
            xs = ()
            keys = ()
            s3 = tl.zeros([NW, MP, BN], tl.float32)
            t3 = tl.zeros([NW, MP, BN], tl.float32)
            for k in tl.static_range(NC):
                x = load_rows(x_tile, n, k * NW * DW + columns, stride_xn, ok, D, NC * NW * DW != D)
                xs = xs + (x,)
                t3 = dot(d_pooled[k], tl.permute(x, 0, 2, 1), t3, UPCAST)
                if not SEPARATE:
                    s3 = dot(codes[k], tl.permute(x, 0, 2, 1), s3, UPCAST)
            if SEPARATE:
                for k in tl.static_range(NCK):
                    key = load_rows(k_tile, n, k * NW * DKW + key_columns, stride_kn, ok, DK, NCK * NW * DKW != DK)
                    keys = keys + (key,)
                    s3 = dot(codes[k], tl.permute(key, 0, 2, 1), s3, UPCAST)
            else:
                keys = xs
            s = tl.sum(s3, 0)
            t = tl.sum(t3, 0)
            if NORM:
                stats = STATS + (b * N + n0 + n) * 2
                m = tl.load(stats, mask=ok, other=0.0)
                r = tl.load(stats + 1, mask=ok, other=0.0)
                s = (s - kappa[:, None] * m[None, :]) * r[None, :]
                t = (t - sigma[:, None] * m[None, :]) * r[None, :]
            a = tl.where(ok[None, :], tl.exp2(s * log2_scale - lse[:, None]), 0.0)
            da = t
            if GRAM:  # float32 operands: under a loss scale H may exceed the range of float16
                da = tl.dot(h, a, da, input_precision=H_PRECISION)
            ds = a * (da - delta[:, None]) * scale
            if NORM:
                u = tl.sum(a * sigma[:, None] + ds * kappa[:, None], 0)
                v = tl.sum(a * t + ds * s, 0)
                # dX = (rounded r a, r ds) products − shift − slope · x
                slope = r * r * v / D
                shift = r * u / D - slope * m
                a = a * r[None, :]
                ds = ds * r[None, :]
            a = a.to(dtype)
            ds = ds.to(dtype)
            if NORM:
                offset_parts += ds.to(tl.float32) * m[None, :]

            a3 = tl.broadcast_to(tl.trans(a)[None, :, :], [NW, BN, MP])
            ds3 = tl.broadcast_to(tl.trans(ds)[None, :, :], [NW, BN, MP])
            if NEED_DX:
                dx_tile = DX + b * N * D + (zero + n0) * D
                for k in tl.static_range(NC):
                    dx = dot(a3, d_pooled[k], tl.zeros([NW, BN, DW], tl.float32), UPCAST)
                    if not SEPARATE:
                        dx = dot(ds3, codes[k], dx, UPCAST)
                    if NORM:
                        dx = dx - shift[None, :, None] - slope[None, :, None] * xs[k].to(tl.float32)
                    store_rows(dx_tile, n, k * NW * DW + columns, D, inside, dx, D, NC * NW * DW != D)
            if NEED_DK:
                dk_tile = DKEYS + b * N * DK + (zero + n0) * DK
                for k in tl.static_range(NCK):
                    dk = dot(ds3, codes[k], tl.zeros([NW, BN, DKW], tl.float32), UPCAST)
                    store_rows(dk_tile, n, k * NW * DKW + key_columns, DK, inside, dk, DK, NCK * NW * DKW != DK)
            dst3 = tl.broadcast_to(ds[None, :, :], [NW, MP, BN])
            summed = ()
            for k in tl.static_range(NCK):
                summed = summed + (dot(dst3, keys[k], d_codes[k], UPCAST),)
            d_codes = summed

    if NORM:
        offset = tl.sum(offset_parts, 1)
    for k in tl.static_range(NCK):
        summed_k = d_codes[k]
        if NORM:
            summed_k = summed_k - offset[None, :, None]
        partial = DC + part * M * DK
        store_rows(partial, views, k * NW * DKW + key_columns, DK, view_ok, summed_k, DK, NCK * NW * DKW != DK)


_launch = Launcher(pool_backward_kernel)


@functools.cache
def _configuration(tile, views, width, key_width, separate, masking, gram, need_dx, need_dk, norm):
    constants = {
        **tile.constants(views, width, key_width),
        "SEPARATE": separate, "MASKING": masking, "GRAM": gram, "NEED_DX": need_dx, "NEED_DK": need_dk, "NORM": norm,
        "H_PRECISION": "ieee" if tile.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return Configuration(constants, tile.options())


def pool_backward(
    d_pooled, symmetric, delta, tokens, codes, keys, lengths, mask, lse, scale, need_d_tokens, need_d_keys,
    kappa=None, sigma=None, stats=None,
):  # fmt: skip
    """Launches the kernel: dX (tokens' dtype), dC in the shape of `codes` (float32), dK; empty for what is not needed.

    `symmetric` is H [B,M,M] float32, or None when no gradient came for the Gram matrix; `delta` is δ [B,M] float32.
    With a LayerNorm in front (`kappa`, `sigma`, `stats` given) `codes` and `d_pooled` are folded, and dC is dC'.
    """
    batch, length, width = tokens.shape
    views, key_width = codes.shape[-2:]
    separate = keys is not None
    need_d_keys = need_d_keys and separate
    out = tiles.output_dtype(tokens.dtype)
    d_tokens = torch.empty(tokens.shape if need_d_tokens else 0, dtype=out, device=tokens.device)
    d_keys = torch.empty(keys.shape if need_d_keys else 0, dtype=out, device=tokens.device)
    if batch == 0:
        return d_tokens.to(tokens.dtype), torch.zeros_like(codes, dtype=torch.float32), d_keys.to(tokens.dtype)

    per_sample, norm = codes.dim() == 3, kappa is not None
    tile = tiles.choose("backward", tokens, views, key_width if separate else None, norm)
    plan = schedule.backward(tokens, tile.block_n, per_sample)
    partial = torch.empty(plan.programs, plan.splits, views, key_width, dtype=torch.float32, device=tokens.device)
    masked_by, lengths, mask = masking(lengths, mask)
    tokens = rows_contiguous(tokens)
    keys = rows_contiguous(keys) if separate else tokens
    codes = codes.contiguous()
    with tiles.device_of(tokens):
        _launch(
            (plan.programs, plan.splits),
            (
                tokens, keys, codes, lengths, mask, d_pooled.to(tokens.dtype).contiguous(),
                None if symmetric is None else symmetric.contiguous(),
                delta.contiguous(), lse, kappa, sigma, stats,
            ),
            (d_tokens, d_keys, partial),
            (
                batch, length, plan.span,
                tokens.stride(0), tokens.stride(1), keys.stride(0), keys.stride(1),
                codes.stride(0) if per_sample else 0,
                views if per_sample else 0,
                scale, scale * LOG2_E.value,
            ),
            _configuration(
                tile, views, width, key_width, separate, masked_by, symmetric is not None, need_d_tokens, need_d_keys,
                norm,
            ),
        )  # fmt: skip
    d_codes = partial.sum(1) if per_sample else partial.sum((0, 1))
    return d_tokens.to(tokens.dtype), d_codes, d_keys.to(tokens.dtype)
