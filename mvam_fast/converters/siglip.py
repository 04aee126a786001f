"""transformers' SiglipMultiheadAttentionPoolingHead and its copies: one probe, attention, and a residual MLP."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from . import multihead
from .classes import FusedPooler
from .features import owns
from .folding import Flops

ARGUMENTS = ("hidden_state",)


def is_head(module: nn.Module) -> bool:
    return owns(module, {"probe"}, {"attention", "layernorm", "mlp"})


def recognises(module: nn.Module) -> bool:
    return is_head(module) and not hasattr(module, "num_heads")


def obstacle(module: nn.Module) -> str:
    return multihead.obstacle(module, "attention")


def flops(module: nn.Module) -> Flops:
    return multihead.flops(module.attention, queries=1)


def examples(module: nn.Module, generator: torch.Generator) -> list[tuple]:
    return [(torch.randn(3, 11, multihead.width(module.attention), generator=generator),)]


def head(module: nn.Module, hidden_state: Tensor, mask: Tensor | None = None) -> Tensor:
    """tokens [B,N,D], mask [B,N] → [B,D]."""
    residual = multihead.pool(module.attention, module.probe[0], hidden_state, mask=mask)
    return (residual + module.mlp(module.layernorm(residual)))[:, 0]


class Fusion(FusedPooler):
    """hidden_state [B,N,D] → [B,D]."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return head(self, hidden_state)
