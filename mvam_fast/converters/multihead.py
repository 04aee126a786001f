"""Reading multi-head attention modules: `nn.MultiheadAttention`, and open_clip's own, which has the same parameters."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .features import not_linear, passed_by
from .folding import Flops, attend, pooling_flops

_FOLDED = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"}


def obstacle(pooler: nn.Module, name: str) -> str:
    """Why the attention `pooler.name` is more than projections and a softmax; empty if it is not."""
    attention = pooler.get_submodule(name)
    if not all(hasattr(attention, part) for part in ("in_proj_weight", "in_proj_bias", "out_proj", "num_heads")):
        return f"{name} is a {type(attention).__name__}, which lacks what nn.MultiheadAttention has"
    extra = [key for key, value in attention._parameters.items() if value is not None and key not in _FOLDED]
    if extra:
        return f"{name} has {extra[0]}, which does not fold"
    if getattr(attention, "add_zero_attn", False):
        return f"{name} attends to a zero token besides the tokens (add_zero_attn)"
    if not getattr(attention, "batch_first", True):
        return f"{name} takes the batch second (batch_first=False)"
    for child, value in attention.named_children():
        if child != "out_proj" and not isinstance(value, (nn.Identity, nn.Dropout)):
            return f"{name}.{child} ({type(value).__name__}) does not fold"
        if isinstance(value, nn.Dropout) and value.p > 0:
            return f"{name}.{child} drops out with p = {value.p}, and its random numbers cannot be repeated"
    if getattr(attention, "dropout", 0) > 0:
        return f"{name} drops out attention with p = {attention.dropout}, and its random numbers cannot be repeated"
    children = [f"{name}.{child}" for child, _ in attention.named_children()]
    return not_linear(pooler, f"{name}.out_proj") or passed_by(pooler, [name, *children])


def _weights(attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """W_q [E,E], W_k [E,D], W_v [E,D]."""
    if attention.in_proj_weight is not None:
        return attention.in_proj_weight.chunk(3)
    return attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight


def flops(attention: nn.Module, queries: int) -> Flops:
    inner, width = _weights(attention)[1].shape
    return pooling_flops(width, inner, attention.num_heads, queries)


def width(attention: nn.Module) -> int:
    """D, of the tokens that it attends to."""
    return _weights(attention)[1].shape[1]


def pool(
    attention: nn.Module, queries: Tensor, tokens: Tensor, *, mask: Tensor | None = None, norm: dict | None = None
) -> Tensor:
    """What the attention module makes of queries [Q,E], the same for all samples, and tokens [B,N,D]: [B,Q,E]."""
    query_weight, key_weight, value_weight = _weights(attention)
    query_bias = value_bias = None
    if attention.in_proj_bias is not None:
        query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
    queries = F.linear(queries, query_weight, query_bias)
    attended = attend(
        tokens, queries, key_weight, value_weight, value_bias, heads=attention.num_heads, mask=mask, norm=norm
    )
    return F.linear(attended, attention.out_proj.weight, attention.out_proj.bias)
