"""The op without a custom kernel: forward and backward in a handful of PyTorch operators.

Autograd on the reference keeps a table more than this and, for shared keys, writes the tokens' gradient three times:
once through S, once through P, and their sum. Here the attention is kept (M/D of the tokens' size), nothing of the
tokens' size is made but one dX, on a GPU by one product over the stacked views:

    dA = X dPᵀ + A H                     δ_i = Σ_n A_ni dA_ni
    dS = A ∘ (dA − δ)                    dC = scale · Σ_b dS_bᵀ K_b
    dX = A dP + dS C' = [A | dS] [dP ; C']        C' = scale · C

Letters as in `reference.py` with H = dG + dGᵀ, but the tables A, dA, dS are [B,N,M] here, tokens first: the layout in
which all these products are fastest on a CPU. The scale goes to the codes, the smallest of all these, and what is made
here is changed in place. On a GPU 5 token volumes are moved instead of naive autograd's 9.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .reference import zero_invalid


def forward(
    tokens: Tensor, codes: Tensor, keys: Tensor | None, valid: Tensor | None, scale: float, need_gram: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """P [B,M,D] (tokens' dtype), G [B,M,M] ([B,0,0] without `need_gram`), and A [B,N,M] for the backward."""
    tokens = zero_invalid(tokens, valid)
    logits = _logits(tokens, codes, keys, valid, scale)
    if valid is None:
        attention = logits.softmax(1)
    else:  # the finite minimum, so that a sample without a valid token gives 0 by the product and not NaN
        blocked = ~valid[..., None]
        attention = logits.masked_fill(blocked, torch.finfo(logits.dtype).min).softmax(1).masked_fill(blocked, 0)
    pooled = attention.to(tokens.dtype).mT @ tokens
    gram = attention.mT @ attention if need_gram else attention.new_empty(len(tokens), 0, 0)
    return pooled, gram, attention


def recomputed_attention(
    tokens: Tensor, codes: Tensor, keys: Tensor | None, valid: Tensor | None, lse: Tensor, scale: float
) -> Tensor:
    """A [B,N,M] from what the kernels' forward keeps instead of it: lse_i = log Σ_n exp S_in, [B,M]."""
    exponent = _logits(zero_invalid(tokens, valid), codes, keys, valid, scale) - lse[:, None]
    if valid is not None:  # before exp: where all valid logits are very negative it would overflow
        exponent = exponent.masked_fill(~valid[..., None], float("-inf"))
    return exponent.exp()


def _logits(tokens: Tensor, codes: Tensor, keys: Tensor | None, valid: Tensor | None, scale: float) -> Tensor:
    scored = tokens if keys is None else zero_invalid(keys, valid)
    return (scored @ (scale * codes).mT).to(torch.promote_types(tokens.dtype, torch.float32))


def gradient_terms(
    d_pooled: Tensor, d_gram: Tensor | None, pooled: Tensor, gram: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What a kernel must know first: δ_i = ⟨dP_i, P_i⟩ + Σ_j H_ij G_ij [B,M], and H [B,M,M] (None without dG)."""
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
    attention: Tensor,
    scale: float,
    need_d_tokens: bool,
    need_d_keys: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """dX (tokens' dtype), dC in the shape of `codes` (float32 or wider), dK; None for what is not needed."""
    batch = len(tokens)
    tokens = zero_invalid(tokens, valid)
    scored = tokens if keys is None else zero_invalid(keys, valid)
    d_attention = (tokens @ d_pooled.mT).to(attention.dtype)
    if d_gram is not None:
        d_attention.baddbmm_(attention, d_gram + d_gram.mT)
    delta = (attention * d_attention).sum(1, keepdim=True)
    d_logits = d_attention.sub_(delta).mul_(attention)

    attention, d_logits = attention.to(tokens.dtype), d_logits.to(tokens.dtype)
    scaled_codes = (scale * codes).expand(batch, *codes.shape[-2:])
    d_tokens = d_keys = None
    if keys is None:
        if need_d_tokens and tokens.is_cuda:
            d_tokens = torch.cat([attention, d_logits], 2) @ torch.cat([d_pooled, scaled_codes], 1)
        elif need_d_tokens:  # on a CPU a second pass over dX, still in the cache, costs less than stacking
            d_tokens = (attention @ d_pooled).baddbmm_(d_logits, scaled_codes)
    else:
        d_tokens = attention @ d_pooled if need_d_tokens else None
        d_keys = d_logits @ scaled_codes if need_d_keys else None
    d_codes = (d_logits.mT @ scored).to(delta.dtype)
    d_codes = d_codes if codes.dim() == 3 else d_codes.sum(0)
    return d_tokens, d_codes.mul_(scale), d_keys
