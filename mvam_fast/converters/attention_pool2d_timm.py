"""timm's AttentionPool2d: CLIP's, and class token, packed or separate projections, positions resized to the grid."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention_pool2d import all_positions_flops
from .classes import FusedPooler
from .features import not_linear, owns, passed_by
from .folding import Flops, attend

ARGUMENTS = ("x", "pre_logits")


def recognises(module: nn.Module) -> bool:
    parameters = {"pos_embed"} | ({"cls_token"} if getattr(module, "cls_token", None) is not None else set())
    return any(owns(module, parameters, {"drop", "proj"} | projections) for projections in ({"qkv"}, {"q", "k", "v"}))


def _projections(module: nn.Module) -> tuple[str, ...]:
    return ("q", "k", "v") if module.qkv is None else ("qkv",)


def obstacle(module: nn.Module) -> str:
    if module.pool_type != "token":
        return f"every position is a query and is returned (pool_type={module.pool_type!r})"
    if module.drop.p > 0:
        return f"drop acts on all positions with p = {module.drop.p}, and its random numbers cannot be repeated"
    names = _projections(module)
    return (
        next(filter(None, (not_linear(module, name) for name in names)), "")
        or passed_by(module, (*names, "drop", "proj"))  # the last two run on another shape
    )


def _parameters(module: nn.Module) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Weights [E,D] and biases [E] of queries, keys and values."""
    if module.qkv is None:
        linears = module.q, module.k, module.v
        return tuple(linear.weight for linear in linears), tuple(linear.bias for linear in linears)
    bias = module.qkv.bias
    return module.qkv.weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3)


def flops(module: nn.Module) -> Flops:
    out = module.embed_dim if isinstance(module.proj, nn.Identity) else module.out_features
    return all_positions_flops(module.in_features, module.embed_dim, out, len(module.pos_embed), module.num_heads)


def examples(module: nn.Module, generator: torch.Generator) -> list[tuple]:
    height, width = module.feat_size
    grids = [torch.randn(3, module.in_features, *size, generator=generator) for size in ((height, width), (3, 2))]
    return [(grids[0],), (grids[0], True), (grids[1],)]


class Fusion(FusedPooler):
    """x [B,D,H,W] → [B,out]; with `pre_logits` without the output projection."""

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        from timm.layers import resample_abs_pos_embed

        size = x.shape[2:]
        positions = resample_abs_pos_embed(self.pos_embed[None], size, old_size=self.feat_size, num_prefix_tokens=1)
        x = x.flatten(2).mT
        if self.cls_token is None:
            first = x.mean(1, keepdim=True)
            x = torch.cat([first, x], 1) + positions
            first = x[:, :1]
        else:  # the same query, and so the same codes, for all samples
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + positions
            first = self.cls_token + positions[:, 0]
        weights, biases = _parameters(self)
        queries = nn.functional.linear(first, weights[0], biases[0])
        key_bias = None if self.qkv is not None else biases[1]
        x = attend(x, queries, *weights[1:], biases[2], heads=self.num_heads, key_bias=key_bias)[:, 0]
        x = self.drop(x)
        return x if pre_logits else self.proj(x)
