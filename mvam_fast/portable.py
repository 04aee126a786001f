"""The op without a custom kernel: forward and backward in a handful of PyTorch operators.

Same math as the Triton kernels, so the two can be mixed: the backward of either needs only (X, C, P, G, lse).
Against autograd on the reference it recomputes A instead of storing it, and with shared keys it stacks the views, so
that the tokens are read once for both tables and dX is written once:

    [S/scale ; dP Xᵀ] = [C ; dP] Xᵀ              dX = dSᵀ C + Aᵀ dP = [dS | A]ᵀ [C ; dP]

Forward and backward together then move about 5 token volumes instead of 9. Letters as in `reference.py`, and

    lse_i = log Σ_n exp S_in     H = dG + dGᵀ     δ_i = ⟨dP_i, P_i⟩ + Σ_j H_ij G_ij
    dA = dP Xᵀ + H A             dS = scale · A ∘ (dA − δ)        dC = Σ_b dS_b K_b
"""
from __future__ import annotations

import torch
from torch import Tensor

from .reference import zero_invalid


def forward(
    tokens: Tensor, codes: Tensor, keys: Tensor | None, valid: Tensor | None, scale: float, need_gram: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """P [B,M,D] (tokens' dtype), G [B,M,M] ([B,0,0] without `need_gram`), lse [B,M]; +inf where nothing is valid."""
    accumulate = torch.promote_types(tokens.dtype, torch.float32)
    tokens = zero_invalid(tokens, valid)
    scored = tokens if keys is None else zero_invalid(keys, valid)
    logits = scale * (codes @ scored.mT).to(accumulate)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], torch.finfo(accumulate).min)
    attention = logits.softmax(-1)
    # log-sum-exp from the largest logit and its attention, which is at least 1/N: two reductions, no second exp.
    lse = logits.amax(-1) - attention.amax(-1).log()
    if valid is not None:
        attention = attention * valid[:, None]
        lse = lse.masked_fill(~valid.any(1, keepdim=True), float("inf"))
    pooled = attention.to(tokens.dtype) @ tokens
    gram = attention @ attention.mT if need_gram else lse.new_empty(lse.shape[0], 0, 0)
    return pooled, gram, lse


def gradient_terms(
    d_pooled: Tensor, d_gram: Tensor | None, pooled: Tensor, gram: Tensor
) -> tuple[Tensor, Tensor | None]:
    """δ [B,M] and H [B,M,M] (None without a gradient of the Gram matrix), known before the pass over the tokens."""
    accumulate = torch.promote_types(pooled.dtype, torch.float32)
    delta = (d_pooled.to(accumulate) * pooled.to(accumulate)).sum(-1)
    if d_gram is None:
        return delta, None
    symmetric = d_gram + d_gram.mT
    return delta + (symmetric * gram).sum(-1), symmetric


def backward(
    d_pooled: Tensor,
    d_gram: Tensor | None,
    tokens: Tensor,
    codes: Tensor,
    keys: Tensor | None,
    valid: Tensor | None,
    pooled: Tensor,
    gram: Tensor,
    lse: Tensor,
    scale: float,
    need_d_tokens: bool,
    need_d_keys: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """dX (tokens' dtype), dC in the shape of `codes` (float32 or wider), dK; None for what is not needed."""
    batch, views = d_pooled.shape[:2]
    tokens = zero_invalid(tokens, valid)
    scored = tokens if keys is None else zero_invalid(keys, valid)
    delta, symmetric = gradient_terms(d_pooled, d_gram, pooled, gram)
    if keys is None:
        stacked = torch.cat([codes.expand(batch, *codes.shape[-2:]), d_pooled], 1)  # [B,2M,D]
        logits, d_attention = (stacked @ tokens.mT).to(delta.dtype).split(views, 1)
    else:
        logits, d_attention = (codes @ scored.mT).to(delta.dtype), (d_pooled @ tokens.mT).to(delta.dtype)

    exponent = scale * logits - lse[..., None]
    if valid is not None:  # before exp: where all valid logits are very negative it would overflow
        exponent = exponent.masked_fill(~valid[:, None], float("-inf"))
    attention = exponent.exp()
    if symmetric is not None:
        d_attention = d_attention + symmetric @ attention
    d_logits = attention * (scale * (d_attention - delta[..., None]))

    attention, d_logits = attention.to(tokens.dtype), d_logits.to(tokens.dtype)
    d_tokens = d_keys = None
    if keys is None:
        d_tokens = torch.cat([d_logits, attention], 1).mT @ stacked if need_d_tokens else None
    else:
        d_tokens = attention.mT @ d_pooled if need_d_tokens else None
        d_keys = d_logits.mT @ codes.expand(batch, *codes.shape[-2:]) if need_d_keys else None
    d_codes = (d_logits @ scored).to(delta.dtype)
    return d_tokens, d_codes if codes.dim() == 3 else d_codes.sum(0), d_keys
