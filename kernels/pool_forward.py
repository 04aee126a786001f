"""Forward of multi-view attention pooling: one read of the tokens, A never stored.

A program walks over tiles of BN tokens with an online softmax in base 2:

    s_in = scale · log2(e) · ⟨c_i, k_n⟩          -inf where token n takes no part
    μ'_i = max(μ_i, max_n s_in)                   α_i  = 2^(μ_i − μ'_i)
    p_in = 2^(s_in − μ'_i)                        l_i  = l_i α_i + Σ_n p_in
    P_i  = P_i α_i + Σ_n p_in x_n                 G_ij = G_ij α_i α_j + Σ_n p_in p_jn

and at the end P_i / l_i, G_ij / (l_i l_j), lse_i = ln(2) (μ_i + log2 l_i), +inf for a sample without a valid token,
whose P and G are 0. l sums the *rounded* p that multiplies x, so rows of A sum to 1 in any precision.

With a LayerNorm in front (NORM), y_n = γ ∘ x̂_n + β with x̂_n = r_n (x_n − m_n 1), the same pass works on the raw x. The
codes come folded, c' = γ ∘ c, with κ_i = Σ_d c'_id:

    ⟨c_i, y_n⟩ = r_n (⟨c'_i, x_n⟩ − m_n κ_i) + ⟨c_i, β⟩       the last term is the same for all n and drops out
    P̂_i = Σ_n a_in x̂_n = (Σ_n w_in x_n − Σ_n w_in m_n 1) / Σ_n w_in / r_n        w_in = p_in r_n

with w rounded in all three sums, so that the weights of the x̂_n sum to 1. P̂ is what is written, P = γ ∘ P̂ + β follows
outside; m and r are written for the backward.

Three ways to lay the work out, chosen by `schedule.py`:

    a program per sample;
    PERSISTENT, for short samples: a program runs through the tiles of many samples in one loop, so that the loads of
    the next sample are under way before this one is written;
    splits, for few samples: programs share a sample's tokens and `combine.py` puts their results together.

Where M views are more than a program can hold, each takes a group of MP of them. The Gram matrix between groups then
comes from the logits, which are written for that (GRAM == 2) and multiplied by `group_gram.py`.
"""
import functools

import torch
import triton
import triton.language as tl

from . import schedule, tiles
from .blocks import LOG2_E, dot, load_rows, store_rows
from .combine import combine_splits
from .group_gram import group_gram
from .launch import Configuration, Launcher

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def write_views(
    P, G, LSE, row, views, view_ok, columns, acc, mu, l_parts, gram, offset_parts, weight_parts,
    M: tl.constexpr, D: tl.constexpr, DW: tl.constexpr, NC: tl.constexpr, NW: tl.constexpr, GRAM: tl.constexpr,
    NORM: tl.constexpr,
):
    """Ends a sample (or a split of one): divides by the sums and writes P, G and lse at `row`."""
    total = tl.sum(l_parts, 1)
    occupied = total > 0
    total = tl.where(occupied, total, 1.0)
    inverse = tl.where(occupied, 1.0 / total, 0.0)
    unit_inverse = inverse
    if NORM:
        offset = tl.sum(offset_parts, 1)
        weight = tl.sum(weight_parts, 1)
        unit_inverse = tl.where(occupied, 1.0 / tl.where(occupied, weight, 1.0), 0.0)
    for k in tl.static_range(NC):
        pooled = acc[k]
        if NORM:
            pooled = pooled - offset[None, :, None]
        pooled = pooled * unit_inverse[None, :, None]
        store_rows(P + row * M * D, views, k * NW * DW + columns, D, view_ok, pooled, D, NC * NW * DW != D)
    if GRAM == 1:
        pairs = view_ok[:, None] & view_ok[None, :]
        gram = gram * inverse[:, None] * inverse[None, :]
        tl.store(G + row * M * M + views[:, None] * M + views[None, :], gram, mask=pairs)
    if LSE is not None:
        tl.store(LSE + row * M + views, tl.where(occupied, (mu + tl.log2(total)) * LN_2, float("inf")), mask=view_ok)


@triton.jit
def pool_forward_kernel(
    X,  # [B, N, D]   tokens
    K,  # [B, N, DK]  keys; X itself when not SEPARATE
    C,  # [M, DK] or [B, M, DK]  view codes, contiguous
    LENGTHS,  # [B] int32, MASKING == 1
    MASK,  # [B, N] int32, MASKING == 2, contiguous
    P,  # [B, splits, M, D]  out: pooled views, contiguous
    G,  # [B, splits, M, M]  out: Gram matrix, float32, GRAM == 1
    LSE,  # [B, splits, M]   out: log-sum-exp of the logits, float32; None: not wanted
    LOGITS,  # [B, M, N]  out: s in base 2, -inf where a token takes no part, float32, GRAM == 2
    KAPPA,  # [M] or [B, M]  κ, float32, NORM
    STATS,  # [B, N, 2]  out: m and r of the tokens that take part, float32, NORM
    B,
    N,
    span,  # tokens per split, a multiple of BN
    stride_xb, stride_xn,
    stride_kb, stride_kn,
    stride_cb,  # 0 when the codes are shared
    stride_kappa,  # likewise
    scale,  # of the logits, times log2(e)
    eps,  # of the LayerNorm
    M: tl.constexpr,
    MP: tl.constexpr,  # views of a program: M padded to a power of two, or a group of them
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    DW: tl.constexpr,
    NC: tl.constexpr,
    DK: tl.constexpr,
    DKW: tl.constexpr,
    NCK: tl.constexpr,
    NW: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    PERSISTENT: tl.constexpr,  # only with shared codes and one split
    SAMPLES: tl.constexpr,  # most samples of a PERSISTENT program
    SEPARATE: tl.constexpr,
    MASKING: tl.constexpr,
    GRAM: tl.constexpr,  # 0 none, 1 here, 2 through the logits
    NORM: tl.constexpr,
    UPCAST: tl.constexpr,
    # What a block's shared memory holds: 2 the codes and the tile, 1 the tile, 0 neither. The rest is read again, from
    # the caches, each time it is multiplied. Less than 2 only for shared codes that score the tokens themselves.
    HELD: tl.constexpr,
):
    # Groups of one sample are neighbours, so that all but the first find its tokens in the L2 cache.
    pid = tl.program_id(0) // GROUPS
    programs = tl.num_programs(0) // GROUPS
    split = tl.program_id(1)
    b = pid.to(tl.int64)
    zero = b * 0  # int64 zero: what a tile offset is added to before it meets a stride
    views = (tl.program_id(0) % GROUPS) * MP + tl.arange(0, MP)
    view_ok = views < M
    columns = tl.arange(0, NW)[:, None] * DW + tl.arange(0, DW)[None, :]
    key_columns = tl.arange(0, NW)[:, None] * DKW + tl.arange(0, DKW)[None, :]
    dtype: tl.constexpr = X.dtype.element_ty

    codes = ()
    if HELD == 2:
        for k in tl.static_range(NCK):
            codes = codes + (
                load_rows(C + b * stride_cb, views, k * NW * DKW + key_columns, DK, view_ok, DK, NCK * NW * DKW != DK),
            )
    acc = ()
    for _ in tl.static_range(NC):
        acc = acc + (tl.zeros([NW, MP, DW], tl.float32),)
    mu = tl.full([MP], float("-inf"), tl.float32)
    l_parts = tl.zeros([MP, BN], tl.float32)  # l before its sum over n, taken once at the end
    gram = tl.zeros([MP, MP], tl.float32)
    offset_parts = tl.zeros([MP, BN], tl.float32)  # NORM: w m and w / r before their sums over n
    weight_parts = tl.zeros([MP, BN], tl.float32)
    if NORM:
        kappa = tl.load(KAPPA + b * stride_kappa + views, mask=view_ok, other=0.0)

    count = N
    if PERSISTENT:  # every sample has a tile, even one without tokens: its zeros are written too
        if MASKING == 1:
            order = tl.arange(0, SAMPLES)
            sample = pid + order * programs
            counts = tl.minimum(tl.maximum(tl.load(LENGTHS + sample, mask=sample < B, other=0), 0), N)
            ends = tl.cumsum(tl.where(sample < B, tl.maximum(tl.cdiv(counts, BN), 1), 0), 0)
            steps = tl.max(ends, 0)
        else:
            tiles_each = tl.cdiv(N, BN)
            steps = tl.cdiv(B - pid, programs) * tiles_each
    else:
        if MASKING == 1:
            count = tl.minimum(tl.maximum(tl.load(LENGTHS + b), 0), N)
        begin = split * span
        count = tl.minimum(count, begin + span)
        steps = tl.cdiv(tl.maximum(count - begin, 0), BN)

    for step in tl.range(0, steps, num_stages=STAGES):
        # Where the tile lies comes from `step` alone: were it carried along, loads could not run ahead.
        if PERSISTENT:
            if MASKING == 1:
                done = ends <= step
                index = tl.sum(done.to(tl.int32), 0)
                n0 = (step - tl.max(tl.where(done, ends, 0), 0)) * BN
                count = tl.sum(tl.where(order == index, counts, 0), 0)
            else:
                index = step // tiles_each
                n0 = (step % tiles_each) * BN
            b = zero + pid + index * programs
        else:
            n0 = begin + step * BN
        n = tl.arange(0, BN)
        ok = n0 + n < count
        if MASKING == 2:
            ok = tl.load(MASK + b * N + n0 + n, mask=ok, other=0) != 0
        x_tile = X + b * stride_xb + (zero + n0) * stride_xn
        xs = ()
        s3 = tl.zeros([NW, MP, BN], tl.float32)
        if SEPARATE:
            k_tile = K + b * stride_kb + (zero + n0) * stride_kn
            for k in tl.static_range(NCK):
                key = load_rows(k_tile, n, k * NW * DKW + key_columns, stride_kn, ok, DK, NCK * NW * DKW != DK)
                s3 = dot(codes[k], tl.permute(key, 0, 2, 1), s3, UPCAST)
        if NORM:
            total = tl.zeros([BN], tl.float32)
        for k in tl.static_range(NC):
            x = load_rows(x_tile, n, k * NW * DW + columns, stride_xn, ok, D, NC * NW * DW != D)
            xs = xs + (x,)
            if not SEPARATE:
                if HELD == 2:
                    code = codes[k]
                else:  # the mask is true, but changes with the tile: else the load would be moved out of the loop
                    here = view_ok & (n0 < count)
                    code = load_rows(C, views, k * NW * DKW + key_columns, DK, here, DK, NCK * NW * DKW != DK)
                s3 = dot(code, tl.permute(x, 0, 2, 1), s3, UPCAST)
            if NORM:
                total += tl.sum(tl.sum(x.to(tl.float32), 2), 0)
        s = tl.sum(s3, 0)
        if NORM:
            m = total / D
            squares = tl.zeros([BN], tl.float32)  # a second look at the tile, which is still at hand: no cancellation
            for k in tl.static_range(NC):
                centred = xs[k].to(tl.float32) - m[None, :, None]
                if NC * NW * DW != D:
                    centred = tl.where((k * NW * DW + columns < D)[:, None, :], centred, 0.0)
                squares += tl.sum(tl.sum(centred * centred, 2), 0)
            deviation = tl.sqrt(squares / D + eps)
            r = 1.0 / deviation
            s = (s - kappa[:, None] * m[None, :]) * r[None, :]
            stats = STATS + (b * N + n0 + n) * 2
            tl.store(stats, m, mask=ok)
            tl.store(stats + 1, r, mask=ok)
        s = tl.where(ok[None, :], s * scale, float("-inf"))
        if GRAM == 2:
            table = LOGITS + b * M * N + views[:, None] * N + n0 + n[None, :]
            tl.store(table, s, mask=view_ok[:, None] & (n0 + n < N)[None, :])

        mu_new = tl.maximum(mu, tl.max(s, 1))
        mu_safe = tl.where(mu_new == float("-inf"), 0.0, mu_new)  # nothing valid so far: no -inf - -inf
        alpha = tl.exp2(mu - mu_safe)
        p = tl.exp2(s - mu_safe[:, None]).to(dtype)
        l_parts = l_parts * alpha[:, None] + p.to(tl.float32)
        w = p
        if NORM:
            w = (p.to(tl.float32) * r[None, :]).to(dtype)
            rounded = w.to(tl.float32)
            offset_parts = offset_parts * alpha[:, None] + rounded * m[None, :]
            weight_parts = weight_parts * alpha[:, None] + rounded * deviation[None, :]
        w3 = tl.broadcast_to(w[None, :, :], [NW, MP, BN])
        scaled = ()
        for k in tl.static_range(NC):
            x = xs[k]
            if HELD == 0:  # LAST tells this load from the other one: else the two would be made one
                x = load_rows(x_tile, n, k * NW * DW + columns, stride_xn, ok, D, NC * NW * DW != D, True)
            scaled = scaled + (dot(w3, x, acc[k] * alpha[None, :, None], UPCAST),)
        acc = scaled
        if GRAM == 1:
            gram = dot(p, tl.trans(p), gram * (alpha[:, None] * alpha[None, :]), UPCAST)
        mu = mu_new

        if PERSISTENT:
            if n0 + BN >= count:
                write_views(
                    P, G, LSE, b, views, view_ok, columns, acc, mu, l_parts, gram, offset_parts, weight_parts,
                    M, D, DW, NC, NW, GRAM, NORM,
                )
                cleared = ()  # by zeros, not by a factor of 0: Inf or NaN in one sample must not reach the next
                for _ in tl.static_range(NC):
                    cleared = cleared + (tl.zeros([NW, MP, DW], tl.float32),)
                acc = cleared
                mu = tl.full([MP], float("-inf"), tl.float32)
                l_parts = tl.zeros([MP, BN], tl.float32)
                gram = tl.zeros([MP, MP], tl.float32)
                offset_parts = tl.zeros([MP, BN], tl.float32)
                weight_parts = tl.zeros([MP, BN], tl.float32)

    if not PERSISTENT:
        row = b * tl.num_programs(1) + split
        write_views(
            P, G, LSE, row, views, view_ok, columns, acc, mu, l_parts, gram, offset_parts, weight_parts,
            M, D, DW, NC, NW, GRAM, NORM,
        )


_launch = Launcher(pool_forward_kernel)


@functools.cache
def _configuration(tile, views, width, key_width, persistent, separate, masking, gram, norm):
    constants = {
        **tile.constants(views, width, key_width),
        "GROUPS": tile.groups(views), "PERSISTENT": persistent, "SAMPLES": schedule.MOST_SAMPLES,
        "SEPARATE": separate, "MASKING": masking, "GRAM": gram, "NORM": norm, "HELD": 2,
    }  # fmt: skip
    return Configuration(constants, tile.options())


def pool_forward(tokens, codes, keys, lengths, mask, scale, need_gram, kappa=None, eps=0.0):
    """Launches the kernel: P [B,M,D], G [B,M,M] float32 ([B,0,0] without), lse [B,M] float32, and statistics.

    With `kappa` (κ [M] or [B,M] float32, `codes` being folded) a LayerNorm is in front: P is P̂ in float32 then, and the
    statistics are m and r [B,N,2] float32, unset for tokens that take no part; otherwise they are None.
    """
    batch, length, width = tokens.shape
    views = codes.shape[-2]
    separate, norm, per_sample = keys is not None, kappa is not None, codes.dim() == 3
    tokens = rows_contiguous(tokens)
    keys = rows_contiguous(keys) if separate else tokens
    codes = codes.contiguous()
    masked_by, lengths, mask = masking(lengths, mask)
    tile = tiles.choose("forward", tokens, views, codes.shape[-1] if separate else None, norm)
    plan = schedule.forward(tokens, tile.block_n, per_sample)
    groups = tile.groups(views)
    out = torch.float32 if norm else tiles.output_dtype(tokens.dtype)
    side = views if need_gram else 0

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    splits = () if plan.splits == 1 else (plan.splits,)
    pooled = empty(batch, *splits, views, width, dtype=torch.float32 if splits else out)
    gram = empty(batch, *splits, side, side) if groups == 1 else None
    lse = empty(batch, *splits, views)
    logits = empty(batch, views, length) if need_gram and groups > 1 else None
    stats = empty(batch, length, 2) if norm else None
    if batch == 0:
        return pooled.to(tokens.dtype), empty(0, side, side), lse, stats
    with tiles.device_of(tokens):
        _launch(
            (plan.programs * groups, plan.splits),
            (tokens, keys, codes, lengths, mask, pooled),
            (gram, lse, logits, kappa, stats),
            (
                batch, length, plan.span,
                tokens.stride(0), tokens.stride(1), keys.stride(0), keys.stride(1),
                codes.stride(0) if per_sample else 0,
                views if per_sample else 0,
                scale * LOG2_E.value, eps,
            ),
            _configuration(
                tile, views, width, keys.shape[2], plan.persistent, separate, masked_by,
                0 if not need_gram else 2 if groups > 1 else 1, norm,
            ),
        )  # fmt: skip
        if plan.splits > 1:
            pooled, gram, lse = combine_splits(pooled, gram, lse, out)
        if logits is not None:
            gram = group_gram(logits, lengths, lse, tokens.dtype)
    gram = empty(batch, 0, 0) if gram is None else gram
    if not norm and pooled.dtype != tokens.dtype:  # the interpreter's
        pooled = pooled.to(tokens.dtype)
    return pooled, gram, lse, stats


def rows_contiguous(tensor):
    """The tensor itself when its last axis is contiguous, whatever the strides of the others; else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def masking(lengths, mask):
    """The kernel's MASKING, LENGTHS and MASK: the tensors int32, contiguous, None for what is not given.

    int32 although a mask is boolean: narrower loads cannot be copied asynchronously, and since the mask guards the
    loads of the tokens, those would not be either.
    """
    return (
        1 if lengths is not None else 2 if mask is not None else 0,
        None if lengths is None else lengths.to(torch.int32).contiguous(),
        None if mask is None else mask.to(torch.int32).contiguous(),
    )
