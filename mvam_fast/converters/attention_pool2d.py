"""The attention pools of CLIP's ResNets, in open_clip's form: the mean of the grid attends to itself and the grid.

The original lets all N + 1 positions attend and keeps the first. Its query is made of the tokens, so every sample has
codes of its own, [B,H,D].
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .classes import FusedPooler
from .features import owns
from .folding import Flops, attend

ARGUMENTS = ("x",)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "c_proj")


def all_positions_flops(width: int, inner: int, out: int, length: int, heads: int) -> Flops:
    """Its own: three projections, attention and output projection of all positions; folded: one query."""
    return Flops(inner * (6 * width + 4 * length + 2 * out), 4 * heads * width, heads)


def recognises(module: nn.Module) -> bool:
    return owns(module, {"positional_embedding"}, set(_PROJECTIONS))


def obstacle(module: nn.Module) -> str:
    # The projections' weights are all that the original uses too, so hooks on them never ran.
    without = [name for name in _PROJECTIONS if getattr(module.get_submodule(name), "bias", None) is None]
    return f"{without[0]} has no bias" if without else ""


def flops(module: nn.Module) -> Flops:
    length, width = module.positional_embedding.shape
    return all_positions_flops(width, width, module.c_proj.weight.shape[0], length, module.num_heads)


def examples(module: nn.Module, generator: torch.Generator) -> list[tuple]:
    length, width = module.positional_embedding.shape
    return [(torch.randn(3, width, 1, length - 1, generator=generator),)]


class Fusion(FusedPooler):
    """x [B,D,H,W] → [B,out]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x.dtype)
        queries = nn.functional.linear(x[:, :1], self.q_proj.weight, self.q_proj.bias)
        attended = attend(
            x, queries, self.k_proj.weight, self.v_proj.weight, self.v_proj.bias,
            heads=self.num_heads, key_bias=self.k_proj.bias,
        )  # fmt: skip
        return nn.functional.linear(attended[:, 0], self.c_proj.weight, self.c_proj.bias)
