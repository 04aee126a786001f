"""The op without a custom kernel: forward and backward in a handful of PyTorch operators.

Same math as the Triton kernels, so the two can be mixed: the backward of either needs only (X, C, P, G, lse).
Against autograd on the reference it recomputes A instead of storing it, and writes dX in one product

    dX = Aᵀ dP + dSᵀ C = [A | dS]ᵀ [dP ; C]                 (shared keys)

so that forward and backward together move about 5 token volumes instead of 9. Letters as in `reference.py`, and

    lse_i = log Σ_n exp S_in     H = dG + dGᵀ     δ_i = ⟨dP_i, P_i⟩ + Σ_j H_ij G_ij
    dA = dP Xᵀ + H A             dS = scale · A ∘ (dA − δ)        dC = Σ_b dS_b K_b
"""
from __future__ import annotations

import torch
from torch import Tensor

from .reference import zero_invalid


def logits_of(codes: Tensor, keys: Tensor, scale: float) -> Tensor:
    """S [B,M,N], float32 or wider."""
    return scale * (codes @ keys.mT).to(torch.promote_types(keys.dtype, torch.float32))


def forward(
    tokens: Tensor, codes: Tensor, keys: Tensor | None, valid: Tensor | None, scale: float, need_gram: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """P [B,M,D] (tokens' dtype), G [B,M,M] ([B,0,0] without `need_gram`), lse [B,M]; +inf where nothing is valid."""
    tokens = zero_invalid(tokens, valid)
    logits = logits_of(codes, tokens if keys is None else zero_invalid(keys, valid), scale)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], float("-inf"))
    lse = logits.logsumexp(-1)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    attention = (logits - lse[..., None]).exp()
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
    dtype = tokens.dtype
    tokens = zero_invalid(tokens, valid)
    scored = tokens if keys is None else zero_invalid(keys, valid)
    delta, symmetric = gradient_terms(d_pooled, d_gram, pooled, gram)

    logits = logits_of(codes, scored, scale)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], float("-inf"))
    attention = (logits - lse[..., None]).exp()
    d_attention = (d_pooled @ tokens.mT).to(attention.dtype)
    if symmetric is not None:
        d_attention = d_attention + symmetric @ attention
    d_logits = scale * attention * (d_attention - delta[..., None])

    attention, d_logits_cast = attention.to(dtype), d_logits.to(dtype)
    batched_codes = codes.expand(d_pooled.shape[0], *codes.shape[-2:])
    d_tokens = d_keys = None
    if keys is not None:
        d_tokens = attention.mT @ d_pooled if need_d_tokens else None
        d_keys = d_logits_cast.mT @ batched_codes if need_d_keys else None
    elif need_d_tokens:
        stacked = torch.cat([attention, d_logits_cast], 1)
        d_tokens = stacked.mT @ torch.cat([d_pooled, batched_codes], 1)
    if codes.dim() == 3:
        d_codes = d_logits_cast @ scored
    else:
        d_codes = d_logits_cast.transpose(0, 1).flatten(1) @ scored.flatten(0, 1)
    return d_tokens, d_codes.to(delta.dtype), d_keys
