"""The op in plain PyTorch: the specification that every other path is tested against.

    S = scale · C Kᵀ          K = X, or separate keys                 [B,M,N]
    A = softmax over the valid tokens of S                            [B,M,N]
    P = A X                   pooled views                            [B,M,D]
    G = A Aᵀ                  Gram matrix of the attention            [B,M,M]

A sample without a valid token has A = 0, so P = 0 and G = 0. Tokens that take no part are never multiplied, so
NaN or garbage in padding does not spread. Differentiable any number of times, any floating dtype; the softmax and
the Gram matrix are computed in float32 (float64 for float64 input). It is also the graph that is exported.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def valid_tokens(tokens: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which tokens take part, as a boolean [B,N] tensor; None when all do."""
    if lengths is not None:
        return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return mask


def zero_invalid(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Tokens [B,N,D] with those that take no part set to zero, so that 0 · NaN cannot arise."""
    return tokens if valid is None else torch.where(valid[..., None], tokens, tokens.new_zeros(()))


def normalise(tokens: Tensor, valid: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Tokens that take part, layer-normalised if there is a weight [D]; the others 0."""
    tokens = zero_invalid(tokens, valid)
    if weight is None:
        return tokens
    bias = None if bias is None else bias.to(tokens.dtype)
    return zero_invalid(F.layer_norm(tokens, tokens.shape[-1:], weight.to(tokens.dtype), bias, eps), valid)


def view_attention(
    tokens: Tensor,
    codes: Tensor,
    *,
    keys: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """A [B,M,N] in float32 (float64 for float64 tokens); arguments as in `multi_view_pool`."""
    valid = valid_tokens(tokens, lengths, mask)
    if keys is None:
        keys = normalise(tokens, valid, norm_weight, norm_bias, norm_eps)
    else:
        keys = zero_invalid(keys, valid)
    scale = keys.shape[-1] ** -0.5 if scale is None else scale
    accumulate = torch.promote_types(tokens.dtype, torch.float32)
    logits = scale * (codes.to(keys.dtype) @ keys.mT).to(accumulate)
    if valid is None:
        return logits.softmax(-1)
    valid = valid[:, None, :]
    # The finite minimum instead of -inf: a row without a valid token is then 0 by the product and not NaN.
    return logits.masked_fill(~valid, torch.finfo(accumulate).min).softmax(-1) * valid


def multi_view_pool(
    tokens: Tensor,
    codes: Tensor,
    *,
    keys: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    need_gram: bool = True,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None]:
    """Pooled views P [B,M,D] in the tokens' dtype and G [B,M,M] (None when `need_gram` is False).

    tokens [B,N,D]; codes [M,Dk] or [B,M,Dk]; keys [B,N,Dk] or None (= tokens); lengths [B] or mask [B,N] or neither.
    With `norm_weight` [D] the tokens are raw, and X is their LayerNorm.
    """
    tokens = normalise(tokens, valid_tokens(tokens, lengths, mask), norm_weight, norm_bias, norm_eps)
    attention = view_attention(tokens, codes, keys=keys, lengths=lengths, mask=mask, scale=scale)
    pooled = attention.to(tokens.dtype) @ tokens
    return pooled, attention @ attention.mT if need_gram else None
