"""open_clip's AttentionalPooler (CoCa): LayerNorm of tokens and of queries, attention, and nothing after it.

Its attention is `nn.MultiheadAttention` up to open_clip 3.3 and a class of its own later; both are read by `multihead`.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from . import multihead
from .classes import FusedPooler
from .features import owns, passed_by
from .folding import Flops

ARGUMENTS = ("x",)


def recognises(module: nn.Module) -> bool:
    return owns(module, {"query"}, {"attn", "ln_q", "ln_k"})


def obstacle(module: nn.Module) -> str:
    return multihead.obstacle(module, "attn") or passed_by(module, ["ln_k"])


def flops(module: nn.Module) -> Flops:
    return multihead.flops(module.attn, len(module.query))


def examples(module: nn.Module, generator: torch.Generator) -> list[tuple]:
    return [(torch.randn(3, 11, multihead.width(module.attn), generator=generator),)]


class Fusion(FusedPooler):
    """x [B,N,context] → [B,queries,d_model]."""

    def forward(self, x: Tensor) -> Tensor:
        norm = {}
        # LayerNormFp32 differs by where it rounds; the op computes statistics in float32 anyhow.
        if isinstance(self.ln_k, nn.LayerNorm) and self.ln_k.weight is not None:
            norm = {"norm_weight": self.ln_k.weight, "norm_bias": self.ln_k.bias, "norm_eps": self.ln_k.eps}
        else:
            x = self.ln_k(x)
        return multihead.pool(self.attn, self.ln_q(self.query), x, norm=norm)
