"""Multi-head attention by queries that are few, folded into the pooling op.

Head h, query i, with K_h = X W_khᵀ + b_kh and V_h = X W_vhᵀ + b_vh of the tokens X [N,D]:

    logits   q_ih · (W_kh x_n + b_kh) = (W_khᵀ q_ih) · x_n + const       the constant cancels in the softmax
    codes    c_hi = W_khᵀ q_ih                                           [H·Q,D], heads first
    pooled   P = A X                                                     `multi_view_pool`
    values   Σ_n a_n (W_vh x_n + b_vh) = W_vh P_hi + b_vh                the rows of A sum to 1

so that keys and values, 2·E numbers a token, are never made: the projections act on H·Q rows.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import autocast_off
from ..functional import multi_view_pool


class Flops(NamedTuple):
    """Floating-point operations for one token; what is done once a sample or once a call is left out of both.

    `own`: the pooler as its library runs it; `fused`: folded; `views`: the codes, one for each head and query.
    """

    own: int
    fused: int
    views: int


def pooling_flops(width: int, inner: int, heads: int, queries: int) -> Flops:
    """Multi-head attention of `queries` queries over tokens of `width`, with keys and values of `inner` numbers.

    Its own: key and value projection 4·D·E, logits and sum 4·Q·E. Folded: logits and sum with H·Q codes, 4·H·Q·D.
    """
    return Flops(4 * inner * (width + queries), 4 * heads * queries * width, heads * queries)


def fold(queries: Tensor, key_weight: Tensor, heads: int) -> Tensor:
    """View codes [H·Q,D] of projected queries [Q,E] and W_k [E,D]; [B,H·Q,D] of queries [B,Q,E]."""
    queries = queries.to(key_weight.dtype).unflatten(-1, (heads, -1)).movedim(-2, 0)  # [H,...,Q,E/H]
    rows = queries.flatten(1, -2) @ key_weight.unflatten(0, (heads, -1))
    return rows.unflatten(1, queries.shape[1:-1]).movedim(0, -3).flatten(-3, -2)


def attend(
    tokens: Tensor,
    queries: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    *,
    heads: int,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    norm: dict | None = None,
) -> Tensor:
    """Multi-head attention up to its output projection: [B,Q,E].

    tokens [B,N,D]; queries, projected: [Q,E] shared by the samples, or [B,Q,E]; weights [E,D]; value_bias [E]; mask
    [B,N], True = the token takes part; norm: the LayerNorm in front as `multi_view_pool` takes it. key_bias [E]: a
    parameter of its own (not part of a packed one), which changes nothing and is given its zero gradient.
    """
    with autocast_off(tokens.device.type):  # the op rounds the codes itself, and keeps their gradient in float32
        codes = fold(queries, key_weight, heads)
    codes = with_zero_gradient(codes, key_bias)
    pooled = pool(tokens, codes, mask=mask, scale=(queries.shape[-1] // heads) ** -0.5, **(norm or {}))
    values = _by_head(pooled.unflatten(1, (heads, -1)), value_weight.unflatten(0, (heads, -1)))
    if value_bias is None:
        return values
    value_bias = value_bias.to(values.dtype)  # under autocast
    if mask is not None:  # the attention of a sample without a valid token sums to 0, not to 1
        value_bias = value_bias * mask.any(1)[:, None, None]
    return values + value_bias


def _by_head(pooled: Tensor, value_weight: Tensor) -> Tensor:
    """[B,Q,E] of pooled [B,H,Q,D] and W_v [H,E/H,D]: one product for each head, over all samples and queries."""
    batch, heads, queries, _ = pooled.shape
    values = pooled.transpose(0, 1).flatten(1, 2) @ value_weight.mT  # [H,B·Q,E/H]
    return values.unflatten(1, (batch, queries)).permute(1, 2, 0, 3).flatten(2)


def pool(tokens: Tensor, codes: Tensor, **options) -> Tensor:
    """`multi_view_pool` without its Gram matrix; float64, which no kernel takes, whatever MVAM_BACKEND wishes."""
    backend = "torch" if tokens.dtype == torch.float64 else "auto"
    return multi_view_pool(tokens, codes, need_gram=False, backend=backend, **options)[0]


def with_zero_gradient(codes: Tensor, bias: Tensor | None) -> Tensor:
    """`codes`, with a bias that cancels kept in the graph.

    Its gradient is exactly zero. None instead would differ from the original for whoever counts gradients:
    DistributedDataParallel stops at a parameter without one, and weight decay passes it by.
    """
    if bias is None or not torch.is_grad_enabled():
        return codes
    return codes + 0 * bias.sum()
